//! The driver of a cycle: carries out what [`lineage`] decides.

use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, LazyLock, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use futures::stream::{BoxStream, StreamExt as _, TryStreamExt as _};
use tokio_util::sync::CancellationToken;

use crate::batch::Compression;
use crate::delta::{self, Method, Plan};
use crate::extent::{ByteRange, Extent};
use crate::failpoint::failpoint;
use crate::image::{ImageError, Point, Snapshot, SnapshotSupport, SourceImage, TargetImage, View};
use crate::pipeline::{self, Applied, ApplyOptions, Counters, Limits, ReadOptions};
use crate::transport;

use super::error::{Conflict, ConflictKind, CycleError, Result};
use super::lineage::{self, Decision, Facts, Request, decide};
use super::look::any_extent;
use super::report::{Clock, Stages, SyncReport};
use super::retention::Keep;
use super::side::{TargetSide, interrupted, load_state, no_such_base, point_still_there, still_there, with_lease};
use super::state::{Commit, InFlight, Origin, Retired, Side, TargetState};
use super::verify::compare_windows;

/// The prefix of the names that poolshift gives.
pub const NAME_PREFIX: &str = "poolshift-";

/// How a cycle is carried out.
#[derive(Clone, Debug)]
pub struct SyncOptions {
    /// What is wanted.
    pub request: Request,
    /// How many automatic snapshots stay on both sides; at least the base does.
    pub keep: usize,
    /// Those younger than this stay as well.
    pub keep_for: Option<Duration>,
    /// And those of these names, whatever their age: a group of volumes needs them.
    pub protect: Vec<String>,
    /// Whether batches are compressed on their way.
    pub compression: Compression,
    /// What may be in flight.
    pub limits: Limits,
    /// Who makes the source snapshot, where it has to be made in step with others; the source alone otherwise.
    pub snapshotter: Option<Arc<dyn Snapshotter>>,
}

impl Default for SyncOptions {
    fn default() -> Self {
        Self {
            request: Request::default(),
            keep: 1,
            keep_for: None,
            protect: Vec::new(),
            compression: Compression::None,
            limits: Limits::default(),
            snapshotter: None,
        }
    }
}

/// Makes the source snapshots of cycles that belong together.
#[async_trait]
pub trait Snapshotter: std::fmt::Debug + Send + Sync {
    /// Makes the snapshot `name` of `source`, after the intent is stored with the target and before anything is
    /// written. What fails here has changed nothing; the intent is dropped by the next cycle.
    async fn create(&self, source: &Arc<dyn SourceImage>, name: &str) -> Result<Snapshot, ImageError>;
}

/// What an observer can see of a cycle while it runs.
#[derive(Debug, Default)]
pub struct Progress {
    /// What was moved so far.
    pub counters: Arc<Counters>,
    plan: Mutex<Option<Arc<Plan>>>,
    snapshot: Mutex<Option<String>>,
}

impl Progress {
    /// The plan, once there is one.
    pub fn plan(&self) -> Option<Arc<Plan>> {
        self.plan.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The snapshot that is being brought over, once that has begun.
    pub fn snapshot(&self) -> Option<String> {
        self.snapshot.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set_snapshot(&self, name: &str) {
        *self.snapshot.lock().unwrap_or_else(PoisonError::into_inner) = Some(name.to_owned());
    }

    pub(crate) fn set_plan(&self, plan: &Plan) {
        *self.plan.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(plan.clone()));
    }
}

/// Carries one cycle through: afterwards both sides have a snapshot of one name and the same content.
///
/// Takes the target's lease for as long as it works. `cancel` stops it at a checkpoint, with
/// [`CycleError::Interrupted`]. Dropping the future is like a crash: safe, and resumed by the next run.
pub async fn sync(
    source: Arc<dyn SourceImage>,
    target: Arc<dyn TargetImage>,
    options: &SyncOptions,
    progress: &Progress,
    cancel: &CancellationToken,
) -> Result<SyncReport> {
    with_lease(&target, || sync_with_lease(&source, &target, options, progress, cancel)).await
}

/// [`sync()`] for a caller who holds the target's lease already, and keeps it.
pub async fn sync_held(
    source: &Arc<dyn SourceImage>,
    target: &Arc<dyn TargetImage>,
    options: &SyncOptions,
    progress: &Progress,
    cancel: &CancellationToken,
) -> Result<SyncReport> {
    sync_with_lease(source, target, options, progress, cancel).await
}

/// Finishes what is in flight, with the lease held.
pub(super) async fn sync_in_flight(
    source: &Arc<dyn SourceImage>,
    target: &Arc<dyn TargetImage>,
    options: &SyncOptions,
    progress: &Progress,
    cancel: &CancellationToken,
) -> Result<SyncReport> {
    let options = SyncOptions { request: Request::default(), ..options.clone() };
    Cycle::run(source, target, &options, progress, cancel).await
}

async fn sync_with_lease(
    source: &Arc<dyn SourceImage>,
    target: &Arc<dyn TargetImage>,
    options: &SyncOptions,
    progress: &Progress,
    cancel: &CancellationToken,
) -> Result<SyncReport> {
    let report = Cycle::run(source, target, options, progress, cancel).await?;
    let is_live = source.snapshot_support() == SnapshotSupport::HeadOnly;
    match &options.request.name {
        // What was in flight is finished first, always; then comes what was asked for.
        // So is what a file was when an earlier run died before its commit: the file may have changed since.
        Some(name) if report.resumed && (*name != report.snapshot || report.method.is_none() && is_live) => {
            let second = Cycle::run(source, target, options, progress, cancel).await?;
            Ok(SyncReport { finished_first: Some(report.snapshot), ..second })
        }
        _ => Ok(report),
    }
}

/// Finds out all that [`decide`] wants to know.
pub(super) async fn gather(source: &dyn SourceImage, target: &dyn TargetImage) -> Result<Facts> {
    let (source_snapshots, target_snapshots) = futures::try_join!(source.snapshots(), target.snapshots())?;
    let state = load_state(target).await?;
    let mut facts = Facts {
        source: source.identity().clone(),
        source_support: source.snapshot_support(),
        source_snapshots,
        target_support: target.snapshot_support(),
        target_snapshots,
        state,
        target_blank: false,
        head_differs: false,
    };
    if lineage::needs_blank(facts.state.as_ref()) {
        facts.target_blank = target.is_blank().await?;
    }
    if let Some(newest) = lineage::needs_head_check(&facts) {
        facts.head_differs = target.head_differs(&newest).await? && content_differs(target, &newest).await?;
    }
    Ok(facts)
}

/// Whether HEAD, of which the storage says that it was written since a snapshot, holds anything else than the snapshot
/// does. A write of equal bytes changes nothing: one of a process that died, say, whose work another one has finished.
async fn content_differs(target: &dyn TargetImage, newest: &Snapshot) -> Result<bool> {
    if target.snapshot_support() == SnapshotSupport::HeadOnly {
        return Ok(true);
    }
    let head = target.view(&Point::Head).await?;
    let then = target.view(&Point::Snapshot(newest.clone())).await?;
    let plan = delta::plan(head.as_ref(), Some(newest)).await?;
    let written = ranges(delta::extents(head.clone(), &plan, target.layout(), 0));
    let found = compare_windows(then, head, written, &Limits::default()).await?;
    let location = target.location();
    match found.first_difference {
        Some(range) => tracing::warn!("{location} does not hold at {range} what its snapshot {newest} does"),
        None => tracing::info!("{location} was written since its snapshot {newest}, with the same content"),
    }
    Ok(found.first_difference.is_some())
}

/// Whether a snapshot that a user has named, and that both sides have, is what the source holds now. A name that stood for
/// another moment is no success: a server would be switched over with the disk of that moment. The names of a fleet's
/// points are given once.
pub(super) async fn not_now(
    source: &dyn SourceImage,
    state: &TargetState,
    commit: &Commit,
    request: &Request,
) -> Result<Option<ConflictKind>> {
    if request.automatic {
        return Ok(None);
    }
    let name = commit.name.clone();
    let newest = state.newest().filter(|newest| newest.source_id != commit.source_id);
    if let Some(newest) = newest {
        return Ok(Some(ConflictKind::NotNow { name, newest: Some(newest.name.clone()) }));
    }
    if !lineage::holds(&source.snapshots().await?, commit.source_id, &commit.name) {
        return Ok(Some(ConflictKind::NotNow { name, newest: None }));
    }
    let head = source.view(&Point::Head).await?;
    let plan = delta::plan(head.as_ref(), Some(&commit.on_source())).await?;
    let changed = head.size() != commit.size || any_extent(source, head, &plan).await?;
    Ok(changed.then_some(ConflictKind::NotNow { name, newest: None }))
}

/// Where extents are, whatever they are.
pub(super) fn ranges(
    extents: BoxStream<'static, Result<Vec<Extent>, ImageError>>,
) -> BoxStream<'static, Result<Vec<ByteRange>, ImageError>> {
    extents.map_ok(|window| window.into_iter().map(|extent| extent.range).collect()).boxed()
}

/// A conflict with both lists of snapshots.
pub(super) fn conflict(
    kind: ConflictKind,
    source: &dyn SourceImage,
    target: &dyn TargetImage,
    facts: Facts,
) -> CycleError {
    Conflict {
        kind,
        source: (source.location().to_owned(), facts.source_snapshots),
        target: (target.location().to_owned(), facts.target_snapshots),
    }
    .into()
}

/// A name of poolshift's own scheme that neither side has.
pub(super) fn automatic_name(facts: &Facts) -> String {
    let taken =
        |name: &str| facts.source_snapshots.iter().chain(&facts.target_snapshots).any(|snapshot| snapshot.name == name);
    loop {
        let name = name_of_now();
        if !taken(&name) {
            return name;
        }
    }
}

/// A name of poolshift's own scheme for this moment, in UTC: `poolshift-20261123T220511.123Z-4711`. Of two in the same
/// millisecond the second is one later: a name is for one point only. The number is the process's: another process that
/// follows the same source to another target must not take a snapshot of this one for its own.
pub fn name_of_now() -> String {
    static LAST: AtomicI64 = AtomicI64::new(i64::MIN);
    static PROCESS: LazyLock<u32> = LazyLock::new(|| fastrand::u32(1000..1_000_000));
    let now = crate::clock::now().as_millisecond();
    let next = |last: i64| now.max(last.saturating_add(1));
    let last = LAST.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |last| Some(next(last)));
    let at = jiff::Timestamp::from_millisecond(next(last.unwrap_or_else(|last| last))).unwrap_or(jiff::Timestamp::MAX);
    format!("{NAME_PREFIX}{}-{}", at.strftime("%Y%m%dT%H%M%S.%3fZ"), *PROCESS)
}

/// Whether a name is of poolshift's own scheme. That is no proof that poolshift gave it.
pub fn is_automatic(name: &str) -> bool {
    let Some(rest) = name.strip_prefix(NAME_PREFIX) else { return false };
    // Earlier versions gave names without a number.
    let (stamp, number) = rest.split_once('-').unwrap_or((rest, "1"));
    let pattern = "dddddddd.dddddd.ddd.";
    let digits = |(shape, found): (char, char)| shape != 'd' || found.is_ascii_digit();
    stamp.len() == pattern.len()
        && pattern.chars().zip(stamp.chars()).all(digits)
        && stamp.ends_with('Z')
        && number.parse::<u32>().is_ok()
}

struct Cycle<'a> {
    source: &'a Arc<dyn SourceImage>,
    side: TargetSide<'a>,
    options: &'a SyncOptions,
    progress: &'a Progress,
    clock: Clock,
    stages: Stages,
    resumed: bool,
    rewound: bool,
    method: Option<Method>,
    unchanged_while_read: Option<bool>,
}

impl<'a> Cycle<'a> {
    async fn run(
        source: &'a Arc<dyn SourceImage>,
        target: &'a Arc<dyn TargetImage>,
        options: &'a SyncOptions,
        progress: &'a Progress,
        cancel: &'a CancellationToken,
    ) -> Result<SyncReport> {
        let mut clock = Clock::start();
        let facts = gather(source.as_ref(), target.as_ref()).await?;
        let decision = match decide(&facts, &options.request) {
            Ok(decision) => decision,
            Err(kind) => return Err(conflict(kind, source.as_ref(), target.as_ref(), facts)),
        };
        let stages = Stages { look_seconds: clock.lap(), ..Stages::default() };
        let state = state_to_begin_with(&facts, source.as_ref());
        let (younger_than, protected) = (options.keep_for, options.protect.clone());
        let keep = Keep { newest: options.keep, younger_than, protected };
        let mut cycle = Cycle {
            source,
            side: TargetSide { target, state, keep, limits: options.limits.clone(), cancel },
            options,
            progress,
            clock,
            stages,
            resumed: false,
            rewound: false,
            method: None,
            unchanged_while_read: None,
        };
        cycle.carry_out(&facts, decision).await
    }

    async fn carry_out(&mut self, facts: &Facts, decision: Decision) -> Result<SyncReport> {
        let (commit, base) = match decision {
            Decision::AlreadyThere(commit) => {
                let not_now = not_now(self.source.as_ref(), &self.side.state, &commit, &self.options.request).await?;
                if let Some(kind) = not_now {
                    let facts = facts.clone();
                    return Err(conflict(kind, self.source.as_ref(), self.side.target.as_ref(), facts));
                }
                return Ok(SyncReport { already_there: true, ..self.report(&commit, None) });
            }
            Decision::EnterCommit { in_flight, target } => {
                self.resumed = true;
                let base = self.side.base_name(&in_flight.from);
                let there = |snapshot: &Snapshot| lineage::holds(&facts.source_snapshots, snapshot.id, &snapshot.name);
                let is_base = in_flight.snapshot.as_ref().is_some_and(there);
                (self.side.enter(&in_flight, &target, is_base).await?, base)
            }
            Decision::Begin { from, rewind } => {
                let in_flight = self.begin(facts, from, rewind).await?;
                self.replicate(in_flight).await?
            }
            Decision::Resume(in_flight) => {
                self.resumed = true;
                self.replicate(in_flight).await?
            }
        };
        self.stages.until_commit_seconds = self.clock.total();
        // An earlier run copied the snapshot asked for, and died before its commit.
        let asked = self.options.request.name.as_ref() == Some(&commit.name);
        let is_kept = self.source.snapshot_support() == SnapshotSupport::Kept;
        let kind = match self.resumed && self.method.is_none() && asked && is_kept {
            true => not_now(self.source.as_ref(), &self.side.state, &commit, &self.options.request).await?,
            false => None,
        };
        if let Some(kind) = kind {
            let facts = gather(self.source.as_ref(), self.side.target.as_ref()).await?;
            return Err(conflict(kind, self.source.as_ref(), self.side.target.as_ref(), facts));
        }
        let mut report = self.report(&commit, base);
        self.clock.lap();
        report.pruned = self.side.prune(Some(self.source)).await;
        report.stages.prune_seconds = self.clock.lap();
        Ok(report)
    }

    /// Step 1: the intent.
    async fn begin(&mut self, facts: &Facts, from: Origin, rewind: bool) -> Result<InFlight> {
        let name = self.options.request.name.clone();
        // A name of another scheme is somebody's own, whatever the caller says: its snapshot is not poolshift's to remove.
        let own_name = |name: &String| self.options.request.automatic && is_automatic(name);
        let automatic = name.as_ref().is_none_or(own_name);
        let name = name.unwrap_or_else(|| automatic_name(facts));
        let there = facts.source_snapshots.iter().find(|have| have.name == name).cloned();
        let snapshot = there.filter(|_| facts.source_support == SnapshotSupport::Kept);
        let dirty = self.side.state.is_dirty();
        let in_step = self.options.snapshotter.is_some();
        let in_flight = InFlight { rewind, in_step, ..InFlight::new(name, snapshot, automatic, from, dirty) };
        self.side.begin(&in_flight, &facts.source_snapshots).await?;
        Ok(in_flight)
    }

    /// Steps 2 to 10: from the intent to the commit. Gives back the commit and the base's name.
    async fn replicate(&mut self, mut in_flight: InFlight) -> Result<(Commit, Option<String>)> {
        let base = self.side.base_name(&in_flight.from);
        let went_on = in_flight.dirty && !in_flight.rewind;
        // Before the size is known: a file that grows from here on has changed while it was read.
        let token = self.source.change_token().await?;
        let view = self.snapshot_source(&mut in_flight).await?;
        self.stages.source_snapshot_seconds = self.clock.lap();
        self.rewound = self.side.prepare(&mut in_flight, view.size()).await?;
        self.stages.rewind_seconds = self.clock.lap();
        if !in_flight.applied {
            self.transfer(&mut in_flight, view.clone(), went_on).await?;
            if self.source.snapshot_support() == SnapshotSupport::HeadOnly {
                self.unchanged_while_read = Some(token.is_some() && token == self.source.change_token().await?);
            }
            point_still_there(self.source.as_ref(), view.point()).await?;
            if let Some(base) = self.side.base(&in_flight.from).map(Commit::on_source) {
                still_there(self.source.as_ref(), &base).await?;
            }
            self.stages.transfer_seconds = self.clock.lap();
        } else if went_on {
            let plan = self.plan(&in_flight, view.as_ref()).await?;
            self.check_nobody_wrote(&in_flight, &plan).await?;
        }
        let target = self.side.finish(&mut in_flight).await?;
        let commit = self.side.enter(&in_flight, &target, true).await?;
        self.stages.commit_seconds = self.clock.lap();
        Ok((commit, base))
    }

    /// Step 2: the source snapshot. Its id gets into the state together with the record that HEAD is dirty.
    async fn snapshot_source(&self, in_flight: &mut InFlight) -> Result<Arc<dyn View>> {
        if self.source.snapshot_support() == SnapshotSupport::HeadOnly {
            let view = self.source.view(&Point::Head).await?;
            in_flight.snapshot = Some(Snapshot { id: 0, name: in_flight.name.clone(), size: view.size() });
            return Ok(view);
        }
        let snapshot = match in_flight.snapshot.take() {
            Some(snapshot) => snapshot,
            None => {
                let there = self.source.snapshots().await?.into_iter().find(|have| have.name == in_flight.name);
                match (there, &self.options.snapshotter) {
                    (Some(snapshot), _) => snapshot,
                    (None, Some(snapshotter)) => snapshotter.create(self.source, &in_flight.name).await?,
                    (None, None) => self.source.create_snapshot(&in_flight.name).await?,
                }
            }
        };
        failpoint!("cycle.source-snapshot");
        in_flight.snapshot = Some(snapshot.clone());
        Ok(self.source.view(&Point::Snapshot(snapshot)).await?)
    }

    /// Step 7, and the flush of step 8. `went_on`: HEAD holds parts of this snapshot already.
    async fn transfer(&mut self, in_flight: &mut InFlight, view: Arc<dyn View>, went_on: bool) -> Result<()> {
        let (size, target) = (view.size(), self.side.target);
        let plan = self.plan(in_flight, view.as_ref()).await?;
        if went_on {
            self.check_nobody_wrote(in_flight, &plan).await?;
        }
        self.stages.plan_seconds = self.clock.lap();
        self.method = Some(plan.method.clone());
        self.progress.set_snapshot(&in_flight.name);
        self.progress.set_plan(&plan);
        let (layout, start) = (self.source.layout(), in_flight.progress_to);
        let compare = in_flight.from == Origin::Compare;
        let extents = if compare {
            let head = target.view(&Point::Head).await?;
            delta::extents_of_both(view.clone(), head, &plan, layout, start)
        } else {
            delta::extents(view.clone(), &plan, layout, start)
        };
        let read = ReadOptions {
            limits: self.options.limits.clone(),
            drop_zeroes: in_flight.from == Origin::Blank,
            compare_with: compare.then(|| target.clone()),
        };
        let (counters, cancel) = (self.progress.counters.clone(), self.side.cancel);
        let batches = pipeline::read(view, extents, read, counters.clone(), cancel.clone());
        let batches = transport::in_process(batches, self.options.compression);
        let apply = ApplyOptions { requests: self.options.limits.requests, ..ApplyOptions::default() };
        let mut keeper = self.side.keeper(in_flight);
        let applied = pipeline::apply(batches, target.clone(), apply, &mut keeper, counters, cancel).await?;
        if applied == Applied::Part {
            return Err(interrupted(in_flight, size));
        }
        Ok(())
    }

    async fn plan(&self, in_flight: &InFlight, view: &dyn View) -> Result<Plan> {
        if in_flight.from == Origin::Compare {
            return Ok(Plan::compare(view.size()));
        }
        let base = self.side.base(&in_flight.from).map(Commit::on_source);
        if base.is_none() && in_flight.from != Origin::Blank {
            return Err(no_such_base(self.side.target.as_ref()));
        }
        Ok(delta::plan(view, base.as_ref()).await?)
    }

    /// Between an interrupted run and this one somebody else may have written the target.
    async fn check_nobody_wrote(&self, in_flight: &InFlight, plan: &Plan) -> Result<()> {
        // Without object maps of the source nobody knows which objects are in the delta.
        if plan.method != Method::TwoLevel {
            return Ok(());
        }
        let Some(since) = self.side.written_beyond(in_flight, plan.runs.clone(), plan.size).await? else {
            return Ok(());
        };
        let target = self.side.target;
        let facts = gather(self.source.as_ref(), target.as_ref()).await?;
        Err(conflict(ConflictKind::Diverged { since }, self.source.as_ref(), target.as_ref(), facts))
    }

    fn report(&self, commit: &Commit, base: Option<String>) -> SyncReport {
        let mut remarks = self.source.remarks();
        remarks.extend(self.side.target.remarks());
        SyncReport {
            source: self.source.location().to_owned(),
            target: self.side.target.location().to_owned(),
            base,
            snapshot: commit.name.clone(),
            size: commit.size,
            already_there: false,
            resumed: self.resumed,
            finished_first: None,
            rewound: self.rewound,
            method: self.method.clone(),
            moved: self.progress.counters.read(),
            unchanged_while_read: self.unchanged_while_read,
            pruned: super::report::Pruned::default(),
            stages: self.stages.clone(),
            remarks,
        }
    }
}

/// The state that a cycle goes on from: what is there, or a new one; with `--full`, one for another source. A commit
/// whose target snapshot is gone is none any more, and neither is its source snapshot needed.
fn state_to_begin_with(facts: &Facts, source: &dyn SourceImage) -> TargetState {
    let fresh = TargetState::new(source.identity(), source.location());
    let Some(state) = &facts.state else { return fresh };
    if state.source != *source.identity() {
        let own = state.commits.iter().filter(|commit| commit.automatic);
        let mut retired = state.retired.clone();
        retired.retain(|retired| retired.side == Side::Target);
        retired.extend(own.map(|commit| Retired::of(Side::Target, commit.target_id, &commit.name)));
        return TargetState { retired, ..fresh };
    }
    let mut state = TargetState { source_location: source.location().to_owned(), ..state.clone() };
    if facts.target_support == SnapshotSupport::Kept {
        let there = |commit: &Commit| lineage::holds(&facts.target_snapshots, commit.target_id, &commit.name);
        let (commits, gone): (Vec<Commit>, Vec<Commit>) = state.commits.into_iter().partition(there);
        state.commits = commits;
        let own = gone.iter().filter(|commit| commit.automatic);
        state.retired.extend(own.map(|commit| Retired::of(Side::Source, commit.source_id, &commit.name)));
    }
    // What was given up and has appeared since.
    let (given_up, commits) = (std::mem::take(&mut state.given_up), &state.commits);
    for name in given_up {
        match facts.source_snapshots.iter().find(|have| have.name == name) {
            Some(late) if !commits.iter().any(|commit| commit.source_id == late.id) => {
                state.retired.push(Retired::of(Side::Source, late.id, &late.name));
            }
            Some(_) => {}
            None => state.given_up.push(name),
        }
    }
    state
}
