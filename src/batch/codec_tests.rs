use proptest::prelude::*;

use super::super::{LEVEL_DEFAULT, cut};
use super::*;

const ZSTD: Compression = Compression::Zstd(LEVEL_DEFAULT);

fn range(offset: u64, length: u64) -> ByteRange {
    ByteRange::new(offset, length).unwrap()
}

fn noise(length: usize) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(7);
    (0..length).map(|_| random.u8(..)).collect()
}

fn batch_of(pieces: Vec<(u64, Vec<u8>)>) -> Batch {
    let chunks: Vec<Chunk> = pieces.into_iter().flat_map(|(offset, data)| cut(offset, data.into())).collect();
    let progress_to = chunks.last().map_or(0, |chunk| chunk.range.end());
    Batch { sequence: 3, progress_to, chunks }
}

fn fault(result: Result<impl std::fmt::Debug, BatchError>) -> BatchFault {
    let error = result.unwrap_err();
    assert_eq!(error.to_string(), "batch 3 is refused");
    error.fault
}

#[test]
fn text_shrinks_and_noise_is_stored() {
    let text = batch_of(vec![(0, b"all work and no play ".repeat(5000))]);
    let encoded = encode(text.clone(), ZSTD);
    assert_eq!(encoded.encoding, Encoding::Zstd);
    assert!(encoded.payload_length() < encoded.decoded_length / 10);
    assert_eq!(decode(encoded).unwrap(), text);

    let random = batch_of(vec![(0, noise(100_000)), (200_000, noise(5))]);
    let encoded = encode(random.clone(), ZSTD);
    assert_eq!(encoded, encode(random.clone(), Compression::None), "no gain: exactly as without compression");
    assert_eq!(decode(encoded).unwrap(), random);
}

#[test]
fn nothing_is_copied_without_compression() {
    let data = Bytes::from(noise(10_000));
    let chunks = cut(0, data.clone());
    let decoded = decode(encode(Batch { sequence: 0, progress_to: 10_000, chunks }, Compression::None)).unwrap();
    let Content::Data { bytes, .. } = &decoded.chunks[0].content else { panic!("not zero") };
    assert_eq!(bytes.as_ptr(), data.as_ptr());
}

#[test]
fn empty_and_all_zero_batches_have_no_payload() {
    for chunks in [vec![], cut(0, vec![0; 1 << 20].into())] {
        let batch = Batch { sequence: 0, progress_to: 1 << 20, chunks };
        let encoded = encode(batch.clone(), ZSTD);
        assert_eq!((encoded.payload_length(), encoded.encoding), (0, Encoding::Raw));
        assert_eq!(decode(encoded).unwrap(), batch);
        batch.verify().unwrap();
    }
}

#[test]
fn decoding_refuses_lengths_that_disagree() {
    for compression in [Compression::None, ZSTD] {
        let good = encode(batch_of(vec![(0, vec![b'x'; 50_000])]), compression);
        for decoded_length in [0, 1, 49_999, 50_001, BATCH_MAX + 1, u64::MAX] {
            let bad = EncodedBatch { decoded_length, ..good.clone() };
            assert!(matches!(fault(decode(bad)), BatchFault::DataLength { .. }));
        }
        let mut bad = good.clone();
        bad.payload = vec![];
        assert!(matches!(fault(decode(bad)), BatchFault::DataLength { .. } | BatchFault::Decompress { .. }));
        let mut bad = good.clone();
        bad.payload.push(Bytes::from_static(b"tail"));
        assert!(matches!(fault(decode(bad)), BatchFault::DataLength { .. } | BatchFault::Decompress { .. }));
        for cut_at in 0..good.payload[0].len().min(200) {
            let mut bad = good.clone();
            bad.payload[0].truncate(cut_at);
            fault(decode(bad));
        }
    }
}

#[test]
fn a_bomb_is_capped_at_what_was_announced() {
    // 1 GiB of zeroes in a few kilobytes, announced as 4 KiB.
    let mut frame = Vec::new();
    let mut encoder = zstd::stream::Encoder::new(&mut frame, 1).unwrap();
    std::io::copy(&mut std::io::Read::take(std::io::repeat(0), 1 << 30), &mut encoder).unwrap();
    encoder.finish().unwrap();
    let header = ChunkHeader { range: range(0, 4096), kind: ChunkKind::Data { crc32: 0 } };
    let bomb = EncodedBatch {
        sequence: 3,
        progress_to: 4096,
        chunks: vec![header],
        encoding: Encoding::Zstd,
        decoded_length: 4096,
        payload: vec![frame.into()],
    };
    assert!(matches!(fault(decode(bomb)), BatchFault::Decompress { expected: 4096, .. }));
}

#[test]
fn limits_and_order_are_checked_first() {
    let header = |offset, length| ChunkHeader { range: range(offset, length), kind: ChunkKind::Data { crc32: 0 } };
    let of = |chunks: Vec<ChunkHeader>| EncodedBatch {
        sequence: 3,
        progress_to: 0,
        decoded_length: chunks.iter().map(|c| c.range.length()).sum(),
        chunks,
        encoding: Encoding::Zstd,
        payload: vec![],
    };
    let many = (0..=BATCH_CHUNKS_MAX as u64).map(|at| header(at, 1)).collect();
    assert!(matches!(fault(decode(of(many))), BatchFault::TooManyChunks { count: 4097 }));
    let long = vec![header(0, CHUNK_MAX + 1)];
    assert!(matches!(fault(decode(of(long))), BatchFault::ChunkTooLong { .. }));
    let much = vec![header(0, CHUNK_MAX), header(CHUNK_MAX, CHUNK_MAX), header(2 * CHUNK_MAX, 1)];
    assert!(matches!(fault(decode(of(much))), BatchFault::TooMuchData { length: 8_388_609 }));
    let overlapping = vec![header(0, 4096), header(4095, 1)];
    assert!(matches!(fault(decode(of(overlapping))), BatchFault::Unordered { previous_end: 4096, .. }));
}

#[test]
fn verification_finds_what_is_damaged() {
    let good = batch_of(vec![(4096, noise(10_000)), (1 << 20, vec![0; 9000])]);
    good.verify().unwrap();
    let set = |bytes: Bytes, crc32| {
        let mut bad = good.clone();
        bad.chunks[0].content = Content::Data { bytes, crc32 };
        fault(bad.verify())
    };
    let Content::Data { bytes, crc32 } = good.chunks[0].content.clone() else { panic!("not zero") };
    assert!(matches!(set(bytes.slice(1..), crc32), BatchFault::ChunkLength { actual: 9999, .. }));
    assert!(matches!(set(bytes.clone(), crc32 ^ 1), BatchFault::Checksum { .. }));
    let mut flipped = bytes.to_vec();
    flipped[5000] ^= 0x10;
    assert!(matches!(set(flipped.into(), crc32), BatchFault::Checksum { .. }));
    let mut swapped = good.clone();
    swapped.chunks.swap(0, 1);
    assert!(matches!(fault(swapped.verify()), BatchFault::Unordered { .. }));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn what_is_encoded_decodes(
        pieces in prop::collection::vec((1u64..5000, prop::collection::vec(any::<u8>(), 0..300), 1usize..90), 0..12),
        level in prop::option::of(-7..=19),
        cut_payload in any::<prop::sample::Index>(),
    ) {
        let mut at = 0;
        let mut placed = Vec::new();
        for (gap, unit, times) in pieces {
            at += gap;
            let data = unit.repeat(times);
            let length = data.len() as u64;
            placed.push((at, data));
            at += length;
        }
        let batch = batch_of(placed);
        batch.verify().unwrap();
        let mut encoded = encode(batch.clone(), level.map_or(Compression::None, Compression::Zstd));
        prop_assert_eq!(encoded.zero_bytes(), batch.zero_bytes());
        prop_assert_eq!(encoded.decoded_length, batch.data_bytes());
        // However the transport cuts the payload.
        let mut whole = join(encoded.payload);
        let tail = whole.split_off(cut_payload.index(whole.len() + 1));
        encoded.payload = vec![whole, tail];
        prop_assert_eq!(decode(encoded).unwrap(), batch);
    }
}
