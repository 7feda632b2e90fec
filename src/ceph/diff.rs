//! `rbd_diff_iterate2`, collected with a bound.

use std::ffi::{c_int, c_void};
use std::ptr;

use super::{CephError, Image, Result, c_string, check};
use crate::extent::{ByteRange, Extent, ExtentKind};

/// What to compare.
#[derive(Clone, Debug)]
pub(crate) struct DiffRange<'a> {
    /// The name of the snapshot to start from; `None`: an image of zeroes.
    pub(crate) since: Option<&'a str>,
    /// Where.
    pub(crate) within: ByteRange,
    /// Whether whole objects are enough, which the object map then tells.
    pub(crate) whole_object: bool,
}

/// What a diff found.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Collected {
    /// The extents, in librbd's order: perhaps unsorted or overlapping.
    Extents(Vec<Extent>),
    /// More than the bound.
    TooMany,
}

struct Collector {
    extents: Vec<Extent>,
    bound: usize,
    failed: Option<Failure>,
}

/// Why a collector stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Failure {
    TooMany,
    /// An extent whose end is beyond what an image can have.
    Overflow {
        offset: u64,
        length: usize,
    },
}

impl Collector {
    fn fail(&mut self, failure: Failure) -> c_int {
        // librbd may still call some times: the first failure is the one to tell.
        self.failed.get_or_insert(failure);
        -rustix::io::Errno::OVERFLOW.raw_os_error()
    }
}

/// The callback: keeps an extent, joined with the last one where they touch.
unsafe extern "C" fn collect(offset: u64, length: usize, exists: c_int, collector: *mut c_void) -> c_int {
    // SAFETY: `Image::diff` passes a collector that outlives the call, and librbd calls on the calling thread only.
    let collector = unsafe { &mut *collector.cast::<Collector>() };
    let kind = if exists != 0 { ExtentKind::Data } else { ExtentKind::Zero };
    if length == 0 {
        // An empty extent says nothing (ceph#57973).
        return 0;
    }
    let Ok(range) = ByteRange::new(offset, length as u64) else {
        return collector.fail(Failure::Overflow { offset, length });
    };
    if let Some(last) = collector.extents.last_mut().filter(|last| last.kind == kind && last.range.end() == offset)
        && let Ok(joined) = ByteRange::new(last.range.offset(), last.range.length().saturating_add(range.length()))
    {
        last.range = joined;
        return 0;
    }
    if collector.extents.len() >= collector.bound {
        return collector.fail(Failure::TooMany);
    }
    collector.extents.push(Extent { range, kind });
    0
}

impl Image {
    /// What differs between the snapshot `since` and the point that the handle is set to, at most `bound` extents.
    /// Blocks. Parents are looked at.
    pub(crate) fn diff(&self, what: &DiffRange<'_>, bound: usize) -> Result<Collected> {
        self.collect(what, true, bound)
    }

    /// As [`Image::diff`]; without `parents` what a clone only sees in its parent isn't there.
    pub(super) fn collect(&self, what: &DiffRange<'_>, parents: bool, bound: usize) -> Result<Collected> {
        let since = what.since.map(c_string).transpose()?;
        let since = since.as_ref().map_or(ptr::null(), |name| name.as_ptr());
        let mut collector = Collector { extents: Vec::new(), bound, failed: None };
        // SAFETY: the image is open, the name ends with NUL or is NULL, the collector outlives the call; the callback
        // cannot unwind: Rust aborts a panic at an `extern "C"` boundary.
        let value = unsafe {
            (self.rbd()?.rbd_diff_iterate2)(
                self.raw.0,
                since,
                what.within.offset(),
                what.within.length(),
                u8::from(parents),
                u8::from(what.whole_object),
                collect,
                ptr::from_mut(&mut collector).cast(),
            )
        };
        match collector.failed {
            None => {}
            Some(Failure::TooMany) => return Ok(Collected::TooMany),
            Some(Failure::Overflow { offset, length }) => {
                let what = format!("an extent of {length} bytes at {offset}");
                return Err(CephError::Nonsense { function: "rbd_diff_iterate2", what });
            }
        }
        check("rbd_diff_iterate2", value)?;
        Ok(Collected::Extents(collector.extents))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn give(collector: &mut Collector, offset: u64, length: usize, exists: c_int) -> c_int {
        // SAFETY: the collector outlives the call.
        unsafe { collect(offset, length, exists, ptr::from_mut(collector).cast()) }
    }

    #[test]
    fn the_collector_joins_neighbours_and_keeps_its_bound() {
        let mut collector = Collector { extents: Vec::new(), bound: 2, failed: None };
        assert_eq!(give(&mut collector, 0, 4, 1), 0);
        assert_eq!(give(&mut collector, 4, 4, 1), 0);
        assert_eq!(give(&mut collector, 8, 4, 0), 0);
        assert_eq!(give(&mut collector, 5, 0, 1), 0);
        assert_eq!(give(&mut collector, u64::MAX, 0, 1), 0);
        let data = Extent::data(ByteRange::new(0, 8).unwrap());
        assert_eq!(collector.extents, [data, Extent::zero(ByteRange::new(8, 4).unwrap())]);
        assert!(give(&mut collector, 100, 4, 1) < 0);
        assert!(give(&mut collector, 200, 4, 1) < 0);
        assert_eq!((collector.failed, collector.extents.len()), (Some(Failure::TooMany), 2));
        assert!(give(&mut collector, u64::MAX, 4, 1) < 0);
        assert_eq!(collector.failed, Some(Failure::TooMany));
    }

    #[test]
    fn an_extent_beyond_every_image_fails_the_diff() {
        for (offset, length) in [(u64::MAX, 4), (u64::MAX, 1), (5, usize::MAX - 3), (1, usize::MAX)] {
            let mut collector = Collector { extents: Vec::new(), bound: 2, failed: None };
            assert!(give(&mut collector, offset, length, 1) < 0, "{offset} {length}");
            assert_eq!(collector.failed, Some(Failure::Overflow { offset, length }));
        }
    }
}
