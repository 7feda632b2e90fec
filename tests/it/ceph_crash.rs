//! `poolshift sync` killed with SIGKILL, or frozen, at any moment, on a real Ceph.
//!
//! One invariant: whatever the moment, a snapshot that is on the target holds what the source's snapshot of that name
//! held, and the next run goes on from there.

use std::collections::HashMap;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use futures::future::join_all;
use poolshift::image::TargetImage;
use poolshift::image::rbd::CreateOptions;
use poolshift::replicate::SyncOptions;
use poolshift::replicate::state::{InFlight, TargetState};

use rustix::process::{Pid, Signal, kill_process};

use crate::librbd::{Disk, MIB, name, open_source, open_target, sync};
use crate::support::{CephEnv, Run, binary, ceph};

/// How many runs are killed, on each of [`VOLUMES`] volumes.
const KILLS: u32 = 8;
const VOLUMES: u64 = 3;

/// A volume: a source with its writer, a target, and what each snapshot is known to hold.
pub(crate) struct Volume {
    pub(crate) env: CephEnv,
    pub(crate) disk: Disk,
    pub(crate) target: String,
    /// The digest of every source snapshot that was ever seen, by its name.
    pub(crate) held: HashMap<String, String>,
}

impl Volume {
    pub(crate) async fn new(env: &CephEnv, tag: &str, seed: u64, size: u64) -> Self {
        Self::in_pool(env, "sas", tag, seed, size).await
    }

    /// With its target in that pool.
    pub(crate) async fn in_pool(env: &CephEnv, pool: &str, tag: &str, seed: u64, size: u64) -> Self {
        let (source, target) = (format!("sata/{}", name(tag)), format!("{pool}/{}", name(tag)));
        let mut disk = Disk::create(env, &source, seed, &CreateOptions::new(size)).await;
        for offset in (0..size).step_by(4 * MIB as usize) {
            disk.write_noise(offset, 2 * MIB).await;
        }
        // Made by the library and not by a run that may be killed.
        open_target(env, open_source(env, &source).await.as_ref(), &target).await;
        Self { env: env.clone(), disk, target, held: HashMap::new() }
    }

    pub(crate) fn start(&self, words: &[&str]) -> Running {
        let mut command = binary();
        command.arg("--ceph-conf").arg(&self.env.conf).args(["--ceph-user", &self.env.user]).args(words);
        let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the binary starts");
        Running(Some(child))
    }

    pub(crate) fn start_sync(&self) -> Running {
        self.start_sync_with(&[])
    }

    pub(crate) fn start_sync_with(&self, words: &[&str]) -> Running {
        let (source, target) = (format!("rbd:{}", self.disk.image), format!("rbd:{}", self.target));
        self.start(&[&["sync", &source, &target, "--json"], words].concat())
    }

    /// Makes a source in which most objects have changed, so that there is something to be killed in.
    pub(crate) async fn write(&mut self) {
        for _ in 0..8 {
            let offset = self.disk.random.u64(0..self.disk.size() - 2 * MIB);
            self.disk.write_noise(offset, 2 * MIB).await;
        }
        for _ in 0..4 {
            self.disk.change(0).await;
        }
    }

    pub(crate) async fn state(&self) -> Option<TargetState> {
        let target =
            open_target(&self.env, open_source(&self.env, &self.disk.image).await.as_ref(), &self.target).await;
        target.load_state().await.unwrap().map(|text| TargetState::parse(&text).unwrap())
    }

    /// The snapshot that is in flight, once the source has it.
    pub(crate) async fn in_flight(&self) -> Option<InFlight> {
        self.state().await?.in_flight.filter(|in_flight| in_flight.snapshot.is_some())
    }

    /// The invariant. A removal that a killed run has asked for goes on without it, in whoever has the source's lock: a
    /// snapshot that is gone once it was read is not held.
    pub(crate) async fn check(&mut self, when: &str) {
        let mut read = Vec::new();
        for name in self.disk.librbd.snapshots(&self.disk.image).await {
            if !self.held.contains_key(&name) {
                let words = format!("digest {}@{name}", self.disk.image);
                read.push((name, self.disk.librbd.try_call(&words, b"").await));
            }
        }
        let still = self.disk.librbd.snapshots(&self.disk.image).await;
        for (name, digest) in read.into_iter().filter(|(name, _)| still.contains(name)) {
            let digest = digest.unwrap_or_else(|error| panic!("{when}: {}@{name}: {error}", self.disk.image));
            self.held.insert(name, String::from_utf8(digest).expect("hexadecimal digits"));
        }
        for name in self.disk.librbd.snapshots(&self.target).await {
            let there = self.disk.librbd.digest(&format!("{}@{name}", self.target)).await;
            assert_eq!(Some(&there), self.held.get(&name), "{when}: {}@{name}", self.target);
        }
    }

    /// Runs to the end; afterwards `verify` finds both sides equal, and the target holds what the writer wrote.
    pub(crate) async fn converge(&mut self, when: &str) {
        let in_flight = self.in_flight().await;
        let first = self.start_sync().finish().await;
        assert_eq!(first.code, Some(0), "{when}: {}", first.stderr);
        // The first run may have finished an older snapshot than the writer's last word.
        let run = if in_flight.is_some() { self.start_sync().finish().await } else { first };
        let report: serde_json::Value = serde_json::from_str(&run.expect_code(0).stdout).unwrap();
        self.check(when).await;
        let snapshot = report["snapshot"].as_str().unwrap();
        assert!(self.disk.librbd.read(&format!("{}@{snapshot}", self.target)).await == self.disk.bytes, "{when}");
        let sides = [&self.disk.image, &self.target].map(|image| format!("rbd:{image}@{snapshot}"));
        let verified = self.start(&["verify", &sides[0], &sides[1]]).finish().await.expect_code(0);
        assert!(verified.stdout.contains("equal"), "{}", verified.stdout);
        for side in [&self.disk.image, &self.target] {
            assert_eq!(
                self.disk.librbd.trashed(side).await,
                0,
                "{when}: {side} has a snapshot that nobody will remove"
            );
        }
    }

    pub(crate) async fn remove(mut self) {
        self.disk.librbd.remove(&[&self.disk.image, &self.target]).await;
    }

    /// Changes the source, and catches a run that carries it over.
    pub(crate) async fn caught_writing(&mut self) -> (Running, InFlight) {
        self.write().await;
        let caught = self.caught(&[]).await;
        self.no_throttle().await;
        caught
    }

    /// Lets the target be written as fast as may be, by whoever has it open, too.
    pub(crate) async fn no_throttle(&mut self) {
        self.disk.librbd.throttle(&self.target, 0).await;
    }

    /// Starts a sync, slowed down, and lets it come to where it writes the target; gives it back, still slow, with what
    /// is in flight.
    pub(crate) async fn caught(&mut self, words: &[&str]) -> (Running, InFlight) {
        self.disk.librbd.throttle(&self.target, 4 * MIB).await;
        let target =
            open_target(&self.env, open_source(&self.env, &self.disk.image).await.as_ref(), &self.target).await;
        let base = self.state().await.unwrap().newest().unwrap().on_target();
        let mut child = self.start_sync_with(words);
        loop {
            assert!(child.is_running(), "the run was over before it could be looked at");
            if let Some(in_flight) = self.in_flight().await
                && target.head_differs(&base).await.unwrap()
            {
                return (child, in_flight);
            }
        }
    }
}

/// A run of the binary. It doesn't outlive a test that fails, frozen or not.
pub(crate) struct Running(Option<Child>);

impl Running {
    fn child(&mut self) -> &mut Child {
        self.0.as_mut().expect("it was not waited for")
    }

    fn is_running(&mut self) -> bool {
        self.child().try_wait().unwrap().is_none()
    }

    pub(crate) fn signal(&mut self, signal: Signal) {
        // It may have ended by itself; then there is nobody to be signalled any more.
        if self.is_running() {
            let _ = kill_process(Pid::from_child(self.child()), signal);
        }
    }

    pub(crate) async fn finish(mut self) -> Run {
        let child = self.0.take().expect("it was not waited for");
        let output = tokio::task::spawn_blocking(|| child.wait_with_output()).await.unwrap().unwrap();
        let text = |bytes| String::from_utf8(bytes).expect("text");
        Run { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            // Killing fails for one that has ended, and then waiting reaps it.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// One volume's life: it is written, and a run is killed at a random moment, again and again.
async fn killed_again_and_again(env: &CephEnv, seed: u64) {
    let mut volume = Volume::new(env, &format!("kill-{seed}"), seed, 24 * MIB).await;
    let begun = Instant::now();
    volume.converge("at first").await;
    // Two cycles and a verification: about the time of the slowest single run.
    let normal = begun.elapsed();
    let mut killed = 0;
    for kill in 0..KILLS {
        volume.write().await;
        let mut child = volume.start_sync();
        // Every other run is killed soon after it has begun to move data: that is short, against two snapshots.
        let span = if kill % 2 == 0 { normal } else { Duration::from_millis(400) };
        while kill % 2 == 1 && child.is_running() && volume.in_flight().await.is_none() {
            tokio::task::yield_now().await;
        }
        // The moment is the experiment: nothing is waited for.
        let delay = span.mul_f64(volume.disk.random.f64());
        tokio::time::sleep(delay).await;
        child.signal(Signal::KILL);
        killed += u32::from(child.finish().await.code.is_none());
        let when = format!("seed {seed}, kill {kill} after {delay:?}");
        volume.check(&when).await;
        if volume.disk.random.u32(..3) == 0 {
            volume.converge(&when).await;
        }
    }
    volume.converge(&format!("seed {seed}, at the end")).await;
    println!("seed {seed}: {killed} of {KILLS} runs were killed before their end");
    assert!(killed >= KILLS / 2, "seed {seed}: only {killed} runs were still there to be killed");
    volume.remove().await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn a_run_killed_at_any_moment_is_resumed_and_no_commit_is_ever_wrong() {
    let env = ceph();
    join_all((0..VOLUMES).map(|seed| killed_again_and_again(&env, seed))).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn a_run_killed_after_a_checkpoint_goes_on_from_there() {
    let env = ceph();
    let mut volume = Volume::new(&env, "checkpoint", 10, 48 * MIB).await;
    volume.converge("at first").await;
    for offset in (0..volume.disk.size()).step_by(MIB as usize) {
        volume.disk.write_noise(offset, MIB).await;
    }
    volume.disk.librbd.throttle(&volume.target, 4 * MIB).await;
    let mut child = volume.start_sync();
    let progress_to = loop {
        assert!(child.is_running(), "the run was over before its first checkpoint");
        match volume.in_flight().await {
            Some(in_flight) if in_flight.progress_to > 0 => break in_flight.progress_to,
            _ => {}
        }
    };
    child.signal(Signal::KILL);
    child.finish().await;
    volume.no_throttle().await;
    let resumed = sync(&env, (&volume.disk.image, &volume.target), &SyncOptions::default()).await.unwrap();
    assert!(resumed.resumed && resumed.moved.bytes_written <= volume.disk.size() - progress_to, "{resumed:?}");
    volume.converge("at the end").await;
    volume.remove().await;
}

/// Promise 3: what was written to a hole in the lost snapshot, and discarded in the next, is in no delta.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn what_a_lost_snapshot_left_behind_is_put_right() {
    const OBJECT: u64 = 4 * MIB;
    let env = ceph();
    let mut volume = Volume::new(&env, "lost", 11, 48 * MIB).await;
    let holes = || (24 * MIB..48 * MIB).step_by(OBJECT as usize);
    for offset in holes() {
        volume.disk.discard(offset, OBJECT).await;
    }
    volume.converge("at first").await;
    let before = volume.disk.bytes.clone();
    for offset in holes() {
        volume.disk.write_noise(offset + 4096, 2 * MIB).await;
    }
    let (mut child, in_flight) = volume.caught(&[]).await;
    child.signal(Signal::KILL);
    assert_eq!(child.finish().await.code, None);
    volume.no_throttle().await;
    assert_eq!(volume.in_flight().await.map(|left| left.snapshot), Some(in_flight.snapshot.clone()));
    volume.check("after the kill").await;

    // The snapshot goes, and what was written is discarded: the source is what it was.
    let lost = in_flight.name;
    volume.disk.librbd.call(format!("rmsnap {} {lost}", volume.disk.image)).await;
    volume.held.remove(&lost);
    for offset in holes() {
        volume.disk.discard(offset, OBJECT).await;
    }
    assert!(volume.disk.bytes == before);
    assert!(volume.disk.librbd.read(&volume.target).await != before, "the killed run wrote nothing");
    let report = sync(&env, (&volume.disk.image, &volume.target), &SyncOptions::default()).await.unwrap();
    assert!(report.rewound && report.snapshot != lost, "{report:?}");
    let there = volume.disk.librbd.read(&format!("{}@{}", volume.target, report.snapshot)).await;
    assert!(there == before, "what the lost snapshot held is still there");
    volume.check("after the repair").await;
    volume.converge("at the end").await;
    volume.remove().await;
}

/// Freezes a run in the middle of its writes, or when only the commit is missing: that is short, and may pass between
/// two looks on a host with much else to do.
async fn freeze(volume: &mut Volume, when_applied: bool) -> (Running, InFlight) {
    for _ in 0..10 {
        let (mut run, _) = volume.caught_writing().await;
        while when_applied && run.is_running() && !volume.in_flight().await.is_some_and(|left| left.applied) {}
        run.signal(Signal::STOP);
        if let Some(left) = volume.in_flight().await.filter(|left| left.applied == when_applied) {
            return (run, left);
        }
        run.signal(Signal::CONT);
        run.finish().await.expect_code(0);
        volume.check("after a run that was too fast to be frozen").await;
    }
    panic!("no run could be frozen in ten");
}

/// A run is frozen in the middle of its writes, or when only the commit is missing; another takes over and commits.
async fn frozen(env: &CephEnv, seed: u64, tag: &str, when_applied: bool) {
    let mut volume = Volume::new(env, tag, seed, 48 * MIB).await;
    volume.converge("at first").await;
    let (mut frozen, in_flight) = freeze(&mut volume, when_applied).await;

    // Another run waits for the frozen one's watch, takes over, and finishes what was in flight.
    let begun = Instant::now();
    let second = volume.start_sync().finish().await.expect_code(0);
    println!("{tag}: taken over after {:?}", begun.elapsed());
    let report: serde_json::Value = serde_json::from_str(&second.stdout).unwrap();
    assert_eq!((report["snapshot"].as_str(), &report["resumed"]), (Some(in_flight.name.as_str()), &true.into()));
    volume.check("after the takeover").await;
    let committed = volume.disk.librbd.digest(&volume.target).await;
    let snapshots = volume.disk.librbd.snapshots(&volume.target).await;

    frozen.signal(Signal::CONT);
    let late = frozen.finish().await.expect_code(11);
    assert!(late.stderr.contains("taken the lease over"), "{}", late.stderr);
    assert_eq!(volume.disk.librbd.digest(&volume.target).await, committed, "{tag}: a late write has landed");
    assert_eq!(volume.disk.librbd.snapshots(&volume.target).await, snapshots, "{tag}: a late commit was made");
    volume.check("after the late writes").await;
    volume.write().await;
    volume.converge("at the end").await;
    volume.remove().await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn the_late_writes_of_a_frozen_run_never_land() {
    let env = ceph();
    futures::join!(frozen(&env, 12, "freeze", false), frozen(&env, 15, "freeze-applied", true));
}

/// librbd removes a snapshot in two steps, and after the first only its id finds it.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn a_removal_that_was_cut_is_finished() {
    let env = ceph();
    let mut volume = Volume::new(&env, "prune", 14, 8 * MIB).await;
    let mut trashed = 0;
    // On a host with much else to do a part of its work may be longer than a removal, now and then.
    for _ in 0..10 {
        volume.converge("before").await;
        volume.disk.change(0).await;
        let mut child = volume.start_sync();
        // It works a little at a time, and stands still while it is looked: looking takes as long as a removal does. Nor
        // is it killed as it opens an image, whose watch Ceph might keep for ever.
        while child.is_running() && volume.disk.librbd.trashed(&volume.target).await == 0 {
            child.signal(Signal::CONT);
            tokio::time::sleep(Duration::from_millis(2)).await;
            child.signal(Signal::STOP);
        }
        child.signal(Signal::KILL);
        child.finish().await;
        trashed = volume.disk.librbd.trashed(&volume.target).await;
        if trashed > 0 {
            break;
        }
    }
    assert_eq!(trashed, 1, "no removal could be cut in ten runs");
    volume.converge("after the removal was cut").await;
    volume.remove().await;
}

/// A second run says who is at it, and leaves the first alone.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn a_second_run_names_the_first() {
    let env = ceph();
    let mut volume = Volume::new(&env, "second", 13, 48 * MIB).await;
    volume.converge("at first").await;
    volume.write().await;
    let (mut first, _) = volume.caught(&[]).await;
    let second = volume.start_sync().finish().await.expect_code(6);
    volume.no_throttle().await;
    assert!(second.stderr.contains(&format!("process {} on ", first.child().id())), "{}", second.stderr);
    first.finish().await.expect_code(0);
    volume.converge("at the end").await;
    volume.remove().await;
}
