//! A buffered input that knows where it is.

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, BufReader};

use super::DiffFault;

/// Tags and numbers are read through a buffer of this many bytes; data of more goes past it.
const BUFFER: usize = 64 << 10;

/// Reads little-endian numbers and counts the bytes.
pub(crate) struct Input<R> {
    reader: BufReader<R>,
    offset: u64,
}

impl<R: AsyncRead + Unpin> Input<R> {
    pub(crate) fn new(reader: R) -> Self {
        Self { reader: BufReader::with_capacity(BUFFER, reader), offset: 0 }
    }

    /// How many bytes were read.
    pub(crate) fn offset(&self) -> u64 {
        self.offset
    }

    /// Reads `N` bytes; `within` is what they are a part of, for the error.
    pub(crate) async fn array<const N: usize>(&mut self, within: &'static str) -> Result<[u8; N], DiffFault> {
        let mut bytes = [0; N];
        self.fill(&mut bytes, within).await?;
        Ok(bytes)
    }

    pub(crate) async fn u8(&mut self, within: &'static str) -> Result<u8, DiffFault> {
        self.array(within).await.map(u8::from_le_bytes)
    }

    pub(crate) async fn u32(&mut self, within: &'static str) -> Result<u32, DiffFault> {
        self.array(within).await.map(u32::from_le_bytes)
    }

    pub(crate) async fn u64(&mut self, within: &'static str) -> Result<u64, DiffFault> {
        self.array(within).await.map(u64::from_le_bytes)
    }

    pub(crate) async fn fill(&mut self, buffer: &mut [u8], within: &'static str) -> Result<(), DiffFault> {
        match self.reader.read_exact(buffer).await {
            Ok(_) => {
                self.offset += buffer.len() as u64;
                Ok(())
            }
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => Err(DiffFault::Truncated { within }),
            Err(source) => Err(DiffFault::Io { operation: "read", source }),
        }
    }

    /// Reads a piece of data, whose length the caller has bounded.
    pub(crate) async fn piece(&mut self, length: usize) -> Result<Bytes, DiffFault> {
        let mut piece = BytesMut::with_capacity(length);
        while piece.len() < length {
            match (&mut self.reader).take((length - piece.len()) as u64).read_buf(&mut piece).await {
                Ok(0) => return Err(DiffFault::Truncated { within: "data" }),
                Ok(count) => self.offset += count as u64,
                Err(source) => return Err(DiffFault::Io { operation: "read", source }),
            }
        }
        Ok(piece.freeze())
    }

    /// Passes over `length` bytes, however many, without keeping them.
    pub(crate) async fn skip(&mut self, length: u64) -> Result<(), DiffFault> {
        let copied = tokio::io::copy_buf(&mut (&mut self.reader).take(length), &mut tokio::io::sink()).await;
        let copied = copied.map_err(|source| DiffFault::Io { operation: "read", source })?;
        self.offset += copied;
        match copied == length {
            true => Ok(()),
            false => Err(DiffFault::Truncated { within: "a record" }),
        }
    }

    /// Whether the input ends here.
    pub(crate) async fn at_end(&mut self) -> Result<bool, DiffFault> {
        let read = self.reader.read(&mut [0]).await;
        let count = read.map_err(|source| DiffFault::Io { operation: "read", source })?;
        self.offset += count as u64;
        Ok(count == 0)
    }
}
