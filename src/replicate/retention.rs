//! Retention: which of poolshift's own snapshots may go, and their removal.

use std::sync::Arc;
use std::time::Duration;

use futures::stream::{self, StreamExt};

use crate::failpoint::failpoint;
use crate::image::{ErrorKind, ImageError, Snapshot, SnapshotSupport, SourceImage, TargetImage};

use super::error::CycleError;
use super::report::Pruned;
use super::side;
use super::state::{Commit, Retired, Side, TargetState};

/// How many snapshots are removed at a time. Each waits for the monitors, and those of one moment share a proposal.
const REMOVALS: usize = 8;

/// Which automatic commits stay, beside the base.
#[derive(Clone, Debug, Default)]
pub(super) struct Keep {
    /// The newest ones, this many.
    pub(super) newest: usize,
    /// And those younger than this.
    pub(super) younger_than: Option<Duration>,
    /// And those of these names.
    pub(super) protected: Vec<String>,
}

impl Keep {
    /// The newest ones, this many.
    pub(super) fn newest(newest: usize) -> Self {
        Self { newest, ..Self::default() }
    }

    /// Whether a commit stays whatever its place. One whose age can't be read stays as well: nothing is removed for
    /// being old that is not known to be.
    fn holds(&self, commit: &Commit, now: jiff::Timestamp) -> bool {
        let is_old = |limit: Duration| match commit.at.parse::<jiff::Timestamp>() {
            Ok(at) => Duration::try_from(now.duration_since(at)).is_ok_and(|age| age >= limit),
            Err(_) => false,
        };
        self.is_protected(commit) || self.younger_than.is_some_and(|limit| !is_old(limit))
    }

    pub(super) fn is_protected(&self, commit: &Commit) -> bool {
        self.protected.contains(&commit.name)
    }
}

/// Moves automatic commits that are older than the newest few, and that nothing else in `keep` holds, from the commits
/// to the retired; at least the newest commit, which is the next base, stays. A snapshot that the user named is never
/// touched.
pub(super) fn retire(state: &mut TargetState, keep: &Keep, now: jiff::Timestamp) {
    let automatic = state.commits.iter().filter(|commit| commit.automatic).count();
    let newest = state.newest().map(|commit| commit.target_id);
    let mut surplus = automatic.saturating_sub(keep.newest.max(1));
    let mut retired = Vec::new();
    state.commits.retain(|commit| {
        let is_surplus = commit.automatic && surplus > 0;
        // Counted whether it goes or not: what is held for its age or its name is no reason for a newer one to go.
        surplus -= usize::from(is_surplus);
        let goes = is_surplus && Some(commit.target_id) != newest && !keep.holds(commit, now);
        if goes {
            retired.push(Retired::of(Side::Source, commit.source_id, &commit.name));
            retired.push(Retired::of(Side::Target, commit.target_id, &commit.name));
        }
        !goes
    });
    state.retired.append(&mut retired);
}

/// Applies retention to a target whose lease the caller holds, and removes what it retires: for volumes whose newest
/// commit became the next base only when their companions had it as well. The `newest` ones stay, and those that are
/// younger than `younger_than`.
pub async fn prune_held(
    source: &Arc<dyn SourceImage>,
    target: &Arc<dyn TargetImage>,
    newest: usize,
    younger_than: Option<Duration>,
) -> Result<Pruned, CycleError> {
    let Some(mut state) = side::load_state(target.as_ref()).await? else { return Ok(Pruned::default()) };
    retire(&mut state, &Keep { younger_than, ..Keep::newest(newest) }, jiff::Timestamp::now());
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
    // A snapshot that was given up and then found and committed after all is in use again.
    let in_use = |retired: &Retired| {
        state.commits.iter().any(|commit| match retired.side {
            Side::Source => commit.source_id == retired.id,
            Side::Target => commit.target_id == retired.id,
        })
    };
    let retired: Vec<Retired> = state.retired.iter().filter(|retired| !in_use(retired)).cloned().collect();
    state.retired.clear();
    failpoint!("prune.begun");
    let removals = retired.into_iter().map(|snapshot| async move {
        let outcome = match (snapshot.side, source) {
            (Side::Source, Some(source)) => remove(source.as_ref(), &snapshot).await,
            // Out of reach, as the source of a stream is: whoever sends keeps its snapshots in order.
            (Side::Source, None) => Ok(()),
            (Side::Target, _) => remove(target.as_ref(), &snapshot).await,
        };
        failpoint!("prune.removed");
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
        retire(&mut state, &Keep::newest(1), jiff::Timestamp::UNIX_EPOCH);
        let left: Vec<u64> = state.commits.iter().map(|commit| commit.source_id).collect();
        assert_eq!(left, [2, 4, 5]);
        let gone: Vec<(Side, u64)> = state.retired.iter().map(|retired| (retired.side, retired.id)).collect();
        assert_eq!(gone, [(Side::Source, 1), (Side::Target, 11), (Side::Source, 3), (Side::Target, 13)]);
        retire(&mut state, &Keep::newest(0), jiff::Timestamp::UNIX_EPOCH);
        assert_eq!(state.commits.len(), 3, "keeping none still keeps the newest automatic one");
    }

    #[test]
    fn young_and_protected_ones_stay_and_push_no_other_out() {
        let source = ImageIdentity { cluster: "c".into(), pool: "1".into(), image: "i".into() };
        let mut state = TargetState::new(&source, "rbd:sata/i");
        // Six automatic commits, an hour apart, the last one now; the age of the first can't be read.
        let now: jiff::Timestamp = "2026-11-23T12:00:00Z".parse().unwrap();
        for id in 1..=6u64 {
            let at = now - jiff::SignedDuration::from_hours(6 - id as i64);
            let at = if id == 1 { "once".to_owned() } else { at.to_string() };
            let (name, target_id) = (format!("s{id}"), id + 10);
            state.commits.push(Commit { name, source_id: id, target_id, size: 1, at, automatic: true });
        }
        let left = |keep: &Keep| {
            let mut state = state.clone();
            retire(&mut state, keep, now);
            state.commits.iter().map(|commit| commit.source_id).collect::<Vec<_>>()
        };
        let hours = |hours: u64| Some(Duration::from_secs(hours * 3600));
        assert_eq!(left(&Keep::newest(2)), [5, 6]);
        assert_eq!(left(&Keep { younger_than: hours(3), ..Keep::newest(1) }), [1, 4, 5, 6]);
        assert_eq!(left(&Keep { younger_than: hours(1), ..Keep::newest(3) }), [1, 4, 5, 6]);
        let protected = vec!["s2".to_owned(), "s9".to_owned()];
        assert_eq!(left(&Keep { protected, ..Keep::newest(2) }), [2, 5, 6]);
        // A clock that was set back makes them younger than now, never older.
        retire(&mut state, &Keep { younger_than: hours(1), ..Keep::newest(1) }, jiff::Timestamp::UNIX_EPOCH);
        assert_eq!(state.commits.len(), 6);
    }
}
