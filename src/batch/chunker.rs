//! Cuts what was read into chunks of data and of zeroes.

use bytes::Bytes;

use super::{CHUNK_MAX, Chunk, Content, ZERO_BLOCK};
use crate::extent::ByteRange;

/// The most chunks into which one [`CHUNK_MAX`] piece is cut: on 4 MiB that is one for 16 KiB on average. Below that
/// the cost of a write request outweighs what the zeroes in between would save.
pub(super) const RUNS_MAX: usize = 256;

/// Compared against, since `memcmp` is vectorised in every build profile and stops at the first difference.
static ZEROES: [u8; ZERO_BLOCK as usize] = [0; ZERO_BLOCK as usize];

/// Whether all bytes are zero. Stops within 4 KiB of the first that is not.
pub fn is_zero(bytes: &[u8]) -> bool {
    bytes.chunks(ZEROES.len()).all(|block| block == &ZEROES[..block.len()])
}

/// Cuts `data`, read at `offset`, into chunks that cover it exactly, in ascending order, without copying.
///
/// Zeroes are found in blocks of [`ZERO_BLOCK`] at absolute multiples of it; the part of a block at the start or end
/// of the range counts as a block. Data never crosses a multiple of [`CHUNK_MAX`], so no chunk is longer; neighbouring
/// zeroes are one chunk, however long. The CRC-32 of data is taken here, from the bytes as they are in `data`.
///
/// Fragmentation is bounded: where a [`CHUNK_MAX`] piece would fall apart into more than 256 chunks, its least zero
/// run is doubled (4 KiB, 8 KiB, 16 KiB, …) until it doesn't, and shorter runs stay in the data around them.
///
/// `offset + data.len()` must fit in a `u64`, as the end of every [`ByteRange`] does.
pub fn cut(offset: u64, data: Bytes) -> Vec<Chunk> {
    let mut chunks = Vec::new();
    let Ok(whole) = ByteRange::new(offset, data.len() as u64) else {
        debug_assert!(data.is_empty(), "{} bytes at {offset} end beyond 64 bits", data.len());
        return chunks;
    };
    for piece in whole.split_at_multiples(CHUNK_MAX) {
        let start = (piece.offset() - offset) as usize;
        cut_piece(piece, data.slice(start..start + piece.length() as usize), &mut chunks);
    }
    chunks
}

/// A run of blocks of one kind, in bytes from the start of the piece.
#[derive(Clone, Copy)]
struct Run {
    start: usize,
    end: usize,
    zero: bool,
}

fn cut_piece(piece: ByteRange, data: Bytes, chunks: &mut Vec<Chunk>) {
    let mut runs = block_runs(piece.offset(), &data);
    let mut least_zero_run = ZERO_BLOCK as usize;
    while runs.len() > RUNS_MAX {
        least_zero_run *= 2;
        runs = absorb_short_zeroes(&runs, least_zero_run);
    }
    for run in runs {
        // A run is never empty, and lies within the piece.
        let Some(range) = ByteRange::between(piece.offset() + run.start as u64, piece.offset() + run.end as u64) else {
            continue;
        };
        match chunks.last_mut() {
            Some(Chunk { range: last, content: Content::Zero }) if run.zero && last.end() == range.offset() => {
                *last = ByteRange::between(last.offset(), range.end()).unwrap_or(*last);
            }
            _ if run.zero => chunks.push(Chunk { range, content: Content::Zero }),
            _ => {
                let bytes = data.slice(run.start..run.end);
                let crc32 = crc32fast::hash(&bytes);
                chunks.push(Chunk { range, content: Content::Data { bytes, crc32 } });
            }
        }
    }
}

/// The runs of zero and other blocks in `data`, which starts at the absolute `offset`.
fn block_runs(offset: u64, data: &[u8]) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    let mut start = 0;
    let mut end = data.len().min((ZERO_BLOCK - offset % ZERO_BLOCK) as usize);
    while start < end {
        let zero = is_zero(&data[start..end]);
        push_run(&mut runs, Run { start, end, zero });
        (start, end) = (end, data.len().min(end + ZERO_BLOCK as usize));
    }
    runs
}

fn absorb_short_zeroes(runs: &[Run], least_zero_run: usize) -> Vec<Run> {
    let mut joined = Vec::with_capacity(runs.len());
    for &run in runs {
        push_run(&mut joined, Run { zero: run.zero && run.end - run.start >= least_zero_run, ..run });
    }
    joined
}

fn push_run(runs: &mut Vec<Run>, run: Run) {
    match runs.last_mut() {
        Some(last) if last.zero == run.zero => last.end = run.end,
        _ => runs.push(run),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const BLOCK: usize = ZERO_BLOCK as usize;

    /// Every property that the documentation states, checked against the bytes.
    fn check(offset: u64, data: &[u8]) -> Vec<Chunk> {
        let chunks = cut(offset, Bytes::copy_from_slice(data));
        let mut at = offset;
        for (index, Chunk { range, content }) in chunks.iter().enumerate() {
            assert_eq!(range.offset(), at, "chunks cover the range without gaps");
            at = range.end();
            let expected = &data[(range.offset() - offset) as usize..(range.end() - offset) as usize];
            match content {
                Content::Zero => {
                    assert!(expected.iter().all(|&byte| byte == 0));
                    let before_is_zero = index > 0 && chunks[index - 1].content == Content::Zero;
                    assert!(!before_is_zero, "neighbouring zeroes are one chunk");
                }
                Content::Data { bytes, crc32 } => {
                    assert_eq!(bytes, expected);
                    assert_eq!(*crc32, crc32fast::hash(expected));
                    assert_eq!(range.offset() / CHUNK_MAX, (range.end() - 1) / CHUNK_MAX);
                    let blank = expected.iter().all(|&byte| byte == 0);
                    assert!(!blank || range.length() < ZERO_BLOCK * 2, "a whole chunk of zeroes is no data");
                }
            }
        }
        assert_eq!(at, offset + data.len() as u64);
        chunks
    }

    fn kinds(chunks: &[Chunk]) -> Vec<(u64, u64, bool)> {
        chunks.iter().map(|c| (c.range.offset(), c.range.length(), c.content == Content::Zero)).collect()
    }

    #[test]
    fn nothing_gives_nothing_and_one_byte_one_chunk() {
        assert!(cut(5, Bytes::new()).is_empty());
        assert_eq!(kinds(&check(4095, &[0])), [(4095, 1, true)]);
        assert_eq!(kinds(&check(4095, &[7])), [(4095, 1, false)]);
        assert_eq!(kinds(&check(u64::MAX - 3, &[7, 0, 0])), [(u64::MAX - 3, 3, false)]);
    }

    #[test]
    fn blocks_are_absolute_and_partial_ones_count() {
        let mut data = vec![0; 100 + BLOCK + 50];
        data[100] = 1;
        assert_eq!(kinds(&check(3996, &data)), [(3996, 100, true), (4096, 4096, false), (8192, 50, true)]);
        data[99] = 1;
        assert_eq!(kinds(&check(3996, &data)), [(3996, 4196, false), (8192, 50, true)]);
    }

    #[test]
    fn data_is_cut_at_multiples_of_the_chunk_and_zeroes_are_not() {
        let max = CHUNK_MAX as usize;
        let data = vec![9; max + BLOCK];
        assert_eq!(
            kinds(&check(CHUNK_MAX - 8192, &data)),
            [(CHUNK_MAX - 8192, 8192, false), (CHUNK_MAX, CHUNK_MAX - 4096, false)]
        );
        assert_eq!(kinds(&check(512, &vec![0; 3 * max])), [(512, 3 * CHUNK_MAX, true)]);
    }

    #[test]
    fn fragments_are_bounded_by_keeping_the_shortest_zeroes() {
        // Alternating blocks: 1024 runs; with 8 KiB as the least zero run nothing is left of the zeroes.
        let mut data = vec![0; CHUNK_MAX as usize];
        for block in data.chunks_mut(2 * BLOCK) {
            block[0] = 1;
        }
        assert_eq!(kinds(&check(0, &data)), [(0, CHUNK_MAX, false)]);
        // 128 zero runs of 16 KiB survive where 4 KiB ones between them don't.
        for (index, block) in data.chunks_mut(BLOCK).enumerate() {
            block.fill(if index % 8 < 4 || index % 8 == 6 { 0 } else { 1 });
        }
        assert_eq!(check(0, &data).len(), 256);
        assert!(check(2048, &data).len() <= 2 * RUNS_MAX);
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]
        #[test]
        fn every_pattern_is_covered_exactly(
            offset in 0..3 * CHUNK_MAX,
            blocks in prop::collection::vec((prop_oneof![Just(0u8), Just(0u8), 1u8..4], 1usize..9000), 0..900),
        ) {
            let data: Vec<u8> = blocks.iter().flat_map(|&(byte, length)| vec![byte; length]).collect();
            let chunks = check(offset, &data);
            let pieces = data.len() / CHUNK_MAX as usize + 2;
            prop_assert!(chunks.len() <= pieces * RUNS_MAX);
        }

        #[test]
        fn one_byte_makes_it_not_zero(length in 1usize..20_000, at in any::<prop::sample::Index>()) {
            let mut data = vec![0; length];
            prop_assert!(is_zero(&data));
            data[at.index(length)] = 1;
            prop_assert!(!is_zero(&data));
        }
    }
}
