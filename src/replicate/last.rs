//! The last delta of a cutover: from the base to HEAD of a source that nobody writes any more.
//!
//! A cycle makes a snapshot on both sides, and each waits for the monitors. While a server stands still there is no time
//! for that, and no need: its writers are stopped and shut out, so that HEAD is a point in time. Nothing is committed; the
//! target's state says what a cycle's would, that HEAD is dirty from the base on, and so whatever comes of it, a crash or
//! a server that goes on where it was, the next cycle rewinds HEAD to the base and is right.

use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use crate::batch::Compression;
use crate::delta::{self, Plan};
use crate::failpoint::failpoint;
use crate::image::{Point, Snapshot, SourceImage, TargetImage, View};
use crate::pipeline::{self, Applied, ApplyOptions, Limits, ReadOptions};
use crate::transport;

use super::cycle::{Progress, conflict, gather, name_of_now, ranges};
use super::error::{ConflictKind, Result};
use super::rewind::NoCheckpoint;
use super::side::{interrupted, load_state, no_such_base, still_there, store};
use super::state::{Commit, InFlight, Origin, TargetState};
use super::verify::{Compared, compare_windows};

/// A volume whose last delta was prepared: its target is at the base, and known to get dirty.
#[derive(Clone)]
pub struct LastDelta {
    source: Arc<dyn SourceImage>,
    target: Arc<dyn TargetImage>,
    in_flight: InFlight,
    base: Commit,
    limits: Limits,
}

/// What a last delta moved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Moved {
    /// Where it was looked for.
    pub plan: Plan,
    /// What was written on the target or zeroed there, in bytes.
    pub bytes: u64,
}

impl LastDelta {
    /// Gets everything ready, with the target's lease held, while the source may still be written: HEAD of the target is
    /// the newest commit, and is noted down as dirty from now on. A conflict where a cycle is due first: nothing is
    /// committed, something is in flight, or somebody wrote the target.
    pub async fn prepare(source: &Arc<dyn SourceImage>, target: &Arc<dyn TargetImage>, limits: Limits) -> Result<Self> {
        let facts = gather(source.as_ref(), target.as_ref()).await?;
        let state = facts.state.as_ref().filter(|state| state.source == facts.source && state.in_flight.is_none());
        let base = state.and_then(TargetState::newest).cloned();
        let there = |base: &Commit| {
            let holds = |snapshots: &[Snapshot], id| super::lineage::holds(snapshots, id, &base.name);
            holds(&facts.source_snapshots, base.source_id) && holds(&facts.target_snapshots, base.target_id)
        };
        let (Some(state), Some(base)) = (state, base.filter(there)) else {
            return Err(conflict(ConflictKind::NoCommonSnapshot, source.as_ref(), target.as_ref(), facts));
        };
        if facts.head_differs {
            let kind = ConflictKind::Diverged { since: base.name };
            return Err(conflict(kind, source.as_ref(), target.as_ref(), facts));
        }
        // In step, so that without an id its name never counts for a snapshot.
        let from = Origin::Base(base.source_id);
        let in_flight = InFlight { in_step: true, ..InFlight::new(name_of_now(), None, true, from, true) };
        store(target.as_ref(), &TargetState { in_flight: Some(in_flight.clone()), ..state.clone() }).await?;
        failpoint!("last-delta.prepared");
        Ok(Self { source: source.clone(), target: target.clone(), in_flight, base, limits })
    }

    /// The name that a snapshot of the source may get that marks this point: it is poolshift's, and a later cycle removes
    /// it.
    pub fn name(&self) -> &str {
        &self.in_flight.name
    }

    /// The snapshot that both sides have, and that the delta starts from.
    pub fn base(&self) -> &Commit {
        &self.base
    }

    /// Makes HEAD of the target equal to HEAD of the source, which nobody writes, and flushes. May be called again.
    pub async fn carry(&self, progress: &Progress, cancel: &CancellationToken) -> Result<Moved> {
        let (source, target) = (&self.source, &self.target);
        let view = source.view(&Point::Head).await?;
        let base = self.base.on_source();
        if target.size().await? != view.size() {
            target.resize(view.size()).await?;
        }
        let plan = delta::plan(view.as_ref(), Some(&base)).await?;
        progress.set_plan(&plan);
        let extents = delta::extents(view.clone(), &plan, source.layout(), 0);
        let counters = progress.counters.clone();
        let options = ReadOptions { limits: self.limits.clone(), drop_zeroes: false, compare_with: None };
        let batches = pipeline::read(view.clone(), extents, options, counters.clone(), cancel.clone());
        let batches = transport::in_process(batches, Compression::None);
        let apply = ApplyOptions { requests: self.limits.requests, ..ApplyOptions::default() };
        let done = pipeline::apply(batches, target.clone(), apply, &mut NoCheckpoint, counters.clone(), cancel).await?;
        if done == Applied::Part {
            return Err(interrupted(&self.in_flight, view.size()));
        }
        failpoint!("last-delta.carried");
        still_there(source.as_ref(), &base).await?;
        let counted = counters.read();
        Ok(Moved { plan, bytes: counted.bytes_written + counted.bytes_zeroed })
    }

    /// Compares both HEADs wherever either of them may have been written since the base, and stops at the first
    /// difference. Nobody writes either.
    pub async fn compare(&self) -> Result<Compared> {
        compare_heads(&self.source, &self.target, &self.base, &self.limits).await
    }
}

/// Compares both HEADs wherever either of them may have been written since a point that both have; see
/// [`LastDelta::compare`].
pub async fn compare_heads(
    source: &Arc<dyn SourceImage>,
    target: &Arc<dyn TargetImage>,
    base: &Commit,
    limits: &Limits,
) -> Result<Compared> {
    let (ours, theirs) = futures::try_join!(source.view(&Point::Head), target.view(&Point::Head))?;
    let written = async |image: &dyn SourceImage, view: Arc<dyn View>, since: Snapshot| -> Result<_> {
        let plan = delta::plan(Arc::as_ref(&view), Some(&since)).await?;
        Ok(ranges(delta::extents(view, &plan, image.layout(), 0)))
    };
    let on_source = written(source.as_ref(), ours.clone(), base.on_source()).await?;
    let on_target = written(target.as_ref(), theirs.clone(), base.on_target()).await?;
    let mut found = compare_windows(ours.clone(), theirs.clone(), on_source, limits).await?;
    if found.first_difference.is_none() {
        found.add(compare_windows(ours, theirs, on_target, limits).await?);
    }
    still_there(source.as_ref(), &base.on_source()).await?;
    still_there(target.as_ref(), &base.on_target()).await?;
    Ok(found)
}

/// Compares what changed between two points that both sides have, at the later one.
pub async fn compare_delta(
    source: &Arc<dyn SourceImage>,
    target: &Arc<dyn TargetImage>,
    from: &Commit,
    to: &Commit,
    limits: &Limits,
) -> Result<Compared> {
    let ours = source.view(&Point::Snapshot(to.on_source())).await?;
    let theirs = target.view(&Point::Snapshot(to.on_target())).await?;
    let plan = delta::plan(ours.as_ref(), Some(&from.on_source())).await?;
    let changed = ranges(delta::extents(ours.clone(), &plan, source.layout(), 0));
    let found = compare_windows(ours, theirs, changed, limits).await?;
    for commit in [from, to] {
        still_there(source.as_ref(), &commit.on_source()).await?;
    }
    still_there(target.as_ref(), &to.on_target()).await?;
    Ok(found)
}

/// Exchanges the sides: gives `source`, to which a server is to go back, the state of a target that follows `target`. Both
/// have the commits of the target's state in common; HEAD of the source is noted down as dirty, so that the first cycle
/// rewinds it to the newest of them. Done already is no error. Both leases are held.
pub async fn turn_round(source: &dyn TargetImage, target: &dyn TargetImage) -> Result<()> {
    if load_state(source).await?.is_some_and(|state| state.source == *target.identity()) {
        return Ok(());
    }
    let state = load_state(target).await?.ok_or_else(|| no_such_base(target))?;
    let turned = reversed(&state, target)?;
    store(source, &turned).await?;
    failpoint!("cycle.reversed");
    Ok(())
}

/// After a way back: the target's state says again what it has in common with the source, by what the source's state has
/// come to. The last of it is HEAD of both, and noted down as dirty on the target.
pub async fn turn_back(source: &dyn TargetImage, target: &dyn TargetImage) -> Result<()> {
    let Some(state) = load_state(source).await?.filter(|state| state.source == *target.identity()) else {
        return Ok(());
    };
    let mut turned = reversed(&state, source)?;
    if let Some(before) = load_state(target).await? {
        turned.given_up = before.given_up;
        // What marks the point of the cutover on the source, if it was made.
        if let Some(last) = before.in_flight.filter(|in_flight| in_flight.snapshot.is_none()) {
            turned.give_up(&last.name);
        }
        let known = |id: u64| turned.commits.iter().any(|commit| commit.target_id == id);
        let left = before.commits.iter().filter(|commit| commit.automatic && !known(commit.target_id));
        let retired = left.flat_map(|commit| {
            use super::state::{Retired, Side};
            [
                Retired::of(Side::Source, commit.source_id, &commit.name),
                Retired::of(Side::Target, commit.target_id, &commit.name),
            ]
        });
        let retired: Vec<_> = retired.chain(before.retired).collect();
        turned.retired.extend(retired);
    }
    store(target, &turned).await?;
    failpoint!("cycle.reversed-back");
    Ok(())
}

/// The state of the other side, which is now to follow `image`.
fn reversed(state: &TargetState, image: &dyn TargetImage) -> Result<TargetState> {
    let mut turned = TargetState::new(image.identity(), image.location());
    turned.commits = state.commits.iter().map(Commit::reversed).collect();
    turned.retired = state.retired.iter().map(super::state::Retired::reversed).collect();
    let base = turned.newest().ok_or_else(|| no_such_base(image))?;
    let from = Origin::Base(base.source_id);
    turned.in_flight = Some(InFlight { in_step: true, ..InFlight::new(name_of_now(), None, true, from, true) });
    Ok(turned)
}
