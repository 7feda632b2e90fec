//! Hostile streams: whatever is done to a stream, reading it is an error, or gives what the stream says and nothing
//! else; it never panics, and never allocates what a length merely claims. And rbd's own merge-diff, as a second
//! opinion.

use std::path::Path;
use std::process::Command;

use bytes::Bytes;
use poolshift::batch::{BATCH_MAX, Batch, CHUNK_MAX, Compression, EncodedBatch, cut, decode, encode};
use poolshift::delta::stream::{DiffReader, DiffWriter, PIECE_MAX, Record, merge};
use poolshift::extent::ByteRange;
use poolshift::image::{ImageIdentity, Layout, Snapshot};
use poolshift::wire::{Hello, Message, StreamReader, StreamWriter, inspect};
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;

type AnyError = Box<dyn std::error::Error>;

fn run<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().build().expect("a runtime starts").block_on(future)
}

fn golden(name: &str) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("proto/golden").join(name);
    let text = std::fs::read_to_string(path).expect("the golden file can be read");
    text.lines().filter(|line| !line.starts_with('#')).flat_map(|line| hex::decode(line).expect("hex")).collect()
}

/// A stream of some batches with everything in them, compressed or not.
fn some_stream(compression: Compression) -> Vec<u8> {
    let size = 1 << 20;
    let hello = Hello {
        tool: Hello::this_tool(),
        source: ImageIdentity { cluster: "c".into(), pool: "1/ns".into(), image: "i".into() },
        location: "rbd:sata/ns/vm".into(),
        from: Some(Snapshot { id: 1, name: "one".into(), size: 4096 }),
        to: Snapshot { id: 2, name: "two".into(), size },
        layout: Layout::DEFAULT,
        compression: compression.to_string(),
    };
    run(async {
        let mut writer = StreamWriter::open(Vec::new(), &hello).await.expect("a stream begins");
        for sequence in 0..4 {
            let start = sequence * (size / 4);
            let data = [b"text ".repeat(1000), vec![0; 9000], vec![sequence as u8 + 1; 300]].concat();
            let batch = Batch { sequence, progress_to: start + size / 4, chunks: cut(start, data.into()) };
            writer.write(&encode(batch, compression)).await.expect("a batch is written");
        }
        writer.finish().await.expect("a stream ends").1
    })
}

/// All that a batch stream says, if it is whole and every checksum in it is right.
async fn read_batches(bytes: &[u8]) -> Result<(Hello, Vec<Batch>), AnyError> {
    let mut reader = StreamReader::open(bytes).await?;
    let mut batches = Vec::new();
    loop {
        match reader.next().await? {
            Message::Batch(encoded) => {
                let batch = decode(encoded)?;
                batch.verify()?;
                batches.push(batch);
            }
            Message::End(_) => {
                reader.expect_nothing_more().await?;
                return Ok((reader.hello().clone(), batches));
            }
        }
    }
}

/// What holds of every batch stream that was read without an error, whoever made it.
fn check_batches(hello: &Hello, batches: &[Batch]) {
    let mut end = 0;
    for (sequence, batch) in batches.iter().enumerate() {
        assert_eq!(batch.sequence, sequence as u64);
        assert!(batch.data_bytes() <= BATCH_MAX);
        for chunk in &batch.chunks {
            assert!(chunk.range.offset() >= end);
            end = chunk.range.end();
        }
    }
    assert!(end <= hello.to.size);
}

async fn read_diff(bytes: &[u8]) -> Result<(u64, Vec<Record>), AnyError> {
    let mut reader = DiffReader::open(bytes).await?;
    let mut records = Vec::new();
    loop {
        match reader.next().await? {
            Record::End => {
                reader.expect_nothing_more().await?;
                return Ok((reader.header().size, records));
            }
            record => records.push(record),
        }
    }
}

/// What holds of every diff that was read without an error, whoever made it.
fn check_diff(size: u64, records: &[Record], input: &[u8]) {
    let mut data_bytes = 0;
    for record in records {
        match record {
            Record::Data { offset, bytes } => {
                assert!(!bytes.is_empty() && bytes.len() as u64 <= PIECE_MAX);
                assert!(offset + bytes.len() as u64 <= size);
                data_bytes += bytes.len();
            }
            Record::Zero(range) => assert!(range.end() <= size),
            Record::End => unreachable!(),
        }
    }
    assert!(data_bytes < input.len());
}

/// Something that happens to bytes.
#[derive(Clone, Debug)]
enum Harm {
    Truncate(prop::sample::Index),
    FlipBit(prop::sample::Index, u8),
    Number(prop::sample::Index, u64, usize),
    Remove(prop::sample::Index, usize),
    Double(prop::sample::Index, usize),
    Swap(prop::sample::Index, prop::sample::Index, usize),
    Insert(prop::sample::Index, Vec<u8>),
}

fn some_harm() -> impl Strategy<Value = Harm> {
    let at = any::<prop::sample::Index>;
    let number = prop_oneof![0u64..4, Just(u64::MAX), Just(1 << 63), Just(0xffff_ffff), Just(4097), any::<u64>()];
    prop_oneof![
        at().prop_map(Harm::Truncate),
        (at(), 0u8..8).prop_map(|(at, bit)| Harm::FlipBit(at, bit)),
        (at(), number, prop_oneof![Just(1usize), Just(2), Just(4), Just(8)])
            .prop_map(|(a, n, w)| Harm::Number(a, n, w)),
        (at(), 1usize..600).prop_map(|(at, length)| Harm::Remove(at, length)),
        (at(), 1usize..600).prop_map(|(at, length)| Harm::Double(at, length)),
        (at(), at(), 1usize..100).prop_map(|(a, b, length)| Harm::Swap(a, b, length)),
        (at(), prop::collection::vec(any::<u8>(), 1..40)).prop_map(|(at, noise)| Harm::Insert(at, noise)),
    ]
}

fn do_harm(bytes: &mut Vec<u8>, harm: &Harm) {
    if bytes.is_empty() {
        return;
    }
    let length = bytes.len();
    let part = |at: &prop::sample::Index, wanted: usize| {
        let start = at.index(length);
        start..length.min(start + wanted)
    };
    match harm {
        Harm::Truncate(at) => bytes.truncate(at.index(length)),
        Harm::FlipBit(at, bit) => bytes[at.index(length)] ^= 1 << bit,
        Harm::Number(at, number, width) => {
            let place = part(at, *width);
            let count = place.len();
            bytes[place].copy_from_slice(&number.to_le_bytes()[..count]);
        }
        Harm::Remove(at, wanted) => drop(bytes.drain(part(at, *wanted))),
        Harm::Double(at, wanted) => {
            let place = part(at, *wanted);
            let copy = bytes[place.clone()].to_vec();
            bytes.splice(place.end..place.end, copy);
        }
        Harm::Swap(a, b, wanted) => {
            let (a, b) = (part(a, *wanted), part(b, *wanted));
            (0..a.len().min(b.len())).for_each(|at| bytes.swap(a.start + at, b.start + at));
        }
        Harm::Insert(at, noise) => drop(bytes.splice(part(at, 0), noise.iter().copied())),
    }
}

/// The frames of a stream as `proto/README.md` describes them: kind, flags, message, payload.
type Frame = (u16, u16, Vec<u8>, Vec<u8>);

fn frames(stream: &[u8]) -> Vec<Frame> {
    let mut frames = Vec::new();
    let mut rest = &stream[12..];
    while !rest.is_empty() {
        let u16_at = |at: usize| u16::from_le_bytes(rest[at..at + 2].try_into().expect("two bytes"));
        let u32_at = |at: usize| u32::from_le_bytes(rest[at..at + 4].try_into().expect("four bytes")) as usize;
        let (message, payload) = rest[16..16 + u32_at(4) + u32_at(8)].split_at(u32_at(4));
        frames.push((u16_at(0), u16_at(2), message.to_vec(), payload.to_vec()));
        rest = &rest[16 + message.len() + payload.len()..];
    }
    frames
}

/// A stream of these frames whose checksums and digest are right, as one would make who means harm.
fn seal(preamble: &[u8], frames: &[Frame]) -> Vec<u8> {
    let mut stream = preamble[..12].to_vec();
    for (kind, flags, message, payload) in frames {
        let mut message = message.clone();
        // An End's last field is its digest, 32 bytes long.
        if let (3, Some(at)) = (*kind, message.len().checked_sub(32)) {
            message[at..].copy_from_slice(blake3::hash(&stream).as_bytes());
        }
        let mut head = [kind.to_le_bytes(), flags.to_le_bytes()].concat();
        head.extend((message.len() as u32).to_le_bytes());
        head.extend((payload.len() as u32).to_le_bytes());
        let crc = crc32fast::hash(&[&head[..], &message].concat());
        head.extend(crc.to_le_bytes());
        stream.extend([&head[..], &message, payload].concat());
    }
    stream
}

#[test]
fn golden_streams_are_read_and_sealed_as_described() {
    for name in ["empty.hex", "incremental.hex", "zstd.hex"] {
        let stream = golden(name);
        let (hello, batches) = run(read_batches(&stream)).expect("a golden stream is sound");
        check_batches(&hello, &batches);
        assert_eq!(hex::encode(seal(&stream, &frames(&stream))), hex::encode(&stream), "{name}");
        for length in 0..stream.len() {
            assert!(run(read_batches(&stream[..length])).is_err(), "{name} cut to {length}");
        }
    }
}

#[test]
fn a_harmed_batch_stream_is_an_error_or_the_same() {
    let streams = [golden("incremental.hex"), some_stream(Compression::Zstd(1)), some_stream(Compression::None)];
    let originals: Vec<_> = streams.iter().map(|stream| run(read_batches(stream)).expect("sound")).collect();
    proptest!(ProptestConfig::with_cases(2000), |(which in 0..streams.len(), harm in some_harm())| {
        let mut stream = streams[which].clone();
        do_harm(&mut stream, &harm);
        if let Ok(found) = run(read_batches(&stream)) {
            prop_assert_eq!(&stream, &streams[which], "harm without effect");
            prop_assert_eq!(&found, &originals[which]);
        }
        let inspected = run(inspect(&stream[..]));
        prop_assert_eq!(inspected.is_ok(), stream == streams[which]);
    });
}

#[test]
fn a_forged_batch_stream_is_an_error_or_sound() {
    let streams = [golden("incremental.hex"), golden("zstd.hex"), some_stream(Compression::Zstd(1))];
    let taken = std::cell::Cell::new(0);
    let forged = (
        0..streams.len(),
        any::<prop::sample::Index>(),
        any::<bool>(),
        prop::collection::vec(some_harm(), 1..3),
        prop::option::of((any::<prop::sample::Index>(), any::<u16>(), any::<u16>())),
    );
    proptest!(ProptestConfig::with_cases(3000), |((which, frame, in_message, harms, header) in forged)| {
        let mut frames = frames(&streams[which]);
        let at = frame.index(frames.len());
        let part = if in_message { &mut frames[at].2 } else { &mut frames[at].3 };
        harms.iter().for_each(|harm| do_harm(part, harm));
        if let Some((at, kind, flags)) = header {
            let at = at.index(frames.len());
            (frames[at].0, frames[at].1) = (kind % 6, flags);
        }
        if let Ok((hello, batches)) = run(read_batches(&seal(&streams[which], &frames))) {
            check_batches(&hello, &batches);
            taken.set(taken.get() + 1);
        }
    });
    assert!(taken.get() > 0, "some forgeries are sound, or nothing behind the checksums was tried");
}

#[test]
fn frames_in_another_order_are_refused_even_with_right_checksums() {
    let stream = some_stream(Compression::None);
    let frames = frames(&stream);
    let refused = |frames: &[Frame]| run(read_batches(&seal(&stream, frames))).is_err();
    assert!(!refused(&frames));
    for one in 0..frames.len() {
        let mut fewer = frames.clone();
        fewer.remove(one);
        assert!(refused(&fewer), "without frame {one}");
        let mut more = frames.clone();
        more.insert(one, frames[one].clone());
        assert!(refused(&more), "frame {one} twice");
        for other in 0..one {
            let mut swapped = frames.clone();
            swapped.swap(one, other);
            assert!(refused(&swapped), "frames {other} and {one} exchanged");
        }
    }
}

#[test]
fn a_decompression_bomb_is_no_more_than_it_announces() {
    // A GiB of zeroes in some tens of kilobytes, announced as what a batch may hold.
    let mut bomb = Vec::new();
    let mut encoder = zstd::stream::Encoder::new(&mut bomb, 1).expect("zstd");
    std::io::copy(&mut std::io::Read::take(std::io::repeat(0), 1 << 30), &mut encoder).expect("zstd compresses");
    encoder.finish().expect("zstd finishes");
    let chunks = cut(0, vec![1; CHUNK_MAX as usize].into());
    let honest = encode(Batch { sequence: 0, progress_to: CHUNK_MAX, chunks }, Compression::Zstd(1));
    decode(honest.clone()).expect("sound");
    let error = decode(EncodedBatch { payload: vec![bomb.into()], ..honest }).expect_err("a bomb");
    assert!(format!("{:?}", error.fault).starts_with("Decompress"), "{error:?}");
}

/// A diff, written by hand so that it can be harmed.
fn some_diff() -> Vec<u8> {
    run(async {
        let mut writer = DiffWriter::open(Vec::new(), Some("one"), Some("two"), 1 << 20).await.expect("a diff begins");
        for at in 0..8u64 {
            writer.data(at * 65536, &Bytes::from(vec![at as u8; 100])).await.expect("data");
            writer.zero(ByteRange::new(at * 65536 + 4096, 8192).expect("a range")).await.expect("zeroes");
        }
        writer.finish().await.expect("a diff ends").0
    })
}

/// The same in version 2.
fn some_diff_v2() -> Vec<u8> {
    let mut bytes = b"rbd diff v2\nt\x07\0\0\0\0\0\0\0\x03\0\0\0twop\x08\0\0\0\0\0\0\0\x01".to_vec();
    bytes.extend(b"s\x08\0\0\0\0\0\0\0\0\0\x10\0\0\0\0\0");
    for at in 0..8u64 {
        bytes.extend(b"w\x74\0\0\0\0\0\0\0");
        bytes.extend([&(at * 65536).to_le_bytes()[..], &100u64.to_le_bytes(), &[at as u8; 100]].concat());
        bytes.extend(b"z\x10\0\0\0\0\0\0\0");
        bytes.extend([(at * 65536 + 4096).to_le_bytes(), 8192u64.to_le_bytes()].concat());
    }
    bytes.push(b'e');
    bytes
}

#[test]
fn a_harmed_diff_is_an_error_or_sound() {
    let diffs = [some_diff(), some_diff_v2()];
    for diff in &diffs {
        run(read_diff(diff)).expect("sound");
        for length in 0..diff.len() {
            assert!(run(read_diff(&diff[..length])).is_err(), "cut to {length}");
        }
    }
    let some_harms = prop::collection::vec(some_harm(), 1..3);
    proptest!(ProptestConfig::with_cases(3000), |(which in 0..diffs.len(), harms in some_harms)| {
        let mut diff = diffs[which].clone();
        harms.iter().for_each(|harm| do_harm(&mut diff, harm));
        if let Ok((size, records)) = run(read_diff(&diff)) {
            check_diff(size, &records, &diff);
        }
        drop(run(inspect(&diff[..])));
        // As either side of a merge.
        for (first, second) in [(&diff, &diffs[0]), (&diffs[0], &diff)] {
            run(async {
                let (Ok(mut first), Ok(mut second)) =
                    (DiffReader::open(&first[..]).await, DiffReader::open(&second[..]).await)
                else {
                    return;
                };
                drop(merge(&mut first, &mut second, tokio::io::sink()).await);
            });
        }
    });
}

#[test]
fn names_of_4_gib_are_refused_by_their_length() {
    let error = run(read_diff(b"rbd diff v1\nf\xff\xff\xff\xff")).expect_err("too long");
    assert!(format!("{error:?}").contains("NameLength"), "{error:?}");
    let mut stream = golden("empty.hex");
    stream[16..20].copy_from_slice(&u32::MAX.to_le_bytes());
    let error = run(read_batches(&stream)).expect_err("too long");
    assert!(format!("{error:?}").contains("MessageTooLong"), "{error:?}");
}

/// What a diff says about each byte: nothing, or what stands there in the end.
fn said(size: u64, records: &[Record]) -> Vec<Option<u8>> {
    let mut said = vec![None; size as usize];
    for record in records {
        match record {
            Record::Data { offset, bytes } => {
                let at = *offset as usize;
                bytes.iter().zip(&mut said[at..]).for_each(|(&byte, place)| *place = Some(byte));
            }
            Record::Zero(range) => said[range.offset() as usize..range.end() as usize].fill(Some(0)),
            Record::End => unreachable!(),
        }
    }
    said
}

/// A diff of small records: a gap, a length, and a byte or zeroes for each.
async fn small_diff(from: &str, to: &str, size: u64, steps: &[(u64, u64, Option<u8>)]) -> Vec<u8> {
    let mut writer = DiffWriter::open(Vec::new(), Some(from), Some(to), size).await.expect("a diff begins");
    let mut at = 0;
    for (gap, length, byte) in steps {
        let Some(range) = ByteRange::between(at + gap, size.min(at + gap + length)) else { break };
        at = range.end();
        match byte {
            Some(byte) => {
                writer.data(range.offset(), &vec![*byte; range.length() as usize].into()).await.expect("data")
            }
            None => writer.zero(range).await.expect("zeroes"),
        }
    }
    writer.finish().await.expect("a diff ends").0
}

/// The installed `rbd merge-diff`, which needs no cluster, makes the same of the same files, resizes in either
/// direction included; and reads what is written here.
#[test]
#[ignore = "needs the rbd command"]
fn merging_agrees_with_rbd() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let path = |name: &str| dir.path().join(name);
    std::fs::write(path("conf"), "").expect("a file is written");
    let steps = || prop::collection::vec((0u64..40, 1u64..40, prop::option::of(1u8..200)), 0..10);
    let pairs = (1u64..300, 1u64..300, steps(), steps());
    let mut runner = TestRunner::deterministic();
    for _ in 0..50 {
        let (size_1, size_2, steps_1, steps_2) = pairs.new_tree(&mut runner).expect("a value").current();
        let (first, second, ours) = run(async {
            let first = small_diff("a", "b", size_1, &steps_1).await;
            let second = small_diff("b", "c", size_2, &steps_2).await;
            let mut older = DiffReader::open(&first[..]).await.expect("sound");
            let mut newer = DiffReader::open(&second[..]).await.expect("sound");
            let mut ours = Vec::new();
            merge(&mut older, &mut newer, &mut ours).await.expect("consecutive");
            (first, second, ours)
        });
        std::fs::write(path("first"), &first).expect("a file is written");
        std::fs::write(path("second"), &second).expect("a file is written");
        let mut rbd = Command::new("rbd");
        rbd.arg("--conf").arg(path("conf")).args(["merge-diff", "--no-progress"]);
        let done = rbd.args([path("first"), path("second"), path("merged")]).output().expect("rbd runs");
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        let theirs = std::fs::read(path("merged")).expect("rbd has written it");
        std::fs::remove_file(path("merged")).expect("it can be removed");
        let of = |diff: &[u8]| {
            let (size, records) = run(read_diff(diff)).expect("sound");
            said(size, &records)
        };
        assert_eq!(of(&ours), of(&theirs), "{size_1} {steps_1:?}, then {size_2} {steps_2:?}");
    }
}
