//! The reading half: extents become batches.

use std::sync::Arc;

use futures::future::try_join_all;
use futures::stream::{self, BoxStream, StreamExt, TryStreamExt};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use super::units::{Unit, pack};
use super::{Budgets, Counters, Limits, Loaded, Permit, Result};
use crate::batch::{self, Batch, Chunk, Content};
use crate::extent::{ByteRange, Extent, ExtentKind};
use crate::image::{ImageError, TargetImage, View};

/// How [`read`] reads.
#[derive(Clone)]
pub struct ReadOptions {
    /// What may be in flight.
    pub limits: Limits,
    /// Zeroes are left out: the target is known to be blank where they would go.
    pub drop_zeroes: bool,
    /// Blocks that this image holds already are left out. Extents must then be block-aligned, as
    /// [`crate::delta::extents_of_both`] makes them.
    pub compare_with: Option<Arc<dyn TargetImage>>,
}

struct Reader {
    view: Arc<dyn View>,
    options: ReadOptions,
    requests: Semaphore,
    counters: Arc<Counters>,
}

/// Reads `extents` from `view` and makes batches of them, in order, many units at a time.
///
/// Stops taking new extents when `cancel` is triggered; what is under way is still delivered.
pub fn read(
    view: Arc<dyn View>,
    extents: BoxStream<'static, Result<Vec<Extent>, ImageError>>,
    options: ReadOptions,
    counters: Arc<Counters>,
    cancel: CancellationToken,
) -> BoxStream<'static, Result<Loaded>> {
    let depth = options.limits.requests.max(1);
    // Never less than one unit takes, or that unit would wait for ever.
    let budgets = Budgets::new(&options.limits, batch::CHUNK_MAX);
    let reader = Arc::new(Reader { view, options, requests: Semaphore::new(depth), counters });
    let counting = reader.clone();
    extents
        .map_ok(move |window| {
            Counters::add(&counting.counters.extents, window.len() as u64);
            stream::iter(pack(window).into_iter().map(Ok::<Unit, ImageError>))
        })
        .try_flatten()
        .take_until(cancel.cancelled_owned())
        // Permits are taken here, in order: a later unit that took the budget before an earlier one would wait for it
        // in the ordered queue below, and it for the later one's permits.
        .and_then(move |unit: Unit| {
            let budgets = budgets.clone();
            async move {
                let permit = budgets.take(unit.bytes).await;
                Ok((unit, permit))
            }
        })
        .enumerate()
        .map(move |(sequence, next)| {
            let reader = reader.clone();
            async move {
                let (unit, permit) = next?;
                tokio::spawn(async move { reader.load(sequence as u64, unit, permit).await }).await?
            }
        })
        .buffered(depth)
        .boxed()
}

impl Reader {
    /// Reads one unit and makes a batch of it.
    async fn load(&self, sequence: u64, unit: Unit, permit: Permit) -> Result<Loaded> {
        let progress_to = unit.end();
        let pieces = try_join_all(unit.pieces.into_iter().map(|piece| self.load_piece(piece))).await?;
        let (mut zero_bytes, mut data_bytes) = (0, 0);
        let mut chunks: Vec<Chunk> = pieces.into_iter().flatten().collect();
        chunks.retain(|chunk| match chunk.content {
            Content::Zero => {
                zero_bytes += chunk.range.length();
                !self.options.drop_zeroes
            }
            Content::Data { .. } => {
                data_bytes += chunk.range.length();
                true
            }
        });
        Counters::add(&self.counters.zero_bytes, zero_bytes);
        Counters::add(&self.counters.data_bytes, data_bytes);
        Ok(Loaded { batch: Batch { sequence, progress_to, chunks }, permit })
    }

    /// Reads one piece; gives back what of it has to go on. Cuts it as soon as it is read, while it is in the
    /// processor's cache, and not on the rayon pool: scanning and CRC-32 take less time than the read's own copies.
    async fn load_piece(&self, piece: Extent) -> Result<Vec<Chunk>> {
        if piece.kind == ExtentKind::Zero {
            return Ok(vec![Chunk { range: piece.range, content: Content::Zero }]);
        }
        let bytes = {
            let _slot = self.requests.acquire().await;
            self.view.read(piece.range).await?
        };
        Counters::add(&self.counters.bytes_read, bytes.len() as u64);
        let Some(target) = &self.options.compare_with else {
            return Ok(batch::cut(piece.range.offset(), bytes));
        };
        let start = piece.range.offset();
        let different = crate::extent::normalize(target.differing_blocks(start, &bytes).await?);
        let kept = crate::extent::total_length(&different);
        Counters::add(&self.counters.bytes_equal, piece.range.length().saturating_sub(kept));
        let slice = |range: ByteRange| bytes.slice((range.offset() - start) as usize..(range.end() - start) as usize);
        Ok(different.into_iter().flat_map(|range| batch::cut(range.offset(), slice(range))).collect())
    }
}
