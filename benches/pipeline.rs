//! What the pipeline costs: chunks, checksums and zero detection over a plain copy, and the codec by itself.
//!
//! `cargo bench --bench pipeline` takes about a minute and ends with lines such as
//!
//! ```text
//! overhead in memory: +x.y % (…)
//! ```
//!
//! Both sides of an overhead make the same requests to the same images, as many at a time, on the same runtime; the
//! plain one neither cuts nor checks anything and hands nothing to another thread. The two take turns in one process,
//! and what is printed is the median of the pairs' ratios: on a machine that does other things as well, both halves of
//! a pair are slowed down alike. The CPU time, which is printed as well, hardly sees the others at all.
//!
//! - *in memory*: memory is copied, in requests that complete later, as those of every storage do.
//! - *in memory, at once*: a request completes as it is made, so that the plain copy writes from the CPU's cache what
//!   it has just read. No storage is like that; it is the hardest case.
//! - *on files*: file images on both sides, with their lease and their digests.
//! - *on files, over system calls*: against pread and pwrite; lease, digests and all else is the overhead.
//!
//! Where the overhead comes from, measured on 2 shared cores of an Emerald Rapids by leaving parts out: with both
//! passes of CRC-32 (the reader's and the one before the write) left out, the rest is within −4 to +3 % in memory and
//! on files. A pass costs about 10 % on files and 20 % in memory: with 64 MiB in flight each reads its bytes from
//! memory and not from a cache. Smaller pieces hardly matter. Where a request completes at once, 40 % are left without
//! the CRC: the plain copy alone has its bytes in the cache. Taking the second pass right before the write's own copy,
//! on the same thread, and the first right after the read: measured on 2 shared cores of an EPYC, CPU time went
//! from +32 and +53 % to +26 and +41 % in memory, and from +26 and +20 % to +21 and +18 % on files. A library that has
//! CRC-32 with AVX-512 (`crc-fast` 1.9) is no faster: a chunk of 4 MiB is cut at 27 GiB/s with either.
//!
//! `POOLSHIFT_BENCH_STRICT=1` makes an overhead above 15 % a failure, `POOLSHIFT_BENCH_MIB` changes the image's size
//! (256), `POOLSHIFT_BENCH_DIR` the folder of the files (`/dev/shm` where there is one: the CPU is what is measured,
//! not the disk).

use std::hint::black_box;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use criterion::{Criterion, Throughput};
use futures::stream::{self, StreamExt, TryStreamExt};
use poolshift::batch::{self, Batch, CHUNK_MAX, Compression};
use poolshift::extent::{ByteRange, Extent};
use poolshift::image::file::FileImage;
use poolshift::image::{
    ChangedObjects, ErrorKind, ImageError, ImageIdentity, Layout, LeaseOwner, Point, Result, Snapshot, SnapshotSupport,
    SourceImage, TargetImage, View,
};
use poolshift::pipeline::{self, Applied, ApplyOptions, Checkpoint, Counters, Limits, ReadOptions};
use poolshift::transport;
use tokio::runtime::Runtime;
use tokio_util::sync::CancellationToken;

/// The most that the pipeline may take on top of a plain copy, in percent.
const BAR_PERCENT: f64 = 15.0;

/// How many pairs an overhead is the median of, at most.
const PAIRS: usize = 21;

/// How many it is at least, on a machine so busy that more would take longer than [`PAIRS_TIME`].
const PAIRS_LEAST: usize = 7;

/// After this no further pair is begun.
const PAIRS_TIME: Duration = Duration::from_secs(10);

static RUNTIME: LazyLock<Runtime> =
    LazyLock::new(|| tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime"));

/// An image in memory whose reads and writes are one copy each: objects of 4 MiB, each with its own lock, so that
/// requests run side by side. (The library's own memory image is a model with one lock and a log of its writes.)
#[derive(Clone)]
struct Disk {
    /// Whether a request completes as it is made. Otherwise others get their turn before that, so that as many are in
    /// flight as are asked for.
    at_once: bool,
    objects: Arc<[Mutex<Vec<u8>>]>,
    size: u64,
    point: Point,
    identity: ImageIdentity,
}

impl Disk {
    fn new(content: &[u8]) -> Self {
        let identity = ImageIdentity { cluster: "bench".into(), pool: "memory".into(), image: "disk".into() };
        let objects = content.chunks(CHUNK_MAX as usize).map(|object| Mutex::new(object.to_vec())).collect();
        Self { at_once: false, objects, size: content.len() as u64, point: Point::Head, identity }
    }

    async fn complete(&self) {
        if !self.at_once {
            tokio::task::yield_now().await;
        }
    }

    fn at<T>(&self, range: ByteRange, work: impl FnOnce(&mut [u8]) -> T) -> Result<T> {
        let start = (range.offset() % CHUNK_MAX) as usize;
        let object = self.objects.get((range.offset() / CHUNK_MAX) as usize);
        let mut object = object.ok_or_else(unsupported)?.lock().unwrap_or_else(PoisonError::into_inner);
        object.get_mut(start..start + range.length() as usize).map(work).ok_or_else(unsupported)
    }
}

fn unsupported() -> ImageError {
    ImageError::new(ErrorKind::Unsupported, "memory:bench", "do what the pipeline does not do")
}

#[async_trait]
impl View for Disk {
    fn point(&self) -> &Point {
        &self.point
    }

    fn size(&self) -> u64 {
        self.size
    }

    async fn read(&self, range: ByteRange) -> Result<Bytes> {
        let bytes = self.at(range, |bytes| Bytes::copy_from_slice(bytes));
        self.complete().await;
        bytes
    }

    async fn changed_objects(&self, _since: Option<&Snapshot>) -> Result<ChangedObjects> {
        Err(unsupported())
    }

    async fn diff(&self, _since: Option<&Snapshot>, _within: ByteRange) -> Result<Vec<Extent>> {
        Err(unsupported())
    }
}

#[async_trait]
impl SourceImage for Disk {
    fn location(&self) -> &str {
        "memory:bench"
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

    async fn size(&self) -> Result<u64> {
        Ok(self.size)
    }

    async fn snapshots(&self) -> Result<Vec<Snapshot>> {
        Ok(Vec::new())
    }

    async fn create_snapshot(&self, _name: &str) -> Result<Snapshot> {
        Err(unsupported())
    }

    async fn remove_snapshot(&self, _snapshot: &Snapshot) -> Result<()> {
        Err(unsupported())
    }

    async fn view(&self, _point: &Point) -> Result<Arc<dyn View>> {
        Ok(Arc::new(self.clone()))
    }
}

#[async_trait]
impl TargetImage for Disk {
    async fn acquire_lease(&self, _owner: &LeaseOwner) -> Result<()> {
        Ok(())
    }

    async fn lease_owner(&self) -> Result<Option<LeaseOwner>> {
        Ok(None)
    }

    async fn release_lease(&self) -> Result<()> {
        Ok(())
    }

    async fn load_state(&self) -> Result<Option<String>> {
        Ok(None)
    }

    async fn store_state(&self, _state: &str) -> Result<()> {
        Err(unsupported())
    }

    async fn resize(&self, _size: u64) -> Result<()> {
        Err(unsupported())
    }

    async fn write(&self, offset: u64, data: Bytes) -> Result<()> {
        let range = ByteRange::new(offset, data.len() as u64).map_err(|_| unsupported())?;
        let written = self.at(range, |bytes| bytes.copy_from_slice(&data));
        self.complete().await;
        written
    }

    async fn write_zeroes(&self, range: ByteRange) -> Result<()> {
        range.split_at_multiples(CHUNK_MAX).try_for_each(|piece| self.at(piece, |bytes| bytes.fill(0)))
    }

    async fn flush(&self) -> Result<()> {
        Ok(())
    }

    async fn head_differs(&self, _snapshot: &Snapshot) -> Result<bool> {
        Err(unsupported())
    }

    async fn is_blank(&self) -> Result<bool> {
        Ok(false)
    }

    async fn differing_blocks(&self, _offset: u64, _data: &Bytes) -> Result<Vec<ByteRange>> {
        Err(unsupported())
    }
}

struct NoCheckpoint;

#[async_trait]
impl Checkpoint for NoCheckpoint {
    async fn save(&mut self, _progress_to: u64) -> Result<()> {
        Ok(())
    }
}

/// From where to where.
#[derive(Clone)]
struct Job {
    view: Arc<dyn View>,
    target: Arc<dyn TargetImage>,
}

impl Job {
    fn whole(&self) -> ByteRange {
        ByteRange::between(0, self.view.size()).expect("an image that is not empty")
    }

    /// What a program without any care does: as many pieces at a time as the pipeline has in flight.
    fn plain(&self) {
        let in_flight = (Limits::default().bytes / CHUNK_MAX) as usize;
        let pieces = stream::iter(self.whole().split_at_multiples(CHUNK_MAX).collect::<Vec<_>>());
        let copies = pieces.map(|range| {
            let Self { view, target } = self.clone();
            tokio::spawn(async move { target.write(range.offset(), view.read(range).await?).await })
        });
        RUNTIME.block_on(async {
            let mut copies = copies.buffer_unordered(in_flight);
            while let Some(copied) = copies.next().await {
                copied.expect("no panic").expect("a piece copied");
            }
            self.target.flush().await.expect("a flush");
        });
    }

    /// The pipeline, as a cycle runs it.
    fn poolshift(&self, compression: Compression) {
        let Self { view, target } = self.clone();
        let (counters, cancel) = (Arc::new(Counters::default()), CancellationToken::new());
        let extents = stream::iter([Ok(vec![Extent::data(self.whole())])]).boxed();
        let options = ReadOptions { limits: Limits::default(), drop_zeroes: false, compare_with: None };
        let applied = RUNTIME.block_on(async {
            let batches = pipeline::read(view, extents, options, counters.clone(), cancel.clone());
            let batches = transport::in_process(batches, compression);
            pipeline::apply(batches, target, ApplyOptions::default(), &mut NoCheckpoint, counters, &cancel).await
        });
        assert_eq!(applied.expect("the pipeline runs"), Applied::Whole);
    }

    /// Makes sure that both really copy.
    fn check(&self) {
        let all = |image: Arc<dyn View>| {
            let pieces = self.whole().split_at_multiples(CHUNK_MAX).collect::<Vec<_>>();
            let reads = stream::iter(pieces).then(move |range| {
                let image = image.clone();
                async move { image.read(range).await }
            });
            RUNTIME.block_on(reads.try_collect::<Vec<Bytes>>()).expect("all can be read")
        };
        for copy in [Self::plain as fn(&Self), |job: &Self| job.poolshift(Compression::None)] {
            RUNTIME.block_on(self.target.write_zeroes(self.whole())).expect("a blank target");
            copy(self);
            let head = RUNTIME.block_on(self.target.view(&Point::Head)).expect("a view of the target");
            assert!(all(self.view.clone()) == all(head), "the copy differs");
        }
    }
}

/// Bytes that no compression makes smaller.
fn noise(size: usize) -> Vec<u8> {
    let mut bytes = vec![0; size];
    fastrand::Rng::with_seed(1).fill(&mut bytes);
    bytes
}

/// Bytes of which zstd leaves about half, as of many disks.
fn half_noise(size: usize) -> Vec<u8> {
    let mut bytes = noise(size);
    for (index, line) in bytes.chunks_mut(64).enumerate() {
        let text = format!("{:016x} a line that looks like the last", index / 8);
        line[..text.len()].copy_from_slice(text.as_bytes());
    }
    bytes
}

/// The source and the target as files; removed when this is dropped.
struct Files {
    folder: tempfile::TempDir,
    source: FileImage,
    target: FileImage,
}

impl Files {
    fn new(content: &[u8]) -> Self {
        let shm = Path::new("/dev/shm");
        let given = std::env::var_os("POOLSHIFT_BENCH_DIR").map(PathBuf::from);
        let parent = given.unwrap_or_else(|| if shm.is_dir() { shm.to_owned() } else { std::env::temp_dir() });
        let folder = tempfile::tempdir_in(parent).expect("a folder for the files");
        std::fs::write(folder.path().join("source"), content).expect("the source file");
        let source = FileImage::open_source(folder.path().join("source")).expect("the source");
        let target = FileImage::create_target(folder.path().join("target"), content.len() as u64).expect("the target");
        let owner = LeaseOwner::current().expect("this process");
        RUNTIME.block_on(target.acquire_lease(&owner)).expect("the lease");
        Self { folder, source, target }
    }

    fn copy(&self) -> Job {
        let view = RUNTIME.block_on(self.source.view(&Point::Head)).expect("a view of the source");
        Job { view, target: Arc::new(self.target.clone()) }
    }

    /// The same with the system's calls alone: no image, no lease, no digests beside the target.
    fn with_system_calls(&self) {
        let open = |name| {
            let path = self.folder.path().join(name);
            Arc::new(std::fs::File::options().read(true).write(name == "raw").create(name == "raw").open(path).unwrap())
        };
        let (source, target) = (open("source"), open("raw"));
        let size = source.metadata().expect("its size").len();
        let whole = ByteRange::between(0, size).expect("not empty");
        let pieces = stream::iter(whole.split_at_multiples(CHUNK_MAX).collect::<Vec<_>>());
        let copies = pieces.map(|range| {
            let (source, target) = (source.clone(), target.clone());
            tokio::task::spawn_blocking(move || {
                let mut bytes = vec![0; range.length() as usize];
                source.read_exact_at(&mut bytes, range.offset())?;
                target.write_all_at(&bytes, range.offset())
            })
        });
        let in_flight = (Limits::default().bytes / CHUNK_MAX) as usize;
        RUNTIME.block_on(copies.buffer_unordered(in_flight).for_each(async |copied| copied.unwrap().unwrap()));
    }
}

/// What one run took, in seconds.
#[derive(Clone, Copy)]
struct Cost {
    elapsed: f64,
    /// Of all threads of this process together: what other processes do hardly shows in it.
    cpu: f64,
}

impl Cost {
    fn of(work: &dyn Fn()) -> Self {
        let cpu = || {
            let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
            time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
        };
        let (start, start_cpu) = (Instant::now(), cpu());
        work();
        Self { elapsed: start.elapsed().as_secs_f64(), cpu: cpu() - start_cpu }
    }
}

/// Quartiles.
fn quartiles(values: impl Iterator<Item = f64>) -> [f64; 3] {
    let mut values: Vec<f64> = values.collect();
    values.sort_unstable_by(f64::total_cmp);
    [1, 2, 3].map(|quarter| values[values.len() * quarter / 4])
}

/// How much longer `ours` takes than `plain`, in percent; printed, with the speeds and the CPU time.
fn overhead(name: &str, bytes: u64, plain: impl Fn(), ours: impl Fn()) -> f64 {
    plain();
    ours();
    let pair = |turn| {
        if turn % 2 == 0 {
            let plain = Cost::of(&plain);
            (plain, Cost::of(&ours))
        } else {
            let ours = Cost::of(&ours);
            (Cost::of(&plain), ours)
        }
    };
    let begun = Instant::now();
    let in_time = |turn: &usize| *turn < PAIRS_LEAST || begun.elapsed() < PAIRS_TIME;
    let pairs: Vec<(Cost, Cost)> = (0..PAIRS).take_while(in_time).map(pair).collect();
    let percent =
        |of: fn(&Cost) -> f64| quartiles(pairs.iter().map(|(plain, ours)| (of(ours) / of(plain) - 1.0) * 100.0));
    let (elapsed, cpu) = (percent(|cost| cost.elapsed), percent(|cost| cost.cpu));
    let speed =
        |of: fn(&(Cost, Cost)) -> Cost| bytes as f64 / quartiles(pairs.iter().map(|pair| of(pair).elapsed))[1] / 1e9;
    let [low, middle, high] = elapsed;
    let (ours, plain) = (speed(|pair| pair.1), speed(|pair| pair.0));
    println!(
        "overhead {name}: {middle:+.1} % (half of {} pairs within {low:+.1} to {high:+.1} %; \
         {ours:.2} against {plain:.2} GB/s; CPU time {:+.1} %)",
        pairs.len(),
        cpu[1]
    );
    middle
}

fn bench_codec(criterion: &mut Criterion) {
    let piece = CHUNK_MAX as usize;
    let batch = |content: &[u8]| Batch {
        sequence: 0,
        progress_to: CHUNK_MAX,
        chunks: batch::cut(0, Bytes::copy_from_slice(content)),
    };
    let (noise, half) = (Bytes::from(noise(piece)), half_noise(piece));
    let mut group = criterion.benchmark_group("codec, one 4 MiB chunk");
    group.throughput(Throughput::Bytes(CHUNK_MAX));
    group.bench_function("zero detection of zeroes", |b| {
        let zeroes = vec![0; piece];
        b.iter(|| batch::is_zero(black_box(&zeroes)));
    });
    group.bench_function("cut, with CRC-32", |b| b.iter(|| batch::cut(0, black_box(noise.clone()))));
    let whole = batch(&noise);
    group.bench_function("verify", |b| b.iter(|| black_box(&whole).verify()));
    for (name, content) in [("noise", &noise[..]), ("half noise", &half)] {
        let batch = batch(content);
        let zstd = Compression::Zstd(batch::LEVEL_DEFAULT);
        group.bench_function(format!("encode and decode {name}, {zstd}"), |b| {
            b.iter(|| batch::decode(batch::encode(batch.clone(), zstd)));
        });
    }
    group.finish();
}

fn bench_copies(criterion: &mut Criterion, place: &str, copy: &Job, compressible: Option<&Job>) {
    let mut group = criterion.benchmark_group(place);
    group.throughput(Throughput::Bytes(copy.view.size()));
    group.bench_function("plain copy", |b| b.iter(|| copy.plain()));
    group.bench_function("poolshift", |b| b.iter(|| copy.poolshift(Compression::None)));
    if let Some(copy) = compressible {
        let zstd = Compression::Zstd(batch::LEVEL_DEFAULT);
        group.bench_function(format!("poolshift, {zstd}, half noise"), |b| b.iter(|| copy.poolshift(zstd)));
    }
    group.finish();
}

fn main() -> ExitCode {
    let mib: usize = std::env::var("POOLSHIFT_BENCH_MIB").ok().and_then(|mib| mib.parse().ok()).unwrap_or(256);
    let content = noise(mib.max(4) << 20);
    let size = content.len() as u64;
    let (source, target) = (Disk::new(&content), Disk::new(&vec![1; content.len()]));
    let at_once = |disk: &Disk| Arc::new(Disk { at_once: true, ..disk.clone() });
    let memory_at_once = Job { view: at_once(&source), target: at_once(&target) };
    let memory = Job { view: Arc::new(source), target: Arc::new(target) };
    let files = Files::new(&content);
    let on_files = files.copy();
    drop(content);
    memory.check();
    on_files.check();

    let times = Criterion::default().sample_size(10).warm_up_time(Duration::from_millis(300));
    let mut criterion = times.measurement_time(Duration::from_secs(1)).configure_from_args();
    bench_codec(&mut criterion);
    let half = Arc::new(Disk::new(&half_noise(mib.max(4) << 20)));
    let half = Job { view: half, target: memory.target.clone() };
    bench_copies(&mut criterion, "memory to memory", &memory, Some(&half));
    bench_copies(&mut criterion, "file to file", &on_files, None);
    criterion.final_summary();
    if std::env::args().any(|argument| argument == "--test" || argument == "--list") {
        return ExitCode::SUCCESS;
    }

    let ours = |job: &Job| job.poolshift(Compression::None);
    let in_memory = overhead("in memory", size, || memory.plain(), || ours(&memory));
    overhead("in memory, at once", size, || memory_at_once.plain(), || ours(&memory_at_once));
    let in_files = overhead("on files", size, || on_files.plain(), || ours(&on_files));
    overhead("on files, over system calls", size, || files.with_system_calls(), || ours(&on_files));
    let strict = std::env::var_os("POOLSHIFT_BENCH_STRICT").is_some_and(|strict| strict == "1");
    if strict && in_memory.max(in_files) > BAR_PERCENT {
        eprintln!("the overhead is above {BAR_PERCENT} %");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}
