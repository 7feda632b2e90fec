//! A source that is read no faster than its throttles allow.

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;

use super::{Bucket, PoolLimiter};
use crate::extent::{ByteRange, Extent};
use crate::image::{
    ChangedObjects, ImageIdentity, Layout, Point, Result, Snapshot, SnapshotSupport, SourceImage, View,
};

/// What a source is held to: the limit of its volume, then that of its pool.
///
/// In this order a volume that has a low limit of its own holds nothing of the pool's while it waits.
#[derive(Clone)]
struct Throttles {
    volume: Option<Arc<Bucket>>,
    pool: Option<Arc<PoolLimiter>>,
}

impl Throttles {
    async fn take(&self, bytes: u64) {
        if let Some(volume) = &self.volume {
            volume.take(bytes).await;
        }
        if let Some(pool) = &self.pool {
            pool.take(bytes).await;
        }
    }

    async fn take_operations(&self, operations: u64) {
        if let Some(volume) = &self.volume {
            volume.take_operations(operations).await;
        }
        if let Some(pool) = &self.pool {
            pool.take_operations(operations).await;
        }
    }
}

/// An image, read through throttles. Everything but reads and looks for changes passes as it is.
///
/// Dropping a read that waits for the pool's turn gives up what it took of its own volume's.
pub struct ThrottledSource {
    image: Arc<dyn SourceImage>,
    throttles: Throttles,
}

impl ThrottledSource {
    /// Puts throttles in front of `image`. Both can be shared, and changed while it is read.
    pub fn new(image: Arc<dyn SourceImage>, volume: Option<Arc<Bucket>>, pool: Option<Arc<PoolLimiter>>) -> Self {
        Self { image, throttles: Throttles { volume, pool } }
    }
}

#[async_trait]
impl SourceImage for ThrottledSource {
    fn location(&self) -> &str {
        self.image.location()
    }

    fn identity(&self) -> &ImageIdentity {
        self.image.identity()
    }

    fn layout(&self) -> Layout {
        self.image.layout()
    }

    fn snapshot_support(&self) -> SnapshotSupport {
        self.image.snapshot_support()
    }

    fn remarks(&self) -> Vec<String> {
        self.image.remarks()
    }

    async fn change_token(&self) -> Result<Option<String>> {
        self.image.change_token().await
    }

    async fn writers(&self) -> Result<Vec<String>> {
        self.image.writers().await
    }

    async fn quiet_token(&self) -> Result<Option<String>> {
        self.image.quiet_token().await
    }

    async fn size(&self) -> Result<u64> {
        self.image.size().await
    }

    async fn snapshots(&self) -> Result<Vec<Snapshot>> {
        self.image.snapshots().await
    }

    async fn create_snapshot(&self, name: &str) -> Result<Snapshot> {
        self.image.create_snapshot(name).await
    }

    async fn remove_snapshot(&self, snapshot: &Snapshot) -> Result<()> {
        self.image.remove_snapshot(snapshot).await
    }

    async fn view(&self, point: &Point) -> Result<Arc<dyn View>> {
        let view = self.image.view(point).await?;
        let object_size = self.image.layout().object_size.max(1);
        Ok(Arc::new(ThrottledView { view, throttles: self.throttles.clone(), object_size }))
    }
}

/// A point in time of a [`ThrottledSource`].
struct ThrottledView {
    view: Arc<dyn View>,
    throttles: Throttles,
    object_size: u64,
}

impl ThrottledView {
    /// How many objects a range lies in. With striping it may be more; as an estimate of the work it will do.
    fn objects(&self, range: ByteRange) -> u64 {
        (range.end() - 1) / self.object_size - range.offset() / self.object_size + 1
    }
}

#[async_trait]
impl View for ThrottledView {
    fn point(&self) -> &Point {
        self.view.point()
    }

    fn size(&self) -> u64 {
        self.view.size()
    }

    async fn read(&self, range: ByteRange) -> Result<Bytes> {
        self.throttles.take(range.length()).await;
        let read = self.view.read(range);
        match &self.throttles.pool {
            Some(pool) => pool.measure(range.length(), read).await,
            None => read.await,
        }
    }

    async fn changed_objects(&self, since: Option<&Snapshot>) -> Result<ChangedObjects> {
        self.throttles.take_operations(1).await;
        self.view.changed_objects(since).await
    }

    async fn diff(&self, since: Option<&Snapshot>, within: ByteRange) -> Result<Vec<Extent>> {
        self.throttles.take_operations(self.objects(within)).await;
        self.view.diff(since, within).await
    }
}
