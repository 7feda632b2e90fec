//! The RBD backend on a real cluster.

use std::process::Command;
use std::time::Duration;

use bytes::Bytes;
use futures::future::try_join_all;
use poolshift::extent::ByteRange;
use poolshift::image::rbd::{Connector, CreateOptions, RbdImage, RbdOptions, wait_until_closed};
use poolshift::image::{ChangedObjects, ErrorKind, LeaseOwner, Point, Snapshot, SourceImage, TargetImage, View};

use crate::support::{CephEnv, ceph};

mod delta;
mod faults;
pub(crate) mod lease;
mod object_map;
mod rollback;

const MIB: u64 = 1 << 20;

fn options(env: &CephEnv) -> RbdOptions {
    RbdOptions { conf: Some(env.conf.clone()), user: Some(env.user.clone()), ..RbdOptions::default() }
}

async fn connect(env: &CephEnv) -> Connector {
    Connector::connect(&options(env)).await.unwrap()
}

fn name(tag: &str) -> String {
    format!("backend-{tag}-{}", std::process::id())
}

fn range(offset: u64, length: u64) -> ByteRange {
    ByteRange::new(offset, length).unwrap()
}

pub(crate) fn rbd(env: &CephEnv, words: &[&str]) -> bool {
    let mut command = Command::new("rbd");
    command.env_remove("CEPH_ARGS").arg("-c").arg(&env.conf).args(["--id", &env.user]).args(words);
    let output = command.output().unwrap();
    if !output.status.success() {
        eprintln!("rbd {words:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
    output.status.success()
}

/// Removes an image and its snapshots, once this process has closed it.
async fn remove(env: &CephEnv, image: &str) {
    assert!(wait_until_closed(Duration::from_secs(60)).await);
    rbd(env, &["snap", "purge", image]);
    rbd(env, &["rm", image]);
}

async fn make(env: &CephEnv, pool: &str, image: &str, options: &CreateOptions) -> (Connector, RbdImage) {
    let connector = connect(env).await;
    RbdImage::create(&connector, pool, None, image, options).await.unwrap();
    let opened = RbdImage::open_target(&connector, pool, None, image).await.unwrap();
    (connector, opened)
}

async fn leased(image: &RbdImage) {
    image.acquire_lease(&LeaseOwner::current().unwrap()).await.unwrap();
}

fn noise(length: usize, seed: u64) -> Bytes {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut bytes = vec![0; length];
    random.fill(&mut bytes);
    bytes.into()
}

async fn content(view: &dyn View) -> Vec<u8> {
    let all = ByteRange::between(0, view.size());
    let pieces = all.into_iter().flat_map(|all| all.split_at_multiples(MIB)).map(|piece| view.read(piece));
    try_join_all(pieces).await.unwrap().concat()
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn bytes_survive_a_round_trip_with_many_requests_in_flight() {
    let env = ceph();
    let image = name("round");
    let (_connector, target) = make(&env, "sas", &image, &CreateOptions::new(32 * MIB + 1000)).await;
    assert!(target.is_blank().await.unwrap());
    leased(&target).await;
    let mut expected = vec![0u8; (32 * MIB + 1000) as usize];
    let pieces: Vec<_> = (0..256u64).map(|i| (i * 128 * 1024 + 77, noise(100_000, i))).collect();
    for (offset, data) in &pieces {
        expected[*offset as usize..][..data.len()].copy_from_slice(data);
    }
    let writes = pieces.into_iter().map(|(offset, data)| target.write(offset, data));
    try_join_all(writes).await.unwrap();
    target.write(32 * MIB + 999, Bytes::from_static(b"x")).await.unwrap();
    expected[32 * MIB as usize + 999] = b'x';
    target.write_zeroes(range(5, 9 * MIB)).await.unwrap();
    expected[5..5 + 9 * MIB as usize].fill(0);
    target.write(0, Bytes::new()).await.unwrap();
    target.flush().await.unwrap();
    let view = target.view(&Point::Head).await.unwrap();
    assert!(content(&*view).await == expected);
    assert!(!target.is_blank().await.unwrap());

    let data = Bytes::copy_from_slice(&expected[MIB as usize * 8..MIB as usize * 12]);
    assert_eq!(target.differing_blocks(8 * MIB, &data).await.unwrap(), []);
    let mut other = data.to_vec();
    other[65_536] ^= 1;
    other[70_000] ^= 1;
    other[4 * MIB as usize - 1] ^= 1;
    let differing = target.differing_blocks(8 * MIB, &other.into()).await.unwrap();
    assert_eq!(differing, [range(8 * MIB + 65_536, 65_536), range(12 * MIB - 65_536, 65_536)]);
    let tail = Bytes::copy_from_slice(&expected[32 * MIB as usize..]);
    assert_eq!(target.differing_blocks(32 * MIB, &tail).await.unwrap(), []);
    target.release_lease().await.unwrap();
    target.release_lease().await.unwrap();
    drop((view, target));
    remove(&env, &format!("sas/{image}")).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn requests_beyond_the_end_never_reach_the_storage() {
    let env = ceph();
    let image = name("bounds");
    let (_connector, target) = make(&env, "sas", &image, &CreateOptions::new(8 * MIB)).await;
    let refused = target.write(0, noise(10, 1)).await.unwrap_err();
    assert!(refused.kind == ErrorKind::ReadOnly && refused.to_string().contains("lease"), "{refused}");
    leased(&target).await;
    for (offset, length) in [(8 * MIB - 5, 10), (8 * MIB, 1), (u64::MAX, 1), (u64::MAX - 1, 1)] {
        let refused = target.write(offset, noise(length, 1)).await.unwrap_err();
        assert_eq!(refused.kind, ErrorKind::OutOfBounds, "{refused}");
    }
    let view = target.view(&Point::Head).await.unwrap();
    for beyond in [range(8 * MIB - 1, 2), range(u64::MAX - 1, 1), range(0, 33 * MIB)] {
        assert_eq!(view.read(beyond).await.unwrap_err().kind, ErrorKind::OutOfBounds);
    }
    assert_eq!(target.write_zeroes(range(1, 8 * MIB)).await.unwrap_err().kind, ErrorKind::OutOfBounds);
    assert_eq!(target.write(0, vec![0; 33 << 20].into()).await.unwrap_err().kind, ErrorKind::OutOfBounds);
    // Somebody else shrinks it under our hands: the flush says so, before anything is committed.
    assert!(rbd(&env, &["resize", &format!("sas/{image}"), "--size", "4M", "--allow-shrink"]));
    target.write(6 * MIB, noise(100, 1)).await.ok();
    let moved = target.flush().await.unwrap_err();
    assert!(moved.kind == ErrorKind::OutOfBounds && moved.to_string().contains("resized"), "{moved}");
    target.resize(6 * MIB).await.unwrap();
    target.flush().await.unwrap();
    target.resize(0).await.unwrap();
    assert_eq!(target.size().await.unwrap(), 0);
    let empty = target.view(&Point::Head).await.unwrap();
    assert_eq!(empty.diff(None, range(0, 100)).await.unwrap(), []);
    assert_eq!(empty.changed_objects(None).await.unwrap(), ChangedObjects::Runs(Vec::new()));
    drop((view, empty, target));
    remove(&env, &format!("sas/{image}")).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn snapshots_are_known_by_name_and_id() {
    let env = ceph();
    let image = name("snaps");
    let (connector, target) = make(&env, "sata", &image, &CreateOptions::new(8 * MIB)).await;
    let source = RbdImage::open_source(&connector, "sata", None, &image).await.unwrap();
    assert_eq!(source.identity(), target.identity());
    assert_eq!(source.identity().cluster, connector.fsid());
    leased(&target).await;
    target.write(0, noise(4096, 1)).await.unwrap();
    // The source's own handle has another hold the lock, and has it make the snapshot.
    let first = source.create_snapshot("a").await.unwrap();
    assert_eq!((first.name.as_str(), first.size), ("a", 8 * MIB));
    assert_eq!(source.create_snapshot("a").await.unwrap_err().kind, ErrorKind::AlreadyExists);
    assert!(!target.head_differs(&first).await.unwrap());
    target.resize(9 * MIB).await.unwrap();
    assert!(target.head_differs(&first).await.unwrap());
    let second = target.create_snapshot("b").await.unwrap();
    assert_eq!(source.snapshots().await.unwrap(), [first.clone(), second.clone()]);
    target.write(4096, noise(10, 1)).await.unwrap();
    assert!(target.head_differs(&second).await.unwrap());
    let wrong = Snapshot { id: first.id, ..second.clone() };
    assert_eq!(source.remove_snapshot(&wrong).await.unwrap_err().kind, ErrorKind::NotFound);
    source.remove_snapshot(&first).await.unwrap();
    let again = source.create_snapshot("a").await.unwrap();
    assert!(again.id > second.id);
    let gone = source.view(&Point::Snapshot(first.clone())).await.err().unwrap();
    assert!(gone.kind == ErrorKind::NotFound && gone.to_string().contains("another id"), "{gone}");
    let view = source.view(&Point::Snapshot(again.clone())).await.unwrap();
    for lost in [view.changed_objects(Some(&first)).await.err(), view.diff(Some(&first), range(0, 9)).await.err()] {
        assert_eq!(lost.unwrap().kind, ErrorKind::NotFound);
    }
    assert_eq!(view.changed_objects(Some(&again)).await.unwrap(), ChangedObjects::Runs(Vec::new()));
    let older = source.view(&Point::Snapshot(second.clone())).await.unwrap();
    assert_eq!(older.diff(Some(&again), range(0, 9)).await.unwrap_err().kind, ErrorKind::Unsupported);
    // A source leaves the image alone between its snapshots.
    target.release_lease().await.unwrap();
    assert!(wait_until_closed(Duration::from_secs(60)).await);
    assert_eq!(source.watchers().await.unwrap(), []);
    // Two at once share a handle and are told apart.
    let (one, two) = tokio::join!(source.create_snapshot("c"), source.create_snapshot("d"));
    assert_ne!(one.unwrap().id, two.unwrap().id);
    drop((view, older, source, target));
    remove(&env, &format!("sata/{image}")).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn names_that_lead_nowhere_say_where_they_end() {
    let env = ceph();
    let connector = connect(&env).await;
    let open = |pool: &'static str, namespace: Option<&'static str>, image: &'static str| {
        let connector = connector.clone();
        async move { RbdImage::open_source(&connector, pool, namespace, image).await.err().unwrap() }
    };
    let missing = open("sata", None, "nothing").await;
    assert_eq!(missing.kind, ErrorKind::NotFound);
    assert_eq!(missing.to_string(), "rbd:sata/nothing: cannot open the image: sata has no image \"nothing\"");
    let missing = open("nowhere", None, "x").await;
    assert!(missing.kind == ErrorKind::NotFound && missing.to_string().contains("no pool \"nowhere\""), "{missing}");
    let missing = open("sata", Some("nobody"), "x").await;
    assert!(missing.kind == ErrorKind::NotFound && missing.to_string().contains("namespace"), "{missing}");
    assert!(!RbdImage::exists(&connector, "sata", None, "nothing").await.unwrap());
    assert!(RbdImage::exists(&connector, "nowhere", None, "nothing").await.is_err());
    let nul = open("sata", None, "a\0b").await;
    assert_eq!(nul.kind, ErrorKind::Unsupported);

    let unknown = RbdOptions { user: Some("nobody".into()), ..options(&env) };
    let denied = Connector::connect(&unknown).await.unwrap_err();
    assert!(denied.kind == ErrorKind::PermissionDenied && denied.hint.unwrap().contains("client.nobody"));
    let nowhere = RbdOptions { conf: Some("/nonexistent/ceph.conf".into()), ..options(&env) };
    assert_eq!(Connector::connect(&nowhere).await.unwrap_err().kind, ErrorKind::NotFound);
    let odd = CreateOptions { object_size: 3000, ..CreateOptions::new(MIB) };
    let refused = RbdImage::create(&connector, "sas", None, &name("odd"), &odd).await.unwrap_err();
    assert_eq!(refused.kind, ErrorKind::Unsupported);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn a_namespace_is_part_of_an_images_identity() {
    let env = ceph();
    let (space, image) = (name("space"), name("inside"));
    assert!(rbd(&env, &["namespace", "create", &format!("sas/{space}")]));
    let connector = connect(&env).await;
    let options = CreateOptions::new(MIB);
    RbdImage::create(&connector, "sas", Some(&space), &image, &options).await.unwrap();
    let again = RbdImage::create(&connector, "sas", Some(&space), &image, &options).await.unwrap_err();
    assert_eq!(again.kind, ErrorKind::AlreadyExists);
    assert!(!RbdImage::exists(&connector, "sas", None, &image).await.unwrap());
    let target = RbdImage::open_target(&connector, "sas", Some(&space), &image).await.unwrap();
    assert!(target.identity().pool.ends_with(&format!("/{space}")));
    assert_eq!(target.location(), format!("rbd:sas/{space}/{image}"));
    leased(&target).await;
    target.write(7, noise(100, 3)).await.unwrap();
    let point = target.create_snapshot("a").await.unwrap();
    let view = target.view(&Point::Snapshot(point)).await.unwrap();
    assert_eq!(view.read(range(7, 100)).await.unwrap(), noise(100, 3));
    drop((view, target));
    remove(&env, &format!("sas/{space}/{image}")).await;
    rbd(&env, &["namespace", "rm", &format!("sas/{space}")]);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn the_state_is_kept_with_the_image() {
    let env = ceph();
    let image = name("state");
    let (connector, target) = make(&env, "sas", &image, &CreateOptions::new(MIB)).await;
    assert_eq!(target.load_state().await.unwrap(), None);
    assert_eq!(target.store_state("x").await.unwrap_err().kind, ErrorKind::ReadOnly);
    leased(&target).await;
    let large: String = "{\"state\": 1}\n".repeat(5041);
    for state in ["", "{}", &large] {
        target.store_state(state).await.unwrap();
        let other = RbdImage::open_target(&connector, "sas", None, &image).await.unwrap();
        assert_eq!(other.load_state().await.unwrap().as_deref(), Some(state));
    }
    let too_large = "x".repeat(64 * 1024 + 1);
    assert_eq!(target.store_state(&too_large).await.unwrap_err().kind, ErrorKind::OutOfBounds);
    drop(target);
    remove(&env, &format!("sas/{image}")).await;
}
