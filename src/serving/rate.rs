//! How fast the workers are, as measured.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// What a batch weighs in the measurement after the next one.
const DECAY: f64 = 0.9;
/// No client should be sent away for longer, whatever the measurements say.
const LONGEST_WAIT: Duration = Duration::from_secs(60);
/// Tokens that the workers compute in a second.
pub(super) struct ServiceRate {
    workers: usize,
    latest: Mutex<Latest>,
}

/// Sums over the latest batches, older ones weighing less. Sums rather than a mean of ratios: a
/// batch of one short text takes long for its tokens, and says little of a full queue.
#[derive(Clone, Copy, Default)]
struct Latest {
    tokens: f64,
    /// That a worker took for them.
    seconds: f64,
}

impl ServiceRate {
    pub(super) fn new(workers: usize) -> Self {
        Self {
            workers,
            latest: Mutex::default(),
        }
    }

    /// A worker has computed a batch.
    pub(super) fn batch(&self, tokens: usize, time: Duration) {
        let mut latest = self.latest.lock().unwrap_or_else(PoisonError::into_inner);
        *latest = Latest {
            tokens: DECAY * latest.tokens + tokens as f64,
            seconds: DECAY * latest.seconds + time.as_secs_f64(),
        };
    }

    /// How long so many tokens take; none before a batch has been measured.
    pub(super) fn wait(&self, tokens: usize) -> Option<Duration> {
        let latest = *self.latest.lock().unwrap_or_else(PoisonError::into_inner);
        if latest.tokens == 0.0 {
            return None;
        }
        let seconds = latest.seconds / latest.tokens;
        let wait = seconds * tokens as f64 / self.workers.max(1) as f64;
        let wait = Duration::try_from_secs_f64(wait);
        Some(wait.map_or(LONGEST_WAIT, |wait| wait.min(LONGEST_WAIT)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_wait_is_the_work_over_the_rate_of_all_workers() {
        let rate = ServiceRate::new(2);
        assert_eq!(rate.wait(100), None);
        rate.batch(0, Duration::ZERO);
        assert_eq!(rate.wait(100), None);
        rate.batch(10, Duration::from_secs(1));
        assert_eq!(rate.wait(100), Some(Duration::from_secs(5)));
        assert_eq!(rate.wait(usize::MAX), Some(LONGEST_WAIT));
    }

    #[test]
    fn the_rate_follows_a_lasting_change() {
        let rate = ServiceRate::new(1);
        rate.batch(1000, Duration::from_secs(1000));
        // Short texts, each alone.
        for _ in 0..5 {
            rate.batch(3, Duration::from_secs(30));
        }
        assert!(rate.wait(10) < Some(Duration::from_secs(20)));
        for _ in 0..100 {
            rate.batch(10, Duration::from_secs(10));
        }
        let wait = rate.wait(10).expect("a measurement").as_secs_f64();
        assert!((wait - 10.0).abs() < 0.1, "{wait}");
    }
}
