//! Throttles, in paused time.

mod bucket;
mod guard;
mod limiter;

use std::num::NonZeroU64;

use super::*;

const MIB: u64 = 1 << 20;

fn bytes(a_second: u64) -> Rate {
    Rate { bytes_per_second: NonZeroU64::new(a_second), operations_per_second: None }
}

fn operations(a_second: u64) -> Rate {
    Rate { bytes_per_second: None, operations_per_second: NonZeroU64::new(a_second) }
}
