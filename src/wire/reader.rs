//! Reads a batch stream.

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, BufReader};

use super::frame::{FLAG_SKIPPABLE, HEAD_LENGTH, Head, PREAMBLE_LENGTH, check_preamble, kind};
use super::ledger::Ledger;
use super::message::{self, End};
use super::{Hello, Message, Totals, WireError, WireFault};

/// Heads and messages are read through a buffer of this many bytes; payloads go past it.
const BUFFER: usize = 64 << 10;

/// Reads a batch stream, a frame at a time, and trusts none of it.
///
/// Holds at most one frame. A call that was cancelled, or failed, leaves the stream unreadable.
pub struct StreamReader<R> {
    input: BufReader<R>,
    ledger: Ledger,
    hello: Hello,
    frame_offset: u64,
    open: bool,
}

impl<R: AsyncRead + Unpin> StreamReader<R> {
    /// Reads the preamble and the Hello. The caller decides by [`Self::hello`] whether the stream fits the target
    /// before anything is written.
    pub async fn open(input: R) -> Result<Self, WireError> {
        let mut input = BufReader::with_capacity(BUFFER, input);
        let mut ledger = Ledger::new();
        let mut frame_offset = 0;
        match Self::begin(&mut input, &mut ledger, &mut frame_offset).await {
            Ok(hello) => Ok(Self { input, ledger, hello, frame_offset, open: true }),
            Err(fault) => Err(WireError { offset: frame_offset, fault }),
        }
    }

    async fn begin(input: &mut BufReader<R>, ledger: &mut Ledger, frame_offset: &mut u64) -> Result<Hello, WireFault> {
        let mut preamble = [0; PREAMBLE_LENGTH];
        fill(input, &mut preamble, "the preamble").await?;
        check_preamble(preamble)?;
        ledger.pass(&preamble);
        *frame_offset = ledger.offset();
        let (head, message) = read_message(input).await?;
        if head.kind != kind::HELLO {
            return Err(WireFault::OutOfOrder { kind: head.kind, expected: "Hello (kind 1)" });
        }
        refuse_payload(&head)?;
        let hello = message::decode_hello(&message)?;
        ledger.pass(&head.encode());
        ledger.pass(&message);
        ledger.begin(&hello);
        Ok(hello)
    }

    /// What the stream is about.
    pub fn hello(&self) -> &Hello {
        &self.hello
    }

    /// What has been read so far.
    pub fn totals(&self) -> Totals {
        self.ledger.totals()
    }

    /// Reads the next batch, or the end. After the end nothing is read: not even whether the input ends there, which
    /// is [`Self::expect_nothing_more`]'s.
    ///
    /// Of a batch everything is checked but its payload, which [`crate::batch::decode`] and
    /// [`crate::batch::Batch::verify`] do. Nothing may be committed before the end was returned.
    pub async fn next(&mut self) -> Result<Message, WireError> {
        // Stays false when this future is dropped or fails.
        let result = match std::mem::replace(&mut self.open, false) {
            true => self.read_frame().await,
            false => Err(WireFault::Finished),
        };
        self.open = matches!(result, Ok(Message::Batch(_)));
        result.map_err(|fault| WireError { offset: self.frame_offset, fault })
    }

    /// Waits for the end of the input, and refuses anything before it: for files, and for pipes that are closed by
    /// their writer.
    pub async fn expect_nothing_more(&mut self) -> Result<(), WireError> {
        self.frame_offset = self.ledger.offset();
        let fault = match self.input.read(&mut [0]).await {
            Ok(0) => return Ok(()),
            Ok(_) => WireFault::TrailingBytes,
            Err(source) => WireFault::Io { operation: "read", source },
        };
        Err(WireError { offset: self.frame_offset, fault })
    }

    async fn read_frame(&mut self) -> Result<Message, WireFault> {
        loop {
            self.frame_offset = self.ledger.offset();
            let (head, message) = read_message(&mut self.input).await?;
            match head.kind {
                kind::BATCH => return self.read_batch(&head, &message).await.map(Message::Batch),
                kind::END => return self.read_end(&head, &message).map(Message::End),
                kind::FAILED => {
                    refuse_payload(&head)?;
                    return Err(WireFault::SenderFailed { reason: message::decode_failed(&message)? });
                }
                kind::HELLO => {
                    return Err(WireFault::OutOfOrder { kind: head.kind, expected: "a batch or the end" });
                }
                _ if head.flags & FLAG_SKIPPABLE != 0 => self.skip(&head, &message).await?,
                kind => return Err(WireFault::UnknownKind { kind }),
            }
        }
    }

    async fn read_batch(&mut self, head: &Head, message: &[u8]) -> Result<crate::batch::EncodedBatch, WireFault> {
        let mut batch = message::decode_batch(message)?;
        self.ledger.pass(&head.encode());
        self.ledger.pass(message);
        let payload = self.read_payload(head.payload_length as usize).await?;
        if !payload.is_empty() {
            batch.payload.push(payload);
        }
        batch.check().map_err(WireFault::Batch)?;
        self.ledger.take(&batch)?;
        Ok(batch)
    }

    /// Reads what [`Head::decode`] has found to be within the limit.
    async fn read_payload(&mut self, length: usize) -> Result<Bytes, WireFault> {
        let mut payload = BytesMut::with_capacity(length);
        while payload.len() < length {
            let mut rest = (&mut self.input).take((length - payload.len()) as u64);
            match rest.read_buf(&mut payload).await {
                Ok(0) => return Err(WireFault::Truncated { within: "a payload" }),
                Ok(_) => {}
                Err(source) => return Err(WireFault::Io { operation: "read", source }),
            }
        }
        self.ledger.pass(&payload);
        Ok(payload.freeze())
    }

    async fn skip(&mut self, head: &Head, message: &[u8]) -> Result<(), WireFault> {
        self.ledger.pass(&head.encode());
        self.ledger.pass(message);
        self.read_payload(head.payload_length as usize).await.map(drop)
    }

    fn read_end(&mut self, head: &Head, message: &[u8]) -> Result<Totals, WireFault> {
        refuse_payload(head)?;
        let End { batches, data_bytes, zero_bytes, digest } = message::decode_end(message)?;
        let found = self.ledger.totals();
        for (what, announced, found) in [
            ("batches", batches, found.batches),
            ("bytes of data", data_bytes, found.data_bytes),
            ("bytes of zeroes", zero_bytes, found.zero_bytes),
        ] {
            if announced != found {
                return Err(WireFault::Totals { what, announced, found });
            }
        }
        if self.ledger.digest() != digest {
            return Err(WireFault::Digest);
        }
        self.ledger.pass(&head.encode());
        self.ledger.pass(message);
        Ok(self.ledger.totals())
    }
}

/// Reads a head and its message, of a checked length, and checks their CRC.
async fn read_message<R: AsyncRead + Unpin>(input: &mut R) -> Result<(Head, Vec<u8>), WireFault> {
    let mut head = [0; HEAD_LENGTH];
    fill(input, &mut head, "a frame's head, before the end that was to come").await?;
    let head = Head::decode(head)?;
    let mut message = vec![0; head.message_length as usize];
    fill(input, &mut message, "a message").await?;
    head.check(&message)?;
    Ok((head, message))
}

async fn fill<R: AsyncRead + Unpin>(input: &mut R, buffer: &mut [u8], within: &'static str) -> Result<(), WireFault> {
    match input.read_exact(buffer).await {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => Err(WireFault::Truncated { within }),
        Err(source) => Err(WireFault::Io { operation: "read", source }),
    }
}

fn refuse_payload(head: &Head) -> Result<(), WireFault> {
    match head.payload_length {
        0 => Ok(()),
        length => Err(WireFault::UnexpectedPayload { length }),
    }
}
