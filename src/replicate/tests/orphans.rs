//! What is left over, and what is removed of it.

use super::*;
use crate::image::{LeaseOwner, Snapshot};
use crate::replicate::orphans::Why;
use crate::replicate::state::Side;

/// A name of poolshift's scheme.
const STRAY: &str = "poolshift-20200101T000000.000Z";

type Volume = (Arc<dyn SourceImage>, Arc<dyn TargetImage>);

fn volume(pair: &Pair) -> Volume {
    (Arc::new(pair.source.reopen()), Arc::new(pair.target.reopen()))
}

async fn collect(volume: &Volume, unknown: bool) -> Result<GcReport> {
    let known = survey(std::slice::from_ref(volume)).await?;
    gc(&volume.0, &volume.1, &known, unknown).await
}

async fn store(pair: &Pair, state: &TargetState) {
    let target = pair.target.reopen();
    target.acquire_lease(&LeaseOwner::current().unwrap()).await.unwrap();
    target.store_state(&state.render().unwrap()).await.unwrap();
    target.release_lease().await.unwrap();
}

fn whys(report: &GcReport) -> Vec<(Side, &str, Why)> {
    report.orphans.iter().map(|orphan| (orphan.side, orphan.name.as_str(), orphan.why)).collect()
}

#[tokio::test]
async fn a_snapshot_that_only_looks_like_poolshifts_goes_on_demand_only() {
    let mut pair = Pair::new();
    pair.source.write_as_server(0, &[1; 9000]);
    let first = pair.sync_well(&options()).await;
    pair.source.create_snapshot(STRAY).await.unwrap();
    pair.source.create_snapshot("nightly").await.unwrap();
    let volume = volume(&pair);
    let report = collect(&volume, false).await.unwrap();
    assert_eq!(whys(&report), [(Side::Source, STRAY, Why::Unknown)]);
    assert_eq!((report.removed.source.len(), pair.source.snapshots().await.unwrap().len()), (0, 3));
    let report = collect(&volume, true).await.unwrap();
    assert_eq!(report.removed.source, [STRAY]);
    let left: Vec<String> = pair.source.snapshots().await.unwrap().into_iter().map(|snapshot| snapshot.name).collect();
    assert_eq!(left, [first.snapshot, "nightly".into()]);
    assert_eq!(whys(&collect(&volume, true).await.unwrap()), []);
    pair.sync_well(&options()).await;
}

#[tokio::test]
async fn a_creation_that_lands_after_it_was_given_up_is_known_by_its_name() {
    let mut pair = Pair::new();
    pair.source.write_as_server(0, &[1; 9000]);
    pair.sync_well(&options()).await;
    // A run stored its intent and was killed while the storage had not yet made the snapshot.
    let state = pair.state().await;
    let base = Origin::Base(state.newest().unwrap().source_id);
    let in_flight = Some(state::InFlight::new(STRAY.into(), None, true, base, false));
    store(&pair, &TargetState { in_flight, ..state }).await;
    pair.sync_well(&options()).await;
    assert_eq!(pair.state().await.given_up, [STRAY]);
    // Now it lands. gc knows it for poolshift's, and so would the next cycle.
    pair.source.create_snapshot(STRAY).await.unwrap();
    let volume = volume(&pair);
    let known = survey(std::slice::from_ref(&volume)).await.unwrap();
    let found = find_orphans(volume.0.as_ref(), volume.1.as_ref(), &known).await.unwrap();
    assert_eq!(whys(&found), [(Side::Source, STRAY, Why::GivenUp)]);
    pair.sync_well(&options()).await;
    assert_eq!((pair.source.snapshots().await.unwrap().len(), pair.state().await.given_up.len()), (1, 0));
}

#[tokio::test]
async fn what_was_in_flight_is_given_up_by_its_id_not_its_name() {
    let mut pair = Pair::new();
    pair.source.write_as_server(0, &[1; 9000]);
    pair.sync_well(&options()).await;
    let state = pair.state().await;
    let base = Origin::Base(state.newest().unwrap().source_id);
    let lost = Snapshot { id: 999, name: STRAY.into(), size: SIZE };
    let in_flight = Some(state::InFlight::new(STRAY.into(), Some(lost), true, base, false));
    store(&pair, &TargetState { in_flight, ..state }).await;
    // Somebody else's snapshot has the name of the one that is gone.
    pair.source.create_snapshot(STRAY).await.unwrap();
    pair.sync_well(&options()).await;
    let left = pair.source.snapshots().await.unwrap();
    assert!(left.iter().any(|snapshot| snapshot.name == STRAY), "{left:?}");
}

#[tokio::test]
async fn what_is_retired_goes_unless_another_target_needs_it() {
    let mut pair = Pair::new();
    pair.source.write_as_server(0, &[1; 9000]);
    let first = pair.sync_well(&options()).await;
    let other = Pair { source: pair.source.reopen(), target: MemoryImage::new("other", SIZE, LAYOUT), ..Pair::new() };
    // The other target follows the same source, from the very same snapshot.
    other.sync(&named(&first.snapshot)).await.unwrap();
    let mut state = pair.state().await;
    let commit = state.commits.remove(0);
    state.retired.push(state::Retired::of(Side::Source, commit.source_id, &commit.name));
    state.retired.push(state::Retired::of(Side::Target, commit.target_id, &commit.name));
    store(&pair, &state).await;
    let (one, two) = (volume(&pair), volume(&other));
    let known = survey(&[one.clone(), two]).await.unwrap();
    let report = gc(&one.0, &one.1, &known, true).await.unwrap();
    assert_eq!(whys(&report), [(Side::Target, commit.name.as_str(), Why::Retired)]);
    assert_eq!((report.removed.target.len(), report.removed.source.len()), (1, 0));
    assert_eq!(pair.state().await.retired, [state::Retired::of(Side::Source, commit.source_id, &commit.name)]);
    // Alone, the volume gives it away.
    let report = collect(&one, false).await.unwrap();
    assert_eq!(report.removed.source, [commit.name]);
    assert_eq!(pair.state().await.retired, []);
}

#[tokio::test]
async fn nothing_goes_while_somebody_works_on_the_target() {
    let mut pair = Pair::new();
    pair.sync_well(&options()).await;
    pair.source.create_snapshot(STRAY).await.unwrap();
    let worker = pair.target.reopen();
    worker.acquire_lease(&LeaseOwner::current().unwrap()).await.unwrap();
    let refused = collect(&volume(&pair), true).await.unwrap_err();
    let CycleError::Image(refused) = refused else { panic!("{refused}") };
    assert!(matches!(refused.kind, crate::image::ErrorKind::Busy { .. }), "{refused}");
    assert_eq!(pair.source.snapshots().await.unwrap().len(), 2);
}

#[tokio::test]
async fn young_and_protected_points_outlive_their_successors() {
    let mut pair = Pair::new();
    let first = pair.sync_well(&options()).await.snapshot;
    let protect = SyncOptions { protect: vec![first.clone()], ..options() };
    let second = pair.sync_well(&protect).await.snapshot;
    let names = async |pair: &Pair| {
        let there = pair.target.snapshots().await.unwrap();
        there.into_iter().map(|snapshot| snapshot.name).collect::<Vec<_>>()
    };
    assert_eq!(names(&pair).await, [first.clone(), second]);
    let third = pair.sync_well(&protect).await.snapshot;
    assert_eq!(names(&pair).await, [first.clone(), third.clone()]);
    let keep_for = Some(std::time::Duration::from_secs(3600));
    let fourth = pair.sync_well(&SyncOptions { keep_for, ..options() }).await.snapshot;
    assert_eq!(names(&pair).await, [first, third, fourth]);
    let last = pair.sync_well(&options()).await.snapshot;
    assert_eq!(names(&pair).await, [last]);
}
