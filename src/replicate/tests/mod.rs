//! Cycles over in-memory images: against a dense oracle, and with a crash at every durable step.

mod budget;
mod exchange;
mod files;
mod orphans;
mod strangers;

use std::collections::BTreeMap;
use std::sync::Arc;

use proptest::prelude::*;
use tokio_util::sync::CancellationToken;

use super::error::ConflictKind;
use super::state::{Origin, TargetState};
use super::*;
use crate::extent::ByteRange;
use crate::image::memory::{Fault, MemoryImage};
use crate::image::{Layout, Point, SourceImage, TargetImage};
use crate::pipeline::Limits;

const LAYOUT: Layout = Layout { object_size: 64 << 10, stripe_unit: 64 << 10, stripe_count: 1 };
const SIZE: u64 = 512 << 10;

/// A source, a target, and what every committed snapshot must hold for ever.
struct Pair {
    source: MemoryImage,
    target: MemoryImage,
    committed: BTreeMap<String, Vec<u8>>,
}

impl Pair {
    fn new() -> Self {
        Self {
            source: MemoryImage::new("source", SIZE, LAYOUT),
            target: MemoryImage::new("target", SIZE, LAYOUT),
            committed: BTreeMap::new(),
        }
    }

    async fn sync(&self, options: &SyncOptions) -> Result<SyncReport> {
        let source: Arc<dyn SourceImage> = Arc::new(self.source.reopen());
        let target: Arc<dyn TargetImage> = Arc::new(self.target.reopen());
        sync(source, target, options, &Progress::default(), &CancellationToken::new()).await
    }

    /// A cycle that must succeed, and leave the truth.
    async fn sync_well(&mut self, options: &SyncOptions) -> SyncReport {
        let report = self.sync(options).await.unwrap();
        self.check_committed(&report).await;
        report
    }

    /// A cycle that may only fail because somebody removed every common snapshot from the source.
    async fn sync_or_start_over(&self, options: &SyncOptions) -> SyncReport {
        match self.sync(options).await {
            Ok(report) => report,
            Err(error) => {
                let ConflictKind::NoCommonSnapshot = kind_of(error) else { panic!("an unexpected conflict") };
                let state = self.state().await;
                let there = self.source.snapshots().await.unwrap();
                assert!(!state.commits.iter().any(|commit| there.iter().any(|have| have.id == commit.source_id)));
                self.sync(&full()).await.unwrap()
            }
        }
    }

    async fn check_committed(&mut self, report: &SyncReport) {
        let on = async |image: &MemoryImage| {
            let found = image.snapshots().await.unwrap().into_iter().find(|s| s.name == report.snapshot);
            image.bytes_at(&Point::Snapshot(found.expect("committed on both sides"))).unwrap()
        };
        let truth = on(&self.source).await;
        assert!(on(&self.target).await == truth, "the target's {} is not the source's", report.snapshot);
        assert!(self.target.bytes_at(&Point::Head).unwrap() == truth, "HEAD is not {}", report.snapshot);
        self.committed.insert(report.snapshot.clone(), truth);
        self.check_history().await;
    }

    /// No committed snapshot ever changes; nothing on the target is a snapshot that was not committed, but for one
    /// whose commit the state could not take in yet, and that one is true as well.
    async fn check_history(&self) {
        for snapshot in self.target.snapshots().await.unwrap() {
            let held = self.target.bytes_at(&Point::Snapshot(snapshot.clone())).unwrap();
            match self.committed.get(&snapshot.name) {
                Some(truth) => assert!(held == *truth, "{snapshot} of the target changed"),
                None => {
                    let named = self.source.snapshots().await.unwrap().into_iter().find(|s| s.name == snapshot.name);
                    let named = named.unwrap_or_else(|| panic!("{snapshot} of the target is nobody's"));
                    let truth = self.source.bytes_at(&Point::Snapshot(named)).unwrap();
                    assert!(held == truth, "{snapshot} of the target is not the source's");
                }
            }
        }
    }

    /// Notes what every source snapshot holds, for when the source has forgotten it.
    async fn remember_source(&mut self) {
        for snapshot in self.source.snapshots().await.unwrap() {
            let truth = self.source.bytes_at(&Point::Snapshot(snapshot.clone())).unwrap();
            self.committed.insert(snapshot.name, truth);
        }
    }

    async fn state(&self) -> TargetState {
        TargetState::parse(&self.target.reopen().load_state().await.unwrap().unwrap()).unwrap()
    }
}

fn options() -> SyncOptions {
    SyncOptions { limits: Limits { bytes: 1 << 20, requests: 4, ..Limits::default() }, ..SyncOptions::default() }
}

fn named(name: &str) -> SyncOptions {
    SyncOptions { request: lineage::Request { name: Some(name.into()), ..lineage::Request::default() }, ..options() }
}

fn full() -> SyncOptions {
    SyncOptions { request: lineage::Request { full: true, ..lineage::Request::default() }, ..options() }
}

fn kind_of(error: CycleError) -> ConflictKind {
    match error {
        CycleError::Conflict(conflict) => conflict.kind,
        other => panic!("not a conflict: {other}"),
    }
}

#[tokio::test]
async fn each_cycle_costs_what_changed() {
    let mut pair = Pair::new();
    pair.source.write_as_server(0, &[1; 300 << 10]);
    let first = pair.sync_well(&options()).await;
    assert_eq!((first.base, first.moved.data_bytes, first.moved.bytes_written), (None, 300 << 10, 300 << 10));
    pair.source.write_as_server(100 << 10, &[2; 4096]);
    pair.source.discard(ByteRange::new(200 << 10, 8192).unwrap());
    let second = pair.sync_well(&options()).await;
    assert_eq!(second.base, Some(first.snapshot));
    assert_eq!((second.moved.data_bytes, second.moved.zero_bytes), (4096, 8192));
    assert_eq!(second.moved.bytes_written, 4096);
    assert_eq!((pair.source.snapshots().await.unwrap().len(), pair.target.snapshots().await.unwrap().len()), (1, 1));
    let third = pair.sync_well(&options()).await;
    assert_eq!((third.moved.extents, third.moved.bytes_read), (0, 0));
}

#[tokio::test]
async fn a_snapshot_of_the_users_is_used_kept_and_not_replicated_twice() {
    let mut pair = Pair::new();
    pair.source.write_as_server(0, &[1; 9000]);
    let snapshot = pair.source.create_snapshot("before-upgrade").await.unwrap();
    pair.source.write_as_server(0, &[2; 9000]);
    pair.sync_well(&named("before-upgrade")).await;
    // The source has other bytes by now: the name stands for another moment.
    let changed = kind_of(pair.sync(&named("before-upgrade")).await.unwrap_err());
    assert_eq!(changed, ConflictKind::NotNow { name: "before-upgrade".into(), newest: None });
    for _ in 0..3 {
        pair.source.write_as_server(5000, &[3; 100]);
        pair.sync_well(&options()).await;
    }
    assert!(pair.source.snapshots().await.unwrap().contains(&snapshot));
    assert!(pair.target.snapshots().await.unwrap().iter().any(|s| s.name == "before-upgrade"));
    let newer = kind_of(pair.sync(&named("before-upgrade")).await.unwrap_err());
    assert!(matches!(newer, ConflictKind::NotNow { newest: Some(_), .. }), "{newer}");
    // What has not changed since is there.
    pair.sync_well(&named("last")).await;
    assert!(pair.sync(&named("last")).await.unwrap().already_there);
    pair.source.resize_as_server(SIZE + 4096);
    assert!(matches!(kind_of(pair.sync(&named("last")).await.unwrap_err()), ConflictKind::NotNow { newest: None, .. }));
}

#[tokio::test]
async fn conflicts_are_named_and_nothing_is_written() {
    let mut pair = Pair::new();
    pair.target.write_as_server(0, b"somebody's data");
    assert_eq!(kind_of(pair.sync(&options()).await.unwrap_err()), ConflictKind::NotOurs);
    assert_eq!(kind_of(pair.sync(&full()).await.unwrap_err()), ConflictKind::NotOurs);
    let mut adopt = full();
    adopt.request.adopt = true;
    let adopted = pair.sync_well(&adopt).await;

    pair.target.write_as_server(77, b"a stray write");
    let diverged = kind_of(pair.sync(&options()).await.unwrap_err());
    assert_eq!(diverged, ConflictKind::Diverged { since: adopted.snapshot });
    pair.sync_well(&full()).await;

    let other = MemoryImage::new("source", SIZE, LAYOUT);
    other.write_as_server(4096, b"another disk of the same name");
    let first = std::mem::replace(&mut pair.source, other);
    assert!(matches!(kind_of(pair.sync(&options()).await.unwrap_err()), ConflictKind::OtherSource { .. }));
    pair.source = first;

    let old = pair.source.create_snapshot("old").await.unwrap();
    pair.sync_well(&options()).await;
    let older = kind_of(pair.sync(&named(&old.name)).await.unwrap_err());
    assert!(matches!(older, ConflictKind::OlderThanBase { .. }));

    pair.target.reopen().create_snapshot("theirs").await.unwrap();
    assert!(matches!(kind_of(pair.sync(&named("theirs")).await.unwrap_err()), ConflictKind::NameTaken { .. }));

    for snapshot in pair.source.snapshots().await.unwrap() {
        pair.source.remove_snapshot(&snapshot).await.unwrap();
    }
    let error = pair.sync(&options()).await.unwrap_err();
    assert!(error.to_string().contains("snapshots of memory:source: none"), "{error}");
    assert_eq!(kind_of(error), ConflictKind::NoCommonSnapshot);
    pair.committed.insert("theirs".into(), pair.target.bytes_at(&Point::Head).unwrap());
    pair.sync_well(&full()).await;
}

#[tokio::test]
async fn a_base_deleted_on_one_side_leaves_the_older_one() {
    for on_source in [true, false] {
        let mut pair = Pair::new();
        let keep_two = SyncOptions { keep: 2, ..options() };
        pair.source.write_as_server(0, &[1; 8192]);
        let old = pair.sync_well(&keep_two).await;
        // Written to a hole and discarded again: in no delta of the source from `old` on, but on the target.
        pair.source.write_as_server(300 << 10, &[2; 8192]);
        let newer = pair.sync_well(&keep_two).await;
        pair.source.discard(ByteRange::new(300 << 10, 8192).unwrap());
        let side = if on_source { &pair.source } else { &pair.target };
        let gone = side.snapshots().await.unwrap().into_iter().find(|s| s.name == newer.snapshot).unwrap();
        side.remove_snapshot(&gone).await.unwrap();
        if on_source {
            let report = pair.sync_well(&keep_two).await;
            assert!(report.rewound);
            assert_eq!(report.base, Some(old.snapshot));
        } else {
            // What HEAD is at is gone: nothing says any more whether somebody wrote it.
            let removed = kind_of(pair.sync(&keep_two).await.unwrap_err());
            assert_eq!(removed, ConflictKind::CommitRemoved { name: newer.snapshot });
            pair.sync_well(&full()).await;
        }
    }
}

/// Promise 3 of the design, by name: a byte changes in N and back in N+1, N is lost after it was half applied.
#[tokio::test]
async fn dirtiness_is_never_lost() {
    let mut pair = Pair::new();
    pair.source.write_as_server(0, &[1; 64 << 10]);
    pair.sync_well(&options()).await;
    pair.source.write_as_server(8192, &[9; 4096]);
    pair.source.write_as_server(256 << 10, &[9; 4096]);
    pair.target.set_fault(Some(Fault { at: 5, after: true, seed: 1 }));
    pair.sync(&options()).await.unwrap_err();
    let state = pair.state().await;
    let lost = state.in_flight.clone().unwrap();
    assert!(matches!(lost.from, Origin::Base(_)));
    // Whatever survived the crash: both writes are put on the disk, as if they had.
    pair.target.write_as_server(8192, &[9; 4096]);
    pair.target.write_as_server(256 << 10, &[9; 4096]);
    pair.source.write_as_server(8192, &[1; 4096]);
    pair.source.discard(ByteRange::new(256 << 10, 4096).unwrap());
    pair.source.remove_snapshot(&lost.snapshot.unwrap()).await.unwrap();
    let report = pair.sync_well(&options()).await;
    assert!(report.rewound && !report.resumed);
}

/// One cycle in which everything happens that has a durable step of its own.
async fn eventful(pair: &mut Pair) {
    pair.source.write_as_server(0, &[1; 200 << 10]);
    pair.sync_well(&options()).await;
    pair.source.write_as_server(10_000, &[2; 50_000]);
    pair.source.discard(ByteRange::new(128 << 10, 16 << 10).unwrap());
    pair.source.resize_as_server(SIZE + 96 * 1024);
    pair.source.write_as_server(SIZE + 1000, &[3; 5000]);
}

#[tokio::test]
async fn a_crash_at_every_durable_step_converges() {
    let mut counting = Pair::new();
    eventful(&mut counting).await;
    counting.source.set_fault(None);
    counting.target.set_fault(None);
    counting.sync_well(&options()).await;
    let (on_source, on_target) = (counting.source.steps(), counting.target.steps());
    assert!(on_source >= 2 && on_target >= 10, "{on_source} and {on_target} steps are too few to be true");
    let source_steps = (1..=on_source).map(|at| (true, at));
    let cases: Vec<(bool, u64)> = source_steps.chain((1..=on_target).map(|at| (false, at))).collect();
    for (at_source, at) in cases {
        for after in [false, true] {
            for then in [Then::Nothing, Then::Writes, Then::SnapshotLost, Then::Full] {
                crash_once(at_source, Fault { at, after, seed: at * 7 + u64::from(after) }, then).await;
            }
        }
    }
}

/// What happens between the crash and the next run.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Then {
    Nothing,
    Writes,
    SnapshotLost,
    Full,
}

async fn crash_once(at_source: bool, fault: Fault, then: Then) {
    let mut pair = Pair::new();
    eventful(&mut pair).await;
    let crashing = if at_source { &pair.source } else { &pair.target };
    crashing.set_fault(Some(fault));
    let outcome = pair.sync(&options()).await;
    let crashing = if at_source { &pair.source } else { &pair.target };
    assert!(crashing.has_crashed(), "{fault:?} on {at_source} struck nothing");
    drop((pair.source.reopen(), pair.target.reopen()));
    if let Ok(report) = outcome {
        pair.check_committed(&report).await;
    }
    pair.remember_source().await;
    pair.check_history().await;
    if then != Then::Nothing {
        pair.source.write_as_server(12_000, &[1; 9000]);
        pair.source.discard(ByteRange::new(SIZE, 64 << 10).unwrap());
    }
    if then == Then::SnapshotLost
        && let Some(lost) = pair.state().await.in_flight.and_then(|in_flight| in_flight.snapshot)
    {
        pair.source.remove_snapshot(&lost).await.unwrap();
    }
    let again = if then == Then::Full { full() } else { options() };
    let report = pair.sync(&again).await.unwrap_or_else(|error| panic!("{at_source} {fault:?} {then:?}: {error}"));
    if pair.source.snapshots().await.unwrap().iter().any(|s| s.name == report.snapshot) {
        pair.check_committed(&report).await;
    }
    let last = pair.sync_well(&options()).await;
    assert!(!last.resumed);
    let left: Vec<_> = pair.source.snapshots().await.unwrap();
    assert_eq!(left.len(), 1, "{at_source} {fault:?} {then:?} leaves {left:?} on the source");
}

#[tokio::test]
async fn what_was_checkpointed_is_not_moved_again() {
    let mut pair = Pair::new();
    pair.source.write_as_server(0, &[7; 400 << 10]);
    let cancel = CancellationToken::new();
    cancel.cancel();
    let (source, target) = (Arc::new(pair.source.reopen()), Arc::new(pair.target.reopen()));
    let error = sync(source, target, &options(), &Progress::default(), &cancel).await.unwrap_err();
    assert!(matches!(error, CycleError::Interrupted { progress_to: 0, .. }), "{error}");
    let mut state = pair.state().await;
    let in_flight = state.in_flight.as_mut().unwrap();
    in_flight.progress_to = 256 << 10;
    let target = pair.target.reopen();
    target.write_as_server(0, &[7; 256 << 10]);
    target.acquire_lease(&crate::image::LeaseOwner::current().unwrap()).await.unwrap();
    target.store_state(&state.render().unwrap()).await.unwrap();
    target.release_lease().await.unwrap();
    let report = pair.sync_well(&options()).await;
    assert!(report.resumed);
    assert_eq!(report.moved.bytes_written, 144 << 10);
}

#[tokio::test]
async fn a_second_sync_is_told_who_is_at_it_and_a_fenced_one_stops() {
    let pair = Pair::new();
    let holder = pair.target.reopen();
    holder.acquire_lease(&crate::image::LeaseOwner::current().unwrap()).await.unwrap();
    let error = pair.sync(&options()).await.unwrap_err().to_string();
    assert!(error.contains(&format!("process {}", std::process::id())), "{error}");
    holder.break_lease();
    let late = holder.write(0, bytes::Bytes::from_static(b"late")).await.unwrap_err();
    assert_eq!(late.kind, crate::image::ErrorKind::Fenced);
}

#[derive(Clone, Debug)]
enum Event {
    Write { offset: u64, length: u64, byte: u8 },
    Discard { offset: u64, length: u64 },
    Resize(u64),
    Sync { keep: usize },
    Crash { at: u64, after: bool },
    LoseSnapshot,
    FastDiff(bool),
}

fn event() -> impl Strategy<Value = Event> {
    let offset = 0..SIZE;
    prop_oneof![
        6 => (offset.clone(), 1u64..40_000, any::<u8>()).prop_map(|(offset, length, byte)| Event::Write { offset, length, byte }),
        3 => (offset, 1u64..100_000).prop_map(|(offset, length)| Event::Discard { offset, length }),
        1 => (1..SIZE).prop_map(Event::Resize),
        4 => (1usize..4).prop_map(|keep| Event::Sync { keep }),
        3 => (1u64..14, any::<bool>()).prop_map(|(at, after)| Event::Crash { at, after }),
        1 => Just(Event::LoseSnapshot),
        1 => any::<bool>().prop_map(Event::FastDiff),
    ]
}

async fn run_model(events: Vec<Event>) {
    let mut pair = Pair::new();
    for (seed, event) in events.into_iter().enumerate() {
        let size = pair.source.size().await.unwrap();
        match event {
            Event::Write { offset, length, byte } => {
                if let Some(range) = ByteRange::new(offset, length).unwrap().clip(size) {
                    pair.source.write_as_server(offset, &vec![byte; range.length() as usize]);
                }
            }
            Event::Discard { offset, length } => pair.source.discard(ByteRange::new(offset, length).unwrap()),
            Event::Resize(size) => pair.source.resize_as_server(size),
            Event::FastDiff(on) => [&pair.source, &pair.target].into_iter().for_each(|image| image.set_fast_diff(on)),
            Event::Sync { keep } => {
                let report = pair.sync_or_start_over(&SyncOptions { keep, ..options() }).await;
                if pair.source.snapshots().await.unwrap().iter().any(|s| s.name == report.snapshot) {
                    pair.check_committed(&report).await;
                }
            }
            Event::Crash { at, after } => {
                pair.target.set_fault(Some(Fault { at, after, seed: seed as u64 }));
                let _ = pair.sync(&options()).await;
                drop(pair.target.reopen());
                pair.target.set_fault(None);
                pair.remember_source().await;
                pair.check_history().await;
            }
            Event::LoseSnapshot => {
                let state = pair.target.reopen().load_state().await.unwrap();
                let in_flight = state.and_then(|state| TargetState::parse(&state).unwrap().in_flight);
                if let Some(snapshot) = in_flight.and_then(|in_flight| in_flight.snapshot) {
                    let _ = pair.source.remove_snapshot(&snapshot).await;
                }
            }
        }
    }
    // Two: the first may only finish what was in flight.
    pair.sync_or_start_over(&options()).await;
    let last = pair.sync_or_start_over(&options()).await;
    pair.check_committed(&last).await;
}

fn run_model_here(events: Vec<Event>) {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(run_model(events));
}

proptest! {
    // A failing case is printed; it becomes one of `cases_that_failed_once`, not a file of its own.
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn whatever_happens_a_committed_snapshot_is_the_source_snapshot(events in prop::collection::vec(event(), 1..40)) {
        run_model_here(events);
    }
}

#[test]
fn cases_that_failed_once() {
    let one_byte = || Event::Write { offset: 0, length: 1, byte: 0 };
    let cut = || Event::Crash { at: 6, after: false };
    for events in [
        vec![Event::Crash { at: 1, after: true }],
        vec![cut(), Event::LoseSnapshot],
        vec![one_byte(), Event::Sync { keep: 1 }, cut(), Event::LoseSnapshot, one_byte()],
    ] {
        run_model_here(events);
    }
}

#[test]
fn no_two_points_of_a_process_have_the_same_name() {
    let names: Vec<String> = (0..100).map(|_| name_of_now()).collect();
    assert!(names.is_sorted() && names.windows(2).all(|pair| pair[0] != pair[1]), "{names:?}");
    assert!(names.iter().all(|name| is_automatic(name)), "{names:?}");
    // Another process has another number.
    let number = |name: &String| name.rsplit_once('-').and_then(|(_, number)| number.parse::<u32>().ok());
    assert!(number(&names[0]).is_some_and(|number| number >= 1000), "{names:?}");
}
