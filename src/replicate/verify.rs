//! Verification: both sides are read whole and compared by strong digests.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use futures::stream::{self, BoxStream, StreamExt as _, TryStreamExt};
use serde::Serialize;
use tokio_util::sync::CancellationToken;

use crate::batch::{CHUNK_MAX, ZERO_BLOCK};
use crate::delta::{self, Plan};
use crate::extent::{ByteRange, normalize, total_length};
use crate::image::{Layout, Point, Snapshot, SnapshotSupport, SourceImage, TargetImage, View};
use crate::pipeline::{Budget, Limits, on_cpu};

use super::cycle::{Progress, SyncOptions, conflict, gather, sync_in_flight};
use super::error::{ConflictKind, CycleError, Result};
use super::lineage::{self, Facts};
use super::report::SyncReport;
use super::side::{store, with_lease};
use super::state::{InFlight, Origin, TargetState};

/// How many differing ranges a report names.
const RANGES_NAMED: usize = 16;

/// What [`verify`] found.
#[derive(Clone, Debug, Serialize)]
pub struct VerifyReport {
    /// Whether both sides are the same, in size and in every byte.
    pub equal: bool,
    /// The size of either side, in bytes.
    pub source_size: u64,
    /// The size of either side, in bytes.
    pub target_size: u64,
    /// Bytes that were read on each side. What is a hole on both is not read.
    pub bytes_compared: u64,
    /// Bytes that differ, in blocks of 4 KiB; a difference in size counts as well.
    pub bytes_differing: u64,
    /// The first differing ranges, in ascending order.
    pub ranges: Vec<ByteRange>,
    /// BLAKE3 over the offsets and BLAKE3 digests of the source's data, piece by piece, and its size: equal for two
    /// runs that found the same content laid out the same way.
    pub digest: String,
}

/// Compares two points in time, byte for byte. Reads both at the same time, `limits.bytes` in flight in all.
pub async fn verify(
    (source, source_layout): (Arc<dyn View>, Layout),
    target: Arc<dyn View>,
    limits: Limits,
    progress: &Progress,
) -> Result<VerifyReport> {
    let common = source.size().min(target.size());
    // Not from the object maps: an object that is missing in one was missed by the delta, and must be found here.
    let plan = Plan::exact(None, common, "a verification takes nothing on trust", None);
    progress.set_plan(&plan);
    let windows = delta::allocated_in_either(source.clone(), target.clone(), &plan, source_layout);
    let mut whole = blake3::Hasher::new();
    let mut bytes_compared = 0;
    let mut differing = Vec::new();
    let mut bytes_differing = 0;
    let mut pieces = compare_pieces(source.clone(), target.clone(), windows, &limits);
    while let Some((piece, digest, ranges)) = pieces.try_next().await? {
        bytes_compared += piece.length();
        progress.counters.position.store(piece.end(), Ordering::Relaxed);
        progress.counters.bytes_read.fetch_add(2 * piece.length(), Ordering::Relaxed);
        whole.update(&piece.offset().to_le_bytes()).update(digest.as_bytes());
        bytes_differing += total_length(&ranges);
        if differing.len() <= RANGES_NAMED {
            differing.extend(ranges);
            differing = normalize(differing);
        }
    }
    let beyond = ByteRange::between(common, source.size().max(target.size()));
    bytes_differing += beyond.map_or(0, ByteRange::length);
    differing.extend(beyond);
    differing = normalize(differing);
    differing.truncate(RANGES_NAMED);
    whole.update(&source.size().to_le_bytes());
    Ok(VerifyReport {
        equal: bytes_differing == 0,
        source_size: source.size(),
        target_size: target.size(),
        bytes_compared,
        bytes_differing,
        ranges: differing,
        digest: whole.finalize().to_hex().to_string(),
    })
}

/// The BLAKE3 digest of all that a point holds, with its size. What is zero counts as what was never written: a copy has
/// the same digest, whatever its objects.
pub async fn digest(view: Arc<dyn View>, layout: Layout, limits: &Limits, progress: &Progress) -> Result<String> {
    let plan = Plan::exact(None, view.size(), "a digest takes nothing on trust", None);
    progress.set_plan(&plan);
    let depth = usize::try_from(limits.bytes / CHUNK_MAX).unwrap_or(1).clamp(1, limits.requests.max(1));
    let windows = delta::allocated_in_either(view.clone(), view.clone(), &plan, layout);
    let source = view.clone();
    let mut pieces = windows
        .map_err(CycleError::from)
        .map_ok(|window| stream::iter(window.into_iter().flat_map(|range| range.split_at_multiples(CHUNK_MAX)).map(Ok)))
        .try_flatten()
        .map_ok(move |piece| blocks(source.clone(), piece))
        .try_buffered(depth)
        .boxed();
    let mut whole = blake3::Hasher::new();
    while let Some((piece, blocks)) = pieces.try_next().await? {
        progress.counters.position.store(piece.end(), Ordering::Relaxed);
        progress.counters.bytes_read.fetch_add(piece.length(), Ordering::Relaxed);
        for (offset, block) in blocks {
            whole.update(&offset.to_le_bytes()).update(block.as_bytes());
        }
    }
    whole.update(&view.size().to_le_bytes());
    Ok(whole.finalize().to_hex().to_string())
}

/// The digests of the blocks of a piece that are not zero.
async fn blocks(view: Arc<dyn View>, piece: ByteRange) -> Result<(ByteRange, Vec<(u64, blake3::Hash)>)> {
    const BLOCK: usize = ZERO_BLOCK as usize;
    let data = view.read(piece).await?;
    let digests = on_cpu(move || {
        let blocks = (piece.offset()..).step_by(BLOCK).zip(data.chunks(BLOCK));
        let filled = blocks.filter(|(_, block)| block.iter().any(|byte| *byte != 0));
        filled.map(|(offset, block)| (offset, blake3::hash(block))).collect()
    });
    Ok((piece, digests.await))
}

/// A piece that was read on both sides: where it is, the digest of the first, and where they differ.
type Piece = (ByteRange, blake3::Hash, Vec<ByteRange>);

/// Reads ranges, which come in ascending order, on both sides at the same time.
fn compare_pieces(
    source: Arc<dyn View>,
    target: Arc<dyn View>,
    windows: BoxStream<'static, crate::image::Result<Vec<ByteRange>>>,
    limits: &Limits,
) -> BoxStream<'static, Result<Piece>> {
    // A piece is in memory twice, once from each side.
    let depth = usize::try_from(limits.bytes / (2 * CHUNK_MAX)).unwrap_or(1).clamp(1, limits.requests.max(1));
    let shared = limits.shared.clone();
    let pieces = windows
        .map_err(CycleError::from)
        .map_ok(|window| stream::iter(window.into_iter().flat_map(|range| range.split_at_multiples(CHUNK_MAX)).map(Ok)))
        .try_flatten()
        .map_ok(move |piece| compare(source.clone(), target.clone(), piece, shared.clone()))
        .try_buffered(depth);
    pieces.boxed()
}

/// What a comparison of some ranges found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Compared {
    /// Bytes that were read on each side.
    pub bytes: u64,
    /// The first range that differs, after which nothing was looked at.
    pub first_difference: Option<ByteRange>,
}

impl Compared {
    /// Both comparisons.
    pub fn add(&mut self, other: Self) {
        self.bytes += other.bytes;
        self.first_difference = self.first_difference.or(other.first_difference);
    }
}

/// Compares ranges of two points by BLAKE3 digests, up to the first difference. Different sizes are one.
pub async fn compare_windows(
    source: Arc<dyn View>,
    target: Arc<dyn View>,
    windows: BoxStream<'static, crate::image::Result<Vec<ByteRange>>>,
    limits: &Limits,
) -> Result<Compared> {
    let (ours, theirs) = (source.size(), target.size());
    if ours != theirs {
        let first_difference = ByteRange::between(ours.min(theirs), ours.max(theirs));
        return Ok(Compared { bytes: 0, first_difference });
    }
    let mut found = Compared::default();
    let mut pieces = compare_pieces(source, target, windows, limits);
    while let Some((piece, _, ranges)) = pieces.try_next().await? {
        found.bytes += piece.length();
        found.first_difference = ranges.first().copied();
        if found.first_difference.is_some() {
            break;
        }
    }
    Ok(found)
}

/// Reads one piece from both sides; gives back the source's digest and where they differ.
async fn compare(
    source: Arc<dyn View>,
    target: Arc<dyn View>,
    piece: ByteRange,
    shared: Option<Budget>,
) -> Result<(ByteRange, blake3::Hash, Vec<ByteRange>)> {
    // Held no longer than the bytes are, whether or not the pieces before this one are done: nobody waits for that.
    let _permit = match &shared {
        Some(shared) => shared.take(2 * piece.length()).await,
        None => None,
    };
    let (ours, theirs) = futures::try_join!(source.read(piece), target.read(piece))?;
    Ok(on_cpu(move || {
        let (ours_digest, theirs_digest) = rayon::join(|| blake3::hash(&ours), || blake3::hash(&theirs));
        let ranges = if ours_digest == theirs_digest { Vec::new() } else { differences(piece, &ours, &theirs) };
        (piece, ours_digest, ranges)
    })
    .await)
}

/// The blocks of 4 KiB in which two equally long pieces differ.
fn differences(piece: ByteRange, ours: &Bytes, theirs: &Bytes) -> Vec<ByteRange> {
    let block = |range: &ByteRange| {
        let start = (range.offset() - piece.offset()) as usize;
        start..start + range.length() as usize
    };
    normalize(piece.split_at_multiples(ZERO_BLOCK).filter(|r| ours[block(r)] != theirs[block(r)]).collect())
}

/// Makes the target's newest snapshot right again: it is withdrawn, both sides are compared, what differs is written,
/// and the snapshot is made anew. A crash in between leaves no snapshot of that name, and the next `sync` goes on.
///
/// Refuses a target that poolshift does not own, a snapshot that is not its newest (older ones can't be rewritten), one
/// that the source no longer has, and a HEAD that somebody wrote. Removes no other snapshots.
pub async fn repair(
    source: Arc<dyn SourceImage>,
    target: Arc<dyn TargetImage>,
    snapshot: &str,
    options: &SyncOptions,
    progress: &Progress,
    cancel: &CancellationToken,
) -> Result<SyncReport> {
    with_lease(&target, || async {
        let facts = gather(source.as_ref(), target.as_ref()).await?;
        let mut state = match repairable(&facts, snapshot) {
            Ok(state) => state,
            Err(kind) => return Err(conflict(kind, source.as_ref(), target.as_ref(), facts)),
        };
        if let Some(wrong) = state.commits.pop() {
            let point = Some(wrong.on_source()).filter(|_| facts.source_support == SnapshotSupport::Kept);
            state.in_flight = Some(InFlight {
                at: wrong.at.clone(),
                withdraw: Some(wrong.target_id),
                ..InFlight::new(wrong.name, point, wrong.automatic, Origin::Compare, true)
            });
        }
        store(target.as_ref(), &state).await?;
        let options = SyncOptions { keep: usize::MAX, ..options.clone() };
        sync_in_flight(&source, &target, &options, progress, cancel).await
    })
    .await
}

/// The target's state, if its newest snapshot is the one to be repaired and can be.
fn repairable(facts: &Facts, snapshot: &str) -> Result<TargetState, ConflictKind> {
    let state = facts.state.as_ref().filter(|state| state.source == facts.source).ok_or(ConflictKind::NotOurs)?;
    let not_newest = || ConflictKind::NotNewest { name: snapshot.to_owned() };
    let newest = state.newest().filter(|newest| newest.name == snapshot && state.in_flight.is_none());
    let newest = newest.ok_or_else(not_newest)?;
    let kept = |support| support == SnapshotSupport::Kept;
    if kept(facts.source_support) && !lineage::holds(&facts.source_snapshots, newest.source_id, &newest.name) {
        return Err(ConflictKind::NoCommonSnapshot);
    }
    // A file is its own snapshot: there it is the written HEAD itself that is to be repaired.
    if kept(facts.target_support) && facts.head_differs {
        return Err(ConflictKind::Diverged { since: newest.name.clone() });
    }
    Ok(state.clone())
}

/// Opens the point that a name stands for: a snapshot, or HEAD of an image without snapshots.
pub async fn open_point<I: SourceImage + ?Sized>(image: &I, snapshot: Option<&str>) -> Result<(Arc<dyn View>, Point)> {
    let point = match snapshot {
        None => Point::Head,
        Some(name) => Point::Snapshot(find(image, name).await?),
    };
    Ok((image.view(&point).await?, point))
}

/// The snapshot of that name.
pub async fn find<I: SourceImage + ?Sized>(image: &I, name: &str) -> Result<Snapshot> {
    let snapshots = image.snapshots().await?;
    let names: Vec<&str> = snapshots.iter().map(|have| have.name.as_str()).collect();
    let has = if names.is_empty() { "it has none".to_owned() } else { format!("it has {}", names.join(", ")) };
    snapshots.iter().find(|have| have.name == name).cloned().ok_or_else(|| {
        CycleError::Image(
            crate::image::ImageError::new(
                crate::image::ErrorKind::NotFound,
                image.location(),
                format!("open snapshot {name}"),
            )
            .detail(format!("there is no such snapshot; {has}")),
        )
    })
}
