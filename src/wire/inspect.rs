//! Says what is in a stream of any format, and checks everything that can be checked without an image.

use std::io::Cursor;

use serde::Serialize;
use tokio::io::{AsyncRead, AsyncReadExt};

use super::{Hello, MAGIC, Message, StreamReader, Totals, WireError};
use crate::batch::{BatchError, ChunkKind, EncodedBatch, decode};
use crate::delta::stream::{BANNER_V1, BANNER_V2, DiffError, DiffFault, DiffHeader, DiffReader, Input, Record};

/// The first bytes of what `rbd export --export-format 2` writes.
const BANNER_IMAGE_V2: &[u8] = b"rbd image v2\n";

/// What follows the image's header there: a count, and so many diffs of version 2.
const BANNER_DIFFS_V2: &[u8] = b"rbd image diffs v2\n";

/// The most diffs in one export. RADOS itself does badly with more than some hundred snapshots of an image.
const DIFFS_MAX: u64 = 4096;

/// What a stream holds. Its existence says that the stream is whole: nothing is cut off, nothing follows, and every
/// checksum that is in it is right.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "format")]
pub enum Inspection {
    /// poolshift's batch stream.
    #[serde(rename = "poolshift batch stream")]
    Batches {
        /// What it is about.
        hello: Box<Hello>,
        /// What it carries.
        #[serde(flatten)]
        totals: Totals,
        /// How many bytes of payload travel for the data.
        payload_bytes: u64,
        /// How many chunks' CRC-32 were checked. The digest of the whole stream was, too.
        checksums_verified: u64,
    },
    /// One diff of `rbd export-diff`. There are no checksums in it.
    #[serde(rename = "rbd diff")]
    Diff {
        /// What it holds.
        #[serde(flatten)]
        diff: DiffSummary,
        /// How many bytes the stream is long.
        stream_bytes: u64,
    },
    /// An image of `rbd export --export-format 2`. There are no checksums in it.
    #[serde(rename = "rbd image v2")]
    Export {
        /// The image's properties; `None` in a stream of diffs only.
        image: Option<ExportedImage>,
        /// The diff that leads to each snapshot, and the last one to HEAD.
        diffs: Vec<DiffSummary>,
        /// How many bytes the stream is long.
        stream_bytes: u64,
    },
}

/// What a diff holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DiffSummary {
    /// What it says before its data.
    #[serde(flatten)]
    pub header: DiffHeader,
    /// How many ranges of data, neighbours taken for one.
    pub data_ranges: u64,
    /// How many bytes of data.
    pub data_bytes: u64,
    /// How many records of zeroes.
    pub zero_ranges: u64,
    /// How many bytes of zeroes.
    pub zero_bytes: u64,
    /// Whether the ranges ascend without overlap, as merge-diff needs it.
    pub ascending: bool,
}

/// The properties of an exported image, as far as they are there.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ExportedImage {
    /// The object size, in bytes.
    pub object_size: Option<u64>,
    /// The features, as rbd's bits.
    pub features: Option<u64>,
    /// The stripe unit, in bytes.
    pub stripe_unit: Option<u64>,
    /// The stripe count.
    pub stripe_count: Option<u64>,
    /// How many entries of image metadata.
    pub metadata_entries: u64,
}

/// A stream that is not whole, not sound, or of no known format.
#[derive(Debug, thiserror::Error)]
pub enum InspectError {
    /// The first bytes are of no known format.
    #[error("neither a poolshift batch stream nor an rbd diff or export: it begins with {found:?}")]
    UnknownFormat {
        /// The first bytes, as far as they are text.
        found: String,
    },
    /// The input can't be read.
    #[error("cannot read the stream")]
    Io(#[source] std::io::Error),
    /// A batch stream's frame is at fault.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// A batch is at fault.
    #[error("batch stream, frame ending at byte {end}")]
    Batch {
        /// Where the batch's frame ends, in bytes from the start of the stream.
        end: u64,
        /// What is wrong.
        #[source]
        source: BatchError,
    },
    /// An rbd stream is at fault.
    #[error(transparent)]
    Diff(#[from] DiffError),
    /// The worker that checks batches died.
    #[error("the checking of a batch was interrupted")]
    Interrupted(#[source] tokio::task::JoinError),
}

/// Reads a stream to the end of `input`, whichever format it is of, and checks it. Memory: one frame or record piece.
pub async fn inspect<R: AsyncRead + Unpin>(mut input: R) -> Result<Inspection, InspectError> {
    let mut start = Vec::with_capacity(BANNER_DIFFS_V2.len());
    // No banner is shorter than the magic, nor longer than this one; and a pipe may give them byte by byte.
    (&mut input).take(MAGIC.len() as u64).read_to_end(&mut start).await.map_err(InspectError::Io)?;
    if start.starts_with(b"rbd ") {
        while start.last() != Some(&b'\n') && start.len() < BANNER_DIFFS_V2.len() {
            match (&mut input).take(1).read_to_end(&mut start).await.map_err(InspectError::Io)? {
                0 => break,
                _ => continue,
            }
        }
    }
    let whole = Cursor::new(start.clone()).chain(input);
    if start == MAGIC {
        inspect_batches(whole).await
    } else if start == BANNER_V1 || start == BANNER_V2 {
        let mut reader = DiffReader::open(whole).await?;
        let diff = summarize(&mut reader).await?;
        reader.expect_nothing_more().await?;
        Ok(Inspection::Diff { diff, stream_bytes: reader.bytes_read() })
    } else if start == BANNER_IMAGE_V2 || start == BANNER_DIFFS_V2 {
        inspect_export(Input::new(whole)).await
    } else {
        Err(InspectError::UnknownFormat { found: String::from_utf8_lossy(&start).into_owned() })
    }
}

async fn inspect_batches<R: AsyncRead + Unpin>(input: R) -> Result<Inspection, InspectError> {
    let mut reader = StreamReader::open(input).await?;
    let (mut payload_bytes, mut checksums_verified) = (0, 0);
    loop {
        match reader.next().await? {
            Message::Batch(batch) => {
                payload_bytes += batch.payload_length();
                checksums_verified += batch.chunks.iter().filter(|chunk| chunk.kind != ChunkKind::Zero).count() as u64;
                check_batch(batch, reader.totals().stream_bytes).await?;
            }
            Message::End(totals) => {
                reader.expect_nothing_more().await?;
                let hello = Box::new(reader.hello().clone());
                return Ok(Inspection::Batches { hello, totals, payload_bytes, checksums_verified });
            }
        }
    }
}

/// Decodes and checks a batch off the async workers: it is milliseconds of work.
async fn check_batch(batch: EncodedBatch, end: u64) -> Result<(), InspectError> {
    let checked = tokio::task::spawn_blocking(move || decode(batch).and_then(|batch| batch.verify()));
    match checked.await.map_err(InspectError::Interrupted)? {
        Ok(()) => Ok(()),
        Err(source) => Err(InspectError::Batch { end, source }),
    }
}

async fn summarize<R: AsyncRead + Unpin>(reader: &mut DiffReader<R>) -> Result<DiffSummary, DiffError> {
    let mut summary = DiffSummary {
        header: reader.header().clone(),
        data_ranges: 0,
        data_bytes: 0,
        zero_ranges: 0,
        zero_bytes: 0,
        ascending: true,
    };
    // Where the last record ends, and where the last data does.
    let (mut end, mut data_end) = (0, None);
    loop {
        let (offset, next_end) = match reader.next().await? {
            Record::End => return Ok(summary),
            Record::Data { offset, bytes } => {
                summary.data_ranges += u64::from(data_end != Some(offset));
                summary.data_bytes += bytes.len() as u64;
                // The reader has checked that it does not overflow.
                let next_end = offset + bytes.len() as u64;
                data_end = Some(next_end);
                (offset, next_end)
            }
            Record::Zero(range) => {
                summary.zero_ranges += 1;
                summary.zero_bytes = summary.zero_bytes.saturating_add(range.length());
                (range.offset(), range.end())
            }
        };
        summary.ascending &= offset >= end;
        end = next_end;
    }
}

async fn inspect_export<R: AsyncRead + Unpin>(mut input: Input<R>) -> Result<Inspection, InspectError> {
    let mut record_offset = 0;
    let head = read_export_head(&mut input, &mut record_offset).await;
    let (image, count) = head.map_err(|fault| DiffError { offset: record_offset, fault })?;
    let mut diffs = Vec::new();
    for _ in 0..count {
        let mut reader = DiffReader::resume(input).await?;
        diffs.push(summarize(&mut reader).await?);
        input = reader.into_input();
    }
    let stream_bytes = input.offset();
    match input.at_end().await {
        Ok(true) => Ok(Inspection::Export { image, diffs, stream_bytes }),
        Ok(false) => Err(DiffError { offset: stream_bytes, fault: DiffFault::TrailingBytes }.into()),
        Err(fault) => Err(DiffError { offset: stream_bytes, fault }.into()),
    }
}

/// Reads everything before the diffs (Ceph's `doc/dev/rbd-export.rst`): the image's properties, and how many diffs
/// follow.
async fn read_export_head<R: AsyncRead + Unpin>(
    input: &mut Input<R>,
    record_offset: &mut u64,
) -> Result<(Option<ExportedImage>, u64), DiffFault> {
    let mut banner = [0; BANNER_DIFFS_V2.len()];
    let first = &mut banner[..BANNER_IMAGE_V2.len()];
    input.fill(first, "the banner").await?;
    let image = match &*first == BANNER_IMAGE_V2 {
        true => {
            let image = read_exported_image(input, record_offset).await?;
            *record_offset = input.offset();
            input.fill(&mut banner, "the banner of the diffs").await?;
            Some(image)
        }
        false => {
            input.fill(&mut banner[BANNER_IMAGE_V2.len()..], "the banner").await?;
            None
        }
    };
    if banner != BANNER_DIFFS_V2 {
        return Err(DiffFault::NotADiff { found: String::from_utf8_lossy(&banner).into_owned() });
    }
    *record_offset = input.offset();
    match input.u64("the count of diffs").await? {
        count if count > DIFFS_MAX => Err(DiffFault::TooMany { what: "diffs", count, most: DIFFS_MAX }),
        count => Ok((image, count)),
    }
}

async fn read_exported_image<R: AsyncRead + Unpin>(
    input: &mut Input<R>,
    record_offset: &mut u64,
) -> Result<ExportedImage, DiffFault> {
    const WITHIN: &str = "the image's properties";
    let mut image = ExportedImage::default();
    loop {
        *record_offset = input.offset();
        let tag = input.u8(WITHIN).await?;
        if tag == b'E' {
            return Ok(image);
        }
        let length = input.u64(WITHIN).await?;
        let value = match tag {
            b'O' | b'T' | b'U' | b'C' if length == 8 => Some(input.u64(WITHIN).await?),
            b'O' | b'T' | b'U' | b'C' => {
                return Err(DiffFault::RecordLength { tag: tag.into(), length, expected: 8 });
            }
            _ => {
                input.skip(length).await?;
                image.metadata_entries += u64::from(tag == b'M');
                None
            }
        };
        match tag {
            // The order: the binary logarithm of the object size.
            b'O' => image.object_size = value.and_then(|order| 1u64.checked_shl(u32::try_from(order).ok()?)),
            b'T' => image.features = value,
            b'U' => image.stripe_unit = value,
            b'C' => image.stripe_count = value,
            _ => {}
        }
    }
}

#[cfg(test)]
#[path = "inspect_tests.rs"]
mod tests;
