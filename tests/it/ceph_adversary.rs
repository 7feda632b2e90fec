//! A volume that is synced for hours while all that its surroundings may do to it happens at random: runs are killed and
//! stopped, clocks are wrong, another client writes to the target or has its lock, options are overridden, snapshots are
//! removed.
//!
//! Two invariants, checked after every step: a snapshot of the target holds what the source's snapshot of that name held
//! when it was first seen, and goes on to hold that. And what another client wrote to the target is reported.

use std::fmt::Write as _;
use std::time::{Duration, Instant};

use crate::ceph_backend::rbd;
use crate::ceph_crash::{PLACES, Running, Volume};
use crate::librbd::{KIB, MIB};
use crate::support::{CephEnv, Run, ceph};

/// The volume's own writer leaves this beginning of the image alone: another client that writes there writes beside
/// every delta.
const APART: u64 = 4 * MIB;
const SIZE: u64 = 24 * MIB;

/// What a step does, and of so many steps how many do it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Step {
    Sync,
    KilledAtPlace,
    KilledAtAnyMoment,
    Stopped,
    GoesOn,
    ForeignWrite,
    ForeignLock,
    Override,
    SnapshotRemoved,
    NamedTwice,
}

const STEPS: [(Step, u32); 10] = [
    (Step::Sync, 6),
    (Step::KilledAtPlace, 6),
    (Step::KilledAtAnyMoment, 4),
    (Step::Stopped, 3),
    (Step::GoesOn, 2),
    (Step::ForeignWrite, 4),
    (Step::ForeignLock, 1),
    (Step::Override, 3),
    (Step::SnapshotRemoved, 1),
    (Step::NamedTwice, 2),
];

/// Options that a site may have set on an image, with values that are unlike the defaults.
const OVERRIDES: [(&str, &str); 6] = [
    ("rbd_blocklist_on_break_lock", "false"),
    ("rbd_blocklist_expire_seconds", "1"),
    ("rbd_cache", "false"),
    ("rbd_skip_partial_discard", "false"),
    ("rbd_qos_write_bps_limit", "16777216"),
    ("rbd_read_from_replica_policy", "balance"),
];

/// How far off the clock of a run is, in seconds.
const CLOCKS: [&str; 5] = ["0", "0", "-7200", "7200", "-86400"];

struct Adversary {
    volume: Volume,
    stopped: Vec<Running>,
    /// Another client has written to the target's HEAD, and no run has reported it.
    is_foreign: bool,
    /// A snapshot was removed from the source since the last whole run: where it was what a killed run had begun with, the
    /// next one rewinds HEAD, and what another client wrote there goes unseen.
    may_rewind: bool,
    log: String,
    syncs: u32,
    refusals: u32,
}

impl Adversary {
    async fn new(env: &CephEnv, seed: u64) -> Self {
        let mut volume = Volume::new(env, &format!("adversary-{seed}"), seed, SIZE).await;
        volume.converge("at first").await;
        let (stopped, log) = (Vec::new(), String::new());
        Self { volume, stopped, is_foreign: false, may_rewind: false, log, syncs: 0, refusals: 0 }
    }

    fn random(&mut self, below: usize) -> usize {
        self.volume.disk.random.usize(..below)
    }

    /// A run that is started with a clock of its own.
    fn words(&mut self) -> Vec<(&'static str, String)> {
        let clock = CLOCKS[self.random(CLOCKS.len())];
        vec![("POOLSHIFT_CLOCK_OFFSET", clock.to_owned())]
    }

    fn note(&mut self, what: std::fmt::Arguments<'_>) {
        writeln!(self.log, "{what}").expect("a string takes all");
    }

    async fn write(&mut self) {
        for _ in 0..1 + self.random(6) {
            self.volume.disk.change(APART).await;
        }
    }

    /// A run to its end. What another client wrote is reported, or comes after the snapshot that an earlier run made.
    async fn sync(&mut self) {
        let in_flight = self.volume.in_flight().await;
        let variables = self.words();
        let run = self.volume.start_sync_as(&["--keep", "3"], &variables).finish().await;
        let is_foreign = self.is_foreign;
        self.note(format_args!("  exit {:?}, foreign {is_foreign}", run.code));
        self.syncs += 1;
        match run.code {
            Some(0) => {
                let report: serde_json::Value = serde_json::from_str(&run.stdout).expect("a report");
                let snapshot = report["snapshot"].as_str().expect("a name").to_owned();
                let was_made = in_flight.is_some_and(|in_flight| in_flight.applied && in_flight.name == snapshot);
                let is_excused = was_made || self.may_rewind;
                assert!(!self.is_foreign || is_excused, "what another client wrote was not reported:\n{}", self.log);
                if report["resumed"] == false {
                    (self.is_foreign, self.may_rewind) = (false, false);
                }
                if report["resumed"] == false {
                    let there = self.volume.disk.librbd.read(&format!("{}@{snapshot}", self.volume.target)).await;
                    assert!(there == self.volume.disk.bytes, "{snapshot} is not what was written:\n{}", self.log);
                }
            }
            Some(4) => self.start_over(run).await,
            _ => panic!("exit {:?}: {}\n{}", run.code, run.stderr, self.log),
        }
    }

    /// A conflict is decided for the source.
    async fn start_over(&mut self, run: Run) {
        let conflict = run.stderr.lines().find(|line| line.starts_with("error")).unwrap_or_default().to_owned();
        self.note(format_args!("  {conflict}"));
        self.refusals += 1;
        let full = self.volume.start_sync_with(&["--full", "--keep", "3"]).finish().await;
        assert_eq!(full.code, Some(0), "{}\n{}", full.stderr, self.log);
        (self.is_foreign, self.may_rewind) = (false, false);
    }

    async fn foreign_write(&mut self) {
        let is_clean = self.volume.state().await.is_none_or(|state| state.in_flight.is_none());
        let size = if is_clean && self.stopped.is_empty() { self.volume.disk.size() } else { APART };
        let offset = self.volume.disk.random.u64(0..size - 64 * KIB);
        let data = self.volume.disk.noise(64 * KIB);
        let target = self.volume.target.clone();
        let librbd = &mut self.volume.disk.librbd;
        let written = librbd.try_call(&format!("write {target} {offset}"), &data).await;
        let flushed = librbd.try_call(&format!("flush {target}"), b"").await;
        self.is_foreign |= written.is_ok() && flushed.is_ok();
        self.note(format_args!("  {written:?} {flushed:?} at {offset}"));
        self.volume.disk.librbd.call(format!("close {target}")).await;
    }

    /// Another client has the target open, and its lock: a run is refused, and leaves it alone.
    async fn foreign_lock(&mut self) {
        if !self.stopped.is_empty() {
            return;
        }
        let target = self.volume.target.clone();
        let locked = self.volume.disk.librbd.try_call(&format!("lock {target}"), b"").await;
        self.note(format_args!("  {locked:?}"));
        if locked.is_ok() {
            let run = self.volume.start_sync().finish().await;
            assert_eq!(run.code, Some(6), "{}\n{}", run.stderr, self.log);
            let owns = self.volume.disk.librbd.call(format!("owns {target}")).await;
            assert_eq!(owns, b"1", "the lock was taken from a live client:\n{}", self.log);
        }
        self.volume.disk.librbd.call(format!("close {target}")).await;
    }

    async fn set_override(&mut self) {
        // librbd waits to hear of it from all who have the image open.
        if !self.stopped.is_empty() {
            return;
        }
        let (option, value) = OVERRIDES[self.random(OVERRIDES.len())];
        let image = if self.random(4) == 0 { &self.volume.disk.image } else { &self.volume.target }.clone();
        let is_set = self.random(3) > 0;
        self.note(format_args!("  {image} {option} {is_set}"));
        let env = self.volume.env.clone();
        let words = if is_set {
            vec!["config", "image", "set", image.as_str(), option, value]
        } else {
            vec!["config", "image", "remove", image.as_str(), option]
        };
        // One that is not set can't be removed.
        assert!(rbd(&env, &words) || !is_set, "{words:?}");
    }

    /// Any snapshot of the source: the base, what is in flight, or one that is only kept.
    async fn remove_snapshot(&mut self) {
        let image = self.volume.disk.image.clone();
        let names = self.volume.disk.librbd.snapshots(&image).await;
        if names.is_empty() {
            return;
        }
        let name = names[self.random(names.len())].clone();
        self.note(format_args!("  {name}"));
        self.volume.disk.librbd.call(format!("rmsnap {image} {name}")).await;
        self.may_rewind = true;
    }

    /// The name of what both sides hold, which is a success, and that of what they held, which is none.
    async fn name_twice(&mut self) {
        let name = format!("mine-{}", self.syncs);
        let run = self.volume.start_sync_with(&["--snapshot", &name, "--keep", "3"]).finish().await;
        self.note(format_args!("  exit {:?}", run.code));
        if run.code == Some(4) {
            return self.start_over(run).await;
        }
        run.expect_code(0);
        assert!(!self.is_foreign || self.may_rewind, "what another client wrote was not reported:\n{}", self.log);
        (self.is_foreign, self.may_rewind) = (false, false);
        self.volume.check("after a name").await;
        self.volume.start_sync_with(&["--snapshot", &name]).finish().await.expect_code(0);
        self.volume.disk.write_noise(APART + 7, 5).await;
        self.volume.start_sync_with(&["--snapshot", &name]).finish().await.expect_code(4);
        let (image, target) = (self.volume.disk.image.clone(), self.volume.target.clone());
        self.sync().await;
        for side in [image, target] {
            let _ = self.volume.disk.librbd.try_call(&format!("rmsnap {side} {name}"), b"").await;
            self.volume.disk.librbd.call(format!("close {side}")).await;
        }
    }

    async fn step(&mut self, step: Step) {
        let variables = self.words();
        match step {
            Step::Sync => self.sync().await,
            Step::KilledAtPlace => {
                let place = PLACES[self.random(PLACES.len())].0;
                self.note(format_args!("  {place}"));
                let at = ("POOLSHIFT_FAILPOINT", format!("{place}=kill"));
                let variables = [variables, vec![at]].concat();
                let run = self.volume.start_sync_as(&["--keep", "3"], &variables).finish().await;
                match run.code {
                    Some(4) => self.start_over(run).await,
                    // The place was not reached: nothing was left to do there.
                    Some(0) => {}
                    code => assert_eq!(code, None, "{}\n{}", run.stderr, self.log),
                }
            }
            Step::KilledAtAnyMoment => {
                let run = self.volume.start_sync_as(&["--keep", "3"], &variables);
                // The moment is the experiment: nothing is waited for.
                let delay = Duration::from_millis(self.random(2000) as u64);
                tokio::time::sleep(delay).await;
                let was_there = run.kill();
                self.note(format_args!("  after {delay:?}: {was_there}"));
            }
            Step::Stopped => {
                let run = self.volume.start_sync_as(&["--keep", "3"], &variables);
                let delay = Duration::from_millis(self.random(2000) as u64);
                tokio::time::sleep(delay).await;
                run.stop();
                self.note(format_args!("  after {delay:?}"));
                self.stopped.push(run);
            }
            Step::GoesOn => {
                if let Some(run) = self.stopped.pop() {
                    run.resume();
                    let run = run.finish().await;
                    self.note(format_args!("  exit {:?}", run.code));
                    assert!(matches!(run.code, Some(0 | 4 | 6 | 7 | 11)), "{}\n{}", run.stderr, self.log);
                }
            }
            Step::ForeignWrite => self.foreign_write().await,
            Step::ForeignLock => self.foreign_lock().await,
            Step::Override => self.set_override().await,
            Step::SnapshotRemoved => self.remove_snapshot().await,
            Step::NamedTwice => self.name_twice().await,
        }
    }

    /// Steps at random until the time is over; the volume is good at the end.
    async fn run(mut self, seed: u64, until: impl Fn(u32) -> bool) {
        let all: Vec<Step> = STEPS.iter().flat_map(|(step, weight)| vec![*step; *weight as usize]).collect();
        let mut number = 0;
        while until(number) {
            number += 1;
            if self.random(3) > 0 {
                self.write().await;
            }
            let step = all[self.random(all.len())];
            self.note(format_args!("{number}: {step:?}"));
            self.step(step).await;
            self.volume.check(&format!("seed {seed}, step {number}:\n{}", self.log)).await;
        }
        for run in std::mem::take(&mut self.stopped) {
            run.resume();
            run.finish().await;
            self.volume.check(&format!("seed {seed}, when a stopped run has ended:\n{}", self.log)).await;
        }
        self.sync().await;
        self.volume.converge("at the end").await;
        println!("seed {seed}: {number} steps, {} syncs, {} conflicts, 0 wrong snapshots", self.syncs, self.refusals);
        // The images stay, with the cluster: the watch of a run that was killed as it opened one may not time out.
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn whatever_others_do_for_some_steps_no_commit_is_ever_wrong() {
    let env = ceph();
    Adversary::new(&env, 7).await.run(7, |number| number < 25).await;
}

/// For two hours, with a seed that is printed; `POOLSHIFT_TEST_SECONDS` gives another time.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "exhaustive; needs Ceph"]
async fn whatever_others_do_for_hours_no_commit_is_ever_wrong() {
    let env = ceph();
    let given = std::env::var("POOLSHIFT_TEST_SECONDS").ok().map(|text| text.parse().expect("seconds"));
    let (begun, time) = (Instant::now(), Duration::from_secs(given.unwrap_or(7200)));
    while begun.elapsed() < time {
        let seed = fastrand::u64(..1 << 32);
        println!("seed {seed}");
        Adversary::new(&env, seed).await.run(seed, |number| number < 200 && begun.elapsed() < time).await;
    }
}
