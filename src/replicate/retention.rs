//! Retention: which of poolshift's own snapshots may go, and their removal.

use std::sync::Arc;

use futures::stream::{self, StreamExt};

use crate::image::{ErrorKind, ImageError, Snapshot, SnapshotSupport, SourceImage, TargetImage};

use super::error::CycleError;
use super::report::Pruned;
use super::side;
use super::state::{Retired, Side, TargetState};

/// How many snapshots are removed at a time. Each waits for the monitors, and those of one moment share a proposal.
const REMOVALS: usize = 8;

/// Moves automatic commits that are older than the newest `keep` from the commits to the retired; at least the newest
/// commit, which is the next base, stays. A snapshot that the user named is never touched.
pub(super) fn retire(state: &mut TargetState, keep: usize) {
    let automatic = state.commits.iter().filter(|commit| commit.automatic).count();
    let newest = state.newest().map(|commit| commit.target_id);
    let mut surplus = automatic.saturating_sub(keep.max(1));
    let mut retired = Vec::new();
    state.commits.retain(|commit| {
        let goes = commit.automatic && surplus > 0 && Some(commit.target_id) != newest;
        if goes {
            surplus -= 1;
            retired.push(Retired::of(Side::Source, commit.source_id, &commit.name));
            retired.push(Retired::of(Side::Target, commit.target_id, &commit.name));
        }
        !goes
    });
    state.retired.append(&mut retired);
}

/// Applies retention to a target whose lease the caller holds, and removes what it retires: for volumes whose newest
/// commit became the next base only when their companions had it as well. `protect` names points that stay.
pub async fn prune_held(
    source: &Arc<dyn SourceImage>,
    target: &Arc<dyn TargetImage>,
    keep: usize,
) -> Result<Pruned, CycleError> {
    let Some(mut state) = side::load_state(target.as_ref()).await? else { return Ok(Pruned::default()) };
    retire(&mut state, keep);
    if state.retired.is_empty() {
        return Ok(Pruned::default());
    }
    // What is retired is known before any of it goes.
    side::store(target.as_ref(), &state).await?;
    let pruned = prune(&mut state, Some(source), target).await;
    side::store(target.as_ref(), &state).await?;
    Ok(pruned)
}

/// Removes the retired snapshots, both sides at the same time, and takes them off the list. What can't be removed now
/// (protected, or with clones) stays on it.
pub(super) async fn prune(
    state: &mut TargetState,
    source: Option<&Arc<dyn SourceImage>>,
    target: &Arc<dyn TargetImage>,
) -> Pruned {
    let retired = std::mem::take(&mut state.retired);
    let removals = retired.into_iter().map(|snapshot| async move {
        let outcome = match (snapshot.side, source) {
            (Side::Source, Some(source)) => remove(source.as_ref(), &snapshot).await,
            // Out of reach, as the source of a stream is: whoever sends keeps its snapshots in order.
            (Side::Source, None) => Ok(()),
            (Side::Target, _) => remove(target.as_ref(), &snapshot).await,
        };
        (snapshot, outcome)
    });
    let mut pruned = Pruned::default();
    let mut outcomes = stream::iter(removals).buffer_unordered(REMOVALS);
    while let Some((snapshot, outcome)) = outcomes.next().await {
        match outcome {
            Ok(()) if snapshot.side == Side::Source && source.is_none() => {}
            Ok(()) if snapshot.side == Side::Source => pruned.source.push(snapshot.name),
            Ok(()) => pruned.target.push(snapshot.name),
            Err(error) if error.kind == ErrorKind::NotFound => {}
            Err(error) => {
                pruned.left.push(error.to_string());
                state.retired.push(snapshot);
            }
        }
    }
    pruned
}

async fn remove<I: SourceImage + ?Sized>(image: &I, retired: &Retired) -> Result<(), ImageError> {
    if image.snapshot_support() == SnapshotSupport::HeadOnly {
        // A file has no older snapshots: what is retired there was withdrawn when the next one began.
        return Ok(());
    }
    image.remove_snapshot(&Snapshot { id: retired.id, name: retired.name.clone(), size: 0 }).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::ImageIdentity;
    use crate::replicate::state::Commit;

    #[test]
    fn the_base_and_named_snapshots_stay() {
        let source = ImageIdentity { cluster: "c".into(), pool: "1".into(), image: "i".into() };
        let mut state = TargetState::new(&source, "rbd:sata/i");
        for (id, automatic) in [(1, true), (2, false), (3, true), (4, true), (5, false)] {
            let (name, at) = (format!("s{id}"), String::new());
            state.commits.push(Commit { name, source_id: id, target_id: id + 10, size: 1, at, automatic });
        }
        retire(&mut state, 1);
        let left: Vec<u64> = state.commits.iter().map(|commit| commit.source_id).collect();
        assert_eq!(left, [2, 4, 5]);
        let gone: Vec<(Side, u64)> = state.retired.iter().map(|retired| (retired.side, retired.id)).collect();
        assert_eq!(gone, [(Side::Source, 1), (Side::Target, 11), (Side::Source, 3), (Side::Target, 13)]);
        retire(&mut state, 0);
        assert_eq!(state.commits.len(), 3, "keeping none still keeps the newest automatic one");
    }
}
