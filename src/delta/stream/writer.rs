//! Writes a diff stream of version 1.

use bytes::Bytes;
use tokio::io::{AsyncWrite, AsyncWriteExt, BufWriter};

use super::{BANNER_V1, DiffError, DiffFault, NAME_MAX, tag};
use crate::extent::ByteRange;

/// Small records are gathered up to this many bytes; larger ones go straight to the output.
const BUFFER: usize = 64 << 10;

/// Writes a diff stream of version 1, which `rbd import-diff` and `rbd merge-diff` read.
///
/// Ranges must ascend without overlap and lie within the size: merge-diff takes no others. After an error, or when a
/// call was cancelled, the stream is broken: only dropping it is left.
pub struct DiffWriter<W> {
    output: BufWriter<W>,
    size: u64,
    previous_end: u64,
    offset: u64,
    record_offset: u64,
    open: bool,
}

impl<W: AsyncWrite + Unpin> DiffWriter<W> {
    /// Begins a diff that leads from a snapshot (`None`: an image of zeroes) to a snapshot (`None`: HEAD) at which the
    /// image has `size` bytes.
    pub async fn open(output: W, from: Option<&str>, to: Option<&str>, size: u64) -> Result<Self, DiffError> {
        let output = BufWriter::with_capacity(BUFFER, output);
        let mut writer = Self { output, size, previous_end: 0, offset: 0, record_offset: 0, open: true };
        let result = writer.write_header(from, to).await;
        writer.conclude(result).map(|()| writer)
    }

    /// Writes a record of data, unless `bytes` is empty.
    pub async fn data(&mut self, offset: u64, bytes: &Bytes) -> Result<(), DiffError> {
        if bytes.is_empty() {
            return Ok(());
        }
        let result = self.write_data(offset, bytes).await;
        self.conclude(result)
    }

    /// Writes a record of zeroes.
    pub async fn zero(&mut self, range: ByteRange) -> Result<(), DiffError> {
        let result = self.write_range(tag::ZERO, range).await;
        self.conclude(result)
    }

    /// Ends the diff, and returns the output, flushed, and how many bytes the diff is long.
    pub async fn finish(mut self) -> Result<(W, u64), DiffError> {
        let result = self.write_end().await;
        self.conclude(result)?;
        Ok((self.output.into_inner(), self.offset))
    }

    async fn write_header(&mut self, from: Option<&str>, to: Option<&str>) -> Result<(), DiffFault> {
        self.put(BANNER_V1).await?;
        for (tag, name) in [(tag::FROM, from), (tag::TO, to)] {
            let Some(name) = name else { continue };
            if name.is_empty() || name.len() > NAME_MAX {
                return Err(DiffFault::NameLength { length: name.len() as u64 });
            }
            self.put(&[tag]).await?;
            self.put(&(name.len() as u32).to_le_bytes()).await?;
            self.put(name.as_bytes()).await?;
        }
        self.put(&[tag::SIZE]).await?;
        self.put(&self.size.to_le_bytes()).await
    }

    async fn write_data(&mut self, offset: u64, bytes: &Bytes) -> Result<(), DiffFault> {
        let range = ByteRange::new(offset, bytes.len() as u64);
        let range = range.map_err(|source| DiffFault::Range { tag: tag::DATA.into(), source })?;
        self.write_range(tag::DATA, range).await?;
        self.put(bytes).await
    }

    async fn write_range(&mut self, tag: u8, range: ByteRange) -> Result<(), DiffFault> {
        self.start_record()?;
        if range.end() > self.size {
            return Err(DiffFault::BeyondImage { tag: tag.into(), range, size: self.size });
        }
        if range.offset() < self.previous_end {
            return Err(DiffFault::Unordered { range, previous_end: self.previous_end });
        }
        self.previous_end = range.end();
        self.put(&[tag]).await?;
        self.put(&range.offset().to_le_bytes()).await?;
        self.put(&range.length().to_le_bytes()).await
    }

    async fn write_end(&mut self) -> Result<(), DiffFault> {
        self.start_record()?;
        self.put(&[tag::END]).await?;
        self.output.flush().await.map_err(|source| DiffFault::Io { operation: "write", source })
    }

    /// Until the record is concluded the stream counts as broken, so that a cancelled write can't be followed by
    /// another record.
    fn start_record(&mut self) -> Result<(), DiffFault> {
        self.record_offset = self.offset;
        match std::mem::replace(&mut self.open, false) {
            true => Ok(()),
            false => Err(DiffFault::Finished),
        }
    }

    fn conclude(&mut self, result: Result<(), DiffFault>) -> Result<(), DiffError> {
        self.open = result.is_ok();
        result.map_err(|fault| DiffError { offset: self.record_offset, fault })
    }

    async fn put(&mut self, bytes: &[u8]) -> Result<(), DiffFault> {
        self.output.write_all(bytes).await.map_err(|source| DiffFault::Io { operation: "write", source })?;
        self.offset += bytes.len() as u64;
        Ok(())
    }
}
