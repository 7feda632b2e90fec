//! A server whose images are open, and what its cutover is told, tells, and ends with.

use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use tokio::sync::Semaphore;

use super::journal::JournalError;
use super::phase::Phase;
use super::provider::{Precondition, Provider, ProviderError, ServerDisk, Side};
use crate::fleet::group::GroupError;
use crate::image::{Disk, ImageError};
use crate::plan::Retention;
use crate::replicate::CycleError;

/// A volume of a server, open on both sides.
#[derive(Clone)]
pub struct Volume {
    /// The names: in the plan, and of both images while they are in use.
    pub disk: ServerDisk,
    /// The source. It may be called [`super::journal::kept_name`] at present.
    pub source: Arc<dyn Disk>,
    /// The target.
    pub target: Arc<dyn Disk>,
}

/// A server, open.
#[derive(Clone)]
pub struct Server {
    /// Its name in the plan.
    pub name: String,
    /// Its volumes, in the order of the plan. The first one's target keeps the journal.
    pub volumes: Vec<Volume>,
    /// Who stops and starts it.
    pub provider: Arc<dyn Provider>,
    /// What stays of the points.
    pub retention: Retention,
}

/// How much of the copy is proved before the server runs from it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Proof {
    /// Nothing.
    None,
    /// Every extent of the last delta is read on both sides and compared.
    Delta,
    /// That, and a random sample of the rest, before the server is stopped.
    #[default]
    Sample,
    /// That, and all of the rest, before the server is stopped.
    Full,
}

/// What a cutover is told.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// How much is proved.
    pub proof: Proof,
    /// Refuses to begin when the prediction is over it; goes back when it passes before the server is started.
    pub max_outage: Option<Duration>,
    /// How many servers may stand still at the same time, of all that have this one; `None`: each goes when it is ready.
    pub turns: Option<Arc<Semaphore>>,
}

/// Is told how far it is.
pub trait Observer: Send + Sync {
    /// A phase began.
    fn phase(&self, _phase: Phase) {}

    /// Something that a person should know: `waiting for the worker on host a to finish its cycle`.
    fn note(&self, _text: &str) {}
}

/// What was looked at before anything is done.
#[derive(Clone, Debug, Serialize)]
pub struct Readiness {
    /// Everything that has to be so, with its verdict.
    pub preconditions: Vec<Precondition>,
    /// How long the last delta would take if it began now; `None` where nothing tells.
    #[serde(rename = "predicted_delta_seconds", serialize_with = "optional_seconds")]
    pub predicted_delta: Option<Duration>,
    /// How long the server would not run if it began now; `None` where nothing tells: how long it takes to stop and to
    /// boot, it alone knows.
    #[serde(rename = "predicted_outage_seconds", serialize_with = "optional_seconds")]
    pub predicted_outage: Option<Duration>,
    /// What would be carried over while it stands still, in bytes, at most.
    pub delta_bytes: Option<u64>,
}

/// How long a phase took.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PhaseTime {
    /// The phase.
    pub phase: Phase,
    /// How long.
    #[serde(rename = "seconds", serialize_with = "seconds")]
    pub took: Duration,
}

/// How a cutover, or a way back, ended.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The server.
    pub server: String,
    /// Who did it: `libvirt domain web-1, warm`.
    pub by: String,
    /// Where the server runs now.
    pub runs_from: Side,
    /// [`Phase::Committed`], or [`Phase::RolledBack`] with why in `rolled_back_because`.
    pub ended: Phase,
    /// How long the server did not run; `None` if it was not stopped, or nobody knows since when it was.
    #[serde(rename = "outage_seconds", serialize_with = "optional_seconds")]
    pub outage: Option<Duration>,
    /// The phases, in their order.
    pub phases: Vec<PhaseTime>,
    /// What was carried over while the server stood still, in bytes.
    pub delta_bytes: u64,
    /// What was read on both sides and found equal, in bytes.
    pub proved_bytes: u64,
    /// Why it went back.
    pub rolled_back_because: Option<String>,
    /// What a person has to know or to do.
    pub remarks: Vec<String>,
}

fn seconds<S: serde::Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_f64(duration.as_secs_f64())
}

fn optional_seconds<S: serde::Serializer>(duration: &Option<Duration>, serializer: S) -> Result<S::Ok, S::Error> {
    duration.map(|duration| duration.as_secs_f64()).serialize(serializer)
}

/// Why a cutover did not come to its end. What was begun is in the journal.
#[derive(Debug, thiserror::Error)]
pub enum CutoverError {
    /// It may not begin; nothing was changed.
    #[error("{server} can't be cut over now: {}", summary(.preconditions))]
    NotReady {
        /// The server.
        server: String,
        /// What stands in the way.
        preconditions: Vec<Precondition>,
    },
    /// It may not be rehearsed; nothing was made.
    #[error("{server} can't be rehearsed now: {}", summary(.preconditions))]
    NoStage {
        /// The server.
        server: String,
        /// What stands in the way.
        preconditions: Vec<Precondition>,
    },
    /// It is somewhere else already, or was never cut over.
    #[error("{server} {problem}")]
    WrongState {
        /// The server.
        server: String,
        /// `runs from its targets already`.
        problem: String,
        /// What to do about it.
        hint: String,
    },
    /// It may not be finalized yet; nothing was changed.
    #[error("{server} can't be finalized now: {}", .obstacles.join("; "))]
    Bound {
        /// The server.
        server: String,
        /// What stands in the way, a sentence each.
        obstacles: Vec<String>,
    },
    /// Cinder is not asked to move it.
    #[error("volume {volume} can't be retyped now: {}", .obstacles.join("; "))]
    NotRetyped {
        /// The volume, by its name in the plan.
        volume: String,
        /// What stands in the way, a sentence each.
        obstacles: Vec<String>,
    },
    /// Both sides may have been written: a person has to say which one counts.
    #[error("{server}: {problem}")]
    Diverged {
        /// The server.
        server: String,
        /// What was found.
        problem: String,
        /// What to do about it.
        hint: String,
    },
    /// The copy is not what it should be.
    #[error("the copy of {volume} differs from its source in {range}")]
    Different {
        /// The volume.
        volume: String,
        /// The first range that differs.
        range: String,
    },
    /// The limit on the outage has passed, or is predicted to.
    #[error("{server}: the outage {how} its limit of {limit:?}")]
    TooLong {
        /// The server.
        server: String,
        /// `has passed`, `would be 12 s, over`.
        how: String,
        /// The limit.
        limit: Duration,
    },
    /// It went back after this had happened, and could not do that either: the server may be down.
    #[error("{server} could not be brought back; it had to go back because: {because}")]
    NotBrought {
        /// The server.
        server: String,
        /// What happened on the way back.
        #[source]
        error: Box<CutoverError>,
        /// What happened before.
        because: String,
    },
    /// An earlier walk was cut, and is undone.
    #[error("{server}: a walk that was cut at {phase} was undone")]
    Unfinished {
        /// The server.
        server: String,
        /// Where it was.
        phase: Phase,
    },
    /// It was told to stop.
    #[error("{server}: interrupted")]
    Interrupted {
        /// The server.
        server: String,
    },
    /// The provider failed.
    #[error(transparent)]
    Provider(#[from] ProviderError),
    /// A cycle failed.
    #[error(transparent)]
    Cycle(#[from] CycleError),
    /// A server's cycle failed.
    #[error(transparent)]
    Group(#[from] GroupError),
    /// An image failed.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The journal is damaged.
    #[error("{location}: {error}")]
    Journal {
        /// The image that it is kept with.
        location: String,
        /// Why.
        #[source]
        error: JournalError,
    },
}

fn summary(preconditions: &[Precondition]) -> String {
    let wrong = preconditions.iter().filter(|found| found.verdict == super::provider::Verdict::Error);
    let texts: Vec<String> = wrong.map(|found| format!("{}: {}", found.what, found.found)).collect();
    texts.join("; ")
}

/// What an operation on a server ends in.
pub type Result<T, E = CutoverError> = std::result::Result<T, E>;
