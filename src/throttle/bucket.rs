//! A token bucket for bytes and operations, whose rate can change while somebody waits.

use std::num::NonZeroU64;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

use super::Rate;

/// How much a bucket holds, as a time at its rate.
const BURST_SECONDS: f64 = 0.1;

/// A bucket holds at least this many bytes: one request of the usual size, which then waits once and not in pieces.
const BURST_BYTES: f64 = (4 << 20) as f64;

/// A bucket holds at least this many operations.
const BURST_OPERATIONS: f64 = 1.0;

/// How late a waiter may be woken without losing anything. A full bucket takes nothing more, so that without this every
/// late timer of a busy host would take something off the rate.
const LATE: Duration = Duration::from_millis(50);

/// Tokens are fractions: what is missing by less than this is there.
const EPSILON: f64 = 1e-3;

/// The longest sleep; who slept looks again.
const LONGEST_SLEEP: Duration = Duration::from_secs(3600);

/// Lets through so many bytes and operations a second.
///
/// - From the beginning on, no more is granted than one burst (100 ms worth, at least 4 MiB and one operation) and what
///   the rates were in that time; in any later stretch of time at most 50 ms worth more, where a waiter was woken late.
///   A single request larger than the burst is granted once the bucket is full, and leaves a debt which the next ones
///   wait for.
/// - Who waits is served in the order of arrival.
/// - A waiter that is dropped has taken nothing, and is in nobody's way.
/// - A new rate counts at once, for those who wait as well. A limit that was lifted starts with an empty bucket when it
///   is set again: what went through just before is not known to be within it.
/// - Without a limit a request costs the read of one atomic.
#[derive(Debug)]
pub struct Bucket {
    unlimited: AtomicBool,
    state: Mutex<State>,
    /// Held by the one who is served next; tokio's mutex is fair.
    turn: tokio::sync::Mutex<()>,
    changed: Notify,
}

#[derive(Debug)]
struct State {
    /// When the tokens were counted last.
    at: Instant,
    rate: Rate,
    bytes: Tokens,
    operations: Tokens,
}

impl Bucket {
    /// A full bucket.
    pub fn new(rate: Rate) -> Self {
        let state = State {
            at: Instant::now(),
            rate,
            bytes: Tokens::full(rate.bytes_per_second, BURST_BYTES),
            operations: Tokens::full(rate.operations_per_second, BURST_OPERATIONS),
        };
        Self {
            unlimited: AtomicBool::new(rate.is_unlimited()),
            state: Mutex::new(state),
            turn: tokio::sync::Mutex::new(()),
            changed: Notify::new(),
        }
    }

    /// The rate now.
    pub fn rate(&self) -> Rate {
        self.lock().rate
    }

    /// Changes the rate, at once.
    pub fn set(&self, rate: Rate) {
        {
            let mut state = self.lock();
            if state.rate == rate {
                return;
            }
            state.refill(Instant::now(), LATE);
            state.rate = rate;
            state.bytes.set(rate.bytes_per_second);
            state.operations.set(rate.operations_per_second);
            self.unlimited.store(rate.is_unlimited(), Ordering::Release);
        }
        self.changed.notify_waiters();
    }

    /// Waits until one request for `bytes` bytes may be issued.
    pub async fn take(&self, bytes: u64) {
        self.acquire(bytes, 1).await;
    }

    /// Waits until `operations` requests that move no data may be issued.
    pub async fn take_operations(&self, operations: u64) {
        self.acquire(0, operations).await;
    }

    async fn acquire(&self, bytes: u64, operations: u64) {
        if self.unlimited.load(Ordering::Acquire) {
            return;
        }
        let _turn = self.turn.lock().await;
        let mut late = Duration::ZERO;
        loop {
            // Before the look at the tokens: a change right after it wakes this one.
            let changed = self.changed.notified();
            let Some(wait) = self.lock().try_take(bytes as f64, operations as f64, late) else { return };
            tokio::select! {
                () = tokio::time::sleep(wait) => late = LATE,
                () = changed => {}
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Takes both or nothing; then tells how long to wait.
    fn try_take(&mut self, bytes: f64, operations: f64, late: Duration) -> Option<Duration> {
        self.refill(Instant::now(), late);
        let missing = self.bytes.seconds_until(bytes).max(self.operations.seconds_until(operations));
        if missing > 0.0 {
            return Some(Duration::try_from_secs_f64(missing).unwrap_or(LONGEST_SLEEP).min(LONGEST_SLEEP));
        }
        self.bytes.take(bytes);
        self.operations.take(operations);
        None
    }

    fn refill(&mut self, now: Instant, late: Duration) {
        let elapsed = now.saturating_duration_since(self.at).as_secs_f64();
        self.at = now;
        self.bytes.refill(elapsed, late.as_secs_f64());
        self.operations.refill(elapsed, late.as_secs_f64());
    }
}

/// The tokens of one kind.
#[derive(Debug)]
struct Tokens {
    /// Tokens a second; `None`: any number is there.
    rate: Option<f64>,
    least_burst: f64,
    /// Less than zero for a debt.
    balance: f64,
}

impl Tokens {
    fn full(rate: Option<NonZeroU64>, least_burst: f64) -> Self {
        let mut tokens = Self { rate: rate.map(|rate| rate.get() as f64), least_burst, balance: 0.0 };
        tokens.balance = tokens.rate.map_or(0.0, |rate| tokens.burst(rate));
        tokens
    }

    fn burst(&self, rate: f64) -> f64 {
        (rate * BURST_SECONDS).max(self.least_burst)
    }

    fn set(&mut self, rate: Option<NonZeroU64>) {
        if self.rate.is_none() || rate.is_none() {
            self.balance = 0.0;
        }
        self.rate = rate.map(|rate| rate.get() as f64);
    }

    fn refill(&mut self, elapsed: f64, late: f64) {
        if let Some(rate) = self.rate {
            self.balance = (self.balance + elapsed * rate).min(self.burst(rate) + late * rate);
        }
    }

    fn seconds_until(&self, wanted: f64) -> f64 {
        let Some(rate) = self.rate.filter(|_| wanted > 0.0) else { return 0.0 };
        let missing = wanted.min(self.burst(rate)) - self.balance;
        if missing > EPSILON { missing / rate } else { 0.0 }
    }

    fn take(&mut self, wanted: f64) {
        if self.rate.is_some() {
            self.balance -= wanted;
        }
    }
}
