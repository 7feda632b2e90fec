//! What can be wrong with a batch.

use super::{BATCH_CHUNKS_MAX, BATCH_MAX, CHUNK_MAX};
use crate::extent::ByteRange;

/// A batch that must not be applied. Permanent: the same bytes fail again; sending anew may help.
#[derive(Debug, thiserror::Error)]
#[error("batch {sequence} is refused")]
pub struct BatchError {
    /// Which batch.
    pub sequence: u64,
    /// What is wrong with it.
    #[source]
    pub fault: BatchFault,
}

/// What is wrong with a batch.
#[derive(Debug, thiserror::Error)]
pub enum BatchFault {
    /// More chunks than [`BATCH_CHUNKS_MAX`].
    #[error("{count} chunks, more than the {BATCH_CHUNKS_MAX} allowed")]
    TooManyChunks {
        /// How many.
        count: usize,
    },
    /// More data than [`BATCH_MAX`].
    #[error("{length} bytes of data, more than the {BATCH_MAX} allowed")]
    TooMuchData {
        /// How many bytes, decoded.
        length: u64,
    },
    /// A data chunk longer than [`CHUNK_MAX`].
    #[error("a data chunk {range} (offset+length), longer than the {CHUNK_MAX} bytes allowed")]
    ChunkTooLong {
        /// Its range.
        range: ByteRange,
    },
    /// A chunk that begins before the end of the one before it.
    #[error("chunk {range} (offset+length) begins before {previous_end}, the end of the chunk before it")]
    Unordered {
        /// Its range.
        range: ByteRange,
        /// Where the one before ends.
        previous_end: u64,
    },
    /// A chunk whose bytes are not as many as its range has.
    #[error("chunk {range} (offset+length) carries {actual} bytes")]
    ChunkLength {
        /// Its range.
        range: ByteRange,
        /// How many bytes it carries.
        actual: u64,
    },
    /// The chunks' lengths, the decoded length and the payload disagree.
    #[error("{actual} bytes of data where {expected} were announced")]
    DataLength {
        /// As announced.
        expected: u64,
        /// As found.
        actual: u64,
    },
    /// The payload is no zstd frame of the announced length.
    #[error("the payload does not decompress to the {expected} bytes announced")]
    Decompress {
        /// As announced.
        expected: u64,
        /// What zstd says.
        #[source]
        source: std::io::Error,
    },
    /// The data was damaged between the reader's buffer and here.
    #[error("chunk {range} (offset+length) is damaged: its CRC-32 is {actual:08x} and was {expected:08x} when read")]
    Checksum {
        /// Its range.
        range: ByteRange,
        /// As taken from the reader's buffer.
        expected: u32,
        /// As found now.
        actual: u32,
    },
}
