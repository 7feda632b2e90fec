//! What reader and writer both keep of a stream, so that neither lets pass what the other refuses.

use blake3::Hasher;

use super::{Hello, Totals, WireFault};
use crate::batch::EncodedBatch;

/// The stream so far.
pub(super) struct Ledger {
    size: u64,
    totals: Totals,
    progress_to: u64,
    last_end: u64,
    hasher: Hasher,
}

impl Ledger {
    pub(super) fn new() -> Self {
        Self { size: 0, totals: Totals::default(), progress_to: 0, last_end: 0, hasher: Hasher::new() }
    }

    /// From now on batches are held against this.
    pub(super) fn begin(&mut self, hello: &Hello) {
        self.size = hello.to.size;
    }

    /// How many bytes passed.
    pub(super) fn offset(&self) -> u64 {
        self.totals.stream_bytes
    }

    pub(super) fn totals(&self) -> Totals {
        self.totals
    }

    /// Takes note of bytes of the stream.
    pub(super) fn pass(&mut self, bytes: &[u8]) {
        self.hasher.update(bytes);
        self.totals.stream_bytes += bytes.len() as u64;
    }

    pub(super) fn digest(&self) -> [u8; 32] {
        *self.hasher.finalize().as_bytes()
    }

    /// Takes note of a batch that passed [`EncodedBatch::check`], or says why it can't come next.
    pub(super) fn take(&mut self, batch: &EncodedBatch) -> Result<(), WireFault> {
        let expected = self.totals.batches;
        if batch.sequence != expected {
            return Err(WireFault::Sequence { expected, found: batch.sequence });
        }
        if !(self.progress_to..=self.size).contains(&batch.progress_to) {
            return Err(WireFault::Progress { least: self.progress_to, most: self.size, found: batch.progress_to });
        }
        if let (Some(first), Some(last)) = (batch.chunks.first(), batch.chunks.last()) {
            // What was done below its progress counts as done when a reader goes on from there.
            let done = self.last_end.max(self.progress_to);
            if first.range.offset() < done {
                return Err(WireFault::Unordered { range: first.range, done });
            }
            if last.range.end() > self.size {
                return Err(WireFault::BeyondImage { range: last.range, size: self.size });
            }
            self.last_end = last.range.end();
        }
        self.progress_to = batch.progress_to;
        self.totals.batches += 1;
        // Neither sum can overflow: chunks are disjoint and within the image.
        self.totals.data_bytes += batch.decoded_length;
        self.totals.zero_bytes += batch.zero_bytes();
        Ok(())
    }
}
