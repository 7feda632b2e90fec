//! Merges two consecutive diffs into one.

use bytes::Bytes;
use serde::Serialize;
use tokio::io::{AsyncRead, AsyncWrite};

use super::{DiffError, DiffFault, DiffReader, DiffWriter, Record};
use crate::extent::ByteRange;

/// Two diffs that could not be merged.
#[derive(Debug, thiserror::Error)]
pub enum MergeError {
    /// The second does not begin where the first ends.
    #[error(
        "the first diff leads to {}, the second one begins at {}: they are not consecutive",
        point(first_to, "HEAD"),
        point(second_from, "an empty image")
    )]
    NotConsecutive {
        /// Where the first leads to.
        first_to: Option<String>,
        /// Where the second begins.
        second_from: Option<String>,
    },
    /// An input is at fault.
    #[error("the {input} diff")]
    Input {
        /// Which one.
        input: MergeInput,
        /// What is wrong.
        #[source]
        source: DiffError,
    },
    /// The output can't be written.
    #[error("the merged diff")]
    Output(#[source] DiffError),
}

fn point(name: &Option<String>, otherwise: &str) -> String {
    name.as_ref().map_or_else(|| otherwise.to_owned(), |name| format!("snapshot {name:?}"))
}

/// Which of the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MergeInput {
    /// The older one.
    First,
    /// The newer one.
    Second,
}

impl std::fmt::Display for MergeInput {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::First => "first",
            Self::Second => "second",
        })
    }
}

/// What a merged diff holds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Merged {
    /// The snapshot that it begins at.
    pub from: Option<String>,
    /// The snapshot that it leads to.
    pub to: Option<String>,
    /// The image's size in the end, in bytes.
    pub size: u64,
    /// How many bytes of data.
    pub data_bytes: u64,
    /// How many bytes of zeroes.
    pub zero_bytes: u64,
    /// How many bytes the stream is long.
    pub stream_bytes: u64,
}

/// Writes one diff that does what `first` and then `second` do, as `rbd merge-diff` does.
///
/// Where both write, the second counts. Its size counts too: what the first wrote beyond is dropped; and if it is the
/// larger one, the bytes in between are zeroes unless the second writes them, since the first may have shrunk the
/// image and dropped what stood there. The records of both must ascend without overlap, as those of striped images
/// that rbd exports don't. Both are read to their end; whether anything follows it is the caller's to ask. Memory: a
/// piece of each.
pub async fn merge<A, B, W>(first: &mut DiffReader<A>, second: &mut DiffReader<B>, out: W) -> Result<Merged, MergeError>
where
    A: AsyncRead + Unpin,
    B: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let (older, newer) = (first.header().clone(), second.header().clone());
    if older.to.is_none() || older.to != newer.from {
        return Err(MergeError::NotConsecutive { first_to: older.to, second_from: newer.from });
    }
    let size = newer.size;
    let writer = DiffWriter::open(out, older.from.as_deref(), newer.to.as_deref(), size).await;
    let mut output =
        Output { writer: writer.map_err(MergeError::Output)?, merged: Merged { size, ..Merged::default() } };
    let mut first = Cursor::new(first, MergeInput::First, older.size..older.size);
    let mut second = Cursor::new(second, MergeInput::Second, older.size..size);
    first.advance().await?;
    second.advance().await?;
    loop {
        // What the first has beyond the new end is dropped, to the last byte of it.
        if let Some(piece) = first.current.take_if(|piece| piece.range.end() > size) {
            match piece.before(size) {
                Some(kept) => first.current = Some(kept),
                None => first.advance().await?,
            }
            continue;
        }
        match (first.current.take(), second.current.take()) {
            (None, None) => break,
            (Some(older), None) => {
                output.write(&older).await?;
                first.advance().await?;
            }
            (Some(older), Some(newer)) if older.range.offset() < newer.range.offset() => {
                let start = newer.range.offset();
                if let Some(alone) = older.before(start) {
                    output.write(&alone).await?;
                }
                second.current = Some(newer);
                first.step(older.from(start)).await?;
            }
            (Some(older), Some(newer)) if older.range.offset() < newer.range.end() => {
                let end = newer.range.end();
                second.current = Some(newer);
                first.step(older.from(end)).await?;
            }
            (older, Some(newer)) => {
                output.write(&newer).await?;
                first.current = older;
                second.advance().await?;
            }
        }
    }
    let Output { writer, mut merged } = output;
    (merged.from, merged.to) = (older.from, newer.to);
    merged.stream_bytes = writer.finish().await.map_err(MergeError::Output)?.1;
    Ok(merged)
}

/// Data or zeroes in a range.
struct Piece {
    range: ByteRange,
    /// `None`: zeroes.
    bytes: Option<Bytes>,
}

impl Piece {
    /// The part below `end`.
    fn before(&self, end: u64) -> Option<Self> {
        self.part(ByteRange::between(self.range.offset(), self.range.end().min(end))?)
    }

    /// The part at and above `start`.
    fn from(&self, start: u64) -> Option<Self> {
        self.part(ByteRange::between(self.range.offset().max(start), self.range.end())?)
    }

    fn part(&self, range: ByteRange) -> Option<Self> {
        let start = (range.offset() - self.range.offset()) as usize;
        let bytes = self.bytes.as_ref().map(|bytes| bytes.slice(start..start + range.length() as usize));
        Some(Self { range, bytes })
    }
}

/// One of the inputs, with the piece that is next in it.
struct Cursor<'a, R> {
    reader: &'a mut DiffReader<R>,
    input: MergeInput,
    current: Option<Piece>,
    /// A piece that was read and comes after `current`.
    ahead: Option<Piece>,
    /// Where what is not written is zero.
    blank: std::ops::Range<u64>,
    previous_end: u64,
    ended: bool,
}

impl<'a, R: AsyncRead + Unpin> Cursor<'a, R> {
    fn new(reader: &'a mut DiffReader<R>, input: MergeInput, blank: std::ops::Range<u64>) -> Self {
        Self { reader, input, current: None, ahead: None, blank, previous_end: 0, ended: false }
    }

    /// Goes on with the rest of the current piece, or with the next one.
    async fn step(&mut self, rest: Option<Piece>) -> Result<(), MergeError> {
        match rest {
            Some(rest) => self.current = Some(rest),
            None => self.advance().await?,
        }
        Ok(())
    }

    /// Makes the next piece the current one: a gap in the blank part as zeroes, or what was read.
    async fn advance(&mut self) -> Result<(), MergeError> {
        if self.ahead.is_none() {
            self.ahead = self.read().await?;
        }
        let gap_end = self.ahead.as_ref().map_or(self.blank.end, |piece| piece.range.offset().min(self.blank.end));
        if let Some(range) = ByteRange::between(self.blank.start, gap_end) {
            self.blank.start = gap_end;
            self.current = Some(Piece { range, bytes: None });
            return Ok(());
        }
        self.current = self.ahead.take();
        if let Some(piece) = &self.current {
            self.blank.start = self.blank.start.max(piece.range.end());
        }
        Ok(())
    }

    async fn read(&mut self) -> Result<Option<Piece>, MergeError> {
        if self.ended {
            return Ok(None);
        }
        let input = self.input;
        let fail = |source| MergeError::Input { input, source };
        let piece = match self.reader.next().await.map_err(fail)? {
            Record::End => {
                self.ended = true;
                return Ok(None);
            }
            Record::Zero(range) => Piece { range, bytes: None },
            Record::Data { offset, bytes } => match ByteRange::new(offset, bytes.len() as u64) {
                Ok(range) => Piece { range, bytes: Some(bytes) },
                Err(source) => return Err(fail(self.reader.fault(DiffFault::Range { tag: 'w', source }))),
            },
        };
        let (range, previous_end) = (piece.range, self.previous_end);
        if range.offset() < previous_end {
            return Err(fail(self.reader.fault(DiffFault::Unordered { range, previous_end })));
        }
        self.previous_end = range.end();
        Ok(Some(piece))
    }
}

struct Output<W> {
    writer: DiffWriter<W>,
    merged: Merged,
}

impl<W: AsyncWrite + Unpin> Output<W> {
    async fn write(&mut self, piece: &Piece) -> Result<(), MergeError> {
        let length = piece.range.length();
        let written = match &piece.bytes {
            Some(bytes) => {
                self.merged.data_bytes += length;
                self.writer.data(piece.range.offset(), bytes).await
            }
            None => {
                self.merged.zero_bytes += length;
                self.writer.zero(piece.range).await
            }
        };
        written.map_err(MergeError::Output)
    }
}
