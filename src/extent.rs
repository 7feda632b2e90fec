//! Byte ranges and extents: the arithmetic that every other layer stands on.
//!
//! All offsets and lengths are bytes from the start of an image. A [`ByteRange`] is never empty and its end never
//! overflows, so that code which holds one needs no further check; every number from outside goes through
//! [`ByteRange::new`].

use std::fmt;

use serde::{Deserialize, Serialize};

/// A non-empty range of bytes of an image, `offset .. offset + length`, whose end fits in a `u64`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "RawRange")]
pub struct ByteRange {
    offset: u64,
    length: u64,
}

#[derive(Deserialize)]
struct RawRange {
    offset: u64,
    length: u64,
}

impl TryFrom<RawRange> for ByteRange {
    type Error = InvalidRange;
    fn try_from(raw: RawRange) -> Result<Self, InvalidRange> {
        Self::new(raw.offset, raw.length)
    }
}

/// An offset and a length that make no range: nothing in it, or an end beyond what 64 bits can say.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no such byte range: offset {offset}, length {length}")]
pub struct InvalidRange {
    /// The offset, in bytes.
    pub offset: u64,
    /// The length, in bytes.
    pub length: u64,
}

impl ByteRange {
    /// The range of `length` bytes at `offset`, unless it is empty or its end overflows.
    pub fn new(offset: u64, length: u64) -> Result<Self, InvalidRange> {
        if length == 0 || offset.checked_add(length).is_none() {
            return Err(InvalidRange { offset, length });
        }
        Ok(Self { offset, length })
    }

    /// The range `start .. end`, or `None` when that is empty.
    pub fn between(start: u64, end: u64) -> Option<Self> {
        (start < end).then(|| Self { offset: start, length: end - start })
    }

    /// The first byte.
    pub fn offset(self) -> u64 {
        self.offset
    }

    /// How many bytes; at least one.
    pub fn length(self) -> u64 {
        self.length
    }

    /// The first byte after the range.
    pub fn end(self) -> u64 {
        self.offset + self.length
    }

    /// The part that both ranges share.
    pub fn intersect(self, other: Self) -> Option<Self> {
        Self::between(self.offset.max(other.offset), self.end().min(other.end()))
    }

    /// The part below `size`.
    pub fn clip(self, size: u64) -> Option<Self> {
        Self::between(self.offset, self.end().min(size))
    }

    /// The range widened to multiples of `unit`, and not beyond `size`.
    pub fn align_outward(self, unit: u64, size: u64) -> Self {
        let start = self.offset / unit * unit;
        let end = self.end().checked_next_multiple_of(unit).unwrap_or(u64::MAX).min(size.max(self.end()));
        Self { offset: start, length: end - start }
    }

    /// The range cut at every multiple of `unit`, in ascending order.
    pub fn split_at_multiples(self, unit: u64) -> impl Iterator<Item = ByteRange> {
        let mut start = self.offset;
        std::iter::from_fn(move || {
            let next = (start / unit + 1).saturating_mul(unit).min(self.end());
            let piece = Self::between(start, next)?;
            start = next;
            Some(piece)
        })
    }
}

impl fmt::Display for ByteRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}+{}", self.offset, self.length)
    }
}

/// What an extent of a delta holds at the delta's end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ExtentKind {
    /// Bytes to be read. They may well be zeroes: RBD's `exists` says that storage is allocated, not what is in it.
    Data,
    /// Zeroes, without a look: a hole, a discarded or truncated part.
    Zero,
}

/// A range and what is in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Extent {
    /// Where.
    #[serde(flatten)]
    pub range: ByteRange,
    /// What.
    pub kind: ExtentKind,
}

impl Extent {
    /// An extent to be read.
    pub fn data(range: ByteRange) -> Self {
        Self { range, kind: ExtentKind::Data }
    }

    /// An extent known to be zeroes.
    pub fn zero(range: ByteRange) -> Self {
        Self { range, kind: ExtentKind::Zero }
    }
}

/// Sorts ranges and joins those that touch or overlap.
pub fn normalize(mut ranges: Vec<ByteRange>) -> Vec<ByteRange> {
    ranges.sort_unstable();
    let mut joined: Vec<ByteRange> = Vec::with_capacity(ranges.len());
    for range in ranges {
        match joined.last_mut() {
            Some(last) if range.offset <= last.end() => {
                last.length = last.end().max(range.end()) - last.offset;
            }
            _ => joined.push(range),
        }
    }
    joined
}

/// Sorts extents and joins neighbours of one kind; where two overlap, the bytes are data if either says so, because
/// reading too much is a cost and zeroing too much is a loss.
pub fn normalize_extents(extents: Vec<Extent>) -> Vec<Extent> {
    let of = |kind| normalize(extents.iter().filter(|e| e.kind == kind).map(|e| e.range).collect());
    let data = of(ExtentKind::Data);
    let zero = subtract(&of(ExtentKind::Zero), &data);
    let mut all: Vec<Extent> = data.into_iter().map(Extent::data).chain(zero.into_iter().map(Extent::zero)).collect();
    all.sort_unstable_by_key(|e| e.range);
    all
}

/// What is in `from` and not in `cut`; both sorted and disjoint, as [`normalize`] leaves them.
pub fn subtract(from: &[ByteRange], cut: &[ByteRange]) -> Vec<ByteRange> {
    let mut left = Vec::new();
    let mut first = 0;
    for range in from {
        let mut start = range.offset;
        while first < cut.len() && cut[first].end() <= start {
            first += 1;
        }
        for hole in cut[first..].iter().take_while(|hole| hole.offset < range.end()) {
            left.extend(ByteRange::between(start, hole.offset));
            start = start.max(hole.end());
        }
        left.extend(ByteRange::between(start, range.end()));
    }
    left
}

/// How many bytes sorted, disjoint ranges cover.
pub fn total_length<'a>(ranges: impl IntoIterator<Item = &'a ByteRange>) -> u64 {
    ranges.into_iter().map(|range| range.length).sum()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn range(offset: u64, length: u64) -> ByteRange {
        ByteRange::new(offset, length).unwrap()
    }

    #[test]
    fn a_range_is_never_empty_and_never_overflows() {
        assert!(ByteRange::new(5, 0).is_err());
        assert!(ByteRange::new(u64::MAX, 1).is_err());
        assert_eq!(ByteRange::new(u64::MAX, 0).unwrap_err().offset, u64::MAX);
        assert_eq!(range(u64::MAX - 1, 1).end(), u64::MAX);
        assert!(serde_json::from_str::<ByteRange>(r#"{"offset":18446744073709551615,"length":2}"#).is_err());
    }

    #[test]
    fn splitting_cuts_at_multiples_only() {
        let pieces: Vec<_> = range(3, 10).split_at_multiples(4).collect();
        assert_eq!(pieces, [range(3, 1), range(4, 4), range(8, 4), range(12, 1)]);
        assert_eq!(range(u64::MAX - 2, 2).split_at_multiples(1 << 62).count(), 1);
    }

    #[test]
    fn aligning_widens_but_not_beyond_the_image() {
        assert_eq!(range(5, 6).align_outward(4, 100), range(4, 8));
        assert_eq!(range(5, 6).align_outward(8, 11), range(0, 11));
    }

    fn bits(ranges: &[ByteRange]) -> Vec<bool> {
        let mut map = vec![false; 300];
        for r in ranges {
            map[r.offset as usize..r.end() as usize].fill(true);
        }
        map
    }

    fn some_ranges() -> impl Strategy<Value = Vec<ByteRange>> {
        prop::collection::vec((0u64..200, 1u64..40).prop_map(|(o, l)| range(o, l)), 0..12)
    }

    proptest! {
        #[test]
        fn sets_of_ranges_behave_like_sets_of_bytes(a in some_ranges(), b in some_ranges()) {
            let (a, b) = (normalize(a), normalize(b));
            prop_assert!(a.windows(2).all(|w| w[0].end() < w[1].offset));
            let expected: Vec<bool> =
                bits(&a).iter().zip(bits(&b)).map(|(&in_a, in_b)| in_a && !in_b).collect();
            prop_assert_eq!(bits(&subtract(&a, &b)), expected);
        }

        #[test]
        fn overlapping_extents_are_data_where_either_is(a in some_ranges(), b in some_ranges()) {
            let mixed = a.iter().copied().map(Extent::data).chain(b.iter().copied().map(Extent::zero)).collect();
            let result = normalize_extents(mixed);
            prop_assert!(result.windows(2).all(|w| w[0].range.end() <= w[1].range.offset));
            let of = |kind| result.iter().filter(|e| e.kind == kind).map(|e| e.range).collect::<Vec<_>>();
            prop_assert_eq!(bits(&of(ExtentKind::Data)), bits(&a));
            let zero: Vec<bool> = bits(&b).iter().zip(bits(&a)).map(|(&z, d)| z && !d).collect();
            prop_assert_eq!(bits(&of(ExtentKind::Zero)), zero);
        }
    }
}
