//! What `scripts/bench-ceph` needs inside a process: scattered writes, and the delta stage against librbd's own.
//!
//! ```text
//! cargo bench --bench ceph -- scatter rbd:POOL/IMAGE STRIDE LENGTH       one write at each multiple of STRIDE
//! cargo bench --bench ceph -- random rbd:POOL/IMAGE COUNT LENGTH SEED    COUNT writes anywhere
//! cargo bench --bench ceph -- delta rbd:POOL/IMAGE FROM TO RUNS          two-level against exact, as JSON
//! ```
//!
//! The cluster is that of `CEPH_CONF`, the user that of `POOLSHIFT_CEPH_USER`. Without arguments, as in a plain
//! `cargo bench`, nothing is measured, and it says so.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use futures::StreamExt;
use poolshift::extent::{ByteRange, Extent, normalize, subtract, total_length};
use poolshift::image::rbd::{Connector, RbdImage, RbdOptions, wait_until_closed};
use poolshift::image::{ImageSpec, LeaseOwner, Point, Snapshot, SourceImage, TargetImage, View};

/// Writes in flight while an image is prepared.
const WRITES: usize = 64;

/// How long the end waits for librbd to close its images.
const CLOSE_PATIENCE: Duration = Duration::from_secs(30);

#[tokio::main]
async fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| arg != "--bench").collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let outcome = match words[..] {
        ["scatter", image, stride, length] => scatter(image, stride.parse()?, length.parse()?).await,
        ["random", image, count, length, seed] => random(image, count.parse()?, length.parse()?, seed.parse()?).await,
        ["delta", image, from, to, runs] => delta(image, from, to, runs.parse()?).await,
        _ => {
            println!("nothing was measured: scripts/bench-ceph runs this with a Ceph");
            Ok(())
        }
    };
    // librbd's threads must not outlive `main`.
    wait_until_closed(CLOSE_PATIENCE).await;
    outcome
}

async fn open(image: &str) -> Result<RbdImage> {
    let ImageSpec::Rbd { pool, namespace, image, .. } = image.parse()? else { bail!("{image} is not on RBD") };
    let user = std::env::var("POOLSHIFT_CEPH_USER").ok();
    let connector = Connector::connect(&RbdOptions { user, ..RbdOptions::default() }).await?;
    Ok(RbdImage::open_target(&connector, &pool, namespace.as_deref(), &image).await?)
}

async fn write_all(image: &str, writes: impl Iterator<Item = (u64, Bytes)>) -> Result<()> {
    let image = Arc::new(open(image).await?);
    image.acquire_lease(&LeaseOwner::current()?).await?;
    let mut done = futures::stream::iter(writes)
        .map(|(offset, data)| {
            let image = image.clone();
            async move { image.write(offset, data).await }
        })
        .buffer_unordered(WRITES);
    while let Some(outcome) = done.next().await {
        outcome?;
    }
    image.flush().await?;
    Ok(image.release_lease().await?)
}

async fn scatter(image: &str, stride: u64, length: usize) -> Result<()> {
    let size = open(image).await?.size().await?;
    let data = Bytes::from(vec![0xa5; length]);
    write_all(image, (0..size / stride).map(|index| (index * stride, data.clone()))).await
}

async fn random(image: &str, count: u64, length: u64, seed: u64) -> Result<()> {
    let size = open(image).await?.size().await?;
    let mut random = fastrand::Rng::with_seed(seed);
    let mut writes = Vec::new();
    for _ in 0..count {
        // Aligned to its length, so that no two of them overlap by a part and none crosses an object's end.
        let offset = random.u64(0..size / length) * length;
        let data: Bytes = std::iter::repeat_with(|| random.u8(1..)).take(usize::try_from(length)?).collect();
        writes.push((offset, data));
    }
    writes.sort_by_key(|(offset, _)| *offset);
    writes.dedup_by_key(|(offset, _)| *offset);
    write_all(image, writes.into_iter()).await
}

/// Times the delta stage both ways, in turn, and checks that both cover the same bytes.
async fn delta(image: &str, from: &str, to: &str, runs: usize) -> Result<()> {
    let image = open(image).await?;
    let find = async |name: &str| -> Result<Snapshot> {
        let found = image.snapshots().await?.into_iter().find(|snapshot| snapshot.name == name);
        found.with_context(|| format!("no snapshot {name}"))
    };
    let (since, to) = (find(from).await?, find(to).await?);
    let view = image.view(&Point::Snapshot(to)).await?;
    let whole = ByteRange::between(0, view.size()).context("the image is empty")?;
    let (mut two_level, mut exact) = (Vec::new(), Vec::new());
    for _ in 0..runs {
        let begun = Instant::now();
        let ours = poolshift_delta(&view, &since, &image).await?;
        two_level.push(begun.elapsed().as_secs_f64());
        let begun = Instant::now();
        let theirs = view.diff(Some(&since), whole).await?;
        exact.push(begun.elapsed().as_secs_f64());
        let covered = |extents: &[Extent]| normalize(extents.iter().map(|extent| extent.range).collect());
        let (ours, theirs) = (covered(&ours), covered(&theirs));
        if !subtract(&ours, &theirs).is_empty() || !subtract(&theirs, &ours).is_empty() {
            bail!("the two deltas differ: {} against {} bytes", total_length(&ours), total_length(&theirs));
        }
    }
    println!("{}", serde_json::json!({ "two_level_seconds": two_level, "exact_seconds": exact }));
    Ok(())
}

async fn poolshift_delta(view: &Arc<dyn View>, since: &Snapshot, image: &RbdImage) -> Result<Vec<Extent>> {
    let plan = poolshift::delta::plan(view.as_ref(), Some(since)).await?;
    let extents = poolshift::delta::extents(view.clone(), &plan, image.layout(), 0);
    Ok(poolshift::delta::collect(extents).await?)
}
