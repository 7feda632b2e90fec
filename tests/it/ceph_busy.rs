//! Snapshots of images under heavy concurrent writes: what the object map says, and what every object says.

use std::time::{Duration, Instant};

use futures::future::join_all;
use poolshift::delta::{self, Method, Plan};
use poolshift::extent::{Extent, normalize_extents};
use poolshift::image::rbd::{CreateOptions, RbdImage};
use poolshift::image::{Point, Snapshot, SourceImage};

use crate::librbd::{Disk, KIB, MIB, find_fault, name, open_source};
use crate::support::{CephEnv, ceph};

/// 200 snapshots in all, of images side by side, because most of the time is the monitors'.
const IMAGES: u64 = 8;
const SNAPSHOTS: usize = 25;
/// How many snapshots are kept; the delta is taken from each of them.
const KEPT: usize = 3;

/// The delta between two snapshots by the object map first, and by asking every object; they cover the same bytes.
async fn both_ways(source: &RbdImage, since: &Snapshot, to: &Snapshot) -> Vec<Extent> {
    let view = source.view(&Point::Snapshot(to.clone())).await.unwrap();
    let plan = delta::plan(view.as_ref(), Some(since)).await.unwrap();
    assert_eq!(plan.method, Method::TwoLevel);
    let exact = Plan::exact(Some(since), view.size(), "asked for", None);
    let collect = |plan: Plan| {
        let extents = delta::extents(view.clone(), &plan, source.layout(), 0);
        async move { normalize_extents(delta::collect(extents).await.unwrap()) }
    };
    let (two_level, exact) = futures::join!(collect(plan), collect(exact));
    assert_eq!(two_level, exact, "from {since} to {to} of {}", source.location());
    two_level
}

async fn busy(env: &CephEnv, seed: u64) {
    let image = format!("sata/{}", name(&format!("busy-{seed}")));
    let object = 256 * KIB;
    let striped =
        CreateOptions { object_size: object, stripe_unit: 64 * KIB, stripe_count: 4, ..CreateOptions::new(0) };
    let plain = CreateOptions { object_size: object, stripe_unit: object, ..CreateOptions::new(0) };
    let options = CreateOptions { size: 6 * MIB + 1000, ..if seed % 4 == 3 { striped } else { plain } };
    let mut disk = Disk::create(env, &image, seed, &options).await;
    let source = open_source(env, &image).await;
    disk.librbd.call(format!("hammer {image} {seed}")).await;
    let mut kept: Vec<(Snapshot, Vec<u8>)> = Vec::new();
    let mut changed = 0;
    for number in 0..SNAPSHOTS {
        let oldest = (kept.len() == KEPT).then(|| kept.remove(0).0);
        let remove = async {
            if let Some(oldest) = &oldest {
                source.remove_snapshot(oldest).await.unwrap();
            }
        };
        let name = format!("s{number}");
        let (made, ()) = futures::join!(source.create_snapshot(&name), remove);
        let made = made.unwrap();
        let content = disk.librbd.read(&format!("{image}@{name}")).await;
        for (since, old) in &kept {
            let extents = both_ways(&source, since, &made).await;
            if let Some(fault) = find_fault(old, &content, &extents) {
                // What the snapshots hold by now tells whether the extents are wrong or a snapshot has changed.
                let now = disk.librbd.read(&format!("{image}@{}", since.name)).await;
                let then = find_fault(old, &now, &[]);
                let made_now = disk.librbd.read(&format!("{image}@{name}")).await;
                let since_made = find_fault(&content, &made_now, &[]);
                panic!(
                    "from {since} to {made} of {image}: {fault}; {since} since it was made: {then:?}; \
                     {made} since it was made: {since_made:?}"
                );
            }
            changed += usize::from(!extents.is_empty());
        }
        kept.push((made, content));
    }
    let writes = String::from_utf8(disk.librbd.call(format!("rest {image}")).await).unwrap();
    println!("{image}: {writes} writes, {changed} deltas that were not empty");
    assert!(changed >= SNAPSHOTS, "{image} was hardly written: {writes} writes");
    disk.librbd.remove(&[&image]).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn two_hundred_snapshots_under_writes_have_the_same_delta_both_ways() {
    let env = ceph();
    join_all((0..IMAGES).map(|seed| busy(&env, seed))).await;
}

/// A server that writes and writes doesn't keep a cycle from ending, and stays the owner of its image.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn cycles_of_a_busy_image_hold_what_its_snapshots_hold() {
    let env = ceph();
    let (image, target) = (format!("sata/{}", name("live")), format!("sas/{}", name("live")));
    let mut disk = Disk::create(&env, &image, 9, &CreateOptions::new(24 * MIB)).await;
    disk.librbd.call(format!("hammer {image} 9")).await;
    for cycle in 0..6 {
        let report = crate::librbd::sync(&env, (&image, &target), &Default::default()).await.unwrap();
        let sides = [&image, &target].map(|side| format!("{side}@{}", report.snapshot));
        let (ours, theirs) = (disk.librbd.digest(&sides[0]).await, disk.librbd.digest(&sides[1]).await);
        assert_eq!(ours, theirs, "cycle {cycle}");
        // It goes on writing with the lock that it had.
        let count = disk.librbd.hammered(&image).await;
        let begun = Instant::now();
        while disk.librbd.hammered(&image).await == count {
            assert!(begun.elapsed() < Duration::from_secs(60), "the writer is stuck after cycle {cycle}");
        }
    }
    disk.librbd.call(format!("rest {image}")).await;
    disk.librbd.remove(&[&image, &target]).await;
}
