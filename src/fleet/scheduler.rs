//! Which servers are worked on now: a state machine without I/O, clock or threads.
//!
//! Every time is given from outside, so that a simulation of weeks takes seconds and replays from its seed.
//!
//! # The rules
//!
//! - A job is a server: its volumes are worked on together, and count as that many places.
//! - *Long* jobs (first copies, and deltas that are expected to take longer than [`LONG_INTERVALS`] intervals) share
//!   [`FleetLimits::first_syncs`] places, never all: what is small always finds a place that no long job can take.
//! - Among those that are due, the one with the most lag for what the plan wants comes first. Lag grows while a job
//!   waits, so that none waits for ever.
//! - One that needs several places, of any kind, and has waited for longer than its interval keeps smaller ones from slipping past it. A
//!   server of more volumes than there are places for takes those there are.
//! - After a failure that may pass by itself: back-off, doubled each time, with jitter. After any other the server is
//!   held until a person resumes it. Never a tight loop: between two starts of a job lies [`PAUSE_LEAST`].

use std::collections::{BTreeMap, BTreeSet, HashMap};

use crate::plan::{FleetLimits, Pace};

/// Milliseconds since 1970.
pub type Millis = i64;

/// The least time between the end of a job and its next start.
pub const PAUSE_LEAST: Millis = 1_000;

/// A delta that is expected to take longer than this many intervals is long.
pub const LONG_INTERVALS: f64 = 4.0;

/// The first back-off; doubled with each failure in a row.
const BACK_OFF_FIRST: Millis = 5_000;

/// The longest back-off.
const BACK_OFF_MOST: Millis = 10 * 60_000;

/// What a job asks for.
#[derive(Clone, Debug, PartialEq)]
pub struct Demand {
    /// The source pools of its volumes, each with how many: `None` is for those that are not on RBD.
    pub pools: BTreeMap<Option<String>, usize>,
    /// How often.
    pub pace: Pace,
}

impl Demand {
    fn volumes(&self) -> usize {
        self.pools.values().sum::<usize>().max(1)
    }
}

/// How a job ended.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Outcome {
    /// All volumes have a new point.
    Committed {
        /// When its source snapshots were made.
        point: Millis,
        /// How long the next delta is expected to take, in seconds, where that is known.
        next_seconds: Option<f64>,
    },
    /// Nothing had changed since the newest point.
    Unchanged {
        /// When that was seen.
        looked: Millis,
    },
    /// It failed.
    Failed {
        /// Whether it may succeed later without anybody's doing.
        retryable: bool,
    },
    /// Another worker has it, or had it a moment ago.
    Elsewhere {
        /// The newest point that it has made.
        point: Option<Millis>,
        /// When to look again.
        again: Millis,
    },
    /// It was stopped at a checkpoint, as it was told to.
    Interrupted,
}

/// What a job is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Waits until it is due, or for a place.
    Waiting,
    /// Is worked on.
    Running {
        /// Since when.
        since: Millis,
    },
    /// Waits until a person has looked at it.
    Held,
    /// Waits until a person resumes it.
    Paused,
}

#[derive(Clone, Debug)]
struct Job {
    demand: Demand,
    phase: Phase,
    /// Paused, or removed, while it runs: what becomes of it when it ends.
    pause_after: bool,
    due: Millis,
    /// When the newest point was made, or the job became known.
    newest: Millis,
    has_point: bool,
    long: bool,
    failures: u32,
    /// Grows from `interval` to the idle interval while nothing changes.
    interval: Millis,
    /// Asked for by a person: due as soon as it ends.
    again: bool,
}

/// What is known of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct JobView {
    /// What it is doing.
    pub phase: Phase,
    /// When it is due.
    pub due: Millis,
    /// Failures in a row.
    pub failures: u32,
    /// Whether it has a point.
    pub has_point: bool,
    /// Whether it counts as long.
    pub long: bool,
}

/// The scheduler.
#[derive(Clone, Debug)]
pub struct Scheduler {
    limits: FleetLimits,
    jobs: BTreeMap<String, Job>,
    random: fastrand::Rng,
}

/// The places that are free while starts are handed out.
struct Free {
    all: usize,
    long: usize,
    pools: HashMap<Option<String>, FreeInPool>,
}

/// The places of one source pool that are free.
struct FreeInPool {
    all: usize,
    long: usize,
}

fn millis(duration: std::time::Duration) -> Millis {
    Millis::try_from(duration.as_millis()).unwrap_or(Millis::MAX / 4)
}

/// The longest that an idle server goes without a look: never so long that its lag could pass what the plan wants
/// before anybody notices that it changes again.
fn idle_interval(pace: &Pace) -> Millis {
    millis(pace.idle_interval).min(millis(pace.interval).max(millis(pace.target_lag) / 2))
}

impl Scheduler {
    /// A scheduler without jobs. `seed` is for the jitter.
    pub fn new(limits: FleetLimits, seed: u64) -> Self {
        Self { limits, jobs: BTreeMap::new(), random: fastrand::Rng::with_seed(seed) }
    }

    /// Other limits, from now on.
    pub fn set_limits(&mut self, limits: FleetLimits) {
        self.limits = limits;
    }

    /// A new job, due at once; or another demand for one that is known.
    pub fn insert(&mut self, name: &str, demand: Demand, paused: bool, now: Millis) {
        let interval = millis(demand.pace.interval);
        if let Some(job) = self.jobs.get_mut(name) {
            job.due = job.due.min(now + interval);
            job.interval = interval;
            job.demand = demand;
            return;
        }
        let phase = if paused { Phase::Paused } else { Phase::Waiting };
        let job = Job {
            demand,
            phase,
            pause_after: false,
            due: now,
            newest: now,
            has_point: false,
            long: true,
            failures: 0,
            interval,
            again: false,
        };
        self.jobs.insert(name.to_owned(), job);
    }

    /// Forgets a job. The caller stops what runs of it.
    pub fn remove(&mut self, name: &str) {
        self.jobs.remove(name);
    }

    /// What is known of a job from the images, before its first cycle.
    pub fn found(&mut self, name: &str, point: Option<Millis>) {
        if let Some(job) = self.jobs.get_mut(name) {
            if job.has_point != point.is_some() {
                (job.has_point, job.long) = (point.is_some(), point.is_none());
            }
            job.newest = point.unwrap_or(job.newest);
        }
    }

    /// What is known of a job.
    pub fn view(&self, name: &str) -> Option<JobView> {
        let Job { phase, due, failures, has_point, long, .. } = *self.jobs.get(name)?;
        Some(JobView { phase, due, failures, has_point, long })
    }

    /// The jobs to be started now, in order. They count as running from here on.
    pub fn start_due(&mut self, now: Millis) -> Vec<String> {
        let mut due: Vec<(f64, String)> = Vec::new();
        for (name, job) in &self.jobs {
            if job.phase == Phase::Waiting && job.due <= now {
                due.push((urgency(job, now), name.clone()));
            }
        }
        due.sort_by(|(a, one), (b, other)| b.total_cmp(a).then_with(|| one.cmp(other)));
        let mut free = self.free();
        let (mut started, mut kept): (Vec<String>, BTreeSet<Option<String>>) = (Vec::new(), BTreeSet::new());
        let (mut all_kept, mut long_kept) = (false, false);
        for (_, name) in due {
            let Some(job) = self.jobs.get_mut(&name) else { continue };
            let pools: Vec<&Option<String>> = job.demand.pools.keys().collect();
            if all_kept || (job.long && long_kept) || pools.iter().any(|pool| kept.contains(*pool)) {
                continue;
            }
            match free.take(&job.demand, job.long, &self.limits) {
                Ok(()) => {
                    job.phase = Phase::Running { since: now };
                    job.again = false;
                    started.push(name);
                }
                // First copies wait for first copies, and for nobody else's turn.
                Err(Lack::Long) => long_kept = true,
                Err(_) if now - job.due <= job.interval => {}
                Err(Lack::Places) => all_kept = true,
                Err(Lack::Pool(pool)) => {
                    kept.insert(pool);
                }
            }
        }
        started
    }

    fn free(&self) -> Free {
        let long = long_limit(&self.limits);
        let mut free = Free { all: self.limits.volumes, long, pools: HashMap::new() };
        for job in self.jobs.values().filter(|job| matches!(job.phase, Phase::Running { .. })) {
            free.give(&job.demand, job.long, &self.limits);
        }
        free
    }

    /// A job that was started has ended.
    pub fn finish(&mut self, name: &str, now: Millis, outcome: Outcome) {
        let jitter = self.random.f64();
        let Some(job) = self.jobs.get_mut(name) else { return };
        let Phase::Running { since } = job.phase else { return };
        job.phase = Phase::Waiting;
        let interval = millis(job.demand.pace.interval);
        let after = |at: Millis| at.max(now + PAUSE_LEAST);
        match outcome {
            Outcome::Committed { point, next_seconds } => {
                (job.newest, job.has_point, job.failures, job.interval) = (point, true, 0, interval);
                let long = next_seconds.map(|seconds| seconds * 1000.0 > LONG_INTERVALS * interval as f64);
                job.long = long.unwrap_or(false);
                job.due = after(since + interval);
            }
            Outcome::Unchanged { looked } => {
                (job.newest, job.has_point, job.failures, job.long) = (looked, true, 0, false);
                job.due = after(since + job.interval);
                job.interval = (job.interval * 2).min(idle_interval(&job.demand.pace)).max(interval);
            }
            Outcome::Failed { retryable: true } => {
                job.failures = job.failures.saturating_add(1);
                let doubled = BACK_OFF_FIRST.saturating_mul(1 << job.failures.saturating_sub(1).min(16));
                // Three quarters to five quarters, so that those that failed together don't come back together.
                let wait = doubled.min(BACK_OFF_MOST) as f64 * (0.75 + 0.5 * jitter);
                job.due = after(now + wait as Millis);
            }
            Outcome::Failed { retryable: false } => {
                job.failures = job.failures.saturating_add(1);
                job.phase = Phase::Held;
            }
            Outcome::Elsewhere { point, again } => {
                job.failures = 0;
                if let Some(point) = point {
                    (job.newest, job.has_point, job.long) = (job.newest.max(point), true, false);
                }
                job.due = after(again);
            }
            Outcome::Interrupted => job.due = after(now),
        }
        if std::mem::take(&mut job.again) && job.phase == Phase::Waiting {
            job.due = now;
        }
        if std::mem::take(&mut job.pause_after) {
            job.phase = Phase::Paused;
        }
    }

    /// Pauses a job; one that runs is to be stopped by the caller, and pauses when it has ended.
    pub fn pause(&mut self, name: &str) {
        if let Some(job) = self.jobs.get_mut(name) {
            match job.phase {
                Phase::Running { .. } => job.pause_after = true,
                Phase::Waiting | Phase::Held | Phase::Paused => job.phase = Phase::Paused,
            }
        }
    }

    /// Makes a job that is paused or held due at once.
    pub fn resume(&mut self, name: &str, now: Millis) {
        if let Some(job) = self.jobs.get_mut(name) {
            job.pause_after = false;
            if matches!(job.phase, Phase::Held | Phase::Paused) {
                (job.phase, job.due, job.failures) = (Phase::Waiting, now, 0);
            }
        }
    }

    /// Makes a job due at once; one that runs starts again when it has ended. Paused ones stay paused.
    pub fn sync_now(&mut self, name: &str, now: Millis) {
        if let Some(job) = self.jobs.get_mut(name) {
            match job.phase {
                Phase::Waiting => job.due = job.due.min(now),
                Phase::Running { .. } => job.again = true,
                Phase::Held => (job.phase, job.due) = (Phase::Waiting, now),
                Phase::Paused => {}
            }
        }
    }

    /// When the next job gets due that is not due yet; `None` if there is none.
    pub fn next_due(&self, now: Millis) -> Option<Millis> {
        let waiting = self.jobs.values().filter(|job| job.phase == Phase::Waiting);
        waiting.map(|job| job.due).filter(|&due| due > now).min()
    }

    /// How many volumes are worked on.
    pub fn volumes_running(&self) -> usize {
        let running = self.jobs.values().filter(|job| matches!(job.phase, Phase::Running { .. }));
        running.map(|job| job.demand.volumes()).sum()
    }
}

/// How many times what the plan wants a job lags.
fn urgency(job: &Job, now: Millis) -> f64 {
    (now - job.newest).max(0) as f64 / millis(job.demand.pace.target_lag).max(1) as f64
}

/// What a job does not find.
enum Lack {
    /// The places that long jobs share.
    Long,
    Places,
    Pool(Option<String>),
}

/// How many places long jobs share: never all, where there is more than one.
fn long_limit(limits: &FleetLimits) -> usize {
    limits.first_syncs.min(limits.volumes.saturating_sub(1)).max(1)
}

/// How many of `all` places a job takes that has `volumes`: no more than long jobs may have or, for another one, than they
/// leave, or it would wait for ever.
fn places(volumes: usize, all: usize, long: bool, limits: &FleetLimits) -> usize {
    let for_long = long_limit(limits).min(all.saturating_sub(1)).max(1);
    volumes.min(if long { for_long } else { all.saturating_sub(for_long).max(1) })
}

impl Free {
    /// Takes the places of a job, if they are free.
    fn take(&mut self, demand: &Demand, long: bool, limits: &FleetLimits) -> Result<(), Lack> {
        let wanted = places(demand.volumes(), limits.volumes, long, limits);
        if long && wanted > self.long {
            return Err(Lack::Long);
        }
        let all = limits.volumes_per_pool;
        for (pool, count) in &demand.pools {
            let (wanted, free) = (places(*count, all, long, limits), self.pool(pool, limits));
            // A place of each pool is kept from long jobs, like the places of the process.
            if long && wanted > free.long {
                return Err(Lack::Long);
            }
            if wanted > free.all {
                return Err(Lack::Pool(pool.clone()));
            }
        }
        if wanted > self.all {
            return Err(Lack::Places);
        }
        self.give(demand, long, limits);
        Ok(())
    }

    /// What a job has is not free.
    fn give(&mut self, demand: &Demand, long: bool, limits: &FleetLimits) {
        let given = places(demand.volumes(), limits.volumes, long, limits);
        self.all = self.all.saturating_sub(given);
        if long {
            self.long = self.long.saturating_sub(given);
        }
        for (pool, count) in &demand.pools {
            let given = places(*count, limits.volumes_per_pool, long, limits);
            let free = self.pool(pool, limits);
            free.all = free.all.saturating_sub(given);
            if long {
                free.long = free.long.saturating_sub(given);
            }
        }
    }

    fn pool(&mut self, pool: &Option<String>, limits: &FleetLimits) -> &mut FreeInPool {
        let all = limits.volumes_per_pool;
        let long = long_limit(limits).min(all.saturating_sub(1)).max(1);
        self.pools.entry(pool.clone()).or_insert(FreeInPool { all, long })
    }
}

#[cfg(test)]
#[path = "scheduler_tests.rs"]
mod tests;
