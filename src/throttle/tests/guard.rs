use std::time::Duration;

use tokio::time::Instant;

use super::*;

const LIMIT: f64 = 0.05;
const STEP: f64 = 0.05;
const READ: f64 = (4 * MIB) as f64;

/// A pool of disks as one queue: an empty one answers in 5 ms, a busy one later, and what it can't keep up with queues
/// up, to at most what is in flight.
struct Pool {
    now: Instant,
    guard: LatencyGuard,
    ceiling: Rate,
    /// Bytes a second that it can do, others' load being taken off.
    capacity: f64,
    queued: f64,
    begun: f64,
}

impl Pool {
    fn new(capacity: u64, ceiling: Rate) -> Self {
        let now = Instant::now();
        let guard = LatencyGuard::new(Some(Duration::from_secs_f64(LIMIT)), now);
        Self { now, guard, ceiling, capacity: capacity as f64, queued: 0.0, begun: 0.0 }
    }

    fn rate(&self) -> f64 {
        let rate = self.ceiling.min(self.guard.cap().unwrap_or_default());
        rate.bytes_per_second.map_or(f64::INFINITY, |rate| rate.get() as f64)
    }

    /// Reads for a while, as much as `demand` and the guard allow. Gives back rates and latencies, step by step.
    fn run(&mut self, seconds: f64, demand: u64) -> Vec<(f64, f64)> {
        let mut trace = Vec::new();
        for _ in 0..(seconds / STEP) as usize {
            self.now += Duration::from_secs_f64(STEP);
            let room = 64.0 * READ - self.queued;
            let offered = (self.rate().min(demand as f64) * STEP).min(room.max(0.0));
            let served = (self.queued + offered).min(self.capacity * STEP);
            self.queued += offered - served;
            let busy = (served / (self.capacity * STEP)).min(0.98);
            let latency = 0.005 / (1.0 - busy) + self.queued / self.capacity;
            self.begun += served;
            while self.begun >= READ {
                self.begun -= READ;
                let taken = Duration::from_secs_f64(latency);
                self.guard.record(self.now - taken, taken, READ as u64);
            }
            self.guard.tick(self.now, self.ceiling, self.queued > 0.0);
            trace.push((self.rate(), latency));
        }
        trace
    }
}

fn mean(values: impl Iterator<Item = f64> + Clone) -> f64 {
    values.clone().sum::<f64>() / values.count() as f64
}

/// The guard has settled: the latency is at most the limit, much of what is possible is used, and the rate is steady.
fn assert_settled(trace: &[(f64, f64)], possible: f64) {
    let rates = trace.iter().map(|step| step.0.min(2.0 * possible));
    let latency = mean(trace.iter().map(|step| step.1));
    let (least, most) = rates.clone().fold((f64::MAX, 0.0_f64), |(a, b), rate| (a.min(rate), b.max(rate)));
    assert!(latency < 1.1 * LIMIT, "the latency is {latency}");
    assert!(mean(rates.clone()) > 0.6 * possible, "{least} to {most} of {possible} is used");
    assert!(most < 1.15 * possible && least > 0.5 * possible, "{least} to {most} of {possible}");
}

#[test]
fn it_settles_below_the_limit_without_a_configured_rate() {
    let mut pool = Pool::new(400 * MIB, Rate::UNLIMITED);
    pool.run(30.0, 4000 * MIB);
    let trace = pool.run(300.0, 4000 * MIB);
    assert_settled(&trace, (400 * MIB) as f64);
    assert!(pool.guard.latencies(pool.now).unwrap().mean_seconds < LIMIT);
}

#[test]
fn it_settles_far_below_a_configured_rate_and_comes_back_to_it() {
    let mut pool = Pool::new(60 * MIB, bytes(500 * MIB));
    // The backlog of the first seconds is worked off at less than what is possible.
    pool.run(90.0, 4000 * MIB);
    assert_settled(&pool.run(300.0, 4000 * MIB), (60 * MIB) as f64);
    // The others have gone home.
    pool.capacity = (1000 * MIB) as f64;
    let trace = pool.run(180.0, 4000 * MIB);
    assert_eq!(trace.last().unwrap().0, (500 * MIB) as f64);
    assert!(pool.guard.cap().is_none() && pool.guard.reason().is_none());
    // And are back.
    pool.capacity = (100 * MIB) as f64;
    pool.run(90.0, 4000 * MIB);
    assert_settled(&pool.run(100.0, 4000 * MIB), (100 * MIB) as f64);
}

#[test]
fn it_lets_go_when_there_is_little_to_read() {
    let mut pool = Pool::new(400 * MIB, Rate::UNLIMITED);
    pool.run(60.0, 4000 * MIB);
    assert!(pool.guard.cap().is_some());
    pool.run(200.0, 20 * MIB);
    assert!(pool.guard.cap().is_none());
}

#[test]
fn it_never_stops_everything() {
    // A pool that is slow whatever we do.
    let (mut now, mut told) = (Instant::now(), 0);
    let mut guard = LatencyGuard::new(Some(Duration::from_millis(20)), now);
    let ceiling = Rate { operations_per_second: std::num::NonZeroU64::new(2), ..bytes(320 * MIB) };
    for _ in 0..600 {
        now += Duration::from_secs(1);
        for _ in 0..200 {
            guard.record(now, Duration::from_millis(300), MIB);
        }
        told += usize::from(guard.tick(now + Duration::from_millis(1), ceiling, true));
    }
    let cap = guard.cap().unwrap();
    assert!((6 * MIB..=7 * MIB).contains(&cap.bytes_per_second.unwrap().get()), "{cap:?}");
    assert_eq!(cap.operations_per_second.unwrap().get(), 2);
    assert_eq!(guard.reason(), Some("lowered: reads take 300 ms"));
    assert!((5..15).contains(&told), "told {told} times");
}

#[test]
fn it_waits_for_reads_that_do_not_come_back() {
    let mut now = Instant::now();
    let mut guard = LatencyGuard::new(Some(Duration::from_millis(20)), now);
    let tick = |guard: &mut LatencyGuard, now: &mut Instant, in_flight, seconds: u64| {
        for _ in 0..seconds {
            *now += Duration::from_secs(1);
            guard.tick(*now, bytes(100 * MIB), in_flight);
        }
        guard.cap().map(|cap| cap.bytes_per_second.unwrap().get())
    };
    for _ in 0..200 {
        guard.record(now, Duration::from_millis(50), MIB);
    }
    let lowered = tick(&mut guard, &mut now, true, 3);
    assert_eq!(lowered, Some(70 * MIB));
    assert_eq!(tick(&mut guard, &mut now, true, 300), lowered);
    assert_eq!(tick(&mut guard, &mut now, false, 300), None);
    // A second in which reads from before the change come back lowers nothing again.
    let before = now - Duration::from_secs(1);
    for _ in 0..200 {
        guard.record(now, Duration::from_millis(50), MIB);
    }
    let lowered = tick(&mut guard, &mut now, true, 3);
    for _ in 0..200 {
        guard.record(before, Duration::from_millis(900), MIB);
    }
    assert_eq!(tick(&mut guard, &mut now, true, 20), lowered);
}

#[test]
fn without_a_limit_it_only_measures() {
    let mut now = Instant::now();
    let mut guard = LatencyGuard::new(None, now);
    for milliseconds in 1..=100 {
        guard.record(now, Duration::from_millis(milliseconds), MIB);
    }
    now += Duration::from_secs(2);
    assert!(!guard.tick(now, bytes(MIB), true) && guard.cap().is_none());
    let latencies = guard.latencies(now).unwrap();
    assert!((latencies.mean_seconds - 0.0505).abs() < 1e-9 && (latencies.high_seconds - 0.095).abs() < 1e-9);
    assert_eq!(guard.latencies(now + Duration::from_secs(31)), None);
}
