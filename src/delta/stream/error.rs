//! What can be wrong with a diff stream.

use super::NAME_MAX;
use crate::extent::{ByteRange, InvalidRange};

/// A diff stream that cannot be read or written on.
///
/// All but an I/O error are permanent for these bytes, and nothing of the stream may be committed.
#[derive(Debug, thiserror::Error)]
#[error("rbd diff stream, record at byte {offset}")]
pub struct DiffError {
    /// Where the record begins that the fault is in, in bytes from the start of the stream.
    pub offset: u64,
    /// What is wrong.
    #[source]
    pub fault: DiffFault,
}

/// What is wrong with a diff stream.
#[derive(Debug, thiserror::Error)]
pub enum DiffFault {
    /// The pipe or file failed.
    #[error("cannot {operation} the stream")]
    Io {
        /// `read` or `write`.
        operation: &'static str,
        /// What the system says.
        #[source]
        source: std::io::Error,
    },
    /// The stream stops in the middle.
    #[error("the stream ends in {within}: the export was interrupted, or the file is truncated; export it anew")]
    Truncated {
        /// In the middle of what.
        within: &'static str,
    },
    /// Another file.
    #[error("not an rbd diff: it begins with {found:?} instead of \"rbd diff v1\\n\"")]
    NotADiff {
        /// The first bytes, as far as they are text.
        found: String,
    },
    /// A tag that does not exist; in version 1 it can't be skipped, as its length is unknown.
    #[error("unknown record {tag:#04x}")]
    UnknownTag {
        /// The tag.
        tag: u8,
    },
    /// A record in the wrong place.
    #[error("record {tag:?} where {expected} belongs")]
    OutOfOrder {
        /// The tag.
        tag: char,
        /// What would be right.
        expected: &'static str,
    },
    /// A name without a letter, or with too many.
    #[error("a snapshot name of {length} bytes; 1 to {NAME_MAX} are allowed")]
    NameLength {
        /// Its length.
        length: u64,
    },
    /// A name that is no text.
    #[error("a snapshot name that is not UTF-8")]
    NameNotText,
    /// A version 2 record whose length is not that of its content.
    #[error("record {tag:?} has a length of {length}, and its content one of {expected}")]
    RecordLength {
        /// The tag.
        tag: char,
        /// As written.
        length: u64,
        /// As the content needs.
        expected: u64,
    },
    /// A range of no bytes, or one that ends beyond 64 bits.
    #[error("record {tag:?}")]
    Range {
        /// The tag.
        tag: char,
        /// What is wrong with it.
        #[source]
        source: InvalidRange,
    },
    /// A range beyond the end of the image.
    #[error("record {tag:?}: {range} (offset+length) lies beyond the image's {size} bytes")]
    BeyondImage {
        /// The tag.
        tag: char,
        /// The range.
        range: ByteRange,
        /// The size that the stream states.
        size: u64,
    },
    /// A range that begins before the end of the one before it, where that is not allowed.
    #[error("{range} (offset+length) begins before {previous_end}, the end of the record before it")]
    Unordered {
        /// The range.
        range: ByteRange,
        /// Where the one before ends.
        previous_end: u64,
    },
    /// More of something than is reasonable.
    #[error("{count} {what}, more than the {most} allowed")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// How many.
        count: u64,
        /// How many are allowed.
        most: u64,
    },
    /// Something follows the end.
    #[error("there are bytes after the end of the diff")]
    TrailingBytes,
    /// The stream was at its end, or failed, already.
    #[error("nothing can be read or written after the end of the stream, or after an error")]
    Finished,
}
