//! Random writes, discards, resizes and snapshots on real RBD images of every kind, held against a dense copy of every
//! snapshot's bytes that never asks poolshift's planner.

use futures::future::join_all;
use poolshift::delta::{self, Method, Plan};
use poolshift::image::rbd::{CreateOptions, RbdImage};
use poolshift::image::{Point, Snapshot, SourceImage};
use poolshift::pipeline::Limits;
use poolshift::replicate::{self, Progress, SyncOptions};

use crate::librbd::{Disk, KIB, Librbd, MIB, find_fault, name, open_source, sync};
use crate::support::{CephEnv, ceph};

const CYCLES: u64 = 5;

/// What kind of image is tried, and how it is tortured.
#[derive(Clone, Debug)]
struct Kind {
    tag: &'static str,
    options: CreateOptions,
    /// Nothing is changed below; the size stays within the object that begins here.
    low: u64,
    /// A clone of an image with content.
    cloned: bool,
    /// The parent's content is copied into the clone before this cycle.
    flatten_before: Option<u64>,
}

impl Kind {
    fn plain(tag: &'static str) -> Self {
        let options = CreateOptions { object_size: 512 * KIB, stripe_unit: 512 * KIB, ..CreateOptions::new(12 * MIB) };
        Self { tag, options, low: 0, cloned: false, flatten_before: None }
    }
}

/// One run: an image, its writer, its replica, and the bytes of every snapshot.
struct Model {
    kind: Kind,
    label: String,
    disk: Disk,
    target: String,
    parent: Option<String>,
    points: Vec<(Snapshot, Vec<u8>)>,
}

impl Model {
    async fn new(env: &CephEnv, kind: Kind, seed: u64) -> Self {
        let tag = format!("{}-{seed}", kind.tag);
        let (source, target) = (format!("sata/{}", name(&tag)), format!("sas/{}", name(&tag)));
        let label = format!("{} image, seed {seed}", kind.tag);
        let (disk, parent) = if kind.cloned {
            let parent = format!("sata/{}", name(&format!("{tag}-parent")));
            let mut disk = Disk::create(env, &parent, seed, &kind.options).await;
            for offset in [0, 3 * MIB + 1, 7 * MIB + 300 * KIB] {
                disk.write_noise(offset, 2 * MIB).await;
            }
            disk.snapshot("golden").await;
            disk.librbd.call(format!("clone {parent}@golden {source}")).await;
            disk.librbd.call(format!("close {parent}")).await;
            (Disk { image: source, ..disk }, Some(parent))
        } else {
            (Disk::create(env, &source, seed, &kind.options).await, None)
        };
        Self { kind, label, disk, target, parent, points: Vec::new() }
    }

    async fn changes(&mut self) {
        for _ in 0..self.disk.random.u32(1..7) {
            self.disk.change(self.kind.low).await;
        }
    }

    /// Another size, or two, one after the other: what was cut off must not come back.
    async fn resize(&mut self) {
        let most = if self.kind.low > 0 { self.kind.options.size } else { self.kind.options.size * 4 / 3 };
        let least = self.kind.low.max(MIB) + 1;
        let mut other = || self.disk.random.u64(least..=most);
        let (first, second) = (other(), other());
        self.disk.resize(first).await;
        if self.disk.random.bool() {
            self.changes().await;
            self.disk.resize(second).await;
        }
    }

    async fn note(&mut self, image: &RbdImage, snapshot: &str) {
        let all = image.snapshots().await.unwrap();
        let snapshot = all.into_iter().find(|have| have.name == *snapshot).unwrap();
        assert_eq!(snapshot.size, self.disk.size(), "{}", self.label);
        self.points.push((snapshot, self.disk.bytes.clone()));
    }

    /// Cuts the image to a third and grows it again: what was cut off is zeroes, whether a snapshot saw it gone or not.
    async fn cut(&mut self, image: &RbdImage, number: u64) {
        let size = self.disk.size();
        let least = (size / 3).max(self.kind.low + 1);
        if number > 1 {
            self.disk.resize(least).await;
            if number == 3 {
                self.disk.snapshot("small").await;
                self.note(image, "small").await;
            }
            self.disk.resize(size).await;
        }
        // Something for the next cut.
        let half = (size - least) / 2;
        self.disk.write_noise(least + half, half.min(100 * KIB)).await;
    }

    /// Changes the image, replicates it, and compares the replica, read plainly and whole.
    async fn cycle(&mut self, env: &CephEnv, number: u64) {
        let image = open_source(env, &self.disk.image).await;
        if self.kind.flatten_before == Some(number) {
            self.disk.librbd.call(format!("flatten {}", self.disk.image)).await;
        }
        self.changes().await;
        if (1..=3).contains(&number) {
            self.cut(&image, number).await;
        } else if number > 0 && self.disk.random.bool() {
            self.resize().await;
        }
        if self.disk.random.bool() {
            let name = format!("between-{number}");
            self.disk.snapshot(&name).await;
            self.note(&image, &name).await;
            self.changes().await;
        }
        let options = SyncOptions { keep: 100, ..SyncOptions::default() };
        let report = sync(env, (&self.disk.image, &self.target), &options).await;
        let report = report.unwrap_or_else(|error| panic!("{}, cycle {number}: {error}", self.label));
        let has_map = self.kind.options.features == CreateOptions::FEATURES;
        assert_eq!(report.method == Some(Method::TwoLevel), has_map, "{}: {:?}", self.label, report.method);
        assert_eq!(report.base.is_some(), number > 0, "{}", self.label);
        for side in [&self.disk.image, &self.target] {
            let there = self.disk.librbd.read(&format!("{side}@{}", report.snapshot)).await;
            let same = there.len() == self.disk.bytes.len() && there == self.disk.bytes;
            let first = there.iter().zip(&self.disk.bytes).position(|(a, b)| a != b);
            assert!(same, "{}, cycle {number}: {side} differs at {first:?}, {} bytes", self.label, there.len());
        }
        self.note(&image, &report.snapshot).await;
    }

    /// The delta of every pair of snapshots, and of each from nothing, by both ways.
    async fn check_pairs(&self, env: &CephEnv) {
        let source = open_source(env, &self.disk.image).await;
        for (index, (to, new)) in self.points.iter().enumerate() {
            let view = source.view(&Point::Snapshot(to.clone())).await.unwrap();
            let bases = std::iter::once(None).chain(self.points[..index].iter().map(Some));
            for base in bases {
                let (since, old) = base.map_or((None, &[][..]), |(since, old)| (Some(since), &old[..]));
                let planned = delta::plan(view.as_ref(), since).await.unwrap();
                let exact = Plan::exact(since, view.size(), "asked for", None);
                for plan in [planned, exact] {
                    let extents = delta::extents(view.clone(), &plan, source.layout(), 0);
                    let extents = delta::collect(extents).await.unwrap();
                    if let Some(fault) = find_fault(old, new, &extents) {
                        panic!("{}: {} from {since:?} to {to}: {fault}", self.label, plan.method);
                    }
                }
            }
        }
    }

    /// The newest commit, by `verify`, which must also see a byte that is wrong.
    async fn verify(&mut self, env: &CephEnv) {
        let (source, target) = (open_source(env, &self.disk.image).await, open_source(env, &self.target).await);
        let (newest, _) = self.points.last().unwrap().clone();
        let (ours, _) = replicate::open_point(source.as_ref(), Some(&newest.name)).await.unwrap();
        let (theirs, _) = replicate::open_point(target.as_ref(), Some(&newest.name)).await.unwrap();
        let compare = |theirs| {
            let sides = ((ours.clone(), source.layout()), theirs);
            async move { replicate::verify(sides.0, sides.1, Limits::default(), &Progress::default()).await.unwrap() }
        };
        assert!(compare(theirs).await.equal, "{}", self.label);
        let at = self.disk.size() - 1;
        self.disk.image.clone_from(&self.target);
        let other = [self.disk.bytes[at as usize] ^ 1];
        self.disk.write(at, &other).await;
        self.disk.librbd.call(format!("flush {}", self.target)).await;
        let head = target.view(&Point::Head).await.unwrap();
        let report = compare(head).await;
        assert!(!report.equal, "{}", self.label);
        assert_eq!(report.ranges.len(), 1, "{}: {:?}", self.label, report.ranges);
        assert!((report.ranges[0].offset()..report.ranges[0].end()).contains(&at));
    }

    async fn run(env: &CephEnv, kind: Kind, seed: u64) {
        let mut model = Self::new(env, kind, seed).await;
        let source = model.disk.image.clone();
        for number in 0..CYCLES {
            model.cycle(env, number).await;
        }
        model.check_pairs(env).await;
        model.verify(env).await;
        model.disk.librbd.call(format!("close {source}")).await;
        model.disk.librbd.remove(&[&source, &model.target]).await;
        if let Some(parent) = &model.parent {
            model.disk.librbd.remove(&[parent]).await;
        }
    }
}

/// Several seeds at once, because a cycle mostly waits for the monitors to make its snapshots.
async fn models(kinds: impl IntoIterator<Item = Kind>) {
    let env = ceph();
    let runs: Vec<_> = (1..).zip(kinds).map(|(seed, kind)| Model::run(&env, kind, seed)).collect();
    join_all(runs).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn a_plain_image() {
    models(vec![Kind::plain("plain"); 3]).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn a_striped_image() {
    let options = CreateOptions { stripe_unit: 64 * KIB, stripe_count: 8, ..Kind::plain("").options };
    models(vec![Kind { options, ..Kind::plain("striped") }; 3]).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn a_clone_of_an_image_with_content() {
    let clone = Kind { cloned: true, ..Kind::plain("clone") };
    let flattened = Kind { flatten_before: Some(3), ..clone.clone() };
    models([clone.clone(), flattened, clone]).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn an_image_without_an_object_map() {
    // Layering and exclusive-lock.
    let options = CreateOptions { features: 1 | 4, ..Kind::plain("").options };
    models(vec![Kind { options, ..Kind::plain("nomap") }; 2]).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn an_image_that_is_written_in_its_last_partial_object_only() {
    let options = CreateOptions::new(8 * MIB + 300 * KIB + 77);
    let partial = Kind { options, low: 8 * MIB, ..Kind::plain("partial") };
    models(vec![partial; 3]).await;
}

/// The reader that the tests believe does see what a snapshot is, and what HEAD is.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn the_plain_reader_tells_points_in_time_apart() {
    let env = ceph();
    let image = format!("sas/{}", name("reader"));
    let mut disk = Disk::create(&env, &image, 1, &CreateOptions::new(MIB)).await;
    disk.write_noise(5, 100).await;
    let old = disk.bytes.clone();
    disk.snapshot("a").await;
    disk.write_noise(50, 100).await;
    let mut reader = Librbd::start(&env);
    disk.librbd.call(format!("flush {image}")).await;
    assert!(reader.read(&format!("{image}@a")).await == old);
    assert!(reader.read(&image).await == disk.bytes && disk.bytes != old);
    assert!(reader.try_call(&format!("read {image}@b"), b"").await.is_err());
    disk.librbd.remove(&[&image]).await;
}
