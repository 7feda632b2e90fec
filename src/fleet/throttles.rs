//! The limits of the plan's source pools, as they are in force.

use std::collections::BTreeMap;
use std::num::NonZeroU64;
use std::sync::{Arc, Mutex, PoisonError};

use super::status::ThrottleStatus;
use crate::image::SourceImage;
use crate::plan::{Plan, Volume};
use crate::throttle::{Bucket, PoolLimiter, Rate, Schedule, ThrottledSource, minute_of_day};

/// One limiter for each pool that the plan reads from: also where it sets no limit, because a person may, and because
/// what is read is shown.
#[derive(Default)]
pub(super) struct Throttles(Mutex<BTreeMap<String, Arc<PoolLimiter>>>);

fn minute() -> u16 {
    minute_of_day(&jiff::ZonedDateTime::now())
}

impl Throttles {
    pub(super) fn new(plan: &Plan) -> Self {
        let throttles = Self::default();
        throttles.configure(plan);
        throttles
    }

    /// Takes another plan's limits over. What a person has set goes.
    pub(super) fn configure(&self, plan: &Plan) {
        let mut limiters = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let pools = plan.volumes().filter_map(|(_, volume)| volume.source.pool());
        let mut kept = BTreeMap::new();
        for pool in pools {
            if kept.contains_key(pool) {
                continue;
            }
            let planned = plan.throttle(pool);
            let schedule = planned.map_or_else(
                || Schedule::new(Rate::UNLIMITED, Vec::new()),
                |planned| Schedule::new(planned.rate, planned.windows.clone()),
            );
            let latency_limit = planned.and_then(|planned| planned.latency_limit);
            let limiter = match limiters.remove(pool) {
                Some(limiter) => {
                    limiter.set_override(None);
                    limiter.configure(schedule, latency_limit);
                    limiter
                }
                None => Arc::new(PoolLimiter::new(pool, schedule, latency_limit, minute())),
            };
            kept.insert(pool.to_owned(), limiter);
        }
        *limiters = kept;
    }

    fn limiter(&self, pool: &str) -> Option<Arc<PoolLimiter>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(pool).cloned()
    }

    /// A source that is read within its pool's limit and its own.
    pub(super) fn throttled(&self, volume: &Volume, source: Arc<dyn SourceImage>) -> Arc<dyn SourceImage> {
        let own = (!volume.rate.is_unlimited()).then(|| Arc::new(Bucket::new(volume.rate)));
        let pool = volume.source.pool().and_then(|pool| self.limiter(pool));
        if own.is_none() && pool.is_none() {
            return source;
        }
        Arc::new(ThrottledSource::new(source, own, pool))
    }

    /// Brings all limits up to now; gives back what has changed, a sentence each.
    pub(super) fn tick(&self) -> Vec<String> {
        let minute = minute();
        let limiters = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let changes = limiters.values().filter_map(|limiter| Some((limiter.pool().to_owned(), limiter.tick(minute)?)));
        changes.map(|(pool, change)| format!("pool {pool}: {}: {}", change.reason, rate_text(change.rate))).collect()
    }

    /// Sets a pool's limit by hand, or takes that back; whether the plan reads from such a pool.
    pub(super) fn set(&self, pool: &str, rate: Option<Rate>) -> bool {
        self.limiter(pool).map(|limiter| limiter.set_override(rate)).is_some()
    }

    /// The limit that a volume's reads run into, in words; `None` where there is none.
    pub(super) fn limit_of(&self, volume: &Volume) -> Option<String> {
        if let Some(bytes) = volume.rate.bytes_per_second {
            return Some(format!("the limit of volume {} ({})", volume.name, mib(bytes.get())));
        }
        let status = self.limiter(volume.source.pool()?)?.status();
        let bytes = status.rate.bytes_per_second?;
        Some(format!("the limit of pool {} ({})", status.pool, mib(bytes.get())))
    }

    pub(super) fn status(&self) -> Vec<ThrottleStatus> {
        let limiters = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let statuses = limiters.values().map(|limiter| limiter.status());
        statuses
            .map(|status| ThrottleStatus {
                pool: status.pool,
                bytes_per_second: status.rate.bytes_per_second.map(NonZeroU64::get),
                operations_per_second: status.rate.operations_per_second.map(NonZeroU64::get),
                reason: status.reason,
                latency_seconds: status.latency_seconds,
                used_bytes_per_second: status.used_bytes_per_second,
            })
            .collect()
    }
}

fn mib(bytes: u64) -> String {
    format!("{:.1} MiB/s", bytes as f64 / f64::from(1 << 20))
}

fn rate_text(rate: Rate) -> String {
    let bytes = rate.bytes_per_second.map(|bytes| mib(bytes.get()));
    let operations = rate.operations_per_second.map(|operations| format!("{operations} operations/s"));
    let parts: Vec<String> = bytes.into_iter().chain(operations).collect();
    if parts.is_empty() { "no limit".to_owned() } else { parts.join(", ") }
}
