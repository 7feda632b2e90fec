//! Parents, clones, flattening, and what is left over, on a real cluster.

use std::num::NonZeroU64;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use poolshift::image::rbd::{
    Connector, FlattenBound, FlattenProgress, RbdImage, RbdLink, RbdOptions, wait_until_closed,
};
use poolshift::image::{ErrorKind, SourceImage};
use tokio_util::sync::CancellationToken;

use crate::support::{CephEnv, ceph};

mod commands;
mod gc;

const MIB: u64 = 1 << 20;

/// Images of one test, all named alike, removed with their clones at the end.
struct Family {
    env: CephEnv,
    name: String,
}

impl Family {
    /// `None` without a Ceph.
    #[track_caller]
    fn new() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let env = ceph();
        let name = format!("family-{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        Self { env, name }
    }

    fn args(&self, line: &str) -> Vec<String> {
        line.split_whitespace().map(|word| word.replace("NAME", &self.name)).collect()
    }

    fn run_rbd(&self, line: &str) -> std::process::Output {
        let mut command = Command::new("rbd");
        command.arg("--conf").arg(&self.env.conf).args(["--id", &self.env.user]).args(self.args(line));
        command.stdin(Stdio::null()).env_remove("CEPH_ARGS").output().expect("rbd runs")
    }

    fn try_rbd(&self, line: &str) -> Result<String, String> {
        let output = self.run_rbd(line);
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
    }

    /// Runs `rbd`; `NAME` stands for the family's name.
    #[track_caller]
    fn rbd(&self, line: &str) -> String {
        self.try_rbd(line).unwrap_or_else(|error| panic!("rbd {line}: {error}"))
    }

    /// Writes `mib` MiB from the start of an image.
    #[track_caller]
    fn fill(&self, image: &str, mib: u64) {
        self.rbd(&format!(
            "bench {image} --io-type write --io-pattern seq --io-threads 1 --io-size 1M --io-total {mib}M"
        ));
    }

    /// An image of 32 MiB of which the first 16 MiB are written, its snapshot `s`, and a clone of that.
    #[track_caller]
    fn parent_and_clone(&self) {
        self.rbd("create sata/NAME --size 32M");
        self.fill("sata/NAME", 16);
        self.rbd("snap create --no-progress sata/NAME@s");
        self.clone("sata/NAME@s", "sata/NAME-c");
    }

    #[track_caller]
    fn clone(&self, snapshot: &str, clone: &str) {
        self.rbd(&format!("clone --rbd-default-clone-format 2 {snapshot} {clone}"));
    }

    async fn open(&self, pool: &str, image: &str) -> RbdImage {
        let options =
            RbdOptions { conf: Some(self.env.conf.clone()), user: Some(self.env.user.clone()), ..Default::default() };
        let connector = Connector::connect(&options).await.unwrap();
        let name = image.replace("NAME", &self.name);
        RbdImage::open_target(&connector, pool, None, &name).await.unwrap()
    }

    fn content(&self, image: &str) -> blake3::Hash {
        let output = self.run_rbd(&format!("export --no-progress {image} -"));
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        blake3::hash(&output.stdout)
    }
}

impl Drop for Family {
    fn drop(&mut self) {
        // Clones of clones first: as often as there may be generations.
        for _ in 0..4 {
            for pool in ["sata", "sas"] {
                let listed = self.try_rbd(&format!("ls {pool}")).unwrap_or_default();
                let own = format!("{}-", self.name);
                for image in listed.lines().filter(|image| *image == self.name || image.starts_with(&own)) {
                    for snapshot in self.try_rbd(&format!("snap ls {pool}/{image}")).unwrap_or_default().lines() {
                        if let Some(snapshot) = snapshot.split_whitespace().nth(1) {
                            let _ = self.try_rbd(&format!("snap unprotect {pool}/{image}@{snapshot}"));
                        }
                    }
                    let _ = self.try_rbd(&format!("snap purge --no-progress {pool}/{image}"));
                    let _ = self.try_rbd(&format!("rm --no-progress {pool}/{image}"));
                }
            }
        }
    }
}

fn names(links: &[RbdLink]) -> Vec<&str> {
    links.iter().map(|link| link.image.as_str()).collect()
}

async fn close() {
    assert!(wait_until_closed(Duration::from_secs(60)).await);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn clones_of_clones_are_found_in_every_pool_and_in_the_trash() {
    let family = Family::new();
    family.parent_and_clone();
    family.clone("sata/NAME@s", "sas/NAME-d");
    family.fill("sata/NAME-c", 4);
    family.rbd("snap create --no-progress sata/NAME-c@t");
    family.clone("sata/NAME-c@t", "sas/NAME-e");
    family.rbd("snap create --no-progress sata/NAME@p");
    family.rbd("snap protect sata/NAME@p");
    family.rbd("trash mv sas/NAME-d");

    let root = family.open("sata", "NAME").await;
    let tree = root.tree().await.unwrap();
    let [s, p] = &tree.snapshots[..] else { panic!("{tree:?}") };
    assert!(!s.snapshot.protected && p.snapshot.protected && s.snapshot.user);
    let (c, d) = match &s.clones[..] {
        [one, two] if two.image.trash => (one, two),
        [one, two] => (two, one),
        other => panic!("{other:?}"),
    };
    assert!(d.image.trash && d.image.pool == "sas" && d.image.image.ends_with("-d"), "{d:?}");
    assert_eq!(names(&c.relations.snapshots[0].clones), [format!("{}-e", family.name)]);
    let order: Vec<_> = tree.clones_deepest_first().iter().map(|clone| clone.image.image.clone()).collect();
    let at = |suffix: &str| order.iter().position(|image| image.ends_with(suffix)).unwrap();
    assert!(order.len() == 3 && at("-e") < at("-c"), "{order:?}");

    // 32 MiB are shared; the clone has the first object of its own, its clone none.
    let cost = c.relations.flatten.unwrap();
    assert_eq!((cost.bytes_at_most, cost.bound), (28 * MIB, FlattenBound::ObjectMap));
    assert_eq!(c.relations.own_bytes, Some(4 * MIB));
    let e = &c.snapshots[0].clones[0];
    assert_eq!((e.relations.own_bytes, e.relations.flatten.unwrap().bytes_at_most), (Some(0), 32 * MIB));
    let chain = root.open_linked(&e.image).await.unwrap().parents().await.unwrap();
    let chain: Vec<_> = chain.iter().map(|parent| (parent.image.image.as_str(), parent.snapshot.as_str())).collect();
    assert_eq!(chain, [(format!("{}-c", family.name).as_str(), "t"), (family.name.as_str(), "s")]);

    root.unprotect_snapshot("p").await.unwrap();
    let id = d.image.id.clone();
    drop(root);
    close().await;
    family.rbd(&format!("trash rm --no-progress sas/{id}"));
    family.rbd("rm --no-progress sas/NAME-e");
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn without_an_object_map_the_overlap_is_the_bound_and_no_rate_is_kept() {
    let family = Family::new();
    family.parent_and_clone();
    family.rbd("feature disable sata/NAME-c fast-diff object-map");
    let clone = family.open("sata", "NAME-c").await;
    let cost = clone.relations().await.unwrap().flatten.unwrap();
    assert_eq!((cost.bytes_at_most, cost.bound), (32 * MIB, FlattenBound::Overlap));
    let (shown, never) = (Arc::default(), CancellationToken::new());
    let refused = clone.flatten(NonZeroU64::new(MIB), &shown, &never).await.unwrap_err();
    assert_eq!(refused.kind, ErrorKind::Unsupported, "{refused}");
    assert!(clone.flatten(None, &shown, &never).await.unwrap().done);
    assert!(clone.parent().await.unwrap().is_none());
    let again = clone.flatten(None, &shown, &never).await.unwrap_err();
    assert!(again.to_string().contains("no parent"), "{again}");
    drop(clone);
    close().await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn a_flatten_keeps_its_rate_and_goes_on_where_it_was_stopped() {
    let family = Family::new();
    family.parent_and_clone();
    let before = family.content("sata/NAME-c");
    let clone = family.open("sata", "NAME-c").await;
    // One object in four seconds: it is stopped in the pause after the first.
    let (shown, stop) = (Arc::new(FlattenProgress::default()), CancellationToken::new());
    let slow = clone.flatten(NonZeroU64::new(MIB), &shown, &stop);
    let stopper = async {
        while shown.done.load(Ordering::Relaxed) == 0 {
            tokio::task::yield_now().await;
        }
        stop.cancel();
    };
    let (stopped, ()) = tokio::join!(slow, stopper);
    let stopped = stopped.unwrap();
    assert!(!stopped.done && stopped.done_by.is_none(), "{stopped:?}");
    let between = clone.relations().await.unwrap();
    let (own, cost) = (between.own_bytes.unwrap(), between.flatten.unwrap());
    assert!(own > 0 && own < 16 * MIB && between.parent.is_some(), "{between:?}");
    assert_eq!((own + cost.bytes_at_most, own), (32 * MIB, stopped.copied_bytes_at_most));

    let (shown, begun) = (Arc::new(FlattenProgress::default()), Instant::now());
    let rest = clone.flatten(NonZeroU64::new(16 * MIB), &shown, &CancellationToken::new()).await.unwrap();
    // What is left, but for the last stretch, is paid for with time; what the parent does not have is not.
    assert!(rest.done && rest.copied_bytes_at_most == 16 * MIB - own, "{rest:?}");
    assert!(begun.elapsed() >= Duration::from_millis(200), "{:?}", begun.elapsed());
    assert_eq!((rest.bound_snapshots, clone.relations().await.unwrap().flatten), (vec![], None));
    drop(clone);
    close().await;
    assert_eq!(family.content("sata/NAME-c"), before);
    family.rbd("snap rm --no-progress sata/NAME@s");
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn snapshots_without_deep_flatten_keep_their_parent() {
    let family = Family::new();
    family.parent_and_clone();
    family.rbd("feature disable sata/NAME-c deep-flatten");
    family.rbd("snap create --no-progress sata/NAME-c@old");
    let clone = family.open("sata", "NAME-c").await;
    let flattened = clone.flatten(None, &Arc::default(), &CancellationToken::new()).await.unwrap();
    assert_eq!((flattened.done, flattened.bound_snapshots), (true, vec!["old".to_owned()]));
    let parent = family.open("sata", "NAME").await;
    assert_eq!(parent.relations().await.unwrap().snapshots[0].clones.len(), 1);
    let old = clone.snapshots().await.unwrap().remove(0);
    clone.remove_snapshot(&old).await.unwrap();
    assert_eq!(parent.relations().await.unwrap().snapshots[0].clones.len(), 0);
    drop((clone, parent));
    close().await;
}

/// `rbd bench` on an image, which holds its exclusive lock until it is dropped.
struct Writer(std::process::Child);

impl Drop for Writer {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn the_owner_of_the_lock_flattens_but_not_at_a_rate() {
    let family = Family::new();
    family.parent_and_clone();
    let writer = Command::new("rbd")
        .arg("--conf")
        .arg(&family.env.conf)
        .args(["--id", &family.env.user])
        .args(family.args("bench sata/NAME-c --io-type write --io-size 4K --io-threads 1 --io-total 4G"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .env_remove("CEPH_ARGS")
        .spawn()
        .expect("rbd runs");
    let writer = Writer(writer);
    let clone = family.open("sata", "NAME-c").await;
    let deadline = Instant::now() + Duration::from_secs(60);
    let never = CancellationToken::new();
    while clone.lease_holder().await.is_none() {
        assert!(Instant::now() < deadline, "rbd bench never took the lock");
    }
    let refused = clone.flatten(NonZeroU64::new(MIB), &Arc::default(), &never).await.unwrap_err();
    assert!(matches!(refused.kind, ErrorKind::Busy { .. }) && refused.to_string().contains("rate"), "{refused}");
    let flattened = clone.flatten(None, &Arc::default(), &never).await.unwrap();
    assert!(flattened.done && flattened.done_by.is_some(), "{flattened:?}");
    assert!(clone.parent().await.unwrap().is_none());
    drop((writer, clone));
    close().await;
}

/// Who owns the exclusive lock.
trait LeaseHolder {
    async fn lease_holder(&self) -> Option<String>;
}

impl LeaseHolder for RbdImage {
    async fn lease_holder(&self) -> Option<String> {
        use poolshift::image::TargetImage as _;
        self.lease_owner().await.unwrap().and_then(|owner| owner.client)
    }
}
