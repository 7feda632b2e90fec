//! Cycles to a file, whose one snapshot is HEAD itself: with a crash at every durable step.

use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use async_trait::async_trait;
use bytes::Bytes;

use super::*;
use crate::image::file::FileImage;
use crate::image::{ErrorKind, ImageError, ImageIdentity, LeaseOwner, Snapshot, SnapshotSupport, View};

/// A file whose durable calls stop working at the `dies_at`-th, before or after its effect, as for a killed process.
struct Mortal {
    image: Mutex<Option<Arc<FileImage>>>,
    identity: ImageIdentity,
    location: String,
    steps: AtomicU64,
    dies_at: Option<(u64, bool)>,
}

impl Mortal {
    fn open(path: &Path, dies_at: Option<(u64, bool)>) -> Self {
        let image = if path.exists() { FileImage::open_target(path) } else { FileImage::create_target(path, SIZE) };
        let image = Arc::new(image.unwrap());
        let (identity, location) = (image.identity().clone(), image.location().to_owned());
        Self { image: Mutex::new(Some(image)), identity, location, steps: AtomicU64::new(0), dies_at }
    }

    fn alive(&self) -> crate::image::Result<Arc<FileImage>> {
        let dead = || ImageError::new(ErrorKind::Io, "file", "do anything").detail("the process was killed");
        self.image.lock().unwrap().clone().ok_or_else(dead)
    }

    fn die(&self) {
        self.image.lock().unwrap().take();
    }

    /// Counts a step; gives back the image if the step still happens.
    fn step(&self) -> crate::image::Result<Arc<FileImage>> {
        let step = self.steps.fetch_add(1, Ordering::SeqCst) + 1;
        let image = self.alive()?;
        match self.dies_at {
            Some((at, after)) if at == step => {
                self.die();
                if after { Ok(image) } else { self.alive() }
            }
            _ => Ok(image),
        }
    }
}

#[async_trait]
impl SourceImage for Mortal {
    fn location(&self) -> &str {
        &self.location
    }
    fn identity(&self) -> &ImageIdentity {
        &self.identity
    }
    fn layout(&self) -> Layout {
        Layout::DEFAULT
    }
    fn snapshot_support(&self) -> SnapshotSupport {
        SnapshotSupport::HeadOnly
    }
    async fn size(&self) -> crate::image::Result<u64> {
        self.alive()?.size().await
    }
    async fn snapshots(&self) -> crate::image::Result<Vec<Snapshot>> {
        self.alive()?.snapshots().await
    }
    async fn create_snapshot(&self, name: &str) -> crate::image::Result<Snapshot> {
        self.step()?.create_snapshot(name).await
    }
    async fn remove_snapshot(&self, snapshot: &Snapshot) -> crate::image::Result<()> {
        self.step()?.remove_snapshot(snapshot).await
    }
    async fn view(&self, point: &Point) -> crate::image::Result<Arc<dyn View>> {
        self.alive()?.view(point).await
    }
}

#[async_trait]
impl TargetImage for Mortal {
    async fn acquire_lease(&self, owner: &LeaseOwner) -> crate::image::Result<()> {
        self.alive()?.acquire_lease(owner).await
    }
    async fn lease_owner(&self) -> crate::image::Result<Option<LeaseOwner>> {
        self.alive()?.lease_owner().await
    }
    async fn release_lease(&self) -> crate::image::Result<()> {
        self.alive()?.release_lease().await
    }
    async fn load_state(&self) -> crate::image::Result<Option<String>> {
        self.alive()?.load_state().await
    }
    async fn store_state(&self, state: &str) -> crate::image::Result<()> {
        self.step()?.store_state(state).await
    }
    async fn resize(&self, size: u64) -> crate::image::Result<()> {
        self.step()?.resize(size).await
    }
    async fn write(&self, offset: u64, data: Bytes) -> crate::image::Result<()> {
        self.step()?.write(offset, data).await
    }
    async fn write_zeroes(&self, range: ByteRange) -> crate::image::Result<()> {
        self.step()?.write_zeroes(range).await
    }
    async fn flush(&self) -> crate::image::Result<()> {
        self.step()?.flush().await
    }
    async fn head_differs(&self, snapshot: &Snapshot) -> crate::image::Result<bool> {
        self.alive()?.head_differs(snapshot).await
    }
    async fn is_blank(&self) -> crate::image::Result<bool> {
        self.alive()?.is_blank().await
    }
    async fn differing_blocks(&self, offset: u64, data: &Bytes) -> crate::image::Result<Vec<ByteRange>> {
        self.alive()?.differing_blocks(offset, data).await
    }
}

struct Disk {
    source: MemoryImage,
    folder: tempfile::TempDir,
}

impl Disk {
    async fn new() -> Self {
        let disk = Self { source: MemoryImage::new("source", SIZE, LAYOUT), folder: tempfile::tempdir().unwrap() };
        disk.source.write_as_server(0, &[1; 200 << 10]);
        disk.sync(None, &options()).await.0.unwrap();
        disk.source.write_as_server(10_000, &[2; 50_000]);
        disk.source.discard(ByteRange::new(128 << 10, 16 << 10).unwrap());
        disk.source.resize_as_server(SIZE + 96 * 1024);
        disk.source.write_as_server(SIZE + 1000, &[3; 5000]);
        disk
    }

    async fn sync(&self, dies_at: Option<(u64, bool)>, options: &SyncOptions) -> (Result<SyncReport>, u64) {
        let target = Arc::new(Mortal::open(&self.folder.path().join("disk"), dies_at));
        let source = Arc::new(self.source.reopen());
        let outcome = sync(source, target.clone(), options, &Progress::default(), &CancellationToken::new()).await;
        (outcome, target.steps.load(Ordering::SeqCst))
    }

    async fn assert_at(&self, report: &SyncReport) {
        let path = self.folder.path().join("disk");
        let declared = FileImage::open_target(&path).unwrap().snapshots().await.unwrap();
        assert_eq!(declared.iter().map(|s| &s.name).collect::<Vec<_>>(), [&report.snapshot]);
        if let Some(named) = self.source.snapshots().await.unwrap().into_iter().find(|s| s.name == report.snapshot) {
            let truth = self.source.bytes_at(&Point::Snapshot(named)).unwrap();
            assert!(std::fs::read(path).unwrap() == truth, "the file is not {}", report.snapshot);
        }
    }
}

#[tokio::test]
async fn a_crash_at_every_durable_step_of_a_file_converges() {
    let counting = Disk::new().await;
    let (report, steps) = counting.sync(None, &options()).await;
    counting.assert_at(&report.unwrap()).await;
    assert!(steps >= 10, "{steps} steps are too few to be true");
    for at in 1..=steps {
        for after in [false, true] {
            for then in [Then::Nothing, Then::Writes, Then::SnapshotLost, Then::Full] {
                let disk = Disk::new().await;
                let (outcome, _) = disk.sync(Some((at, after)), &options()).await;
                if let Ok(report) = outcome {
                    disk.assert_at(&report).await;
                }
                if then != Then::Nothing {
                    disk.source.write_as_server(12_000, &[1; 9000]);
                }
                if then == Then::SnapshotLost {
                    for snapshot in disk.source.snapshots().await.unwrap() {
                        disk.source.remove_snapshot(&snapshot).await.unwrap();
                    }
                }
                let again = if then == Then::Full { full() } else { options() };
                let report = match disk.sync(None, &again).await.0 {
                    Ok(report) => report,
                    // All snapshots of the source are gone: that has to be said, unless the file was dirty anyway.
                    Err(error) if then == Then::SnapshotLost => {
                        assert_eq!(kind_of(error).name(), "no-common-snapshot", "{at} {after}");
                        disk.sync(None, &full()).await.0.unwrap()
                    }
                    Err(error) => panic!("{at} {after} {then:?}: {error}"),
                };
                disk.assert_at(&report).await;
                let last = match disk.sync(None, &options()).await.0 {
                    Err(error) if then == Then::SnapshotLost => {
                        assert_eq!(kind_of(error).name(), "no-common-snapshot", "{at} {after}");
                        continue;
                    }
                    last => last.unwrap_or_else(|error| panic!("{at} {after} {then:?}: {error}")),
                };
                disk.assert_at(&last).await;
            }
        }
    }
}

/// A file that its owner appends to as soon as it has been opened to be read.
struct Growing {
    file: FileImage,
    path: std::path::PathBuf,
}

#[async_trait]
impl SourceImage for Growing {
    fn location(&self) -> &str {
        self.file.location()
    }
    fn identity(&self) -> &ImageIdentity {
        self.file.identity()
    }
    fn layout(&self) -> Layout {
        self.file.layout()
    }
    fn snapshot_support(&self) -> SnapshotSupport {
        self.file.snapshot_support()
    }
    async fn change_token(&self) -> crate::image::Result<Option<String>> {
        self.file.change_token().await
    }
    async fn size(&self) -> crate::image::Result<u64> {
        self.file.size().await
    }
    async fn snapshots(&self) -> crate::image::Result<Vec<Snapshot>> {
        self.file.snapshots().await
    }
    async fn create_snapshot(&self, name: &str) -> crate::image::Result<Snapshot> {
        self.file.create_snapshot(name).await
    }
    async fn remove_snapshot(&self, snapshot: &Snapshot) -> crate::image::Result<()> {
        self.file.remove_snapshot(snapshot).await
    }
    async fn view(&self, point: &Point) -> crate::image::Result<Arc<dyn View>> {
        let view = self.file.view(point).await?;
        std::io::Write::write_all(&mut std::fs::File::options().append(true).open(&self.path).unwrap(), &[7; 4096])
            .unwrap();
        Ok(view)
    }
}

#[tokio::test]
async fn a_file_that_grew_while_it_was_read_is_not_one_moment() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("source");
    std::fs::write(&path, vec![1; SIZE as usize]).unwrap();
    let open = || FileImage::open_source(&path).unwrap();
    let sources: [(Arc<dyn SourceImage>, bool); 2] =
        [(Arc::new(open()), true), (Arc::new(Growing { file: open(), path: path.clone() }), false)];
    for (source, unchanged) in sources {
        let target = Arc::new(MemoryImage::new("target", SIZE, LAYOUT));
        let report = sync(source, target, &options(), &Progress::default(), &CancellationToken::new()).await.unwrap();
        assert_eq!(report.unchanged_while_read, Some(unchanged));
    }
}
