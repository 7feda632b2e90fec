//! A cheap look at a volume, for whoever watches many of them: what is committed, and how much has changed since.

use std::sync::Arc;

use futures::TryStreamExt;

use super::error::Result;
use super::side::load_state;
use super::state::{Commit, InFlight};
use crate::delta::{self, Method, Plan};
use crate::image::{Point, SnapshotSupport, SourceImage, TargetImage, View};

/// What poolshift keeps with a target, as far as the scheduler cares.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Look {
    /// The commits, oldest first; all of this source.
    pub commits: Vec<Commit>,
    /// What is in flight.
    pub in_flight: Option<InFlight>,
}

impl Look {
    /// The snapshot from which the next delta starts.
    pub fn base(&self) -> Option<&Commit> {
        self.commits.last()
    }
}

/// Reads the state that is kept with the target; one request, and no look at the data. A target that follows another
/// source looks as if it had never been synced: the cycle then names the conflict.
pub async fn look(source: &dyn SourceImage, target: &dyn TargetImage) -> Result<Look> {
    let state = load_state(target).await?.filter(|state| state.source == *source.identity());
    Ok(state.map(|state| Look { commits: state.commits, in_flight: state.in_flight }).unwrap_or_default())
}

/// What has changed on a source since a commit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Changed {
    /// Bytes: whole objects, so at most; 0 only if nothing has changed at all. `None` where nothing tells without reading.
    pub bytes: Option<u64>,
    /// The source's size now, in bytes.
    pub size: u64,
    /// How it was found; `None` for a source without snapshots.
    pub method: Option<Method>,
}

/// Finds out what has changed on the source since `base`.
pub async fn changed_since(source: &dyn SourceImage, base: &Commit) -> Result<Changed> {
    if source.snapshot_support() == SnapshotSupport::HeadOnly {
        return Ok(Changed { bytes: None, size: source.size().await?, method: None });
    }
    let head = source.view(&Point::Head).await?;
    let size = head.size();
    let plan = delta::plan(head.as_ref(), Some(&base.on_source())).await?;
    let found = |bytes| Changed { bytes, size, method: Some(plan.method.clone()) };
    if plan.method != Method::TwoLevel {
        return Ok(found(None));
    }
    if any_extent(source, head, &plan).await? {
        return Ok(found(Some(plan.covered())));
    }
    // A size of its own is a change, though no object is.
    Ok(found(Some(u64::from(size != base.size))))
}

/// Whether anything in a plan has changed. The object map names unchanged objects as well where older snapshots are kept:
/// looks until one has changed.
pub(super) async fn any_extent(source: &dyn SourceImage, head: Arc<dyn View>, plan: &Plan) -> Result<bool> {
    let mut extents = delta::extents(head, plan, source.layout(), 0);
    while let Some(window) = extents.try_next().await? {
        if !window.is_empty() {
            return Ok(true);
        }
    }
    Ok(false)
}
