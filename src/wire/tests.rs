use std::path::PathBuf;

use bytes::Bytes;
use proptest::prelude::*;

use super::frame::{FLAG_SKIPPABLE, HEAD_LENGTH, Head, PREAMBLE_LENGTH, kind};
use super::*;
use crate::batch::{Batch, ChunkHeader, ChunkKind, Compression, Encoding, cut, decode, encode};
use crate::extent::ByteRange;

fn hello(from: Option<&str>, size: u64) -> Hello {
    Hello {
        tool: "poolshift 0.1.0".into(),
        source: ImageIdentity {
            cluster: "6f1e7a30-0000-4000-8000-000000000001".into(),
            pool: "3".into(),
            image: "10e2ae8944a".into(),
        },
        location: "rbd:sata/vm-1".into(),
        from: from.map(|name| Snapshot { id: 7, name: name.into(), size: 1 << 20 }),
        to: Snapshot { id: 9, name: "poolshift-2".into(), size },
        layout: Layout::DEFAULT,
        compression: "none".into(),
    }
}

fn range(offset: u64, length: u64) -> ByteRange {
    ByteRange::new(offset, length).unwrap()
}

fn raw_batch(sequence: u64, offset: u64, data: &[u8]) -> EncodedBatch {
    let chunks = cut(offset, Bytes::copy_from_slice(data));
    let progress_to = offset + data.len() as u64;
    encode(Batch { sequence, progress_to, chunks }, Compression::None)
}

/// `zstd -1` of 8192 times `0xAB`, as bytes: the golden streams must not depend on a version of zstd.
const ZSTD_FRAME: [u8; 19] =
    [0x28, 0xb5, 0x2f, 0xfd, 0x60, 0x00, 0x1f, 0x4d, 0x00, 0x00, 0x10, 0xab, 0xab, 0x01, 0x00, 0xfb, 0xdf, 0x03, 0x2c];

fn zstd_batch() -> EncodedBatch {
    let crc32 = crc32fast::hash(&[0xab; 8192]);
    EncodedBatch {
        sequence: 0,
        progress_to: 1 << 20,
        chunks: vec![
            ChunkHeader { range: range(4096, 8192), kind: ChunkKind::Data { crc32 } },
            ChunkHeader { range: range(1 << 19, 1 << 19), kind: ChunkKind::Zero },
        ],
        encoding: Encoding::Zstd,
        decoded_length: 8192,
        payload: vec![Bytes::from_static(&ZSTD_FRAME)],
    }
}

async fn stream(hello: &Hello, batches: &[EncodedBatch]) -> Vec<u8> {
    let mut writer = StreamWriter::open(Vec::new(), hello).await.unwrap();
    for batch in batches {
        writer.write(batch).await.unwrap();
    }
    let (totals, bytes) = writer.finish().await.unwrap();
    assert_eq!(totals.stream_bytes, bytes.len() as u64);
    bytes
}

async fn read_all(bytes: &[u8]) -> Result<(Hello, Vec<EncodedBatch>, Totals), WireError> {
    let mut reader = StreamReader::open(bytes).await?;
    let mut batches = Vec::new();
    loop {
        match reader.next().await? {
            Message::Batch(batch) => batches.push(batch),
            Message::End(totals) => {
                reader.expect_nothing_more().await?;
                return Ok((reader.hello().clone(), batches, totals));
            }
        }
    }
}

fn three_batches() -> Vec<EncodedBatch> {
    // A block of zeroes, and a part of one with data.
    let mixed = [vec![0; 4096], (1..=50).collect()].concat();
    vec![raw_batch(0, 8192, b"hello, SAS"), raw_batch(1, 65536, &mixed), raw_batch(2, 1 << 20, &[0; 4096])]
}

fn golden_path(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("proto/golden").join(name)
}

/// The file's text: a line of hex for each 32 bytes, and a comment before each part of a frame.
fn annotate(bytes: &[u8]) -> String {
    let mut text = String::new();
    let mut part = |title: String, bytes: &[u8]| {
        text += &format!("# {title}\n");
        bytes.chunks(32).for_each(|line| text += &format!("{}\n", hex::encode(line)));
    };
    part("preamble".into(), &bytes[..PREAMBLE_LENGTH]);
    let mut at = PREAMBLE_LENGTH;
    while at < bytes.len() {
        let head = Head::decode(bytes[at..at + HEAD_LENGTH].try_into().unwrap()).unwrap();
        part(format!("head, kind {}", head.kind), &bytes[at..at + HEAD_LENGTH]);
        at += HEAD_LENGTH;
        for (title, length) in [("message", head.message_length), ("payload", head.payload_length)] {
            let end = at + length as usize;
            if end > at {
                part(title.into(), &bytes[at..end]);
            }
            at = end;
        }
    }
    text
}

fn read_golden(name: &str) -> Vec<u8> {
    let text = std::fs::read_to_string(golden_path(name)).unwrap();
    text.lines().filter(|line| !line.starts_with('#')).flat_map(|line| hex::decode(line).unwrap()).collect()
}

/// Holds the code to the files in `proto/golden`. `POOLSHIFT_BLESS=1` rewrites them, for a change of the format that
/// is meant and written down in `proto/README.md`.
fn check_golden(name: &str, bytes: &[u8]) {
    if std::env::var_os("POOLSHIFT_BLESS").is_some() {
        std::fs::write(golden_path(name), annotate(bytes)).unwrap();
    }
    assert_eq!(annotate(&read_golden(name)), annotate(bytes), "{name}");
}

#[tokio::test]
async fn golden_streams_are_written_and_read() {
    let full = Hello { from: None, compression: "zstd:1".into(), ..hello(None, 1 << 20) };
    for (name, hello, batches) in [
        ("empty.hex", hello(Some("poolshift-1"), 1 << 20), vec![]),
        ("incremental.hex", hello(Some("poolshift-1"), 2 << 20), three_batches()),
        ("zstd.hex", full, vec![zstd_batch()]),
    ] {
        check_golden(name, &stream(&hello, &batches).await);
        let (found, found_batches, totals) = read_all(&read_golden(name)).await.unwrap();
        assert_eq!((&found, totals.batches), (&hello, batches.len() as u64));
        for (found, expected) in found_batches.into_iter().zip(batches) {
            let found = decode(found).unwrap();
            found.verify().unwrap();
            assert_eq!(found, decode(expected).unwrap());
        }
    }
}

#[tokio::test]
async fn a_golden_failure_is_told() {
    let mut bytes = Vec::new();
    let mut writer = StreamWriter::open(&mut bytes, &hello(None, 1 << 20)).await.unwrap();
    writer.write(&raw_batch(0, 0, b"x")).await.unwrap();
    writer.give_up("rbd:sata/vm-1: cannot read 4096 bytes at 0").await.unwrap();
    check_golden("failed.hex", &bytes);
    let error = read_all(&read_golden("failed.hex")).await.unwrap_err();
    assert!(matches!(error.fault, WireFault::SenderFailed { reason } if reason.contains("vm-1")));
}

#[tokio::test]
async fn a_very_long_reason_is_cut_at_a_character() {
    let mut bytes = Vec::new();
    let writer = StreamWriter::open(&mut bytes, &hello(None, 1)).await.unwrap();
    writer.give_up(&format!("x{}", "ä".repeat(NAME_MAX))).await.unwrap();
    let WireFault::SenderFailed { reason } = read_all(&bytes).await.unwrap_err().fault else { panic!() };
    assert_eq!(reason.len(), NAME_MAX - 1);
}

#[tokio::test]
async fn every_truncation_is_an_error() {
    let bytes = stream(&hello(Some("a"), 2 << 20), &three_batches()).await;
    for length in 0..bytes.len() {
        let error = read_all(&bytes[..length]).await.unwrap_err();
        assert!(matches!(error.fault, WireFault::Truncated { .. }), "{length}: {error:?}");
        assert!(error.offset <= length as u64);
    }
}

#[tokio::test]
async fn every_flipped_bit_is_an_error() {
    let good = stream(&hello(Some("a"), 2 << 20), &three_batches()).await;
    for bit in 0..good.len() * 8 {
        let mut bytes = good.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        assert!(read_all(&bytes).await.is_err(), "bit {bit}");
    }
}

#[tokio::test]
async fn bytes_after_the_end_are_an_error() {
    let mut bytes = stream(&hello(None, 1 << 20), &[]).await;
    bytes.push(0);
    let error = read_all(&bytes).await.unwrap_err();
    assert!(matches!(error.fault, WireFault::TrailingBytes));
    assert_eq!(error.offset, bytes.len() as u64 - 1);
}

/// The frames of a stream, without the preamble.
fn frames(bytes: &[u8]) -> Vec<Vec<u8>> {
    let mut frames = Vec::new();
    let mut rest = &bytes[PREAMBLE_LENGTH..];
    while !rest.is_empty() {
        let head = Head::decode(rest[..HEAD_LENGTH].try_into().unwrap()).unwrap();
        let (frame, after) = rest.split_at(HEAD_LENGTH + (head.message_length + head.payload_length) as usize);
        frames.push(frame.to_vec());
        rest = after;
    }
    frames
}

fn join(preamble: &[u8], frames: &[Vec<u8>]) -> Vec<u8> {
    [&preamble[..PREAMBLE_LENGTH], &frames.concat()].concat()
}

#[tokio::test]
async fn frames_that_are_dropped_doubled_or_moved_are_noticed() {
    let good = stream(&hello(None, 2 << 20), &three_batches()).await;
    let frames = frames(&good);
    assert_eq!(frames.len(), 5);
    assert!(read_all(&join(&good, &frames)).await.is_ok());
    for one in 0..frames.len() {
        let mut without = frames.clone();
        without.remove(one);
        assert!(read_all(&join(&good, &without)).await.is_err());
        let mut doubled = frames.clone();
        doubled.insert(one, frames[one].clone());
        assert!(read_all(&join(&good, &doubled)).await.is_err());
        for other in 0..one {
            let mut swapped = frames.clone();
            swapped.swap(one, other);
            assert!(read_all(&join(&good, &swapped)).await.is_err());
        }
    }
    // A frame of another stream with the same place in it.
    let foreign = self::frames(&stream(&hello(None, 2 << 20), &[raw_batch(0, 8192, b"hello, SAT")]).await);
    let mut mixed = frames.clone();
    mixed[1] = foreign[1].clone();
    assert!(matches!(read_all(&join(&good, &mixed)).await.unwrap_err().fault, WireFault::Digest));
}

fn frame(kind: u16, flags: u16, message: &[u8], payload: &[u8]) -> Vec<u8> {
    // The CRC covers the flags.
    let mut head = Head { flags, ..Head::new(kind, message, payload.len() as u32) }.encode();
    let mut crc = crc32fast::Hasher::new();
    crc.update(&head[..12]);
    crc.update(message);
    head[12..].copy_from_slice(&crc.finalize().to_le_bytes());
    [&head, message, payload].concat()
}

#[tokio::test]
async fn unknown_kinds_are_skipped_only_if_they_may_be() {
    let good = stream(&hello(None, 2 << 20), &[]).await;
    let with = |extra: Vec<u8>| {
        let mut frames = frames(&good);
        frames.insert(1, extra);
        join(&good, &frames)
    };
    let error = read_all(&with(frame(77, 0, b"?", b""))).await.unwrap_err();
    assert!(matches!(error.fault, WireFault::UnknownKind { kind: 77 }));
    // Skipped, and part of the digest: the end that was made without it does not match.
    let error = read_all(&with(frame(77, FLAG_SKIPPABLE, b"?", b"payload"))).await.unwrap_err();
    assert!(matches!(error.fault, WireFault::Digest));
    // A reader skips what a later minor version's writer put in, digest and all.
    let before_end = join(&good, &[frames(&good)[0].clone(), frame(77, FLAG_SKIPPABLE, b"?", b"payload")]);
    let digest = *blake3::hash(&before_end).as_bytes();
    let end = message::End { batches: 0, data_bytes: 0, zero_bytes: 0, digest };
    let bytes = [before_end, frame(kind::END, 0, &message::encode_end(&end), b"")].concat();
    assert_eq!(read_all(&bytes).await.unwrap().2.batches, 0);
}

#[tokio::test]
async fn versions_and_other_files_are_refused_by_name() {
    let good = stream(&hello(None, 1), &[]).await;
    let with = |at: usize, byte: u8| {
        let mut bytes = good.clone();
        bytes[at] = byte;
        bytes
    };
    let fault = |bytes: Vec<u8>| async move { read_all(&bytes).await.unwrap_err().fault };
    assert!(matches!(fault(with(0, b'P')).await, WireFault::NotAStream { .. }));
    assert!(matches!(fault(with(8, 2)).await, WireFault::Version { major: 2, minor: 0 }));
    assert!(matches!(fault(with(8, 0)).await, WireFault::Version { major: 0, .. }));
    // Another minor version is read; here only the digest objects, since the byte was changed afterwards.
    assert!(matches!(fault(with(10, 9)).await, WireFault::Digest));
}

#[tokio::test]
async fn lengths_are_refused_before_they_are_allocated() {
    let good = stream(&hello(None, 1), &[]).await;
    for (at, length) in [(4, u32::MAX), (4, MESSAGE_MAX + 1), (8, u32::MAX), (8, PAYLOAD_MAX + 1)] {
        let mut bytes = good.clone();
        bytes[PREAMBLE_LENGTH + at..PREAMBLE_LENGTH + at + 4].copy_from_slice(&length.to_le_bytes());
        match read_all(&bytes).await.unwrap_err().fault {
            WireFault::MessageTooLong { length: found } if at == 4 => assert_eq!(found, length),
            WireFault::PayloadTooLong { length: found } if at == 8 => assert_eq!(found, length),
            other => panic!("{other:?}"),
        }
    }
}

type Breaks<'a> = Box<dyn Fn(&mut Hello) + 'a>;

#[test]
fn impossible_hellos_are_refused_both_ways() {
    let good = hello(Some("a"), 1 << 30);
    let long = "n".repeat(NAME_MAX + 1);
    let broken: Vec<(&str, Breaks<'_>)> = vec![
        ("to.name", Box::new(|h| h.to.name.clear())),
        ("to.name", Box::new(|h| h.to.name = long.clone())),
        ("from.name", Box::new(|h| h.from.as_mut().unwrap().name = long.clone())),
        ("tool", Box::new(|h| h.tool = long.clone())),
        ("source.image", Box::new(|h| h.source.image.clear())),
        ("to.size", Box::new(|h| h.to.size = SIZE_MAX + 1)),
        ("layout", Box::new(|h| h.layout.object_size = 0)),
        ("layout", Box::new(|h| h.layout.stripe_unit = 3)),
        ("layout", Box::new(|h| h.layout.stripe_count = u64::MAX)),
    ];
    for (field, breaks) in broken {
        let mut bad = good.clone();
        breaks(&mut bad);
        match message::encode_hello(&bad).unwrap_err() {
            WireFault::Field { field: found, .. } | WireFault::NameTooLong { field: found, .. } => {
                assert_eq!(found, field);
            }
            other => panic!("{other:?}"),
        }
    }
    assert!(matches!(message::decode_hello(b"").unwrap_err(), WireFault::Field { field: "source", .. }));
    // Field 4, a number that no version has given out yet.
    let needs = [message::encode_hello(&good).unwrap(), vec![0x22, 1, 42]].concat();
    assert!(matches!(message::decode_hello(&needs).unwrap_err(), WireFault::UnknownFeature { feature: 42 }));
    // Field 200, text: ignored.
    let more = [message::encode_hello(&good).unwrap(), vec![0xc2, 0x0c, 2, b'h', b'i']].concat();
    assert_eq!(message::decode_hello(&more).unwrap(), good);
    // A name of 4 GiB that is not there.
    assert!(matches!(message::decode_hello(&[0x0a, 0xff, 0xff, 0xff, 0xff, 0x0f]), Err(WireFault::Malformed(_))));
}

#[test]
fn impossible_batches_are_refused() {
    let decode = |bytes: &[u8]| message::decode_batch(bytes).unwrap_err();
    assert!(matches!(decode(&[0x18, 7]), WireFault::Field { field: "encoding", .. }));
    assert!(matches!(decode(&[0x2a, 1, 0]), WireFault::Field { field: "gaps", .. }));
    assert!(matches!(decode(&[0x2a, 1, 0, 0x32, 1, 0]), WireFault::Field { field: "lengths", .. }));
    assert!(matches!(decode(&[0x2a, 1, 0, 0x32, 1, 3]), WireFault::Field { field: "crc32", .. }));
    assert!(matches!(decode(&[0x3a, 4, 0, 0, 0, 0]), WireFault::Field { field: "crc32", .. }));
    let overflow = [&[0x2a, 10][..], &[0xff; 9], &[1, 0x32, 1, 2]].concat();
    assert!(matches!(decode(&overflow), WireFault::Field { field: "lengths", .. }));
    let many = [&[0x32, 0x81, 0x20][..], &[2; 4097]].concat();
    assert!(matches!(decode(&many), WireFault::Batch(crate::batch::BatchFault::TooManyChunks { count: 4097 })));
}

type Expected = fn(&WireFault) -> bool;

#[tokio::test]
async fn a_writer_refuses_what_a_reader_would() {
    let good = raw_batch(0, 8192, b"data");
    let data = ChunkKind::Data { crc32: 0 };
    let broken: Vec<(EncodedBatch, Expected)> = vec![
        (EncodedBatch { sequence: 1, ..good.clone() }, |f| matches!(f, WireFault::Sequence { expected: 0, found: 1 })),
        (EncodedBatch { progress_to: 1 << 21, ..good.clone() }, |f| matches!(f, WireFault::Progress { .. })),
        (raw_batch(0, (1 << 20) - 2, b"data"), |f| matches!(f, WireFault::Progress { .. })),
        (
            EncodedBatch { chunks: vec![ChunkHeader { range: range((1 << 20) - 2, 4), kind: data }], ..good.clone() },
            |f| matches!(f, WireFault::BeyondImage { size: 0x10_0000, .. }),
        ),
        (EncodedBatch { decoded_length: 5, ..good.clone() }, |f| matches!(f, WireFault::Batch(_))),
        (EncodedBatch { payload: vec![], ..good.clone() }, |f| matches!(f, WireFault::Batch(_))),
    ];
    for (batch, expected) in broken {
        let mut writer = StreamWriter::open(Vec::new(), &hello(None, 1 << 20)).await.unwrap();
        let error = writer.write(&batch).await.unwrap_err();
        assert!(expected(&error.fault), "{error:?}");
        assert!(matches!(writer.write(&good).await.unwrap_err().fault, WireFault::Finished));
    }
    let mut writer = StreamWriter::open(Vec::new(), &hello(None, 1 << 20)).await.unwrap();
    writer.write(&good).await.unwrap();
    let behind = EncodedBatch { progress_to: 9000, ..raw_batch(1, 4096, b"data") };
    assert!(matches!(writer.write(&behind).await.unwrap_err().fault, WireFault::Unordered { .. }));
    // A reader that goes on from the progress would never see it.
    let mut writer = StreamWriter::open(Vec::new(), &hello(None, 1 << 20)).await.unwrap();
    writer.write(&EncodedBatch { progress_to: 65_536, ..good.clone() }).await.unwrap();
    let below = EncodedBatch { progress_to: 65_536, ..raw_batch(1, 32_768, b"data") };
    assert!(matches!(writer.write(&below).await.unwrap_err().fault, WireFault::Unordered { done: 65_536, .. }));
}

#[tokio::test]
async fn nothing_is_read_after_an_error_or_the_end() {
    let bytes = stream(&hello(None, 1), &[]).await;
    let mut reader = StreamReader::open(&bytes[..]).await.unwrap();
    assert!(matches!(reader.next().await, Ok(Message::End(_))));
    assert!(matches!(reader.next().await.unwrap_err().fault, WireFault::Finished));
}

#[tokio::test]
async fn a_stream_in_small_pieces_through_a_small_pipe() {
    let (writer_end, reader_end) = tokio::io::duplex(7);
    let batches = three_batches();
    let sent = batches.clone();
    let send = tokio::spawn(async move {
        let mut writer = StreamWriter::open(writer_end, &hello(None, 2 << 20)).await.unwrap();
        for batch in &sent {
            writer.write(batch).await.unwrap();
        }
        writer.finish().await.unwrap().0
    });
    let mut reader = StreamReader::open(reader_end).await.unwrap();
    for expected in batches {
        let Message::Batch(found) = reader.next().await.unwrap() else { panic!("not the end yet") };
        assert_eq!(decode(found).unwrap(), decode(expected).unwrap());
    }
    let Message::End(totals) = reader.next().await.unwrap() else { panic!("the end") };
    assert_eq!(totals, send.await.unwrap());
    reader.expect_nothing_more().await.unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn any_layout_of_chunks_survives(
        chunks in prop::collection::vec((0u64..1 << 50, 1u64..CHUNK_TEST_MAX, any::<Option<u32>>()), 0..200),
        sequence: u64,
        progress_to: u64,
    ) {
        let mut at = 0;
        let chunks: Vec<ChunkHeader> = chunks.into_iter().map(|(gap, length, crc)| {
            let length = if crc.is_some() { length % 4096 + 1 } else { length };
            let header = ChunkHeader {
                range: range(at + gap, length),
                kind: crc.map_or(ChunkKind::Zero, |crc32| ChunkKind::Data { crc32 }),
            };
            at = header.range.end();
            header
        }).collect();
        let data = chunks.iter().filter(|c| c.kind != ChunkKind::Zero);
        let decoded_length = data.map(|c| c.range.length()).sum();
        let batch =
            EncodedBatch { sequence, progress_to, chunks, encoding: Encoding::Zstd, decoded_length, payload: vec![] };
        prop_assert_eq!(message::decode_batch(&message::encode_batch(&batch)).unwrap(), batch);
    }

    #[test]
    fn noise_is_an_error(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        prop_assert!(runtime.block_on(read_all(&bytes)).is_err());
        let framed = [&frame::preamble()[..], &frame(1, 0, &bytes, b"")].concat();
        prop_assert!(runtime.block_on(read_all(&framed)).is_err());
    }
}

/// Zero ranges may be this long: 200 of them still lie within 2⁶³.
const CHUNK_TEST_MAX: u64 = 1 << 50;
