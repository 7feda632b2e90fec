use bytes::Bytes;

use super::*;
use crate::delta::stream::{DiffVersion, DiffWriter};
use crate::extent::ByteRange;
use crate::wire::WireFault;

fn golden(name: &str) -> Vec<u8> {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("proto/golden").join(name);
    let text = std::fs::read_to_string(path).unwrap();
    text.lines().filter(|line| !line.starts_with('#')).flat_map(|line| hex::decode(line).unwrap()).collect()
}

async fn diff_v1() -> Vec<u8> {
    let mut writer = DiffWriter::open(Vec::new(), Some("a"), Some("b"), 1 << 20).await.unwrap();
    writer.data(0, &Bytes::from_static(b"one")).await.unwrap();
    writer.data(3, &Bytes::from_static(b"more")).await.unwrap();
    writer.zero(ByteRange::new(4096, 8192).unwrap()).await.unwrap();
    writer.finish().await.unwrap().0
}

/// A version 2 diff with a snapshot, as rbd 16.2 writes it, lying `p` record and all.
fn diff_v2(to: Option<&str>) -> Vec<u8> {
    let mut bytes = BANNER_V2.to_vec();
    if let Some(to) = to {
        bytes.push(b't');
        bytes.extend((4 + to.len() as u64).to_le_bytes());
        bytes.extend((to.len() as u32).to_le_bytes());
        bytes.extend(to.as_bytes());
        bytes.extend(b"p\x08\0\0\0\0\0\0\0\x00");
    }
    bytes.extend(b"s\x08\0\0\0\0\0\0\0\0\x10\0\0\0\0\0\0");
    bytes.extend(b"w\x13\0\0\0\0\0\0\0\x10\0\0\0\0\0\0\0\x03\0\0\0\0\0\0\0abce");
    bytes
}

fn export() -> Vec<u8> {
    let mut bytes = BANNER_IMAGE_V2.to_vec();
    for (tag, value) in [(b'O', 22u64), (b'T', 61), (b'U', 4 << 20), (b'C', 1)] {
        bytes.push(tag);
        bytes.extend([8u64.to_le_bytes(), value.to_le_bytes()].concat());
    }
    bytes.extend(b"M\x0a\0\0\0\0\0\0\0\x01\0\0\0k\x01\0\0\0v");
    bytes.extend(b"E");
    bytes.extend([BANNER_DIFFS_V2, &2u64.to_le_bytes(), &diff_v2(Some("s1")), &diff_v2(None)].concat());
    bytes
}

#[tokio::test]
async fn batch_streams_are_told_and_checked() {
    let bytes = golden("zstd.hex");
    let Inspection::Batches { hello, totals, payload_bytes, checksums_verified } = inspect(&bytes[..]).await.unwrap()
    else {
        panic!("another format")
    };
    assert_eq!((hello.from, hello.to.name.as_str()), (None, "poolshift-2"));
    assert_eq!((totals.batches, totals.data_bytes, totals.zero_bytes), (1, 8192, 1 << 19));
    assert_eq!((totals.stream_bytes, payload_bytes, checksums_verified), (bytes.len() as u64, 19, 1));
    // Every flipped bit is found, and every truncation.
    for bit in 0..bytes.len() * 8 {
        let mut flipped = bytes.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        inspect(&flipped[..]).await.unwrap_err();
        inspect(&bytes[..bit / 8]).await.unwrap_err();
    }
    let error = inspect(&golden("failed.hex")[..]).await.unwrap_err();
    assert!(matches!(error, InspectError::Wire(WireError { fault: WireFault::SenderFailed { .. }, .. })));
}

#[tokio::test]
async fn damage_is_named_with_its_place() {
    let mut bytes = golden("incremental.hex");
    let at = bytes.windows(5).position(|window| window == b"hello").unwrap();
    bytes[at] ^= 1;
    let error = inspect(&bytes[..]).await.unwrap_err();
    assert_eq!(error.to_string(), format!("batch stream, frame ending at byte {}", at + 10));
    let InspectError::Batch { source, .. } = error else { panic!("{error:?}") };
    assert!(source.fault.to_string().contains("chunk 8192+10"), "{source:?}");
}

#[tokio::test]
async fn diffs_are_told() {
    let bytes = diff_v1().await;
    let inspection = inspect(&bytes[..]).await.unwrap();
    let Inspection::Diff { diff, stream_bytes } = &inspection else { panic!("another format") };
    assert_eq!((diff.header.version, *stream_bytes), (DiffVersion::V1, bytes.len() as u64));
    assert_eq!((diff.data_ranges, diff.data_bytes, diff.zero_ranges, diff.zero_bytes), (1, 7, 1, 8192));
    assert!(diff.ascending);
    let json = serde_json::to_value(&inspection).unwrap();
    assert_eq!((json["format"].as_str(), json["from"].as_str()), (Some("rbd diff"), Some("a")));
    for length in 0..bytes.len() {
        inspect(&bytes[..length]).await.unwrap_err();
    }
    let error = inspect(&[&bytes[..], b"\n"].concat()[..]).await.unwrap_err();
    let InspectError::Diff(DiffError { offset, fault: DiffFault::TrailingBytes }) = error else { panic!("{error:?}") };
    assert_eq!(offset, bytes.len() as u64);
}

#[tokio::test]
async fn exports_are_told_with_every_snapshot() {
    let bytes = export();
    let Inspection::Export { image, diffs, stream_bytes } = inspect(&bytes[..]).await.unwrap() else {
        panic!("another format")
    };
    let image = image.unwrap();
    assert_eq!((image.object_size, image.features, image.metadata_entries), (Some(4 << 20), Some(61), 1));
    assert_eq!(stream_bytes, bytes.len() as u64);
    let to: Vec<_> = diffs.iter().map(|diff| (diff.header.to.as_deref(), diff.header.protected)).collect();
    assert_eq!(to, [(Some("s1"), Some(false)), (None, None)]);
    for length in 0..bytes.len() {
        inspect(&bytes[..length]).await.unwrap_err();
    }
    // Only the diffs.
    let at = bytes.windows(BANNER_DIFFS_V2.len()).position(|window| window == BANNER_DIFFS_V2).unwrap();
    assert!(matches!(inspect(&bytes[at..]).await, Ok(Inspection::Export { image: None, .. })));
    // A count of everything.
    let mut hostile = bytes[..at + BANNER_DIFFS_V2.len()].to_vec();
    hostile.extend(u64::MAX.to_le_bytes());
    let error = inspect(&hostile[..]).await.unwrap_err();
    assert!(matches!(error, InspectError::Diff(DiffError { fault: DiffFault::TooMany { .. }, .. })));
}

#[tokio::test]
async fn other_files_are_refused_by_their_first_bytes() {
    for text in
        ["", "x", "poolshf", "rbd ", "rbd diff v9\n....", "rbd diff v1 ", "#!/bin/sh\necho", "rbd image diffs v3\n"]
    {
        let error = inspect(text.as_bytes()).await.unwrap_err();
        assert!(matches!(error, InspectError::UnknownFormat { .. }), "{text:?}: {error:?}");
    }
}
