//! What others do to the two sides, at the worst moment.

use super::*;

/// Stops a cycle in the middle, as Ctrl-C does: the intent is stored, HEAD counts as dirty.
async fn interrupt(pair: &Pair, options: &SyncOptions) {
    let cancel = CancellationToken::new();
    cancel.cancel();
    let (source, target) = (Arc::new(pair.source.reopen()), Arc::new(pair.target.reopen()));
    let error = sync(source, target, options, &Progress::default(), &cancel).await.unwrap_err();
    assert!(matches!(error, CycleError::Interrupted { .. }), "{error}");
}

#[tokio::test]
async fn a_source_snapshot_removed_while_it_is_read_is_not_committed() {
    for reads in [0, 1] {
        let mut pair = Pair::new();
        pair.source.write_as_server(0, &[1; 100_000]);
        let base = pair.sync_well(&options()).await;
        pair.source.write_as_server(0, &[2; 10_000]);
        pair.source.write_as_server(300_000, &[2; 10_000]);
        pair.source.lose_snapshot_after_reads(reads);
        let error = pair.sync(&options()).await.unwrap_err();
        assert!(matches!(error, CycleError::SnapshotLost { .. }), "{error}");
        let names: Vec<String> = pair.target.snapshots().await.unwrap().into_iter().map(|s| s.name).collect();
        assert_eq!(names, [base.snapshot.as_str()]);
        let next = pair.sync_well(&options()).await;
        assert!(next.rewound);
        assert_eq!(next.base, Some(base.snapshot));
    }
}

#[tokio::test]
async fn a_stream_of_a_snapshot_removed_while_it_is_read_has_no_end() {
    let source = MemoryImage::new("source", SIZE, LAYOUT);
    source.write_as_server(0, &[1; 100_000]);
    source.create_snapshot("a").await.unwrap();
    source.lose_snapshot_after_reads(0);
    let request = SendRequest {
        to: Some("a".into()),
        from: None,
        compression: crate::batch::Compression::None,
        limits: Limits::default(),
    };
    let mut bytes = Vec::new();
    let sent = send(Arc::new(source), &request, &mut bytes, &Progress::default(), &CancellationToken::new()).await;
    assert!(matches!(sent.unwrap_err(), CycleError::SnapshotLost { .. }));
    let mut reader = crate::wire::StreamReader::open(std::io::Cursor::new(bytes)).await.unwrap();
    let end = loop {
        match reader.next().await {
            Ok(crate::wire::Message::Batch(_)) => {}
            end => break end,
        }
    };
    assert!(end.is_err(), "the stream looks whole");
}

#[tokio::test]
async fn a_strangers_snapshot_of_the_name_in_flight_is_never_the_commit() {
    let mut pair = Pair::new();
    pair.source.write_as_server(0, &[1; 100_000]);
    interrupt(&pair, &named("daily")).await;
    let stranger = pair.target.reopen().create_snapshot("daily").await.unwrap();
    let taken = kind_of(pair.sync(&options()).await.unwrap_err());
    assert_eq!(taken, ConflictKind::NameTaken { name: "daily".into() });
    pair.target.remove_snapshot(&stranger).await.unwrap();
    assert!(pair.sync_well(&options()).await.resumed);
}

#[tokio::test]
async fn writes_behind_an_unused_intent_are_noticed() {
    for synced_before in [false, true] {
        let mut pair = Pair::new();
        pair.source.write_as_server(0, &[1; 100_000]);
        if synced_before {
            pair.sync_well(&options()).await;
        }
        pair.source.set_fault(Some(Fault { at: 1, after: false, seed: 1 }));
        pair.sync(&options()).await.unwrap_err();
        drop(pair.source.reopen());
        assert!(pair.state().await.in_flight.is_some_and(|in_flight| !in_flight.dirty));
        pair.target.write_as_server(400_000, b"a stray write");
        let noticed = kind_of(pair.sync(&options()).await.unwrap_err());
        let expected = if synced_before { "diverged" } else { "not-ours" };
        assert_eq!(noticed.name(), expected);
        let mut adopt = full();
        adopt.request.adopt = true;
        pair.sync_well(&adopt).await;
    }
}

#[tokio::test]
async fn writes_outside_an_interrupted_delta_are_noticed() {
    for synced_before in [false, true] {
        let mut pair = Pair::new();
        pair.source.write_as_server(0, &[1; 100_000]);
        if synced_before {
            pair.sync_well(&options()).await;
            pair.source.write_as_server(0, &[2; 5000]);
        }
        interrupt(&pair, &options()).await;
        pair.target.write_as_server(400_000, b"a stray write");
        assert_eq!(kind_of(pair.sync(&options()).await.unwrap_err()).name(), "diverged");
        pair.sync_well(&full()).await;
    }
}

/// Wherever a cycle dies: what somebody writes beside its delta then is noticed, or comes after its snapshot.
#[tokio::test]
async fn writes_behind_a_cycle_that_died_anywhere_never_get_into_its_snapshot() {
    for at in 1.. {
        let mut pair = Pair::new();
        pair.source.write_as_server(0, &[1; 100_000]);
        pair.sync_well(&options()).await;
        pair.source.write_as_server(0, &[2; 5000]);
        pair.target.set_fault(Some(Fault { at, after: true, seed: 1 }));
        if pair.sync(&options()).await.is_ok() && !pair.target.has_crashed() {
            assert!(at > 5, "{at} steps");
            break;
        }
        pair.target.reopen().write_as_server(400_000, b"a stray write");
        match pair.sync(&options()).await {
            Ok(report) => {
                let of = async |image: &MemoryImage| {
                    let found = image.snapshots().await.unwrap().into_iter().find(|s| s.name == report.snapshot);
                    image.bytes_at(&Point::Snapshot(found.unwrap())).unwrap()
                };
                assert!(of(&pair.target).await == of(&pair.source).await, "died at {at}");
            }
            Err(error) => assert_eq!(kind_of(error).name(), "diverged", "died at {at}"),
        }
    }
}

/// A rewind writes to HEAD what the base holds. Wherever the cycle dies that began with it, its own writes are not taken
/// for another client's.
#[tokio::test]
async fn a_cycle_that_died_behind_its_rewind_is_resumed() {
    for (at, after) in (1..).flat_map(|at| [(at, false), (at, true)]) {
        let mut pair = Pair::new();
        pair.source.write_as_server(0, &[1; 200_000]);
        pair.sync_well(&options()).await;
        pair.source.write_as_server(0, &[2; 5000]);
        pair.source.write_as_server(300_000, &[2; 5000]);
        interrupt(&pair, &options()).await;
        let lost = pair.state().await.in_flight.and_then(|in_flight| in_flight.snapshot).unwrap();
        // As a server does that ran on this side: in an object that the next delta has nothing for.
        pair.target.write_as_server(150_000, &[9; 5000]);
        pair.source.remove_snapshot(&lost).await.unwrap();
        pair.source.write_as_server(70_000, &[3; 5000]);
        pair.target.set_fault(Some(Fault { at, after, seed: at }));
        let outcome = pair.sync(&options()).await;
        if let (Ok(report), false) = (&outcome, pair.target.has_crashed()) {
            assert!(report.rewound && at > 8, "{at} steps");
            break;
        }
        drop(pair.target.reopen());
        pair.remember_source().await;
        let report = pair.sync_well(&options()).await;
        assert!(report.snapshot != lost.name, "died at {at}");
    }
}

/// Who asks for a snapshot by name gets what the source holds, or is told that an earlier run has copied it.
#[tokio::test]
async fn a_named_snapshot_that_an_earlier_run_copied_is_no_success_once_the_source_has_changed() {
    let mut refused = 0;
    for (at, after) in (1..).flat_map(|at| [(at, false), (at, true)]) {
        let mut pair = Pair::new();
        pair.source.write_as_server(0, &[1; 100_000]);
        pair.sync_well(&options()).await;
        pair.source.write_as_server(0, &[2; 5000]);
        pair.target.set_fault(Some(Fault { at, after, seed: at }));
        if pair.sync(&named("last")).await.is_ok() && !pair.target.has_crashed() {
            break;
        }
        drop(pair.target.reopen());
        pair.remember_source().await;
        pair.source.write_as_server(0, &[3; 5000]);
        match pair.sync(&named("last")).await {
            Ok(report) => {
                assert!(report.method.is_some(), "died at {at}: nothing was copied");
                pair.check_committed(&report).await;
            }
            Err(error) => {
                assert_eq!(kind_of(error), ConflictKind::NotNow { name: "last".into(), newest: None });
                pair.check_history().await;
                refused += 1;
            }
        }
        let next = pair.sync_well(&options()).await;
        assert_eq!(next.base.as_deref(), Some("last"), "died at {at}: it is committed");
    }
    assert!(refused >= 2, "{refused} runs died between the copy and the commit");
}

#[tokio::test]
async fn an_older_snapshot_does_not_replace_a_lost_one() {
    let mut pair = Pair::new();
    pair.source.write_as_server(0, &[1; 100_000]);
    pair.source.create_snapshot("old").await.unwrap();
    pair.sync_well(&options()).await;
    pair.source.write_as_server(0, &[2; 5000]);
    interrupt(&pair, &options()).await;
    let lost = pair.state().await.in_flight.and_then(|in_flight| in_flight.snapshot).unwrap();
    pair.source.remove_snapshot(&lost).await.unwrap();
    assert_eq!(kind_of(pair.sync(&named("old")).await.unwrap_err()).name(), "older-than-base");
    pair.sync_well(&options()).await;
}

#[tokio::test]
async fn starting_over_under_the_name_in_flight_keeps_its_snapshot() {
    let mut pair = Pair::new();
    pair.source.write_as_server(0, &[1; 100_000]);
    interrupt(&pair, &options()).await;
    let name = pair.state().await.in_flight.unwrap().name;
    let mut again = full();
    again.request.name = Some(name);
    pair.sync_well(&again).await;
    pair.sync_well(&options()).await;
}

#[tokio::test]
async fn repair_checks_before_it_acts_and_removes_nothing_else() {
    let mut pair = Pair::new();
    let keep_all = SyncOptions { keep: 10, ..options() };
    let mut last = String::new();
    for byte in 1..4 {
        pair.source.write_as_server(0, &[byte; 100_000]);
        last = pair.sync_well(&keep_all).await.snapshot;
    }
    let mend = async |pair: &Pair, name: &str| {
        let (source, target) = (Arc::new(pair.source.reopen()), Arc::new(pair.target.reopen()));
        repair(source, target, name, &options(), &Progress::default(), &CancellationToken::new()).await
    };
    let first = pair.target.snapshots().await.unwrap()[0].name.clone();
    assert_eq!(kind_of(mend(&pair, &first).await.unwrap_err()).name(), "not-newest");
    pair.target.write_as_server(0, b"a stray write");
    assert_eq!(kind_of(mend(&pair, &last).await.unwrap_err()).name(), "diverged");
    last = pair.sync_well(&SyncOptions { keep: 10, ..full() }).await.snapshot;
    mend(&pair, &last).await.unwrap();
    assert_eq!(pair.target.snapshots().await.unwrap().len(), 4);
    assert_eq!(pair.source.snapshots().await.unwrap().len(), 4);
    let gone = pair.source.snapshots().await.unwrap().into_iter().find(|s| s.name == last).unwrap();
    pair.source.remove_snapshot(&gone).await.unwrap();
    assert_eq!(kind_of(mend(&pair, &last).await.unwrap_err()).name(), "no-common-snapshot");
}

#[tokio::test]
async fn the_state_never_outgrows_its_room() {
    let mut pair = Pair::new();
    let long = |index: u32| format!("{index:0>200}");
    for index in 0u32..220 {
        pair.source.write_as_server(0, &index.to_le_bytes());
        pair.sync(&named(&long(index))).await.unwrap();
    }
    assert!(pair.target.load_state().await.unwrap().unwrap().len() < 60 << 10);
    assert!(pair.target.snapshots().await.unwrap().len() == 220, "what the user named stays");
    pair.remember_source().await;
    pair.sync_well(&options()).await;
}

#[test]
fn only_poolshifts_own_names_are_automatic() {
    use super::super::cycle::is_automatic;
    assert!(is_automatic("poolshift-20261123T220511.123Z") && is_automatic("poolshift-20261123T220511.123Z-2"));
    for name in
        ["poolshift-golden", "poolshift-", "daily", "poolshift-20261123T220511.123Z-", "poolshift-2026112xT220511.123Z"]
    {
        assert!(!is_automatic(name), "{name}");
    }
}
