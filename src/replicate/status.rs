//! How far a volume is: read from both sides, without a lease and without writing.

use serde::Serialize;

use crate::delta::Method;
use crate::image::{LeaseOwner, SnapshotSupport, SourceImage, TargetImage};

use super::cycle::gather;
use super::error::Result;
use super::lineage::{self, Decision, Facts, Request};
use super::look::changed_since;
use super::state::{Commit, Origin, TargetState};

/// How far a volume is.
#[derive(Clone, Debug, Serialize)]
pub struct Status {
    /// The source, as the user wrote it.
    pub source: String,
    /// The target, as the user wrote it.
    pub target: String,
    /// In short: `in-step`, `behind`, `in-flight`, `never-synced`, `conflict`.
    pub state: &'static str,
    /// The snapshot that the next delta would start from.
    pub base: Option<StatusPoint>,
    /// The newest snapshot that is on the target.
    pub last_commit: Option<StatusPoint>,
    /// What is in flight.
    pub in_flight: Option<StatusInFlight>,
    /// Whether HEAD of the target may hold something else than the last commit.
    pub head_dirty: bool,
    /// An upper bound of what changed on the source since the base, in bytes, from the object map: whole objects.
    /// `None` where there is no base, or nothing tells without reading.
    pub changed_bytes_at_most: Option<u64>,
    /// How that was found.
    pub method: Option<Method>,
    /// Who works on the target now.
    pub lease: Option<LeaseOwner>,
    /// What stands in the way of the next cycle.
    pub conflict: Option<String>,
    /// What the user should know about the images.
    pub remarks: Vec<String>,
}

/// A committed snapshot.
#[derive(Clone, Debug, Serialize)]
pub struct StatusPoint {
    /// Its name.
    pub snapshot: String,
    /// When the source snapshot was made or first used, RFC 3339.
    pub at: String,
    /// How long ago that is, in seconds.
    pub age_seconds: Option<i64>,
}

/// A snapshot on its way.
#[derive(Clone, Debug, Serialize)]
pub struct StatusInFlight {
    /// Its name.
    pub snapshot: String,
    /// Everything below this offset is applied and flushed.
    pub progress_to: u64,
    /// The image's size in it, in bytes, once the snapshot exists.
    pub size: Option<u64>,
    /// Whether only the commit is missing.
    pub applied: bool,
}

impl StatusPoint {
    fn of(commit: &Commit) -> Self {
        let since = commit.at.parse::<jiff::Timestamp>().ok();
        let age = since.and_then(|at| crate::clock::age(at, crate::clock::now()).ok());
        let age = age.and_then(|age| i64::try_from(age.as_secs()).ok());
        Self { snapshot: commit.name.clone(), at: commit.at.clone(), age_seconds: age }
    }
}

/// Finds out how far a volume is.
pub async fn status(source: &dyn SourceImage, target: &dyn TargetImage) -> Result<Status> {
    let facts = gather(source, target).await?;
    let decision = lineage::decide(&facts, &Request::default());
    let base = match &decision {
        Ok(decision) => base_of(&facts, decision).cloned(),
        Err(_) => None,
    };
    let mut status = Status {
        source: source.location().to_owned(),
        target: target.location().to_owned(),
        state: "behind",
        base: base.as_ref().map(StatusPoint::of),
        last_commit: facts.state.as_ref().and_then(|state| state.newest()).map(StatusPoint::of),
        in_flight: in_flight_of(&facts),
        head_dirty: facts.head_differs || facts.state.as_ref().is_some_and(TargetState::is_dirty),
        changed_bytes_at_most: None,
        method: None,
        lease: target.lease_owner().await?,
        conflict: decision.as_ref().err().map(|kind| format!("{kind}; {}", kind.hint())),
        remarks: source.remarks().into_iter().chain(target.remarks()).collect(),
    };
    if let Some(base) = base.filter(|_| source.snapshot_support() == SnapshotSupport::Kept) {
        let changed = changed_since(source, &base).await?;
        (status.changed_bytes_at_most, status.method) = (changed.bytes, changed.method);
    }
    status.state = match (&decision, &status) {
        (Err(_), _) => "conflict",
        (_, Status { in_flight: Some(_), .. }) => "in-flight",
        (_, Status { last_commit: None, .. }) => "never-synced",
        (_, Status { changed_bytes_at_most: Some(0), .. }) => "in-step",
        _ => "behind",
    };
    Ok(status)
}

fn base_of<'a>(facts: &'a Facts, decision: &Decision) -> Option<&'a Commit> {
    let state = facts.state.as_ref()?;
    let from = match decision {
        Decision::Begin { from, .. } => from,
        Decision::Resume(in_flight) | Decision::EnterCommit { in_flight, .. } => &in_flight.from,
        Decision::AlreadyThere(_) => return state.newest(),
    };
    match from {
        Origin::Base(id) => state.commit_of_source(*id),
        Origin::Blank | Origin::Compare => None,
    }
}

fn in_flight_of(facts: &Facts) -> Option<StatusInFlight> {
    let in_flight = facts.state.as_ref()?.in_flight.as_ref()?;
    Some(StatusInFlight {
        snapshot: in_flight.name.clone(),
        progress_to: in_flight.progress_to,
        size: in_flight.snapshot.as_ref().map(|snapshot| snapshot.size),
        applied: in_flight.applied,
    })
}
