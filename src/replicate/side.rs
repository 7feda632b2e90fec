//! The target's side of a cycle, in the order of its durable steps: the same for a `sync` and a `receive`.

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use tokio_util::sync::CancellationToken;

use crate::batch::CHUNK_MAX;
use crate::delta;
use crate::extent::{ByteRange, normalize, subtract};
use crate::failpoint::failpoint;
use crate::image::{
    ErrorKind, ImageError, LeaseOwner, Point, Snapshot, SnapshotSupport, SourceImage, TargetImage, View,
};
use crate::pipeline::{Applied, Checkpoint, Limits};

use super::error::{Conflict, ConflictKind, CycleError, Result};
use super::report::Pruned;
use super::retention::Keep;
use super::state::{Commit, InFlight, Origin, Retired, Side, StateError, TargetState};
use super::{retention, rewind};

/// How large the stored state may grow, in bytes: a target takes 64 KiB, and the snapshot in flight needs room as well.
const STATE_ROOM: usize = 48 << 10;

/// A target, its state, and how to work on it.
pub(super) struct TargetSide<'a> {
    pub(super) target: &'a Arc<dyn TargetImage>,
    pub(super) state: TargetState,
    pub(super) keep: Keep,
    pub(super) limits: Limits,
    pub(super) cancel: &'a CancellationToken,
}

impl TargetSide<'_> {
    fn head_only(&self) -> bool {
        self.target.snapshot_support() == SnapshotSupport::HeadOnly
    }

    pub(super) fn base(&self, from: &Origin) -> Option<&Commit> {
        match from {
            Origin::Base(id) => self.state.commit_of_source(*id),
            Origin::Blank | Origin::Compare => None,
        }
    }

    pub(super) fn base_name(&self, from: &Origin) -> Option<String> {
        self.base(from).map(|commit| commit.name.clone())
    }

    /// Step 1: a new intent replaces what was in flight. What that leaves behind is retired: the source snapshot, if it
    /// was poolshift's own and no longer has a use, and a target snapshot that was found wrong. Where the source snapshot
    /// was still to be made and isn't there, it may appear yet, from a request that timed out: its name is remembered.
    pub(super) async fn begin(&mut self, in_flight: &InFlight, source_snapshots: &[Snapshot]) -> Result<()> {
        if let Some(lost) = self.state.in_flight.take() {
            let is_it = |have: &&Snapshot| {
                have.name == lost.name && lost.snapshot.as_ref().is_none_or(|snapshot| snapshot.id == have.id)
            };
            let found = source_snapshots.iter().find(is_it);
            if lost.automatic && lost.name != in_flight.name {
                match (found, &lost.snapshot) {
                    (Some(found), _) => self.state.retired.push(Retired::of(Side::Source, found.id, &found.name)),
                    (None, None) => self.state.give_up(&lost.name),
                    // It was there, and has been removed.
                    (None, Some(_)) => {}
                }
            }
            self.state.retired.extend(lost.withdraw.map(|id| Retired::of(Side::Target, id, &lost.name)));
        }
        self.store_in_flight(in_flight).await?;
        failpoint!("cycle.intent");
        Ok(())
    }

    /// Steps 3 to 6: from the record that HEAD gets dirty, to a HEAD that the delta can be applied to, of its size. Gives
    /// back whether HEAD was rewound.
    pub(super) async fn prepare(&mut self, in_flight: &mut InFlight, size: u64) -> Result<bool> {
        in_flight.dirty = true;
        self.store_in_flight(in_flight).await?;
        failpoint!("cycle.dirty");
        let rewind = in_flight.rewind;
        if rewind && in_flight.from != Origin::Compare {
            if in_flight.from == Origin::Blank {
                self.target.resize(0).await?;
            } else {
                let base = self.base(&in_flight.from).map(Commit::on_target);
                let base = base.ok_or_else(|| no_such_base(self.target.as_ref()))?;
                if rewind::rewind(self.target, &base, self.limits.clone(), self.cancel).await? == Applied::Part {
                    return Err(interrupted(in_flight, size));
                }
                still_there(self.target.as_ref(), &base).await?;
            }
            in_flight.rewind = false;
            self.store_in_flight(in_flight).await?;
            failpoint!("cycle.rewound");
        }
        if !in_flight.applied && (self.head_only() || in_flight.withdraw.is_some()) {
            for declared in self.target.snapshots().await? {
                if self.head_only() || in_flight.withdraw == Some(declared.id) {
                    self.target.remove_snapshot(&declared).await?;
                }
            }
        }
        if self.target.size().await? != size {
            self.target.resize(size).await?;
            failpoint!("cycle.resized");
        }
        Ok(rewind)
    }

    /// HEAD holds what does not belong there: the next run must not go on from it.
    pub(super) async fn spoil(&self, in_flight: &mut InFlight) -> Result<()> {
        (in_flight.rewind, in_flight.progress_to, in_flight.applied) = (true, 0, false);
        self.store_in_flight(in_flight).await?;
        failpoint!("cycle.spoiled");
        Ok(())
    }

    /// Where HEAD, which holds parts or all of what is in flight, differs from its base beyond `expected`, the ranges of
    /// what is in flight: another client has written to it. What it wrote within them is not found. Returns the name of
    /// the base where that is so.
    pub(super) async fn written_beyond(
        &self,
        in_flight: &InFlight,
        expected: Vec<ByteRange>,
        size: u64,
    ) -> Result<Option<String>> {
        if in_flight.from == Origin::Compare || self.head_only() {
            return Ok(None);
        }
        let base = self.base(&in_flight.from).map(Commit::on_target);
        let head = self.target.view(&Point::Head).await?;
        let then = match &base {
            Some(base) => Some(self.target.view(&Point::Snapshot(base.clone())).await?),
            None => None,
        };
        let changed = delta::plan(head.as_ref(), base.as_ref()).await?;
        let period = self.target.layout().period();
        // A shrink touches what lies across the new end, on the target even where the source has nothing there.
        let across = base
            .as_ref()
            .filter(|base| base.size > size)
            .and_then(|_| ByteRange::between(size.saturating_sub(1), size));
        let within = expected.into_iter().chain(across).map(|run| run.align_outward(period, size));
        let expected = normalize(within.collect());
        for beyond in subtract(&changed.runs, &expected) {
            // The object map may name an object that has not changed, and a rewind writes what the base holds.
            for extent in head.diff(base.as_ref(), beyond).await? {
                if content_differs(head.as_ref(), then.as_deref(), extent.range).await? {
                    let location = self.target.location();
                    tracing::warn!("{location}: another client has written to {}", extent.range);
                    return Ok(Some(base.map_or_else(|| "its creation".to_owned(), |base| base.name)));
                }
            }
        }
        Ok(None)
    }

    /// Steps 8 and 9: everything is applied and flushed; the target snapshot is made.
    pub(super) async fn finish(&self, in_flight: &mut InFlight) -> Result<Snapshot> {
        if !in_flight.applied {
            let snapshots = self.target.snapshots().await?;
            // Before `applied` is stored: what is there now was made of a HEAD in the middle of its way.
            if !self.head_only() && snapshots.iter().any(|have| have.name == in_flight.name) {
                let kind = ConflictKind::NameTaken { name: in_flight.name.clone() };
                let source = (self.state.source_location.clone(), in_flight.snapshot.iter().cloned().collect());
                return Err(Conflict { kind, source, target: (self.target.location().to_owned(), snapshots) }.into());
            }
            in_flight.target_newest = snapshots.iter().map(|have| have.id).max().unwrap_or(0);
            in_flight.applied = true;
            self.store_in_flight(in_flight).await?;
            failpoint!("cycle.applied");
        }
        let snapshot = self.target.create_snapshot(&in_flight.name).await?;
        failpoint!("cycle.commit");
        Ok(snapshot)
    }

    /// Step 10: the commit is entered, and nothing is in flight any more. If it `is_base` for the next cycle, older
    /// automatic ones are retired.
    pub(super) async fn enter(&mut self, in_flight: &InFlight, target: &Snapshot, is_base: bool) -> Result<Commit> {
        let commit = Commit {
            name: in_flight.name.clone(),
            source_id: in_flight.snapshot.as_ref().map_or(0, |snapshot| snapshot.id),
            target_id: target.id,
            size: target.size,
            at: in_flight.at.clone(),
            automatic: in_flight.automatic,
        };
        if self.head_only() {
            // The statement about a file has replaced the one before. The source's older snapshots may go with it.
            let older = std::mem::take(&mut self.state.commits).into_iter();
            let own = older.filter(|older| older.automatic && older.source_id != commit.source_id);
            self.state.retired.extend(own.map(|older| Retired::of(Side::Source, older.source_id, &older.name)));
        }
        self.state.commits.push(commit.clone());
        self.state.in_flight = None;
        if is_base {
            retention::retire(&mut self.state, &self.keep, crate::clock::now());
        }
        self.make_room()?;
        self.store().await?;
        failpoint!("cycle.recorded");
        Ok(commit)
    }

    /// Forgets the oldest commits when the state gets too large to be stored. Snapshots that the user named stay where
    /// they are; only that they are equal is not known any more. poolshift's own are retired.
    fn make_room(&mut self) -> Result<()> {
        while self.state.commits.len() > 1 && self.render(&self.state)?.len() > STATE_ROOM {
            // Never the newest one, the base; what others need only when nothing else is left.
            let older = &self.state.commits[..self.state.commits.len() - 1];
            let first = older.iter().position(|commit| !self.keep.is_protected(commit)).unwrap_or(0);
            let oldest = self.state.commits.remove(first);
            if oldest.automatic {
                self.state.retired.push(Retired::of(Side::Source, oldest.source_id, &oldest.name));
                self.state.retired.push(Retired::of(Side::Target, oldest.target_id, &oldest.name));
            }
            tracing::debug!(snapshot = oldest.name, "an old commit is forgotten: the state has no room for it");
        }
        Ok(())
    }

    /// Step 11. The commit stands, whatever becomes of this: what can't be removed or noted is reported, and tried again
    /// by the next run.
    pub(super) async fn prune(&mut self, source: Option<&Arc<dyn SourceImage>>) -> Pruned {
        if self.state.retired.is_empty() {
            return Pruned::default();
        }
        let mut pruned = retention::prune(&mut self.state, source, self.target).await;
        if let Err(error) = self.store().await {
            pruned.left.push(error.to_string());
        }
        failpoint!("cycle.pruned");
        pruned
    }

    pub(super) async fn store_in_flight(&self, in_flight: &InFlight) -> Result<()> {
        self.store_state(&TargetState { in_flight: Some(in_flight.clone()), ..self.state.clone() }).await
    }

    async fn store(&self) -> Result<()> {
        self.store_state(&self.state).await
    }

    async fn store_state(&self, state: &TargetState) -> Result<()> {
        store(self.target.as_ref(), state).await
    }

    fn render(&self, state: &TargetState) -> Result<String> {
        state.render().map_err(|error| CycleError::State { target: self.target.location().to_owned(), error })
    }

    /// Checkpoints of `in_flight`, for as long as it is applied.
    pub(super) fn keeper<'k>(&'k self, in_flight: &'k mut InFlight) -> Keeper<'k> {
        Keeper { target: self.target.as_ref(), state: &self.state, in_flight }
    }
}

/// Whether a range of HEAD holds other bytes than an earlier point of the same image, which reads as zeroes beyond its
/// end; `None`: zeroes throughout.
async fn content_differs(head: &dyn View, then: Option<&dyn View>, range: ByteRange) -> Result<bool> {
    let end = then.map_or(0, View::size);
    for piece in range.split_at_multiples(CHUNK_MAX) {
        let below = ByteRange::between(piece.offset(), piece.end().min(end));
        let read_then = async {
            match (then, below) {
                (Some(then), Some(below)) => then.read(below).await,
                _ => Ok(Bytes::new()),
            }
        };
        let (now, then) = futures::try_join!(head.read(piece), read_then)?;
        let (same, beyond) = now.split_at(then.len());
        if *same != then[..] || beyond.iter().any(|&byte| byte != 0) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Keeps checkpoints in the target's state.
pub(super) struct Keeper<'a> {
    target: &'a dyn TargetImage,
    state: &'a TargetState,
    in_flight: &'a mut InFlight,
}

#[async_trait]
impl Checkpoint for Keeper<'_> {
    async fn save(&mut self, progress_to: u64) -> Result<(), ImageError> {
        // A run that goes on at a checkpoint must not fall behind it before its own first batch is done.
        self.in_flight.progress_to = self.in_flight.progress_to.max(progress_to);
        let state = TargetState { in_flight: Some(self.in_flight.clone()), ..self.state.clone() };
        let text = state.render().map_err(|error| {
            ImageError::new(ErrorKind::Corrupt, self.target.location(), "render the checkpoint").caused_by(error)
        })?;
        self.target.store_state(&text).await?;
        failpoint!("cycle.checkpoint");
        Ok(())
    }
}

/// Does `work` with the target's lease.
pub(super) async fn with_lease<T, F: Future<Output = Result<T>>>(
    target: &Arc<dyn TargetImage>,
    work: impl FnOnce() -> F,
) -> Result<T> {
    let owner = LeaseOwner::current()
        .map_err(|error| ImageError::from_io(error, target.location(), "say who takes the lease"))?;
    target.acquire_lease(&owner).await?;
    let outcome = work().await;
    // A lease that can't be given back is taken over by the next run: this process will be gone then.
    if let Err(error) = target.release_lease().await {
        tracing::warn!(%error, "the lease was not given back");
    }
    outcome
}

/// Reads the state that poolshift keeps with a target.
pub(super) async fn load_state(target: &dyn TargetImage) -> Result<Option<TargetState>> {
    let text = target.load_state().await?;
    let state_error = |error| CycleError::State { target: target.location().to_owned(), error };
    text.as_deref().map(TargetState::parse).transpose().map_err(state_error)
}

/// Stores a state with its target.
pub(super) async fn store(target: &dyn TargetImage, state: &TargetState) -> Result<()> {
    let text = state.render().map_err(|error| CycleError::State { target: target.location().to_owned(), error })?;
    Ok(target.store_state(&text).await?)
}

/// A state that names a base which it does not have: damaged, whoever did that.
pub(super) fn no_such_base(target: &dyn TargetImage) -> CycleError {
    let error = StateError::Damaged(serde::de::Error::custom("it names a base that it does not have"));
    CycleError::State { target: target.location().to_owned(), error }
}

/// Fails if the snapshot is gone. RBD reads the objects of a removed snapshot as zeroes and reports nothing, so that
/// whoever has read one must ask, afterwards, whether it was there all the time: its id is never given again.
pub(super) async fn still_there<I: SourceImage + ?Sized>(image: &I, snapshot: &Snapshot) -> Result<()> {
    let there = image.snapshots().await?.iter().any(|have| have.id == snapshot.id && have.name == snapshot.name);
    let lost = || CycleError::SnapshotLost { location: image.location().to_owned(), snapshot: snapshot.to_string() };
    there.then_some(()).ok_or_else(lost)
}

/// Fails if what a view looked at is a snapshot, and gone: see [`CycleError::SnapshotLost`].
pub async fn point_still_there<I: SourceImage + ?Sized>(image: &I, point: &Point) -> Result<()> {
    match point {
        Point::Snapshot(snapshot) => still_there(image, snapshot).await,
        Point::Head => Ok(()),
    }
}

pub(super) fn interrupted(in_flight: &InFlight, size: u64) -> CycleError {
    CycleError::Interrupted { snapshot: in_flight.name.clone(), progress_to: in_flight.progress_to, size }
}
