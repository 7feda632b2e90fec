//! The batch stream: what `poolshift send` writes and `poolshift receive` reads.
//!
//! `proto/README.md` is the normative description; this module is its implementation. A stream goes one way, through
//! a pipe, so that nothing can be negotiated: everything a reader needs to refuse it is in its first frame.
//!
//! ```text
//! preamble │ Hello │ Batch + payload │ Batch + payload │ … │ End
//! ```
//!
//! **What is detected.** A flipped bit: in a frame's head or message by the frame's CRC-32, in data by the chunk's, and
//! in either by the BLAKE3 digest in End. A truncation: End is missing. A frame that was dropped, doubled or moved: by
//! the batches' sequence and by the digest. The digest is no signature: whoever can change the stream on purpose can
//! change it too, so that the pipe (ssh) must be trusted.
//!
//! **What is bounded.** A frame's message is at most [`MESSAGE_MAX`], its payload [`PAYLOAD_MAX`], a name
//! [`NAME_MAX`]; each is checked before anything of that length is allocated. Reader and writer hold one frame.

mod error;
mod frame;
mod inspect;
mod ledger;
mod message;
mod reader;
mod writer;

#[cfg(test)]
mod tests;

use serde::Serialize;

use crate::batch::{BATCH_MAX, EncodedBatch};
use crate::image::{ImageIdentity, Layout, Snapshot};

pub use error::{WireError, WireFault};
pub use inspect::{DiffSummary, ExportedImage, InspectError, Inspection, inspect};
pub use reader::StreamReader;
pub use writer::StreamWriter;

/// The first bytes of a batch stream.
pub const MAGIC: [u8; 8] = *b"poolshft";

/// The major version that is read and written: another one is another format.
pub const VERSION_MAJOR: u16 = 1;

/// The minor version that is written. Any one is read: a later minor version only adds what may be ignored.
pub const VERSION_MINOR: u16 = 0;

/// The most bytes of a frame's message: 256 KiB. A batch of 4096 chunks needs up to 96 KiB.
pub const MESSAGE_MAX: u32 = 256 << 10;

/// The most bytes of a frame's payload: a batch, and 64 KiB by which a compressor may exceed its input.
pub const PAYLOAD_MAX: u32 = BATCH_MAX as u32 + (64 << 10);

/// The most bytes of a name, an identity or any other text.
pub const NAME_MAX: usize = 4096;

/// The largest image: 2⁶³ − 1 bytes.
pub const SIZE_MAX: u64 = i64::MAX as u64;

/// What a stream is about: its first message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Hello {
    /// The program that writes, with its version. For people only.
    pub tool: String,
    /// Which image the bytes are of.
    pub source: ImageIdentity,
    /// Where the writer found it. For people only.
    pub location: String,
    /// The snapshot that the target must be at; `None`: the target must be all zeroes.
    pub from: Option<Snapshot>,
    /// The snapshot that the target is at in the end.
    pub to: Snapshot,
    /// How the source is cut into objects.
    pub layout: Layout,
    /// What the writer was asked to do. For people only.
    pub compression: String,
}

impl Hello {
    /// The `tool` of this very program: `poolshift 0.1.0`.
    pub fn this_tool() -> String {
        concat!(env!("CARGO_PKG_NAME"), " ", env!("CARGO_PKG_VERSION")).to_owned()
    }
}

/// What [`StreamReader::next`] found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// A batch: its place in the stream is checked, its payload is not.
    Batch(EncodedBatch),
    /// The end: everything that was sent has arrived, in order and unchanged.
    End(Totals),
}

/// What a whole stream carried.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Totals {
    /// How many batches.
    pub batches: u64,
    /// How many bytes of data, decoded.
    pub data_bytes: u64,
    /// How many bytes of zeroes.
    pub zero_bytes: u64,
    /// How many bytes the stream is long, all frames included.
    pub stream_bytes: u64,
}
