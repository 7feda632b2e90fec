//! Batch streams over in-memory images: sent, received, cut, refused, resumed.

use super::*;
use crate::batch::Compression;
use crate::delta::stream::DiffReader;
use crate::wire::{Message, StreamReader, StreamWriter};

/// The stream of a source's delta, as bytes.
async fn stream_of(source: &MemoryImage, from: Option<&str>, to: &str, compression: Compression) -> Vec<u8> {
    let limits = Limits { bytes: 1 << 20, requests: 4, ..Limits::default() };
    let request = SendRequest { to: Some(to.into()), from: from.map(Into::into), compression, limits };
    let mut bytes = Vec::new();
    let source: Arc<dyn SourceImage> = Arc::new(source.reopen());
    send(source, &request, &mut bytes, &Progress::default(), &CancellationToken::new()).await.unwrap();
    bytes
}

async fn receive_bytes(target: &MemoryImage, bytes: &[u8]) -> Result<ReceiveReport> {
    let reader = StreamReader::open(std::io::Cursor::new(bytes.to_vec())).await.expect("the stream begins well");
    let options = ReceiveOptions { keep: 1, limits: Limits { bytes: 1 << 20, requests: 4, ..Limits::default() } };
    let target: Arc<dyn TargetImage> = Arc::new(target.reopen());
    receive(target, reader, &options, &Progress::default(), &CancellationToken::new()).await
}

/// A source with snapshots `a`, `b`, `c` and something different in each.
async fn source() -> MemoryImage {
    let source = MemoryImage::new("source", SIZE, LAYOUT);
    source.write_as_server(1000, &[1; 200_000]);
    source.create_snapshot("a").await.unwrap();
    source.write_as_server(100_000, &[2; 30_000]);
    source.discard(ByteRange::new(4096, 8192).unwrap());
    source.create_snapshot("b").await.unwrap();
    source.resize_as_server(SIZE + 4096);
    source.write_as_server(SIZE, &[3; 4096]);
    source.write_as_server(100_000, &[1; 30_000]);
    source.create_snapshot("c").await.unwrap();
    source
}

async fn assert_at(source: &MemoryImage, target: &MemoryImage, name: &str) {
    let of = async |image: &MemoryImage| {
        let snapshot = image.snapshots().await.unwrap().into_iter().find(|s| s.name == name).unwrap();
        image.bytes_at(&Point::Snapshot(snapshot)).unwrap()
    };
    let truth = of(source).await;
    assert!(
        of(target).await == truth && target.bytes_at(&Point::Head).unwrap() == truth,
        "the target is not at {name}"
    );
}

#[tokio::test]
async fn streams_carry_a_volume_from_snapshot_to_snapshot() {
    let source = source().await;
    for compression in [Compression::None, Compression::Zstd(1)] {
        let target = MemoryImage::new("target", SIZE, LAYOUT);
        for (from, to) in [(None, "a"), (Some("a"), "b"), (Some("b"), "c")] {
            let bytes = stream_of(&source, from, to, compression).await;
            let report = receive_bytes(&target, &bytes).await.unwrap();
            assert_eq!((report.base.as_deref(), report.already_there), (from, false));
            assert_at(&source, &target, to).await;
            assert!(receive_bytes(&target, &bytes).await.unwrap().already_there);
        }
    }
}

/// The diff that leads to HEAD, as bytes.
async fn diff_of_head(source: &MemoryImage, from: Option<&str>) -> (Vec<u8>, ExportReport) {
    let (limits, mut bytes) = (Limits { bytes: 1 << 20, requests: 4, ..Limits::default() }, Vec::new());
    let source: Arc<dyn SourceImage> = Arc::new(source.reopen());
    let (shown, cancel) = (Progress::default(), CancellationToken::new());
    let report = export_diff(source, (from, None), limits, &mut bytes, &shown, &cancel).await.unwrap();
    (bytes, report)
}

async fn import_bytes(target: &MemoryImage, bytes: &[u8], rewind: bool) -> Result<ImportReport> {
    let diff = DiffReader::open(std::io::Cursor::new(bytes.to_vec())).await.expect("the diff begins well");
    let options = ImportOptions { limits: Limits { bytes: 1 << 20, requests: 4, ..Limits::default() }, rewind };
    let target: Arc<dyn TargetImage> = Arc::new(target.reopen());
    import_diff(target, diff, &options, &Progress::default(), &CancellationToken::new()).await
}

#[tokio::test]
async fn a_diff_that_leads_to_head_names_no_snapshot_and_makes_none() {
    let source = source().await;
    source.write_as_server(0, &[9; 70_000]);
    let truth = source.bytes_at(&Point::Head).unwrap();
    let target = MemoryImage::new("target", SIZE, LAYOUT);
    let (bytes, report) = diff_of_head(&source, None).await;
    assert_eq!((report.snapshot, report.consistent, report.warning), (None, true, None));
    assert_eq!(import_bytes(&target, &bytes, false).await.unwrap().snapshot, None);
    assert!(target.bytes_at(&Point::Head).unwrap() == truth && target.snapshots().await.unwrap().is_empty());

    // From the last snapshot: HEAD is the source's HEAD then, and at no snapshot.
    let target = MemoryImage::new("target", source.size().await.unwrap(), LAYOUT);
    let snapshot = source.snapshots().await.unwrap().into_iter().find(|s| s.name == "c").unwrap();
    target.write_as_server(0, &source.bytes_at(&Point::Snapshot(snapshot)).unwrap());
    target.create_snapshot("c").await.unwrap();
    let (bytes, _) = diff_of_head(&source, Some("c")).await;
    assert_eq!(import_bytes(&target, &bytes, false).await.unwrap().snapshot, None);
    let names: Vec<String> = target.snapshots().await.unwrap().into_iter().map(|s| s.name).collect();
    assert!(target.bytes_at(&Point::Head).unwrap() == truth && names == ["c"]);
    let kind = kind_of(import_bytes(&target, &bytes, false).await.unwrap_err());
    assert_eq!((kind.name(), kind), ("diverged", ConflictKind::HeadMoved { since: "c".into() }));
    assert!(import_bytes(&target, &bytes, true).await.unwrap().rewound);
    assert!(target.bytes_at(&Point::Head).unwrap() == truth);
}

#[tokio::test]
async fn a_write_while_head_is_read_is_told() {
    let source = source().await;
    let mut watch = HeadWatch::begin(&source, None).await.unwrap();
    assert_eq!((watch.is_consistent(), watch.warning()), (true, None));
    source.write_as_server(0, &[8; 4096]);
    assert!(watch.end(&source).await.unwrap() && !watch.is_consistent());
    let warning = watch.warning().unwrap();
    assert!(warning.contains("source was written while it was read") && warning.contains("moments"), "{warning}");
    assert!(!watch.end(&source).await.unwrap(), "it is told once");
    // A snapshot doesn't mind.
    let mut watch = HeadWatch::begin(&source, Some("c")).await.unwrap();
    source.write_as_server(0, &[7; 4096]);
    assert!(!watch.end(&source).await.unwrap() && watch.warning().is_none());
}

#[tokio::test]
async fn a_stream_cut_anywhere_commits_nothing_and_is_resumed() {
    let source = source().await;
    let full = stream_of(&source, None, "a", Compression::None).await;
    let delta = stream_of(&source, Some("a"), "b", Compression::Zstd(1)).await;
    for cut in (200..delta.len() - 1).step_by(97) {
        let target = MemoryImage::new("target", SIZE, LAYOUT);
        receive_bytes(&target, &full).await.unwrap();
        let Ok(reader) = StreamReader::open(std::io::Cursor::new(delta[..cut].to_vec())).await else { continue };
        drop(reader);
        receive_bytes(&target, &delta[..cut]).await.unwrap_err();
        let names: Vec<String> = target.snapshots().await.unwrap().into_iter().map(|s| s.name).collect();
        assert_eq!(names, ["a"], "cut at {cut}");
        // Another delta from the same base: what the cut one left behind must not shine through.
        if cut % 2 == 0 {
            let other = stream_of(&source, Some("a"), "c", Compression::None).await;
            let report = receive_bytes(&target, &other).await.unwrap();
            assert!(report.rewound);
            assert_at(&source, &target, "c").await;
        } else {
            receive_bytes(&target, &delta).await.unwrap();
            assert_at(&source, &target, "b").await;
        }
    }
}

/// A stream with a chunk that was moved, and with its faults found at its very end only.
async fn moved_chunk(stream: &[u8]) -> Vec<u8> {
    let mut reader = StreamReader::open(std::io::Cursor::new(stream.to_vec())).await.unwrap();
    let mut writer = StreamWriter::open(Vec::new(), reader.hello()).await.unwrap();
    while let Message::Batch(batch) = reader.next().await.unwrap() {
        let mut batch = crate::batch::decode(batch).unwrap();
        if let Some(last) = batch.chunks.last_mut() {
            last.range = ByteRange::new(last.range.offset() + 65_536, last.range.length()).unwrap();
            batch.progress_to = batch.progress_to.max(last.range.end());
        }
        writer.write(&crate::batch::encode(batch, Compression::None)).await.unwrap();
    }
    let mut bytes = writer.finish().await.unwrap().1;
    bytes.push(0);
    bytes
}

/// What a stream with a fault has left must not shine through under the right one, sent anew.
#[tokio::test]
async fn a_stream_with_a_fault_is_not_gone_on_from() {
    let source = source().await;
    for (from, to) in [(None, "a"), (Some("a"), "b")] {
        let target = MemoryImage::new("target", SIZE, LAYOUT);
        if let Some(from) = from {
            receive_bytes(&target, &stream_of(&source, None, from, Compression::None).await).await.unwrap();
        }
        let good = stream_of(&source, from, to, Compression::None).await;
        let before = target.bytes_at(&Point::Head).unwrap();
        let refused = receive_bytes(&target, &moved_chunk(&good).await).await.unwrap_err();
        assert!(matches!(refused, CycleError::Pipeline(_)), "{refused}");
        assert!(target.bytes_at(&Point::Head).unwrap() != before, "it was applied before it was refused");
        receive_bytes(&target, &good).await.unwrap();
        assert_at(&source, &target, to).await;
    }
}

/// A cycle died between its copy and its commit; a stream of the same snapshot that has a fault is applied over that.
#[tokio::test]
async fn what_a_stream_with_a_fault_wrote_over_a_finished_copy_is_not_committed() {
    for then_received in [false, true] {
        let mut struck = 0;
        for at in 1.. {
            let mut pair = Pair { source: source().await, ..Pair::new() };
            pair.remember_source().await;
            pair.sync_well(&named("a")).await;
            pair.target.set_fault(Some(Fault { at, after: true, seed: at }));
            if pair.sync(&named("b")).await.is_ok() && !pair.target.has_crashed() {
                break;
            }
            drop(pair.target.reopen());
            if !pair.state().await.in_flight.is_some_and(|in_flight| in_flight.applied) {
                continue;
            }
            let good = stream_of(&pair.source, Some("a"), "b", Compression::None).await;
            let made = pair.target.snapshots().await.unwrap().iter().any(|have| have.name == "b");
            let refused = receive_bytes(&pair.target, &moved_chunk(&good).await).await;
            assert!(refused.is_err(), "{refused:?}");
            struck += u32::from(!made);
            if then_received {
                receive_bytes(&pair.target, &good).await.unwrap();
            } else {
                // What is in flight is finished first; the source has gone on since.
                let _ = pair.sync(&named("b")).await;
            }
            let b = pair.target.snapshots().await.unwrap().into_iter().find(|have| have.name == "b").unwrap();
            assert!(pair.target.bytes_at(&Point::Snapshot(b)).unwrap() == pair.committed["b"], "died at {at}");
        }
        assert!(struck >= 1);
    }
}

/// The base is written back over what a lost stream left; that is no foreign write, wherever the receiver dies.
#[tokio::test]
async fn a_receive_that_died_behind_its_rewind_is_resumed() {
    let source = source().await;
    let (lost, next) = (
        stream_of(&source, Some("a"), "b", Compression::None).await,
        stream_of(&source, Some("a"), "c", Compression::None).await,
    );
    for (at, after) in (1..).flat_map(|at| [(at, false), (at, true)]) {
        let target = MemoryImage::new("target", SIZE, LAYOUT);
        receive_bytes(&target, &stream_of(&source, None, "a", Compression::None).await).await.unwrap();
        receive_bytes(&target, &lost[..lost.len() - 40]).await.unwrap_err();
        // In an object that neither stream has anything for.
        target.write_as_server(150_000, &[9; 100]);
        target.set_fault(Some(Fault { at, after, seed: at }));
        let outcome = receive_bytes(&target, &next).await;
        if let (Ok(report), false) = (&outcome, target.has_crashed()) {
            assert!(report.rewound && at > 8, "{at} steps");
            break;
        }
        receive_bytes(&target, &next).await.unwrap_or_else(|error| panic!("died at {at}: {error}"));
        assert_at(&source, &target, "c").await;
    }
}

/// Between a stream that was cut and the same one sent anew, somebody writes to what neither has anything for.
#[tokio::test]
async fn a_write_between_two_receives_is_seen() {
    let source = source().await;
    let target = MemoryImage::new("target", SIZE, LAYOUT);
    receive_bytes(&target, &stream_of(&source, None, "a", Compression::None).await).await.unwrap();
    let delta = stream_of(&source, Some("a"), "b", Compression::None).await;
    receive_bytes(&target, &delta[..delta.len() - 40]).await.unwrap_err();
    target.write_as_server(SIZE - 4096, b"theirs");
    let seen = kind_of(receive_bytes(&target, &delta).await.unwrap_err());
    assert_eq!(seen, ConflictKind::Diverged { since: "a".into() });
    assert_eq!(target.snapshots().await.unwrap().len(), 1);
}

#[tokio::test]
async fn a_lost_first_copy_leaves_nothing_behind() {
    let source = source().await;
    let (a, b) = (
        stream_of(&source, None, "a", Compression::None).await,
        stream_of(&source, None, "b", Compression::None).await,
    );
    let target = MemoryImage::new("target", SIZE, LAYOUT);
    receive_bytes(&target, &a[..a.len() - 40]).await.unwrap_err();
    receive_bytes(&target, &b).await.unwrap();
    assert_at(&source, &target, "b").await;
}

#[tokio::test]
async fn a_wrong_image_and_a_wrong_base_are_refused() {
    let (source, other) = (source().await, source().await);
    let target = MemoryImage::new("target", SIZE, LAYOUT);
    let delta = stream_of(&source, Some("a"), "b", Compression::None).await;
    let wrong = kind_of(receive_bytes(&target, &delta).await.unwrap_err());
    assert!(matches!(wrong, ConflictKind::WrongBase { .. }), "{wrong}");
    receive_bytes(&target, &stream_of(&source, None, "a", Compression::None).await).await.unwrap();
    let twin = stream_of(&other, Some("a"), "b", Compression::None).await;
    assert!(matches!(kind_of(receive_bytes(&target, &twin).await.unwrap_err()), ConflictKind::OtherSource { .. }));
    let gap = stream_of(&source, Some("b"), "c", Compression::None).await;
    assert!(matches!(kind_of(receive_bytes(&target, &gap).await.unwrap_err()), ConflictKind::WrongBase { .. }));
    target.write_as_server(0, b"stray");
    assert!(matches!(kind_of(receive_bytes(&target, &delta).await.unwrap_err()), ConflictKind::Diverged { .. }));
    let foreign = MemoryImage::new("foreign", SIZE, LAYOUT);
    foreign.write_as_server(0, b"theirs");
    let full = stream_of(&source, None, "a", Compression::None).await;
    assert_eq!(kind_of(receive_bytes(&foreign, &full).await.unwrap_err()), ConflictKind::NotOurs);
}

#[tokio::test]
async fn a_volume_received_can_be_synced_on_and_the_other_way_round() {
    let mut pair = Pair { source: source().await, ..Pair::new() };
    pair.remember_source().await;
    receive_bytes(&pair.target, &stream_of(&pair.source, None, "a", Compression::None).await).await.unwrap();
    let report = pair.sync_well(&named("b")).await;
    assert_eq!(report.base.as_deref(), Some("a"));
    receive_bytes(&pair.target, &stream_of(&pair.source, Some("b"), "c", Compression::None).await).await.unwrap();
    assert_at(&pair.source, &pair.target, "c").await;
}

#[tokio::test]
async fn an_interrupted_sender_never_makes_a_stream_that_looks_whole() {
    let source: Arc<dyn SourceImage> = Arc::new(source().await);
    let cancel = CancellationToken::new();
    cancel.cancel();
    let request =
        SendRequest { to: Some("a".into()), from: None, compression: Compression::None, limits: Limits::default() };
    let mut bytes = Vec::new();
    let error = send(source, &request, &mut bytes, &Progress::default(), &cancel).await.unwrap_err();
    assert!(matches!(error, CycleError::Interrupted { .. }));
    let target = MemoryImage::new("target", SIZE, LAYOUT);
    let refused = receive_bytes(&target, &bytes).await.unwrap_err();
    assert!(target.snapshots().await.unwrap().is_empty(), "{refused}");
}

#[tokio::test]
async fn verification_finds_every_difference_and_repair_mends_it() {
    let mut pair = Pair::new();
    pair.source.write_as_server(0, &[5; 300_000]);
    let report = pair.sync_well(&options()).await;
    let check = async |pair: &Pair| {
        let (ours, _) = open_point(&pair.source, Some(&report.snapshot)).await.unwrap();
        let (theirs, _) = open_point(&pair.target, Some(&report.snapshot)).await.unwrap();
        verify(
            (ours, LAYOUT),
            theirs,
            Limits { bytes: 1 << 20, requests: 4, ..Limits::default() },
            &Progress::default(),
        )
        .await
        .unwrap()
    };
    let good = check(&pair).await;
    assert!(good.equal && good.bytes_compared >= 300_000);
    pair.target.damage(&report.snapshot, 123_456, 0xff);
    pair.target.damage(&report.snapshot, SIZE - 1, 0xff);
    let bad = check(&pair).await;
    assert_eq!((bad.equal, bad.bytes_differing), (false, 8192));
    assert_eq!(bad.ranges, [ByteRange::new(122_880, 4096).unwrap(), ByteRange::new(SIZE - 4096, 4096).unwrap()]);
    let (source, target): (Arc<dyn SourceImage>, Arc<dyn TargetImage>) =
        (Arc::new(pair.source.reopen()), Arc::new(pair.target.reopen()));
    let progress = Progress::default();
    repair(source, target, &report.snapshot, &options(), &progress, &CancellationToken::new()).await.unwrap();
    assert!(check(&pair).await.equal);
    pair.sync_well(&options()).await;
}
