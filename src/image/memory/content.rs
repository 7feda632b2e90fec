//! The bytes of one point in time, and when each sector was last touched.

use bytes::Bytes;

use crate::extent::{ByteRange, Extent, ExtentKind};

/// The granularity of allocation and change tracking: 512 bytes.
pub const SECTOR: u64 = 512;

/// A change of an image.
#[derive(Clone, Debug)]
pub(super) enum Op {
    Write(u64, Bytes),
    Zero(ByteRange),
    Resize(u64),
}

#[derive(Clone, Copy, Debug, Default)]
struct Sector {
    allocated: bool,
    /// The epoch in which it was last written, discarded or truncated; 0 for never.
    touched: u64,
}

/// Bytes and sectors. Sectors beyond the end keep their history, so that a shrink and a later growth are not lost.
#[derive(Clone, Debug)]
pub(super) struct Content {
    bytes: Vec<u8>,
    sectors: Vec<Sector>,
    epoch: u64,
}

impl Content {
    pub(super) fn blank(size: u64) -> Self {
        Self {
            bytes: vec![0; size as usize],
            sectors: vec![Sector::default(); size.div_ceil(SECTOR) as usize],
            epoch: 1,
        }
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    pub(super) fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    pub(super) fn is_blank(&self) -> bool {
        self.sectors.iter().all(|sector| !sector.allocated)
    }

    pub(super) fn next_epoch(&mut self) {
        self.epoch += 1;
    }

    /// Changes a byte without leaving a trace but the storage that it takes.
    pub(super) fn damage(&mut self, offset: u64, byte: u8) {
        self.bytes[offset as usize] = byte;
        self.sectors[(offset / SECTOR) as usize].allocated = true;
    }

    pub(super) fn apply(&mut self, op: &Op) {
        match op {
            Op::Write(offset, data) => {
                // A crash may have lost the growth that this write relied on: then the write is lost as well.
                let end = *offset as usize + data.len();
                if end <= self.bytes.len() {
                    self.bytes[*offset as usize..end].copy_from_slice(data);
                    self.touch(*offset, end as u64, |sector| sector.allocated = true);
                }
            }
            Op::Zero(range) => {
                if let Some(range) = range.clip(self.size()) {
                    self.bytes[range.offset() as usize..range.end() as usize].fill(0);
                    // Only whole sectors lose their allocation; the edges stay, as zeroes.
                    self.touch(range.offset(), range.end(), |_| ());
                    let (first, last) = (range.offset().div_ceil(SECTOR), range.end() / SECTOR);
                    let last = if range.end() == self.size() { range.end().div_ceil(SECTOR) } else { last };
                    self.touch(first * SECTOR, last * SECTOR, |sector| sector.allocated = false);
                }
            }
            Op::Resize(size) => {
                let (old, new) = (self.size(), *size);
                self.bytes.resize(new as usize, 0);
                let sectors = self.sectors.len().max(new.div_ceil(SECTOR) as usize);
                self.sectors.resize(sectors, Sector::default());
                if new < old {
                    self.touch(new, old, |_| ());
                    self.touch(new.next_multiple_of(SECTOR), old, |sector| sector.allocated = false);
                }
            }
        }
    }

    fn touch(&mut self, start: u64, end: u64, change: impl Fn(&mut Sector)) {
        if start < end {
            for sector in &mut self.sectors[(start / SECTOR) as usize..end.div_ceil(SECTOR) as usize] {
                sector.touched = self.epoch;
                change(sector);
            }
        }
    }

    /// The extents of `within` that differ from `earlier`, as RBD would list them.
    pub(super) fn diff(&self, earlier: Option<&Content>, within: ByteRange) -> Vec<Extent> {
        let Some(within) = within.clip(self.size()) else { return Vec::new() };
        let mut extents = Vec::new();
        for index in within.offset() / SECTOR..within.end().div_ceil(SECTOR) {
            let sector = self.sectors[index as usize];
            let before = earlier.map(|earlier| earlier.sectors.get(index as usize).copied().unwrap_or_default());
            let listed = match (before, earlier) {
                (Some(before), Some(earlier)) => {
                    sector.touched > earlier.epoch && (sector.allocated || before.allocated)
                }
                _ => sector.allocated,
            };
            let range =
                ByteRange::between(index * SECTOR, (index + 1) * SECTOR).and_then(|range| range.intersect(within));
            if let (true, Some(range)) = (listed, range) {
                let kind = if sector.allocated { ExtentKind::Data } else { ExtentKind::Zero };
                extents.push(Extent { range, kind });
            }
        }
        extents
    }
}
