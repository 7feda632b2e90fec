//! Who may write: leases of other processes, alive, dead and silent, and clients that know nothing of poolshift.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use poolshift::image::rbd::{Connector, CreateOptions, RbdImage, RbdOptions};
use poolshift::image::{ChangedObjects, Disk, ErrorKind, LeaseOwner, LockHolder, Point, SourceImage, TargetImage};

use super::{MIB, connect, content, leased, make, name, noise, range, rbd, remove};
use crate::ceph_faults::{admin, conf_with};
use crate::support::{CephEnv, ceph, ceph_alone, ceph_in_a_turn, required};

/// Another process, which takes the lease and then does what it is told, a word a line.
pub(crate) struct Holder {
    pub(crate) child: Child,
    answers: BufReader<std::process::ChildStdout>,
}

impl Holder {
    /// Starts one; `dead` has it leave a record of a process that is no more.
    fn start(image: &str, dead: bool) -> Self {
        Self::start_as(image, if dead { "dead" } else { "" })
    }

    /// Starts one that fences the image, and asks whoever has the lock.
    pub(crate) fn fencing(image: &str) -> Self {
        Self::start_as(image, "fence")
    }

    fn start_as(image: &str, how: &str) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--ignored", "--exact", "ceph_backend::lease::a_holder_of_a_lease", "--nocapture"]);
        command.env("POOLSHIFT_TEST_HOLD", image).env("POOLSHIFT_TEST_HOLD_HOW", how);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let answers = BufReader::new(child.stdout.take().unwrap());
        let mut holder = Self { child, answers };
        assert_eq!(holder.answer(), "leased");
        holder
    }

    fn answer(&mut self) -> String {
        let mut line = String::new();
        while self.answers.read_line(&mut line).unwrap() > 0 {
            // The test harness says things too.
            if let Some((_, answer)) = line.split_once("HOLDER ") {
                return answer.trim().to_owned();
            }
            line.clear();
        }
        panic!("the holder ended without an answer");
    }

    pub(crate) fn tell(&mut self, word: &str) -> String {
        writeln!(self.child.stdin.as_mut().unwrap(), "{word}").unwrap();
        self.answer()
    }

    fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal).unwrap();
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

/// No test by itself: what [`Holder`] runs in its process.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "no test by itself: others run it in a process of its own"]
async fn a_holder_of_a_lease() {
    let image = required("POOLSHIFT_TEST_HOLD", "a test that starts it");
    let env = ceph_in_a_turn();
    let target = RbdImage::open_target(&connect(&env).await, "sas", None, &image).await.unwrap();
    let mut owner = LeaseOwner::current().unwrap();
    match std::env::var("POOLSHIFT_TEST_HOLD_HOW").as_deref() {
        Ok("fence") => target.fence(&owner, LockHolder::Ask).await.unwrap(),
        how => {
            owner.start_ticks += u64::from(how == Ok("dead"));
            target.acquire_lease(&owner).await.unwrap();
        }
    }
    println!("\nHOLDER leased");
    for word in std::io::stdin().lines() {
        let done = match word.unwrap().as_str() {
            "write" => target.write(0, noise(4096, 666)).await,
            "store" => target.store_state("late").await,
            "turns" => take_turns(&target, 12).await,
            _ => target.release_lease().await,
        };
        println!("HOLDER {}", done.err().map_or("ok".into(), |error| format!("{:?}", error.kind)));
    }
}

/// Takes the lease, and gives it back, so many times. Who has it otherwise has to be known.
async fn take_turns(target: &RbdImage, turns: usize) -> poolshift::image::Result<()> {
    let owner = LeaseOwner::current().unwrap();
    target.release_lease().await?;
    let mut taken = 0;
    while taken < turns {
        match target.acquire_lease(&owner).await {
            Ok(()) => {
                target.release_lease().await?;
                taken += 1;
            }
            Err(busy) => match &busy.kind {
                ErrorKind::Busy { holder } if LeaseOwner::is_description(holder) => {}
                _ => return Err(busy),
            },
        }
    }
    Ok(())
}

/// On an image with an exclusive lock and on one without.
async fn lease_images(env: &CephEnv, tag: &str) -> Vec<(String, RbdImage)> {
    let mut images = Vec::new();
    for (kind, features) in [("lock", CreateOptions::FEATURES), ("advisory", 1)] {
        let image = name(&format!("{tag}-{kind}"));
        let options = CreateOptions { features, ..CreateOptions::new(MIB) };
        let (_, target) = make(env, "sas", &image, &options).await;
        images.push((image, target));
    }
    images
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn a_lease_that_is_held_is_busy() {
    let env = ceph();
    for (image, target) in lease_images(&env, "busy").await {
        assert_eq!(target.lease_owner().await.unwrap(), None);
        let mut holder = Holder::start(&image, false);
        let busy = target.acquire_lease(&LeaseOwner::current().unwrap()).await.unwrap_err();
        let ErrorKind::Busy { holder: who } = &busy.kind else { panic!("{busy}") };
        assert!(who.contains(&format!("process {} on ", holder.child.id())), "{who}");
        assert_eq!(target.lease_owner().await.unwrap().unwrap().pid, holder.child.id());
        assert!(target.watchers().await.unwrap().iter().any(|watcher| !watcher.is_own));
        assert_eq!(holder.tell("write"), "ok");
        assert_eq!(holder.tell("release"), "ok");
        assert_eq!(holder.tell("write"), "ReadOnly");
        assert_eq!(target.lease_owner().await.unwrap(), None);
        leased(&target).await;
        leased(&target).await;
        // Even the same process, through another image, is another holder.
        let other = RbdImage::open_target(&connect(&env).await, "sas", None, &image).await.unwrap();
        let busy = other.acquire_lease(&LeaseOwner::current().unwrap()).await.unwrap_err();
        assert!(matches!(busy.kind, ErrorKind::Busy { .. }), "{busy}");
        target.release_lease().await.unwrap();
        leased(&other).await;
        drop((target, other, holder));
        remove(&env, &format!("sas/{image}")).await;
    }
}

/// While one gives it back, or takes it, the other is never told of somebody that is not poolshift.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn a_lease_that_changes_hands_is_never_a_strangers() {
    let env = ceph();
    for (image, target) in lease_images(&env, "turns").await {
        let mut holder = Holder::start(&image, false);
        let other = std::thread::spawn(move || holder.tell("turns"));
        take_turns(&target, 12).await.unwrap();
        assert_eq!(other.join().unwrap(), "ok");
        drop(target);
        remove(&env, &format!("sas/{image}")).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph alone"]
async fn a_dead_holder_is_fenced_at_once() {
    let env = ceph_alone();
    for (image, target) in lease_images(&env, "dead").await {
        let holder = Holder::start(&image, false);
        drop(holder);
        let begun = Instant::now();
        leased(&target).await;
        assert!(begun.elapsed() < Duration::from_secs(25), "{:?}", begun.elapsed());
        target.write(0, noise(10, 1)).await.unwrap();
        drop(target);
        remove(&env, &format!("sas/{image}")).await;
    }
}

/// Whoever drops a lease without giving it back, as a cycle does that is cancelled, is not taken for dead: its client goes
/// on with other images.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn a_lease_that_is_dropped_is_given_back() {
    let env = ceph();
    let beside = name("dropped-beside");
    let (connector, other) = make(&env, "sas", &beside, &CreateOptions::new(MIB)).await;
    leased(&other).await;
    for (image, looking) in lease_images(&env, "dropped").await {
        let dropped = RbdImage::open_target(&connector, "sas", None, &image).await.unwrap();
        leased(&dropped).await;
        dropped.write(0, noise(4096, 1)).await.unwrap();
        drop(dropped);
        assert!(poolshift::image::rbd::wait_until_closed(Duration::from_secs(60)).await);
        assert_eq!(looking.lease_owner().await.unwrap(), None);
        let record = ["image-meta", "get", &format!("sas/{image}"), "poolshift.lease"];
        assert!(!rbd(&env, &record), "{image}: the record of the lease is still there");
        leased(&looking).await;
        other.write(0, noise(4096, 2)).await.unwrap();
        other.flush().await.unwrap();
        drop(looking);
        remove(&env, &format!("sas/{image}")).await;
    }
    drop(other);
    remove(&env, &format!("sas/{beside}")).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn a_fenced_holder_writes_nothing_any_more() {
    let env = ceph();
    for (image, target) in lease_images(&env, "fenced").await {
        let mut holder = Holder::start(&image, true);
        assert_eq!(holder.tell("write"), "ok");
        leased(&target).await;
        target.write(0, noise(4096, 1)).await.unwrap();
        assert_eq!(holder.tell("write"), "Fenced");
        assert_eq!(holder.tell("store"), "Fenced");
        assert_eq!(holder.tell("release"), "ok");
        target.flush().await.unwrap();
        let view = target.view(&Point::Head).await.unwrap();
        assert_eq!(view.read(range(0, 4096)).await.unwrap(), noise(4096, 1));
        assert_eq!(target.load_state().await.unwrap(), None);
        assert_eq!(target.lease_owner().await.unwrap().unwrap().pid, std::process::id());
        drop((view, target, holder));
        remove(&env, &format!("sas/{image}")).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn a_frozen_holder_is_waited_for_and_then_fenced() {
    let env = ceph();
    let image = name("frozen");
    let (_connector, target) = make(&env, "sas", &image, &CreateOptions::new(MIB)).await;
    let mut holder = Holder::start(&image, false);
    holder.signal(rustix::process::Signal::STOP);
    leased(&target).await;
    target.write(0, noise(4096, 1)).await.unwrap();
    target.flush().await.unwrap();
    holder.signal(rustix::process::Signal::CONT);
    assert_eq!(holder.tell("write"), "Fenced");
    let view = target.view(&Point::Head).await.unwrap();
    assert_eq!(view.read(range(0, 4096)).await.unwrap(), noise(4096, 1));
    drop((view, target, holder));
    remove(&env, &format!("sas/{image}")).await;
}

/// What a site may have configured, on the cluster, the pool or, as here, the image: librbd does not blocklist whose lock
/// it breaks, or only for a moment. A holder that is dead, or hangs, and goes on later writes nothing all the same.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn whoever_loses_the_lock_is_fenced_whatever_is_configured() {
    let env = ceph();
    for (option, value) in [("rbd_blocklist_on_break_lock", "false"), ("rbd_blocklist_expire_seconds", "1")] {
        for (image, target) in lease_images(&env, "config").await {
            let place = format!("sas/{image}");
            assert!(rbd(&env, &["config", "image", "set", &place, option, value]));
            // An advisory lock is not waited for.
            for hangs in [false, true].into_iter().filter(|hangs| !hangs || target.has_lock()) {
                let mut holder = Holder::start(&image, !hangs);
                assert_eq!(holder.tell("write"), "ok");
                if hangs {
                    holder.signal(rustix::process::Signal::STOP);
                }
                leased(&target).await;
                target.write(0, noise(4096, 1)).await.unwrap();
                target.flush().await.unwrap();
                // For longer than the entry of librbd's own.
                tokio::time::sleep(Duration::from_secs(2)).await;
                holder.signal(rustix::process::Signal::CONT);
                assert_eq!(holder.tell("write"), "Fenced", "{image}, {option} = {value}, hangs: {hangs}");
                let view = target.view(&Point::Head).await.unwrap();
                assert_eq!(view.read(range(0, 4096)).await.unwrap(), noise(4096, 1));
                target.release_lease().await.unwrap();
            }
            drop(target);
            remove(&env, &place).await;
        }
    }
}

/// A user who may not add to the blocklist does not take over: whoever has the lock could write again.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn without_the_blocklist_no_lock_is_taken_over() {
    let env = ceph();
    let (image, user) = (name("no-blocklist"), name("no-blocklist"));
    let (_connector, target) = make(&env, "sas", &image, &CreateOptions::new(MIB)).await;
    let (folder, entity) = (tempfile::tempdir().unwrap(), format!("client.{user}"));
    let key = admin(&env, "ceph", &["auth", "get-or-create", &entity, "mon", "allow r", "osd", "allow rwx pool=sas"]);
    let conf = Some(conf_with(&env, &folder, &user, &key));
    let less = RbdOptions { conf, user: Some(user), ..RbdOptions::default() };
    let less = Connector::connect(&less).await.unwrap();
    let theirs = RbdImage::open_target(&less, "sas", None, &image).await.unwrap();
    let mut holder = Holder::start(&image, true);
    let refused = theirs.acquire_lease(&LeaseOwner::current().unwrap()).await.unwrap_err();
    assert_eq!(refused.kind, ErrorKind::PermissionDenied, "{refused}");
    assert!(refused.hint.as_ref().is_some_and(|hint| hint.contains("profile rbd")), "{refused:?}");
    assert_eq!(holder.tell("write"), "ok");
    drop((theirs, less, target, holder));
    admin(&env, "ceph", &["auth", "rm", &entity]);
    remove(&env, &format!("sas/{image}")).await;
}

/// A client that knows nothing of poolshift, and writes.
struct Stranger(Child);

impl Stranger {
    async fn start(env: &CephEnv, image: &str, opened: &RbdImage) -> Self {
        let mut command = Command::new("rbd");
        command.env_remove("CEPH_ARGS").arg("-c").arg(&env.conf).args(["--id", &env.user, "bench", image]);
        command.args(["--io-type", "write", "--io-size", "4K", "--io-threads", "1", "--io-total", "10G"]);
        let stranger = Self(command.stdout(Stdio::null()).spawn().unwrap());
        while opened.lease_owner().await.unwrap().is_none() {
            tokio::task::yield_now().await;
        }
        stranger
    }
}

impl Drop for Stranger {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn the_holder_of_an_advisory_lock_is_named() {
    let env = ceph();
    let image = name("advisory");
    let (_connector, target) = make(&env, "sas", &image, &CreateOptions::new(MIB)).await;
    let place = format!("sas/{image}");
    assert!(rbd(&env, &["lock", "add", &place, "backup"]));
    let busy = target.acquire_lease(&LeaseOwner::current().unwrap()).await.unwrap_err();
    let ErrorKind::Busy { holder } = &busy.kind else { panic!("{busy}") };
    assert!(holder.starts_with("client.") && holder.contains("\"backup\""), "{holder}");
    let locker = holder.split(' ').next().unwrap();
    assert!(rbd(&env, &["lock", "rm", &place, "backup", locker]));
    leased(&target).await;
    drop(target);
    remove(&env, &place).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn a_writer_keeps_its_lock() {
    let env = ceph();
    let image = name("stranger");
    let (_connector, opened) = make(&env, "sas", &image, &CreateOptions::new(8 * MIB)).await;
    let stranger = Stranger::start(&env, &format!("sas/{image}"), &opened).await;
    let owner = opened.lease_owner().await.unwrap();
    // As a target it is busy; as a source it gets its snapshots from the writer, and reads beside it.
    let busy = opened.acquire_lease(&LeaseOwner::current().unwrap()).await.unwrap_err();
    assert!(matches!(&busy.kind, ErrorKind::Busy { holder } if holder.contains("not poolshift")), "{busy}");
    let first = opened.create_snapshot("a").await.unwrap();
    while !opened.head_differs(&first).await.unwrap() {
        tokio::task::yield_now().await;
    }
    let second = opened.create_snapshot("b").await.unwrap();
    let view = opened.view(&Point::Snapshot(second)).await.unwrap();
    let ChangedObjects::Runs(runs) = view.changed_objects(Some(&first)).await.unwrap() else { panic!() };
    assert!(!runs.is_empty());
    assert!(content(&*view).await == content(&*view).await);
    opened.remove_snapshot(&first).await.unwrap();
    assert_eq!(opened.lease_owner().await.unwrap(), owner);
    drop((view, opened, stranger));
    remove(&env, &format!("sas/{image}")).await;
}
