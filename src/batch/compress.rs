//! Which compression, and the two zstd calls.

use std::cell::RefCell;
use std::fmt;
use std::io;
use std::str::FromStr;

use bytes::Bytes;

/// The zstd level that is used unless one is given. On filesystem content a core does about 480 MB/s at level 1 with
/// a ratio of 2.9; level 3 gives 3.1 at 290 MB/s.
pub const LEVEL_DEFAULT: i32 = 1;

/// The least and the greatest zstd level that is accepted. Below −7 hardly anything is compressed; above 19 zstd
/// needs hundreds of MiB for each thread.
const LEVELS: std::ops::RangeInclusive<i32> = -7..=19;

/// How batches are encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// Stored as they are.
    None,
    /// zstd at this level; batches that don't shrink by a sixteenth are stored as they are.
    Zstd(i32),
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("none"),
            Self::Zstd(level) => write!(f, "zstd:{level}"),
        }
    }
}

/// What the user asked for: `auto`, `none`, `zstd` or `zstd:LEVEL` with a level of −7 to 19 (0 is zstd's own
/// default, which is 3).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CompressionChoice {
    /// Compress where there is a wire to save.
    #[default]
    Auto,
    /// Never.
    None,
    /// Always, at this level.
    Zstd(i32),
}

impl CompressionChoice {
    /// What that means: `Auto` is zstd over a pipe, and none within one process, where compressing at half a GB/s a
    /// core would only slow down a copy at memory speed.
    pub fn resolve(self, over_pipe: bool) -> Compression {
        match self {
            Self::Auto if over_pipe => Compression::Zstd(LEVEL_DEFAULT),
            Self::Auto | Self::None => Compression::None,
            Self::Zstd(level) => Compression::Zstd(level),
        }
    }
}

/// A text that names no compression.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is no compression; write auto, none, zstd, or zstd:LEVEL with a level from -7 to 19")]
pub struct CompressionError {
    /// What was given.
    pub text: String,
}

impl FromStr for CompressionChoice {
    type Err = CompressionError;

    fn from_str(text: &str) -> Result<Self, CompressionError> {
        let level = match text {
            "auto" => return Ok(Self::Auto),
            "none" => return Ok(Self::None),
            "zstd" => Some(LEVEL_DEFAULT),
            _ => text.strip_prefix("zstd:").and_then(|level| level.parse().ok()),
        };
        match level {
            Some(level) if LEVELS.contains(&level) => Ok(Self::Zstd(level)),
            _ => Err(CompressionError { text: text.to_owned() }),
        }
    }
}

impl fmt::Display for CompressionChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            other => other.resolve(false).fmt(f),
        }
    }
}

/// What a thread reuses: a fresh context for each batch costs a fifth of the speed, and fresh buffers page faults.
struct Encoder {
    context: zstd::bulk::Compressor<'static>,
    level: i32,
    input: Vec<u8>,
    output: Vec<u8>,
}

thread_local! {
    static ENCODER: RefCell<Option<Encoder>> = const { RefCell::new(None) };
    static DECODER: RefCell<Option<zstd::bulk::Decompressor<'static>>> = const { RefCell::new(None) };
}

/// One zstd frame of the pieces' bytes in a row, or `None` where that saves less than a sixteenth, or zstd fails: raw
/// is always right.
pub(super) fn compress(pieces: &[Bytes], level: i32) -> Option<Bytes> {
    ENCODER.with_borrow_mut(|slot| {
        if slot.as_ref().is_none_or(|encoder| encoder.level != level) {
            let context = zstd::bulk::Compressor::new(level).ok()?;
            *slot = Some(Encoder { context, level, input: Vec::new(), output: Vec::new() });
        }
        let Encoder { context, input, output, .. } = slot.as_mut()?;
        let input: &[u8] = match pieces {
            [one] => one,
            _ => {
                input.clear();
                pieces.iter().for_each(|piece| input.extend_from_slice(piece));
                input
            }
        };
        let limit = input.len() / 16 * 15;
        output.resize(output.len().max(limit), 0);
        let written = context.compress_to_buffer(input, &mut output[..limit]).ok()?;
        Some(Bytes::copy_from_slice(&output[..written]))
    })
}

/// The bytes of a zstd payload, which must be exactly `length` of them. Allocates no more than that, whatever the
/// payload says about itself.
pub(super) fn decompress(payload: &[u8], length: usize) -> io::Result<Vec<u8>> {
    DECODER.with_borrow_mut(|slot| {
        let decoder = match slot {
            Some(decoder) => decoder,
            None => slot.insert(zstd::bulk::Decompressor::new()?),
        };
        let mut decoded = Vec::with_capacity(length);
        decoder.decompress_to_buffer(payload, &mut decoded)?;
        Ok(decoded)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices_are_read_and_written() {
        for text in ["auto", "none", "zstd:1", "zstd:-7", "zstd:19", "zstd:0"] {
            assert_eq!(text.parse::<CompressionChoice>().unwrap().to_string(), text);
        }
        assert_eq!("zstd".parse(), Ok(CompressionChoice::Zstd(LEVEL_DEFAULT)));
        for text in ["", "Auto", "zstd:", "zstd:20", "zstd:-8", "zstd:x", "zstd:1 ", "gzip", "none:1"] {
            let error = text.parse::<CompressionChoice>().unwrap_err();
            assert!(error.to_string().contains("zstd:LEVEL"), "{text}");
        }
    }

    #[test]
    fn auto_depends_on_the_wire() {
        assert_eq!(CompressionChoice::Auto.resolve(false), Compression::None);
        assert_eq!(CompressionChoice::Auto.resolve(true), Compression::Zstd(1));
        assert_eq!(CompressionChoice::None.resolve(true), Compression::None);
        assert_eq!(CompressionChoice::Zstd(3).resolve(false), Compression::Zstd(3));
    }
}
