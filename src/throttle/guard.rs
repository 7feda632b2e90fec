//! Lowers the rate when reads take long, and raises it again: production is slow first where we read.

use std::num::NonZeroU64;
use std::time::Duration;

use tokio::time::Instant;

use super::Rate;

/// How long one look at the latencies lasts.
const WINDOW: Duration = Duration::from_secs(2);

/// A window with fewer reads than this goes on, up to [`LONGEST_WINDOW`]: at a low rate two seconds say nothing.
const ENOUGH_READS: u64 = 4;

/// How long a window lasts at most.
const LONGEST_WINDOW: Duration = Duration::from_secs(10);

/// By how much the rate is lowered in one window.
const LOWER: f64 = 0.7;

/// Below this share of the limit reads count as quick. Between this and the limit the rate stays as it is.
const QUICK: f64 = 0.8;

/// After how many windows of quick reads the rate is raised; then in each further one.
const QUICK_WINDOWS: u32 = 3;

/// The first raise, as a share of the rate that was too much.
const RAISE: f64 = 0.05;

/// How much larger each raise is than the one before it. What had to be lowered far, by something that has passed, would
/// not come back for hours otherwise.
const BOLDER: f64 = 1.1;

/// The rate is never lowered below this share of what it was at the beginning, nor below [`LEAST_BYTES`].
const FLOOR: f64 = 1.0 / 32.0;

/// Bytes a second that are always left, unless the plan gives less: the replication must get somewhere.
const LEAST_BYTES: f64 = (1 << 20) as f64;

/// Operations a second that are always left, unless the plan gives less.
const LEAST_OPERATIONS: f64 = 4.0;

/// How many latencies of a window are kept for its percentile; beyond that newer ones take the places of older ones.
const KEPT: usize = 4096;

/// The weight of the newest window in the mean that is shown.
const WEIGHT: f64 = 0.3;

/// How long a mean is shown after the last read.
const SHOWN: Duration = Duration::from_secs(30);

/// What is known of the latency of our reads.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Latencies {
    /// The mean, in seconds, newer windows weighing more.
    pub mean_seconds: f64,
    /// What 95 of 100 reads of the last window stayed within, in seconds.
    pub high_seconds: f64,
}

/// A state machine that is told of every read, and says how far the rate must be lowered.
///
/// ```text
///        mean > limit: ×0.7                    mean > limit: ×0.7
///  free ────────────────────▶ lowered ◀──────────────────────────────┐
///   ▲                          │   ▲ │ mean < 0.8 × limit, 3 windows   │
///   │                          └───┘ ▼                                 │
///   └──── back at the ceiling ── recovering: + a step each window ─────┘
/// ```
///
/// One step a window of two seconds (more at a low rate, until there are a few reads to look at). Reads that began before
/// the rate was lowered last say nothing about it and don't count. Where nothing is configured, the throughput measured
/// when the latency rose stands for the rate; the limit goes away once twice that is allowed and not used.
///
/// Lowers bytes and operations alike, each from what was really used. Does no I/O and knows no clock but what it is
/// given.
#[derive(Debug)]
pub struct LatencyGuard {
    limit: Option<Duration>,
    window: Reads,
    quick_windows: u32,
    lowered_at: Option<Instant>,
    hold: Option<Hold>,
    shown: Option<(Instant, Latencies)>,
}

/// The reads of one window.
#[derive(Debug)]
struct Reads {
    since: Instant,
    /// Of all reads.
    bytes: u64,
    operations: u64,
    /// Of those that count.
    counted: u64,
    total_seconds: f64,
    kept: Vec<f64>,
}

/// While the rate is lowered.
#[derive(Debug)]
struct Hold {
    bytes: Cap,
    operations: Cap,
    recovering: bool,
    reason: String,
}

/// How far one kind is lowered, in units a second.
#[derive(Clone, Copy, Debug)]
struct Cap {
    now: f64,
    /// What was too much.
    level: f64,
    floor: f64,
    step: f64,
}

impl LatencyGuard {
    /// Without a limit it only measures.
    pub fn new(limit: Option<Duration>, now: Instant) -> Self {
        let limit = limit.filter(|limit| !limit.is_zero());
        Self { limit, window: Reads::new(now), quick_windows: 0, lowered_at: None, hold: None, shown: None }
    }

    /// Changes the limit. What was lowered for the old one recovers from there; without a limit it ends at once.
    pub fn set_limit(&mut self, limit: Option<Duration>) {
        self.limit = limit.filter(|limit| !limit.is_zero());
        if self.limit.is_none() {
            self.hold = None;
        }
    }

    /// A read that began at `began` took `latency`, and gave `bytes`.
    pub fn record(&mut self, began: Instant, latency: Duration, bytes: u64) {
        let counts = self.lowered_at.is_none_or(|lowered| began >= lowered);
        self.window.add(counts.then_some(latency), bytes);
    }

    /// To be called about once a second. `ceiling` is the rate that would count otherwise, and `in_flight` says whether
    /// reads are under way. True if something changed that is worth telling: the rate was lowered, has begun to recover,
    /// or is no longer held down.
    pub fn tick(&mut self, now: Instant, ceiling: Rate, in_flight: bool) -> bool {
        let span = now.saturating_duration_since(self.window.since);
        if span < WINDOW || (self.window.counted < ENOUGH_READS && span < LONGEST_WINDOW) {
            return false;
        }
        let window = std::mem::replace(&mut self.window, Reads::new(now));
        let mean = window.mean();
        self.show(now, &window);
        let Some(limit) = self.limit.map(|limit| limit.as_secs_f64()) else { return false };
        let used = (window.bytes as f64 / span.as_secs_f64(), window.operations as f64 / span.as_secs_f64());
        match mean {
            Some(mean) if mean > limit => {
                self.quick_windows = 0;
                self.lower(now, mean, used, ceiling)
            }
            // Nothing came back, and something is waited for: not a good sign, nor a measurement.
            None if in_flight => self.stay(),
            Some(mean) if mean >= QUICK * limit => self.stay(),
            _ => {
                self.quick_windows += 1;
                self.quick_windows > QUICK_WINDOWS && self.raise(mean, used, ceiling)
            }
        }
    }

    /// How far the rate is lowered, while it is.
    pub fn cap(&self) -> Option<Rate> {
        let whole = |cap: &Cap| NonZeroU64::new((cap.now as u64).max(1));
        self.hold
            .as_ref()
            .map(|hold| Rate { bytes_per_second: whole(&hold.bytes), operations_per_second: whole(&hold.operations) })
    }

    /// Why it is lowered, while it is: `lowered: reads take 80 ms`.
    pub fn reason(&self) -> Option<&str> {
        self.hold.as_ref().map(|hold| hold.reason.as_str())
    }

    /// What is known of the latency; `None` if there was no read for a while.
    pub fn latencies(&self, now: Instant) -> Option<Latencies> {
        let (at, latencies) = self.shown?;
        (now.saturating_duration_since(at) <= SHOWN).then_some(latencies)
    }

    fn lower(&mut self, now: Instant, mean: f64, used: (f64, f64), ceiling: Rate) -> bool {
        let before = self.hold.as_ref().map(|hold| (hold.bytes, hold.operations)).unzip();
        let bytes = Cap::lowered(before.0, used.0, ceiling.bytes_per_second, LEAST_BYTES);
        let operations = Cap::lowered(before.1, used.1, ceiling.operations_per_second, LEAST_OPERATIONS);
        let unchanged = |before: Option<Cap>, after: Cap| before.is_some_and(|before| before.now <= after.now);
        if unchanged(before.0, bytes) && unchanged(before.1, operations) {
            return false;
        }
        self.lowered_at = Some(now);
        let reason = format!("lowered: reads take {}", milliseconds(mean));
        self.hold = Some(Hold { bytes, operations, recovering: false, reason });
        true
    }

    fn raise(&mut self, mean: Option<f64>, used: (f64, f64), ceiling: Rate) -> bool {
        let Some(hold) = &mut self.hold else { return false };
        let free = [
            hold.bytes.raise(used.0, ceiling.bytes_per_second),
            hold.operations.raise(used.1, ceiling.operations_per_second),
        ];
        if free == [true; 2] {
            self.hold = None;
            return true;
        }
        if std::mem::replace(&mut hold.recovering, true) {
            return false;
        }
        hold.reason = match mean {
            Some(mean) => format!("recovering: reads take {}", milliseconds(mean)),
            None => "recovering: nothing is read".to_owned(),
        };
        true
    }

    fn stay(&mut self) -> bool {
        self.quick_windows = 0;
        if let Some(hold) = &mut self.hold {
            hold.bytes.step = hold.bytes.level * RAISE;
            hold.operations.step = hold.operations.level * RAISE;
        }
        false
    }

    fn show(&mut self, now: Instant, window: &Reads) {
        let Some(mean) = window.mean() else { return };
        let mean_seconds = match self.latencies(now) {
            Some(before) => before.mean_seconds + WEIGHT * (mean - before.mean_seconds),
            None => mean,
        };
        self.shown = Some((now, Latencies { mean_seconds, high_seconds: window.high() }));
    }
}

impl Cap {
    /// One step down, from what was used or allowed, whichever is less.
    fn lowered(before: Option<Self>, used: f64, ceiling: Option<NonZeroU64>, least: f64) -> Self {
        let ceiling = ceiling.map_or(f64::INFINITY, |ceiling| ceiling.get() as f64);
        let allowed = before.map_or(ceiling, |before| before.now.min(ceiling));
        let level = used.min(allowed).max(least.min(ceiling));
        let floor = before.map_or((level * FLOOR).max(least), |before| before.floor).min(ceiling);
        Self { now: (level * LOWER).max(floor), level, floor, step: level * RAISE }
    }

    /// One step up. True if the cap is needless then.
    fn raise(&mut self, used: f64, ceiling: Option<NonZeroU64>) -> bool {
        let ceiling = ceiling.map_or(f64::INFINITY, |ceiling| ceiling.get() as f64);
        self.now += self.step;
        self.step *= BOLDER;
        let needless = self.now >= 2.0 * self.level && self.now >= 2.0 * used;
        // The other kind may still be held down: this one must not run away until then.
        if self.now >= ceiling {
            self.now = ceiling;
        }
        needless || self.now >= ceiling
    }
}

impl Reads {
    fn new(since: Instant) -> Self {
        Self { since, bytes: 0, operations: 0, counted: 0, total_seconds: 0.0, kept: Vec::new() }
    }

    fn add(&mut self, latency: Option<Duration>, bytes: u64) {
        self.bytes = self.bytes.saturating_add(bytes);
        self.operations += 1;
        let Some(seconds) = latency.map(|latency| latency.as_secs_f64()) else { return };
        if self.kept.len() < KEPT {
            self.kept.push(seconds);
        } else {
            self.kept[(self.counted % KEPT as u64) as usize] = seconds;
        }
        self.counted += 1;
        self.total_seconds += seconds;
    }

    fn mean(&self) -> Option<f64> {
        (self.counted > 0).then(|| self.total_seconds / self.counted as f64)
    }

    fn high(&self) -> f64 {
        let mut sorted = self.kept.clone();
        sorted.sort_unstable_by(f64::total_cmp);
        let index = (sorted.len() * 95).div_ceil(100).saturating_sub(1);
        sorted.get(index).copied().unwrap_or(0.0)
    }
}

fn milliseconds(seconds: f64) -> String {
    match seconds * 1e3 {
        small if small < 10.0 => format!("{small:.1} ms"),
        large => format!("{large:.0} ms"),
    }
}
