use std::io::{BufRead, BufReader, Read};
use std::process::{Command, Stdio};

use super::*;

const HOLDER: &str = "POOLSHIFT_TEST_HOLD_LEASE";

#[tokio::test]
async fn without_the_lease_nothing_is_written() {
    let folder = folder();
    let image = FileImage::create_target(disk(&folder), BLOCK).unwrap();
    let snapshot = Snapshot { id: 1, name: "s".into(), size: BLOCK };
    for result in [
        image.write(0, noise(1, 10)).await,
        image.write_zeroes(range(0, 10)).await,
        image.resize(10).await,
        image.store_state("x").await,
        image.remove_snapshot(&snapshot).await,
        image.create_snapshot("s").await.map(|_| ()),
    ] {
        assert_eq!(kind(result), ErrorKind::Fenced);
    }
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2, "the image and its lock file");
    // Comparing needs none: it reads.
    assert_eq!(image.differing_blocks(0, &noise(1, BLOCK as usize)).await.unwrap(), [range(0, BLOCK)]);
}

#[tokio::test]
async fn one_handle_at_a_time() {
    let folder = folder();
    let me = LeaseOwner::current().unwrap();
    let (first, second) =
        (FileImage::create_target(disk(&folder), BLOCK).unwrap(), FileImage::open_target(disk(&folder)).unwrap());
    assert_eq!(first.lease_owner().await.unwrap(), None);
    first.acquire_lease(&me).await.unwrap();
    first.acquire_lease(&me).await.unwrap();
    assert_eq!(first.lease_owner().await.unwrap(), Some(me.clone()));
    assert_eq!(second.lease_owner().await.unwrap(), Some(me.clone()));
    assert_eq!(kind(second.acquire_lease(&me).await), ErrorKind::Busy { holder: me.to_string() });
    first.write(0, noise(1, 10)).await.unwrap();
    first.release_lease().await.unwrap();
    first.release_lease().await.unwrap();
    assert_eq!(second.lease_owner().await.unwrap(), None);
    second.acquire_lease(&me).await.unwrap();
    assert_eq!(kind(first.write(0, noise(1, 10)).await), ErrorKind::Fenced);
}

/// What one holder has kept in memory is not true any more when another had the lease in between.
#[tokio::test]
async fn a_lease_begins_with_a_fresh_look() {
    let folder = folder();
    let me = LeaseOwner::current().unwrap();
    let first = created(&disk(&folder), 2 * BLOCK).await;
    first.write(0, noise(1, 2 * BLOCK as usize)).await.unwrap();
    first.create_snapshot("one").await.unwrap();
    first.release_lease().await.unwrap();
    let second = leased(&disk(&folder)).await;
    second.write(0, noise(2, BLOCK as usize)).await.unwrap();
    second.store_state("second").await.unwrap();
    let two = second.create_snapshot("two").await.unwrap();
    assert_eq!(two.id, 2);
    assert_eq!(first.snapshots().await.unwrap(), std::slice::from_ref(&two));
    second.release_lease().await.unwrap();
    first.acquire_lease(&me).await.unwrap();
    assert_eq!(first.load_state().await.unwrap().as_deref(), Some("second"));
    assert!(!first.head_differs(&two).await.unwrap());
    let differing = first.differing_blocks(0, &noise(1, 2 * BLOCK as usize)).await.unwrap();
    assert_eq!(differing, [range(0, BLOCK)], "the second block is what the first holder wrote");
}

/// Holds a lease, for the test below.
#[tokio::test]
#[ignore = "no test by itself: others run it in a process of its own"]
async fn hold_a_lease_for_another_process() {
    let path = std::env::var_os(HOLDER).expect("the test below names it");
    let _image = leased(Path::new(&path)).await;
    println!("\nheld");
    let _ = std::io::stdin().read(&mut [0]);
}

#[tokio::test]
async fn a_killed_holder_is_followed_at_once() {
    let folder = folder();
    FileImage::create_target(disk(&folder), BLOCK).unwrap();
    let mut holder = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "image::file::tests::leases::hold_a_lease_for_another_process", "--ignored", "--nocapture"])
        .env(HOLDER, disk(&folder))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(holder.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap() == "held"));
    let image = FileImage::open_target(disk(&folder)).unwrap();
    assert_eq!(image.lease_owner().await.unwrap().unwrap().pid, holder.id());
    let refused = image.acquire_lease(&LeaseOwner::current().unwrap()).await.unwrap_err();
    assert!(matches!(&refused.kind, ErrorKind::Busy { holder: who } if who.contains(&holder.id().to_string())));
    holder.kill().unwrap();
    holder.wait().unwrap();
    assert_eq!(image.lease_owner().await.unwrap(), None);
    image.acquire_lease(&LeaseOwner::current().unwrap()).await.unwrap();
}

/// A write whose future was dropped goes on; the lease is not given back before it has ended.
#[tokio::test]
async fn dropped_writes_end_before_the_lease_does() {
    let folder = folder();
    let image = created(&disk(&folder), 32 << 20).await;
    for round in 0..10 {
        image.acquire_lease(&LeaseOwner::current().unwrap()).await.unwrap();
        let write = image.write(0, noise(round, 16 << 20));
        // One poll issues the request; then the future is dropped, ended or not.
        let _issued = futures::FutureExt::now_or_never(write);
        image.release_lease().await.unwrap();
        let after = fs::read(disk(&folder)).unwrap();
        assert_eq!(after[..16 << 20], noise(round, 16 << 20), "the write was issued, so it landed before the release");
    }
}
