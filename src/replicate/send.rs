//! Sending: a delta of a source as a batch stream.

use std::sync::Arc;

use serde::Serialize;
use tokio::io::AsyncWrite;
use tokio_util::sync::CancellationToken;

use crate::batch::Compression;
use crate::delta::{self, Method};
use crate::image::{Point, Snapshot, SourceImage};
use crate::pipeline::{self, Limits, ReadOptions};
use crate::transport::pipe;
use crate::wire::{Hello, Totals};

use super::cycle::Progress;
use super::error::{CycleError, Result};
use super::side::{point_still_there, still_there};
use super::verify::{find, open_point};

/// What was sent.
#[derive(Clone, Debug, Serialize)]
pub struct SendReport {
    /// The snapshot that the receiver must be at; `None`: it must be empty.
    pub base: Option<String>,
    /// The snapshot that the receiver will be at.
    pub snapshot: String,
    /// How the delta was found.
    pub method: Method,
    /// What the stream carries.
    #[serde(flatten)]
    pub totals: Totals,
}

/// What to send.
#[derive(Clone, Debug)]
pub struct SendRequest {
    /// The snapshot to end at; `None` only for an image without snapshots.
    pub to: Option<String>,
    /// The snapshot to start from; `None`: an image of zeroes.
    pub from: Option<String>,
    /// How batches are compressed.
    pub compression: Compression,
    /// What may be in flight.
    pub limits: Limits,
}

/// Writes the delta from one snapshot to another as a batch stream. The source is only read.
pub async fn send<W: AsyncWrite + Unpin + Send>(
    source: Arc<dyn SourceImage>,
    request: &SendRequest,
    output: W,
    progress: &Progress,
    cancel: &CancellationToken,
) -> Result<SendReport> {
    let (view, point) = open_point(source.as_ref(), request.to.as_deref()).await?;
    let from = match &request.from {
        Some(name) => Some(find(source.as_ref(), name).await?),
        None => None,
    };
    let to = match &point {
        Point::Snapshot(snapshot) => snapshot.clone(),
        Point::Head => Snapshot { id: 0, name: live_label(), size: view.size() },
    };
    let plan = delta::plan(view.as_ref(), from.as_ref()).await?;
    progress.set_plan(&plan);
    let hello = Hello {
        tool: Hello::this_tool(),
        source: source.identity().clone(),
        location: source.location().to_owned(),
        from: from.clone(),
        to: to.clone(),
        layout: source.layout(),
        compression: request.compression.to_string(),
    };
    let extents = delta::extents(view.clone(), &plan, source.layout(), 0);
    // A stream from nothing is for an empty target: its zeroes are there already.
    let read = ReadOptions { limits: request.limits.clone(), drop_zeroes: from.is_none(), compare_with: None };
    let batches = pipeline::read(view, extents, read, progress.counters.clone(), cancel.clone());
    let sent = pipe::send(&hello, batches, request.compression, output, cancel).await?;
    let Some(writer) = sent else {
        return Err(CycleError::Interrupted { snapshot: to.name, progress_to: 0, size: to.size });
    };
    if let Err(error) = both_still_there(source.as_ref(), from.as_ref(), &point).await {
        // What stopped the sender is what its user has to see, even if the pipe is broken as well.
        let _ = writer.give_up(&error.to_string()).await;
        return Err(error);
    }
    let totals = writer.finish().await.map_err(pipeline::PipelineError::from)?.0;
    Ok(SendReport { base: from.map(|from| from.name), snapshot: to.name, method: plan.method, totals })
}

/// Before a stream is ended: what it was made of was there all the time.
async fn both_still_there(source: &dyn SourceImage, from: Option<&Snapshot>, to: &Point) -> Result<()> {
    if let Some(from) = from {
        still_there(source, from).await?;
    }
    point_still_there(source, to).await
}

/// What the point of a live image is called: when it was read.
fn live_label() -> String {
    format!("live-{}", crate::clock::now().strftime("%Y%m%dT%H%M%S.%3fZ"))
}
