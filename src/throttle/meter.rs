//! How much went through lately.

use std::time::Duration;

use tokio::time::Instant;

/// How many seconds a meter looks back, the current one included.
const SECONDS: usize = 10;

/// Sums up amounts by the second, and gives their mean over the last ten.
#[derive(Debug)]
pub(super) struct Meter {
    start: Instant,
    /// The second, since `start`, that the newest amounts belong to.
    second: u64,
    sums: [u64; SECONDS],
}

impl Meter {
    pub(super) fn new(now: Instant) -> Self {
        Self { start: now, second: 0, sums: [0; SECONDS] }
    }

    pub(super) fn add(&mut self, now: Instant, amount: u64) {
        self.go_to(now);
        let slot = &mut self.sums[(self.second % SECONDS as u64) as usize];
        *slot = slot.saturating_add(amount);
    }

    /// The mean a second, over the last 9 to 10 seconds.
    pub(super) fn per_second(&mut self, now: Instant) -> f64 {
        let elapsed = self.go_to(now);
        let whole = self.second.min(SECONDS as u64 - 1) as f64;
        let span = whole + f64::from(elapsed.subsec_nanos()) / 1e9;
        let sum: f64 = self.sums.iter().map(|sum| *sum as f64).sum();
        // Less than a second after the start there is nothing to take a mean of.
        sum / span.max(1.0)
    }

    /// Empties the slots of the seconds in which nothing came.
    fn go_to(&mut self, now: Instant) -> Duration {
        let elapsed = now.saturating_duration_since(self.start);
        let second = elapsed.as_secs().max(self.second);
        for passed in (self.second + 1..=second).rev().take(SECONDS) {
            self.sums[(passed % SECONDS as u64) as usize] = 0;
        }
        self.second = second;
        elapsed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_went_through_long_ago_is_forgotten() {
        let start = Instant::now();
        let at = |milliseconds| start + Duration::from_millis(milliseconds);
        let mut meter = Meter::new(start);
        meter.add(at(200), 600);
        assert_eq!(meter.per_second(at(500)), 600.0);
        assert_eq!(meter.per_second(at(2000)), 300.0);
        for second in 0..30 {
            meter.add(at(3000 + second * 1000), 50);
        }
        let mean = meter.per_second(at(32_999));
        assert!((49.0..51.0).contains(&mean), "{mean}");
        assert_eq!(meter.per_second(at(60_000)), 0.0);
        assert_eq!(meter.per_second(at(1_000_000)), 0.0);
    }
}
