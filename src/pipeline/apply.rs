//! The writing half: batches are verified and written, and checkpoints taken.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use async_trait::async_trait;
use futures::future::join_all;
use futures::stream::{BoxStream, StreamExt};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{Counters, Loaded, PipelineError, Result};
use crate::batch::{Chunk, Content};
use crate::failpoint::failpoint;
use crate::image::{ImageError, TargetImage};

/// How long a target may take to flush after its source has failed.
const FLUSH_MAX: Duration = Duration::from_secs(5);

/// How [`apply`] writes.
#[derive(Clone, Copy, Debug)]
pub struct ApplyOptions {
    /// Requests to the target in flight.
    pub requests: usize,
    /// How long work may stay without a checkpoint.
    pub checkpoint_every: Duration,
}

impl Default for ApplyOptions {
    fn default() -> Self {
        Self { requests: 64, checkpoint_every: Duration::from_secs(5) }
    }
}

/// Keeps a checkpoint, durably.
#[async_trait]
pub trait Checkpoint: Send {
    /// Everything of the delta below `progress_to` is on the target and flushed.
    async fn save(&mut self, progress_to: u64) -> Result<(), ImageError>;
}

/// How [`apply`] ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Applied {
    /// All batches are on the target and flushed.
    Whole,
    /// Cancelled; what was under way is on the target, flushed, and in the checkpoint.
    Part,
}

/// The batches that are done, and up to where all are.
#[derive(Debug, Default)]
struct LowWater {
    next: u64,
    done: BTreeMap<u64, u64>,
    progress_to: u64,
    /// What the last checkpoint says.
    saved: u64,
}

impl LowWater {
    fn finish(&mut self, sequence: u64, progress_to: u64) {
        self.done.insert(sequence, progress_to);
        while let Some(progress_to) = self.done.remove(&self.next) {
            self.next += 1;
            self.progress_to = progress_to;
        }
    }
}

struct Applier {
    target: Arc<dyn TargetImage>,
    requests: Semaphore,
    counters: Arc<Counters>,
}

/// Verifies and writes `batches` in any order, with a checkpoint from time to time, and flushes at the end.
///
/// On an error nothing of it is in flight any more when this returns, and the last checkpoint holds. Where the source
/// failed with an error that may pass, what is on the target gets a checkpoint, so that every run makes progress.
pub async fn apply(
    mut batches: BoxStream<'static, Result<Loaded>>,
    target: Arc<dyn TargetImage>,
    options: ApplyOptions,
    checkpoint: &mut dyn Checkpoint,
    counters: Arc<Counters>,
    cancel: &CancellationToken,
) -> Result<Applied> {
    let applier = Arc::new(Applier { target, requests: Semaphore::new(options.requests.max(1)), counters });
    let mut writing: JoinSet<Result<(u64, u64)>> = JoinSet::new();
    let mut low_water = LowWater::default();
    let outcome = run(&applier, &mut batches, &mut writing, &mut low_water, options, checkpoint).await;
    // Nothing may land after this returns: wait for what is under way, whatever became of it.
    let mut all_written = true;
    while let Some(done) = writing.join_next().await {
        match done {
            Ok(Ok((sequence, progress_to))) => low_water.finish(sequence, progress_to),
            _ => all_written = false,
        }
    }
    if let Err(Stop::Batches(PipelineError::Image(error))) = &outcome
        && error.is_retryable()
        && all_written
        && low_water.progress_to > low_water.saved
    {
        save_the_rest(&applier, low_water.progress_to, checkpoint).await;
    }
    outcome.map_err(Stop::into_inner)?;
    let progress_to = low_water.progress_to;
    applier.target.flush().await?;
    failpoint!("apply.flushed");
    if cancel.is_cancelled() {
        checkpoint.save(progress_to).await?;
        return Ok(Applied::Part);
    }
    Ok(Applied::Whole)
}

/// What ended [`run`] early.
enum Stop {
    /// What the batches come from.
    Batches(PipelineError),
    /// The target, a batch at fault, or a task.
    Other(PipelineError),
}

impl Stop {
    fn into_inner(self) -> PipelineError {
        match self {
            Self::Batches(error) | Self::Other(error) => error,
        }
    }
}

impl<E: Into<PipelineError>> From<E> for Stop {
    fn from(error: E) -> Self {
        Self::Other(error.into())
    }
}

/// A checkpoint after the source has failed. The source's error is what counts: where the target doesn't answer soon
/// either, the last checkpoint holds.
async fn save_the_rest(applier: &Applier, progress_to: u64, checkpoint: &mut dyn Checkpoint) {
    if let Ok(Ok(())) = tokio::time::timeout(FLUSH_MAX, applier.target.flush()).await
        && let Err(error) = checkpoint.save(progress_to).await
    {
        tracing::warn!(%error, "what was written last has no checkpoint");
    }
}

async fn run(
    applier: &Arc<Applier>,
    batches: &mut BoxStream<'static, Result<Loaded>>,
    writing: &mut JoinSet<Result<(u64, u64)>>,
    low_water: &mut LowWater,
    options: ApplyOptions,
    checkpoint: &mut dyn Checkpoint,
) -> Result<(), Stop> {
    let mut saved_at = Instant::now();
    let mut more = true;
    while more || !writing.is_empty() {
        let room = writing.len() < options.requests;
        tokio::select! {
            batch = batches.next(), if more && room => match batch {
                Some(batch) => {
                    let (applier, batch) = (applier.clone(), batch.map_err(Stop::Batches)?);
                    writing.spawn(async move { applier.write(batch).await });
                }
                None => more = false,
            },
            Some(done) = writing.join_next() => {
                let (sequence, progress_to) = done??;
                low_water.finish(sequence, progress_to);
                failpoint!("apply.batch");
                applier.counters.position.store(low_water.progress_to, Ordering::Relaxed);
            }
        }
        if low_water.progress_to > low_water.saved && saved_at.elapsed() >= options.checkpoint_every {
            applier.target.flush().await?;
            checkpoint.save(low_water.progress_to).await?;
            (low_water.saved, saved_at) = (low_water.progress_to, Instant::now());
        }
    }
    Ok(())
}

impl Applier {
    async fn write(&self, loaded: Loaded) -> Result<(u64, u64)> {
        let batch = loaded.batch;
        // Not on the rayon pool: the write copies these bytes right after this, out of the processor's cache. CRC-32 of
        // a batch takes less than that copy.
        batch.verify()?;
        let done = (batch.sequence, batch.progress_to);
        // All are waited for, even after one failed: see `apply`.
        let outcomes = join_all(batch.chunks.into_iter().map(|chunk| self.write_chunk(chunk))).await;
        outcomes.into_iter().collect::<Result<Vec<()>, ImageError>>()?;
        drop(loaded.permit);
        Ok(done)
    }

    async fn write_chunk(&self, chunk: Chunk) -> Result<(), ImageError> {
        let _slot = self.requests.acquire().await;
        match chunk.content {
            Content::Zero => {
                self.target.write_zeroes(chunk.range).await?;
                Counters::add(&self.counters.bytes_zeroed, chunk.range.length());
            }
            Content::Data { bytes, .. } => {
                self.target.write(chunk.range.offset(), bytes).await?;
                Counters::add(&self.counters.bytes_written, chunk.range.length());
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::Batch;
    use crate::image::memory::MemoryImage;
    use crate::image::{ErrorKind, Layout, LeaseOwner};
    use crate::pipeline::Permit;

    #[derive(Default)]
    struct Saved(Vec<u64>);

    #[async_trait]
    impl Checkpoint for Saved {
        async fn save(&mut self, progress_to: u64) -> Result<(), ImageError> {
            self.0.push(progress_to);
            Ok(())
        }
    }

    /// Two batches, then an error of that kind from where they are read.
    async fn cut_by(kind: ErrorKind) -> Vec<u64> {
        let target = MemoryImage::new("target", 1 << 20, Layout::DEFAULT);
        target.acquire_lease(&LeaseOwner::current().unwrap()).await.unwrap();
        let batch = |sequence: u64| {
            let chunks = crate::batch::cut(sequence * 4096, vec![1; 4096].into());
            let batch = Batch { sequence, progress_to: (sequence + 1) * 4096, chunks };
            Ok(Loaded { batch, permit: Permit::default() })
        };
        let error = Err(PipelineError::Image(ImageError::new(kind, "source", "read")));
        let batches = futures::stream::iter([batch(0), batch(1), error]).boxed();
        let (mut saved, cancel) = (Saved::default(), CancellationToken::new());
        let ended =
            apply(batches, Arc::new(target), ApplyOptions::default(), &mut saved, Arc::default(), &cancel).await;
        assert!(matches!(ended, Err(PipelineError::Image(error)) if error.location == "source"));
        saved.0
    }

    #[tokio::test]
    async fn what_was_written_before_the_source_was_too_slow_has_a_checkpoint() {
        assert_eq!(cut_by(ErrorKind::TimedOut).await, [8192]);
        assert!(cut_by(ErrorKind::Corrupt).await.is_empty(), "what is at fault is no progress");
    }

    #[test]
    fn a_checkpoint_never_runs_ahead_of_an_unfinished_batch() {
        let mut low_water = LowWater::default();
        low_water.finish(1, 20);
        low_water.finish(3, 40);
        assert_eq!(low_water.progress_to, 0);
        low_water.finish(0, 10);
        assert_eq!(low_water.progress_to, 20);
        low_water.finish(2, 30);
        assert_eq!((low_water.progress_to, low_water.done.len()), (40, 0));
    }
}
