//! What binds RBD images together: parents, clones, protected snapshots; and flattening, which cuts a clone loose.
//!
//! # Flattening, as librbd 16.2 does it (read in its source, and tried)
//!
//! - Objects are copied in ascending order, ten at a time by default; one that the clone's object map has is passed over
//!   at once. The link to the parent goes last, in one step. So it can be stopped after any object, nothing is lost, and
//!   the next flatten has the rest to do. Without an object map the next one looks at every object again.
//! - There is no rate. Waiting within the progress callback would hold librbd's locks and the threads on which it hears
//!   of other clients: a server that wants the exclusive lock would wait as well, and so could the watch's own pings. So
//!   a rate is kept by stopping after some objects, waiting without any of librbd's locks, and flattening on.
//! - The exclusive lock is taken as a server would take it: another client that asks for it gets it, and then flattens
//!   on our behalf. A flatten that another client does for us neither keeps a rate nor can be stopped.
//! - The snapshots of a clone lose their parent only with the deep-flatten feature; without it they stay bound.

use std::fmt;
use std::num::NonZeroU64;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use serde::Serialize;
use tokio_util::sync::CancellationToken;

use super::{Inner, Place, RbdImage};
use crate::ceph::{self, Features, Image, LinkedImage, ParentLink};
use crate::extent::{ByteRange, subtract, total_length};
use crate::image::{ErrorKind, ImageError, Result};

/// The most runs of objects that are kept of one image; beyond, its object map counts as no help.
const RUNS_MAX: usize = 4 << 20;
/// How long a stretch of flattening between two pauses takes at the rate that is to be kept.
const STRETCH: Duration = Duration::from_millis(500);
/// How long a flatten that was told to stop is waited for; only one that another client does goes on longer.
const STOP_PATIENCE: Duration = Duration::from_secs(30);

/// An image that is bound to another.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RbdLink {
    /// The pool's name.
    pub pool: String,
    /// The namespace; `None` for the default one.
    pub namespace: Option<String>,
    /// Its name; in the trash, the one that it had before.
    pub image: String,
    /// Its id, which stays when it is renamed.
    pub id: String,
    /// Whether it is in the trash.
    pub trash: bool,
}

impl RbdLink {
    fn of(linked: LinkedImage) -> Self {
        let LinkedImage { pool, namespace, id, name, trash } = linked;
        Self { pool, namespace: Some(namespace).filter(|name| !name.is_empty()), image: name, id, trash }
    }

    fn place(&self) -> Place {
        Place::new(&self.pool, self.namespace.as_deref(), &self.image)
    }
}

impl fmt::Display for RbdLink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.place().location())?;
        if self.trash { write!(f, " (in the trash, id {})", self.id) } else { Ok(()) }
    }
}

/// The snapshot that a clone was made of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RbdParentLink {
    /// The parent.
    pub image: RbdLink,
    /// The snapshot's name.
    pub snapshot: String,
    /// How many bytes from the start may still be shared with it.
    pub overlap_bytes: u64,
}

/// A snapshot, and what binds it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RbdSnapshot {
    /// Its id.
    pub id: u64,
    /// Its name. One that was removed while it had clones lives on in the trash, under another name.
    pub name: String,
    /// The image's size in it, in bytes.
    pub size: u64,
    /// Whether it is one of the user's: neither of a group, nor in the trash, nor mirroring's.
    pub user: bool,
    /// Whether it is protected, as clones of the first format need it.
    pub protected: bool,
    /// Whether it sees data of the image's parent.
    pub has_parent: bool,
    /// The clones made of it.
    pub clones: Vec<RbdLink>,
}

/// What a figure of [`FlattenCost`] is worth.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum FlattenBound {
    /// What the clone's object map does not have. The parent may have less.
    ObjectMap,
    /// All that may be shared: the clone has no object map, an invalid one, or stripes.
    Overlap,
}

/// What flattening a clone would copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct FlattenCost {
    /// An upper bound, in bytes.
    pub bytes_at_most: u64,
    /// How it was found.
    pub bound: FlattenBound,
}

/// What an image is bound to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RbdRelations {
    /// The image's size now, in bytes.
    pub size: u64,
    /// How many bytes of objects it has itself, from the object map; `None` where that is missing, invalid, or no help.
    pub own_bytes: Option<u64>,
    /// Whose clone it is.
    pub parent: Option<RbdParentLink>,
    /// What flattening it would cost; `None` if it is no clone.
    pub flatten: Option<FlattenCost>,
    /// Whether flattening reaches its snapshots.
    pub deep_flatten: bool,
    /// All its snapshots, by ascending id.
    pub snapshots: Vec<RbdSnapshot>,
}

/// How far a flatten is; read by whoever shows it.
#[derive(Debug, Default)]
pub struct FlattenProgress {
    /// Bytes from the start that are done.
    pub done: AtomicU64,
    /// Bytes in all; 0 before the first object.
    pub total: AtomicU64,
}

/// How a flatten ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Flattened {
    /// Whether the image has lost its parent; otherwise it was stopped, and the next flatten goes on.
    pub done: bool,
    /// An upper bound of what was copied, in bytes.
    pub copied_bytes_at_most: u64,
    /// The address of the client that does it for us, because it owned the image's exclusive lock at the start.
    pub done_by: Option<String>,
    /// Snapshots of the image that still see the parent, for want of deep-flatten: until they are removed, the image
    /// counts as the parent's clone.
    pub bound_snapshots: Vec<String>,
}

impl RbdImage {
    /// Opens an image by the id of a link, also one in the trash. [`ErrorKind::NotFound`] when it is gone.
    pub async fn open_linked(&self, link: &RbdLink) -> Result<Self> {
        Self::open(&self.inner.connector, link.place(), Some(link.id.clone()), true).await
    }

    /// This image as others are bound to it.
    pub fn link(&self) -> RbdLink {
        let Place { pool, namespace, image } = self.inner.place.clone();
        RbdLink { pool, namespace, image, id: self.inner.id.clone(), trash: false }
    }

    /// What the image is bound to.
    pub async fn relations(&self) -> Result<RbdRelations> {
        let (inner, limit) = (Arc::clone(&self.inner), self.inner.timeout());
        let look = move |steps: &AtomicU64| relations(&inner, steps);
        let found = ceph::blocking_with_progress("rbd_list_children3", limit, Arc::default(), look).await;
        found.map_err(|error| {
            let failed = self.inner.fail("look for clones", error);
            match failed.kind {
                // librbd lists none of them where it may not read the pool of one.
                ErrorKind::PermissionDenied => failed
                    .detail("a clone of it may be in a pool that this user may not read")
                    .hint("rbd children, as a user who may read all pools, lists them; osd 'profile rbd-read-only' lets read one"),
                _ => failed,
            }
        })
    }

    /// Takes the protection off a snapshot of that name. [`ErrorKind::Busy`] while it has clones that need it.
    pub async fn unprotect_snapshot(&self, name: &str) -> Result<()> {
        let (writer, wanted) = (self.writer().await?, name.to_owned());
        let unprotect = move || writer.unprotect_snapshot(&wanted);
        let done = self.inner.call(format!("unprotect snapshot {name:?}"), "rbd_snap_unprotect", unprotect).await;
        done.map_err(|error| match error.kind {
            ErrorKind::Busy { .. } => error.detail("it has clones").hint("flatten them: poolshift flatten --children"),
            _ => error,
        })
    }

    /// Copies what the image still shares with its parent, and cuts the link; see the module's head. At most `rate`
    /// bytes a second, if given, which needs a valid object map ([`ErrorKind::Unsupported`]) and nobody else with the
    /// exclusive lock ([`ErrorKind::Busy`]). `cancel` stops it after the objects under way.
    pub async fn flatten(
        &self,
        rate: Option<NonZeroU64>,
        progress: &Arc<FlattenProgress>,
        cancel: &CancellationToken,
    ) -> Result<Flattened> {
        let exclusive = self.inner.features.has(Features::EXCLUSIVE_LOCK);
        let owner = self.inner.look("look who holds the lock", move |image| live_owner(image, exclusive)).await?;
        if let (Some(holder), Some(_)) = (&owner, rate) {
            let held = ImageError::new(ErrorKind::Busy { holder: holder.clone() }, self.location_text(), "flatten");
            return Err(held
                .detail(format!("the client at {holder} owns its lock and would do it, without keeping a rate"))
                .hint("flatten it while nobody uses it, or without --rate"));
        }
        let copied = match rate {
            None => Stretch::unlimited(self.inner.layout.object_size),
            Some(rate) => {
                let inner = Arc::clone(&self.inner);
                let wanted = self.inner.look("compare with the parent", move |image| to_copy(&inner, image)).await?;
                Stretch::paced(self.inner.layout.object_size, wanted.ok_or_else(|| self.no_map())?, rate)
            }
        };
        let copied = Arc::new(copied);
        let done = self.flatten_in_stretches(&copied, rate, owner.is_some(), progress, cancel).await?;
        let bound_snapshots = if done { self.snapshots_with_parent().await? } else { Vec::new() };
        let copied_bytes_at_most = copied.copied.load(Ordering::Relaxed);
        Ok(Flattened { done, copied_bytes_at_most, done_by: owner, bound_snapshots })
    }

    async fn flatten_in_stretches(
        &self,
        copied: &Arc<Stretch>,
        rate: Option<NonZeroU64>,
        by_another: bool,
        progress: &Arc<FlattenProgress>,
        cancel: &CancellationToken,
    ) -> Result<bool> {
        let writer = self.writer().await?;
        // Whoever drops this future stops the flatten as well.
        let stop = cancel.child_token();
        let _stop = stop.clone().drop_guard();
        let started = Instant::now();
        while !stop.is_cancelled() {
            copied.begin();
            let (image, stretch, shown, stopped) =
                (Arc::clone(&writer), Arc::clone(copied), Arc::clone(progress), stop.clone());
            let work = move |steps: &AtomicU64| {
                image.flatten(&|object, objects| {
                    steps.fetch_add(1, Ordering::Relaxed);
                    stretch.pass(object, objects, &shown) && !stopped.is_cancelled()
                })
            };
            let limit = self.inner.timeout();
            let work = ceph::blocking_with_progress("rbd_flatten_with_progress", limit, Arc::default(), work);
            let patience = if by_another { Duration::ZERO } else { STOP_PATIENCE };
            let given_up = async {
                stop.cancelled().await;
                tokio::time::sleep(patience).await;
            };
            let done = tokio::select! {
                biased;
                done = work => done.map_err(|error| self.flatten_error(error))?,
                () = given_up => false,
            };
            if done {
                return Ok(true);
            }
            if let Some(rate) = rate {
                let due = Duration::from_secs_f64(copied.copied.load(Ordering::Relaxed) as f64 / rate.get() as f64);
                let pause = due.saturating_sub(started.elapsed());
                tokio::select! {
                    () = tokio::time::sleep(pause) => {}
                    () = stop.cancelled() => {}
                }
            }
        }
        Ok(false)
    }

    fn location_text(&self) -> String {
        self.inner.location.clone()
    }

    fn no_map(&self) -> ImageError {
        let place = &self.inner.place;
        ImageError::new(ErrorKind::Unsupported, self.location_text(), "flatten at a rate")
            .detail("it has no valid object map, or stripes: after each pause it would begin anew")
            .hint(format!(
                "flatten without --rate, or make the map: rbd feature enable {place} exclusive-lock object-map \
                 fast-diff; rbd object-map rebuild {place}"
            ))
    }

    fn flatten_error(&self, error: ceph::CephError) -> ImageError {
        let (refused, orphan) = (error.is(Errno::ROFS), error.is(Errno::INVAL));
        let failed = self.inner.fail("flatten", error);
        match () {
            () if refused => ImageError { kind: ErrorKind::Busy { holder: "another client".into() }, ..failed }
                .detail("another client holds its lock for itself, as poolshift does with a target")
                .hint("see who it is: rbd lock ls; run it again when that has ended"),
            () if orphan => failed.detail("it has no parent: it is no clone, or has been flattened already"),
            () => failed,
        }
    }

    async fn snapshots_with_parent(&self) -> Result<Vec<String>> {
        let relations = self.relations().await?;
        Ok(relations.snapshots.into_iter().filter(|s| s.has_parent).map(|s| s.name).collect())
    }
}

/// What one call of librbd's flatten may copy, and what was copied so far. Shared with its callback.
#[derive(Debug)]
struct Stretch {
    object_size: u64,
    /// What has to be copied, sorted and disjoint; `None`: every object counts.
    wanted: Option<Vec<ByteRange>>,
    /// Bytes that one stretch may copy.
    most: u64,
    /// Objects below were seen by an earlier stretch.
    position: AtomicU64,
    copied: AtomicU64,
    begun_at: AtomicU64,
    is_over: AtomicBool,
}

impl Stretch {
    fn new(object_size: u64, wanted: Option<Vec<ByteRange>>, most: u64) -> Self {
        let (position, copied, begun_at, is_over) = Default::default();
        Self { object_size, wanted, most, position, copied, begun_at, is_over }
    }

    fn unlimited(object_size: u64) -> Self {
        Self::new(object_size, None, u64::MAX)
    }

    fn paced(object_size: u64, wanted: Vec<ByteRange>, rate: NonZeroU64) -> Self {
        let most = (rate.get() as f64 * STRETCH.as_secs_f64()) as u64;
        Self::new(object_size, Some(wanted), most.max(1))
    }

    fn begin(&self) {
        self.begun_at.store(self.copied.load(Ordering::Relaxed), Ordering::Relaxed);
        self.is_over.store(false, Ordering::Relaxed);
    }

    /// Notes an object that is begun or passed over; whether the stretch goes on. Never waits.
    fn pass(&self, object: u64, objects: u64, shown: &FlattenProgress) -> bool {
        let bytes = |objects: u64| objects.saturating_mul(self.object_size);
        if object >= self.position.load(Ordering::Relaxed) {
            self.position.store(object + 1, Ordering::Relaxed);
            shown.total.store(bytes(objects), Ordering::Relaxed);
            shown.done.store(bytes(object + 1), Ordering::Relaxed);
            if self.is_wanted(object) {
                let copied = self.copied.fetch_add(self.object_size, Ordering::Relaxed) + self.object_size;
                let over = copied - self.begun_at.load(Ordering::Relaxed) >= self.most;
                self.is_over.fetch_or(over, Ordering::Relaxed);
            }
        }
        !self.is_over.load(Ordering::Relaxed)
    }

    fn is_wanted(&self, object: u64) -> bool {
        let Some(wanted) = &self.wanted else { return true };
        let start = object.saturating_mul(self.object_size);
        let next = wanted.partition_point(|range| range.end() <= start);
        wanted.get(next).is_some_and(|range| range.offset() < start.saturating_add(self.object_size))
    }
}

/// The address of another client that owns the exclusive lock and is alive.
fn live_owner(image: &Image, exclusive: bool) -> ceph::Result<Option<String>> {
    let Some(locker) = image.lockers()?.into_iter().next().filter(|_| exclusive) else { return Ok(None) };
    let watched = image.watchers()?.into_iter().any(|watcher| watcher.address == locker.address);
    Ok(watched.then_some(locker.address))
}

/// The objects of HEAD itself, or with those that it sees in its parents; `None` where no map tells.
fn objects(inner: &Inner, image: &Image, parents: bool) -> ceph::Result<Option<Vec<ByteRange>>> {
    let plain = inner.layout.stripe_count == 1 && inner.layout.stripe_unit == inner.layout.object_size;
    if !plain
        || !inner.features.has(Features::OBJECT_MAP | Features::FAST_DIFF)
        || image.flags()? & ceph::INVALID_FLAGS != 0
    {
        return Ok(None);
    }
    image.objects(parents, RUNS_MAX)
}

/// What flattening has to copy: what the parents have within the overlap, and the clone has not.
fn to_copy(inner: &Inner, image: &Image) -> ceph::Result<Option<Vec<ByteRange>>> {
    let overlap = image.parent_link()?.map_or(0, |parent| parent.overlap);
    let (Some(own), Some(all)) = (objects(inner, image, false)?, objects(inner, image, true)?) else { return Ok(None) };
    let shared: Vec<_> = all.into_iter().filter_map(|range| range.clip(overlap)).collect();
    Ok(Some(subtract(&shared, &own)))
}

fn flatten_cost(overlap: u64, own: Option<&[ByteRange]>) -> FlattenCost {
    let Some(own) = own else { return FlattenCost { bytes_at_most: overlap, bound: FlattenBound::Overlap } };
    let shared: Vec<ByteRange> = ByteRange::between(0, overlap).into_iter().collect();
    FlattenCost { bytes_at_most: total_length(&subtract(&shared, own)), bound: FlattenBound::ObjectMap }
}

fn relations(inner: &Inner, steps: &AtomicU64) -> ceph::Result<RbdRelations> {
    let mut image = Image::open_by_id(&inner.pool, &inner.id, ceph::OpenMode::ReadOnly)?;
    let (size, parent, own) = (image.size()?, image.parent_link()?, objects(inner, &image, false)?);
    let overlap = parent.as_ref().map(|parent| parent.overlap);
    let mut snapshots = Vec::new();
    for ceph::SnapInfo { id, name, size, user } in image.snapshots()? {
        steps.fetch_add(1, Ordering::Relaxed);
        let looked = image.set_snapshot(Some(id)).and_then(|()| {
            let protected = user && image.is_snapshot_protected(&name)?;
            Ok((protected, image.parent_link()?.is_some(), image.children()?))
        });
        let (protected, has_parent, clones) = match looked {
            // It went meanwhile, and with it what it was bound to.
            Err(error) if error.is(Errno::NOENT) => continue,
            looked => looked?,
        };
        let clones = clones.into_iter().map(RbdLink::of).collect();
        snapshots.push(RbdSnapshot { id, name, size, user, protected, has_parent, clones });
    }
    Ok(RbdRelations {
        size,
        own_bytes: own.as_deref().map(total_length),
        deep_flatten: inner.features.has(Features::DEEP_FLATTEN),
        flatten: overlap.map(|overlap| flatten_cost(overlap, own.as_deref())),
        parent: parent.map(|ParentLink { image, snapshot, overlap, .. }| RbdParentLink {
            image: RbdLink::of(image),
            snapshot,
            overlap_bytes: overlap,
        }),
        snapshots,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn range(offset: u64, length: u64) -> ByteRange {
        ByteRange::new(offset, length).unwrap()
    }

    #[test]
    fn flattening_costs_what_the_clone_has_not() {
        let cost = |own: Option<&[ByteRange]>| flatten_cost(10 * MIB, own);
        assert_eq!(cost(None), FlattenCost { bytes_at_most: 10 * MIB, bound: FlattenBound::Overlap });
        assert_eq!(cost(Some(&[])).bytes_at_most, 10 * MIB);
        assert_eq!(cost(Some(&[range(0, 4 * MIB), range(8 * MIB, 8 * MIB)])).bytes_at_most, 4 * MIB);
        assert_eq!(flatten_cost(0, Some(&[])).bytes_at_most, 0);
    }

    #[test]
    fn a_stretch_ends_with_its_bytes_and_counts_only_what_is_copied() {
        let shown = FlattenProgress::default();
        let wanted = vec![range(4 * MIB, 8 * MIB), range(16 * MIB, MIB)];
        let stretch = Stretch::paced(4 * MIB, wanted, NonZeroU64::new(2 * 5 * MIB).unwrap());
        stretch.begin();
        let goes_on = |object| stretch.pass(object, 5, &shown);
        assert_eq!([goes_on(0), goes_on(1), goes_on(2), goes_on(3)], [true, true, false, false]);
        stretch.begin();
        assert_eq!([goes_on(0), goes_on(1), goes_on(3), goes_on(4)], [true; 4]);
        assert_eq!(stretch.copied.load(Ordering::Relaxed), 12 * MIB);
        assert_eq!((shown.done.into_inner(), shown.total.into_inner()), (20 * MIB, 20 * MIB));
    }

    #[test]
    fn a_stretch_always_gets_an_object_further() {
        let shown = FlattenProgress::default();
        let stretch = Stretch::paced(4 * MIB, vec![range(0, 8 * MIB)], NonZeroU64::MIN);
        for object in 0..2 {
            stretch.begin();
            assert!(!stretch.pass(object, 2, &shown));
        }
        assert_eq!(stretch.copied.load(Ordering::Relaxed), 8 * MIB);
    }
}
