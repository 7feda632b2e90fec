//! Drift: what has become of a server where it runs that its plan does not know of. Whoever runs it is asked before its
//! cycles, not more often than once a minute; where that does not answer, its last answer counts.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use super::shared::Shared;
use super::status::EventKind;
use crate::image::{ErrorKind, ImageError};
use crate::plan::Server;
use crate::replicate::CycleError;

/// How old an answer may be.
const GOOD_FOR: Duration = Duration::from_secs(60);

/// Something about a server that is not as its plan has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Drift {
    /// The volume that it is about, or the server, by their names in the plan.
    pub about: String,
    /// What, and what to do about it: a sentence.
    pub text: String,
    /// Whether nothing is to be replicated before a person has looked at it.
    pub holds: bool,
}

/// What was answered last.
#[derive(Debug, Default)]
pub(super) struct Drifts(Mutex<HashMap<String, Answer>>);

/// When it was answered, but where it is to be asked anew in any case; and what.
type Answer = (Option<Instant>, Vec<Drift>);

impl Drifts {
    fn known(&self, server: &str) -> Option<Vec<Drift>> {
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let is_good = |at: &Option<Instant>| at.is_some_and(|at| at.elapsed() < GOOD_FOR);
        let known = known.get(server).filter(|(at, _)| is_good(at)).map(|(_, drift)| drift.clone());
        // What holds is asked anew: it may have passed.
        known.filter(|drift| !drift.iter().any(|drift| drift.holds))
    }

    /// What was answered last: nothing, where nobody ever did. That counts for as long as an answer does.
    fn last(&self, server: &str) -> Vec<Drift> {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (at, drift) = known.entry(server.to_owned()).or_default();
        *at = Some(Instant::now());
        drift.clone()
    }

    /// Keeps an answer; says whether it is another one than the last.
    fn keep(&self, server: &str, drift: &[Drift]) -> bool {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let before = known.insert(server.to_owned(), (Some(Instant::now()), drift.to_vec()));
        before.map_or(!drift.is_empty(), |(_, before)| before != drift)
    }

    /// The plan may be another one: all are to be asked anew. What they said counts until they answer.
    pub(super) fn ask_anew(&self) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.values_mut().for_each(|(at, _)| *at = None);
    }
}

impl Shared {
    /// Finds out whether a server has drifted, and shows it. Gives back what its replication is held for.
    pub(super) async fn drifted(&self, server: &Server) -> Option<(String, CycleError)> {
        let drift = match self.drifts.known(&server.name) {
            Some(known) => known,
            None => self.ask_whether_drifted(server).await,
        };
        let Drift { about, text, .. } = drift.into_iter().find(|drift| drift.holds)?;
        let place = server.volumes.iter().find(|volume| volume.name == about);
        let place = place.map_or_else(|| format!("server {}", server.name), |volume| volume.source.to_string());
        let error = ImageError::new(ErrorKind::Unsupported, place, "replicate it").detail(text);
        Some((about, error.hint("once that is settled: poolshift resume").into()))
    }

    async fn ask_whether_drifted(&self, server: &Server) -> Vec<Drift> {
        let Some(drift) = self.opener.drift(server).await else { return self.drifts.last(&server.name) };
        if let Some(track) = self.core().tracks.get_mut(&server.name) {
            track.drifted(drift.iter().map(|drift| format!("{}: {}", drift.about, drift.text)).collect());
        }
        if self.drifts.keep(&server.name, &drift) {
            for Drift { about, text, .. } in &drift {
                self.events.tell(EventKind::Drift, Some(&server.name), None, format!("{about}: {text}"));
            }
        }
        drift
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn what_was_answered_last_counts_until_there_is_another_answer() {
        let drift = |holds| Drift { about: "root".into(), text: "it has another type".into(), holds };
        let drifts = Drifts::default();
        assert_eq!((drifts.known("web"), drifts.last("web")), (None, vec![]));
        assert_eq!(drifts.known("web"), Some(vec![]), "who does not answer is not asked before every cycle");
        for holds in [true, false] {
            assert!(drifts.keep("web", &[drift(holds)]));
            tokio::time::advance(GOOD_FOR).await;
            assert_eq!(drifts.known("web"), None);
            assert_eq!(drifts.last("web"), [drift(holds)], "a server is not let go because nobody answers");
            assert_eq!(drifts.known("web"), (!holds).then(|| vec![drift(holds)]));
        }
        drifts.ask_anew();
        assert_eq!((drifts.known("web"), drifts.last("web")), (None, vec![drift(false)]));
        assert!(!drifts.keep("web", &[drift(false)]), "it is told once");
        assert!(drifts.keep("web", &[]));
    }
}
