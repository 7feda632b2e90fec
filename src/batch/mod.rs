//! Batches: what is compressed, sent, applied and acknowledged as one.
//!
//! A batch is a handful of chunks; a chunk is what one checksum covers: bytes that are to stand at an offset, with
//! their CRC-32 taken right after the read, or a range of zeroes. The checksum travels with the bytes and is checked
//! right before they are applied, in every transport, in one process too.

use bytes::Bytes;

use crate::extent::ByteRange;

mod chunker;
mod codec;
mod compress;
mod error;

pub use chunker::{cut, is_zero};
pub use codec::{ChunkHeader, ChunkKind, EncodedBatch, Encoding, decode, encode};
pub use compress::{Compression, CompressionChoice, CompressionError, LEVEL_DEFAULT};
pub use error::{BatchError, BatchFault};

/// The most bytes that one chunk holds: 4 MiB, RBD's default object. A range of zeroes may be longer.
pub const CHUNK_MAX: u64 = 4 << 20;

/// The most data bytes that one batch holds, decoded: 8 MiB.
pub const BATCH_MAX: u64 = 8 << 20;

/// The most chunks that one batch holds.
pub const BATCH_CHUNKS_MAX: usize = 4096;

/// The block in which zeroes are detected, at absolute multiples of it: 4 KiB.
pub const ZERO_BLOCK: u64 = 4096;

/// Bytes, or zeroes, for one range of the target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// Where.
    pub range: ByteRange,
    /// What.
    pub content: Content,
}

/// What stands in a chunk's range.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// Zeroes.
    Zero,
    /// Data, as long as the range.
    Data {
        /// The bytes.
        bytes: Bytes,
        /// Their CRC-32 (IEEE 802.3, as in zlib), taken from the reader's buffer.
        crc32: u32,
    },
}

/// Chunks that are applied and acknowledged together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// 0 for the first of a delta, then one more each.
    pub sequence: u64,
    /// Every byte of the delta below this offset is in this batch or in one before it. Never decreases.
    pub progress_to: u64,
    /// In ascending, disjoint order; and all of them behind those of the batch before.
    pub chunks: Vec<Chunk>,
}

impl Batch {
    /// How many bytes of data the chunks hold.
    pub fn data_bytes(&self) -> u64 {
        self.chunks.iter().filter(|chunk| chunk.content != Content::Zero).map(|chunk| chunk.range.length()).sum()
    }

    /// How many bytes of zeroes the chunks stand for.
    pub fn zero_bytes(&self) -> u64 {
        self.chunks.iter().filter(|chunk| chunk.content == Content::Zero).map(|chunk| chunk.range.length()).sum()
    }

    /// Checks everything that can be checked without the delta: the limits, that chunks ascend without overlap, that
    /// data is as long as its range, and each checksum. Belongs right before the batch is applied.
    pub fn verify(&self) -> Result<(), BatchError> {
        let fail = |fault| BatchError { sequence: self.sequence, fault };
        let lengths = self.chunks.iter().map(|chunk| (chunk.range, chunk.content != Content::Zero));
        codec::check_layout(lengths).map_err(fail)?;
        for Chunk { range, content } in &self.chunks {
            let Content::Data { bytes, crc32 } = content else { continue };
            if bytes.len() as u64 != range.length() {
                return Err(fail(BatchFault::ChunkLength { range: *range, actual: bytes.len() as u64 }));
            }
            let actual = crc32fast::hash(bytes);
            if actual != *crc32 {
                return Err(fail(BatchFault::Checksum { range: *range, expected: *crc32, actual }));
            }
        }
        Ok(())
    }
}
