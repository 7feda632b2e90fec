//! The rules one by one, and a simulation of 500 volumes over 30 days.

use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::fleet::predict::{CostModel, SlowMean, convergence};
use crate::fleet::status::Convergence;

const MINUTE: Millis = 60_000;
const HOUR: Millis = 60 * MINUTE;
const DAY: Millis = 24 * HOUR;

fn limits(volumes: usize, first_syncs: usize) -> FleetLimits {
    FleetLimits { volumes, first_syncs, volumes_per_pool: volumes, memory: 256 << 20 }
}

fn pace(interval: Millis) -> Pace {
    let interval = Duration::from_millis(interval as u64);
    Pace { interval, idle_interval: 6 * interval, target_lag: 3 * interval }
}

fn demand(volumes: usize) -> Demand {
    Demand { pools: BTreeMap::from([(Some("sata".to_owned()), volumes)]), pace: pace(5 * MINUTE) }
}

fn scheduler(names: &[&str], volumes: usize, first_syncs: usize) -> Scheduler {
    let mut scheduler = Scheduler::new(limits(volumes, first_syncs), 1);
    for name in names {
        scheduler.insert(name, demand(1), false, 0);
    }
    scheduler
}

#[test]
fn the_most_lagging_comes_first_and_limits_hold() {
    let mut scheduler = scheduler(&["a", "b", "c"], 2, 2);
    scheduler.found("a", Some(-10 * MINUTE));
    scheduler.found("b", Some(-30 * MINUTE));
    scheduler.found("c", Some(-20 * MINUTE));
    assert_eq!(scheduler.start_due(0), ["b", "c"]);
    assert!(scheduler.start_due(0).is_empty());
    scheduler.finish("b", 5_000, Outcome::Committed { point: 0, next_seconds: Some(1.0) });
    assert_eq!(scheduler.start_due(5_000), ["a"]);
    // Not before its interval is over.
    scheduler.finish("a", 6_000, Outcome::Committed { point: 5_000, next_seconds: None });
    assert!(scheduler.start_due(4 * MINUTE).is_empty());
    assert_eq!(scheduler.start_due(5 * MINUTE + 1), ["b"]);
}

#[test]
fn first_copies_never_take_all_places() {
    let mut scheduler = scheduler(&["big1", "big2", "big3", "small"], 2, 8);
    scheduler.found("small", Some(0));
    let started = scheduler.start_due(1);
    assert_eq!(started.len(), 2);
    assert!(started.contains(&"small".to_owned()), "{started:?}");
}

#[test]
fn a_server_of_many_volumes_is_not_overtaken_for_ever() {
    let mut scheduler = scheduler(&["s1", "s2", "s3", "s4"], 4, 2);
    scheduler.insert("wide", demand(4), false, 0);
    for name in ["s1", "s2", "s3", "s4", "wide"] {
        scheduler.found(name, Some(0));
    }
    // The small ones come again at once, whenever they may; still the wide one gets its turn.
    let mut now = 0;
    let mut turns = 0;
    while now < 2 * HOUR {
        for name in scheduler.start_due(now) {
            turns += usize::from(name == "wide");
        }
        now += 10_000;
        for name in ["s1", "s2", "s3", "s4", "wide"] {
            let view = scheduler.view(name).unwrap();
            if matches!(view.phase, Phase::Running { since } if now - since >= 20_000 + 1_000 * name.len() as i64) {
                scheduler.finish(name, now, Outcome::Committed { point: now, next_seconds: None });
                scheduler.sync_now(name, now);
            }
        }
    }
    assert!(turns >= 10, "{turns}");
}

#[test]
fn a_server_wider_than_what_first_copies_leave_is_not_kept_by_them() {
    let mut scheduler = Scheduler::new(limits(8, 4), 1);
    for index in 0..8 {
        scheduler.insert(&format!("big{index}"), demand(1), false, -HOUR);
    }
    scheduler.insert("wide", demand(6), false, 0);
    scheduler.insert("small", demand(1), false, 0);
    scheduler.found("wide", Some(0));
    scheduler.found("small", Some(0));
    // Four first copies that never end; what is left goes to the others in turn.
    let (mut wide, mut small, mut now) = (0, 0, 0);
    for _ in 0..20 {
        let started = scheduler.start_due(now);
        now += 5 * MINUTE;
        for name in started {
            match name.as_str() {
                "wide" => wide += 1,
                "small" => small += 1,
                _ => continue,
            }
            scheduler.finish(&name, now, Outcome::Committed { point: now, next_seconds: Some(1.0) });
        }
    }
    assert!(wide >= 5 && small >= 5, "{wide} {small}");
}

#[test]
fn first_copies_get_their_turn_among_servers_that_are_always_due() {
    // As many volumes each as leave no place over, all of one pool, whose cycles take as long as their interval.
    for width in [1, 3] {
        let mut scheduler = Scheduler::new(limits(12, 6), 1);
        for index in 0..16 {
            scheduler.insert(&format!("s{index:02}"), demand(if index < 12 { width } else { 3 }), false, 0);
        }
        for index in 0..12 {
            scheduler.found(&format!("s{index:02}"), Some(0));
        }
        let (mut now, mut first) = (0, BTreeSet::new());
        while now < 4 * HOUR {
            let started = scheduler.start_due(now);
            first.extend(started.into_iter().filter(|name| name.as_str() >= "s12"));
            now += 10_000;
            for index in 0..16 {
                let (name, stagger) = (format!("s{index:02}"), index as Millis * 10_000);
                let phase = scheduler.view(&name).unwrap().phase;
                if matches!(phase, Phase::Running { since } if now - since >= 5 * MINUTE + stagger) {
                    scheduler.finish(&name, now, Outcome::Committed { point: now, next_seconds: None });
                }
            }
        }
        assert_eq!(first.len(), 4, "servers of {width} volumes keep all places");
    }
}

#[test]
fn a_long_delta_stays_long_while_it_runs() {
    let mut scheduler = scheduler(&["a"], 8, 4);
    scheduler.found("a", Some(0));
    scheduler.start_due(0);
    scheduler.finish("a", MINUTE, Outcome::Committed { point: 0, next_seconds: Some(1e6) });
    scheduler.start_due(HOUR);
    scheduler.found("a", Some(0));
    assert!(scheduler.view("a").unwrap().long);
}

#[test]
fn a_server_wider_than_the_limit_takes_what_there_is() {
    let mut scheduler = Scheduler::new(limits(4, 2), 1);
    for name in ["wide", "other", "third", "fourth"] {
        scheduler.insert(name, demand(if name == "wide" { 9 } else { 1 }), false, 0);
        scheduler.found(name, Some(if name == "wide" { -HOUR } else { 0 }));
    }
    // Two of four places: long jobs may have the other two.
    assert_eq!(scheduler.start_due(0), ["wide", "fourth", "other"]);
    assert!(scheduler.start_due(MINUTE).is_empty());
    scheduler.finish("wide", MINUTE, Outcome::Unchanged { looked: MINUTE });
    assert_eq!(scheduler.start_due(MINUTE), ["third"]);
}

#[test]
fn a_full_pool_keeps_no_other_pool_waiting() {
    let mut scheduler = Scheduler::new(FleetLimits { volumes_per_pool: 1, ..limits(8, 4) }, 1);
    for (name, pool) in [("a1", "a"), ("a2", "a"), ("b1", "b")] {
        let pools = BTreeMap::from([(Some(pool.to_owned()), 1)]);
        scheduler.insert(name, Demand { pools, pace: pace(MINUTE) }, false, 0);
        scheduler.found(name, Some(-HOUR));
    }
    assert_eq!(scheduler.start_due(0), ["a1", "b1"]);
}

#[test]
fn failures_back_off_with_jitter_and_permanent_ones_hold() {
    let mut scheduler = scheduler(&["a", "b"], 8, 4);
    scheduler.found("a", Some(0));
    scheduler.found("b", Some(0));
    let mut now = 0;
    let mut waits = Vec::new();
    for _ in 0..12 {
        assert!(scheduler.start_due(now).contains(&"a".to_owned()));
        scheduler.finish("a", now, Outcome::Failed { retryable: true });
        let due = scheduler.view("a").unwrap().due;
        waits.push(due - now);
        now = due;
    }
    assert!(waits.iter().all(|&wait| (PAUSE_LEAST..=BACK_OFF_MOST * 5 / 4).contains(&wait)), "{waits:?}");
    assert!(waits[0] >= 3_750 && waits[11] >= BACK_OFF_MOST * 3 / 4, "{waits:?}");
    scheduler.finish("b", now, Outcome::Failed { retryable: false });
    assert_eq!(scheduler.view("b").unwrap().phase, Phase::Held);
    assert!(scheduler.start_due(now + DAY).iter().all(|name| name != "b"));
    scheduler.resume("b", now);
    assert_eq!(scheduler.view("b").unwrap().phase, Phase::Waiting);
}

#[test]
fn idle_servers_are_looked_at_less_often_but_within_the_wanted_lag() {
    let mut scheduler = scheduler(&["a"], 8, 4);
    scheduler.found("a", Some(0));
    let mut now = 0;
    let mut waits = Vec::new();
    for _ in 0..6 {
        assert_eq!(scheduler.start_due(now), ["a"]);
        scheduler.finish("a", now, Outcome::Unchanged { looked: now });
        let due = scheduler.view("a").unwrap().due;
        waits.push((due - now) / MINUTE);
        now = due;
    }
    // The plan wants 15 minutes of lag: half of that is the slowest, though the idle interval is 30.
    assert_eq!(waits, [5, 7, 7, 7, 7, 7]);
    scheduler.start_due(now);
    scheduler.finish("a", now, Outcome::Committed { point: now, next_seconds: Some(1.0) });
    assert_eq!(scheduler.view("a").unwrap().due - now, 5 * MINUTE);
}

#[test]
fn pausing_waits_for_the_end_of_what_runs() {
    let mut scheduler = scheduler(&["a"], 8, 4);
    scheduler.start_due(0);
    scheduler.pause("a");
    assert!(matches!(scheduler.view("a").unwrap().phase, Phase::Running { .. }));
    scheduler.finish("a", 10, Outcome::Interrupted);
    assert_eq!(scheduler.view("a").unwrap().phase, Phase::Paused);
    scheduler.sync_now("a", 20);
    assert!(scheduler.start_due(DAY).is_empty());
    scheduler.resume("a", DAY);
    assert_eq!(scheduler.start_due(DAY), ["a"]);
    scheduler.sync_now("a", DAY);
    scheduler.finish("a", DAY + 10, Outcome::Committed { point: DAY, next_seconds: None });
    assert_eq!(scheduler.start_due(DAY + 10), ["a"], "asked for while it ran");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn no_order_of_events_breaks_a_limit_or_loses_a_job(
        volumes in 1usize..6,
        first in 1usize..6,
        per_pool in 1usize..6,
        widths in prop::collection::vec((1usize..8, 0usize..3), 1..8),
        steps in prop::collection::vec((0usize..8, 0u8..8, 0i64..20_000), 0..120),
    ) {
        let limits = FleetLimits { volumes, first_syncs: first, volumes_per_pool: per_pool, memory: 1 };
        let mut scheduler = Scheduler::new(limits, 7);
        for (index, (width, pool)) in widths.iter().enumerate() {
            let pools = BTreeMap::from([(Some(format!("p{pool}")), *width)]);
            scheduler.insert(&format!("j{index}"), Demand { pools, pace: pace(MINUTE) }, false, 0);
        }
        let mut now = 0;
        for (which, what, wait) in steps {
            now += wait;
            let name = format!("j{}", which % widths.len());
            let before = scheduler.view(&name).unwrap();
            match what {
                0 => scheduler.pause(&name),
                1 => scheduler.resume(&name, now),
                2 => scheduler.sync_now(&name, now),
                3 => scheduler.finish(&name, now, Outcome::Failed { retryable: true }),
                4 => scheduler.finish(&name, now, Outcome::Unchanged { looked: now }),
                5 => scheduler.finish(&name, now, Outcome::Interrupted),
                _ => scheduler.finish(&name, now, Outcome::Committed { point: now, next_seconds: Some(1.0) }),
            }
            let started = scheduler.start_due(now);
            let after = scheduler.view(&name).unwrap();
            let ran = matches!(before.phase, Phase::Running { .. });
            let goes_on = matches!(after.phase, Phase::Running { since } if since < now);
            prop_assert!(what < 3 || !ran || !goes_on);
            let jobs = scheduler.jobs.values().filter(|job| matches!(job.phase, Phase::Running { .. }));
            // Where there is but one place, a long job and another one each count as what they are: one.
            let running: usize = jobs.map(|job| places(job.demand.volumes(), volumes, job.long, &limits)).sum();
            prop_assert!(running <= volumes, "{running} of {volumes}");
            prop_assert!(started.len() <= volumes);
        }
        // Whatever happened, everything runs again once it is resumed.
        for index in 0..widths.len() {
            scheduler.resume(&format!("j{index}"), now);
        }
        let mut ran = BTreeSet::new();
        for _ in 0..400 {
            now += MINUTE;
            for (index, _) in widths.iter().enumerate() {
                scheduler.finish(&format!("j{index}"), now, Outcome::Committed { point: now, next_seconds: None });
            }
            ran.extend(scheduler.start_due(now));
        }
        prop_assert_eq!(ran.len(), widths.len());
    }
}

/// A server of the simulation: what it holds, what it changes, and what was learned of it.
struct Simulated {
    name: String,
    volumes: usize,
    bytes: f64,
    /// Bytes a second, when it works.
    rate: f64,
    /// Whether it can never keep up: it changes more than can be moved.
    hopeless: bool,
    /// Works by day only.
    by_day: bool,
    since: Millis,
    point: Option<Millis>,
    model: CostModel,
    mean_rate: SlowMean,
    worst_lag: Millis,
    cycles: u64,
}

/// Bytes a second that one volume is moved at.
const SPEED: f64 = 60e6;

impl Simulated {
    fn new(index: usize, random: &mut fastrand::Rng) -> Self {
        let volumes = [1, 1, 2, 3, 4, 6, 12][random.usize(..7)];
        let hopeless = index % 40 == 39;
        let rate = if hopeless { SPEED * volumes as f64 * 1.5 } else { SPEED * random.f64().powi(6) * 0.5 };
        Self {
            name: format!("server-{index:03}"),
            volumes,
            // Who changes more than can be moved, and so much that all of it takes longer than the lag that is wanted.
            bytes: if hopeless { 2e12 * volumes as f64 } else { 20e9 + 3e12 * random.f64().powi(4) },
            rate,
            hopeless,
            by_day: random.bool(),
            since: 0,
            point: None,
            model: CostModel::default(),
            mean_rate: SlowMean::default(),
            worst_lag: 0,
            cycles: 0,
        }
    }

    /// What has changed between two times, or all of it where there is no point yet.
    fn changed(&self, until: Millis) -> f64 {
        let Some(point) = self.point else { return self.bytes };
        let works = |at: Millis| !self.by_day || (8..20).contains(&(at / HOUR % 24));
        // By the hour is exact enough.
        let (mut at, mut seconds) = (point, 0.0);
        while at < until {
            let next = ((at / HOUR + 1) * HOUR).min(until);
            seconds += if works(at) { (next - at) as f64 / 1000.0 } else { 0.0 };
            at = next;
        }
        (self.rate * seconds).min(self.bytes)
    }
}

struct Simulation {
    scheduler: Scheduler,
    servers: Vec<Simulated>,
    random: fastrand::Rng,
    /// What runs: the end, the server, the start, its bytes.
    running: Vec<(Millis, usize, Millis, f64)>,
    now: Millis,
    trace: u64,
}

impl Simulation {
    fn new(seed: u64) -> Self {
        let mut random = fastrand::Rng::with_seed(seed);
        let limits = FleetLimits { volumes: 48, first_syncs: 24, volumes_per_pool: 40, memory: 1 << 30 };
        let mut scheduler = Scheduler::new(limits, seed);
        let (mut servers, mut volumes) = (Vec::new(), 0);
        while volumes < 500 {
            let mut server = Simulated::new(servers.len(), &mut random);
            server.volumes = server.volumes.min(500 - volumes);
            volumes += server.volumes;
            let pool = if random.u8(..3) == 0 { "sata-2" } else { "sata" };
            let pools = BTreeMap::from([(Some(pool.to_owned()), server.volumes)]);
            let hour = Duration::from_secs(3600);
            let pace = Pace { interval: hour, idle_interval: 6 * hour, target_lag: 4 * hour };
            scheduler.insert(&server.name, Demand { pools, pace }, false, 0);
            servers.push(server);
        }
        Self { scheduler, servers, random, running: Vec::new(), now: 0, trace: 0 }
    }

    fn start(&mut self) {
        for name in self.scheduler.start_due(self.now) {
            let index = self.servers.iter().position(|server| server.name == name).unwrap();
            let server = &self.servers[index];
            let bytes = server.changed(self.now);
            let seconds = if bytes == 0.0 { 0.05 } else { 2.0 + bytes / (SPEED * server.volumes as f64) };
            self.running.push((self.now + (seconds * 1000.0) as Millis, index, self.now, bytes));
        }
        assert!(self.scheduler.volumes_running() <= 48);
    }

    fn end(&mut self, position: usize) {
        let (end, index, begun, bytes) = self.running.swap_remove(position);
        let fails = self.random.u16(..200) == 0;
        let server = &mut self.servers[index];
        self.trace = self.trace.wrapping_mul(6364136223846793005).wrapping_add(end as u64 ^ index as u64);
        let outcome = if fails {
            Outcome::Failed { retryable: true }
        } else if bytes == 0.0 {
            server.point = Some(begun);
            Outcome::Unchanged { looked: begun }
        } else {
            let seconds = (end - begun) as f64 / 1000.0;
            server.model.observe(bytes as u64, seconds);
            if let Some(point) = server.point {
                let span = (begun - point).max(1) as f64 / 1000.0;
                server.mean_rate.observe(bytes / span, 0.3);
            }
            server.point = Some(begun);
            server.cycles += 1;
            let next = server.model.predict((server.mean_rate.get().unwrap_or(0.0) * 3600.0) as u64);
            Outcome::Committed { point: begun, next_seconds: next }
        };
        self.scheduler.finish(&server.name, end, outcome);
    }

    fn run(&mut self, until: Millis) {
        let warm = 15 * DAY;
        while self.now < until {
            self.start();
            let first = self.running.iter().map(|run| run.0).min();
            let due = self.scheduler.next_due(self.now);
            let Some(next) = first.into_iter().chain(due).min() else { break };
            self.now = next.max(self.now);
            while let Some(position) = self.running.iter().position(|run| run.0 <= self.now) {
                self.end(position);
            }
            if self.now > warm {
                for server in &mut self.servers {
                    let lag = self.now - server.point.unwrap_or(server.since);
                    server.worst_lag = server.worst_lag.max(lag);
                }
            }
        }
    }
}

#[test]
fn five_hundred_volumes_over_thirty_days() {
    let mut simulation = Simulation::new(20261125);
    simulation.run(30 * DAY);
    let volumes: usize = simulation.servers.iter().map(|server| server.volumes).sum();
    assert_eq!(volumes, 500);
    let hopeless = simulation.servers.iter().filter(|server| server.hopeless).count();
    assert!(hopeless >= 2 && simulation.servers.len() > 100, "{hopeless} of {}", simulation.servers.len());
    for server in &simulation.servers {
        let what = format!("{} ({} volumes, {:.1} MB/s)", server.name, server.volumes, server.rate / 1e6);
        // Nobody starves, not even who can't be helped.
        assert!(server.point.is_some() && server.cycles >= 5, "{what}: {} cycles", server.cycles);
        let lag = (simulation.now - server.point.unwrap()) as f64 / 1000.0;
        let verdict = convergence(&server.model, server.mean_rate.get(), Some(lag), 4.0 * 3600.0, None);
        if server.hopeless {
            assert!(matches!(verdict, Convergence::Diverging { .. }), "{what}: {verdict:?}");
        } else {
            assert!(!matches!(verdict, Convergence::Diverging { .. }), "{what}: {verdict:?}");
            assert!(server.worst_lag <= 6 * HOUR, "{what}: worst lag {} min", server.worst_lag / MINUTE);
        }
    }
}

#[test]
fn a_simulation_replays_from_its_seed() {
    let trace = |seed| {
        let mut simulation = Simulation::new(seed);
        simulation.run(2 * DAY);
        simulation.trace
    };
    assert_eq!(trace(5), trace(5));
    assert_ne!(trace(5), trace(6));
}
