//! `rbd snap rollback`: after it the object maps alone leave changed objects out.

use std::sync::atomic::{AtomicBool, Ordering};

use poolshift::extent::ByteRange;
use poolshift::image::rbd::{CreateOptions, RbdImage};
use poolshift::image::{ChangedObjects, Point, SourceImage, TargetImage};

use super::delta::{Model, SMALL, small_objects};
use super::{MIB, content, leased, make, name, noise, range, rbd, remove};
use crate::support::{CephEnv, ceph};

async fn roll_back(env: &CephEnv, target: &RbdImage, place: &str, snapshot: &str) {
    // poolshift's lock is exclusive: nobody else can roll the image back under it.
    target.release_lease().await.unwrap();
    assert!(rbd(env, &["snap", "rollback", "--no-progress", &format!("{place}@{snapshot}")]));
    leased(target).await;
}

fn striped() -> CreateOptions {
    CreateOptions { object_size: 64 << 10, stripe_unit: 16 << 10, stripe_count: 2, ..small_objects() }
}

/// What was found first: the object map of `last` is that of `second`, in which the object is clean.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn an_object_that_was_rolled_back_is_part_of_the_delta() {
    rolled_back("rolled", small_objects(), &[range(0, 2 * SMALL)]).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn an_object_of_a_striped_image_that_was_rolled_back_is_part_of_the_delta() {
    rolled_back("rolledstripes", striped(), &[range(0, 128 << 10), range(SMALL, 128 << 10)]).await;
}

async fn rolled_back(tag: &str, options: CreateOptions, expected: &[ByteRange]) {
    let env = ceph();
    let image = name(tag);
    let place = format!("sas/{image}");
    let (_connector, target) = make(&env, "sas", &image, &options).await;
    leased(&target).await;
    target.write(0, noise(100, 1)).await.unwrap();
    target.write(SMALL, noise(100, 2)).await.unwrap();
    target.create_snapshot("first").await.unwrap();
    target.write(SMALL, noise(100, 3)).await.unwrap();
    target.create_snapshot("second").await.unwrap();
    target.write(0, noise(100, 4)).await.unwrap();
    let base = target.create_snapshot("base").await.unwrap();
    assert!(!target.head_differs(&base).await.unwrap());
    roll_back(&env, &target, &place, "second").await;
    assert!(target.head_differs(&base).await.unwrap());
    let last = target.create_snapshot("last").await.unwrap();
    let view = target.view(&Point::Snapshot(last)).await.unwrap();
    let runs = view.changed_objects(Some(&base)).await.unwrap();
    assert_eq!(runs, ChangedObjects::Runs(expected.to_vec()));
    drop((view, target));
    remove(&env, &place).await;
}

/// Retention removes older snapshots at any time.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn a_delta_is_told_while_older_snapshots_go() {
    let env = ceph();
    let image = name("pruned");
    let (_connector, target) = make(&env, "sas", &image, &small_objects()).await;
    leased(&target).await;
    let mut older = Vec::new();
    for step in 0..4 {
        target.write(step * SMALL, noise(100, step)).await.unwrap();
        older.push(target.create_snapshot(&format!("s{step}")).await.unwrap());
    }
    let base = target.create_snapshot("base").await.unwrap();
    target.write(7 * SMALL, noise(100, 7)).await.unwrap();
    let view = target.view(&Point::Head).await.unwrap();
    let changed = async || view.changed_objects(Some(&base)).await.unwrap();
    let written = range(7 * SMALL, SMALL);
    let over = AtomicBool::new(false);
    let prune = async {
        for gone in &older {
            target.remove_snapshot(gone).await.unwrap();
        }
        over.store(true, Ordering::Relaxed);
    };
    let look = async {
        while !over.load(Ordering::Relaxed) {
            // Where a snapshot goes during each of its attempts, it says that it doesn't know.
            if let ChangedObjects::Runs(runs) = changed().await {
                assert!(runs.contains(&written), "{runs:?}");
            }
        }
    };
    tokio::join!(prune, look);
    assert_eq!(changed().await, ChangedObjects::Runs(vec![written]));
    drop((view, target));
    remove(&env, &format!("sas/{image}")).await;
}

/// Random changes, snapshots and rollbacks to random snapshots; every pair of snapshots at both levels.
async fn model(env: &CephEnv, target: &RbdImage, source: &RbdImage, place: &str, bytes: Vec<u8>, seed: u64) {
    let mut model = Model { bytes, points: Vec::new(), random: fastrand::Rng::with_seed(seed) };
    leased(target).await;
    for step in 0..8 {
        for _ in 0..model.random.u32(0..5) {
            model.change(target).await;
        }
        if step > 1 && model.random.u32(0..3) > 0 {
            let to = model.random.usize(0..model.points.len());
            roll_back(env, target, place, &model.points[to].0.name).await;
            // Of a clone that was shrunk, a rollback doesn't bring back what was the parent's.
            model.bytes = content(&*target.view(&Point::Head).await.unwrap()).await;
            for (point, bytes) in &model.points {
                assert!(*bytes == model.bytes || target.head_differs(point).await.unwrap(), "{point}");
            }
            for _ in 0..model.random.u32(0..3) {
                model.change(target).await;
            }
        }
        target.flush().await.unwrap();
        let point = target.create_snapshot(&format!("s{step}")).await.unwrap();
        assert!(!target.head_differs(&point).await.unwrap());
        model.points.push((point, model.bytes.clone()));
    }
    model.check(source).await;
    // The same once more without the oldest one, and then with one missing in the middle: whatever was rolled back to,
    // it was the oldest, which counts as dirty as a whole, or an older one than it is still there.
    for at in [0, model.random.usize(1..6)] {
        let (gone, _) = model.points.remove(at);
        source.remove_snapshot(&gone).await.unwrap();
        model.check(source).await;
    }
}

async fn whole(tag: &str, seed: u64, options: CreateOptions) {
    let env = ceph();
    let image = name(tag);
    let (connector, target) = make(&env, "sas", &image, &options).await;
    let source = RbdImage::open_source(&connector, "sas", None, &image).await.unwrap();
    let place = format!("sas/{image}");
    model(&env, &target, &source, &place, vec![0; 2 * MIB as usize], seed).await;
    drop((source, target));
    remove(&env, &place).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn both_levels_cover_rollbacks() {
    whole("rolledplain", 3, small_objects()).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn both_levels_cover_rollbacks_of_a_striped_image() {
    whole("rolledstriped", 11, striped()).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn both_levels_cover_rollbacks_of_a_clone() {
    let env = ceph();
    let seed = 21;
    let (parent, child) = (name("rolledparent"), name("rolledchild"));
    let (connector, base) = make(&env, "sata", &parent, &small_objects()).await;
    leased(&base).await;
    let bytes = noise(2 * MIB as usize - 300_000, seed);
    base.write(0, bytes.clone()).await.unwrap();
    base.flush().await.unwrap();
    base.create_snapshot("golden").await.unwrap();
    base.release_lease().await.unwrap();
    let (from, to) = (format!("sata/{parent}@golden"), format!("sata/{child}"));
    assert!(rbd(&env, &["clone", "--rbd-default-clone-format", "2", &from, &to]));
    let target = RbdImage::open_target(&connector, "sata", None, &child).await.unwrap();
    let source = RbdImage::open_source(&connector, "sata", None, &child).await.unwrap();
    let mut start = bytes.to_vec();
    start.resize(2 * MIB as usize, 0);
    model(&env, &target, &source, &to, start, seed).await;
    drop((source, target, base));
    remove(&env, &to).await;
    remove(&env, &format!("sata/{parent}")).await;
}
