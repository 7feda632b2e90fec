//! Between the protobuf messages and the types of this module: everything from outside is checked here.

use prost::Message as _;

use super::{Hello, NAME_MAX, SIZE_MAX, VERSION_MAJOR, WireFault};
use crate::batch::{BATCH_CHUNKS_MAX, BatchFault, ChunkHeader, ChunkKind, EncodedBatch, Encoding};
use crate::extent::ByteRange;
use crate::image::{ImageIdentity, Layout, Snapshot};

/// What prost makes of `proto/poolshift.proto`.
#[allow(missing_docs, unreachable_pub, clippy::all)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/poolshift.v1.rs"));
}

type Result<T, E = WireFault> = std::result::Result<T, E>;

/// What an End message says.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct End {
    pub(super) batches: u64,
    pub(super) data_bytes: u64,
    pub(super) zero_bytes: u64,
    pub(super) digest: [u8; 32],
}

pub(super) fn encode_hello(hello: &Hello) -> Result<Vec<u8>> {
    check_hello(hello)?;
    let message = generated::Hello {
        tool: hello.tool.clone(),
        major_min: VERSION_MAJOR.into(),
        major_max: VERSION_MAJOR.into(),
        needed_features: Vec::new(),
        source: Some(generated::Identity {
            cluster: hello.source.cluster.clone(),
            pool: hello.source.pool.clone(),
            image: hello.source.image.clone(),
        }),
        source_location: hello.location.clone(),
        from: hello.from.as_ref().map(snapshot_out),
        to: Some(snapshot_out(&hello.to)),
        layout: Some(generated::Layout {
            object_size: hello.layout.object_size,
            stripe_unit: hello.layout.stripe_unit,
            stripe_count: hello.layout.stripe_count,
        }),
        compression: hello.compression.clone(),
    };
    Ok(message.encode_to_vec())
}

pub(super) fn decode_hello(message: &[u8]) -> Result<Hello> {
    let message = generated::Hello::decode(message).map_err(WireFault::Malformed)?;
    if let Some(&feature) = message.needed_features.first() {
        return Err(WireFault::UnknownFeature { feature });
    }
    let missing = |field| WireFault::Field { field, problem: "is missing" };
    let source = message.source.ok_or(missing("source"))?;
    let layout = message.layout.ok_or(missing("layout"))?;
    let hello = Hello {
        tool: message.tool,
        source: ImageIdentity { cluster: source.cluster, pool: source.pool, image: source.image },
        location: message.source_location,
        from: message.from.map(snapshot_in),
        to: message.to.map(snapshot_in).ok_or(missing("to"))?,
        layout: Layout {
            object_size: layout.object_size,
            stripe_unit: layout.stripe_unit,
            stripe_count: layout.stripe_count,
        },
        compression: message.compression,
    };
    check_hello(&hello)?;
    Ok(hello)
}

fn snapshot_out(snapshot: &Snapshot) -> generated::Snapshot {
    generated::Snapshot { id: snapshot.id, name: snapshot.name.clone(), size: snapshot.size }
}

fn snapshot_in(snapshot: generated::Snapshot) -> Snapshot {
    Snapshot { id: snapshot.id, name: snapshot.name, size: snapshot.size }
}

/// The rules for a Hello, whichever way it goes.
fn check_hello(hello: &Hello) -> Result<()> {
    let Hello { tool, source, location, from, to, layout, compression } = hello;
    let texts = [
        ("tool", tool),
        ("source_location", location),
        ("compression", compression),
        ("source.cluster", &source.cluster),
        ("source.pool", &source.pool),
        ("source.image", &source.image),
        ("to.name", &to.name),
    ];
    let from_name = from.iter().map(|snapshot| ("from.name", &snapshot.name));
    for (field, text) in texts.into_iter().chain(from_name) {
        if text.len() > NAME_MAX {
            return Err(WireFault::NameTooLong { field, length: text.len() });
        }
        let for_people = ["tool", "source_location", "compression"].contains(&field);
        if text.is_empty() && !for_people {
            return Err(WireFault::Field { field, problem: "is empty" });
        }
    }
    for (field, snapshot) in [("to.size", Some(to)), ("from.size", from.as_ref())] {
        if snapshot.is_some_and(|snapshot| snapshot.size > SIZE_MAX) {
            return Err(WireFault::Field { field, problem: "is larger than 2^63 - 1 bytes" });
        }
    }
    let Layout { object_size, stripe_unit, stripe_count } = *layout;
    let sound = object_size > 0
        && stripe_unit > 0
        && object_size % stripe_unit == 0
        && stripe_count > 0
        && object_size.checked_mul(stripe_count).is_some_and(|period| period <= SIZE_MAX);
    match sound {
        true => Ok(()),
        false => Err(WireFault::Field { field: "layout", problem: "makes no sense" }),
    }
}

/// The message of a batch that passed [`EncodedBatch::check`] and whose chunks lie within [`SIZE_MAX`].
pub(super) fn encode_batch(batch: &EncodedBatch) -> Vec<u8> {
    let mut message = generated::Batch {
        sequence: batch.sequence,
        progress_to: batch.progress_to,
        decoded_length: batch.decoded_length,
        gaps: Vec::with_capacity(batch.chunks.len()),
        lengths: Vec::with_capacity(batch.chunks.len()),
        ..generated::Batch::default()
    };
    message.set_encoding(match batch.encoding {
        Encoding::Raw => generated::Encoding::Raw,
        Encoding::Zstd => generated::Encoding::Zstd,
    });
    let mut previous_end = 0;
    for ChunkHeader { range, kind } in &batch.chunks {
        message.gaps.push(range.offset() - previous_end);
        message.lengths.push(range.length() << 1 | u64::from(*kind != ChunkKind::Zero));
        if let ChunkKind::Data { crc32 } = kind {
            message.crc32.push(*crc32);
        }
        previous_end = range.end();
    }
    message.encode_to_vec()
}

/// A batch without its payload.
pub(super) fn decode_batch(message: &[u8]) -> Result<EncodedBatch> {
    let message = generated::Batch::decode(message).map_err(WireFault::Malformed)?;
    let encoding = match generated::Encoding::try_from(message.encoding) {
        Ok(generated::Encoding::Raw) => Encoding::Raw,
        Ok(generated::Encoding::Zstd) => Encoding::Zstd,
        Err(_) => return Err(WireFault::Field { field: "encoding", problem: "is none that this program knows" }),
    };
    if message.lengths.len() > BATCH_CHUNKS_MAX {
        return Err(WireFault::Batch(BatchFault::TooManyChunks { count: message.lengths.len() }));
    }
    if message.gaps.len() != message.lengths.len() {
        return Err(WireFault::Field { field: "gaps", problem: "are not as many as lengths" });
    }
    let mut crcs = message.crc32.iter();
    let mut chunks = Vec::with_capacity(message.lengths.len());
    let mut previous_end = 0u64;
    for (&gap, &length) in message.gaps.iter().zip(&message.lengths) {
        let impossible = WireFault::Field { field: "lengths", problem: "make no range" };
        let range = previous_end.checked_add(gap).and_then(|offset| ByteRange::new(offset, length >> 1).ok());
        let range = range.ok_or(impossible)?;
        let kind = match (length & 1 == 1).then(|| crcs.next()) {
            None => ChunkKind::Zero,
            Some(Some(&crc32)) => ChunkKind::Data { crc32 },
            Some(None) => return Err(WireFault::Field { field: "crc32", problem: "are fewer than data chunks" }),
        };
        chunks.push(ChunkHeader { range, kind });
        previous_end = range.end();
    }
    if crcs.next().is_some() {
        return Err(WireFault::Field { field: "crc32", problem: "are more than data chunks" });
    }
    let generated::Batch { sequence, progress_to, decoded_length, .. } = message;
    Ok(EncodedBatch { sequence, progress_to, chunks, encoding, decoded_length, payload: Vec::new() })
}

pub(super) fn encode_end(end: &End) -> Vec<u8> {
    let End { batches, data_bytes, zero_bytes, digest } = *end;
    generated::End { batches, data_bytes, zero_bytes, digest: digest.to_vec() }.encode_to_vec()
}

pub(super) fn decode_end(message: &[u8]) -> Result<End> {
    let message = generated::End::decode(message).map_err(WireFault::Malformed)?;
    let digest = message.digest.as_slice().try_into();
    let digest = digest.map_err(|_| WireFault::Field { field: "digest", problem: "is not 32 bytes" })?;
    let generated::End { batches, data_bytes, zero_bytes, .. } = message;
    Ok(End { batches, data_bytes, zero_bytes, digest })
}

/// The message, with a reason that is cut where it is too long.
pub(super) fn encode_failed(reason: &str) -> Vec<u8> {
    let cut = (0..=NAME_MAX.min(reason.len())).rev().find(|&at| reason.is_char_boundary(at)).unwrap_or(0);
    generated::Failed { reason: reason[..cut].to_owned() }.encode_to_vec()
}

pub(super) fn decode_failed(message: &[u8]) -> Result<String> {
    let reason = generated::Failed::decode(message).map_err(WireFault::Malformed)?.reason;
    match reason.len() {
        0..=NAME_MAX => Ok(reason),
        length => Err(WireFault::NameTooLong { field: "reason", length }),
    }
}
