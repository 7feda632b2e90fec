//! Rewinding: HEAD of a target is made equal to one of the target's own snapshots.
//!
//! Needed when HEAD holds parts of a snapshot that can't be finished, because the source no longer has it. A new delta
//! alone can't repair that: a byte that changed in the lost snapshot and back in the next is in no delta, and neither
//! is one that was written to a hole and discarded again. What the target itself says changed since its snapshot is
//! exactly what has to be put back, and costs what was dirty, not what the disk holds.

use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use crate::delta;
use crate::image::{Point, Snapshot, TargetImage};
use crate::pipeline::{self, Applied, ApplyOptions, Checkpoint, Counters, Limits, ReadOptions};

use super::error::Result;

/// For work that has no checkpoint. A rewind begun anew finds less to do; an import begins anew.
pub(super) struct NoCheckpoint;

#[async_trait::async_trait]
impl Checkpoint for NoCheckpoint {
    async fn save(&mut self, _progress_to: u64) -> Result<(), crate::image::ImageError> {
        Ok(())
    }
}

/// Makes HEAD equal to `base`, a snapshot of `target`, and flushes. [`Applied::Part`] if it was cancelled.
pub(super) async fn rewind(
    target: &Arc<dyn TargetImage>,
    base: &Snapshot,
    limits: Limits,
    cancel: &CancellationToken,
) -> Result<Applied> {
    if target.size().await? != base.size {
        target.resize(base.size).await?;
    }
    let head = target.view(&Point::Head).await?;
    let plan = delta::plan(head.as_ref(), Some(base)).await?;
    let dirty = delta::extents(head, &plan, target.layout(), 0);
    // The extents tell where HEAD differs, and as what it is there *now*: what the snapshot holds must be read.
    let dirty = futures::StreamExt::boxed(futures::TryStreamExt::map_ok(dirty, |window| {
        window.into_iter().map(|extent| crate::extent::Extent::data(extent.range)).collect()
    }));
    let view = target.view(&Point::Snapshot(base.clone())).await?;
    let counters = Arc::new(Counters::default());
    let requests = limits.requests;
    let options = ReadOptions { limits, drop_zeroes: false, compare_with: None };
    let batches = pipeline::read(view, dirty, options, counters.clone(), cancel.clone());
    let apply = ApplyOptions { requests, ..ApplyOptions::default() };
    Ok(pipeline::apply(batches, target.clone(), apply, &mut NoCheckpoint, counters, cancel).await?)
}
