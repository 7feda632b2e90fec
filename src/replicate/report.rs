//! What a cycle did.

use std::time::Instant;

use serde::Serialize;

use crate::delta::Method;
use crate::pipeline::Counted;

/// The report of one `sync`.
#[derive(Clone, Debug, Serialize)]
pub struct SyncReport {
    /// The source, as the user wrote it.
    pub source: String,
    /// The target, as the user wrote it.
    pub target: String,
    /// The snapshot that the delta started from; `None` for a whole copy.
    pub base: Option<String>,
    /// The snapshot that both sides have now.
    pub snapshot: String,
    /// The image's size in it, in bytes.
    pub size: u64,
    /// Whether there was nothing to do: the snapshot asked for was there already.
    pub already_there: bool,
    /// Whether this run finished a snapshot that an earlier one had begun.
    pub resumed: bool,
    /// The snapshot in flight that was finished before the one asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub finished_first: Option<String>,
    /// Whether HEAD of the target was brought back to the base first, because it held parts of a lost snapshot.
    pub rewound: bool,
    /// How the delta was found; `None` when nothing was left to move.
    pub method: Option<Method>,
    /// What was moved.
    #[serde(flatten)]
    pub moved: Counted,
    /// For a source without snapshots: whether it is certain that it did not change while it was read. `None` for a
    /// source with snapshots, which don't change.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unchanged_while_read: Option<bool>,
    /// What was removed, and what could not be.
    pub pruned: Pruned,
    /// Where the time went.
    pub stages: Stages,
    /// What the user should know about the images.
    pub remarks: Vec<String>,
}

/// Snapshots that were removed.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Pruned {
    /// From the source.
    pub source: Vec<String>,
    /// From the target.
    pub target: Vec<String>,
    /// What could not be removed, and why. The next run tries again.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub left: Vec<String>,
}

/// How long each stage took, in seconds.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Stages {
    /// Taking the lease, reading the state and both sides' snapshots, deciding.
    pub look_seconds: f64,
    /// Creating the source snapshot.
    pub source_snapshot_seconds: f64,
    /// Bringing HEAD back to the base.
    pub rewind_seconds: f64,
    /// Planning the delta.
    pub plan_seconds: f64,
    /// Reading, transferring, writing, flushing.
    pub transfer_seconds: f64,
    /// Creating the target snapshot and entering it into the state.
    pub commit_seconds: f64,
    /// From the beginning to the commit.
    pub until_commit_seconds: f64,
    /// Removing older snapshots, after the commit.
    pub prune_seconds: f64,
}

/// Measures stages one after the other.
#[derive(Debug)]
pub(super) struct Clock {
    begun: Instant,
    lap: Instant,
}

impl Clock {
    pub(super) fn start() -> Self {
        let now = Instant::now();
        Self { begun: now, lap: now }
    }

    /// The seconds since the last lap; begins the next.
    pub(super) fn lap(&mut self) -> f64 {
        let now = Instant::now();
        now.duration_since(std::mem::replace(&mut self.lap, now)).as_secs_f64()
    }

    /// The seconds since the start.
    pub(super) fn total(&self) -> f64 {
        self.begun.elapsed().as_secs_f64()
    }
}
