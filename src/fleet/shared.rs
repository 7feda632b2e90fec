//! What the worker's loop, its jobs and the API share.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use futures::stream::{self, StreamExt};
use jiff::Timestamp;
use tokio::sync::{broadcast, mpsc, oneshot};

use super::control::{ActionError, FleetControl, Scope};
use super::drift::{Drift, Drifts};
use super::events::Events;
use super::group::Idle;
use super::scheduler::{Phase, Scheduler};
use super::status::{Activity, Event, EventKind, FleetStatus, Origin, Sample, WorkerStatus};
use super::throttles::Throttles;
use super::tracker::ServerTrack;
use super::worker::{demand, is_running, now_millis};
use crate::image::{ErrorKind, SourceImage, TargetImage};
use crate::pipeline::Budget;
use crate::plan::{Plan, Server, Volume};
use crate::replicate::CycleError;
use crate::throttle::Rate;

/// An open volume.
pub type Images = (Arc<dyn SourceImage>, Arc<dyn TargetImage>);

/// Opens the images of volumes, wherever they are.
#[async_trait]
pub trait Opener: Send + Sync {
    /// Opens both sides of a volume. The target is created like the source if it does not exist, unless `to_look` says
    /// that nothing may be changed; then it is [`crate::image::ErrorKind::NotFound`].
    async fn open(&self, volume: &Volume, to_look: bool) -> Result<Images, CycleError>;

    /// Opens the target of a volume alone, to read what is noted with it. Creates nothing.
    async fn open_target(&self, volume: &Volume) -> Result<Arc<dyn TargetImage>, CycleError>;

    /// What has become of a server where it runs that its plan does not know of: nothing where there is nobody to ask;
    /// `None` where nobody has answered.
    async fn drift(&self, _server: &Server) -> Option<Vec<Drift>> {
        Some(Vec::new())
    }
}

/// What a person asks of servers.
#[derive(Clone, Copy, Debug)]
pub(super) enum Verb {
    Pause,
    Resume,
    SyncNow,
}

impl Verb {
    pub(super) fn past(self) -> &'static str {
        match self {
            Self::Pause => "paused by a person",
            Self::Resume => "resumed by a person",
            Self::SyncNow => "a cycle was asked for by a person",
        }
    }
}

/// An action on its way to the loop.
#[derive(Debug)]
pub(super) struct Command {
    pub(super) verb: Verb,
    pub(super) servers: Vec<String>,
    pub(super) answer: oneshot::Sender<Result<Vec<String>, ActionError>>,
}

/// The plan, and what is known. Changed by the loop, read by everybody.
#[derive(Debug)]
pub(super) struct Core {
    pub(super) plan: Plan,
    pub(super) scheduler: Scheduler,
    pub(super) tracks: BTreeMap<String, ServerTrack>,
    /// What all volumes together may have in flight.
    pub(super) memory: Budget,
    /// Paused by a note with their images, not by the plan: what the note says.
    pub(super) paused_by_note: HashMap<String, String>,
    /// With another worker, by the last look: who has the lease.
    pub(super) elsewhere: HashMap<String, String>,
}

pub(super) struct Shared {
    pub(super) core: Mutex<Core>,
    pub(super) events: Events,
    pub(super) opener: Arc<dyn Opener>,
    pub(super) throttles: Throttles,
    pub(super) drifts: Drifts,
    commands: mpsc::UnboundedSender<Command>,
    images: Mutex<HashMap<String, Images>>,
    /// What the last look saw of the servers that had not changed.
    idle: Mutex<HashMap<String, Idle>>,
    since: Timestamp,
    heartbeat: Mutex<tokio::time::Instant>,
    completed: AtomicU64,
    failed: AtomicU64,
}

impl Shared {
    pub(super) fn new(plan: Plan, opener: Arc<dyn Opener>, commands: mpsc::UnboundedSender<Command>) -> Self {
        let mut scheduler = Scheduler::new(plan.limits, fastrand::u64(..));
        let mut tracks = BTreeMap::new();
        for server in &plan.servers {
            scheduler.insert(&server.name, demand(server), server.paused, now_millis());
            tracks.insert(server.name.clone(), ServerTrack::new(server));
        }
        let throttles = Throttles::new(&plan);
        let memory = Budget::new(plan.limits.memory);
        let core = Core { plan, scheduler, tracks, memory, paused_by_note: HashMap::new(), elsewhere: HashMap::new() };
        Self {
            core: Mutex::new(core),
            events: Events::default(),
            opener,
            throttles,
            drifts: Drifts::default(),
            commands,
            images: Mutex::default(),
            idle: Mutex::default(),
            since: crate::clock::now(),
            heartbeat: Mutex::new(tokio::time::Instant::now()),
            completed: AtomicU64::new(0),
            failed: AtomicU64::new(0),
        }
    }

    pub(super) fn beat(&self) {
        *self.heartbeat.lock().unwrap_or_else(PoisonError::into_inner) = tokio::time::Instant::now();
    }

    pub(super) fn count(&self, well: bool) {
        let counter = if well { &self.completed } else { &self.failed };
        counter.fetch_add(1, Ordering::Relaxed);
    }

    /// The images of a volume, opened at its first cycle and kept until one fails: an idle server costs no open.
    pub(super) async fn images(&self, volume: &Volume, to_look: bool) -> Result<Images, CycleError> {
        let known = self.images.lock().unwrap_or_else(PoisonError::into_inner).get(&volume.name).cloned();
        if let Some(images) = known {
            return Ok(images);
        }
        let (source, target) = self.opener.open(volume, to_look).await?;
        let images = (self.throttles.throttled(volume, source), target);
        let mut known = self.images.lock().unwrap_or_else(PoisonError::into_inner);
        known.insert(volume.name.clone(), images.clone());
        Ok(images)
    }

    /// Forgets the images of a server: whatever went wrong, the next cycle opens them anew.
    pub(super) fn forget_images(&self, server: &str) {
        let core = self.core();
        let Some(server) = core.plan.servers.iter().find(|have| have.name == server) else { return };
        let mut known = self.images.lock().unwrap_or_else(PoisonError::into_inner);
        for volume in &server.volumes {
            known.remove(&volume.name);
        }
    }

    /// What was seen of a server that had not changed; forgotten until it is kept again.
    pub(super) fn take_idle(&self, server: &str) -> Option<Idle> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).remove(server)
    }

    pub(super) fn keep_idle(&self, server: &str, idle: Idle) {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).insert(server.to_owned(), idle);
    }

    pub(super) fn forget_all_images(&self) {
        self.drifts.ask_anew();
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).clear();
        self.images.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    fn status(&self) -> FleetStatus {
        let now = crate::clock::now();
        let core = self.core();
        let servers = core.plan.servers.iter().filter_map(|server| {
            let track = core.tracks.get(&server.name)?;
            let view = core.scheduler.view(&server.name)?;
            let next_at = matches!(view.phase, Phase::Waiting).then(|| Timestamp::from_millisecond(view.due).ok());
            let activity = activity(&core, server);
            let throttled = server.volumes.iter().find_map(|volume| self.throttles.limit_of(volume));
            let mut status = track.status(server, activity, next_at.flatten(), throttled.as_deref(), now);
            if let Some(holder) = core.elsewhere.get(&server.name) {
                status.volumes.iter_mut().for_each(|volume| volume.lease = Some(holder.clone()));
            }
            status.paused_because = paused_because(&core, server);
            Some(status)
        });
        FleetStatus {
            plan: core.plan.path.display().to_string(),
            origin: Origin::Daemon,
            at: now.to_string(),
            servers: servers.collect(),
            worker: Some(self.worker_status(core.scheduler.volumes_running())),
            throttles: self.throttles.status(),
        }
    }

    fn worker_status(&self, volumes_running: usize) -> WorkerStatus {
        WorkerStatus {
            host: rustix::system::uname().nodename().to_string_lossy().into_owned(),
            pid: std::process::id(),
            since: self.since.to_string(),
            volumes_running,
            cycles_completed: self.completed.load(Ordering::Relaxed),
            cycles_failed: self.failed.load(Ordering::Relaxed),
            resident_bytes: resident_bytes(),
        }
    }

    /// The servers that are meant.
    fn servers(&self, scope: &Scope) -> Result<Vec<Server>, ActionError> {
        let core = self.core();
        let meant = |server: &&Server| match scope {
            Scope::All => true,
            Scope::Named(name) => server.name == *name || server.volumes.iter().any(|volume| volume.name == *name),
        };
        let servers: Vec<Server> = core.plan.servers.iter().filter(meant).cloned().collect();
        match scope {
            Scope::Named(name) if servers.is_empty() => Err(ActionError::UnknownName(name.clone())),
            _ => Ok(servers),
        }
    }

    async fn act(&self, verb: Verb, servers: Vec<Server>) -> Result<Vec<String>, ActionError> {
        let (answer, wait) = oneshot::channel();
        let servers = servers.into_iter().map(|server| server.name).collect();
        let gone = || ActionError::NotStored("the worker is stopping".into());
        self.commands.send(Command { verb, servers, answer }).map_err(|_| gone())?;
        wait.await.map_err(|_| gone())?
    }

    /// Leaves a note with the first volume of each server, where every worker finds it. Tries all of them, whatever
    /// becomes of one. Gives back the servers that a cutover has paused: their notes stay.
    async fn note(&self, servers: &[Server], note: Option<&str>) -> Result<Vec<String>, ActionError> {
        let mut stores = Vec::new();
        for server in servers {
            let Some(volume) = server.volumes.first() else { continue };
            stores.push(async move { (server.name.clone(), self.note_one(volume, note).await) });
        }
        let stored: Vec<_> = stream::iter(stores).buffer_unordered(NOTES_AT_A_TIME).collect().await;
        let (mut failed, mut kept) = (Vec::new(), Vec::new());
        for (server, stored) in stored {
            match stored {
                Ok(true) => {}
                Ok(false) => kept.push(server),
                Err(error) => failed.push(format!("{server}: {error}")),
            }
        }
        if failed.is_empty() {
            return Ok(kept);
        }
        let what = "done here, but other workers may not learn of it, and neither may this one after a restart";
        Err(ActionError::NotStored(format!("{what}: {}", failed.join("; "))))
    }

    /// The note with a server's first volume that pauses it. What it takes to read it when a source can't be opened: that
    /// of a server that was cut over has another name.
    pub(super) async fn pausing_note(&self, server: &Server) -> Result<Option<String>, CycleError> {
        let Some(first) = server.volumes.first() else { return Ok(None) };
        pausing_note(self.opener.open_target(first).await?.as_ref()).await
    }

    /// Whether it was stored: a cutover's note stays.
    async fn note_one(&self, volume: &Volume, note: Option<&str>) -> Result<bool, CycleError> {
        let opened = match self.images(volume, true).await {
            Ok((_, target)) => Ok(target),
            // The source of a server that was cut over has another name.
            Err(error) if is_missing(&error) => self.opener.open_target(volume).await,
            Err(error) => Err(error),
        };
        let target = match opened {
            Ok(target) => target,
            // Nothing to note it with, and nothing that another worker could go on with but a first copy.
            Err(CycleError::Image(error)) if error.kind == ErrorKind::NotFound && note.is_none() => return Ok(true),
            Err(error) => return Err(error),
        };
        if target.load_note().await?.is_some_and(|known| known.starts_with(CUTOVER_NOTE)) {
            return Ok(false);
        }
        match target.store_note(note).await {
            // Files are worked on by one worker; it remembers for as long as it runs.
            Err(error) if error.kind == ErrorKind::Unsupported => Ok(true),
            stored => Ok(stored.map(|()| true)?),
        }
    }
}

/// Why a server is paused, if it is.
fn paused_because(core: &Core, server: &Server) -> Option<String> {
    core.scheduler.view(&server.name).filter(|view| view.phase == Phase::Paused)?;
    let note = core.paused_by_note.get(&server.name);
    Some(note.map_or(BY_THE_PLAN, String::as_str).to_owned())
}

/// What a server is doing.
fn activity(core: &Core, server: &Server) -> Activity {
    let Some(view) = core.scheduler.view(&server.name) else { return Activity::Unknown };
    match view.phase {
        phase if is_running(phase) && core.elsewhere.contains_key(&server.name) => Activity::Elsewhere,
        phase if is_running(phase) && view.has_point => Activity::Syncing,
        phase if is_running(phase) => Activity::FirstSync,
        Phase::Held => Activity::Held,
        Phase::Paused => Activity::Paused,
        _ if view.failures > 0 => Activity::BackingOff,
        _ if core.elsewhere.contains_key(&server.name) => Activity::Elsewhere,
        _ if view.has_point => Activity::Waiting,
        _ => Activity::NeverSynced,
    }
}

/// The resident memory of this process, in bytes; 0 where `/proc` does not tell.
fn resident_bytes() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages: u64 = statm.split_ascii_whitespace().nth(1).and_then(|pages| pages.parse().ok()).unwrap_or(0);
    pages * rustix::param::page_size() as u64
}

/// A running fleet, for those who watch and control it.
#[derive(Clone)]
pub struct Fleet(pub(super) Arc<Shared>);

/// How many notes are stored at a time.
const NOTES_AT_A_TIME: usize = 8;

/// The note of a server that is paused. Any note that starts like this pauses it.
pub(super) const PAUSED: &str = "paused";

/// How the note of a server begins that a cutover has paused. It takes it away itself: whoever resumed such a server would
/// copy an old source over the disk that it runs from.
pub const CUTOVER_NOTE: &str = "paused:";

/// Why a server is paused, until its note says more.
pub(super) const BY_A_PERSON: &str = "by a person";

/// Why a server is paused that the plan pauses.
pub(super) const BY_THE_PLAN: &str = "by the plan";

/// What a note with an image says after `paused`; `None` if it does not pause.
pub(super) async fn pausing_note(target: &dyn TargetImage) -> Result<Option<String>, CycleError> {
    let note = target.load_note().await?;
    let reason = note.as_deref().and_then(|note| note.strip_prefix(PAUSED));
    Ok(reason.map(|reason| reason.trim_start_matches([':', ' ']).trim().to_owned()))
}

/// Whether an image is not there.
pub(super) fn is_missing(error: &CycleError) -> bool {
    matches!(error, CycleError::Image(error) if error.kind == ErrorKind::NotFound)
}

#[async_trait]
impl FleetControl for Fleet {
    fn status(&self) -> FleetStatus {
        self.0.status()
    }

    fn history(&self, server: &str) -> Option<Vec<Sample>> {
        self.0.core().tracks.get(server).map(ServerTrack::history)
    }

    fn recent_events(&self) -> Vec<Event> {
        self.0.events.recent()
    }

    fn events(&self) -> broadcast::Receiver<Event> {
        self.0.events.subscribe()
    }

    async fn pause(&self, scope: &Scope) -> Result<Vec<String>, ActionError> {
        let servers = self.0.servers(scope)?;
        // Here first, at once: whoever pauses a fleet may have no time for a cluster that does not answer.
        let done = self.0.act(Verb::Pause, servers.clone()).await?;
        self.0.note(&servers, Some(&format!("{PAUSED} by a person at {}", crate::clock::now()))).await?;
        Ok(done)
    }

    async fn resume(&self, scope: &Scope) -> Result<Vec<String>, ActionError> {
        let mut servers = self.0.servers(scope)?;
        let kept = self.0.note(&servers, None).await?;
        servers.retain(|server| !kept.contains(&server.name));
        match (scope, kept.into_iter().next()) {
            (Scope::Named(_), Some(server)) => Err(ActionError::CutOver(server)),
            _ => self.0.act(Verb::Resume, servers).await,
        }
    }

    async fn sync_now(&self, scope: &Scope) -> Result<Vec<String>, ActionError> {
        self.0.act(Verb::SyncNow, self.0.servers(scope)?).await
    }

    async fn set_throttle(&self, pool: &str, rate: Option<Rate>) -> Result<(), ActionError> {
        if !self.0.throttles.set(pool, rate) {
            return Err(ActionError::UnknownPool(pool.to_owned()));
        }
        let what = if rate.is_some() { "set by a person" } else { "put back to the plan's by a person" };
        self.0.events.tell(EventKind::Throttle, None, None, format!("the limit of pool {pool} was {what}"));
        Ok(())
    }

    fn heartbeat_age_seconds(&self) -> f64 {
        self.0.heartbeat.lock().unwrap_or_else(PoisonError::into_inner).elapsed().as_secs_f64()
    }
}
