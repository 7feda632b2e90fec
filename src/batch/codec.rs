//! A batch as it travels: headers of its chunks, and their data in one payload.

use bytes::Bytes;

use super::compress::{compress, decompress};
use super::{BATCH_CHUNKS_MAX, BATCH_MAX, Batch, BatchError, BatchFault, CHUNK_MAX, Chunk, Compression, Content};
use crate::extent::ByteRange;

/// A chunk without its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkHeader {
    /// Where.
    pub range: ByteRange,
    /// What.
    pub kind: ChunkKind,
}

/// What a chunk holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChunkKind {
    /// Zeroes.
    Zero,
    /// Data: the next `range.length()` bytes of the decoded payload.
    Data {
        /// The CRC-32 of those bytes.
        crc32: u32,
    },
}

/// How the payload is to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    /// As it is.
    Raw,
    /// zstd.
    Zstd,
}

/// A batch, encoded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EncodedBatch {
    /// As [`Batch::sequence`].
    pub sequence: u64,
    /// As [`Batch::progress_to`].
    pub progress_to: u64,
    /// The chunks, in order.
    pub chunks: Vec<ChunkHeader>,
    /// How the payload is to be read.
    pub encoding: Encoding,
    /// How many bytes the payload is when decoded: the lengths of all data chunks.
    pub decoded_length: u64,
    /// The data of all data chunks in a row, in as many pieces as is convenient.
    pub payload: Vec<Bytes>,
}

impl EncodedBatch {
    /// How many bytes the payload is, as it travels.
    pub fn payload_length(&self) -> u64 {
        self.payload.iter().map(|piece| piece.len() as u64).sum()
    }

    /// How many bytes of zeroes the chunks stand for.
    pub fn zero_bytes(&self) -> u64 {
        self.chunks.iter().filter(|chunk| chunk.kind == ChunkKind::Zero).map(|chunk| chunk.range.length()).sum()
    }

    /// Checks what can be checked without looking into the payload, see [`decode`].
    pub(crate) fn check(&self) -> Result<(), BatchFault> {
        let data = check_layout(self.chunks.iter().map(|chunk| (chunk.range, chunk.kind != ChunkKind::Zero)))?;
        if data != self.decoded_length {
            return Err(BatchFault::DataLength { expected: self.decoded_length, actual: data });
        }
        let payload = self.payload_length();
        match self.encoding {
            Encoding::Raw if payload != data => Err(BatchFault::DataLength { expected: data, actual: payload }),
            _ => Ok(()),
        }
    }
}

/// Encodes a batch. Without compression nothing is copied; with it, the work is CPU-bound (run it off the async
/// workers), and a batch that would not shrink by a sixteenth is stored as it is.
pub fn encode(batch: Batch, compression: Compression) -> EncodedBatch {
    let mut chunks = Vec::with_capacity(batch.chunks.len());
    let mut payload = Vec::new();
    for Chunk { range, content } in batch.chunks {
        let kind = match content {
            Content::Zero => ChunkKind::Zero,
            Content::Data { bytes, crc32 } => {
                payload.push(bytes);
                ChunkKind::Data { crc32 }
            }
        };
        chunks.push(ChunkHeader { range, kind });
    }
    let decoded_length = payload.iter().map(|piece| piece.len() as u64).sum();
    let mut encoding = Encoding::Raw;
    if let Compression::Zstd(level) = compression
        && let Some(frame) = compress(&payload, level)
    {
        (encoding, payload) = (Encoding::Zstd, vec![frame]);
    }
    let Batch { sequence, progress_to, .. } = batch;
    EncodedBatch { sequence, progress_to, chunks, encoding, decoded_length, payload }
}

/// Decodes a batch, checking every length and limit before anything is allocated or sliced. Checksums are left to
/// [`Batch::verify`], which belongs right before the data is applied.
///
/// CPU-bound where the payload is compressed; nothing is copied where it is not and its pieces are the chunks, or one.
pub fn decode(encoded: EncodedBatch) -> Result<Batch, BatchError> {
    let EncodedBatch { sequence, progress_to, .. } = encoded;
    let chunks = decode_chunks(encoded).map_err(|fault| BatchError { sequence, fault })?;
    Ok(Batch { sequence, progress_to, chunks })
}

fn decode_chunks(encoded: EncodedBatch) -> Result<Vec<Chunk>, BatchFault> {
    encoded.check()?;
    let EncodedBatch { chunks, encoding, decoded_length, mut payload, .. } = encoded;
    let lengths = chunks.iter().filter(|chunk| chunk.kind != ChunkKind::Zero).map(|chunk| chunk.range.length());
    let one_piece_each = lengths.eq(payload.iter().map(|piece| piece.len() as u64));
    if encoding == Encoding::Zstd || !one_piece_each {
        let mut whole = join(payload);
        if encoding == Encoding::Zstd {
            whole = inflate(&whole, decoded_length)?.into();
        }
        payload = split(&chunks, whole);
    }
    let mut pieces = payload.into_iter();
    let with_bytes = |ChunkHeader { range, kind }| {
        let content = match kind {
            ChunkKind::Zero => Content::Zero,
            ChunkKind::Data { crc32 } => Content::Data { bytes: pieces.next().unwrap_or_default(), crc32 },
        };
        Chunk { range, content }
    };
    Ok(chunks.into_iter().map(with_bytes).collect())
}

fn join(mut pieces: Vec<Bytes>) -> Bytes {
    match pieces.len() {
        0 | 1 => pieces.pop().unwrap_or_default(),
        _ => pieces.concat().into(),
    }
}

fn inflate(payload: &[u8], length: u64) -> Result<Vec<u8>, BatchFault> {
    // `check` has bounded the length by BATCH_MAX.
    let decoded =
        decompress(payload, length as usize).map_err(|source| BatchFault::Decompress { expected: length, source })?;
    if decoded.len() as u64 != length {
        return Err(BatchFault::DataLength { expected: length, actual: decoded.len() as u64 });
    }
    Ok(decoded)
}

/// One piece for each data chunk; `whole` is as long as all of them, as `check` has made sure.
fn split(chunks: &[ChunkHeader], mut whole: Bytes) -> Vec<Bytes> {
    let data = chunks.iter().filter(|chunk| chunk.kind != ChunkKind::Zero);
    data.map(|chunk| whole.split_to(chunk.range.length() as usize)).collect()
}

/// Checks limits and order of chunks, each a range and whether it is data; returns how many bytes of data they are.
pub(super) fn check_layout(chunks: impl ExactSizeIterator<Item = (ByteRange, bool)>) -> Result<u64, BatchFault> {
    if chunks.len() > BATCH_CHUNKS_MAX {
        return Err(BatchFault::TooManyChunks { count: chunks.len() });
    }
    let (mut data, mut previous_end) = (0, 0);
    for (range, is_data) in chunks {
        if range.offset() < previous_end {
            return Err(BatchFault::Unordered { range, previous_end });
        }
        previous_end = range.end();
        if is_data {
            if range.length() > CHUNK_MAX {
                return Err(BatchFault::ChunkTooLong { range });
            }
            // Cannot overflow: 4096 chunks of 4 MiB.
            data += range.length();
        }
    }
    if data > BATCH_MAX {
        return Err(BatchFault::TooMuchData { length: data });
    }
    Ok(data)
}

#[cfg(test)]
#[path = "codec_tests.rs"]
mod tests;
