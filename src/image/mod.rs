//! Images: what poolshift needs of a disk, and the promises that a backend makes.
//!
//! Two contracts, [`SourceImage`] and [`TargetImage`], and the [`View`] through which one point in time is read; a
//! [`Disk`] is what a cutover needs beyond them, and [`pools`] the images of a cluster by their names. The
//! backends are `rbd` (over librbd), [`mod@file`] (a raw file or a block device) and [`memory`] (for model and crash
//! tests).
//!
//! # The contract
//!
//! **Points in time.** A [`View`] of a snapshot is immutable: two reads of one range give the same bytes for as long
//! as the snapshot exists, whatever is written to HEAD. A view of HEAD promises nothing of the kind.
//!
//! **Ordering.** Requests to one image may complete in any order. Two requests that overlap and are in flight at the
//! same time have no defined result; poolshift never issues such. A request issued after another has completed sees
//! its effect.
//!
//! **Durability.** A completed [`TargetImage::write`] or [`TargetImage::write_zeroes`] may still be lost by a crash
//! of client or storage. Everything completed before [`TargetImage::flush`] was called survives any crash once flush
//! has returned. [`TargetImage::store_state`], [`TargetImage::resize`], [`SourceImage::create_snapshot`] and
//! [`SourceImage::remove_snapshot`] are durable and atomic by themselves when they return: after a crash in the
//! middle either the old or the new state is there. `store_state` does *not* flush data.
//!
//! **Cancellation.** A future may be dropped at any await. A write that was issued may then still land, at any later
//! time up to the moment when the image is closed or fenced; a read's buffer stays alive until the backend is done
//! with it. Dropping therefore never corrupts memory, and the caller must treat the target as dirty.
//!
//! **Bounds.** Reads and writes lie within the size of the view or image; backends refuse others with
//! [`ErrorKind::OutOfBounds`] before they reach the storage, because librbd clips them in silence.
//!
//! **One writer.** Nothing is written to a target before [`TargetImage::acquire_lease`] has succeeded. Once another
//! process has taken the lease over, every later write of the old holder fails with [`ErrorKind::Fenced`] or never
//! lands.

use std::fmt;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::extent::{ByteRange, Extent};

mod disk;
mod error;
pub mod file;
pub mod lease;
pub mod memory;
pub mod metadata;
pub mod pools;
pub mod rbd;
mod spec;

pub use disk::{Disk, DiskUser, JOURNAL_MAX, LockHolder};
pub use error::{ErrorKind, ImageError, Result};
pub use lease::LeaseOwner;
pub use metadata::Metadata;
pub use spec::{ImageSpec, SpecError};

/// The block in which content is compared where no snapshots tell what changed: 64 KiB. A kept digest stands for one
/// such block, aligned to its size; the last one of an image may be shorter.
pub const COMPARE_BLOCK: u64 = 64 * 1024;

/// Which image this is, whatever it is called: names can be given to another image, these can not.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ImageIdentity {
    /// RBD: the cluster's fsid. File: `file`. Memory: `memory`.
    pub cluster: String,
    /// RBD: the pool's id, and `/namespace` when there is one. File: the host's name.
    pub pool: String,
    /// RBD: the image's id (not its name). File: the canonical path.
    pub image: String,
}

impl fmt::Display for ImageIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.cluster, self.pool, self.image)
    }
}

/// A snapshot of an image. Two snapshots of one image are the same if and only if their ids are equal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// The backend's id. RBD: the RADOS snapshot id, which grows with every snapshot of the pool and is never reused.
    pub id: u64,
    /// The name, which can be given again after a removal.
    pub name: String,
    /// The image's size at that point, in bytes.
    pub size: u64,
}

impl fmt::Display for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (id {})", self.name, self.id)
    }
}

/// What a [`View`] looks at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Point {
    /// The image as it is now, perhaps while somebody writes it.
    Head,
    /// A snapshot.
    Snapshot(Snapshot),
}

impl fmt::Display for Point {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Head => f.write_str("HEAD"),
            Self::Snapshot(snapshot) => snapshot.fmt(f),
        }
    }
}

/// How an image is cut into objects. Bytes throughout.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layout {
    /// The size of one object; requests that don't cross its multiples are the cheapest.
    pub object_size: u64,
    /// Striping v2: how much goes to one object before the next is taken. Equal to `object_size` without it.
    pub stripe_unit: u64,
    /// Striping v2: over how many objects. 1 without it.
    pub stripe_count: u64,
}

impl Layout {
    /// RBD's default: 4 MiB objects, no striping.
    pub const DEFAULT: Self = Self { object_size: 4 << 20, stripe_unit: 4 << 20, stripe_count: 1 };

    /// The period after which the layout repeats: a run of whole periods covers whole objects.
    pub fn period(&self) -> u64 {
        self.object_size.saturating_mul(self.stripe_count.max(1))
    }
}

/// What snapshots a backend has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SnapshotSupport {
    /// Snapshots are kept beside HEAD, any number of them (RBD, memory).
    Kept,
    /// At most one "snapshot": the statement that HEAD, as it is now, is that point (a file as a target).
    HeadOnly,
}

/// The answer of [`View::changed_objects`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ChangedObjects {
    /// All changed bytes lie in these runs (sorted, disjoint, object-aligned but for the end of the image).
    Runs(Vec<ByteRange>),
    /// The backend cannot tell cheaply: the exact diff over the whole image is the way.
    Unavailable {
        /// Why, for a person: `the object map of snapshot "a" is flagged invalid`.
        reason: String,
        /// What would make it cheap again, when something would: `rbd object-map rebuild pool/image@a`.
        cure: Option<String>,
    },
}

/// One point in time of an image, for reading.
#[async_trait]
pub trait View: Send + Sync {
    /// What this looks at.
    fn point(&self) -> &Point;

    /// The size at that point, in bytes. For a view of HEAD: the size when the view was opened.
    fn size(&self) -> u64;

    /// Reads exactly `range`. Holes read as zeroes. `range.length()` is at most 32 MiB.
    async fn read(&self, range: ByteRange) -> Result<Bytes>;

    /// The first level of a delta: which objects may differ between `since` (`None`: an image of zeroes) and this
    /// point, at a cost that doesn't grow with the data. Never omits a changed object; may name unchanged ones.
    /// Covers `0 .. self.size()`.
    async fn changed_objects(&self, since: Option<&Snapshot>) -> Result<ChangedObjects>;

    /// The second level: the extents within `within` in which this point differs from `since` (`None`: an image of
    /// zeroes, so that holes are not listed). Sorted, disjoint, clipped to `within` and to the view's size. Never
    /// omits a changed byte; may name unchanged ones.
    /// [`ErrorKind::Unsupported`] where `since` is a snapshot and the backend keeps none.
    async fn diff(&self, since: Option<&Snapshot>, within: ByteRange) -> Result<Vec<Extent>>;
}

/// An image that is read, and snapshotted.
#[async_trait]
pub trait SourceImage: Send + Sync {
    /// What the user wrote, such as `rbd:sata/vm-1`, without a snapshot. For messages.
    fn location(&self) -> &str;

    /// Which image it is.
    fn identity(&self) -> &ImageIdentity;

    /// How it is cut into objects.
    fn layout(&self) -> Layout;

    /// What its snapshots are.
    fn snapshot_support(&self) -> SnapshotSupport;

    /// What is missing for full speed or full safety, a sentence each; shown once to the user.
    fn remarks(&self) -> Vec<String> {
        Vec::new()
    }

    /// Something that changes whenever HEAD is written, as far as the backend can tell; `None` where it can't, or where
    /// snapshots make it needless.
    async fn change_token(&self) -> Result<Option<String>> {
        Ok(None)
    }

    /// A token that stays the same for as long as nothing is written to HEAD and no snapshot comes or goes, for two small
    /// requests. `None` where the backend has none, or a write might leave no trace in it, as it does on RBD in an object
    /// that was written already since the newest snapshot.
    async fn quiet_token(&self) -> Result<Option<String>> {
        Ok(None)
    }

    /// Who may be writing HEAD now, this process excepted, a description each: who has it open for writing, or the lock
    /// for that. Empty where nobody has, or the backend can't tell.
    async fn writers(&self) -> Result<Vec<String>> {
        Ok(Vec::new())
    }

    /// The size of HEAD now, in bytes.
    async fn size(&self) -> Result<u64>;

    /// All snapshots of the user namespace, by ascending id. A [`SnapshotSupport::HeadOnly`] image lists the one that
    /// was declared last, even if HEAD was changed since; see [`TargetImage::head_differs`].
    async fn snapshots(&self) -> Result<Vec<Snapshot>>;

    /// Creates a snapshot of HEAD. [`ErrorKind::AlreadyExists`] if the name is taken.
    ///
    /// On a target this is the commit: the caller has flushed before. On a [`SnapshotSupport::HeadOnly`] image that is
    /// open as a source nothing is stored; the returned snapshot is a label with id 0.
    async fn create_snapshot(&self, name: &str) -> Result<Snapshot>;

    /// Removes the snapshot if its name *and* id are those of `snapshot`; [`ErrorKind::NotFound`] otherwise.
    async fn remove_snapshot(&self, snapshot: &Snapshot) -> Result<()>;

    /// Opens a point in time. [`ErrorKind::NotFound`] if the snapshot is gone, or its name has another id now; on a
    /// [`SnapshotSupport::HeadOnly`] image also if HEAD was changed since.
    async fn view(&self, point: &Point) -> Result<Arc<dyn View>>;
}

/// An image that is written by poolshift, and carries poolshift's state.
#[async_trait]
pub trait TargetImage: SourceImage {
    /// Takes the lease, or says who has it ([`ErrorKind::Busy`]).
    ///
    /// A holder that is known to be dead (same host, same boot, its process gone) is fenced at once; one that is
    /// merely silent after the backend's own timeout (RBD: about 30 s, in which this call waits).
    async fn acquire_lease(&self, owner: &LeaseOwner) -> Result<()>;

    /// Who holds the lease, this process included; `None` if nobody does.
    async fn lease_owner(&self) -> Result<Option<LeaseOwner>>;

    /// Gives the lease back. Idempotent.
    async fn release_lease(&self) -> Result<()>;

    /// The state that was stored last, as it was given. Opaque to the backend.
    async fn load_state(&self) -> Result<Option<String>>;

    /// Stores the state: durable and atomic, at most 64 KiB.
    async fn store_state(&self, state: &str) -> Result<()>;

    /// Limits of the storage that hold writes to the image back, a sentence each.
    async fn rate_limits(&self) -> Result<Vec<String>> {
        Ok(Vec::new())
    }

    /// Whether the backend keeps notes.
    fn keeps_notes(&self) -> bool {
        false
    }

    /// The note that was left with the image, by whoever; `None` if there is none, or the backend keeps none.
    async fn load_note(&self) -> Result<Option<String>> {
        Ok(None)
    }

    /// Leaves a note of at most 1 KiB with the image, or with `None` takes it away. Durable and atomic, and needs no
    /// lease: it is for those who don't work on the image, to tell something to whoever does.
    /// [`ErrorKind::Unsupported`] where the backend keeps none.
    async fn store_note(&self, note: Option<&str>) -> Result<()> {
        let unsupported = ImageError::new(ErrorKind::Unsupported, self.location(), "leave a note with the image");
        Err(unsupported.detail(format!("{:?} can't be kept there", note.unwrap_or_default())))
    }

    /// Changes the size of HEAD. New bytes read as zeroes. A shrink is allowed.
    async fn resize(&self, size: u64) -> Result<()>;

    /// Writes `data` at `offset`. At most 32 MiB.
    async fn write(&self, offset: u64, data: Bytes) -> Result<()>;

    /// Makes the range read as zeroes, and frees its storage where the backend can.
    async fn write_zeroes(&self, range: ByteRange) -> Result<()>;

    /// Makes every completed write durable.
    async fn flush(&self) -> Result<()>;

    /// Whether HEAD may differ from `snapshot`, in content or size: true when somebody wrote since. Cheap; may say
    /// true wrongly only where the backend's cheap knowledge is flagged invalid and the exact look finds a rewrite
    /// with equal bytes.
    async fn head_differs(&self, snapshot: &Snapshot) -> Result<bool>;

    /// Whether HEAD is known to be all zeroes, without reading data: nothing allocated.
    async fn is_blank(&self) -> Result<bool>;

    /// The parts of `data`, which is to stand at `offset`, in which HEAD holds something else, in multiples of
    /// [`COMPARE_BLOCK`]. `offset` is such a multiple, and so is the length, but at the end of the image.
    async fn differing_blocks(&self, offset: u64, data: &Bytes) -> Result<Vec<ByteRange>>;
}
