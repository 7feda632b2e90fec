//! The pipeline: extents → reads → batches → writes, all at the same time, with bounded bytes and requests in flight.
//!
//! ```text
//! extents ─▶ units ─▶ [budget] ─▶ read, cut, checksum ─▶ transport ─▶ verify, write
//!                        ▲                                                   │
//!                        └───────────────── permits come back ───────────────┘
//! ```
//!
//! Cutting and checking happen on the async workers, next to the read and the write, where the bytes are still in the
//! processor's cache: a piece of 4 MiB takes some tenths of a millisecond, as librbd's own copies of it do. What takes
//! longer, compression and comparison by digests, is on the rayon pool.
//!
//! The extents of one delta are disjoint, so batches are applied in any order; only [`apply`]'s checkpoints look at the
//! order, because what a checkpoint says is "everything below this offset is done and flushed".

use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;

use crate::batch::{Batch, BatchError};
use crate::image::ImageError;

mod apply;
mod budget;
mod cpu;
mod read;
mod units;

pub use apply::{Applied, ApplyOptions, Checkpoint, apply};
pub(crate) use budget::Budgets;
pub use budget::{Budget, Permit};
pub use cpu::on_cpu;
pub use read::{ReadOptions, read};
pub use units::zero_pieces;

/// What stops a pipeline.
#[derive(Debug, thiserror::Error)]
pub enum PipelineError {
    /// An image failed.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// A batch is not what it was when its checksums were taken.
    #[error(transparent)]
    Batch(#[from] BatchError),
    /// The stream that batches come from, or go to, failed.
    #[error(transparent)]
    Wire(#[from] crate::wire::WireError),
    /// The diff stream that batches are made of failed.
    #[error(transparent)]
    Diff(#[from] crate::delta::stream::DiffError),
    /// A task of the pipeline panicked: a defect.
    #[error("a task of the pipeline failed")]
    Task(#[from] tokio::task::JoinError),
}

/// The result of a pipeline stage.
pub type Result<T, E = PipelineError> = std::result::Result<T, E>;

/// How much may be in flight.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Bytes between the start of their read and the end of their write.
    pub bytes: u64,
    /// Requests to one image.
    pub requests: usize,
    /// What these bytes are taken from as well, where several pipelines share one process's memory.
    pub shared: Option<Budget>,
}

impl Default for Limits {
    fn default() -> Self {
        Self { bytes: 64 << 20, requests: 64, shared: None }
    }
}

/// A batch, and the share of the budget that it holds until it is done with.
#[derive(Debug)]
pub struct Loaded {
    /// The batch.
    pub batch: Batch,
    /// Given back to the budget on drop.
    pub permit: Permit,
}

/// What a run did so far. Read while it runs, for progress; and at its end, for the report.
#[derive(Debug, Default)]
pub struct Counters {
    /// Extents of the delta.
    pub extents: AtomicU64,
    /// Bytes read from the source.
    pub bytes_read: AtomicU64,
    /// Bytes of the delta that are not zeroes.
    pub data_bytes: AtomicU64,
    /// Bytes of the delta that are zeroes, said or found to be.
    pub zero_bytes: AtomicU64,
    /// Bytes that were compared and found to be on the target already.
    pub bytes_equal: AtomicU64,
    /// Data bytes written to the target.
    pub bytes_written: AtomicU64,
    /// Bytes zeroed on the target.
    pub bytes_zeroed: AtomicU64,
    /// Everything below this offset has been applied.
    pub position: AtomicU64,
}

/// [`Counters`] at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Counted {
    /// Extents of the delta.
    pub extents: u64,
    /// Bytes read from the source.
    pub bytes_read: u64,
    /// Bytes of the delta that are not zeroes.
    pub data_bytes: u64,
    /// Bytes of the delta that are zeroes, said or found to be.
    pub zero_bytes: u64,
    /// Bytes that were compared and found to be on the target already.
    pub bytes_equal: u64,
    /// Data bytes written to the target.
    pub bytes_written: u64,
    /// Bytes zeroed on the target.
    pub bytes_zeroed: u64,
}

impl Counters {
    pub(crate) fn add(counter: &AtomicU64, amount: u64) {
        counter.fetch_add(amount, Ordering::Relaxed);
    }

    /// The counters now.
    pub fn read(&self) -> Counted {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Counted {
            extents: of(&self.extents),
            bytes_read: of(&self.bytes_read),
            data_bytes: of(&self.data_bytes),
            zero_bytes: of(&self.zero_bytes),
            bytes_equal: of(&self.bytes_equal),
            bytes_written: of(&self.bytes_written),
            bytes_zeroed: of(&self.bytes_zeroed),
        }
    }
}
