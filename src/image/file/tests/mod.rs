use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};

use tempfile::TempDir;

use super::*;
use crate::extent::Extent;
use crate::image::ChangedObjects;

mod crash;
mod devices;
mod leases;
mod model;

const BLOCK: u64 = super::super::COMPARE_BLOCK;

fn range(offset: u64, length: u64) -> ByteRange {
    ByteRange::new(offset, length).unwrap()
}

fn folder() -> TempDir {
    tempfile::tempdir().unwrap()
}

fn disk(folder: &TempDir) -> PathBuf {
    folder.path().join("disk")
}

/// Bytes that differ from those of every other seed.
fn noise(seed: u64, length: usize) -> Bytes {
    let mut bytes = vec![0; length];
    fastrand::Rng::with_seed(seed).fill(&mut bytes);
    bytes.into()
}

async fn leased(path: &Path) -> FileImage {
    let image = FileImage::open_target(path).unwrap();
    image.acquire_lease(&LeaseOwner::current().unwrap()).await.unwrap();
    image
}

async fn created(path: &Path, size: u64) -> FileImage {
    drop(FileImage::create_target(path, size).unwrap());
    leased(path).await
}

async fn read_all(image: &FileImage) -> Vec<u8> {
    let view = image.view(&Point::Head).await.unwrap();
    match ByteRange::between(0, view.size()) {
        Some(whole) => view.read(whole).await.unwrap().to_vec(),
        None => Vec::new(),
    }
}

fn kind<T>(result: Result<T>) -> ErrorKind {
    match result {
        Ok(_) => panic!("it should have failed"),
        Err(error) => error.kind,
    }
}

fn message<T>(result: Result<T>) -> String {
    match result {
        Ok(_) => panic!("it should have failed"),
        Err(error) => format!("{error} | {}", error.hint.clone().unwrap_or_default()),
    }
}

#[tokio::test]
async fn what_is_written_is_read() {
    let folder = folder();
    let image = created(&disk(&folder), 3 * BLOCK + 100).await;
    assert!(image.is_blank().await.unwrap());
    let data = noise(1, BLOCK as usize + 50);
    image.write(7, data.clone()).await.unwrap();
    image.write(5, Bytes::new()).await.unwrap();
    image.write_zeroes(range(100, 20)).await.unwrap();
    image.flush().await.unwrap();
    let mut expected = vec![0; 3 * BLOCK as usize + 100];
    expected[7..7 + data.len()].copy_from_slice(&data);
    expected[100..120].fill(0);
    assert_eq!(read_all(&image).await, expected);
    assert!(!image.is_blank().await.unwrap());
    image.resize(60).await.unwrap();
    image.resize(BLOCK).await.unwrap();
    expected.truncate(60);
    expected.resize(BLOCK as usize, 0);
    assert_eq!(read_all(&image).await, expected);
    assert_eq!(image.size().await.unwrap(), BLOCK);
    assert!(image.remarks().is_empty());
}

#[tokio::test]
async fn requests_beyond_the_end_are_refused() {
    let folder = folder();
    let image = created(&disk(&folder), 1000).await;
    assert_eq!(kind(image.write(999, noise(1, 2)).await), ErrorKind::OutOfBounds);
    assert_eq!(kind(image.write(u64::MAX, noise(1, 2)).await), ErrorKind::OutOfBounds);
    assert_eq!(kind(image.write_zeroes(range(0, 1001)).await), ErrorKind::OutOfBounds);
    assert_eq!(kind(image.differing_blocks(0, &noise(1, 1001)).await), ErrorKind::OutOfBounds);
    assert_eq!(kind(image.differing_blocks(0, &noise(1, 999)).await), ErrorKind::OutOfBounds);
    assert_eq!(kind(image.differing_blocks(1, &noise(1, 999)).await), ErrorKind::OutOfBounds);
    let view = image.view(&Point::Head).await.unwrap();
    assert_eq!(kind(view.read(range(1000, 1)).await), ErrorKind::OutOfBounds);
    assert_eq!(image.size().await.unwrap(), 1000);
    image.resize(40 << 20).await.unwrap();
    let view = image.view(&Point::Head).await.unwrap();
    assert_eq!(view.read(range(0, 32 << 20)).await.unwrap().len(), 32 << 20);
    assert_eq!(kind(view.read(range(0, (32 << 20) + 1)).await), ErrorKind::OutOfBounds);
    assert_eq!(kind(image.write(0, vec![0; (32 << 20) + 1].into()).await), ErrorKind::OutOfBounds);
    assert_eq!(kind(image.store_state(&"x".repeat(STATE_MAX + 1)).await), ErrorKind::OutOfBounds);
    image.store_state(&"\u{1}".repeat(STATE_MAX)).await.unwrap();
    assert_eq!(image.load_state().await.unwrap().unwrap().len(), STATE_MAX);
}

#[tokio::test]
async fn a_source_is_read_with_its_holes() {
    let folder = folder();
    let file = fs::File::create(disk(&folder)).unwrap();
    file.set_len(100 << 20).unwrap();
    file.write_all_at(&noise(1, 70_000), 10 << 20).unwrap();
    file.write_all_at(&noise(2, 70_000), 50 << 20).unwrap();
    let image = FileImage::open_source(disk(&folder)).unwrap();
    assert!(image.snapshots().await.unwrap().is_empty());
    let label = image.create_snapshot("now").await.unwrap();
    assert_eq!(label, Snapshot { id: 0, name: "now".into(), size: 100 << 20 });
    let view = image.view(&Point::Snapshot(label.clone())).await.unwrap();
    let runs = view.changed_objects(None).await.unwrap();
    assert_eq!(runs, ChangedObjects::Runs(vec![range(0, 100 << 20)]));
    assert!(matches!(view.changed_objects(Some(&label)).await.unwrap(), ChangedObjects::Unavailable { .. }));
    let all = view.diff(None, range(0, 100 << 20)).await.unwrap();
    let data: u64 = all.iter().map(|extent| extent.range.length()).sum();
    assert!((140_000..10 << 20).contains(&data), "{all:?}");
    for at in [10 << 20, 50 << 20] {
        let found = view.diff(None, range(at + 100, 1000)).await.unwrap();
        assert_eq!(found, [Extent::data(range(at + 100, 1000))]);
    }
    assert!(view.diff(None, range(80 << 20, 1 << 40)).await.unwrap().is_empty());
    assert_eq!(kind(view.diff(Some(&label), range(0, 1)).await), ErrorKind::Unsupported);
    image.remove_snapshot(&label).await.unwrap();
    assert!(image.remarks()[0].contains("one point in time only if nobody writes"), "{:?}", image.remarks());
    for result in [
        image.write(0, noise(1, 1)).await,
        image.write_zeroes(range(0, 1)).await,
        image.resize(1).await,
        image.flush().await,
        image.store_state("").await,
        image.acquire_lease(&LeaseOwner::current().unwrap()).await,
    ] {
        assert_eq!(kind(result), ErrorKind::ReadOnly);
    }
}

#[tokio::test]
async fn a_source_that_changes_while_it_is_read() {
    let folder = folder();
    fs::write(disk(&folder), noise(1, 300_000)).unwrap();
    let writer = fs::File::options().write(true).open(disk(&folder)).unwrap();
    let image = FileImage::open_source(disk(&folder)).unwrap();
    let before = image.change_token().await.unwrap();
    assert_eq!(image.change_token().await.unwrap(), before);
    writer.write_all_at(b"x", 5).unwrap();
    assert_ne!(image.change_token().await.unwrap(), before);
    let label = image.create_snapshot("now").await.unwrap();
    let view = image.view(&Point::Snapshot(label.clone())).await.unwrap();
    writer.set_len(200_000).unwrap();
    let text = message(view.read(range(100_000, 200_000)).await);
    assert!(text.contains("shortened while it was read: it ends at 200000 now"), "{text}");
    assert_eq!(kind(image.view(&Point::Snapshot(label)).await), ErrorKind::NotFound);
}

#[tokio::test]
async fn opening_says_what_is_wrong() {
    let folder = folder();
    let at = |name: &str| folder.path().join(name);
    fs::write(at("empty"), b"").unwrap();
    symlink(at("nothing"), at("dangling")).unwrap();
    symlink(at("real"), at("link")).unwrap();
    fs::write(at("real"), b"0123").unwrap();
    rustix::fs::mknodat(rustix::fs::CWD, at("pipe"), rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    for (path, kind, text) in [
        (at("missing"), ErrorKind::NotFound, "Check the path"),
        (at("dangling"), ErrorKind::NotFound, "symbolic link to something that is missing"),
        (folder.path().to_owned(), ErrorKind::Unsupported, "it is a folder"),
        (at("pipe"), ErrorKind::Unsupported, "neither a regular file nor a block device"),
        ("/dev/null".into(), ErrorKind::Unsupported, "neither a regular file nor a block device"),
    ] {
        for result in [FileImage::open_source(&path), FileImage::open_target(&path)] {
            let error = result.unwrap_err();
            assert_eq!(error.kind, kind, "{error}");
            let whole = format!("{error} {}", error.hint.clone().unwrap_or_default());
            assert!(whole.contains(text) && whole.contains(&path.display().to_string()), "{whole}");
        }
    }
    assert!(message(FileImage::open_source(at("empty"))).contains("it is empty"));
    FileImage::open_target(at("empty")).unwrap();
    let (link, real) = (FileImage::open_source(at("link")).unwrap(), FileImage::open_target(at("real")).unwrap());
    assert!(FileImage::same_file(&link, &real));
    assert!(!FileImage::same_file(&real, &FileImage::open_target(at("empty")).unwrap()));
    assert_eq!(link.identity(), real.identity());
    assert_eq!(link.location(), format!("file:{}", at("link").display()));
}

#[tokio::test]
async fn creating_never_takes_what_is_there() {
    let folder = folder();
    let path = disk(&folder);
    assert!(message(FileImage::create_target(folder.path().join("no/disk"), 1)).contains("mkdir -p"));
    assert_ne!(kind(FileImage::create_target(&path, u64::MAX)), ErrorKind::AlreadyExists);
    assert!(!path.exists());
    symlink(folder.path().join("elsewhere"), &path).unwrap();
    assert_eq!(kind(FileImage::create_target(&path, 1)), ErrorKind::AlreadyExists);
    fs::remove_file(&path).unwrap();
    let image = created(&path, 1 << 40).await;
    assert!(image.is_blank().await.unwrap());
    assert_eq!(kind(FileImage::create_target(&path, 1)), ErrorKind::AlreadyExists);
    image.store_state("old").await.unwrap();
    image.create_snapshot("old").await.unwrap();
    fs::remove_file(&path).unwrap();
    assert!(matches!(kind(FileImage::create_target(&path, 1)), ErrorKind::Busy { .. }));
    drop(image);
    // What the removed image has left says nothing about the new one.
    let image = FileImage::create_target(&path, BLOCK).unwrap();
    assert_eq!(image.load_state().await.unwrap(), None);
    assert!(image.snapshots().await.unwrap().is_empty());
}

/// What is on a disk, and what is kept beside its copy, is for its owner only.
#[tokio::test]
async fn what_is_made_is_for_its_owner() {
    use std::os::unix::fs::PermissionsExt as _;
    let folder = folder();
    let image = created(&disk(&folder), BLOCK).await;
    image.store_state("state").await.unwrap();
    image.create_snapshot("a").await.unwrap();
    let made: Vec<_> = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap()).collect();
    assert!(made.len() > 2, "{made:?}");
    for entry in made {
        assert_eq!(entry.metadata().unwrap().permissions().mode() & 0o777, 0o600, "{entry:?}");
    }
}

#[tokio::test]
async fn a_snapshot_is_the_statement_that_head_is_it() {
    let folder = folder();
    let image = created(&disk(&folder), 2 * BLOCK).await;
    image.write(0, noise(1, 100)).await.unwrap();
    let first = image.create_snapshot("one").await.unwrap();
    assert_eq!((first.id, first.size), (1, 2 * BLOCK));
    assert_eq!(image.snapshots().await.unwrap(), std::slice::from_ref(&first));
    assert_eq!(kind(image.create_snapshot("one").await), ErrorKind::AlreadyExists);
    assert_eq!(kind(image.create_snapshot("").await), ErrorKind::OutOfBounds);
    assert!(!image.head_differs(&first).await.unwrap());
    let view = image.view(&Point::Snapshot(first.clone())).await.unwrap();
    assert_eq!(view.read(range(0, 100)).await.unwrap(), noise(1, 100));
    image.resize(2 * BLOCK).await.unwrap();
    assert!(!image.head_differs(&first).await.unwrap(), "no change at all");

    // A write without a withdrawal: still listed, no longer true, and the view notices.
    image.write(BLOCK, noise(2, 10)).await.unwrap();
    assert_eq!(image.snapshots().await.unwrap(), std::slice::from_ref(&first));
    assert!(image.head_differs(&first).await.unwrap());
    assert_eq!(kind(view.read(range(0, 100)).await), ErrorKind::NotFound);
    assert_eq!(kind(image.view(&Point::Snapshot(first.clone())).await), ErrorKind::NotFound);

    let second = image.create_snapshot("two").await.unwrap();
    assert_eq!(second.id, 2);
    assert_eq!(kind(image.remove_snapshot(&first).await), ErrorKind::NotFound);
    let other_id = Snapshot { id: 9, ..second.clone() };
    assert_eq!(kind(image.view(&Point::Snapshot(other_id.clone())).await), ErrorKind::NotFound);
    assert!(image.head_differs(&other_id).await.unwrap());
    assert_eq!(kind(image.remove_snapshot(&other_id).await), ErrorKind::NotFound);
    image.remove_snapshot(&second).await.unwrap();
    assert!(image.snapshots().await.unwrap().is_empty());
    // A view is the same open file, lease and all.
    drop((view, image));
    let image = leased(&disk(&folder)).await;
    assert_eq!(image.create_snapshot("two").await.unwrap().id, 3, "ids are not given twice");
}

#[tokio::test]
async fn a_foreign_change_is_noticed() {
    let folder = folder();
    let path = disk(&folder);
    type Change = fn(&Path);
    let changes: [(&str, Change); 5] = [
        ("write", |path| fs::File::options().write(true).open(path).unwrap().write_all_at(b"x", 3).unwrap()),
        ("nothing", |path| fs::File::options().write(true).open(path).unwrap().write_all_at(b"", 3).unwrap()),
        ("grow", |path| fs::File::options().write(true).open(path).unwrap().set_len(BLOCK + 1).unwrap()),
        ("write, and set the time back", |path| {
            let time = fs::metadata(path).unwrap().modified().unwrap();
            let file = fs::File::options().write(true).open(path).unwrap();
            file.write_all_at(b"y", 3).unwrap();
            file.set_modified(time).unwrap();
        }),
        ("replace", |path| {
            fs::copy(path, path.with_extension("copy")).unwrap();
            fs::rename(path.with_extension("copy"), path).unwrap();
        }),
    ];
    for (index, (name, change)) in changes.into_iter().enumerate() {
        let _ = fs::remove_file(&path);
        let image = created(&path, BLOCK).await;
        let before = noise(index as u64, BLOCK as usize);
        image.write(0, before.clone()).await.unwrap();
        let snapshot = image.create_snapshot("s").await.unwrap();
        drop(image);
        change(&path);
        let image = leased(&path).await;
        let differs = name != "nothing";
        assert_eq!(image.head_differs(&snapshot).await.unwrap(), differs, "{name}");
        assert_eq!(image.view(&Point::Snapshot(snapshot)).await.is_err(), differs, "{name}");
        // The digests are not believed either.
        let actual: Bytes = fs::read(&path).unwrap().into();
        assert!(image.differing_blocks(0, &actual).await.unwrap().is_empty(), "{name}");
        if actual.len() == before.len() {
            let found = image.differing_blocks(0, &before).await.unwrap();
            assert_eq!(found.is_empty(), actual == before, "{name}");
        }
    }
}

#[tokio::test]
async fn a_file_that_was_replaced_under_an_open_target_is_not_leased() {
    let folder = folder();
    let path = disk(&folder);
    let image = FileImage::create_target(&path, 10).unwrap();
    fs::rename(&path, folder.path().join("moved")).unwrap();
    fs::write(&path, b"0123456789").unwrap();
    let text = message(image.acquire_lease(&LeaseOwner::current().unwrap()).await);
    assert!(text.contains("replaced or removed"), "{text}");
}

#[tokio::test]
async fn a_damaged_sidecar_stops_everything_that_needs_it() {
    let folder = folder();
    let path = disk(&folder);
    let image = created(&path, BLOCK).await;
    image.store_state("precious").await.unwrap();
    image.create_snapshot("s").await.unwrap();
    drop(image);
    let sidecar = folder.path().join("disk.poolshift");
    let good = fs::read(&sidecar).unwrap();
    for bad in [&good[..good.len() / 2], b"", b"\0\0\0\0", b"{}"] {
        fs::write(&sidecar, bad).unwrap();
        let image = FileImage::open_target(&path).unwrap();
        assert_eq!(kind(image.load_state().await), ErrorKind::Corrupt);
        let text = message(image.acquire_lease(&LeaseOwner::current().unwrap()).await);
        assert!(text.contains("damaged") && text.contains("Move that file away"), "{text}");
        assert_eq!(fs::read(&sidecar).unwrap(), bad, "it is left as evidence");
    }
    fs::write(&sidecar, good).unwrap();
    assert_eq!(leased(&path).await.load_state().await.unwrap().as_deref(), Some("precious"));
}

#[tokio::test]
async fn side_files_are_as_private_as_the_image() {
    let folder = folder();
    let path = disk(&folder);
    FileImage::create_target(&path, BLOCK).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    let image = leased(&path).await;
    image.create_snapshot("s").await.unwrap();
    for suffix in ["", ".digests"] {
        let mode = fs::metadata(folder.path().join(format!("disk.poolshift{suffix}"))).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{suffix:?}");
    }
}
