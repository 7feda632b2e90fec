//! `poolshift sync` killed with SIGKILL, or frozen, at each durable step of a cycle, on a real Ceph.
//!
//! One invariant: whatever the step, a snapshot that is on the target holds what the source's snapshot of that name
//! held, and the next run goes on from there.

use std::collections::HashMap;
use std::process::Command;
use std::time::{Duration, Instant};

use futures::future::join_all;
use poolshift::image::TargetImage;
use poolshift::image::rbd::CreateOptions;
use poolshift::pipeline::ApplyOptions;
use poolshift::replicate::SyncOptions;
use poolshift::replicate::state::{InFlight, Side, TargetState};

use crate::cutover_bed::{self, run_killed_at, stopped_and_to_be_killed, stopped_at};
use crate::librbd::{Disk, MIB, name, open_source, open_target, sync};
use crate::support::{CephEnv, Run, binary, ceph};

/// How many runs are killed at random moments, on each of [`VOLUMES`] volumes.
const KILLS: u32 = 8;
const VOLUMES: u64 = 3;

/// The durable steps of a cycle at which a run is killed, and whether it leaves something in flight there.
pub(crate) const PLACES: [(&str, bool); 14] = [
    ("cycle.intent", true),
    ("cycle.source-snapshot", true),
    ("cycle.dirty", true),
    ("cycle.resized", true),
    ("apply.batch", true),
    ("apply.batch#3", true),
    ("apply.flushed", true),
    ("cycle.applied", true),
    ("cycle.commit", true),
    ("cycle.recorded", false),
    ("prune.begun", false),
    ("prune.removed", false),
    ("prune.removed#2", false),
    ("cycle.pruned", false),
];

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

    fn command(&self, words: &[&str]) -> Command {
        let mut command = binary();
        command.arg("--ceph-conf").arg(&self.env.conf).args(["--ceph-user", &self.env.user]).args(words);
        command
    }

    fn sync_command(&self, words: &[&str]) -> Command {
        let (source, target) = (format!("rbd:{}", self.disk.image), format!("rbd:{}", self.target));
        self.command(&[&["sync", &source, &target, "--json"], words].concat())
    }

    pub(crate) fn start(&self, words: &[&str]) -> Running {
        Running(cutover_bed::Running::start(self.command(words)))
    }

    pub(crate) fn start_sync(&self) -> Running {
        self.start_sync_with(&[])
    }

    pub(crate) fn start_sync_with(&self, words: &[&str]) -> Running {
        Running(cutover_bed::Running::start(self.sync_command(words)))
    }

    /// With variables in its environment.
    pub(crate) fn start_sync_as(&self, words: &[&str], variables: &[(&'static str, String)]) -> Running {
        let mut command = self.sync_command(words);
        command.envs(variables.iter().map(|(name, value)| (*name, value)));
        Running(cutover_bed::Running::start(command))
    }

    /// A sync that is killed at a failpoint.
    pub(crate) async fn sync_killed_at(&self, failpoint: &'static str) {
        let command = self.sync_command(&[]);
        blocking(move || run_killed_at(command, failpoint)).await;
    }

    /// A sync that is stopped at a failpoint.
    pub(crate) async fn sync_stopped_at(&self, failpoint: &'static str) -> Running {
        self.sync_with_stopped_at(&[], failpoint).await
    }

    pub(crate) async fn sync_with_stopped_at(&self, words: &[&str], failpoint: &'static str) -> Running {
        let command = self.sync_command(words);
        Running(blocking(move || stopped_at(command, failpoint)).await)
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

    /// Lets the target be written as fast as may be, by whoever has it open, too. Not while that one is stopped.
    pub(crate) async fn no_throttle(&mut self) {
        self.disk.librbd.throttle(&self.target, 0).await;
    }

    /// Has the target written slowly by whoever opens it from now on.
    pub(crate) async fn throttle(&mut self, bytes_per_second: u64) {
        self.disk.librbd.throttle(&self.target, bytes_per_second).await;
    }

    /// Starts a sync that writes slowly, and gives it back, running, when it has written its first batch of several.
    pub(crate) async fn writing(&mut self) -> Running {
        self.throttle(MIB).await;
        let run = self.sync_stopped_at("apply.batch").await;
        run.resume();
        run
    }
}

/// Does what blocks its thread.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|failed| std::panic::resume_unwind(failed.into_panic()))
}

/// A run of the binary. It doesn't outlive a test that fails, frozen or not.
pub(crate) struct Running(cutover_bed::Running);

impl Running {
    pub(crate) fn resume(&self) {
        self.0.resume();
    }

    pub(crate) fn stop(&self) {
        self.0.signal(rustix::process::Signal::STOP);
    }

    /// Says whether it was still there.
    pub(crate) fn kill(self) -> bool {
        self.0.kill()
    }

    pub(crate) async fn finish(self) -> Run {
        blocking(|| self.0.finish()).await
    }
}

/// A volume whose runs are killed at some of the places, each of which is reached.
async fn killed_at_each(env: &CephEnv, seed: u64, places: Vec<(&'static str, bool)>) {
    let mut volume = Volume::new(env, &format!("step-{seed}"), seed, 24 * MIB).await;
    volume.converge("at first").await;
    for (place, in_flight) in places {
        volume.write().await;
        if place == "cycle.resized" {
            volume.disk.resize(volume.disk.size() + 4 * MIB).await;
        }
        volume.sync_killed_at(place).await;
        let left = volume.state().await.expect("it has a state").in_flight;
        assert_eq!(left.is_some(), in_flight, "{place}: {left:?}");
        volume.check(place).await;
        volume.converge(place).await;
    }
    volume.remove().await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn a_run_killed_at_each_step_is_resumed_and_no_commit_is_ever_wrong() {
    let env = ceph();
    let share = |seed: u64| PLACES.iter().skip(seed as usize).step_by(VOLUMES as usize).copied().collect();
    join_all((0..VOLUMES).map(|seed| killed_at_each(&env, seed, share(seed)))).await;
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
        // Every other run is killed soon after it has begun to move data: that is short, against two snapshots.
        let child = if kill % 2 == 0 {
            volume.start_sync()
        } else {
            let run = volume.sync_stopped_at("cycle.dirty").await;
            run.resume();
            run
        };
        let span = if kill % 2 == 0 { normal } else { Duration::from_millis(400) };
        // The moment is the experiment: nothing is waited for.
        let delay = span.mul_f64(volume.disk.random.f64());
        tokio::time::sleep(delay).await;
        killed += u32::from(child.kill());
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
#[ignore = "exhaustive; needs Ceph"]
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
    let command = volume.sync_command(&[]);
    let run = blocking(|| stopped_and_to_be_killed(command, "apply.batch", "cycle.checkpoint")).await;
    // A checkpoint is due at the next batch after that.
    tokio::time::sleep(ApplyOptions::default().checkpoint_every).await;
    run.resume();
    blocking(|| run.expect_killed_at("cycle.checkpoint")).await;
    let progress_to = volume.in_flight().await.expect("it is in the middle of its writes").progress_to;
    assert!(progress_to > 0, "the checkpoint was not kept");
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
    volume.sync_killed_at("apply.batch").await;
    let in_flight = volume.in_flight().await.expect("it was in the middle of its writes");
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
    // The repair is killed as well, when HEAD is what it was.
    volume.sync_killed_at("cycle.rewound").await;
    assert!(volume.disk.librbd.read(&volume.target).await == before, "it is not rewound");
    let report = sync(&env, (&volume.disk.image, &volume.target), &SyncOptions::default()).await.unwrap();
    assert!(report.resumed && report.snapshot != lost, "{report:?}");
    let there = volume.disk.librbd.read(&format!("{}@{}", volume.target, report.snapshot)).await;
    assert!(there == before, "what the lost snapshot held is still there");
    volume.check("after the repair").await;
    volume.converge("at the end").await;
    volume.remove().await;
}

/// A run is frozen in the middle of its writes, or when only the commit is missing; another takes over and commits.
async fn frozen(env: &CephEnv, seed: u64, tag: &str, place: &'static str) {
    let mut volume = Volume::new(env, tag, seed, 48 * MIB).await;
    volume.converge("at first").await;
    volume.write().await;
    // The batches after the first one wait in librbd, and would be the late writes.
    volume.throttle(4 * MIB).await;
    let frozen = volume.sync_stopped_at(place).await;
    let in_flight = volume.in_flight().await.expect("nothing is committed");
    assert_eq!(in_flight.applied, place == "cycle.applied");

    // Another run waits for the frozen one's watch, takes over, and finishes what was in flight.
    let begun = Instant::now();
    let second = volume.start_sync().finish().await.expect_code(0);
    println!("{tag}: taken over after {:?}", begun.elapsed());
    let report: serde_json::Value = serde_json::from_str(&second.stdout).unwrap();
    assert_eq!((report["snapshot"].as_str(), &report["resumed"]), (Some(in_flight.name.as_str()), &true.into()));
    volume.check("after the takeover").await;
    let committed = volume.disk.librbd.digest(&volume.target).await;
    let snapshots = volume.disk.librbd.snapshots(&volume.target).await;

    frozen.resume();
    // Another process took the target over.
    frozen.finish().await.expect_code(11);
    assert_eq!(volume.disk.librbd.digest(&volume.target).await, committed, "{tag}: a late write has landed");
    assert_eq!(volume.disk.librbd.snapshots(&volume.target).await, snapshots, "{tag}: a late commit was made");
    volume.check("after the late writes").await;
    volume.no_throttle().await;
    volume.write().await;
    volume.converge("at the end").await;
    volume.remove().await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn the_late_writes_of_a_frozen_run_never_land() {
    let env = ceph();
    futures::join!(frozen(&env, 12, "freeze", "apply.batch"), frozen(&env, 15, "freeze-applied", "cycle.applied"));
}

/// librbd removes a snapshot in two steps, and after the first only its id finds it.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn a_removal_that_was_cut_is_finished() {
    let env = ceph();
    let mut volume = Volume::new(&env, "prune", 14, 8 * MIB).await;
    volume.converge("before").await;
    for side in [Side::Target, Side::Source] {
        volume.disk.change(0).await;
        volume.sync_killed_at("prune.begun").await;
        let retired = volume.state().await.expect("it has a state").retired;
        let retired = retired.iter().find(|retired| retired.side == side).expect("one is to be removed");
        let image = if side == Side::Target { &volume.target } else { &volume.disk.image };
        volume.disk.librbd.call(format!("trash-snapshot {image} {}", retired.id)).await;
        assert_eq!(volume.disk.librbd.trashed(image).await, 1);
        volume.converge(&format!("after a removal on the {side:?} was cut")).await;
    }
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
    let first = volume.writing().await;
    let second = volume.start_sync().finish().await.expect_code(6);
    volume.no_throttle().await;
    assert!(second.stderr.contains(&format!("process {} on ", first.0.id())), "{}", second.stderr);
    first.finish().await.expect_code(0);
    volume.converge("at the end").await;
    volume.remove().await;
}
