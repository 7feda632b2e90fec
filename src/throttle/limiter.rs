//! What one source pool may be asked for, now.

use std::future::Future;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use super::guard::LatencyGuard;
use super::meter::Meter;
use super::{Bucket, Rate, Schedule};
use crate::image::{ErrorKind, Result};

/// A limit that has changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// Why, as in [`LimiterStatus::reason`].
    pub reason: String,
    /// The limit now.
    pub rate: Rate,
}

/// A limiter at one moment.
#[derive(Clone, Debug, PartialEq)]
pub struct LimiterStatus {
    /// The pool.
    pub pool: String,
    /// The limit now.
    pub rate: Rate,
    /// Why it is that: `plan`, `window 22:00-06:00`, `set by hand`, `lowered: reads take 80 ms`, `recovering: …`.
    pub reason: String,
    /// The mean latency of our reads, in seconds, while there are any.
    pub latency_seconds: Option<f64>,
    /// What 95 of 100 of our last reads stayed within, in seconds.
    pub high_latency_seconds: Option<f64>,
    /// Bytes read, a second, over the last ten seconds.
    pub used_bytes_per_second: f64,
    /// Reads, a second, over the last ten seconds.
    pub used_operations_per_second: f64,
}

/// Limits all reads from one pool: by the time of the day, by hand, and by the latency of the reads.
///
/// A rate that was set by hand takes the place of the schedule's. The latency guard lowers either. To be shared by all
/// images of the pool, and told about the time once a second ([`Self::tick`]).
#[derive(Debug)]
pub struct PoolLimiter {
    pool: String,
    bucket: Bucket,
    in_flight: AtomicUsize,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    schedule: Schedule,
    by_hand: Option<Rate>,
    minute: u16,
    guard: LatencyGuard,
    bytes: Meter,
    operations: Meter,
    rate: Rate,
    reason: String,
}

impl Inner {
    /// The rate that would count if reads were quick, and where it comes from.
    fn base(&self) -> (Rate, String) {
        if let Some(rate) = self.by_hand {
            return (rate, "set by hand".to_owned());
        }
        let in_force = self.schedule.at(self.minute);
        (in_force.rate, in_force.reason)
    }
}

impl PoolLimiter {
    /// A limiter at `minute` of the day (see [`super::minute_of_day`]). Without a `latency_limit` the latency is
    /// measured, and nothing follows from it.
    pub fn new(pool: impl Into<String>, schedule: Schedule, latency_limit: Option<Duration>, minute: u16) -> Self {
        let (now, in_force) = (Instant::now(), schedule.at(minute));
        let inner = Inner {
            schedule,
            by_hand: None,
            minute,
            guard: LatencyGuard::new(latency_limit, now),
            bytes: Meter::new(now),
            operations: Meter::new(now),
            rate: in_force.rate,
            reason: in_force.reason,
        };
        Self {
            pool: pool.into(),
            bucket: Bucket::new(in_force.rate),
            in_flight: AtomicUsize::new(0),
            inner: Mutex::new(inner),
        }
    }

    /// The pool's name.
    pub fn pool(&self) -> &str {
        &self.pool
    }

    /// Waits until a read of `bytes` bytes may be issued.
    pub async fn take(&self, bytes: u64) {
        self.bucket.take(bytes).await;
    }

    /// Waits until `operations` requests that read no data may be issued.
    pub async fn take_operations(&self, operations: u64) {
        self.bucket.take_operations(operations).await;
    }

    /// Measures a read of `bytes` bytes, from now until it is there. A read that fails tells nothing of the storage's
    /// speed, unless it failed for taking too long; one that is dropped is forgotten.
    pub async fn measure<T>(&self, bytes: u64, read: impl Future<Output = Result<T>>) -> Result<T> {
        let began = Instant::now();
        let under_way = UnderWay::begin(&self.in_flight);
        let outcome = read.await;
        drop(under_way);
        let bytes = match &outcome {
            Ok(_) => bytes,
            Err(error) if error.kind == ErrorKind::TimedOut => 0,
            Err(_) => return outcome,
        };
        let now = Instant::now();
        let mut inner = self.lock();
        inner.guard.record(began, now.saturating_duration_since(began), bytes);
        inner.bytes.add(now, bytes);
        inner.operations.add(now, 1);
        drop(inner);
        outcome
    }

    /// To be called about once a second, with the minute of the day (see [`super::minute_of_day`]). Gives back what a
    /// person should hear of: a window has begun or ended, or the latency has lowered the rate or lets it recover. The
    /// small steps of a recovery are not told one by one.
    pub fn tick(&self, minute: u16) -> Option<Change> {
        let mut inner = self.lock();
        inner.minute = minute;
        let (ceiling, _) = inner.base();
        let told = inner.guard.tick(Instant::now(), ceiling, self.in_flight.load(Ordering::Relaxed) > 0);
        self.apply(&mut inner, told)
    }

    /// Sets the rate by hand, at once; `None`: what the schedule says.
    pub fn set_override(&self, rate: Option<Rate>) -> Option<Change> {
        let mut inner = self.lock();
        inner.by_hand = rate;
        self.apply(&mut inner, true)
    }

    /// Takes over another plan: what was set by hand is gone, what the latency has lowered is not.
    pub fn configure(&self, schedule: Schedule, latency_limit: Option<Duration>) -> Option<Change> {
        let mut inner = self.lock();
        inner.schedule = schedule;
        inner.by_hand = None;
        inner.guard.set_limit(latency_limit);
        self.apply(&mut inner, true)
    }

    /// How it is now.
    pub fn status(&self) -> LimiterStatus {
        let now = Instant::now();
        let mut inner = self.lock();
        let latencies = inner.guard.latencies(now);
        LimiterStatus {
            pool: self.pool.clone(),
            rate: inner.rate,
            reason: inner.reason.clone(),
            latency_seconds: latencies.map(|latencies| latencies.mean_seconds),
            high_latency_seconds: latencies.map(|latencies| latencies.high_seconds),
            used_bytes_per_second: inner.bytes.per_second(now),
            used_operations_per_second: inner.operations.per_second(now),
        }
    }

    /// Puts the rate that counts now into force. With `told`, or another reason, a difference is given back.
    fn apply(&self, inner: &mut Inner, told: bool) -> Option<Change> {
        let (base, base_reason) = inner.base();
        let rate = base.min(inner.guard.cap().unwrap_or_default());
        let reason = match inner.guard.reason() {
            Some(reason) if rate != base => reason.to_owned(),
            _ => base_reason,
        };
        let differs = rate != inner.rate || reason != inner.reason;
        let told = told || reason != inner.reason;
        (inner.rate, inner.reason) = (rate, reason);
        self.bucket.set(rate);
        (differs && told).then(|| Change { reason: inner.reason.clone(), rate })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Counts a read for as long as it is under way, even if it is dropped.
struct UnderWay<'a>(&'a AtomicUsize);

impl<'a> UnderWay<'a> {
    fn begin(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count)
    }
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
