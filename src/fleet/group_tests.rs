//! Servers of in-memory images: one point for all volumes, whatever happens in the middle.

use std::collections::BTreeMap;

use super::*;
use crate::image::memory::{Fault, MemoryImage};
use crate::image::{Layout, Point};
use crate::replicate::state::TargetState;

const LAYOUT: Layout = Layout { object_size: 64 << 10, stripe_unit: 64 << 10, stripe_count: 1 };
const SIZE: u64 = 256 << 10;

struct Blind;

impl Observer for Blind {}

/// A server that writes the same counter to all its disks, one disk after the other. A point is consistent if the disks
/// hold the same counter, or the later ones the one before.
struct Rig {
    disks: Vec<(MemoryImage, MemoryImage)>,
    counter: u64,
    /// What every point that was seen on all sources held.
    truth: BTreeMap<String, Vec<Vec<u8>>>,
}

impl Rig {
    fn new(volumes: usize) -> Self {
        let disk = |index| {
            let image = |side: &str| MemoryImage::new(&format!("{side}-{index}"), SIZE, LAYOUT);
            (image("source"), image("target"))
        };
        Self { disks: (0..volumes).map(disk).collect(), counter: 0, truth: BTreeMap::new() }
    }

    fn write(&mut self) {
        self.counter += 1;
        let offset = fastrand::u64(0..SIZE / 4096) * 4096;
        for (source, _) in &self.disks {
            source.write_as_server(0, &self.counter.to_le_bytes());
            source.write_as_server(offset, &[self.counter as u8 | 1; 512]);
        }
    }

    /// Handles as another process would have them.
    fn members(&self) -> Vec<Member> {
        let member = |(index, (source, target)): (usize, &(MemoryImage, MemoryImage))| Member {
            name: format!("disk-{index}"),
            source: Arc::new(source.reopen()),
            target: Arc::new(target.reopen()),
            progress: Arc::new(Progress::default()),
        };
        self.disks.iter().enumerate().map(member).collect()
    }

    async fn run_with(&self, options: &GroupOptions) -> Result<GroupEnd, GroupError> {
        run(&self.members(), options, &Blind, &CancellationToken::new()).await
    }

    async fn cycle(&mut self) -> GroupReport {
        match self.run_with(&options()).await {
            Ok(GroupEnd::Committed(report)) => {
                self.check().await;
                *report
            }
            other => panic!("{other:?}"),
        }
    }

    fn remember(&mut self) {
        let mut names: BTreeMap<String, Vec<Vec<u8>>> = BTreeMap::new();
        for (source, _) in &self.disks {
            for (name, bytes) in held(source) {
                names.entry(name).or_default().push(bytes);
            }
        }
        self.truth.extend(names.into_iter().filter(|(_, held)| held.len() == self.disks.len()));
    }

    /// The newest common point is what all sources held at one moment, and there.
    async fn check(&mut self) -> Option<GroupPoint> {
        self.remember();
        let mut looks = Vec::new();
        for (source, target) in &self.disks {
            looks.push(replicate::look(&source.reopen(), &target.reopen()).await.unwrap());
        }
        let point = common_point(&looks)?;
        let truth = &self.truth[&point.snapshot];
        let mut counters = Vec::new();
        for ((_, target), truth) in self.disks.iter().zip(truth) {
            let held = held(target).remove(&point.snapshot).expect("the point is on every target");
            assert!(held == *truth, "the target's {} is not the source's", point.snapshot);
            counters.push(held[..8].to_vec());
        }
        assert!(counters.windows(2).all(|pair| pair[0] == pair[1]), "not one moment: {counters:?}");
        Some(point)
    }
}

fn held(image: &MemoryImage) -> BTreeMap<String, Vec<u8>> {
    let image = image.reopen();
    let snapshots = futures::executor::block_on(image.snapshots()).unwrap();
    let held = |snapshot: crate::image::Snapshot| {
        let name = snapshot.name.clone();
        image.bytes_at(&Point::Snapshot(snapshot)).map(|bytes| (name, bytes))
    };
    snapshots.into_iter().filter_map(held).collect()
}

fn options() -> GroupOptions {
    GroupOptions {
        server: "web".into(),
        quiesce: Quiesce::None,
        retention: Retention { keep: 1, keep_for: None },
        limits: Limits { bytes: 1 << 20, requests: 4, ..Limits::default() },
        not_younger_than: Duration::ZERO,
        forced: false,
    }
}

#[tokio::test]
async fn all_volumes_get_the_same_points_and_older_ones_go() {
    let mut rig = Rig::new(3);
    for _ in 0..4 {
        rig.write();
        let report = rig.cycle().await;
        assert_eq!(report.volumes.len(), 3);
        for (source, target) in &rig.disks {
            assert_eq!(held(source).into_keys().collect::<Vec<_>>(), [report.point.snapshot.as_str()]);
            assert_eq!(held(target).into_keys().collect::<Vec<_>>(), [report.point.snapshot.as_str()]);
        }
    }
    let end = rig.run_with(&options()).await.unwrap();
    assert!(matches!(end, GroupEnd::Unchanged { .. }), "{end:?}");
    let seen = look(&rig.members()).await.unwrap();
    let mut idle = Idle::new(seen.clone());
    // By looks at first, by tokens from then on, and by looks now and then.
    for _ in 0..2 * TOKENS_BELIEVED {
        assert!(still_unchanged(&rig.members(), &mut idle).await.is_some());
    }
    let patient = |forced| GroupOptions { not_younger_than: Duration::from_secs(3600), forced, ..options() };
    assert!(matches!(rig.run_with(&patient(true)).await.unwrap(), GroupEnd::Unchanged { .. }));
    rig.write();
    assert!(still_unchanged(&rig.members(), &mut idle).await.is_none());
    assert!(matches!(rig.run_with(&patient(false)).await.unwrap(), GroupEnd::Recent { .. }));
    assert!(matches!(rig.run_with(&patient(true)).await.unwrap(), GroupEnd::Committed(_)));
    // That point is another worker's, for all that this one knows.
    assert!(still_unchanged(&rig.members(), &mut Idle::new(seen)).await.is_none());
}

#[tokio::test]
async fn one_volume_that_fails_keeps_the_server_at_its_point() {
    let mut rig = Rig::new(3);
    rig.write();
    let first = rig.cycle().await.point;
    rig.write();
    // The second target dies at its first step: no volume gets a new point, and the old one stays on all of them.
    rig.disks[1].1.set_fault(Some(Fault { at: 1, after: false, seed: 1 }));
    let error = rig.run_with(&options()).await.unwrap_err();
    assert_eq!(error.volume, "disk-1", "{error}");
    rig.disks[1].1.set_fault(None);
    assert_eq!(rig.check().await.unwrap().snapshot, first.snapshot);
    rig.write();
    assert!(rig.cycle().await.point.at > first.at);
}

#[tokio::test]
async fn a_lease_held_elsewhere_stops_the_server_and_leaves_no_other_lease() {
    let mut rig = Rig::new(3);
    rig.write();
    let other = rig.disks[2].1.reopen();
    other.acquire_lease(&LeaseOwner::current().unwrap()).await.unwrap();
    let error = rig.run_with(&options()).await.unwrap_err();
    assert!(error.error.holder().is_some(), "{error}");
    for (_, target) in &rig.disks[..2] {
        assert_eq!(target.reopen().lease_owner().await.unwrap(), None);
    }
    other.release_lease().await.unwrap();
    rig.cycle().await;
}

#[tokio::test]
async fn what_a_person_synced_by_hand_is_no_point_of_the_server() {
    let mut rig = Rig::new(2);
    rig.write();
    let named = SyncOptions {
        request: Request { name: Some("by-hand".into()), ..Request::default() },
        ..SyncOptions::default()
    };
    for member in rig.members() {
        let cancel = CancellationToken::new();
        replicate::sync(member.source, member.target, &named, &member.progress, &cancel).await.unwrap();
        rig.write();
    }
    assert_eq!(rig.check().await, None);
    rig.cycle().await;
    // The named snapshots stay.
    assert!(
        rig.disks
            .iter()
            .all(|(source, target)| held(source).contains_key("by-hand") && held(target).contains_key("by-hand"))
    );
}

/// Dies at step `at` of one image, then goes on until a point is made.
async fn crash_once(which: usize, target: bool, at: u64, after: bool) -> bool {
    let mut rig = Rig::new(3);
    rig.write();
    rig.cycle().await;
    rig.write();
    let image = if target { rig.disks[which].1.clone() } else { rig.disks[which].0.clone() };
    image.set_fault(Some(Fault { at, after, seed: at }));
    // After the commit, only what is left to be removed is lost: then the cycle itself has ended well.
    let _ = rig.run_with(&options()).await;
    let struck = image.has_crashed();
    image.set_fault(None);
    // A process that dies takes every lease and every handle along.
    for (source, target) in &rig.disks {
        drop((source.reopen(), target.reopen()));
        let _ = target.release_lease().await;
    }
    free_leases(&rig);
    assert!(rig.check().await.is_some(), "the older point is gone");
    rig.write();
    rig.cycle().await;
    rig.cycle_until_clean().await;
    struck
}

/// What the cluster does with the leases of a process that died.
fn free_leases(rig: &Rig) {
    for (_, target) in &rig.disks {
        target.break_lease();
    }
}

impl Rig {
    /// Two more points: whatever the crash left is gone then.
    async fn cycle_until_clean(&mut self) {
        for _ in 0..2 {
            self.write();
            self.cycle().await;
        }
        for (source, target) in &self.disks {
            assert_eq!(held(source).len(), 1, "left on the source: {:?}", held(source).keys());
            assert_eq!(held(target).len(), 1, "left on the target: {:?}", held(target).keys());
            let text = target.reopen().load_state().await.unwrap().unwrap();
            let state = TargetState::parse(&text).unwrap();
            assert!(state.in_flight.is_none() && state.retired.is_empty(), "{text}");
        }
    }
}

#[tokio::test]
async fn a_crash_at_any_step_of_any_image_leaves_the_older_point_and_converges() {
    for target in [false, true] {
        for which in 0..3 {
            for after in [false, true] {
                let mut at = 1;
                while crash_once(which, target, at, after).await {
                    at += 1;
                }
                assert!(at > 2, "no step of the {} was ever reached", if target { "target" } else { "source" });
            }
        }
    }
}

#[tokio::test]
async fn a_volume_that_lacks_a_begun_point_gets_it() {
    // All snapshots were made, one volume committed, the others died before they wrote anything.
    let mut rig = Rig::new(2);
    rig.write();
    rig.cycle().await;
    rig.write();
    let name = replicate::name_of_now();
    for member in rig.members() {
        member.source.create_snapshot(&name).await.unwrap();
    }
    rig.remember();
    let member = &rig.members()[0];
    let request = Request { name: Some(name.clone()), automatic: true, ..Request::default() };
    let options_one = SyncOptions { request, keep: usize::MAX, ..SyncOptions::default() };
    let cancel = CancellationToken::new();
    replicate::sync(member.source.clone(), member.target.clone(), &options_one, &member.progress, &cancel)
        .await
        .unwrap();
    rig.write();
    let report = rig.cycle().await;
    assert!(report.finished_first);
    let text = rig.disks[1].1.reopen().load_state().await.unwrap().unwrap();
    assert!(!text.contains(&name), "retention has it by now: {text}");
}

#[tokio::test]
async fn snapshots_that_were_made_late_are_no_point() {
    // Killed in the freeze: the intents are there, without ids, and the snapshots come one by one after the thaw.
    let mut rig = Rig::new(3);
    rig.write();
    rig.cycle().await;
    rig.write();
    let name = replicate::name_of_now();
    for member in rig.members() {
        let request = Request { name: Some(name.clone()), automatic: true, ..Request::default() };
        let options = SyncOptions { request, snapshotter: Some(Arc::new(NoSnapshots)), ..SyncOptions::default() };
        let cancel = CancellationToken::new();
        let cut = replicate::sync(member.source.clone(), member.target, &options, &member.progress, &cancel).await;
        assert!(cut.is_err());
        member.source.create_snapshot(&name).await.unwrap();
        rig.write();
    }
    let report = rig.cycle().await;
    assert!(!report.finished_first && report.point.snapshot != name);
    for (_, target) in &rig.disks {
        assert!(!held(target).contains_key(&name), "it became a commit");
    }
    rig.cycle_until_clean().await;
}

#[tokio::test]
async fn an_interrupted_snapshot_of_a_person_stays_theirs() {
    let mut rig = Rig::new(2);
    rig.write();
    rig.cycle().await;
    rig.write();
    for (source, _) in &rig.disks {
        source.create_snapshot("before-upgrade").await.unwrap();
    }
    // One disk is synced to it by hand, and that is interrupted.
    let member = rig.members().remove(0);
    let named = SyncOptions {
        request: Request { name: Some("before-upgrade".into()), ..Request::default() },
        ..SyncOptions::default()
    };
    let cancel = CancellationToken::new();
    cancel.cancel();
    let cut = replicate::sync(member.source, member.target, &named, &member.progress, &cancel).await;
    assert!(matches!(cut, Err(CycleError::Interrupted { .. })), "{cut:?}");
    for _ in 0..3 {
        rig.write();
        let report = rig.cycle().await;
        assert_ne!(report.point.snapshot, "before-upgrade");
    }
    for (source, _) in &rig.disks {
        assert!(held(source).contains_key("before-upgrade"), "a person's snapshot was removed");
    }
}

#[test]
fn the_note_of_an_idle_server_is_read_once_a_minute() {
    let mut idle = Idle::new(Vec::new());
    let begun = Instant::now();
    let due = [30, 61, 90, 121, 182].map(|seconds| idle.note_is_due(begun + Duration::from_secs(seconds)));
    assert_eq!(due, [false, true, false, true, true]);
}
