//! How long and how large a job's process may become.

use std::convert::Infallible;
use std::fmt;
use std::future::pending;
use std::time::Duration;

use tokio::time::{MissedTickBehavior, interval, sleep};

use crate::distill::spec::JobSpec;
use crate::telemetry::memory;

/// Between two looks at the process's memory. A process touches some hundred megabytes meanwhile
/// at most.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Bounds of a job's process; `None` is no bound.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct JobLimits {
    pub time: Option<Duration>,
    /// Bytes of memory of its own, see [`memory::own_bytes_of`].
    pub memory: Option<u64>,
}

/// A bound that a process has gone beyond.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Exceeded {
    Time { limit: Duration },
    Memory { bytes: u64, limit: u64 },
}

impl JobLimits {
    /// The server's bounds, where the request does not ask for tighter ones.
    pub(super) fn tightened(self, job: &JobSpec) -> Self {
        let asked = Self {
            time: job.time_limit_seconds.map(Duration::from_secs),
            memory: job.memory_limit_bytes,
        };
        Self {
            time: least(self.time, asked.time),
            memory: least(self.memory, asked.memory),
        }
    }

    /// Completes when the process, which starts at this moment, is beyond a bound.
    pub(super) async fn exceeded_by(self, process: Option<u32>) -> Exceeded {
        tokio::select! {
            exceeded = self.time_exceeded() => exceeded,
            exceeded = self.memory_exceeded(process) => exceeded,
        }
    }

    async fn time_exceeded(self) -> Exceeded {
        match self.time {
            Some(limit) => {
                sleep(limit).await;
                Exceeded::Time { limit }
            }
            None => never().await,
        }
    }

    async fn memory_exceeded(self, process: Option<u32>) -> Exceeded {
        let (Some(limit), Some(process)) = (self.memory, process) else {
            return never().await;
        };
        let mut look = interval(LOOK_EVERY);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            look.tick().await;
            match memory::own_bytes_of(process) {
                Some(bytes) if bytes > limit => return Exceeded::Memory { bytes, limit },
                _ => {}
            }
        }
    }
}

async fn never() -> Exceeded {
    match pending::<Infallible>().await {}
}

fn least<T: Ord>(a: Option<T>, b: Option<T>) -> Option<T> {
    [a, b].into_iter().flatten().min()
}

impl fmt::Display for Exceeded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mebibytes = |bytes: u64| bytes.div_ceil(1 << 20);
        match *self {
            Self::Time { limit } => write!(
                f,
                "the pass took longer than its time limit of {}",
                humantime::format_duration(limit)
            ),
            Self::Memory { bytes, limit } => write!(
                f,
                "the pass used {} MiB of memory, more than its limit of {} MiB; a smaller \
                 batch_size or max_length needs less",
                mebibytes(bytes),
                mebibytes(limit)
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_may_tighten_the_bounds_of_the_server_only() {
        let server = JobLimits {
            time: Some(Duration::from_secs(60)),
            memory: None,
        };
        let asks = |time, memory| JobSpec {
            time_limit_seconds: time,
            memory_limit_bytes: memory,
            ..JobSpec::default()
        };
        assert_eq!(server.tightened(&asks(None, None)), server);
        assert_eq!(server.tightened(&asks(Some(90), None)), server);
        let tighter = JobLimits {
            time: Some(Duration::from_secs(5)),
            memory: Some(1 << 30),
        };
        assert_eq!(server.tightened(&asks(Some(5), Some(1 << 30))), tighter);
    }
}
