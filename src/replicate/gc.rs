//! Removing orphans: what [`orphans`](super::orphans) names, with the target's lease.

use std::sync::Arc;

use serde::Serialize;

use super::error::{Conflict, ConflictKind, Result};
use super::orphans::{Known, Orphan, OrphanFacts, orphans};
use super::report::Pruned;
use super::retention;
use super::side::{load_state, store, with_lease};
use super::state::{Retired, TargetState};
use crate::image::{SourceImage, TargetImage};

/// The two sides of a volume.
pub type Sides = (Arc<dyn SourceImage>, Arc<dyn TargetImage>);

/// What was found on a volume, and what became of it.
#[derive(Clone, Debug, Serialize)]
pub struct GcReport {
    /// The source, as the user wrote it.
    pub source: String,
    /// The target, as the user wrote it.
    pub target: String,
    /// What may go.
    pub orphans: Vec<Orphan>,
    /// What went, and what could not.
    pub removed: Pruned,
}

/// Finds out what the states with all targets at hand know: first lists every image's snapshots, then reads the states.
/// Fails if one can't be read, for it might need what another one would give away.
pub async fn survey(volumes: &[Sides]) -> Result<Known> {
    let mut known = Known::default();
    for (source, target) in volumes {
        let (on_source, on_target) = futures::try_join!(source.snapshots(), target.snapshots())?;
        known.list(source.identity(), &on_source);
        known.list(target.identity(), &on_target);
    }
    for (_, target) in volumes {
        if let Some(state) = load_state(target.as_ref()).await? {
            known.note(target.identity(), &state);
        }
    }
    Ok(known)
}

/// Lists the orphans of a volume; changes nothing, and takes no lease.
pub async fn find_orphans(source: &dyn SourceImage, target: &dyn TargetImage, known: &Known) -> Result<GcReport> {
    let facts = gather(source, target).await?;
    Ok(report(source, target, orphans(&facts, known)))
}

/// Removes the orphans of a volume, with the target's lease; those that are not proven to be poolshift's only if
/// `unknown` asks for it. `known` is a [`survey()`] of all targets at hand, this one among them.
///
/// Anything that can't be removed stays in the state, for the next cycle or run.
pub async fn gc(
    source: &Arc<dyn SourceImage>,
    target: &Arc<dyn TargetImage>,
    known: &Known,
    unknown: bool,
) -> Result<GcReport> {
    with_lease(target, || async {
        let facts = gather(source.as_ref(), target.as_ref()).await?;
        let found = orphans(&facts, known);
        let going = found.iter().filter(|orphan| unknown || orphan.why.is_proven());
        let going: Vec<_> = going.map(|orphan| Retired::of(orphan.side, orphan.id, &orphan.name)).collect();
        let mut report = report(source.as_ref(), target.as_ref(), found);
        if going.is_empty() {
            return Ok(report);
        }
        let is_ours = facts.state.is_some();
        let mut state = facts.state.unwrap_or_else(|| TargetState::new(source.identity(), source.location()));
        // What another target needs is none of the orphans, and stays retired here.
        let mut held = std::mem::take(&mut state.retired);
        held.retain(|retired| !going.contains(retired));
        state.retired = going;
        report.removed = retention::prune(&mut state, Some(source), target).await;
        state.retired.append(&mut held);
        // A target without a state is none of poolshift's, and does not become one by this.
        if is_ours {
            store(target.as_ref(), &state).await?;
        }
        Ok(report)
    })
    .await
}

async fn gather(source: &dyn SourceImage, target: &dyn TargetImage) -> Result<OrphanFacts> {
    let (source_snapshots, target_snapshots) = futures::try_join!(source.snapshots(), target.snapshots())?;
    let state = load_state(target).await?;
    if let Some(state) = state.as_ref().filter(|state| state.source != *source.identity()) {
        let followed = (state.source.clone(), state.source_location.clone());
        let kind = ConflictKind::OtherSource { followed, given: source.identity().clone() };
        let source = (source.location().to_owned(), source_snapshots);
        let target = (target.location().to_owned(), target_snapshots);
        return Err(Conflict { kind, source, target }.into());
    }
    Ok(OrphanFacts {
        source: (source.identity().clone(), source_snapshots),
        target: (target.identity().clone(), target_snapshots),
        state,
    })
}

fn report(source: &dyn SourceImage, target: &dyn TargetImage, orphans: Vec<Orphan>) -> GcReport {
    let (source, target) = (source.location().to_owned(), target.location().to_owned());
    GcReport { source, target, orphans, removed: Pruned::default() }
}
