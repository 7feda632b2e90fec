//! Within one process: batches are handed over as they are, or through the codec where the user asks for compression.

use futures::stream::{BoxStream, StreamExt};

use crate::batch::{Compression, decode, encode};
use crate::pipeline::{Loaded, Result, on_cpu};

/// How many batches are in the codec at a time.
const CODEC_DEPTH: usize = 4;

/// Hands batches over. Without compression nothing is copied; with it each batch is encoded and decoded on the rayon
/// pool, which saves nothing here and is for measuring and testing.
pub fn in_process(
    batches: BoxStream<'static, Result<Loaded>>,
    compression: Compression,
) -> BoxStream<'static, Result<Loaded>> {
    if compression == Compression::None {
        return batches;
    }
    batches
        .map(move |loaded| async move {
            let Loaded { batch, permit } = loaded?;
            let batch = on_cpu(move || decode(encode(batch, compression))).await?;
            Ok(Loaded { batch, permit })
        })
        .buffered(CODEC_DEPTH)
        .boxed()
}
