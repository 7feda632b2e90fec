//! Throttles that protect production: how many bytes and operations a second the source may be asked for.

use std::num::NonZeroU64;

use serde::{Deserialize, Serialize};

/// How much a second; `None` is without a limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rate {
    /// Bytes read from the source a second.
    pub bytes_per_second: Option<NonZeroU64>,
    /// Requests to the source a second.
    pub operations_per_second: Option<NonZeroU64>,
}
