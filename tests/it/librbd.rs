//! What the tests on Ceph write and read with: librbd through Python, which shares no code with poolshift; and a disk
//! that remembers every byte that was written to it.

use std::process::Stdio;
use std::sync::Arc;

use poolshift::extent::{Extent, ExtentKind};
use poolshift::image::rbd::{Connector, CreateOptions, RbdImage, RbdOptions, wait_until_closed};
use poolshift::replicate::{self, CycleError, Progress, SyncOptions, SyncReport};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio_util::sync::CancellationToken;

use crate::support::CephEnv;

pub(crate) const KIB: u64 = 1 << 10;
pub(crate) const MIB: u64 = 1 << 20;

/// A process that uses librbd. Images are named `POOL/[NAMESPACE/]IMAGE[@SNAPSHOT]`.
pub(crate) struct Librbd {
    child: Child,
    requests: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Librbd {
    pub(crate) fn start(env: &CephEnv) -> Self {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/librbd.py");
        // Debian's own, for which the package python3-rbd is.
        let mut command = Command::new("/usr/bin/python3");
        command.env_remove("CEPH_ARGS").arg(script).arg(&env.conf).arg(&env.user).kill_on_drop(true);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("python3 starts");
        let requests = child.stdin.take().expect("standard input is piped");
        let answers = BufReader::new(child.stdout.take().expect("standard output is piped"));
        Self { child, requests, answers }
    }

    /// Has `words` done, and gives back the answer or the error.
    pub(crate) async fn try_call(&mut self, words: &str, payload: &[u8]) -> Result<Vec<u8>, String> {
        self.requests.write_all(format!("{words} {}\n", payload.len()).as_bytes()).await.expect("python3 listens");
        self.requests.write_all(payload).await.expect("python3 listens");
        self.requests.flush().await.expect("python3 listens");
        let mut line = String::new();
        self.answers.read_line(&mut line).await.expect("python3 answers");
        let (kind, length) = line.trim().split_once(' ').unwrap_or_else(|| panic!("{words}: python3 has ended"));
        let mut answer = vec![0; length.parse().expect("a length")];
        self.answers.read_exact(&mut answer).await.expect("python3 answers");
        if kind == "ok" { Ok(answer) } else { Err(String::from_utf8_lossy(&answer).into_owned()) }
    }

    #[track_caller]
    pub(crate) fn call(&mut self, words: impl Into<String>) -> impl Future<Output = Vec<u8>> {
        let (words, caller) = (words.into(), std::panic::Location::caller());
        async move { self.try_call(&words, b"").await.unwrap_or_else(|error| panic!("{caller}: {error}")) }
    }

    /// The whole content, read plainly.
    pub(crate) async fn read(&mut self, image: &str) -> Vec<u8> {
        self.call(format!("read {image}")).await
    }

    /// SHA-256 of the whole content.
    pub(crate) async fn digest(&mut self, image: &str) -> String {
        String::from_utf8(self.call(format!("digest {image}")).await).expect("hexadecimal digits")
    }

    pub(crate) async fn snapshots(&mut self, image: &str) -> Vec<String> {
        let names = String::from_utf8(self.call(format!("snapshots {image}")).await).expect("names are text");
        names.lines().map(str::to_owned).collect()
    }

    /// How many writes and discards a hammer has done to an image.
    pub(crate) async fn hammered(&mut self, image: &str) -> u64 {
        let count = self.call(format!("hammered {image}")).await;
        std::str::from_utf8(&count).ok().and_then(|count| count.parse().ok()).expect("a number")
    }

    /// How many snapshots are half removed.
    pub(crate) async fn trashed(&mut self, image: &str) -> usize {
        self.call(format!("trashed {image}")).await.split(|byte| *byte == b'\n').filter(|name| !name.is_empty()).count()
    }

    /// Has librbd write no more than so many bytes a second to an image; 0: all it can. Not while somebody who has it
    /// open is stopped: it would be waited for to hear of it.
    pub(crate) async fn throttle(&mut self, image: &str, bytes_per_second: u64) {
        self.call(format!("throttle {image} {bytes_per_second}")).await;
    }

    pub(crate) async fn create(&mut self, image: &str, options: &CreateOptions) {
        let CreateOptions { size, object_size, stripe_unit, stripe_count, features, .. } = options;
        self.call(format!("create {image} {size} {object_size} {stripe_unit} {stripe_count} {features}")).await;
    }

    /// Removes images with their snapshots, at the same time, once this process has closed them.
    pub(crate) async fn remove(&mut self, images: &[&str]) {
        assert!(wait_until_closed(std::time::Duration::from_secs(60)).await);
        self.call(format!("remove {}", images.join(" "))).await;
    }

    /// Ends it as `kill -9` does.
    pub(crate) async fn kill(mut self) {
        self.child.kill().await.expect("python3 can be killed");
    }
}

/// An image with a writer that keeps it open, and what must be in it.
pub(crate) struct Disk {
    pub(crate) librbd: Librbd,
    /// `POOL/IMAGE`.
    pub(crate) image: String,
    pub(crate) bytes: Vec<u8>,
    pub(crate) random: fastrand::Rng,
}

impl Disk {
    /// A new image of zeroes.
    pub(crate) async fn create(env: &CephEnv, image: &str, seed: u64, options: &CreateOptions) -> Self {
        let mut librbd = Librbd::start(env);
        librbd.create(image, options).await;
        let bytes = vec![0; usize::try_from(options.size).expect("a small image")];
        Self { librbd, image: image.to_owned(), bytes, random: fastrand::Rng::with_seed(seed) }
    }

    pub(crate) fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    pub(crate) fn noise(&mut self, length: u64) -> Vec<u8> {
        let mut data = vec![0; usize::try_from(length).expect("a small piece")];
        self.random.fill(&mut data);
        data
    }

    fn span(&mut self, offset: u64, length: u64) -> &mut [u8] {
        &mut self.bytes[offset as usize..][..length as usize]
    }

    pub(crate) async fn write(&mut self, offset: u64, data: &[u8]) {
        self.span(offset, data.len() as u64).copy_from_slice(data);
        let words = format!("write {} {offset}", self.image);
        self.librbd.try_call(&words, data).await.expect("librbd writes");
    }

    pub(crate) async fn write_noise(&mut self, offset: u64, length: u64) {
        let data = self.noise(length);
        self.write(offset, &data).await;
    }

    /// librbd may leave parts of a discarded range as they were, and never anything else.
    pub(crate) async fn discard(&mut self, offset: u64, length: u64) {
        let image = self.image.clone();
        self.librbd.call(format!("discard {image} {offset} {length}")).await;
        let left = self.librbd.call(format!("peek {image} {offset} {length}")).await;
        let span = self.span(offset, length);
        assert!(span.iter().zip(&left).all(|(old, new)| *new == 0 || new == old), "{image}: a discard left nonsense");
        span.copy_from_slice(&left);
    }

    pub(crate) async fn zero(&mut self, offset: u64, length: u64) {
        self.span(offset, length).fill(0);
        let words = format!("zero {} {offset} {length}", self.image);
        self.librbd.call(words).await;
    }

    pub(crate) async fn resize(&mut self, size: u64) {
        self.bytes.resize(size as usize, 0);
        let words = format!("resize {} {size}", self.image);
        self.librbd.call(words).await;
    }

    pub(crate) async fn snapshot(&mut self, name: &str) {
        let words = format!("snap {} {name}", self.image);
        self.librbd.call(words).await;
    }

    /// Some place in `low .. size`, often at a multiple of 64 KiB, and how much from there.
    fn place(&mut self, low: u64) -> (u64, u64) {
        let size = self.size();
        let mut offset = self.random.u64(low..size);
        if self.random.u32(..3) == 0 {
            offset = (offset / (64 * KIB) * (64 * KIB)).max(low);
        }
        let most = *self.random.choice([&1, &5000, &(200 * KIB), &(3 * MIB)]).expect("there are four");
        (offset, self.random.u64(1..=most).min(size - offset))
    }

    /// One random change at or above `low`: a write, a write of zeroes, a discard.
    pub(crate) async fn change(&mut self, low: u64) {
        let (offset, length) = self.place(low);
        match self.random.u32(..10) {
            0..5 => self.write_noise(offset, length).await,
            5 => self.write(offset, &vec![0; length as usize]).await,
            6..8 => self.discard(offset, length).await,
            _ => self.zero(offset, length).await,
        }
    }
}

/// What is wrong with `extents` as the delta from `old` to `new`: the first byte that differs and is not listed, or
/// that is listed as zero and isn't.
pub(crate) fn find_fault(old: &[u8], new: &[u8], extents: &[Extent]) -> Option<String> {
    const STEP: usize = 4096;
    static ZEROES: [u8; STEP] = [0; STEP];
    let mut at = 0;
    let differs = |from: usize, to: usize| {
        // Byte by byte only where a comparison of blocks finds something: most of an image is the same.
        (from..to).step_by(STEP).find_map(|start| {
            let end = to.min(start + STEP);
            let there = |all: &[u8]| all.get(start..end.min(all.len())).map(<[u8]>::to_vec).unwrap_or_default();
            let mut before = there(old);
            before.resize(end - start, 0);
            let after = &new[start..end];
            (before != after).then(|| start + before.iter().zip(after).position(|(a, b)| a != b).unwrap_or(0))
        })
    };
    for extent in extents {
        let (start, end) = (extent.range.offset() as usize, extent.range.end() as usize);
        if start < at || end > new.len() {
            return Some(format!("extent {} is out of order or beyond the end", extent.range));
        }
        if let Some(missed) = differs(at, start) {
            return Some(format!("byte {missed} changed and is in no extent"));
        }
        let wrong = |piece: &[u8]| piece != &ZEROES[..piece.len()];
        if extent.kind == ExtentKind::Zero && new[start..end].chunks(STEP).any(wrong) {
            return Some(format!("extent {} is said to be zeroes, and is not", extent.range));
        }
        at = end;
    }
    differs(at, new.len()).map(|missed| format!("byte {missed} changed and is in no extent"))
}

pub(crate) async fn connect(env: &CephEnv) -> Connector {
    let options = RbdOptions { conf: Some(env.conf.clone()), user: Some(env.user.clone()), ..RbdOptions::default() };
    Connector::connect(&options).await.expect("the cluster answers")
}

/// `POOL/[NAMESPACE/]IMAGE` in its parts.
fn parts(place: &str) -> (&str, Option<&str>, &str) {
    let words: Vec<&str> = place.split('/').collect();
    match words[..] {
        [pool, image] => (pool, None, image),
        [pool, namespace, image] => (pool, Some(namespace), image),
        _ => panic!("{place} is no image"),
    }
}

pub(crate) async fn open_source(env: &CephEnv, place: &str) -> Arc<RbdImage> {
    let (pool, namespace, image) = parts(place);
    Arc::new(RbdImage::open_source(&connect(env).await, pool, namespace, image).await.expect("the image is there"))
}

/// Opens a target; makes it like `source` if it isn't there.
pub(crate) async fn open_target(env: &CephEnv, source: &RbdImage, place: &str) -> Arc<RbdImage> {
    let (connector, (pool, namespace, image)) = (connect(env).await, parts(place));
    if !RbdImage::exists(&connector, pool, namespace, image).await.expect("the pool is there") {
        let like = source.source_create_options().await.expect("the source is there");
        RbdImage::create(&connector, pool, namespace, image, &like).await.expect("the target is created");
    }
    Arc::new(RbdImage::open_target(&connector, pool, namespace, image).await.expect("the target is there"))
}

/// One cycle within this process.
pub(crate) async fn sync(
    env: &CephEnv,
    (source, target): (&str, &str),
    options: &SyncOptions,
) -> Result<SyncReport, CycleError> {
    let source = open_source(env, source).await;
    let target = open_target(env, &source, target).await;
    replicate::sync(source, target, options, &Progress::default(), &CancellationToken::new()).await
}

/// The name of an image of a test, which no other test has.
pub(crate) fn name(tag: &str) -> String {
    format!("it-{tag}-{}", std::process::id())
}

#[test]
fn the_oracle_finds_what_a_delta_lacks() {
    let extent = |offset, length| Extent::data(poolshift::extent::ByteRange::new(offset, length).unwrap());
    let zero = |offset, length| Extent { kind: ExtentKind::Zero, ..extent(offset, length) };
    let (old, mut new) = (vec![7; 9000], vec![7; 10_000]);
    new[5000] = 8;
    new[9000..].fill(0);
    assert_eq!(find_fault(&old, &new, &[extent(5000, 1)]), None, "what was beyond the end is zero");
    assert!(find_fault(&old, &new, &[]).unwrap().contains("byte 5000 "));
    assert!(find_fault(&old, &new, &[extent(5001, 1)]).unwrap().contains("byte 5000 "));
    assert!(find_fault(&old, &new, &[extent(4000, 1000), zero(9000, 1000)]).unwrap().contains("byte 5000 "));
    assert!(find_fault(&old, &new, &[zero(5000, 1)]).unwrap().contains("said to be zeroes"));
    assert!(find_fault(&old, &new, &[extent(5000, 2), extent(5001, 2)]).unwrap().contains("out of order"));
    assert!(find_fault(&old, &new, &[extent(5000, 5001)]).unwrap().contains("beyond the end"));
    new[9999] = 1;
    assert!(find_fault(&old, &new, &[extent(5000, 1)]).unwrap().contains("byte 9999 "));
}
