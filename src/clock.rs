//! The time of day, as a clock that is never set back.
//!
//! Schedules, ages and the names of snapshots go by it. It follows the system's clock, and where that is set back it
//! counts on by itself until the system's has caught up: a fleet whose host is corrected by two hours would otherwise
//! rest for two hours, and every lag would be 0.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use jiff::Timestamp;

/// The latest time that was given, and when.
static LATEST: Mutex<Option<(Timestamp, Instant)>> = Mutex::new(None);

/// Now: never earlier than any time that this process has been given before.
pub(crate) fn now() -> Timestamp {
    let mut latest = LATEST.lock().unwrap_or_else(PoisonError::into_inner);
    let found = later(*latest, system(), Instant::now());
    if let Some(ahead) = set_forward(*latest, found) {
        tracing::warn!("the system's clock was set forward by {ahead:.0?}: ages, and what is kept by age, go by it");
    }
    *latest = Some(found);
    found.0
}

/// By how much the clock was set forward between two times, where that is more than it may be corrected by.
fn set_forward(before: Option<(Timestamp, Instant)>, after: (Timestamp, Instant)) -> Option<Duration> {
    let (then, at) = before?;
    let counted = after.1.saturating_duration_since(at);
    let passed = Duration::try_from(after.0.duration_since(then)).ok()?;
    passed.checked_sub(counted).filter(|&ahead| ahead > SKEW)
}

/// The system's clock. A debug build adds `POOLSHIFT_CLOCK_OFFSET`, in seconds: tests run with a clock that is wrong.
fn system() -> Timestamp {
    let now = Timestamp::now();
    #[cfg(debug_assertions)]
    {
        static OFFSET: std::sync::LazyLock<i64> = std::sync::LazyLock::new(|| {
            let offset = std::env::var("POOLSHIFT_CLOCK_OFFSET").ok();
            offset.and_then(|offset| offset.parse().ok()).unwrap_or(0)
        });
        now.checked_add(jiff::SignedDuration::from_secs(*OFFSET)).unwrap_or(now)
    }
    #[cfg(not(debug_assertions))]
    now
}

/// How far ahead of [`now`] a time may be that another host has noted: clocks of hosts differ.
const SKEW: Duration = Duration::from_secs(30);

/// How old something of that time is; an error, by how much it is ahead, where it is of the future.
pub(crate) fn age(of: Timestamp, now: Timestamp) -> Result<Duration, Duration> {
    let between = now.duration_since(of);
    match (Duration::try_from(between), between.unsigned_abs()) {
        (Ok(age), _) => Ok(age),
        (Err(_), ahead) if ahead <= SKEW => Ok(Duration::ZERO),
        (Err(_), ahead) => Err(ahead),
    }
}

fn later(latest: Option<(Timestamp, Instant)>, system: Timestamp, since: Instant) -> (Timestamp, Instant) {
    let Some((then, at)) = latest else { return (system, since) };
    let counted = then.checked_add(since.saturating_duration_since(at)).unwrap_or(Timestamp::MAX);
    (system.max(counted), since)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_second(seconds).unwrap()
    }

    #[test]
    fn a_clock_that_is_set_back_is_counted_on() {
        let begun = Instant::now();
        let after = |seconds| begun + Duration::from_secs(seconds);
        let first = later(None, at(10_000), begun);
        assert_eq!(first.0, at(10_000));
        // Two hours back: it counts on. Two hours later the system's clock has caught up.
        let second = later(Some(first), at(2_810), after(10));
        assert_eq!(second.0, at(10_010));
        let third = later(Some(second), at(10_011), after(7_211));
        assert_eq!(third.0, at(17_211));
        // Forward it is followed.
        let fourth = later(Some(third), at(50_000), after(7_212));
        assert_eq!(fourth.0, at(50_000));
    }

    #[test]
    fn a_clock_that_is_set_forward_is_noticed() {
        let begun = Instant::now();
        let after = |seconds| begun + Duration::from_secs(seconds);
        let first = (at(10_000), begun);
        assert_eq!(set_forward(None, first), None);
        assert_eq!(set_forward(Some(first), (at(10_012), after(10))), None);
        assert_eq!(set_forward(Some(first), (at(17_210), after(10))), Some(Duration::from_secs(7200)));
    }

    #[test]
    fn what_is_of_the_future_has_no_age() {
        assert_eq!(age(at(10), at(70)), Ok(Duration::from_secs(60)));
        assert_eq!(age(at(80), at(70)), Ok(Duration::ZERO));
        assert_eq!(age(at(7270), at(70)), Err(Duration::from_secs(7200)));
    }

    #[test]
    fn it_never_goes_back() {
        let times: Vec<Timestamp> = (0..1000).map(|_| now()).collect();
        assert!(times.is_sorted());
    }
}
