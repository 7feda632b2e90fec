//! The worker: one loop that owns the scheduler, starts jobs, and takes in how they end.
//!
//! Nothing in the loop waits for the storage. Several workers, on several hosts, may run the same plan: what they work
//! on is decided by the leases on the targets alone (see [`super::group`]); who finds one taken comes back a moment
//! later, and then finds either the new point or a lease that is free, or whose holder is dead.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use tokio::sync::mpsc;
use tokio::task::{Id, JoinError, JoinSet};
use tokio_util::sync::CancellationToken;

use super::control::ActionError;
use super::group::{GroupEnd, GroupError};
use super::job::{self, JobEnd};
use super::scheduler::{Demand, Millis, Outcome, Phase};
use super::shared::{BY_A_PERSON, Command, Core, Fleet, Shared, Verb};
use super::status::EventKind;
use super::tracker::ServerTrack;
use crate::image::{LeaseOwner, rbd};
use crate::pipeline::Budget;
use crate::plan::{Plan, Server};
use crate::replicate::CycleError;

/// How often the loop comes round even if nothing happens.
const BEAT: Duration = Duration::from_secs(1);

/// When to look again at a server that another worker has: soon enough that a worker on this host that died is relieved
/// within 5 s.
const ELSEWHERE_AGAIN: Millis = 3_000;

/// How often a server's figures are kept, and how often paused servers are asked whether they still are.
const SAMPLE_EVERY: Duration = Duration::from_secs(60);
const PAUSED_EVERY: Duration = Duration::from_secs(15);

/// How long a stop waits for the jobs to reach a checkpoint.
const STOP_PATIENCE: Duration = Duration::from_secs(20);

pub(super) fn now_millis() -> Millis {
    crate::clock::now().as_millisecond()
}

/// What a server asks the scheduler for.
pub(super) fn demand(server: &Server) -> Demand {
    let mut pools = BTreeMap::new();
    for volume in &server.volumes {
        *pools.entry(volume.source.pool().map(str::to_owned)).or_insert(0) += 1;
    }
    Demand { pools, pace: server.pace }
}

/// A job that runs.
struct Running {
    cancel: CancellationToken,
    task: Id,
    /// The plan has changed under it: how it ends says nothing about what is planned now.
    stale: bool,
}

/// The worker. [`Worker::run`] is its life.
pub struct Worker {
    shared: Arc<Shared>,
    commands: mpsc::UnboundedReceiver<Command>,
    jobs: JoinSet<JobEnd>,
    names: HashMap<Id, String>,
    running: HashMap<String, Running>,
    /// Asked for by a person: run even if nothing has changed.
    forced: HashSet<String>,
    /// Found with another worker the last time.
    elsewhere: HashSet<String>,
    sampled: tokio::time::Instant,
    paused_asked: tokio::time::Instant,
    asking: Option<tokio::task::JoinHandle<()>>,
    /// Jobs have ended since memory was given back.
    memory_used: bool,
}

impl Worker {
    /// A worker for a plan, and what controls it.
    pub fn new(plan: Plan, opener: Arc<dyn super::Opener>) -> (Self, Fleet) {
        let (sender, commands) = mpsc::unbounded_channel();
        let shared = Arc::new(Shared::new(plan, opener, sender));
        let now = tokio::time::Instant::now();
        let worker = Self {
            shared: shared.clone(),
            commands,
            jobs: JoinSet::new(),
            names: HashMap::new(),
            running: HashMap::new(),
            forced: HashSet::new(),
            elsewhere: HashSet::new(),
            sampled: now,
            paused_asked: now,
            asking: None,
            memory_used: false,
        };
        rbd::prepare_for_many();
        (worker, Fleet(shared))
    }

    /// Works until `cancel`, then stops every job at a checkpoint. `reload` brings other plans; `beat` is called each
    /// time round, at least once a second.
    pub async fn run(
        mut self,
        cancel: CancellationToken,
        mut reload: mpsc::Receiver<Plan>,
        beat: impl Fn() + Send + Sync,
    ) {
        let servers = self.shared.core().plan.servers.len();
        self.tell(EventKind::Worker, None, format!("started, with a plan of {servers} servers"));
        let mut reloads = true;
        while !cancel.is_cancelled() {
            self.shared.beat();
            beat();
            self.start_due();
            self.chores();
            let wait = self.until_due().min(BEAT);
            tokio::select! {
                () = cancel.cancelled() => {}
                Some(end) = self.jobs.join_next_with_id(), if !self.jobs.is_empty() => self.ended(end),
                Some(command) = self.commands.recv() => self.command(command),
                plan = reload.recv(), if reloads => match plan {
                    Some(plan) => self.reload(plan),
                    None => reloads = false,
                },
                () = tokio::time::sleep(wait) => {}
            }
        }
        self.stop(beat).await;
    }

    async fn stop(&mut self, beat: impl Fn()) {
        self.tell(EventKind::Worker, None, format!("stopping: {} servers are worked on", self.running.len()));
        for running in self.running.values() {
            running.cancel.cancel();
        }
        let deadline = tokio::time::Instant::now() + STOP_PATIENCE;
        while !self.jobs.is_empty() && tokio::time::Instant::now() < deadline {
            beat();
            match tokio::time::timeout(BEAT, self.jobs.join_next_with_id()).await {
                Ok(Some(end)) => self.ended(end),
                Ok(None) => break,
                Err(_) => {}
            }
        }
        // What has not stopped is stopped like a crash: safe, and resumed by the next run.
        self.jobs.abort_all();
    }

    fn until_due(&self) -> Duration {
        let now = now_millis();
        let due = self.shared.core().scheduler.next_due(now);
        due.map_or(BEAT, |due| Duration::from_millis(u64::try_from(due - now).unwrap_or(0)))
    }

    fn start_due(&mut self) {
        let due = self.shared.core().scheduler.start_due(now_millis());
        for name in due {
            if self.running.contains_key(&name) {
                // A job of the plan before has not ended yet; two of one server are never at work.
                let again = Outcome::Elsewhere { point: None, again: now_millis() + ELSEWHERE_AGAIN };
                self.shared.core().scheduler.finish(&name, now_millis(), again);
                continue;
            }
            let found = self.shared.core().plan.servers.iter().find(|server| server.name == name).cloned();
            let Some(server) = found else { continue };
            let cancel = CancellationToken::new();
            let forced = self.forced.remove(&name);
            let task = self.jobs.spawn(job::run(self.shared.clone(), server, forced, cancel.clone())).id();
            self.names.insert(task, name.clone());
            self.running.insert(name, Running { cancel, task, stale: false });
        }
    }

    /// What is done from time to time.
    fn chores(&mut self) {
        let now = tokio::time::Instant::now();
        for change in self.shared.throttles.tick() {
            self.tell(EventKind::Throttle, None, change);
        }
        if now - self.sampled >= SAMPLE_EVERY {
            self.sampled = now;
            // On a busy fleet the jobs never end all at once.
            tokio::spawn(rbd::release_memory());
            self.memory_used = false;
            let at = crate::clock::now();
            self.shared.core().tracks.values_mut().for_each(|track| track.sample(at));
        }
        if self.memory_used && self.jobs.is_empty() {
            self.memory_used = false;
            tokio::spawn(rbd::release_memory());
        }
        // On a cluster that does not answer, one question waits, and no more.
        let asked = self.asking.as_ref().is_none_or(tokio::task::JoinHandle::is_finished);
        if asked && now - self.paused_asked >= PAUSED_EVERY {
            self.paused_asked = now;
            self.asking = Some(tokio::spawn(job::ask_paused(self.shared.clone())));
        }
    }

    fn ended(&mut self, end: Result<(Id, JobEnd), JoinError>) {
        let (task, end) = match end {
            Ok((task, end)) => (task, Ok(end)),
            Err(error) => (error.id(), Err(error)),
        };
        let Some(name) = self.names.remove(&task) else { return };
        let stale = match self.running.get(&name) {
            Some(running) if running.task == task => self.running.remove(&name).is_some_and(|running| running.stale),
            _ => true,
        };
        if stale {
            return;
        }
        let end = end.unwrap_or_else(|error| JobEnd::Defect(error.to_string()));
        self.memory_used |= !matches!(end, JobEnd::Group(Ok(GroupEnd::Unchanged { .. } | GroupEnd::Recent { .. }), _));
        let outcome = self.judge(&name, end);
        let mut core = self.shared.core();
        if let Some(track) = core.tracks.get_mut(&name) {
            track.end();
        }
        core.scheduler.finish(&name, now_millis(), outcome);
    }

    /// What a job's end means for the scheduler, and for those who watch.
    fn judge(&mut self, name: &str, end: JobEnd) -> Outcome {
        let now = crate::clock::now();
        let was_elsewhere = self.elsewhere.remove(name);
        self.shared.core().elsewhere.remove(name);
        match end {
            JobEnd::Group(Ok(GroupEnd::Unchanged { point }), looked) => {
                self.shared.with_track(name, |track| track.unchanged(looked));
                let text = format!("nothing has changed since {}", point.snapshot);
                self.tell(EventKind::NothingChanged, Some(name), text);
                self.shared.count(true);
                Outcome::Unchanged { looked: looked.as_millisecond() }
            }
            JobEnd::Group(Ok(GroupEnd::Recent { point }), _) => {
                self.shared.with_track(name, |track| track.made_elsewhere(&point));
                // Another host's clock may be ahead.
                let at = point.at.min(now).as_millisecond();
                let interval = self.interval(name);
                Outcome::Elsewhere { point: Some(at), again: at + interval }
            }
            JobEnd::Group(Ok(GroupEnd::Committed(report)), _) => {
                let seconds = self.interval(name) as f64 / 1000.0;
                let next_seconds = self.shared.with_track(name, |track| {
                    track.committed(&report);
                    track.next_seconds(seconds)
                });
                if was_elsewhere && report.finished_first {
                    let text = "what another worker had begun was taken over and finished".to_owned();
                    self.tell(EventKind::TakenOver, Some(name), text);
                }
                self.tell(EventKind::PointCommitted, Some(name), job::committed_text(&report));
                self.shared.count(true);
                Outcome::Committed { point: report.point.at.as_millisecond(), next_seconds: next_seconds.flatten() }
            }
            JobEnd::Group(Err(error), _) => self.failed(name, &error, now),
            JobEnd::NotOpened(volume, error) => self.failed(name, &GroupError { volume, error }, now),
            JobEnd::Paused(reason) => {
                let mut core = self.shared.core();
                core.scheduler.pause(name);
                core.paused_by_note.insert(name.to_owned(), reason.clone());
                if let Some(track) = core.tracks.get_mut(name) {
                    track.paused();
                }
                drop(core);
                self.tell(EventKind::Action, Some(name), format!("paused: {reason}"));
                Outcome::Interrupted
            }
            JobEnd::Defect(text) => {
                let error = CycleError::Defect(text);
                self.failed(name, &GroupError { volume: name.to_owned(), error }, now)
            }
        }
    }

    fn failed(&mut self, name: &str, error: &GroupError, now: Timestamp) -> Outcome {
        if let CycleError::Interrupted { .. } = error.error {
            return Outcome::Interrupted;
        }
        // Whatever else has the target open will not give it back by itself: that is an error like others.
        if let Some(holder) = error.error.holder().filter(|holder| LeaseOwner::is_description(holder)) {
            tracing::debug!(server = name, holder, "another worker has it");
            self.elsewhere.insert(name.to_owned());
            self.shared.core().elsewhere.insert(name.to_owned(), holder.to_owned());
            return Outcome::Elsewhere { point: None, again: now.as_millisecond() + ELSEWHERE_AGAIN };
        }
        let retryable = error.is_retryable();
        let message = job::error_text(&error.error);
        let server = self.shared.core().plan.servers.iter().find(|server| server.name == name).cloned();
        if let Some(server) = server {
            let message = message.clone();
            self.shared.with_track(name, |track| track.failed(now, &server, &error.volume, message, retryable));
        }
        self.shared.forget_images(name);
        self.shared.count(false);
        let volume = Some(error.volume.as_str()).filter(|volume| *volume != name);
        let kind = if retryable { EventKind::CycleFailed } else { EventKind::Held };
        self.shared.events.tell(kind, Some(name), volume, message);
        Outcome::Failed { retryable }
    }

    fn interval(&self, name: &str) -> Millis {
        let core = self.shared.core();
        let found = core.plan.servers.iter().find(|server| server.name == name);
        found.map_or(60_000, |server| Millis::try_from(server.pace.interval.as_millis()).unwrap_or(Millis::MAX / 4))
    }

    fn command(&mut self, command: Command) {
        let Command { verb, servers, answer } = command;
        let now = now_millis();
        for name in &servers {
            let mut core = self.shared.core();
            match verb {
                Verb::Pause => {
                    core.scheduler.pause(name);
                    core.paused_by_note.insert(name.clone(), BY_A_PERSON.to_owned());
                    if let Some(running) = self.running.get(name) {
                        running.cancel.cancel();
                    }
                }
                Verb::Resume => {
                    core.paused_by_note.remove(name);
                    core.scheduler.resume(name, now);
                }
                Verb::SyncNow => {
                    self.forced.insert(name.clone());
                    core.scheduler.sync_now(name, now);
                }
            }
            drop(core);
            self.tell(EventKind::Action, Some(name), verb.past().to_owned());
        }
        // Whoever asked may have gone.
        let _ = answer.send(Ok::<_, ActionError>(servers));
    }

    /// Goes on with another plan: what is new starts, what is gone stops at a checkpoint, what is the same goes on.
    fn reload(&mut self, plan: Plan) {
        let now = now_millis();
        let mut core = self.shared.core();
        let old = std::mem::replace(&mut core.plan, plan);
        let servers = core.plan.servers.clone();
        let kept: HashSet<&str> = servers.iter().map(|server| server.name.as_str()).collect();
        let mut changed = 0;
        for server in &servers {
            let before = old.servers.iter().find(|before| before.name == server.name);
            if before == Some(server) {
                continue;
            }
            changed += 1;
            if before.is_none_or(|before| before.volumes != server.volumes) {
                core.tracks.insert(server.name.clone(), ServerTrack::new(server));
                core.scheduler.remove(&server.name);
                stop_job(&mut self.running, &server.name);
            }
            core.scheduler.insert(&server.name, demand(server), server.paused, now);
            if core.scheduler.view(&server.name).is_some_and(|view| view.phase == Phase::Held) {
                // Whoever changed it may have mended it.
                core.scheduler.resume(&server.name, now);
            }
            match (before.is_some_and(|before| before.paused), server.paused) {
                (false, true) => core.scheduler.pause(&server.name),
                (true, false) => core.scheduler.resume(&server.name, now),
                _ => {}
            }
        }
        let gone: Vec<&Server> = old.servers.iter().filter(|before| !kept.contains(before.name.as_str())).collect();
        for server in &gone {
            core.scheduler.remove(&server.name);
            core.tracks.remove(&server.name);
            stop_job(&mut self.running, &server.name);
        }
        let limits = core.plan.limits;
        core.scheduler.set_limits(limits);
        if core.memory.total() != limits.memory {
            core.memory = Budget::new(limits.memory);
        }
        let gone = gone.len();
        let clusters = |plan: &Plan| (plan.source_cluster.clone(), plan.target_cluster.clone(), plan.api.clone());
        if clusters(&old) != clusters(&core.plan) {
            let text = "[source], [target] and [api] of the new plan count from the next start".to_owned();
            self.tell(EventKind::PlanReloaded, None, text);
        }
        drop(core);
        self.shared.forget_all_images();
        let plan = self.shared.core().plan.clone();
        self.shared.throttles.configure(&plan);
        self.tell(
            EventKind::PlanReloaded,
            None,
            format!("the plan was read again: {changed} servers are new or changed, {gone} are gone"),
        );
    }

    fn tell(&self, kind: EventKind, server: Option<&str>, message: String) {
        self.shared.events.tell(kind, server, None, message);
    }
}

/// Stops a job at its next checkpoint; how it ends does not count any more.
fn stop_job(running: &mut HashMap<String, Running>, name: &str) {
    if let Some(running) = running.get_mut(name) {
        running.stale = true;
        running.cancel.cancel();
    }
}

impl Shared {
    /// What is known, for a moment: nobody holds it across an await.
    pub(super) fn core(&self) -> std::sync::MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn with_track<T>(&self, name: &str, work: impl FnOnce(&mut ServerTrack) -> T) -> Option<T> {
        self.core().tracks.get_mut(name).map(work)
    }
}

/// Whether the scheduler has a job waiting, running, or in a person's hands, as it is shown.
pub(super) fn is_running(phase: Phase) -> bool {
    matches!(phase, Phase::Running { .. })
}

#[cfg(test)]
#[path = "worker_tests.rs"]
mod tests;
