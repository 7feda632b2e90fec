//! What is known of a fleet: pure data, as it is shown by `status`, the HTTP API and the metrics.

use serde::{Deserialize, Serialize};

/// All of a plan, as one process sees it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FleetStatus {
    /// The plan file.
    pub plan: String,
    /// `daemon`: from a running `poolshift replicate`. `images`: read from the images, without one; then rates,
    /// predictions and errors are missing.
    pub origin: Origin,
    /// When this was true, RFC 3339.
    pub at: String,
    /// The process, where there is one.
    pub worker: Option<WorkerStatus>,
    /// The servers, in the plan's order.
    pub servers: Vec<ServerStatus>,
    /// Limits of source pools.
    pub throttles: Vec<ThrottleStatus>,
}

/// Where a status comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Origin {
    /// A running daemon.
    Daemon,
    /// The images themselves.
    Images,
}

/// A `poolshift replicate` process.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WorkerStatus {
    /// Its host.
    pub host: String,
    /// Its process id.
    pub pid: u32,
    /// When it started, RFC 3339.
    pub since: String,
    /// Volumes that it works on now.
    pub volumes_running: usize,
    /// Cycles of servers it has brought to an end.
    pub cycles_completed: u64,
    /// Cycles that failed.
    pub cycles_failed: u64,
    /// Its resident memory, in bytes.
    pub resident_bytes: u64,
}

/// What a server or a volume is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Activity {
    /// Never looked at yet.
    Unknown,
    /// Has no committed point yet, and waits for its turn.
    NeverSynced,
    /// Is being copied for the first time.
    FirstSync,
    /// A cycle runs.
    Syncing,
    /// Waits for its next cycle.
    Waiting,
    /// Failed, and is tried again later.
    BackingOff,
    /// Failed in a way that a person must look at; nothing is tried until then.
    Held,
    /// Paused by a person.
    Paused,
    /// Another worker works on it.
    Elsewhere,
}

/// A server: its disks share every point.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ServerStatus {
    /// Its name in the plan.
    pub name: String,
    /// What it is doing.
    pub activity: Activity,
    /// Why it is paused, if it is: `by the plan`, `by a person at …`, `cut over to its targets at …`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub paused_because: Option<String>,
    /// The newest point that all its volumes have on the target.
    pub point: Option<PointStatus>,
    /// The age of that point or, where nothing has changed since, of the last look that saw so; in seconds.
    pub lag_seconds: Option<f64>,
    /// The lag that the plan wants, in seconds.
    pub target_lag_seconds: f64,
    /// What has changed since that point, in bytes, all volumes together.
    pub changed_bytes: Option<u64>,
    /// How much changes on the source in a second, in bytes, all volumes together.
    pub change_rate: Option<f64>,
    /// How much is moved in a second while a cycle runs, in bytes.
    pub throughput: Option<f64>,
    /// How long the final delta would take if it started now, in seconds.
    pub predicted_outage_seconds: Option<f64>,
    /// Whether its lag is going to come down to what the plan wants.
    pub convergence: Convergence,
    /// When the next cycle is due, RFC 3339.
    pub next_at: Option<String>,
    /// What is not as the plan has it where the server runs, a sentence each.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub drift: Vec<String>,
    /// What went wrong last, if nothing has gone well since.
    pub last_error: Option<ErrorStatus>,
    /// The newest cycle of this process that made a point.
    pub last_cycle: Option<LastCycle>,
    /// Its volumes.
    pub volumes: Vec<VolumeStatus>,
}

/// A cycle that made a point.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LastCycle {
    /// The point.
    pub snapshot: String,
    /// From the first intent to the last commit, in seconds.
    pub seconds: f64,
    /// What was expected of it when it was looked at a moment before, in seconds.
    pub predicted_seconds: Option<f64>,
    /// What had changed by then, in bytes: whole objects, so at most.
    pub changed_bytes: Option<u64>,
    /// What was written to the targets, in bytes.
    pub written_bytes: u64,
    /// How long the writers were frozen, in seconds, if they were.
    pub frozen_seconds: Option<f64>,
}

/// A committed point.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PointStatus {
    /// The snapshot's name, on both sides.
    pub snapshot: String,
    /// When the source snapshot was made, RFC 3339.
    pub at: String,
}

/// Whether a server's lag comes down.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "state")]
pub enum Convergence {
    /// Not known yet.
    Unknown,
    /// More is moved than changes.
    Converging,
    /// The lag is within what the plan wants.
    InStep,
    /// More changes than is moved.
    Diverging {
        /// What would make it converge, in a sentence.
        cure: String,
    },
}

/// What went wrong.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorStatus {
    /// When, RFC 3339.
    pub at: String,
    /// What, where and what to do.
    pub message: String,
    /// Whether it is tried again by itself.
    pub retryable: bool,
    /// How many times in a row.
    pub count: u32,
}

/// One disk.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VolumeStatus {
    /// Its name in the plan.
    pub name: String,
    /// The image that is read.
    pub source: String,
    /// The image that is written.
    pub target: String,
    /// Whether the server boots from it.
    pub boot: bool,
    /// What it is doing.
    pub activity: Activity,
    /// Its size, in bytes.
    pub size: Option<u64>,
    /// The newest snapshot on both sides, from which the next delta starts.
    pub base: Option<PointStatus>,
    /// As [`ServerStatus::lag_seconds`], for that snapshot.
    pub lag_seconds: Option<f64>,
    /// What has changed since, in bytes: whole objects, so at most.
    pub changed_bytes: Option<u64>,
    /// How much changes in a second, in bytes.
    pub change_rate: Option<f64>,
    /// How much is moved in a second while a cycle runs, in bytes.
    pub throughput: Option<f64>,
    /// The cycle that runs now.
    pub cycle: Option<CycleStatus>,
    /// Who holds the target's lease, `host (pid)`.
    pub lease: Option<String>,
    /// What went wrong last, if nothing has gone well since.
    pub last_error: Option<ErrorStatus>,
}

/// A cycle that runs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CycleStatus {
    /// The snapshot it brings over.
    pub snapshot: Option<String>,
    /// When it began, RFC 3339.
    pub since: String,
    /// Bytes of its delta that are done.
    pub done_bytes: u64,
    /// Bytes of its delta, at most; 0 while that is not known.
    pub total_bytes: u64,
}

/// The limit of a source pool, as it is now.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ThrottleStatus {
    /// The pool.
    pub pool: String,
    /// The limit now, bytes a second; `None` for none.
    pub bytes_per_second: Option<u64>,
    /// The limit now, operations a second.
    pub operations_per_second: Option<u64>,
    /// Why it is that: `plan`, `window 22:00-06:00`, `set by hand`, `lowered: reads take 80 ms`.
    pub reason: String,
    /// The mean latency of our reads, in seconds, while there are any.
    pub latency_seconds: Option<f64>,
    /// What is used of it, bytes a second.
    pub used_bytes_per_second: f64,
}

/// One sample of a server's history.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// When, in seconds since 1970.
    pub at: f64,
    /// See [`ServerStatus::lag_seconds`].
    pub lag_seconds: Option<f64>,
    /// See [`ServerStatus::changed_bytes`].
    pub changed_bytes: Option<u64>,
    /// See [`ServerStatus::change_rate`].
    pub change_rate: Option<f64>,
    /// See [`ServerStatus::throughput`].
    pub throughput: Option<f64>,
    /// See [`ServerStatus::predicted_outage_seconds`].
    pub predicted_outage_seconds: Option<f64>,
}

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// Grows by one with each event of the process.
    pub id: u64,
    /// When, RFC 3339.
    pub at: String,
    /// To which server; `None` for the whole process.
    pub server: Option<String>,
    /// To which of its volumes.
    pub volume: Option<String>,
    /// What, in a word: see [`EventKind`].
    pub kind: EventKind,
    /// What, in a sentence.
    pub message: String,
}

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EventKind {
    /// The process has started, or is about to stop.
    Worker,
    /// The plan was read again.
    PlanReloaded,
    /// A cycle began.
    CycleStarted,
    /// All volumes of a server have a new point.
    PointCommitted,
    /// Nothing had changed.
    NothingChanged,
    /// A cycle failed.
    CycleFailed,
    /// A server is held until a person has looked at it.
    Held,
    /// A person paused something, or resumed it, or asked for a cycle now.
    Action,
    /// A throttle was changed by a person, a window or the latency.
    Throttle,
    /// A lease was taken over from a worker that is gone.
    TakenOver,
    /// A server is not as its plan has it, where it runs.
    Drift,
}
