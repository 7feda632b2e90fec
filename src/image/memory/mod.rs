//! An image in memory, with snapshots, a volatile write cache and faults: for model and crash tests.
//!
//! It is as nasty as a storage may be and no nastier: what was not flushed is lost in a crash, or lands, in any
//! combination; a snapshot holds only what was flushed; a hole that was written and discarded again between two
//! snapshots is not listed in their delta, as in RBD. Durable calls and writes are counted, and a [`Fault`] can kill
//! the image before or after any one of them.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;

use super::{
    COMPARE_BLOCK, ErrorKind, ImageError, ImageIdentity, Layout, LeaseOwner, LockHolder, Point, Result, Snapshot,
    SnapshotSupport, SourceImage, TargetImage, View,
};
use crate::extent::ByteRange;
use crate::image::pools::Limits;

mod content;
mod disk;
mod pools;
mod view;

pub use content::SECTOR;
use content::{Content, Op};
use disk::Server;
pub use pools::MemoryPools;
use view::MemoryView;

/// Where an image dies: at the `at`-th counted step from now on, the first being 1.
#[derive(Clone, Copy, Debug)]
pub struct Fault {
    /// Which step.
    pub at: u64,
    /// Whether the step's effect is there.
    pub after: bool,
    /// Decides which unflushed writes survive.
    pub seed: u64,
}

#[derive(Debug)]
struct Inner {
    layout: Layout,
    head: Content,
    /// What of HEAD has reached the disk, and what has not.
    durable: Content,
    pending: Vec<Op>,
    snapshots: Vec<(Snapshot, Arc<Content>)>,
    next_id: u64,
    state: Option<String>,
    note: Option<String>,
    journal: Option<String>,
    metadata: BTreeMap<String, Bytes>,
    known: Option<String>,
    name: String,
    /// The names that other images have.
    taken: Vec<String>,
    /// The images of the same pools.
    neighbours: Weak<pools::Images>,
    placeholder: bool,
    limits: Limits,
    lease: Option<(u64, LeaseOwner)>,
    servers: Vec<Server>,
    steps: u64,
    fault: Option<Fault>,
    crashed: bool,
    /// How long the journal waits in vain.
    silent: Option<Duration>,
    fast_diff: bool,
    handles: u64,
    bytes_written: u64,
    reads_until_lost: Option<u64>,
    /// How often HEAD or the list of snapshots was changed.
    changes: u64,
}

/// A handle to an image; clones of the image share it, handles are told apart by the lease.
#[derive(Clone, Debug)]
pub struct MemoryImage {
    inner: Arc<Mutex<Inner>>,
    location: String,
    handle: u64,
    identity: ImageIdentity,
}

impl MemoryImage {
    /// A blank image of `size` bytes.
    pub fn new(name: &str, size: u64, layout: Layout) -> Self {
        let identity = ImageIdentity {
            cluster: "memory".into(),
            pool: "memory".into(),
            image: format!("{name}#{:x}", fastrand::u64(..)),
        };
        let inner = Inner {
            layout,
            head: Content::blank(size),
            durable: Content::blank(size),
            pending: Vec::new(),
            snapshots: Vec::new(),
            next_id: 1,
            state: None,
            note: None,
            journal: None,
            metadata: BTreeMap::new(),
            known: None,
            name: name.to_owned(),
            taken: Vec::new(),
            neighbours: Weak::new(),
            placeholder: false,
            limits: pools::no_limits(),
            lease: None,
            servers: Vec::new(),
            steps: 0,
            fault: None,
            crashed: false,
            silent: None,
            fast_diff: true,
            handles: 1,
            bytes_written: 0,
            reads_until_lost: None,
            changes: 0,
        };
        Self { inner: Arc::new(Mutex::new(inner)), location: format!("memory:{name}"), handle: 1, identity }
    }

    /// Another handle to the same image, as another process would have one. Brings a crashed image back up.
    #[must_use]
    pub fn reopen(&self) -> Self {
        let mut inner = self.lock();
        if std::mem::take(&mut inner.crashed) {
            inner.lease = None;
        }
        inner.handles += 1;
        let handle = inner.handles;
        drop(inner);
        Self { handle, ..self.clone() }
    }

    /// Lets the image die later on; `None` takes that back. Starts counting steps anew.
    pub fn set_fault(&self, fault: Option<Fault>) {
        let mut inner = self.lock();
        inner.steps = 0;
        inner.fault = fault;
    }

    /// How many steps there were since the last [`Self::set_fault`].
    pub fn steps(&self) -> u64 {
        self.lock().steps
    }

    /// Whether a fault has struck.
    pub fn has_crashed(&self) -> bool {
        self.lock().crashed
    }

    /// Lets whoever stores a journal wait for so long, and fail then; `None` takes that back.
    pub fn set_silent(&self, silent: Option<Duration>) {
        self.lock().silent = silent;
    }

    /// Switches the object map on or off.
    pub fn set_fast_diff(&self, on: bool) {
        self.lock().fast_diff = on;
    }

    /// Data bytes written so far through [`TargetImage::write`].
    pub fn bytes_written(&self) -> u64 {
        self.lock().bytes_written
    }

    /// Takes the lease by force, as another worker does after this one was silent for too long.
    pub fn break_lease(&self) {
        self.lock().lease = None;
    }

    /// The dense oracle: all bytes of a point in time, without any use of the diff.
    pub fn bytes_at(&self, point: &Point) -> Option<Vec<u8>> {
        let inner = self.lock();
        Some(match point {
            Point::Head => inner.head.bytes().to_vec(),
            Point::Snapshot(s) => inner.snapshots.iter().find(|(have, _)| have.id == s.id)?.1.bytes().to_vec(),
        })
    }

    /// Discards a range as a guest's TRIM does.
    pub fn discard(&self, range: ByteRange) {
        self.lock().apply(Op::Zero(range));
        self.lock().settle();
    }

    /// Writes as the server that owns the image does: past leases, durable at once.
    pub fn write_as_server(&self, offset: u64, data: &[u8]) {
        let mut inner = self.lock();
        inner.apply(Op::Write(offset, Bytes::copy_from_slice(data)));
        inner.settle();
    }

    /// Damages one byte of a snapshot, and of HEAD, behind everybody's back, as a broken disk does.
    pub fn damage(&self, snapshot: &str, offset: u64, byte: u8) {
        let mut inner = self.lock();
        let inner = &mut *inner;
        inner.head.damage(offset, byte);
        inner.durable.damage(offset, byte);
        for (_, content) in inner.snapshots.iter_mut().filter(|(have, _)| have.name == snapshot) {
            Arc::make_mut(content).damage(offset, byte);
        }
    }

    /// Lets somebody remove the snapshot that is being read after so many more reads. As on RBD, its objects then read as
    /// zeroes, and nothing says so.
    pub fn lose_snapshot_after_reads(&self, reads: u64) {
        self.lock().reads_until_lost = Some(reads);
    }

    /// Resizes as the server's owner does.
    pub fn resize_as_server(&self, size: u64) {
        let mut inner = self.lock();
        inner.apply(Op::Resize(size));
        inner.settle();
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn error(&self, kind: ErrorKind, operation: impl Into<String>) -> ImageError {
        ImageError::new(kind, &self.location, operation)
    }

    /// Locks the image for a call that must not happen on a dead one.
    fn alive(&self, operation: &str) -> Result<MutexGuard<'_, Inner>> {
        let inner = self.lock();
        if inner.crashed {
            return Err(self.error(ErrorKind::Io, operation).detail("the image has crashed"));
        }
        Ok(inner)
    }

    /// One counted step: `effect` happens unless the fault says otherwise.
    fn step<T>(&self, operation: &str, effect: impl FnOnce(&mut Inner) -> Result<T>) -> Result<T> {
        let mut inner = self.alive(operation)?;
        inner.steps += 1;
        let fault = inner.fault.filter(|fault| fault.at == inner.steps);
        let crash = |inner: &mut Inner, seed| {
            inner.crash(seed);
            Err(self.error(ErrorKind::Io, operation).detail("the image crashed"))
        };
        match fault {
            Some(Fault { after: false, seed, .. }) => crash(&mut inner, seed),
            Some(Fault { seed, .. }) => {
                effect(&mut inner)?;
                crash(&mut inner, seed)
            }
            None => effect(&mut inner),
        }
    }

    /// A step that only the lease's holder may take.
    fn owned_step<T>(&self, operation: &str, effect: impl FnOnce(&mut Inner) -> Result<T>) -> Result<T> {
        self.step(operation, |inner| match &inner.lease {
            Some((handle, _)) if *handle == self.handle => effect(inner),
            _ => Err(self.error(ErrorKind::Fenced, operation)),
        })
    }

    fn in_bounds(&self, operation: &str, end: u64, size: u64) -> Result<()> {
        if end > size {
            let detail = format!("it ends at {end}, the image at {size}");
            return Err(self.error(ErrorKind::OutOfBounds, operation).detail(detail));
        }
        Ok(())
    }
}

impl Inner {
    fn apply(&mut self, op: Op) {
        self.changes += 1;
        self.head.apply(&op);
        self.pending.push(op);
    }

    fn settle(&mut self) {
        for op in self.pending.drain(..) {
            self.durable.apply(&op);
        }
    }

    /// Loses some of what was not flushed, in no particular order.
    fn crash(&mut self, seed: u64) {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut pending = std::mem::take(&mut self.pending);
        random.shuffle(&mut pending);
        for op in pending {
            if random.bool() {
                self.durable.apply(&op);
            }
        }
        self.head = self.durable.clone();
        self.crashed = true;
        self.fault = None;
    }
}

#[async_trait]
impl SourceImage for MemoryImage {
    fn location(&self) -> &str {
        &self.location
    }

    fn identity(&self) -> &ImageIdentity {
        &self.identity
    }

    fn layout(&self) -> Layout {
        self.lock().layout
    }

    fn snapshot_support(&self) -> SnapshotSupport {
        SnapshotSupport::Kept
    }

    async fn quiet_token(&self) -> Result<Option<String>> {
        let inner = self.alive("look for changes")?;
        let newest = inner.snapshots.last().map(|(_, content)| content.bytes());
        Ok((newest == Some(inner.head.bytes())).then(|| inner.changes.to_string()))
    }

    async fn size(&self) -> Result<u64> {
        Ok(self.alive("read its size")?.head.size())
    }

    async fn snapshots(&self) -> Result<Vec<Snapshot>> {
        Ok(self.alive("list snapshots")?.snapshots.iter().map(|(snapshot, _)| snapshot.clone()).collect())
    }

    async fn create_snapshot(&self, name: &str) -> Result<Snapshot> {
        let operation = format!("create snapshot {name}");
        self.step(&operation, |inner| {
            if inner.snapshots.iter().any(|(have, _)| have.name == name) {
                return Err(self.error(ErrorKind::AlreadyExists, &operation));
            }
            let content = Arc::new(inner.durable.clone());
            let snapshot = Snapshot { id: inner.next_id, name: name.to_owned(), size: content.size() };
            inner.next_id += 1;
            inner.changes += 1;
            inner.snapshots.push((snapshot.clone(), content));
            inner.head.next_epoch();
            inner.durable.next_epoch();
            Ok(snapshot)
        })
    }

    async fn remove_snapshot(&self, snapshot: &Snapshot) -> Result<()> {
        let operation = format!("remove snapshot {snapshot}");
        self.step(&operation, |inner| {
            let found =
                inner.snapshots.iter().position(|(have, _)| have.id == snapshot.id && have.name == snapshot.name);
            inner.snapshots.remove(found.ok_or_else(|| self.error(ErrorKind::NotFound, &operation))?);
            inner.changes += 1;
            Ok(())
        })
    }

    async fn view(&self, point: &Point) -> Result<Arc<dyn View>> {
        let inner = self.alive("open a view")?;
        let frozen = match point {
            Point::Head => None,
            Point::Snapshot(snapshot) => Some(
                inner
                    .snapshots
                    .iter()
                    .find(|(have, _)| have.id == snapshot.id && have.name == snapshot.name)
                    .map(|(_, content)| content.clone())
                    .ok_or_else(|| self.error(ErrorKind::NotFound, format!("open snapshot {snapshot}")))?,
            ),
        };
        let size = frozen.as_ref().map_or(inner.head.size(), |content| content.size());
        Ok(Arc::new(MemoryView { image: self.clone(), point: point.clone(), frozen, size }))
    }
}

#[async_trait]
impl TargetImage for MemoryImage {
    async fn acquire_lease(&self, owner: &LeaseOwner) -> Result<()> {
        self.take_lock(owner, LockHolder::Refuse, "take the lease")
    }

    async fn lease_owner(&self) -> Result<Option<LeaseOwner>> {
        Ok(self.alive("read the lease")?.lease.as_ref().map(|(_, owner)| owner.clone()))
    }

    async fn release_lease(&self) -> Result<()> {
        let mut inner = self.alive("release the lease")?;
        if inner.lease.as_ref().is_some_and(|(handle, _)| *handle == self.handle) {
            inner.lease = None;
        }
        Ok(())
    }

    async fn load_state(&self) -> Result<Option<String>> {
        Ok(self.alive("load the state")?.state.clone())
    }

    async fn store_state(&self, state: &str) -> Result<()> {
        self.owned_step("store the state", |inner| {
            inner.state = Some(state.to_owned());
            Ok(())
        })
    }

    fn keeps_notes(&self) -> bool {
        true
    }

    async fn load_note(&self) -> Result<Option<String>> {
        Ok(self.lock().note.clone())
    }

    async fn store_note(&self, note: Option<&str>) -> Result<()> {
        self.lock().note = note.map(str::to_owned);
        Ok(())
    }

    async fn resize(&self, size: u64) -> Result<()> {
        self.owned_step(&format!("resize to {size}"), |inner| {
            inner.settle();
            inner.apply(Op::Resize(size));
            inner.settle();
            Ok(())
        })
    }

    async fn write(&self, offset: u64, data: Bytes) -> Result<()> {
        let operation = format!("write {} bytes at {offset}", data.len());
        self.owned_step(&operation, |inner| {
            self.in_bounds(&operation, offset + data.len() as u64, inner.head.size())?;
            inner.bytes_written += data.len() as u64;
            inner.apply(Op::Write(offset, data));
            Ok(())
        })
    }

    async fn write_zeroes(&self, range: ByteRange) -> Result<()> {
        let operation = format!("zero {range}");
        self.owned_step(&operation, |inner| {
            self.in_bounds(&operation, range.end(), inner.head.size())?;
            inner.apply(Op::Zero(range));
            Ok(())
        })
    }

    async fn flush(&self) -> Result<()> {
        self.owned_step("flush", |inner| {
            inner.settle();
            Ok(())
        })
    }

    async fn head_differs(&self, snapshot: &Snapshot) -> Result<bool> {
        let view = self.view(&Point::Head).await?;
        let Some(whole) = ByteRange::between(0, view.size()) else { return Ok(snapshot.size != 0) };
        Ok(view.size() != snapshot.size || !view.diff(Some(snapshot), whole).await?.is_empty())
    }

    async fn is_blank(&self) -> Result<bool> {
        Ok(self.alive("look for data")?.head.is_blank())
    }

    async fn differing_blocks(&self, offset: u64, data: &Bytes) -> Result<Vec<ByteRange>> {
        let inner = self.alive("compare")?;
        let range = ByteRange::between(offset, offset + data.len() as u64);
        let head = inner.head.bytes();
        Ok(range
            .into_iter()
            .flat_map(|range| range.split_at_multiples(COMPARE_BLOCK))
            .filter(|block| {
                let ours = &data[(block.offset() - offset) as usize..(block.end() - offset) as usize];
                head.get(block.offset() as usize..block.end() as usize) != Some(ours)
            })
            .collect())
    }
}
