//! Through a pipe: batches are encoded into a batch stream, and decoded from one.

use std::sync::{Arc, Mutex, PoisonError};

use futures::stream::{self, BoxStream, StreamExt, TryStreamExt};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_util::sync::CancellationToken;

use crate::batch::{BATCH_MAX, Compression, decode, encode};
use crate::pipeline::{Budgets, Limits, Loaded, PipelineError, Result, on_cpu};
use crate::wire::{Hello, Message, StreamReader, StreamWriter, Totals};

/// How many batches are in the codec at a time: enough for every core of a small host while one is being written.
const CODEC_DEPTH: usize = 4;

/// Writes `hello` and the batches. Gives back the stream without its end, which the caller writes if all is well, or
/// `None` if it was cancelled. A stream without an end is refused by every reader; where that is still possible, the
/// reader is told why.
pub async fn send<W: AsyncWrite + Unpin + Send>(
    hello: &Hello,
    batches: BoxStream<'static, Result<Loaded>>,
    compression: Compression,
    output: W,
    cancel: &CancellationToken,
) -> Result<Option<StreamWriter<W>>> {
    let mut writer = StreamWriter::open(output, hello).await?;
    let mut encoded = batches
        .map(move |loaded| async move {
            let Loaded { batch, permit } = loaded?;
            let batch = on_cpu(move || encode(batch, compression)).await;
            Ok::<_, PipelineError>((batch, permit))
        })
        .buffered(CODEC_DEPTH);
    loop {
        match encoded.try_next().await {
            Ok(Some((batch, permit))) => {
                writer.write(&batch).await?;
                drop(permit);
            }
            // Cancelled, the batches just end: without this the rest would be missing and the stream look whole.
            Ok(None) if cancel.is_cancelled() => {
                writer.give_up("the sender was interrupted").await?;
                return Ok(None);
            }
            Ok(None) => return Ok(Some(writer)),
            Err(error) => {
                // What stopped the sender is what its user has to see, even if the pipe is broken as well.
                let _ = writer.give_up(&error.to_string()).await;
                return Err(error);
            }
        }
    }
}

/// The totals of a stream, once its end has been read.
pub type Received = Arc<Mutex<Option<Totals>>>;

/// Reads the batches of a stream that was opened. The batches end without an error only if the stream's own end was
/// there and everything was in order; then `received` holds its totals.
pub fn receive<R: AsyncRead + Unpin + Send + 'static>(
    reader: StreamReader<R>,
    limits: Limits,
    received: Received,
) -> BoxStream<'static, Result<Loaded>> {
    let budgets = Budgets::new(&limits, BATCH_MAX);
    let encoded = stream::try_unfold(reader, move |mut reader| {
        let received = received.clone();
        async move {
            match reader.next().await? {
                Message::Batch(batch) => Ok(Some((batch, reader))),
                Message::End(totals) => {
                    reader.expect_nothing_more().await?;
                    *received.lock().unwrap_or_else(PoisonError::into_inner) = Some(totals);
                    Ok::<_, PipelineError>(None)
                }
            }
        }
    });
    encoded
        .and_then(move |batch| {
            let budgets = budgets.clone();
            async move {
                let permit = budgets.take(batch.decoded_length.min(BATCH_MAX)).await;
                Ok((batch, permit))
            }
        })
        .map(|next| async move {
            let (batch, permit) = next?;
            let batch = on_cpu(move || decode(batch)).await?;
            Ok(Loaded { batch, permit })
        })
        .buffered(CODEC_DEPTH)
        .boxed()
}
