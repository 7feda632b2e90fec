//! What a cycle would do.

use std::sync::Arc;

use futures::TryStreamExt;
use serde::Serialize;

use crate::delta::{self, Method};
use crate::extent::ExtentKind;
use crate::image::{Point, Snapshot, SnapshotSupport, SourceImage, TargetImage};

use super::cycle::{NAME_PREFIX, automatic_name, conflict, gather, not_now};
use super::error::Result;
use super::lineage::{Decision, Request, decide};
use super::state::{Commit, Origin, TargetState};

/// What a `sync` would do.
#[derive(Clone, Debug, Serialize)]
pub struct DryRun {
    /// The snapshot that the delta would start from; `None` for a whole copy.
    pub base: Option<String>,
    /// The snapshot that would be replicated. One that does not exist yet is estimated from HEAD as it is now.
    pub snapshot: String,
    /// Whether that snapshot exists on the source.
    pub snapshot_exists: bool,
    /// What would be done, a short name: `full`, `compare`, `increment`, `resume`, `enter-commit`, `nothing`.
    pub action: &'static str,
    /// Whether HEAD of the target would be brought back to the base first.
    pub rewind: bool,
    /// Whether the target would be created.
    pub creates_target: bool,
    /// How the delta is found.
    pub method: Option<Method>,
    /// The image's size, in bytes.
    pub size: u64,
    /// How many extents there are.
    pub extents: u64,
    /// Bytes to read: not all of them need be data.
    pub data_bytes: u64,
    /// Bytes known to be zeroes.
    pub zero_bytes: u64,
}

/// Finds out what [`sync()`](super::sync()) would do, without writing anything. `target` is `None` where it does not
/// exist yet.
pub async fn dry_run(
    source: &Arc<dyn SourceImage>,
    target: Option<&Arc<dyn TargetImage>>,
    request: &Request,
) -> Result<DryRun> {
    let Some(target) = target else {
        let blank = (Origin::Blank, false);
        let there = source.snapshots().await?;
        let named = request.name.as_ref().and_then(|name| there.into_iter().find(|have| have.name == *name));
        let name = request.name.clone().unwrap_or_else(|| format!("{NAME_PREFIX}…"));
        let run = estimate(source, None, blank, named, name).await?;
        return Ok(DryRun { creates_target: true, ..run });
    };
    let facts = gather(source.as_ref(), target.as_ref()).await?;
    let decision = match decide(&facts, request) {
        Ok(decision) => decision,
        Err(kind) => return Err(conflict(kind, source.as_ref(), target.as_ref(), facts)),
    };
    let state = facts.state.as_ref();
    match decision {
        Decision::AlreadyThere(commit) => {
            let known = facts.state.clone().unwrap_or_else(|| TargetState::new(source.identity(), source.location()));
            if let Some(kind) = not_now(source.as_ref(), &known, &commit, request).await? {
                return Err(conflict(kind, source.as_ref(), target.as_ref(), facts));
            }
            Ok(DryRun::nothing("nothing", &commit.name, commit.size))
        }
        Decision::EnterCommit { in_flight, target } => {
            Ok(DryRun::nothing("enter-commit", &in_flight.name, target.size))
        }
        Decision::Resume(in_flight) => {
            let from = (in_flight.from.clone(), in_flight.rewind);
            let run = estimate(source, state, from, in_flight.snapshot.clone(), in_flight.name.clone()).await?;
            Ok(DryRun { action: "resume", ..run })
        }
        Decision::Begin { from, rewind } => {
            let named = |name: &String| facts.source_snapshots.iter().find(|have| have.name == *name).cloned();
            let snapshot = request.name.as_ref().and_then(named);
            let name = request.name.clone().unwrap_or_else(|| automatic_name(&facts));
            estimate(source, state, (from, rewind), snapshot, name).await
        }
    }
}

impl DryRun {
    fn nothing(action: &'static str, snapshot: &str, size: u64) -> Self {
        Self {
            base: None,
            snapshot: snapshot.to_owned(),
            snapshot_exists: true,
            action,
            rewind: false,
            creates_target: false,
            method: None,
            size,
            extents: 0,
            data_bytes: 0,
            zero_bytes: 0,
        }
    }
}

async fn estimate(
    source: &Arc<dyn SourceImage>,
    state: Option<&TargetState>,
    (from, rewind): (Origin, bool),
    snapshot: Option<Snapshot>,
    name: String,
) -> Result<DryRun> {
    let snapshot = snapshot.filter(|_| source.snapshot_support() == SnapshotSupport::Kept);
    let snapshot_exists = snapshot.is_some();
    let view = source.view(&snapshot.map_or(Point::Head, Point::Snapshot)).await?;
    let base = match from {
        Origin::Base(id) => state.and_then(|state| state.commit_of_source(id)),
        Origin::Blank | Origin::Compare => None,
    };
    let plan = delta::plan(view.as_ref(), base.map(Commit::on_source).as_ref()).await?;
    let mut extents = delta::extents(view.clone(), &plan, source.layout(), 0);
    let mut run = DryRun {
        base: base.map(|base| base.name.clone()),
        snapshot_exists,
        rewind,
        action: match from {
            Origin::Blank => "full",
            Origin::Compare => "compare",
            Origin::Base(_) => "increment",
        },
        method: Some(if from == Origin::Compare { Method::Compare } else { plan.method.clone() }),
        ..DryRun::nothing("", &name, view.size())
    };
    while let Some(window) = extents.try_next().await? {
        run.extents += window.len() as u64;
        for extent in window {
            match extent.kind {
                ExtentKind::Data => run.data_bytes += extent.range.length(),
                ExtentKind::Zero => run.zero_bytes += extent.range.length(),
            }
        }
    }
    Ok(run)
}
