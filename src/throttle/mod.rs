//! Throttles that protect production: how many bytes and operations a second the source may be asked for.
//!
//! ```text
//! plan's rate ─▶ Schedule ─▶ (set by hand) ─▶ LatencyGuard ─▶ rate of the pool's Bucket ◀─ reads of all its volumes
//!                 windows                      lowers, raises
//! ```
//!
//! A [`Bucket`] lets through so much a second. Each volume may have one, and each source pool has one within a
//! [`PoolLimiter`], which also knows the time of the day and how long reads take. [`ThrottledSource`] puts both in front
//! of an image, so that no other layer knows of them.
//!
//! What counts: a read counts its bytes and one operation, a look for changes the objects it asks for, as operations.
//! Snapshots, sizes and the like are too few to count. Nothing that is written to the target counts.

use std::num::NonZeroU64;

use serde::{Deserialize, Serialize};

mod bucket;
mod guard;
mod limiter;
mod meter;
mod schedule;
mod source;
#[cfg(test)]
mod tests;

pub use bucket::Bucket;
pub use guard::{Latencies, LatencyGuard};
pub use limiter::{Change, LimiterStatus, PoolLimiter};
pub use schedule::{InForce, Schedule, Window, minute_of_day};
pub use source::ThrottledSource;

/// How much a second; `None` is without a limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rate {
    /// Bytes read from the source a second.
    pub bytes_per_second: Option<NonZeroU64>,
    /// Requests to the source a second.
    pub operations_per_second: Option<NonZeroU64>,
}

impl Rate {
    /// No limit at all.
    pub const UNLIMITED: Self = Self { bytes_per_second: None, operations_per_second: None };

    /// Whether nothing is limited.
    pub fn is_unlimited(&self) -> bool {
        *self == Self::UNLIMITED
    }

    /// The lower of both, for bytes and operations each.
    #[must_use]
    pub fn min(self, other: Self) -> Self {
        let lower = |a: Option<NonZeroU64>, b: Option<NonZeroU64>| match (a, b) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        };
        Self {
            bytes_per_second: lower(self.bytes_per_second, other.bytes_per_second),
            operations_per_second: lower(self.operations_per_second, other.operations_per_second),
        }
    }
}
