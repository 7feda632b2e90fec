//! Drift: what has become of a server where it runs that its plan does not know of. Whoever runs it is asked before its
//! cycles, not more often than once a minute; what does not answer has not drifted.

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
pub(super) struct Drifts(Mutex<HashMap<String, (Instant, Vec<Drift>)>>);

impl Drifts {
    fn known(&self, server: &str) -> Option<Vec<Drift>> {
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.get(server).filter(|(at, _)| at.elapsed() < GOOD_FOR).map(|(_, drift)| drift.clone())
    }

    /// Keeps an answer; says whether it is another one than the last.
    fn keep(&self, server: &str, drift: &[Drift]) -> bool {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let before = known.insert(server.to_owned(), (Instant::now(), drift.to_vec()));
        before.map_or(!drift.is_empty(), |(_, before)| before != drift)
    }

    /// The plan may be another one.
    pub(super) fn forget(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

impl Shared {
    /// Finds out whether a server has drifted, and shows it. Gives back what its replication is held for.
    pub(super) async fn drifted(&self, server: &Server) -> Option<(String, CycleError)> {
        let drift = match self.drifts.known(&server.name) {
            Some(known) => known,
            None => {
                let drift = self.opener.drift(server).await;
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
        };
        let Drift { about, text, .. } = drift.into_iter().find(|drift| drift.holds)?;
        let place = server.volumes.iter().find(|volume| volume.name == about);
        let place = place.map_or_else(|| format!("server {}", server.name), |volume| volume.source.to_string());
        let error = ImageError::new(ErrorKind::Unsupported, place, "replicate it").detail(text);
        Some((about, error.hint("once that is settled: poolshift resume").into()))
    }
}
