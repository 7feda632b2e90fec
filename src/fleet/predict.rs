//! What the next delta will cost: learned from the cycles that were run.

use super::status::Convergence;

/// How much one more observation leaves of the weight of all earlier ones.
const FORGET: f64 = 0.9;

/// Seconds for a delta of so many bytes: a fixed part, and one for each byte; least squares over the latest cycles.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct CostModel {
    weight: f64,
    bytes: f64,
    seconds: f64,
    bytes_squared: f64,
    bytes_seconds: f64,
}

impl CostModel {
    /// A cycle of so many changed bytes took so many seconds.
    pub fn observe(&mut self, bytes: u64, seconds: f64) {
        if !seconds.is_finite() || seconds < 0.0 {
            return;
        }
        let bytes = bytes as f64;
        for sum in
            [&mut self.weight, &mut self.bytes, &mut self.seconds, &mut self.bytes_squared, &mut self.bytes_seconds]
        {
            *sum *= FORGET;
        }
        self.weight += 1.0;
        self.bytes += bytes;
        self.seconds += seconds;
        self.bytes_squared += bytes * bytes;
        self.bytes_seconds += bytes * seconds;
    }

    /// The fixed seconds, and the seconds for each byte.
    fn line(&self) -> Option<(f64, f64)> {
        if self.weight <= 0.0 {
            return None;
        }
        let (mean_bytes, mean_seconds) = (self.bytes / self.weight, self.seconds / self.weight);
        let variance = self.bytes_squared / self.weight - mean_bytes * mean_bytes;
        let covariance = self.bytes_seconds / self.weight - mean_bytes * mean_seconds;
        // Deltas of nearly one size say nothing about the slope. Then half of the time is taken for the fixed part: two
        // snapshots that wait for the monitors are most of a small cycle.
        let told = variance > 0.01 * mean_bytes * mean_bytes && variance > 0.0;
        let slope = if told { covariance / variance } else { 0.5 * mean_seconds / mean_bytes.max(1.0) };
        let most = mean_seconds / mean_bytes.max(1.0);
        let slope = slope.clamp(0.0, most);
        Some((mean_seconds - slope * mean_bytes, slope))
    }

    /// How many seconds a delta of so many bytes takes; `None` before the first observation.
    pub fn predict(&self, bytes: u64) -> Option<f64> {
        let (fixed, slope) = self.line()?;
        Some(fixed + slope * bytes as f64)
    }

    /// How many seconds one more byte takes.
    pub fn seconds_per_byte(&self) -> Option<f64> {
        self.line().map(|(_, slope)| slope)
    }
}

/// A mean over time in which what is long ago counts less.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SlowMean {
    value: Option<f64>,
}

impl SlowMean {
    /// Takes a value in, which stands for `share` (0 to 1) of the mean.
    pub fn observe(&mut self, value: f64, share: f64) {
        self.value = Some(self.value.map_or(value, |mean| mean + share.clamp(0.0, 1.0) * (value - mean)));
    }

    /// The mean; `None` before the first value.
    pub fn get(&self) -> Option<f64> {
        self.value
    }
}

/// Whether a server's lag comes down. `change_rate` in bytes a second; `lag` and `target_lag` in seconds; `throttled`
/// names the limit that its reads run into.
pub fn convergence(
    model: &CostModel,
    change_rate: Option<f64>,
    lag: Option<f64>,
    target_lag: f64,
    throttled: Option<&str>,
) -> Convergence {
    let (Some((fixed, slope)), Some(rate)) = (model.line(), change_rate) else {
        return match lag {
            Some(lag) if lag <= target_lag => Convergence::InStep,
            _ => Convergence::Unknown,
        };
    };
    // While a delta is carried, rate × its time changes again: cycles tend to fixed / (1 - slope × rate).
    let share = slope * rate;
    let settles = if share < 1.0 { fixed / (1.0 - share) } else { f64::INFINITY };
    if settles > target_lag {
        return Convergence::Diverging { cure: cure(rate, slope, throttled) };
    }
    match lag {
        Some(lag) if lag <= target_lag => Convergence::InStep,
        _ => Convergence::Converging,
    }
}

fn cure(rate: f64, slope: f64, throttled: Option<&str>) -> String {
    let mib = |bytes: f64| bytes / f64::from(1 << 20);
    let moved = if slope > 0.0 { mib(1.0 / slope) } else { 0.0 };
    let facts = format!("{:.1} MiB/s change and {moved:.1} MiB/s are moved", mib(rate));
    match throttled {
        Some(limit) => format!("{facts}: raise {limit} above what changes, or have the server write less"),
        None => format!(
            "{facts}: run fewer volumes at a time, move it from a worker of its own, or have the server write less \
             before the cutover"
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_found_again() {
        let mut model = CostModel::default();
        assert_eq!(model.predict(1), None);
        for bytes in [10u64 << 20, 40 << 20, 5 << 20, 100 << 20, 70 << 20] {
            model.observe(bytes, 1.5 + bytes as f64 / 50e6);
        }
        let predicted = model.predict(60 << 20).unwrap();
        let expected = 1.5 + (60u64 << 20) as f64 / 50e6;
        assert!((predicted - expected).abs() < 0.01, "{predicted} {expected}");
    }

    #[test]
    fn it_follows_a_storage_that_gets_slower() {
        let mut model = CostModel::default();
        for round in 0..60u64 {
            let bytes = (round % 5 + 1) * (10 << 20);
            let speed = if round < 20 { 100e6 } else { 20e6 };
            model.observe(bytes, 1.0 + bytes as f64 / speed);
        }
        let expected = 1.0 + (30u64 << 20) as f64 / 20e6;
        assert!((model.predict(30 << 20).unwrap() / expected - 1.0).abs() < 0.1);
    }

    #[test]
    fn sizes_that_are_all_the_same_predict_themselves_and_never_a_negative_time() {
        let mut model = CostModel::default();
        for _ in 0..5 {
            model.observe(8 << 20, 2.0);
        }
        assert!((model.predict(8 << 20).unwrap() - 2.0).abs() < 1e-9);
        assert!(model.predict(0).unwrap() >= 0.0);
        let mut falling = CostModel::default();
        falling.observe(1 << 20, 3.0);
        falling.observe(100 << 20, 1.0);
        assert!(falling.predict(1 << 30).unwrap() >= 0.0 && falling.predict(0).unwrap() >= 0.0);
    }

    #[test]
    fn convergence_is_told_from_the_rates() {
        let mut model = CostModel::default();
        for bytes in [10e6, 20e6, 40e6, 80e6] {
            model.observe(bytes as u64, 1.0 + bytes / 10e6);
        }
        let told = |rate, lag| convergence(&model, Some(rate), Some(lag), 60.0, None);
        assert_eq!(told(1e6, 10.0), Convergence::InStep);
        assert_eq!(told(1e6, 100.0), Convergence::Converging);
        assert!(matches!(told(12e6, 10.0), Convergence::Diverging { .. }));
        let throttled = convergence(&model, Some(12e6), Some(99.0), 60.0, Some("the limit of pool sata (9.5 MiB/s)"));
        let Convergence::Diverging { cure } = throttled else { panic!("{throttled:?}") };
        assert!(cure.contains("raise the limit of pool sata"), "{cure}");
        assert_eq!(convergence(&CostModel::default(), None, None, 60.0, None), Convergence::Unknown);
    }
}
