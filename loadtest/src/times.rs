//! Histograms of times.

use std::time::Duration;

use hdrhistogram::Histogram;

use crate::report::Quantiles;

/// Significant decimal digits of a latency.
const DIGITS: u8 = 3;

/// Microseconds.
#[derive(Debug)]
pub(crate) struct Times(Histogram<u32>);

impl Times {
    pub(crate) fn new() -> Self {
        Self(Histogram::new(DIGITS).expect("up to five digits are allowed"))
    }

    pub(crate) fn add(&mut self, time: Duration) {
        let micros = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        // An hour is longer than anything waits here, and keeps the histogram small.
        let micros = micros.clamp(1, 3_600_000_000);
        self.0.record(micros).expect("it grows as it needs to");
    }

    pub(crate) fn merge(&mut self, other: &Self) {
        self.0.add(&other.0).expect("it grows as it needs to");
    }

    pub(crate) fn quantiles(&self) -> Quantiles {
        let ms = |micros: f64| micros / 1000.0;
        let at = |q: f64| ms(self.0.value_at_quantile(q) as f64);
        Quantiles {
            count: self.0.len(),
            mean_ms: ms(self.0.mean()),
            p50_ms: at(0.5),
            p90_ms: at(0.9),
            p99_ms: at(0.99),
            p999_ms: at(0.999),
            max_ms: ms(self.0.max() as f64),
        }
    }

    pub(crate) fn if_any(&self) -> Option<Quantiles> {
        (!self.0.is_empty()).then(|| self.quantiles())
    }
}

/// Quantiles of a few times.
pub(crate) fn quantiles(times: impl IntoIterator<Item = Duration>) -> Quantiles {
    let mut all = Times::new();
    for time in times {
        all.add(time);
    }
    all.quantiles()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_have_three_digits_from_microseconds_to_minutes() {
        let times = (1..=1_000).map(|i| Duration::from_micros(i * i * 60));
        let found = quantiles(times);
        assert_eq!(found.count, 1_000);
        for (value, micros) in [
            (found.p50_ms, 500.0_f64.powi(2) * 60.0),
            (found.p99_ms, 990.0_f64.powi(2) * 60.0),
            (found.max_ms, 1_000.0_f64.powi(2) * 60.0),
        ] {
            assert!((value * 1000.0 / micros - 1.0).abs() < 1e-3, "{value}");
        }
    }

    #[test]
    fn nothing_has_no_quantiles_and_no_time_is_too_long() {
        assert_eq!(Times::new().if_any(), None);
        assert_eq!(quantiles([Duration::MAX]).count, 1);
    }
}
