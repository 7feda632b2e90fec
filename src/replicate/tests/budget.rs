//! Many cycles within one budget of memory.

use std::sync::atomic::{AtomicU64, Ordering};

use async_trait::async_trait;
use bytes::Bytes;
use tokio::task::JoinSet;

use super::*;
use crate::extent::Extent;
use crate::image::{self, ChangedObjects, ImageIdentity, Snapshot, SnapshotSupport, View};
use crate::pipeline::Budget;

const IMAGES: usize = 16;
const IMAGE_SIZE: u64 = 6 << 20;
const SHARED: u64 = 8 << 20;

/// What all images together have in memory: what was begun to be read, less what was written.
#[derive(Default)]
struct InMemory {
    begun: AtomicU64,
    runs: Vec<Arc<Progress>>,
    most: AtomicU64,
}

impl InMemory {
    fn begin(&self, bytes: u64) {
        let begun = self.begun.fetch_add(bytes, Ordering::SeqCst) + bytes;
        // Read afterwards: what was written in between makes this too little, never too much.
        let written: u64 = self.runs.iter().map(|run| run.counters.read().bytes_written).sum();
        self.most.fetch_max(begun.saturating_sub(written), Ordering::SeqCst);
    }
}

/// A source that tells of every read, and takes its time.
struct Observed(MemoryImage, Arc<InMemory>);

struct ObservedView(Arc<dyn View>, Arc<InMemory>);

#[async_trait]
impl SourceImage for Observed {
    fn location(&self) -> &str {
        self.0.location()
    }
    fn identity(&self) -> &ImageIdentity {
        self.0.identity()
    }
    fn layout(&self) -> Layout {
        self.0.layout()
    }
    fn snapshot_support(&self) -> SnapshotSupport {
        self.0.snapshot_support()
    }
    async fn size(&self) -> image::Result<u64> {
        self.0.size().await
    }
    async fn snapshots(&self) -> image::Result<Vec<Snapshot>> {
        self.0.snapshots().await
    }
    async fn create_snapshot(&self, name: &str) -> image::Result<Snapshot> {
        self.0.create_snapshot(name).await
    }
    async fn remove_snapshot(&self, snapshot: &Snapshot) -> image::Result<()> {
        self.0.remove_snapshot(snapshot).await
    }
    async fn view(&self, point: &Point) -> image::Result<Arc<dyn View>> {
        Ok(Arc::new(ObservedView(self.0.view(point).await?, self.1.clone())))
    }
}

#[async_trait]
impl View for ObservedView {
    fn point(&self) -> &Point {
        self.0.point()
    }
    fn size(&self) -> u64 {
        self.0.size()
    }
    async fn read(&self, range: ByteRange) -> image::Result<Bytes> {
        self.1.begin(range.length());
        for _ in 0..fastrand::u32(0..20) {
            tokio::task::yield_now().await;
        }
        self.0.read(range).await
    }
    async fn changed_objects(&self, since: Option<&Snapshot>) -> image::Result<ChangedObjects> {
        self.0.changed_objects(since).await
    }
    async fn diff(&self, since: Option<&Snapshot>, within: ByteRange) -> image::Result<Vec<Extent>> {
        self.0.diff(since, within).await
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sixteen_cycles_at_a_time_stay_within_one_budget_and_all_come_to_an_end() {
    let runs: Vec<Arc<Progress>> = (0..IMAGES).map(|_| Arc::default()).collect();
    let memory = Arc::new(InMemory { runs: runs.clone(), ..InMemory::default() });
    let shared = Budget::new(SHARED);
    let mut tasks = JoinSet::new();
    for (index, progress) in runs.into_iter().enumerate() {
        // An own budget that is smaller than the shared one, as large, and larger.
        let bytes = [4 << 20, SHARED, 64 << 20][index % 3];
        let limits = Limits { bytes, shared: Some(shared.clone()), ..Limits::default() };
        let compression = [crate::batch::Compression::None, crate::batch::Compression::Zstd(1)][index % 2];
        let options = SyncOptions { limits, compression, ..SyncOptions::default() };
        let layout = Layout { object_size: 1 << 20, stripe_unit: 1 << 20, stripe_count: 1 };
        let source = MemoryImage::new(&format!("source-{index}"), IMAGE_SIZE, layout);
        // No block is all zeroes, so that what is read is written. The last image has many small extents.
        let (step, gap) = if index == IMAGES - 1 { (72 * 4096, 4096) } else { (IMAGE_SIZE as usize, 0) };
        let content: Vec<u8> = (1..=64).collect::<Vec<u8>>().repeat(IMAGE_SIZE as usize / 64);
        for (part, data) in content.chunks(step).enumerate() {
            source.write_as_server((part * step) as u64, &data[..data.len() - gap]);
        }
        let observed = Observed(source.clone(), memory.clone());
        tasks.spawn(async move {
            let target = MemoryImage::new("target", 0, layout);
            let sides: (Arc<dyn SourceImage>, Arc<dyn TargetImage>) = (Arc::new(observed), Arc::new(target.clone()));
            sync(sides.0, sides.1, &options, &progress, &CancellationToken::new()).await.unwrap();
            assert!(target.bytes_at(&Point::Head) == source.bytes_at(&Point::Head));
        });
    }
    tasks.join_all().await;
    let most = memory.most.load(Ordering::SeqCst);
    assert!(most <= SHARED, "{most} bytes were in memory");
    assert!(most > SHARED / 2, "only {most} bytes were in memory");
    assert_eq!(shared.used(), 0);
}
