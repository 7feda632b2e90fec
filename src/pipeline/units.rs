//! Units: the pieces of a delta that are read and become one batch.

use crate::batch::CHUNK_MAX;
use crate::extent::{ByteRange, Extent, ExtentKind};

/// How many pieces one unit has at most: bounds the requests and the batch's header.
const PIECES: usize = 256;

/// How much one zeroing request covers at most: 64 MiB, 16 objects of the default size. librbd issues a zeroing
/// request's objects all at once, so that this bounds what one request makes of itself.
const ZERO_PIECE: u64 = 64 << 20;

/// A range of zeroes in pieces of which each is one request.
pub fn zero_pieces(range: ByteRange) -> impl Iterator<Item = ByteRange> {
    range.split_at_multiples(ZERO_PIECE)
}

/// Some pieces of a delta, in ascending order.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Unit {
    pub(super) pieces: Vec<Extent>,
    /// Bytes to be read.
    pub(super) bytes: u64,
}

impl Unit {
    /// Where the unit ends.
    pub(super) fn end(&self) -> u64 {
        self.pieces.last().map_or(0, |piece| piece.range.end())
    }

    fn has_room_for(&self, bytes: u64) -> bool {
        self.pieces.len() < PIECES && self.bytes + bytes <= CHUNK_MAX
    }
}

/// Cuts extents at multiples of the chunk size and packs them into units, in order.
pub(super) fn pack(extents: Vec<Extent>) -> Vec<Unit> {
    let mut units = Vec::new();
    let mut unit = Unit::default();
    for extent in extents {
        let step = match extent.kind {
            ExtentKind::Data => CHUNK_MAX,
            ExtentKind::Zero => ZERO_PIECE,
        };
        for range in extent.range.split_at_multiples(step) {
            let bytes = bytes_to_read(range, extent.kind);
            if !unit.has_room_for(bytes) {
                units.push(std::mem::take(&mut unit));
            }
            unit.bytes += bytes;
            unit.pieces.push(Extent { range, kind: extent.kind });
        }
    }
    if !unit.pieces.is_empty() {
        units.push(unit);
    }
    units
}

fn bytes_to_read(range: ByteRange, kind: ExtentKind) -> u64 {
    match kind {
        ExtentKind::Data => range.length(),
        ExtentKind::Zero => 0,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::extent::normalize_extents;

    proptest! {
        #[test]
        fn units_cover_the_extents_and_stay_within_their_bounds(
            raw in prop::collection::vec((0u64..1 << 30, 1u64..100 << 20, any::<bool>()), 0..40)
        ) {
            let extents = normalize_extents(raw.into_iter().map(|(offset, length, data)| {
                let range = ByteRange::new(offset, length).unwrap();
                if data { Extent::data(range) } else { Extent::zero(range) }
            }).collect());
            let units = pack(extents.clone());
            for unit in &units {
                prop_assert!(!unit.pieces.is_empty() && unit.pieces.len() <= PIECES && unit.bytes <= CHUNK_MAX);
                let read: u64 = unit.pieces.iter().map(|p| bytes_to_read(p.range, p.kind)).sum();
                prop_assert_eq!(read, unit.bytes);
            }
            let pieces: Vec<Extent> = units.into_iter().flat_map(|unit| unit.pieces).collect();
            prop_assert!(pieces.windows(2).all(|w| w[0].range.end() <= w[1].range.offset()));
            prop_assert_eq!(normalize_extents(pieces), extents);
        }
    }
}
