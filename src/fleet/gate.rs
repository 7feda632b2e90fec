//! One point for all volumes of a server: their snapshots are made at the same moment, or none is.
//!
//! Each volume's cycle stores its intent with its target and then asks for its source snapshot ([`Snapshotter`]). Here
//! the cycles wait for each other; the last to come freezes the writers, makes all snapshots in parallel, and thaws.
//! Only when all of them were made within the freeze does any cycle get its snapshot and record its id. A record with an
//! id therefore proves that the point is one.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use futures::future::join_all;
use tokio::sync::oneshot;

use super::quiesce::{self, QuiesceError};
use crate::failpoint::failpoint;
use crate::image::{ErrorKind, ImageError, Snapshot, SourceImage};
use crate::plan::Quiesce;
use crate::replicate::Snapshotter;

/// Where the cycles of a server wait for each other.
#[derive(Debug)]
pub(super) struct Gate {
    server: String,
    quiesce: Quiesce,
    waiting: Mutex<Waiting>,
}

#[derive(Debug)]
struct Waiting {
    /// How many have not come yet.
    missing: usize,
    arrived: Vec<Arrival>,
    /// Why there will be no point, once that is clear.
    broken: Option<String>,
    frozen_for: Option<Duration>,
}

struct Arrival {
    source: Arc<dyn SourceImage>,
    name: String,
    answer: oneshot::Sender<Result<Snapshot, ImageError>>,
}

impl std::fmt::Debug for Arrival {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.source.location())
    }
}

/// One volume's way through the gate.
#[derive(Debug)]
pub(super) struct Member {
    gate: Arc<Gate>,
    arrived: AtomicBool,
    given_up: AtomicBool,
}

/// Marks the error of a volume that failed only because another one of its server did.
#[derive(Debug, thiserror::Error)]
#[error("the point was given up")]
struct GivenUp;

fn given_up(location: &str, why: &str) -> ImageError {
    let error = ImageError::new(ErrorKind::Io, location, "make a snapshot together with the server's other volumes");
    error.detail(why.to_owned()).caused_by(GivenUp)
}

impl Gate {
    /// A gate for so many volumes.
    pub(super) fn new(server: &str, quiesce: &Quiesce, volumes: usize) -> Arc<Self> {
        let waiting = Waiting { missing: volumes, arrived: Vec::new(), broken: None, frozen_for: None };
        Arc::new(Self { server: server.to_owned(), quiesce: quiesce.clone(), waiting: Mutex::new(waiting) })
    }

    pub(super) fn member(self: &Arc<Self>) -> Arc<Member> {
        Arc::new(Member { gate: self.clone(), arrived: AtomicBool::new(false), given_up: AtomicBool::new(false) })
    }

    /// How long the writers were frozen, if they were.
    pub(super) fn frozen_for(&self) -> Option<Duration> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).frozen_for
    }

    /// No point: everybody who waits is told, and everybody who is still to come.
    fn give_up(&self, why: &str) {
        let arrived = {
            let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
            waiting.broken.get_or_insert_with(|| why.to_owned());
            std::mem::take(&mut waiting.arrived)
        };
        for arrival in arrived {
            // Whoever does not wait any more need not be told.
            let _ = arrival.answer.send(Err(given_up(arrival.source.location(), why)));
        }
    }

    /// Everybody is here: freezes, snapshots, thaws, and tells all.
    async fn make_point(&self, arrived: Vec<Arrival>) {
        let point = arrived.first().map(|arrival| arrival.name.clone()).unwrap_or_default();
        let made = self.snapshots(&arrived, &point).await;
        match made {
            Ok(snapshots) => {
                for (arrival, snapshot) in arrived.into_iter().zip(snapshots) {
                    let _ = arrival.answer.send(Ok(snapshot));
                }
            }
            Err((culprit, error)) => {
                let why = format!("point {point} was given up: {error}");
                let mut error = Some(error);
                for (index, arrival) in arrived.into_iter().enumerate() {
                    let own = error.take_if(|_| culprit == Some(index) || culprit.is_none());
                    let told = own.unwrap_or_else(|| given_up(arrival.source.location(), &why));
                    let _ = arrival.answer.send(Err(told));
                }
            }
        }
    }

    /// The snapshots of all, or the error, with whose it is. On an error none of them is left, as far as possible; what
    /// is left is known by the intents, and removed by the next cycle.
    async fn snapshots(&self, arrived: &[Arrival], point: &str) -> Result<Vec<Snapshot>, (Option<usize>, ImageError)> {
        let hook = |error: QuiesceError| {
            let failed = ImageError::new(ErrorKind::Io, &self.server, "make a point of all its volumes");
            (None, failed.detail(error.to_string()).caused_by(error))
        };
        let frozen = quiesce::freeze(&self.quiesce, &self.server, point).await.map_err(hook)?;
        failpoint!("point.frozen");
        let made = join_all(arrived.iter().map(|arrival| arrival.source.create_snapshot(&arrival.name))).await;
        failpoint!("point.snapshots");
        let thawed = match frozen {
            Some(frozen) => frozen.thaw().await.map(Some),
            None => Ok(None),
        };
        failpoint!("point.thawed");
        let mut failed = None;
        let mut snapshots = Vec::new();
        for (index, made) in made.into_iter().enumerate() {
            match made {
                Ok(snapshot) => snapshots.push((index, snapshot)),
                Err(error) if failed.is_none() => failed = Some((Some(index), error)),
                Err(_) => {}
            }
        }
        match (failed, thawed) {
            (None, Ok(frozen_for)) => {
                self.waiting.lock().unwrap_or_else(PoisonError::into_inner).frozen_for = frozen_for;
                Ok(snapshots.into_iter().map(|(_, snapshot)| snapshot).collect())
            }
            (failed, thawed) => {
                let removals =
                    snapshots.iter().map(|(index, snapshot)| arrived[*index].source.remove_snapshot(snapshot));
                for error in join_all(removals).await.into_iter().filter_map(Result::err) {
                    tracing::debug!(%error, "a snapshot of a point that was given up is left for the next cycle");
                }
                // A server that could not be thawed is worse than a snapshot that could not be made.
                Err(match thawed {
                    Err(error) => hook(error),
                    Ok(_) => failed.unwrap_or_else(|| (None, given_up(&self.server, "no reason was given"))),
                })
            }
        }
    }
}

impl Member {
    /// Whether this volume failed only because another did.
    pub(super) fn was_given_up(&self) -> bool {
        self.given_up.load(Ordering::Acquire)
    }

    /// The volume's cycle has ended. If it never came to the gate, nobody gets through any more.
    pub(super) fn leave(&self, why: &str) {
        if !self.arrived.load(Ordering::Acquire) {
            self.gate.give_up(why);
        }
    }
}

#[async_trait]
impl Snapshotter for Member {
    async fn create(&self, source: &Arc<dyn SourceImage>, name: &str) -> Result<Snapshot, ImageError> {
        let (answer, wait) = oneshot::channel();
        let all = {
            let mut waiting = self.gate.waiting.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(why) = &waiting.broken {
                self.given_up.store(true, Ordering::Release);
                return Err(given_up(source.location(), why));
            }
            self.arrived.store(true, Ordering::Release);
            waiting.arrived.push(Arrival { source: source.clone(), name: name.to_owned(), answer });
            waiting.missing = waiting.missing.saturating_sub(1);
            (waiting.missing == 0).then(|| std::mem::take(&mut waiting.arrived))
        };
        if let Some(arrived) = all {
            self.gate.make_point(arrived).await;
        }
        match wait.await {
            Ok(Ok(snapshot)) => Ok(snapshot),
            Ok(Err(error)) => {
                let another = error.source.as_ref().is_some_and(|source| source.is::<GivenUp>());
                self.given_up.store(another, Ordering::Release);
                Err(error)
            }
            Err(_) => {
                self.given_up.store(true, Ordering::Release);
                Err(given_up(source.location(), "the cycle that made the snapshots of all volumes was stopped"))
            }
        }
    }
}

/// Makes no snapshot: for cycles that finish what was begun, and must not begin anything.
#[derive(Debug)]
pub(super) struct NoSnapshots;

#[async_trait]
impl Snapshotter for NoSnapshots {
    async fn create(&self, source: &Arc<dyn SourceImage>, name: &str) -> Result<Snapshot, ImageError> {
        let gone = ImageError::new(ErrorKind::Io, source.location(), format!("finish snapshot {name}"));
        Err(gone.detail("it is no longer there; the next cycle makes another"))
    }
}
