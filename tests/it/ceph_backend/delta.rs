//! Both levels of a delta, held against the bytes.

use futures::future::join_all;
use poolshift::extent::{ByteRange, Extent, ExtentKind};
use poolshift::image::rbd::{CreateOptions, RbdImage};
use poolshift::image::{ChangedObjects, Point, Snapshot, SourceImage, TargetImage};

use super::{MIB, content, leased, make, name, noise, range, rbd, remove};
use crate::support::ceph;

/// Random writes, zeroes and resizes with snapshots in between, held as plain bytes beside the image.
pub(super) struct Model {
    pub(super) bytes: Vec<u8>,
    pub(super) points: Vec<(Snapshot, Vec<u8>)>,
    pub(super) random: fastrand::Rng,
}

impl Model {
    pub(super) async fn change(&mut self, target: &RbdImage) {
        let size = self.bytes.len() as u64;
        let offset = self.random.u64(..size);
        let length = self.random.u64(1..=(size - offset).min(200_000));
        let span = offset as usize..(offset + length) as usize;
        match self.random.u32(..10) {
            0..5 => {
                let data = noise(length as usize, self.random.u64(..));
                self.bytes[span].copy_from_slice(&data);
                target.write(offset, data).await.unwrap();
            }
            5..8 => {
                self.bytes[span].fill(0);
                target.write_zeroes(range(offset, length)).await.unwrap();
            }
            _ => {
                let size = self.random.u64(MIB..3 * MIB);
                self.bytes.resize(size as usize, 0);
                target.resize(size).await.unwrap();
            }
        }
    }

    /// Every pair of points: no changed byte may be missing at either level, and what is called zero is zero.
    pub(super) async fn check(&self, source: &RbdImage) {
        let period = source.layout().period();
        for (i, (to, bytes)) in self.points.iter().enumerate() {
            let view = source.view(&Point::Snapshot(to.clone())).await.unwrap();
            assert!(content(&*view).await == *bytes, "{to}");
            let bases = std::iter::once(None).chain(self.points[..i].iter().map(Some));
            for base in bases {
                let (since, old) = base.map_or((None, &[][..]), |(since, old)| (Some(since), old));
                let ChangedObjects::Runs(runs) = view.changed_objects(since).await.unwrap() else {
                    panic!("no object map from {since:?} to {to}")
                };
                assert!(runs.windows(2).all(|pair| pair[0].end() < pair[1].offset()));
                assert!(runs.iter().all(|run| run.offset() % period == 0));
                let whole = ByteRange::between(0, view.size()).unwrap();
                let exact = view.diff(since, whole).await.unwrap();
                let inside = join_all(runs.iter().map(|run| view.diff(since, *run))).await;
                let two_level: Vec<_> = inside.into_iter().flat_map(Result::unwrap).collect();
                for (extents, what) in [(&exact, "exact"), (&two_level, "two-level")] {
                    let mut seen = vec![false; bytes.len()];
                    for extent in extents {
                        let span = extent.range.offset() as usize..extent.range.end() as usize;
                        assert!(extent.kind == ExtentKind::Data || bytes[span.clone()].iter().all(|&byte| byte == 0));
                        seen[span].fill(true);
                    }
                    let old = |at: usize| old.get(at).copied().unwrap_or(0);
                    let missed = (0..bytes.len()).find(|&at| !seen[at] && bytes[at] != old(at));
                    assert!(missed.is_none(), "{what} diff from {since:?} to {to} misses {missed:?}");
                }
                // A window that begins and ends within objects.
                let odd = range(SMALL + 12_345, 333_333);
                let clipped = view.diff(since, odd).await.unwrap();
                assert!(clipped.iter().all(|extent| extent.range.intersect(odd) == Some(extent.range)));
            }
        }
    }

    async fn run(target: &RbdImage, source: &RbdImage, bytes: Vec<u8>, seed: u64) {
        let mut model = Self { bytes, points: Vec::new(), random: fastrand::Rng::with_seed(seed) };
        leased(target).await;
        for step in 0..7 {
            for _ in 0..model.random.u32(0..6) {
                model.change(target).await;
            }
            target.flush().await.unwrap();
            let point = target.create_snapshot(&format!("s{step}")).await.unwrap();
            model.points.push((point, model.bytes.clone()));
        }
        model.check(source).await;
        // The same once more with a snapshot missing in the middle.
        let (gone, _) = model.points.remove(3);
        source.remove_snapshot(&gone).await.unwrap();
        model.check(source).await;
    }
}

pub(super) const SMALL: u64 = 256 << 10;

pub(super) fn small_objects() -> CreateOptions {
    CreateOptions { object_size: SMALL, stripe_unit: SMALL, ..CreateOptions::new(2 * MIB) }
}

async fn model(tag: &str, seed: u64, options: CreateOptions) {
    let env = ceph();
    let image = name(tag);
    let (connector, target) = make(&env, "sas", &image, &options).await;
    let source = RbdImage::open_source(&connector, "sas", None, &image).await.unwrap();
    let like = CreateOptions { data_pool: None, ..options };
    assert_eq!(source.source_create_options().await.unwrap(), like);
    Model::run(&target, &source, vec![0; 2 * MIB as usize], seed).await;
    drop((source, target));
    remove(&env, &format!("sas/{image}")).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn both_levels_of_a_delta_cover_every_changed_byte() {
    model("plain", 1, small_objects()).await;
}

/// An object map diff of librbd 16.2 alone misses this.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn what_was_cut_off_and_grown_again_is_part_of_the_delta() {
    let env = ceph();
    let image = name("regrown");
    let (_connector, target) = make(&env, "sas", &image, &small_objects()).await;
    leased(&target).await;
    target.write(6 * SMALL, noise(100, 1)).await.unwrap();
    let whole = target.create_snapshot("whole").await.unwrap();
    target.resize(2 * SMALL).await.unwrap();
    target.create_snapshot("cut").await.unwrap();
    target.resize(8 * SMALL).await.unwrap();
    let regrown = target.create_snapshot("regrown").await.unwrap();
    for point in [Point::Snapshot(regrown), Point::Head] {
        let view = target.view(&point).await.unwrap();
        let runs = view.changed_objects(Some(&whole)).await.unwrap();
        assert_eq!(runs, ChangedObjects::Runs(vec![range(2 * SMALL, 6 * SMALL)]));
        assert_eq!(view.diff(Some(&whole), range(0, 8 * SMALL)).await.unwrap(), [Extent::zero(range(6 * SMALL, 100))]);
    }
    assert!(target.head_differs(&whole).await.unwrap());
    drop(target);
    remove(&env, &format!("sas/{image}")).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn both_levels_cover_a_striped_image() {
    let striped = CreateOptions { object_size: 128 << 10, stripe_unit: 16 << 10, stripe_count: 8, ..small_objects() };
    model("striped", 2, striped).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn both_levels_cover_an_image_with_a_data_pool() {
    model("datapool", 3, CreateOptions { data_pool: Some("sata".into()), ..small_objects() }).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn a_clone_is_covered_with_its_parent() {
    let env = ceph();
    let (parent, child) = (name("parent"), name("child"));
    let (connector, base) = make(&env, "sata", &parent, &small_objects()).await;
    leased(&base).await;
    let mut bytes = vec![0; 2 * MIB as usize];
    for (offset, length) in [(0, 700_000), (900_000, 10_000), (1_300_000, 600_000)] {
        let data = noise(length, offset);
        bytes[offset as usize..][..length].copy_from_slice(&data);
        base.write(offset, data).await.unwrap();
    }
    base.flush().await.unwrap();
    base.create_snapshot("golden").await.unwrap();
    base.release_lease().await.unwrap();
    let (from, to) = (format!("sata/{parent}@golden"), format!("sata/{child}"));
    assert!(rbd(&env, &["clone", "--rbd-default-clone-format", "2", &from, &to]));
    let target = RbdImage::open_target(&connector, "sata", None, &child).await.unwrap();
    let source = RbdImage::open_source(&connector, "sata", None, &child).await.unwrap();
    let known = source.parent().await.unwrap().unwrap();
    assert_eq!((known.snapshot, known.overlap), (from, 2 * MIB));
    assert_eq!(base.parent().await.unwrap(), None);
    assert!(!target.is_blank().await.unwrap());
    Model::run(&target, &source, bytes, 99).await;
    drop((source, target, base));
    remove(&env, &to).await;
    remove(&env, &format!("sata/{parent}")).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn without_an_object_map_the_exact_diff_is_named_and_works() {
    let env = ceph();
    let image = name("nomap");
    let options = CreateOptions { features: 1, ..CreateOptions::new(8 * MIB) };
    let (_connector, target) = make(&env, "sas", &image, &options).await;
    assert_eq!(target.remarks().len(), 2);
    assert!(target.is_blank().await.unwrap());
    leased(&target).await;
    target.write(100, noise(100, 1)).await.unwrap();
    let a = target.create_snapshot("a").await.unwrap();
    assert!(!target.head_differs(&a).await.unwrap() && !target.is_blank().await.unwrap());
    let view = target.view(&Point::Snapshot(a.clone())).await.unwrap();
    let ChangedObjects::Unavailable { reason, cure } = view.changed_objects(None).await.unwrap() else { panic!() };
    assert!(reason.contains("no object map") && cure.unwrap().contains("rbd feature enable sas/"));
    target.write(5 * MIB, noise(100, 1)).await.unwrap();
    assert!(target.head_differs(&a).await.unwrap());
    let owner = target.lease_owner().await.unwrap().unwrap();
    assert_eq!(owner.pid, std::process::id());
    target.release_lease().await.unwrap();
    drop((view, target));
    remove(&env, &format!("sas/{image}")).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn an_invalid_object_map_is_not_believed() {
    let env = ceph();
    let image = name("invalid");
    let options = CreateOptions { features: 1 | 4, ..CreateOptions::new(8 * MIB) };
    let (connector, target) = make(&env, "sas", &image, &options).await;
    leased(&target).await;
    target.write(0, noise(100, 1)).await.unwrap();
    let a = target.create_snapshot("a").await.unwrap();
    target.write(4 * MIB, noise(100, 1)).await.unwrap();
    let b = target.create_snapshot("b").await.unwrap();
    target.release_lease().await.unwrap();
    let place = format!("sas/{image}");
    assert!(rbd(&env, &["feature", "enable", &place, "object-map", "fast-diff"]));
    // HEAD, then the two snapshots, one at a time: each is named until it is rebuilt.
    for invalid in ["", "@a", "@b"] {
        let source = RbdImage::open_source(&connector, "sas", None, &image).await.unwrap();
        assert_eq!(source.remarks().len(), usize::from(invalid.is_empty()));
        let view = source.view(&Point::Snapshot(b.clone())).await.unwrap();
        let ChangedObjects::Unavailable { reason, cure } = view.changed_objects(Some(&a)).await.unwrap() else {
            panic!("the invalid map of {invalid:?} was believed")
        };
        assert!(reason.contains("flagged invalid"), "{reason}");
        assert_eq!(cure, Some(format!("rbd object-map rebuild {place}{invalid}")));
        assert!(!source.head_differs(&b).await.unwrap() && source.head_differs(&a).await.unwrap());
        assert!(rbd(&env, &["object-map", "rebuild", &format!("{place}{invalid}")]));
    }
    let source = RbdImage::open_source(&connector, "sas", None, &image).await.unwrap();
    let view = source.view(&Point::Snapshot(b)).await.unwrap();
    let runs = view.changed_objects(Some(&a)).await.unwrap();
    assert_eq!(runs, ChangedObjects::Runs(vec![range(4 * MIB, 4 * MIB)]));
    drop((view, source, target));
    remove(&env, &place).await;
}
