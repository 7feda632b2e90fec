//! Exporting: a delta of a source as rbd's diff stream, version 1.

use std::sync::Arc;

use futures::TryStreamExt;
use serde::Serialize;
use tokio::io::AsyncWrite;
use tokio_util::sync::CancellationToken;

use crate::batch::Content;
use crate::delta::stream::DiffWriter;
use crate::delta::{self, Method};
use crate::image::SourceImage;
use crate::pipeline::{self, Limits, ReadOptions};

use super::cycle::Progress;
use super::error::{CycleError, Result};
use super::head::HeadWatch;
use super::side::{point_still_there, still_there};
use super::verify::{find, open_point};

/// What was exported.
#[derive(Clone, Debug, Serialize)]
pub struct ExportReport {
    /// The snapshot that the diff is to be applied to; `None`: an empty image.
    pub base: Option<String>,
    /// The snapshot that it leads to; `None`: HEAD.
    pub snapshot: Option<String>,
    /// Whether nothing tells of a writer of HEAD: the data is of one moment. True of every snapshot.
    pub consistent: bool,
    /// What the user has to know of HEAD's writers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub warning: Option<String>,
    /// The image's size in the end, in bytes.
    pub size: u64,
    /// How the delta was found.
    pub method: Method,
    /// Bytes of data in the stream.
    pub data_bytes: u64,
    /// Bytes of zeroes in the stream.
    pub zero_bytes: u64,
    /// The stream's length, in bytes.
    pub stream_bytes: u64,
}

/// Writes the delta between two snapshots, or from one to HEAD (which the stream does not name), as `rbd export-diff`
/// does, but for zeroes: runs of at least 4 KiB are said and not sent, and a diff from nothing leaves them out. If it
/// fails or is cancelled, the stream has no end record.
pub async fn export_diff<W: AsyncWrite + Unpin + Send>(
    source: Arc<dyn SourceImage>,
    (from, to): (Option<&str>, Option<&str>),
    limits: Limits,
    output: W,
    progress: &Progress,
    cancel: &CancellationToken,
) -> Result<ExportReport> {
    let mut watch = HeadWatch::begin(source.as_ref(), to).await?;
    if let Some(warning) = watch.warning() {
        tracing::warn!("{warning}");
    }
    let (view, point) = open_point(source.as_ref(), to).await?;
    let since = match from {
        Some(name) => Some(find(source.as_ref(), name).await?),
        None => None,
    };
    let plan = delta::plan(view.as_ref(), since.as_ref()).await?;
    progress.set_plan(&plan);
    let size = view.size();
    let mut writer = DiffWriter::open(output, from, to, size).await?;
    let extents = delta::extents(view.clone(), &plan, source.layout(), 0);
    let read = ReadOptions { limits, drop_zeroes: from.is_none(), compare_with: None };
    let mut batches = pipeline::read(view, extents, read, progress.counters.clone(), cancel.clone());
    let (mut data_bytes, mut zero_bytes) = (0, 0);
    while let Some(loaded) = batches.try_next().await? {
        loaded.batch.verify().map_err(pipeline::PipelineError::from)?;
        for chunk in &loaded.batch.chunks {
            match &chunk.content {
                Content::Data { bytes, .. } => {
                    writer.data(chunk.range.offset(), bytes).await?;
                    data_bytes += chunk.range.length();
                }
                Content::Zero => {
                    writer.zero(chunk.range).await?;
                    zero_bytes += chunk.range.length();
                }
            }
        }
        progress.counters.position.store(loaded.batch.progress_to, std::sync::atomic::Ordering::Relaxed);
    }
    if cancel.is_cancelled() {
        let snapshot = to.unwrap_or("HEAD").to_owned();
        return Err(CycleError::Interrupted { snapshot, progress_to: 0, size });
    }
    if let Some(since) = &since {
        still_there(source.as_ref(), since).await?;
    }
    point_still_there(source.as_ref(), &point).await?;
    let late = watch.end(source.as_ref()).await?;
    let (consistent, warning) = (watch.is_consistent(), watch.warning());
    if let Some(warning) = warning.as_ref().filter(|_| late) {
        tracing::warn!("{warning}");
    }
    let (_, stream_bytes) = writer.finish().await?;
    let (base, snapshot) = (from.map(str::to_owned), to.map(str::to_owned));
    Ok(ExportReport {
        base,
        snapshot,
        consistent,
        warning,
        size,
        method: plan.method,
        data_bytes,
        zero_bytes,
        stream_bytes,
    })
}
