//! Writes a batch stream.

use tokio::io::{AsyncWrite, AsyncWriteExt, BufWriter};

use super::frame::{Head, kind, preamble};
use super::ledger::Ledger;
use super::message::{self, End};
use super::{Hello, Totals, WireError, WireFault};
use crate::batch::EncodedBatch;

/// Small pieces are gathered up to this many bytes; larger ones go straight to the pipe.
const BUFFER: usize = 64 << 10;

/// Writes a batch stream, a frame at a time.
///
/// The writer refuses what a reader would: batches out of sequence, beyond the image, or against their own rules.
/// After an error, or when a call was cancelled, the stream is broken: only dropping it is left.
pub struct StreamWriter<W> {
    output: BufWriter<W>,
    ledger: Ledger,
    frame_offset: u64,
    open: bool,
}

impl<W: AsyncWrite + Unpin> StreamWriter<W> {
    /// Begins a stream.
    pub async fn open(output: W, hello: &Hello) -> Result<Self, WireError> {
        let output = BufWriter::with_capacity(BUFFER, output);
        let mut writer = Self { output, ledger: Ledger::new(), frame_offset: 0, open: true };
        let result = writer.begin(hello).await;
        writer.conclude(result).map(|()| writer)
    }

    async fn begin(&mut self, hello: &Hello) -> Result<(), WireFault> {
        let message = message::encode_hello(hello)?;
        self.ledger.begin(hello);
        self.put(&preamble()).await?;
        self.put_head(kind::HELLO, &message, 0).await?;
        self.flush().await
    }

    /// Writes a batch, and hands it to the pipe.
    pub async fn write(&mut self, batch: &EncodedBatch) -> Result<(), WireError> {
        let result = self.write_batch(batch).await;
        self.conclude(result)
    }

    async fn write_batch(&mut self, batch: &EncodedBatch) -> Result<(), WireFault> {
        self.start_frame()?;
        batch.check().map_err(WireFault::Batch)?;
        let payload_length = u32::try_from(batch.payload_length()).unwrap_or(u32::MAX);
        if payload_length > super::PAYLOAD_MAX {
            return Err(WireFault::PayloadTooLong { length: payload_length });
        }
        self.ledger.take(batch)?;
        self.put_head(kind::BATCH, &message::encode_batch(batch), payload_length).await?;
        for piece in &batch.payload {
            self.put(piece).await?;
        }
        self.flush().await
    }

    /// Ends the stream, and returns what it carried and the output, flushed. A reader takes a stream for whole only
    /// if this was called.
    pub async fn finish(mut self) -> Result<(Totals, W), WireError> {
        let result = self.write_end().await;
        self.conclude(result)?;
        Ok((self.ledger.totals(), self.output.into_inner()))
    }

    async fn write_end(&mut self) -> Result<(), WireFault> {
        self.start_frame()?;
        let Totals { batches, data_bytes, zero_bytes, .. } = self.ledger.totals();
        let end = End { batches, data_bytes, zero_bytes, digest: self.ledger.digest() };
        self.put_head(kind::END, &message::encode_end(&end), 0).await?;
        self.flush().await
    }

    /// Gives the stream up and tells the reader why, in place of the end.
    pub async fn give_up(mut self, reason: &str) -> Result<(), WireError> {
        let result = self.write_failed(reason).await;
        self.conclude(result)
    }

    async fn write_failed(&mut self, reason: &str) -> Result<(), WireFault> {
        self.start_frame()?;
        self.put_head(kind::FAILED, &message::encode_failed(reason), 0).await?;
        self.flush().await
    }

    /// Until the frame is concluded the stream counts as broken, so that a cancelled write can't be followed by
    /// another frame.
    fn start_frame(&mut self) -> Result<(), WireFault> {
        self.frame_offset = self.ledger.offset();
        match std::mem::replace(&mut self.open, false) {
            true => Ok(()),
            false => Err(WireFault::Finished),
        }
    }

    fn conclude(&mut self, result: Result<(), WireFault>) -> Result<(), WireError> {
        self.open = result.is_ok();
        result.map_err(|fault| WireError { offset: self.frame_offset, fault })
    }

    async fn put_head(&mut self, kind: u16, message: &[u8], payload_length: u32) -> Result<(), WireFault> {
        self.put(&Head::new(kind, message, payload_length).encode()).await?;
        self.put(message).await
    }

    async fn put(&mut self, bytes: &[u8]) -> Result<(), WireFault> {
        self.output.write_all(bytes).await.map_err(|source| WireFault::Io { operation: "write", source })?;
        self.ledger.pass(bytes);
        Ok(())
    }

    async fn flush(&mut self) -> Result<(), WireFault> {
        self.output.flush().await.map_err(|source| WireFault::Io { operation: "write", source })
    }
}
