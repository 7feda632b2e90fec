//! How fast a source can be read: a bounded sample of what is allocated.

use std::sync::Arc;
use std::time::Instant;

use futures::stream::{self, StreamExt as _, TryStreamExt as _};

use crate::cli::{Context, images};
use crate::delta;
use crate::extent::{ByteRange, ExtentKind};
use crate::image::{ImageSpec, Point, View};
use crate::plan::PoolThrottle;

/// How much is read in all, in bytes, however many pools there are.
const SAMPLE: u64 = 64 << 20;
/// How many volumes of a pool are read.
const VOLUMES: usize = 4;
/// How much one request reads, in bytes; so do cycles, object by object.
const REQUEST: u64 = 4 << 20;
/// How many requests are under way at a time.
const REQUESTS: usize = 4;
/// A throttled pool is asked for no more than it may be in so many seconds.
const SECONDS: u64 = 2;
/// Less than this tells nothing of a rate.
const LEAST: u64 = 1 << 20;

/// What a throttle allows outside of all its windows, in bytes a second; requests are counted at their full size.
pub(super) fn allowed(throttle: &PoolThrottle) -> Option<u64> {
    let bytes = throttle.rate.bytes_per_second.map(std::num::NonZeroU64::get);
    let operations = throttle.rate.operations_per_second.map(|operations| operations.get().saturating_mul(REQUEST));
    [bytes, operations].into_iter().flatten().min()
}

/// Reads a sample of a few sources of one pool, the first ones; gives the bytes a second, or `None` where there is too
/// little to read, or reading fails: the verdicts of the volumes say why.
pub(super) async fn sample(
    context: &Context<'_>,
    sources: &[&ImageSpec],
    pools: usize,
    allowed: Option<u64>,
) -> Option<u64> {
    let budget = SAMPLE / (pools.max(1) as u64);
    let budget = allowed.map_or(budget, |allowed| budget.min(allowed.saturating_mul(SECONDS)));
    let sources = &sources[..sources.len().min(VOLUMES)];
    let share = budget / (sources.len().max(1) as u64);
    let mut ranges = Vec::new();
    for source in sources {
        match allocated(context, source, share).await {
            Ok((view, found)) => ranges.extend(found.into_iter().map(|range| (Arc::clone(&view), range))),
            Err(error) => tracing::info!("{source} is not measured: {error:#}"),
        }
    }
    let bytes: u64 = ranges.iter().map(|(_, range)| range.length()).sum();
    if bytes < LEAST {
        return None;
    }
    let begun = Instant::now();
    let reads = ranges.into_iter().map(|(view, range)| async move { view.read(range).await.map(drop) });
    let read: Result<(), _> = stream::iter(reads).buffer_unordered(REQUESTS).try_collect().await;
    if let Err(error) = read {
        tracing::warn!("the sample can't be read: {error}");
        return None;
    }
    let seconds = begun.elapsed().as_secs_f64().max(0.001);
    // Bounded by the sample: 64 MiB in a millisecond.
    Some((bytes as f64 / seconds) as u64)
}

/// HEAD of a source, and some of what is allocated of it: at most `most` bytes, cut into requests.
async fn allocated(
    context: &Context<'_>,
    source: &ImageSpec,
    most: u64,
) -> anyhow::Result<(Arc<dyn View>, Vec<ByteRange>)> {
    let image = images::source(context, source).await?.image();
    let view = image.view(&Point::Head).await?;
    let plan = delta::plan(view.as_ref(), None).await?;
    let mut extents = delta::extents(Arc::clone(&view), &plan, image.layout(), 0);
    let (mut ranges, mut left) = (Vec::new(), most);
    while left > 0
        && let Some(window) = extents.try_next().await?
    {
        let data = window.into_iter().filter(|extent| extent.kind == ExtentKind::Data);
        for piece in data.flat_map(|extent| extent.range.split_at_multiples(REQUEST)) {
            let Some(end) = piece.offset().checked_add(piece.length().min(left)) else { break };
            let Some(range) = ByteRange::between(piece.offset(), end) else { break };
            left -= range.length();
            ranges.push(range);
        }
    }
    Ok((view, ranges))
}
