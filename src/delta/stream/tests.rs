use proptest::prelude::*;

use super::*;

fn range(offset: u64, length: u64) -> ByteRange {
    ByteRange::new(offset, length).unwrap()
}

/// What a diff says about each byte of the image in the end: nothing, or what stands there.
type Said = Vec<Option<u8>>;

/// A record, by hand.
#[derive(Clone, Debug)]
enum Raw {
    Data(u64, Vec<u8>),
    Zero(u64, u64),
    Bytes(Vec<u8>),
}

/// A diff of either version, by hand: a second implementation of the format, from its description.
fn raw_diff(version: u8, from: Option<&str>, to: Option<&str>, size: u64, records: &[Raw]) -> Vec<u8> {
    let v2 = version == 2;
    let mut bytes = if v2 { BANNER_V2.to_vec() } else { BANNER_V1.to_vec() };
    let mut record = |tag: u8, content: &[u8]| {
        bytes.push(tag);
        if v2 {
            bytes.extend((content.len() as u64).to_le_bytes());
        }
        bytes.extend(content);
    };
    for (tag, name) in [(b'f', from), (b't', to)] {
        if let Some(name) = name {
            record(tag, &[&(name.len() as u32).to_le_bytes()[..], name.as_bytes()].concat());
        }
    }
    record(b's', &size.to_le_bytes());
    for one in records {
        match one {
            Raw::Data(offset, data) => {
                let length = (data.len() as u64).to_le_bytes();
                record(b'w', &[&offset.to_le_bytes()[..], &length, data].concat());
            }
            Raw::Zero(offset, length) => record(b'z', &[offset.to_le_bytes(), length.to_le_bytes()].concat()),
            Raw::Bytes(bytes) => record(bytes[0], &bytes[1..]),
        }
    }
    bytes.push(b'e');
    bytes
}

async fn read_all(bytes: &[u8]) -> Result<(DiffHeader, Vec<Record>), DiffError> {
    let mut reader = DiffReader::open(bytes).await?;
    let mut records = Vec::new();
    loop {
        match reader.next().await? {
            Record::End => {
                reader.expect_nothing_more().await?;
                assert_eq!(reader.bytes_read(), bytes.len() as u64);
                return Ok((reader.header().clone(), records));
            }
            record => records.push(record),
        }
    }
}

async fn fault(bytes: &[u8]) -> DiffFault {
    read_all(bytes).await.unwrap_err().fault
}

fn said(size: u64, records: &[Record]) -> Said {
    let mut said = vec![None; size as usize];
    for record in records {
        match record {
            Record::Data { offset, bytes } => {
                let at = *offset as usize;
                bytes.iter().zip(&mut said[at..at + bytes.len()]).for_each(|(&byte, place)| *place = Some(byte));
            }
            Record::Zero(range) => said[range.offset() as usize..range.end() as usize].fill(Some(0)),
            Record::End => unreachable!(),
        }
    }
    said
}

/// Does what a diff says to an image.
fn apply(image: &mut Vec<u8>, said: &Said) {
    image.resize(said.len(), 0);
    image.iter_mut().zip(said).for_each(|(byte, said)| *byte = said.unwrap_or(*byte));
}

#[tokio::test]
async fn what_is_written_is_what_rbd_writes() {
    let mut writer = DiffWriter::open(Vec::new(), Some("a"), Some("bc"), 65536).await.unwrap();
    writer.data(4096, &Bytes::from_static(b"xyz")).await.unwrap();
    writer.data(4099, &Bytes::new()).await.unwrap();
    writer.zero(range(8192, 512)).await.unwrap();
    let (bytes, length) = writer.finish().await.unwrap();
    let expected = b"rbd diff v1\nf\x01\0\0\0at\x02\0\0\0bcs\0\0\x01\0\0\0\0\0\
        w\0\x10\0\0\0\0\0\0\x03\0\0\0\0\0\0\0xyzz\0\x20\0\0\0\0\0\0\0\x02\0\0\0\0\0\0e";
    assert_eq!((&bytes[..], length), (&expected[..], expected.len() as u64));
    let (header, records) = read_all(&bytes).await.unwrap();
    let name = |name: &str| Some(name.to_owned());
    let size = 65536;
    assert_eq!(header, DiffHeader { version: DiffVersion::V1, from: name("a"), to: name("bc"), protected: None, size });
    let data = Record::Data { offset: 4096, bytes: Bytes::from_static(b"xyz") };
    assert_eq!(records, [data, Record::Zero(range(8192, 512))]);
}

#[tokio::test]
async fn version_2_is_read_with_the_length_that_lies() {
    // As rbd 16.2 writes it: the `p` record's length is 8, one byte follows.
    let mut bytes = raw_diff(2, None, Some("snap"), 4096, &[Raw::Data(0, b"abc".to_vec()), Raw::Zero(512, 512)]);
    let size_at = bytes.iter().position(|&byte| byte == b's').unwrap() + 4;
    assert_eq!(&bytes[size_at..size_at + 5], b"s\x08\0\0\0");
    bytes.splice(size_at..size_at, *b"p\x08\0\0\0\0\0\0\0\x01");
    let (header, records) = read_all(&bytes).await.unwrap();
    assert_eq!((header.protected, header.size, records.len()), (Some(true), 4096, 2));
    // What is unknown is passed over.
    let unknown = Raw::Bytes([&b"?"[..], &[7; 100_000]].concat());
    let bytes = raw_diff(2, None, None, 4096, &[unknown, Raw::Zero(0, 1)]);
    assert_eq!(read_all(&bytes).await.unwrap().1, [Record::Zero(range(0, 1))]);
}

#[tokio::test]
async fn version_2_lengths_are_held_against_the_content() {
    let good = raw_diff(2, Some("a"), Some("b"), 4096, &[Raw::Data(0, b"abc".to_vec()), Raw::Zero(512, 512)]);
    read_all(&good).await.unwrap();
    let mut at = 12;
    for tag in *b"ftswz" {
        assert_eq!(good[at], tag);
        let length = u64::from_le_bytes(good[at + 1..at + 9].try_into().unwrap());
        for wrong in [0, 1, 2, 3, length - 1, length + 1, u64::MAX] {
            let mut bytes = good.clone();
            bytes[at + 1..at + 9].copy_from_slice(&wrong.to_le_bytes());
            assert!(matches!(fault(&bytes).await, DiffFault::RecordLength { length, .. } if length == wrong));
        }
        at += 9 + length as usize;
    }
}

#[tokio::test]
async fn long_records_come_in_aligned_pieces() {
    let data: Vec<u8> = (0..PIECE_MAX as usize * 2 + 10).map(|at| (at % 251) as u8).collect();
    let start = PIECE_MAX - 3;
    let (_, records) = read_all(&raw_diff(1, None, None, 1 << 40, &[Raw::Data(start, data.clone())])).await.unwrap();
    let pieces: Vec<(u64, usize)> = records
        .iter()
        .map(|record| match record {
            Record::Data { offset, bytes } => (*offset, bytes.len()),
            other => panic!("{other:?}"),
        })
        .collect();
    let max = PIECE_MAX as usize;
    assert_eq!(pieces, [(start, 3), (PIECE_MAX, max), (2 * PIECE_MAX, max), (3 * PIECE_MAX, 7)]);
    // A record of a TiB with nothing in it costs a piece.
    let mut bytes = raw_diff(1, None, None, 1 << 40, &[]);
    bytes.pop();
    bytes.extend([&b"w"[..], &0u64.to_le_bytes(), &(1u64 << 40).to_le_bytes(), b"short"].concat());
    assert!(matches!(fault(&bytes).await, DiffFault::Truncated { within: "data" }));
}

#[tokio::test]
async fn every_truncation_is_an_error() {
    for version in [1, 2] {
        let records = [Raw::Data(0, b"abc".to_vec()), Raw::Zero(512, 512), Raw::Data(2000, vec![1; 50])];
        let bytes = raw_diff(version, Some("a"), Some("b"), 4096, &records);
        for length in 0..bytes.len() {
            let error = read_all(&bytes[..length]).await.unwrap_err();
            assert!(matches!(error.fault, DiffFault::Truncated { .. }), "{length}: {error:?}");
            assert!(error.offset <= length as u64);
        }
        let longer = [&bytes[..], b"e"].concat();
        assert!(matches!(fault(&longer).await, DiffFault::TrailingBytes));
    }
}

#[tokio::test]
async fn order_names_and_tags_are_checked() {
    let with = |text: &[u8]| [&BANNER_V1[..], text].concat();
    assert!(matches!(fault(b"rbd diff v3\n").await, DiffFault::NotADiff { .. }));
    assert!(matches!(fault(&with(b"w")).await, DiffFault::OutOfOrder { tag: 'w', .. }));
    assert!(matches!(fault(&with(b"e")).await, DiffFault::OutOfOrder { tag: 'e', .. }));
    assert!(matches!(fault(&with(b"p\x01")).await, DiffFault::UnknownTag { tag: b'p' }));
    assert!(matches!(fault(&with(b"t\x01\0\0\0af\x01\0\0\0a")).await, DiffFault::OutOfOrder { tag: 'f', .. }));
    assert!(matches!(fault(&with(b"f\x01\0\0\0af\x01\0\0\0a")).await, DiffFault::OutOfOrder { tag: 'f', .. }));
    assert!(matches!(fault(&with(b"s\0\0\0\0\0\0\0\0s")).await, DiffFault::OutOfOrder { tag: 's', .. }));
    assert!(matches!(fault(&with(b"s\0\0\0\0\0\0\0\0\n")).await, DiffFault::UnknownTag { tag: b'\n' }));
    assert!(matches!(fault(&with(b"f\0\0\0\0")).await, DiffFault::NameLength { length: 0 }));
    assert!(matches!(fault(&with(b"f\x01\x10\0\0")).await, DiffFault::NameLength { length: 4097 }));
    assert!(matches!(fault(&with(b"t\xff\xff\xff\xff")).await, DiffFault::NameLength { length: 0xffff_ffff }));
    assert!(matches!(fault(&with(b"t\x01\0\0\0\xff")).await, DiffFault::NameNotText));
}

#[tokio::test]
async fn ranges_are_checked() {
    let of = |raw: Raw| raw_diff(1, None, None, 4096, &[raw]);
    for raw in [Raw::Zero(0, 0), Raw::Data(7, vec![]), Raw::Zero(u64::MAX, 1), Raw::Zero(1, u64::MAX)] {
        assert!(matches!(fault(&of(raw)).await, DiffFault::Range { .. }));
    }
    for raw in [Raw::Zero(0, 4097), Raw::Zero(4096, 1), Raw::Data(4095, vec![1, 2]), Raw::Zero(0, 1 << 63)] {
        assert!(matches!(fault(&of(raw)).await, DiffFault::BeyondImage { size: 4096, .. }));
    }
    // Out of order is fine for a reader: rbd writes striped images so.
    let records = [Raw::Zero(2048, 10), Raw::Zero(0, 10)];
    read_all(&raw_diff(1, None, None, 4096, &records)).await.unwrap();
}

#[tokio::test]
async fn a_writer_refuses_what_merge_diff_would() {
    assert!(DiffWriter::open(Vec::new(), Some(""), None, 1).await.is_err());
    assert!(DiffWriter::open(Vec::new(), None, Some(&"n".repeat(NAME_MAX + 1)), 1).await.is_err());
    let mut writer = DiffWriter::open(Vec::new(), None, None, 4096).await.unwrap();
    writer.zero(range(100, 10)).await.unwrap();
    let error = writer.data(109, &Bytes::from_static(b"x")).await.unwrap_err();
    assert!(matches!(error.fault, DiffFault::Unordered { previous_end: 110, .. }));
    assert!(matches!(writer.zero(range(200, 1)).await.unwrap_err().fault, DiffFault::Finished));
    let mut writer = DiffWriter::open(Vec::new(), None, None, 4096).await.unwrap();
    assert!(matches!(writer.zero(range(4000, 97)).await.unwrap_err().fault, DiffFault::BeyondImage { .. }));
}

async fn merged(first: &[u8], second: &[u8]) -> Result<(Merged, Vec<u8>), MergeError> {
    let input = |input| move |source| MergeError::Input { input, source };
    let mut first = DiffReader::open(first).await.map_err(input(MergeInput::First))?;
    let mut second = DiffReader::open(second).await.map_err(input(MergeInput::Second))?;
    let mut bytes = Vec::new();
    let merged = merge(&mut first, &mut second, &mut bytes).await?;
    first.expect_nothing_more().await.map_err(input(MergeInput::First))?;
    second.expect_nothing_more().await.map_err(input(MergeInput::Second))?;
    Ok((merged, bytes))
}

#[tokio::test]
async fn only_consecutive_diffs_are_merged() {
    let of = |from, to| raw_diff(1, from, to, 16, &[]);
    let (summary, bytes) = merged(&of(Some("a"), Some("b")), &of(Some("b"), None)).await.unwrap();
    assert_eq!((summary.from.as_deref(), summary.to, summary.stream_bytes), (Some("a"), None, bytes.len() as u64));
    for (first_to, second_from) in [(Some("b"), Some("c")), (Some("b"), None), (None, Some("b")), (None, None)] {
        let error = merged(&of(None, first_to), &of(second_from, Some("z"))).await.unwrap_err();
        assert!(matches!(error, MergeError::NotConsecutive { .. }));
        let point = second_from.map_or("an empty image".into(), |name| format!("snapshot {name:?}"));
        assert!(error.to_string().contains(&format!("begins at {point}")), "{error}");
    }
}

#[tokio::test]
async fn merging_names_the_input_that_is_at_fault() {
    let good = raw_diff(1, Some("a"), Some("b"), 100, &[Raw::Zero(0, 1)]);
    let disordered = raw_diff(1, Some("b"), Some("c"), 100, &[Raw::Zero(10, 5), Raw::Zero(14, 1)]);
    match merged(&good, &disordered).await.unwrap_err() {
        MergeError::Input { input: MergeInput::Second, source } => {
            assert!(matches!(source.fault, DiffFault::Unordered { previous_end: 15, .. }));
            assert_eq!(source.offset, disordered.len() as u64 - 18);
        }
        other => panic!("{other:?}"),
    }
    let second = raw_diff(1, Some("b"), Some("c"), 100, &[]);
    let error = merged(&good[..good.len() - 1], &second).await.unwrap_err();
    assert!(matches!(error, MergeError::Input { input: MergeInput::First, .. }));
}

/// Ascending records within a size, of bytes from `alphabet`.
fn some_records(size: u64, alphabet: std::ops::Range<u8>) -> impl Strategy<Value = Vec<Raw>> {
    let one = (0u64..40, 1u64..40, prop::option::of(alphabet));
    prop::collection::vec(one, 0..10).prop_map(move |steps| {
        let mut at = 0;
        let mut records = Vec::new();
        for (gap, length, byte) in steps {
            let start = at + gap;
            at = (start + length).min(size);
            if start >= at {
                break;
            }
            records.push(match byte {
                Some(byte) => Raw::Data(start, vec![byte; (at - start) as usize]),
                None => Raw::Zero(start, at - start),
            });
        }
        records
    })
}

/// Two consecutive diffs: each one's size and records.
fn some_pair() -> impl Strategy<Value = [(u64, Vec<Raw>); 2]> {
    (1u64..300, 1u64..300).prop_flat_map(|(first, second)| {
        let records = (some_records(first, 65..70), some_records(second, 97..102));
        records.prop_map(move |(older, newer)| [(first, older), (second, newer)])
    })
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().build().unwrap()
}

/// What the merged diff says, and what each of its inputs says.
fn merge_pair([(size_1, records_1), (size_2, records_2)]: &[(u64, Vec<Raw>); 2]) -> (Said, [Said; 2]) {
    let files =
        [raw_diff(1, Some("a"), Some("b"), *size_1, records_1), raw_diff(1, Some("b"), Some("c"), *size_2, records_2)];
    runtime().block_on(async {
        let (summary, bytes) = merged(&files[0], &files[1]).await.unwrap();
        let (header, records) = read_all(&bytes).await.unwrap();
        assert_eq!((header.size, summary.size), (*size_2, *size_2));
        let of = |size, file: Vec<u8>| async move { said(size, &read_all(&file).await.unwrap().1) };
        let inputs = [of(*size_1, files[0].clone()).await, of(*size_2, files[1].clone()).await];
        (said(header.size, &records), inputs)
    })
}

proptest! {
    #[test]
    fn a_merged_diff_does_what_both_do(pair in some_pair(), base in prop::collection::vec(1u8..9, 1..300)) {
        let (merged, [first, second]) = merge_pair(&pair);
        let (mut in_turn, mut at_once) = (base.clone(), base);
        apply(&mut in_turn, &first);
        apply(&mut in_turn, &second);
        apply(&mut at_once, &merged);
        prop_assert_eq!(in_turn, at_once);
    }

    #[test]
    fn noise_never_passes_for_a_diff_nor_panics(
        version in 1u8..3,
        noise in prop::collection::vec(prop_oneof![Just(b'w'), Just(b'z'), Just(b's'), Just(0u8), any::<u8>()], 0..200),
    ) {
        let banner = if version == 1 { BANNER_V1 } else { BANNER_V2 };
        let bytes = [&banner[..], &noise].concat();
        // Noise can be a diff by chance; then it is one byte for byte.
        if let Ok((_, records)) = runtime().block_on(read_all(&bytes)) {
            prop_assert!(noise.ends_with(b"e") && records.len() <= noise.len() / 17);
        }
    }
}
