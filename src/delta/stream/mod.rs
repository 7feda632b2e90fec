//! rbd's diff streams: what `rbd export-diff` writes, and `rbd import-diff` and `rbd merge-diff` read.
//!
//! Version 1 is read and written; version 2, which occurs only within `rbd export --export-format 2`, is read. The
//! formats are described in Ceph's `doc/dev/rbd-diff.rst` and `doc/dev/rbd-export.rst`, and by what rbd 16.2.15 was
//! seen to write; where the two differ, the latter counts.
//!
//! ```text
//! "rbd diff v1\n"  [f name]  [t name]  s size  ( w offset length data │ z offset length )*  e
//! "rbd diff v2\n"  [f name]  [t name]  [p flag]  s size  ( w … │ z … )*  e      each but e with its length
//! ```
//!
//! All integers are little-endian. A stream carries no checksum and names no image: what can be checked is its
//! structure, that ranges lie within the size, and that the end is there. Nothing may be committed before that was
//! seen.
//!
//! Records of any length are handed over in pieces of [`PIECE_MAX`], so that memory is bounded whatever a stream says.

mod error;
mod input;
mod merge;
mod reader;
mod writer;

#[cfg(test)]
mod tests;

use bytes::Bytes;
use serde::Serialize;

use crate::extent::ByteRange;

pub use error::{DiffError, DiffFault};
pub(crate) use input::Input;
pub use merge::{MergeError, MergeInput, Merged, merge};
pub use reader::DiffReader;
pub use writer::DiffWriter;

/// The first bytes of a version 1 diff.
pub const BANNER_V1: &[u8; 12] = b"rbd diff v1\n";

/// The first bytes of a version 2 diff.
pub const BANNER_V2: &[u8; 12] = b"rbd diff v2\n";

/// The most bytes of a snapshot's name, as in rbd itself (`src/tools/rbd/Utils.h`).
pub const NAME_MAX: usize = 4096;

/// The most bytes of data that are handed over at once: 4 MiB. Pieces of a longer record are cut at absolute multiples
/// of it, so that they suit the usual objects.
pub const PIECE_MAX: u64 = 4 << 20;

/// The tags that begin a record (`src/tools/rbd/Utils.h`).
mod tag {
    pub(super) const FROM: u8 = b'f';
    pub(super) const TO: u8 = b't';
    pub(super) const PROTECTED: u8 = b'p';
    pub(super) const SIZE: u8 = b's';
    pub(super) const DATA: u8 = b'w';
    pub(super) const ZERO: u8 = b'z';
    pub(super) const END: u8 = b'e';
}

/// Which version of the format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum DiffVersion {
    /// Records without lengths.
    V1,
    /// Records with lengths.
    V2,
}

/// What a diff says before its data.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DiffHeader {
    /// The format.
    pub version: DiffVersion,
    /// The snapshot that the diff is to be applied to; `None`: an image of zeroes.
    pub from: Option<String>,
    /// The snapshot that it leads to; `None`: HEAD.
    pub to: Option<String>,
    /// Whether that snapshot is protected; version 2 only.
    pub protected: Option<bool>,
    /// The image's size in the end, in bytes.
    pub size: u64,
}

/// What follows the header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Record {
    /// Bytes that are to stand at an offset: a record of data or a piece of one, never empty.
    Data {
        /// Where, in bytes.
        offset: u64,
        /// At most [`PIECE_MAX`] of them.
        bytes: Bytes,
    },
    /// A range that is to read as zeroes, of any length.
    Zero(ByteRange),
    /// The end: the diff is whole.
    End,
}
