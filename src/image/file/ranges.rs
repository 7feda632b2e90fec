//! Which blocks are being worked on: so that a digest is never taken of a block that is just being written.
//!
//! Overlapping requests are never issued on purpose, but one whose future was dropped goes on, and its successor may
//! meet it. Without this, the digest of a block as it was before could be kept after the write had landed.

use std::sync::{Condvar, Mutex, PoisonError};

/// The block ranges of the running requests: as many as there are requests at most.
#[derive(Debug, Default)]
pub(super) struct Ranges {
    held: Mutex<Vec<(u64, u64)>>,
    freed: Condvar,
}

/// Holds a range of blocks until it is dropped.
#[derive(Debug)]
pub(super) struct RangeGuard<'a> {
    ranges: &'a Ranges,
    range: (u64, u64),
}

impl Ranges {
    /// Waits until nobody else works on the blocks `start .. end`, and holds them. A thread holds one range at a time,
    /// so that nobody waits for ever. Blocks.
    pub(super) fn hold(&self, start: u64, end: u64) -> RangeGuard<'_> {
        let held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let overlaps = |held: &mut Vec<(u64, u64)>| held.iter().any(|&(from, to)| from < end && start < to);
        let mut held = self.freed.wait_while(held, overlaps).unwrap_or_else(PoisonError::into_inner);
        held.push((start, end));
        RangeGuard { ranges: self, range: (start, end) }
    }
}

impl Drop for RangeGuard<'_> {
    fn drop(&mut self) {
        let mut held = self.ranges.held.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(index) = held.iter().position(|range| *range == self.range) {
            held.swap_remove(index);
        }
        self.ranges.freed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[test]
    fn overlapping_ranges_take_turns() {
        let (ranges, inside) = (Ranges::default(), AtomicU32::new(0));
        let _apart = ranges.hold(100, 200);
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let (ranges, inside) = (&ranges, &inside);
                scope.spawn(move || {
                    for _ in 0..500 {
                        let _guard = ranges.hold(thread, 10);
                        assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                        inside.fetch_sub(1, Ordering::SeqCst);
                    }
                });
            }
        });
    }
}
