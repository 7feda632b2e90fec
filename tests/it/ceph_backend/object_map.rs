//! The object maps as poolshift reads them, held against librbd's own answer for every pair of points.

use std::collections::HashMap;
use std::fmt::Debug;
use std::sync::{Mutex, Once};
use std::time::{Duration, Instant};

use poolshift::extent::{ByteRange, normalize, subtract};
use poolshift::image::rbd::{CreateOptions, RbdImage};
use poolshift::image::{ChangedObjects, Point, Snapshot, SourceImage};
use tracing::field::{Field, Visit};
use tracing_subscriber::Layer;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::{Context, SubscriberExt};
use tracing_subscriber::registry::Registry;

use super::{connect, name, noise, rbd};
use crate::librbd::{Disk, KIB, Librbd, MIB, open_source};
use crate::support::{CephEnv, ceph, ceph_alone};

/// The images of which librbd was asked because a map could not be read, as `POOL/[NAMESPACE/]IMAGE`.
static ASKED: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// Keeps [`ASKED`].
struct Listener;

impl<S: tracing::Subscriber> Layer<S> for Listener {
    fn on_event(&self, event: &tracing::Event<'_>, _: Context<'_, S>) {
        struct Image;
        impl Visit for Image {
            fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
                if field.name() == "image" {
                    ASKED.lock().unwrap().push(format!("{value:?}"));
                }
            }
        }
        event.record(&mut Image);
    }
}

fn listen() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let target = Targets::new().with_target("poolshift::image::rbd::object_map", tracing::Level::DEBUG);
        tracing::subscriber::set_global_default(Registry::default().with(Listener.with_filter(target))).unwrap();
    });
}

fn times_asked(image: &str) -> usize {
    ASKED.lock().unwrap().iter().filter(|asked| *asked == image).count()
}

async fn compare(source: &RbdImage, to: &Point, since: Option<&Snapshot>) -> ChangedObjects {
    source.view(to).await.unwrap().changed_objects(since).await.unwrap()
}

/// An image with a writer of its own.
struct Trial {
    disk: Disk,
    points: Vec<Snapshot>,
    source: std::sync::Arc<RbdImage>,
}

impl Trial {
    async fn new(env: &CephEnv, image: &str, seed: u64, options: &CreateOptions) -> Self {
        listen();
        let connector = connect(env).await;
        let words: Vec<&str> = image.split('/').collect();
        let (namespace, last) = if words.len() == 3 { (Some(words[1]), words[2]) } else { (None, words[1]) };
        RbdImage::create(&connector, words[0], namespace, last, options).await.unwrap();
        Self::over(env, image, seed, vec![0; options.size as usize]).await
    }

    /// Of an image that is there.
    async fn over(env: &CephEnv, image: &str, seed: u64, bytes: Vec<u8>) -> Self {
        listen();
        let random = fastrand::Rng::with_seed(seed);
        let disk = Disk { librbd: Librbd::start(env), image: image.to_owned(), bytes, random };
        Self { disk, points: Vec::new(), source: open_source(env, image).await }
    }

    async fn ours(&self, to: &Point, since: Option<&Snapshot>) -> Vec<ByteRange> {
        match compare(&self.source, to, since).await {
            ChangedObjects::Runs(runs) => runs,
            ChangedObjects::Unavailable { reason, .. } => panic!("{reason}"),
        }
    }

    /// What librbd finds, in whole periods.
    async fn theirs(&mut self, to: &Point, since: Option<&Snapshot>) -> Vec<ByteRange> {
        let at = match to {
            Point::Head => String::new(),
            Point::Snapshot(snapshot) => format!("@{}", snapshot.name),
        };
        let since = since.map_or("", |since| since.name.as_str());
        let answer = self.disk.librbd.call(format!("objects {}{at} {since}", self.disk.image)).await;
        let lines = String::from_utf8(answer).unwrap();
        let period = self.source.layout().period();
        let ranges = lines.lines().map(|line| {
            let (offset, length) = line.split_once(' ').unwrap();
            let found = ByteRange::new(offset.parse().unwrap(), length.parse().unwrap()).unwrap();
            found.align_outward(period, u64::MAX)
        });
        normalize(ranges.collect())
    }

    /// Random changes and snapshots; a snapshot is removed at times.
    async fn run(&mut self, steps: u32) {
        for step in 0..steps {
            for _ in 0..self.disk.random.u32(0..6) {
                self.disk.change(0).await;
            }
            while self.disk.random.u32(..3) == 0 {
                let size = self.disk.random.u64(2 * MIB..7 * MIB);
                self.disk.resize(size).await;
            }
            self.disk.snapshot(&format!("s{step}")).await;
        }
        for _ in 0..self.disk.random.u32(1..3) {
            let gone = self.disk.random.u32(..steps - 1);
            self.disk.librbd.try_call(&format!("rmsnap {} s{gone}", self.disk.image), b"").await.ok();
        }
        self.disk.change(0).await;
        self.disk.librbd.call(format!("flush {}", self.disk.image)).await;
        self.points = self.source.snapshots().await.unwrap();
    }

    /// Every pair of points. What may be named beyond librbd's answer: what was there on the way and at neither end;
    /// what may have been rolled back, which is what changed from the oldest snapshot on to the start; and what lies
    /// behind the end of the smallest point on the way, part of which librbd forgets.
    async fn check(&mut self) {
        let points = self.points.clone();
        let ends: Vec<(Point, u64)> = points.iter().map(|to| (Point::Snapshot(to.clone()), to.size)).collect();
        let ends = [ends, vec![(Point::Head, self.disk.size())]].concat();
        let mut known = HashMap::new();
        for (end, (to, _)) in ends.iter().enumerate() {
            for start in std::iter::once(None).chain((0..end).map(Some)) {
                known.insert((start, end), self.theirs(to, start.map(|start| &points[start])).await);
            }
        }
        for (end, (to, size)) in ends.iter().enumerate() {
            for start in std::iter::once(None).chain((0..end).map(Some)) {
                let from_oldest = start.unwrap_or(0);
                let least = [(start, end), (Some(0), from_oldest)];
                let ways = (start.map_or(end, |start| start + 1)..=end).map(|end| (start, end));
                let most = ways.chain((1..=from_oldest).map(|end| (Some(0), end)));
                let all = |pairs: Vec<(Option<usize>, usize)>| {
                    let found = pairs.iter().filter_map(|pair| known.get(pair)).flatten();
                    normalize(found.filter_map(|range| range.clip(*size)).collect())
                };
                let (least, most) = (all(least.to_vec()), all(most.collect()));
                let since = start.map(|start| &points[start]);
                let ours = self.ours(to, since).await;
                let missed = subtract(&least, &ours);
                assert!(missed.is_empty(), "{missed:?} missed from {since:?} to {to}: {ours:?}, {least:?}");
                let smallest = ends[..=end].iter().map(|(_, size)| *size).min().unwrap_or(0);
                // In whole periods: an object of the last one may be gone at the smaller size.
                let period = self.source.layout().period();
                let behind = ByteRange::between(smallest / period * period, u64::MAX).filter(|_| start.is_some());
                let behind: Vec<ByteRange> = behind.into_iter().collect();
                let surplus = subtract(&subtract(&ours, &most), &behind);
                assert!(surplus.is_empty(), "{surplus:?} too much from {since:?} to {to}: {ours:?}, {most:?}");
            }
        }
    }

    async fn remove(mut self) {
        drop(self.source);
        self.disk.librbd.remove(&[&self.disk.image]).await;
    }
}

fn small_objects() -> CreateOptions {
    CreateOptions { object_size: 64 * KIB, stripe_unit: 64 * KIB, ..CreateOptions::new(6 * MIB + 1) }
}

async fn trial(tag: &str, pool: &str, seeds: std::ops::Range<u64>, options: CreateOptions) {
    let env = ceph();
    let trials = seeds.map(|seed| {
        let (env, options) = (&env, &options);
        async move {
            let mut trial = Trial::new(env, &format!("{pool}/{}-{seed}", name(tag)), seed, options).await;
            trial.run(6).await;
            trial.check().await;
            assert_eq!(times_asked(&trial.disk.image), 0, "librbd was asked");
            trial.remove().await;
        }
    });
    futures::future::join_all(trials).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn a_plain_image_is_as_librbd_says() {
    trial("map-plain", "sas", 0..4, small_objects()).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn a_striped_image_is_as_librbd_says() {
    let striped = CreateOptions { stripe_unit: 16 * KIB, stripe_count: 5, ..small_objects() };
    trial("map-striped", "sas", 0..3, striped).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn an_image_in_a_namespace_with_a_data_pool_is_as_librbd_says() {
    let env = ceph();
    let space = name("map-space");
    assert!(rbd(&env, &["namespace", "create", &format!("sas/{space}")]));
    let options = CreateOptions { data_pool: Some("sata".into()), ..small_objects() };
    trial("map-data", &format!("sas/{space}"), 0..1, options).await;
    rbd(&env, &["namespace", "rm", &format!("sas/{space}")]);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn a_clone_is_as_librbd_says() {
    let env = ceph();
    let (parent, child) = (format!("sata/{}", name("map-parent")), format!("sata/{}", name("map-child")));
    let mut base = Trial::new(&env, &parent, 7, &small_objects()).await;
    for offset in [0, 3 * MIB + 1, 5 * MIB] {
        base.disk.write_noise(offset, 700 * KIB).await;
    }
    base.disk.snapshot("golden").await;
    base.disk.librbd.call(format!("clone {parent}@golden {child}")).await;
    let mut clone = Trial::over(&env, &child, 8, base.disk.bytes.clone()).await;
    clone.run(6).await;
    clone.check().await;
    assert_eq!(times_asked(&child), 0, "librbd was asked");
    clone.remove().await;
    base.remove().await;
}

/// While another client writes and makes snapshots, nothing of a snapshot that is there already may be missing.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn a_busy_writer_hides_nothing() {
    let env = ceph();
    let image = format!("sas/{}", name("map-busy"));
    let mut trial = Trial::new(&env, &image, 3, &small_objects()).await;
    let size = trial.disk.size();
    trial.disk.write_noise(0, MIB).await;
    trial.disk.snapshot("base").await;
    trial.disk.librbd.call(format!("hammer {image} 5")).await;
    for round in 0..6 {
        trial.disk.snapshot(&format!("s{round}")).await;
        let points = trial.source.snapshots().await.unwrap();
        let (base, last) = (&points[0], points.last().unwrap());
        let known = trial.theirs(&Point::Snapshot(last.clone()), Some(base)).await;
        let known: Vec<ByteRange> = known.into_iter().filter_map(|range| range.clip(size)).collect();
        // Once while another snapshot comes, whose map may not be there yet, and once after.
        let next = format!("snap {image} during{round}");
        let during = compare(&trial.source, &Point::Head, Some(base));
        let (during, made) = tokio::join!(during, trial.disk.librbd.try_call(&next, b""));
        made.unwrap();
        let after = compare(&trial.source, &Point::Head, Some(base)).await;
        assert!(matches!(after, ChangedObjects::Runs(_)), "{after:?}");
        for found in [during, after] {
            if let ChangedObjects::Runs(ours) = found {
                let missed = subtract(&known, &ours);
                assert!(missed.is_empty(), "{missed:?}");
            }
        }
    }
    trial.disk.librbd.call(format!("rest {image}")).await;
    trial.disk.librbd.call(format!("flush {image}")).await;
    trial.points = trial.source.snapshots().await.unwrap();
    trial.check().await;
    trial.remove().await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn a_map_that_is_none_is_left_to_librbd() {
    let env = ceph();
    let image = format!("sas/{}", name("map-spoilt"));
    let mut trial = Trial::new(&env, &image, 4, &small_objects()).await;
    trial.disk.snapshot("base").await;
    trial.disk.write(MIB, &noise(100, 1)).await;
    trial.disk.librbd.call(format!("close {image}")).await;
    trial.disk.librbd.call(format!("spoil {image}")).await;
    let base = trial.source.snapshots().await.unwrap().remove(0);
    let ours = trial.ours(&Point::Head, Some(&base)).await;
    assert_eq!((ours, times_asked(&image)), (vec![ByteRange::new(MIB, 64 * KIB).unwrap()], 1));
    trial.remove().await;
}

/// Without fast-diff librbd forgets what a removed snapshot's map said: an image that was open all the time must notice.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn a_feature_that_goes_meanwhile_is_noticed() {
    let env = ceph();
    let image = format!("sas/{}", name("map-feature"));
    let mut trial = Trial::new(&env, &image, 6, &small_objects()).await;
    trial.disk.snapshot("base").await;
    let base = trial.source.snapshots().await.unwrap().remove(0);
    assert!(matches!(compare(&trial.source, &Point::Head, Some(&base)).await, ChangedObjects::Runs(_)));
    trial.disk.write(MIB, &noise(100, 1)).await;
    trial.disk.snapshot("theirs").await;
    trial.disk.librbd.call(format!("close {image}")).await;
    assert!(rbd(&env, &["feature", "disable", &image, "fast-diff"]));
    assert!(rbd(&env, &["snap", "rm", &format!("{image}@theirs")]));
    let found = compare(&trial.source, &Point::Head, Some(&base)).await;
    assert!(matches!(&found, ChangedObjects::Unavailable { reason, .. } if reason.contains("fast-diff")), "{found:?}");
    trial.remove().await;
}

/// A snapshot that comes and goes is known by the number that it leaves behind.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn snapshots_come_and_go_and_the_maps_name_all_that_changed() {
    let env = ceph();
    let image = format!("sas/{}", name("map-go"));
    let mut trial = Trial::new(&env, &image, 7, &small_objects()).await;
    trial.disk.snapshot("base").await;
    let base = trial.source.snapshots().await.unwrap().remove(0);
    trial.disk.write(MIB, &noise(100, 1)).await;
    let mut looked = 0;
    for round in 0..8 {
        let passing = format!("{image} passing{round}");
        let come_and_go = async {
            trial.disk.librbd.call(format!("snap {passing}")).await;
            trial.disk.librbd.call(format!("rmsnap {passing}")).await;
        };
        let look = async {
            loop {
                if let ChangedObjects::Runs(runs) = compare(&trial.source, &Point::Head, Some(&base)).await {
                    assert!(runs.iter().any(|run| run.offset() <= MIB && MIB < run.end()), "{runs:?}");
                    looked += 1;
                }
                tokio::task::yield_now().await;
            }
        };
        tokio::select! {
            () = come_and_go => {}
            () = look => {}
        }
    }
    assert!(looked > 0, "the maps never told anything");
    trial.remove().await;
}

/// Whatever a writer does that has the image open all the time, the token changes, or there is none.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn a_quiet_token_stays_only_while_nothing_happens() {
    let env = ceph();
    let image = format!("sas/{}", name("map-quiet"));
    let mut trial = Trial::new(&env, &image, 8, &small_objects()).await;
    let token = async |trial: &Trial| trial.source.quiet_token().await.unwrap();
    trial.disk.write(0, &noise(100, 1)).await;
    assert_eq!(token(&trial).await, None, "written since there was no snapshot");
    trial.disk.snapshot("one").await;
    let mut last = token(&trial).await.expect("nothing was written since");
    // An object that is there, one that is not; a discard of a whole one; a snapshot that comes, and one that goes.
    for step in 0..10 {
        assert_eq!(token(&trial).await.as_ref(), Some(&last), "before step {step}");
        let librbd = &mut trial.disk.librbd;
        match step % 5 {
            0 => trial.disk.write(step * 7, &noise(100, step)).await,
            1 => trial.disk.write(MIB * (step % 4 + 1), &noise(100, step)).await,
            2 => drop(librbd.call(format!("discard {image} {} {}", MIB * (step % 4), 64 * KIB)).await),
            3 => {}
            _ => drop(librbd.call(format!("rmsnap {image} s{}", step - 1)).await),
        }
        trial.disk.librbd.call(format!("flush {image}")).await;
        if step % 5 < 3 {
            let after = token(&trial).await;
            // A whole object that is gone leaves nothing that could be written once more without a trace.
            assert!(
                after.as_ref() != Some(&last) && (after.is_none() || step % 5 == 2),
                "after step {step}: {after:?}"
            );
        }
        if step % 5 != 4 {
            trial.disk.snapshot(&format!("s{step}")).await;
        }
        let now = token(&trial).await.expect("a snapshot was made since");
        assert_ne!(now, last, "step {step}");
        last = now;
    }
    trial.remove().await;
}

/// The cost of what an image's size alone costs, on 262,144 objects.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph alone"]
async fn a_large_image_costs_less_than_librbds_look_at_it() {
    let env = ceph_alone();
    let image = format!("sas/{}", name("map-large"));
    listen();
    let pool_image = image.split_once('/').unwrap().1;
    RbdImage::create(&connect(&env).await, "sas", None, pool_image, &CreateOptions::new(1 << 40)).await.unwrap();
    let mut trial = Trial::over(&env, &image, 5, vec![0; 4096]).await;
    trial.disk.snapshot("base").await;
    trial.disk.write(0, &noise(4096, 1)).await;
    let base = trial.source.snapshots().await.unwrap().remove(0);
    let (mut own, mut librbd) = (Duration::MAX, Duration::MAX);
    for _ in 0..3 {
        let begun = Instant::now();
        let theirs = trial.theirs(&Point::Head, Some(&base)).await;
        librbd = librbd.min(begun.elapsed());
        let begun = Instant::now();
        let ours = trial.ours(&Point::Head, Some(&base)).await;
        own = own.min(begun.elapsed());
        assert_eq!(ours, theirs);
    }
    println!("262,144 objects: {own:?} against librbd's {librbd:?}");
    assert!(own < librbd, "{own:?} against librbd's {librbd:?}");
    trial.remove().await;
}
