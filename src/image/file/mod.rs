//! A raw file or a block device as an image.
//!
//! Files keep no snapshots, so this backend makes other promises than RBD's:
//!
//! **As a source** a file is read as it is at that moment. A cycle is one point in time only if nobody writes to the
//! file while it runs; [`SourceImage::change_token`], taken before and after, tells whether somebody did (writes through
//! a shared memory mapping show only once the kernel has written the pages back). [`SourceImage::create_snapshot`]
//! stores nothing: it gives a label (id 0). What changed since the last cycle is found by comparing digests on the
//! target's side, see [`TargetImage::differing_blocks`].
//!
//! **As a target** a file has at most one snapshot: the statement, kept in a *sidecar* beside it (`PATH.poolshift`),
//! that HEAD was that snapshot when it had these times and this size. The engine withdraws it before it writes; should
//! a write come without that, it is marked as not holding any more, durably, before the write. Somebody else's write
//! moves the file's times, and so does a changed owner, mode or name: [`TargetImage::head_differs`] is true then. A
//! block device has no such times: writes of others to it are not noticed (see `remarks`), but another device under
//! the same name is.
//!
//! **One writer**: the lease is an `flock`, see `lock`. Whoever does not hold it can not write ([`ErrorKind::Fenced`]).
//! Giving it back waits for writes whose futures were dropped.
//!
//! All I/O runs on tokio's blocking threads, at most [`REQUESTS_MAX`] requests an image at a time.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::Semaphore;

use super::{
    ErrorKind, ImageIdentity, Layout, LeaseOwner, Point, Result, Snapshot, SnapshotSupport, SourceImage, TargetImage,
    View,
};
use crate::extent::ByteRange;

mod digests;
mod lock;
mod open;
mod ranges;
mod raw;
mod sidecar;
mod state;
#[cfg(test)]
mod tests;
mod token;
mod view;
mod write;

use open::{Kind, Opened, Role};
use sidecar::{STATE_MAX, Sidecar};
use state::Shared;

/// How many requests to one image run at the same time; further ones wait.
pub const REQUESTS_MAX: u32 = 16;

/// The most bytes of one read or write: 32 MiB, as the contracts say.
const REQUEST_BYTES_MAX: u64 = 32 << 20;

/// How a file is opened.
#[derive(Clone, Debug, Default)]
pub struct FileOptions {
    /// Where the side files of a block device are kept; there is no place for them beside `/dev/sdb`. Regular files
    /// have theirs beside them, whatever this says.
    pub state_dir: Option<PathBuf>,
}

/// A raw file or block device, open as a source or as a target. Cheap to clone; all clones are one open file.
#[derive(Clone, Debug)]
pub struct FileImage {
    shared: Arc<Shared>,
    requests: Arc<Semaphore>,
}

impl FileImage {
    /// Opens a file or block device for reading. Follows symbolic links.
    ///
    /// [`ErrorKind::NotFound`], [`ErrorKind::PermissionDenied`]; [`ErrorKind::Unsupported`] if it is a folder, neither
    /// a file nor a block device, or empty.
    pub fn open_source(path: impl AsRef<Path>) -> Result<Self> {
        Self::open_source_with(path, &FileOptions::default())
    }

    /// [`FileImage::open_source`] with options: a state folder lets a block device that was a target show its snapshot.
    pub fn open_source_with(path: impl AsRef<Path>, options: &FileOptions) -> Result<Self> {
        Opened::existing(path.as_ref(), Role::Source, options).map(Self::new)
    }

    /// Opens an existing file or block device for writing. Writes nothing yet. Follows symbolic links.
    ///
    /// The errors of [`FileImage::open_source`] (but it may be empty); [`ErrorKind::ReadOnly`];
    /// [`ErrorKind::Unsupported`] for a block device.
    pub fn open_target(path: impl AsRef<Path>) -> Result<Self> {
        Self::open_target_with(path, &FileOptions::default())
    }

    /// [`FileImage::open_target`] with options; a block device needs a state folder.
    pub fn open_target_with(path: impl AsRef<Path>, options: &FileOptions) -> Result<Self> {
        Opened::existing(path.as_ref(), Role::Target, options).map(Self::new)
    }

    /// Creates a sparse file of `size` bytes, and opens it as a target. Durable. Side files that an earlier image of
    /// that name has left are removed.
    ///
    /// [`ErrorKind::AlreadyExists`]; [`ErrorKind::NotFound`] if its folder is missing; [`ErrorKind::Busy`] if another
    /// process has the lease on that name.
    pub fn create_target(path: impl AsRef<Path>, size: u64) -> Result<Self> {
        Opened::created(path.as_ref(), size).map(Self::new)
    }

    /// Whether both are the same file or device, by whatever names they were opened.
    pub fn same_file(a: &Self, b: &Self) -> bool {
        a.shared.opened.id == b.shared.opened.id
    }

    fn new(opened: Opened) -> Self {
        Self { shared: Arc::new(Shared::new(opened)), requests: Arc::new(Semaphore::new(REQUESTS_MAX as usize)) }
    }

    /// Runs blocking work with one of the image's request slots.
    async fn run<T: Send + 'static>(&self, work: impl FnOnce(&Arc<Shared>) -> Result<T> + Send + 'static) -> Result<T> {
        self.run_with(1, work).await
    }

    /// Runs blocking work while nothing else runs: not even writes whose futures were dropped.
    async fn run_alone<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Arc<Shared>) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        self.run_with(REQUESTS_MAX, work).await
    }

    async fn run_with<T: Send + 'static>(
        &self,
        slots: u32,
        work: impl FnOnce(&Arc<Shared>) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let failed = || self.shared.error(ErrorKind::Io, "run a request");
        let requests = Arc::clone(&self.requests);
        let slots = requests.acquire_many_owned(slots).await.map_err(|error| failed().caused_by(error))?;
        let shared = Arc::clone(&self.shared);
        // The work owns the slots, and goes on to its end if this future is dropped.
        let task = tokio::task::spawn_blocking(move || {
            let result = work(&shared);
            drop(slots);
            result
        });
        task.await.map_err(|error| match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(cancelled) => failed().caused_by(cancelled),
        })?
    }
}

#[async_trait]
impl SourceImage for FileImage {
    fn location(&self) -> &str {
        &self.shared.opened.location
    }

    fn identity(&self) -> &ImageIdentity {
        &self.shared.opened.identity
    }

    fn layout(&self) -> Layout {
        Layout::DEFAULT
    }

    fn snapshot_support(&self) -> SnapshotSupport {
        SnapshotSupport::HeadOnly
    }

    fn remarks(&self) -> Vec<String> {
        self.shared.opened.remarks()
    }

    /// `None` for a block device. Takes up to 60 ms on a file that was written just now.
    async fn change_token(&self) -> Result<Option<String>> {
        self.run(|shared| {
            if shared.opened.kind == Kind::Device {
                return Ok(None);
            }
            let token = token::settled(&shared.opened.file);
            token.map(|token| Some(token.to_string())).map_err(|e| shared.io_error(e, "look at the file's times"))
        })
        .await
    }

    async fn size(&self) -> Result<u64> {
        self.run(|shared| shared.size()).await
    }

    async fn snapshots(&self) -> Result<Vec<Snapshot>> {
        let declared = |sidecar: &Sidecar| sidecar.declared.as_ref().map(|declared| declared.snapshot.clone());
        self.run(move |shared| Ok(shared.with_sidecar(declared)?.into_iter().collect())).await
    }

    async fn create_snapshot(&self, name: &str) -> Result<Snapshot> {
        let name = name.to_owned();
        match self.shared.opened.role {
            Role::Source => self.run(|shared| Ok(Snapshot { id: 0, name, size: shared.size()? })).await,
            Role::Target => self.run_alone(|shared| shared.declare(name)).await,
        }
    }

    /// Also [`ErrorKind::ReadOnly`] for a snapshot that is declared on a file which is open as a source. Removing a
    /// label (id 0) of a source does nothing.
    async fn remove_snapshot(&self, snapshot: &Snapshot) -> Result<()> {
        if self.shared.opened.role == Role::Source && snapshot.id == 0 {
            return Ok(());
        }
        let snapshot = snapshot.clone();
        self.run(move |shared| shared.withdraw(&snapshot)).await
    }

    async fn view(&self, point: &Point) -> Result<Arc<dyn View>> {
        let (image, point) = (self.clone(), point.clone());
        let view = self.run(move |_| view::FileView::open(image, point)).await?;
        Ok(Arc::new(view))
    }
}

#[async_trait]
impl TargetImage for FileImage {
    async fn acquire_lease(&self, owner: &LeaseOwner) -> Result<()> {
        let owner = owner.clone();
        self.run(move |shared| shared.acquire_lease(&owner)).await
    }

    async fn lease_owner(&self) -> Result<Option<LeaseOwner>> {
        self.run(|shared| shared.lease_owner()).await
    }

    async fn release_lease(&self) -> Result<()> {
        self.run_alone(|shared| {
            shared.release_lease();
            Ok(())
        })
        .await
    }

    async fn load_state(&self) -> Result<Option<String>> {
        self.run(|shared| shared.with_sidecar(|sidecar| sidecar.state.clone())).await
    }

    async fn store_state(&self, state: &str) -> Result<()> {
        if state.len() > STATE_MAX {
            let detail = format!("it has {} bytes, the most is {STATE_MAX}", state.len());
            return Err(self.shared.error(ErrorKind::OutOfBounds, "store the state").detail(detail));
        }
        let state = state.to_owned();
        self.run(|shared| shared.change_sidecar("store the state", |sidecar| sidecar.state = Some(state))).await
    }

    async fn resize(&self, size: u64) -> Result<()> {
        self.run(move |shared| shared.resize(size)).await
    }

    async fn write(&self, offset: u64, data: Bytes) -> Result<()> {
        match ByteRange::new(offset, data.len() as u64) {
            Ok(range) => self.run(move |shared| shared.write(range, &data)).await,
            Err(_) if data.is_empty() => Ok(()),
            Err(error) => Err(self.shared.error(ErrorKind::OutOfBounds, "write").caused_by(error)),
        }
    }

    async fn write_zeroes(&self, range: ByteRange) -> Result<()> {
        self.run(move |shared| shared.write_zeroes(range)).await
    }

    async fn flush(&self) -> Result<()> {
        self.run(|shared| shared.flush()).await
    }

    async fn head_differs(&self, snapshot: &Snapshot) -> Result<bool> {
        let snapshot = snapshot.clone();
        self.run(move |shared| shared.head_differs(&snapshot)).await
    }

    async fn is_blank(&self) -> Result<bool> {
        self.run(|shared| {
            raw::is_all_hole(&shared.opened.file).map_err(|e| shared.io_error(e, "look for data in the file"))
        })
        .await
    }

    async fn differing_blocks(&self, offset: u64, data: &Bytes) -> Result<Vec<ByteRange>> {
        let data = data.clone();
        match ByteRange::new(offset, data.len() as u64) {
            Ok(range) => self.run(move |shared| shared.differing_blocks(range, &data)).await,
            Err(_) if data.is_empty() => Ok(Vec::new()),
            Err(error) => Err(self.shared.error(ErrorKind::OutOfBounds, "compare").caused_by(error)),
        }
    }
}
