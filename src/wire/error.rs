//! What can be wrong with a batch stream.

use super::{MESSAGE_MAX, NAME_MAX, PAYLOAD_MAX, VERSION_MAJOR};
use crate::batch::BatchFault;
use crate::extent::ByteRange;

/// A stream that cannot be read or written on.
///
/// All but an I/O error are permanent for these bytes: the stream has to be sent anew, and nothing of it may be
/// committed.
#[derive(Debug, thiserror::Error)]
#[error("batch stream, frame at byte {offset}")]
pub struct WireError {
    /// Where the frame begins that the fault is in, in bytes from the start of the stream.
    pub offset: u64,
    /// What is wrong.
    #[source]
    pub fault: WireFault,
}

impl WireError {
    /// Whether the stream was only cut: what came before was in order.
    pub fn is_cut(&self) -> bool {
        matches!(self.fault, WireFault::Io { .. } | WireFault::Truncated { .. } | WireFault::SenderFailed { .. })
    }
}

/// What is wrong with a stream.
#[derive(Debug, thiserror::Error)]
pub enum WireFault {
    /// The pipe broke.
    #[error("cannot {operation} the stream")]
    Io {
        /// `read` or `write`.
        operation: &'static str,
        /// What the system says.
        #[source]
        source: std::io::Error,
    },
    /// The stream stops in the middle.
    #[error("the stream ends in {within}: the sender was interrupted, or the file is truncated; send it anew")]
    Truncated {
        /// In the middle of what.
        within: &'static str,
    },
    /// These are not the first bytes of a batch stream.
    #[error("not a poolshift batch stream: it begins with {found:02x?}")]
    NotAStream {
        /// The first bytes.
        found: [u8; 8],
    },
    /// Another major version.
    #[error(
        "format version {major}.{minor}, and this program reads {VERSION_MAJOR}.x: use the same poolshift on both sides"
    )]
    Version {
        /// The stream's major version.
        major: u16,
        /// The stream's minor version.
        minor: u16,
    },
    /// The stream needs a feature that this version does not know.
    #[error("the stream needs feature {feature}, which this program does not know: use the sender's version")]
    UnknownFeature {
        /// Its number.
        feature: u32,
    },
    /// A frame of an unknown kind that may not be skipped.
    #[error("a frame of unknown kind {kind}, which may not be skipped: use the sender's version")]
    UnknownKind {
        /// The kind.
        kind: u16,
    },
    /// A message longer than allowed.
    #[error("a message of {length} bytes, more than the {MESSAGE_MAX} allowed")]
    MessageTooLong {
        /// Its length.
        length: u32,
    },
    /// A payload longer than allowed.
    #[error("a payload of {length} bytes, more than the {PAYLOAD_MAX} allowed")]
    PayloadTooLong {
        /// Its length.
        length: u32,
    },
    /// A payload where there can be none.
    #[error("a payload of {length} bytes where there is none")]
    UnexpectedPayload {
        /// Its length.
        length: u32,
    },
    /// A frame's head or message was damaged.
    #[error("the frame is damaged: its CRC-32 is {actual:08x}, and {expected:08x} is written in it")]
    FrameChecksum {
        /// As written.
        expected: u32,
        /// As found.
        actual: u32,
    },
    /// A frame in the wrong place: a second Hello, a batch before it.
    #[error("a frame of kind {kind} where {expected} belongs")]
    OutOfOrder {
        /// The kind.
        kind: u16,
        /// What would be right.
        expected: &'static str,
    },
    /// A message that is no protobuf message of its kind.
    #[error("a malformed message")]
    Malformed(#[source] prost::DecodeError),
    /// A field that is missing or makes no sense.
    #[error("field {field}: {problem}")]
    Field {
        /// Which one.
        field: &'static str,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// A text longer than allowed.
    #[error("field {field}: {length} bytes, more than the {NAME_MAX} allowed")]
    NameTooLong {
        /// Which one.
        field: &'static str,
        /// Its length.
        length: usize,
    },
    /// A batch is missing, doubled, or was moved.
    #[error("batch {found} where batch {expected} belongs")]
    Sequence {
        /// What would be right.
        expected: u64,
        /// What was found.
        found: u64,
    },
    /// A batch whose progress lies behind that of the batch before, or beyond the image.
    #[error("progress to {found}, which is not within {least} and {most}")]
    Progress {
        /// The progress of the batch before.
        least: u64,
        /// The image's size.
        most: u64,
        /// What was found.
        found: u64,
    },
    /// A chunk that begins before the end of the batch before, or below its progress.
    #[error("chunk {range} (offset+length) begins before {done}, up to which the batches before it are complete")]
    Unordered {
        /// Its range.
        range: ByteRange,
        /// Where the batches before end.
        done: u64,
    },
    /// A chunk beyond the end of the image.
    #[error("chunk {range} (offset+length) lies beyond the image's {size} bytes")]
    BeyondImage {
        /// Its range.
        range: ByteRange,
        /// The size of the image.
        size: u64,
    },
    /// A batch that breaks its own rules.
    #[error("an impossible batch")]
    Batch(#[source] BatchFault),
    /// End does not match what came before it.
    #[error("the end announces {announced} {what}, and {found} were found")]
    Totals {
        /// Of what.
        what: &'static str,
        /// As announced.
        announced: u64,
        /// As found.
        found: u64,
    },
    /// The digest of the stream does not match.
    #[error("the stream was changed on its way: its digest differs from the sender's; send it anew")]
    Digest,
    /// The sender gave up and said so.
    #[error("the sender gave up: {reason:?}")]
    SenderFailed {
        /// What it said.
        reason: String,
    },
    /// Something follows the end.
    #[error("there are bytes after the end of the stream")]
    TrailingBytes,
    /// The stream was at its end, or failed, already.
    #[error("nothing can be read or written after the end of the stream, or after an error")]
    Finished,
}
