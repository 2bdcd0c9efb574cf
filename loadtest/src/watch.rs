//! Samples of the server's process while a load goes on.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::task::JoinHandle;
use tokio::time::{Instant, interval, timeout};
use tokio_util::sync::CancellationToken;

use crate::http::Pool;
use crate::machine::resident_bytes;
use crate::session::Session;
use crate::target::Question;

const EVERY: Duration = Duration::from_secs(1);

/// Seconds below which a slope says more of the load's beginning than of leaks.
const SLOPE_NEEDS: f64 = 120.0;

/// Most samples that a report keeps.
const MOST_SAMPLES: usize = 600;

/// What was sampled.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Watched {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) resident_mib: Option<Series>,
    /// Slope of a line through the second half of the samples: what a leak would look like once
    /// caches are full. Absent after a short watch.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) resident_mib_per_hour: Option<f64>,
    /// Gauges of `/metrics` that have no labels, by name.
    pub(crate) gauges: BTreeMap<String, Series>,
    /// The process ended meanwhile.
    pub(crate) ended: bool,
    /// Thinned out evenly.
    pub(crate) samples: Vec<Sample>,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Series {
    pub(crate) first: f64,
    pub(crate) last: f64,
    pub(crate) max: f64,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Sample {
    pub(crate) seconds: f64,
    pub(crate) resident_mib: f64,
}

/// Watches until it is stopped.
pub(crate) struct Watch {
    stop: CancellationToken,
    /// `None`: there is nothing to watch.
    watching: Option<JoinHandle<Watched>>,
}

impl Watch {
    pub(crate) fn start(session: &Arc<Session>) -> Self {
        let stop = CancellationToken::new();
        let watching = session.watch_pid.map(|pid| {
            let (session, stop) = (Arc::clone(session), stop.clone());
            tokio::spawn(async move { watch(&session, pid, stop).await })
        });
        Self { stop, watching }
    }

    pub(crate) async fn stop(self) -> Option<Watched> {
        self.stop.cancel();
        self.watching?.await.ok()
    }
}

async fn watch(session: &Session, pid: u32, stop: CancellationToken) -> Watched {
    // The load may have taken all connections of its own.
    let pool = Pool::new(&session.target.authority, 1);
    let start = Instant::now();
    let mut samples = Vec::new();
    let mut gauges = BTreeMap::new();
    let mut ended = false;
    let mut ticks = interval(EVERY);
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = stop.cancelled() => break,
        }
        let Some(bytes) = resident_bytes(pid) else {
            ended = true;
            break;
        };
        samples.push(Sample {
            seconds: start.elapsed().as_secs_f64(),
            resident_mib: bytes as f64 / f64::from(1 << 20),
        });
        let metrics = session.target.fetch(&pool, Question::get("/metrics"));
        if let Ok(Ok(reply)) = timeout(EVERY, metrics).await {
            add_gauges(&mut gauges, &String::from_utf8_lossy(&reply.body));
        }
    }
    Watched {
        resident_mib: series(samples.iter().map(|sample| sample.resident_mib)),
        resident_mib_per_hour: slope_of_second_half(&samples),
        gauges,
        ended,
        samples: thinned(samples),
    }
}

fn series(mut values: impl Iterator<Item = f64>) -> Option<Series> {
    let mut series = Series::of(values.next()?);
    values.for_each(|value| series.add(value));
    Some(series)
}

impl Series {
    fn of(value: f64) -> Self {
        Self {
            first: value,
            last: value,
            max: value,
        }
    }

    fn add(&mut self, value: f64) {
        self.last = value;
        self.max = self.max.max(value);
    }
}

/// Takes in the unlabelled gauges of Prometheus' text format.
fn add_gauges(gauges: &mut BTreeMap<String, Series>, text: &str) {
    let mut gauge = "";
    for line in text.lines() {
        if let Some(kind) = line.strip_prefix("# TYPE ") {
            gauge = kind.strip_suffix(" gauge").unwrap_or_default();
        } else if let Some((name, value)) = line.split_once(' ')
            && name == gauge
            && let Ok(value) = value.trim().parse::<f64>()
            && value.is_finite()
        {
            gauges
                .entry(name.to_owned())
                .and_modify(|series| series.add(value))
                .or_insert_with(|| Series::of(value));
        }
    }
}

/// Least squares.
fn slope_of_second_half(samples: &[Sample]) -> Option<f64> {
    let half = &samples[samples.len() / 2..];
    let span = half.last()?.seconds - half.first()?.seconds;
    if span < SLOPE_NEEDS {
        return None;
    }
    let mean = |value: fn(&Sample) -> f64| half.iter().map(value).sum::<f64>() / half.len() as f64;
    let (x, y) = (mean(|s| s.seconds), mean(|s| s.resident_mib));
    let (mut covariance, mut variance) = (0.0, 0.0);
    for sample in half {
        covariance += (sample.seconds - x) * (sample.resident_mib - y);
        variance += (sample.seconds - x).powi(2);
    }
    Some(covariance / variance * 3600.0)
}

fn thinned(samples: Vec<Sample>) -> Vec<Sample> {
    let step = samples.len().div_ceil(MOST_SAMPLES).max(1);
    samples.into_iter().step_by(step).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(count: u32, resident_mib: impl Fn(f64) -> f64) -> Vec<Sample> {
        let sample = |i: u32| Sample {
            seconds: f64::from(i),
            resident_mib: resident_mib(f64::from(i)),
        };
        (0..count).map(sample).collect()
    }

    #[test]
    fn growth_is_that_of_the_second_half() {
        // Grows to 200 in a minute, then a MiB a minute.
        let samples = line(600, |s| {
            if s < 60.0 {
                140.0 + s
            } else {
                200.0 + s / 60.0
            }
        });
        let slope = slope_of_second_half(&samples).expect("a slope");
        assert!((slope - 60.0).abs() < 1e-6, "{slope}");
        assert_eq!(slope_of_second_half(&samples[..200]), None);
        assert_eq!(slope_of_second_half(&[]), None);
    }

    #[test]
    fn gauges_without_labels_are_taken_and_nothing_else() {
        let mut gauges = BTreeMap::new();
        for depth in [3, 9, 5] {
            let text = format!(
                "# HELP depth Waiting.\n# TYPE depth gauge\ndepth {depth}\n\
                 # TYPE live gauge\nlive{{task=\"a\"}} 2\n\
                 # TYPE loss gauge\nloss NaN\n\
                 # TYPE seconds histogram\nseconds_sum 4\nseconds_count 2\n"
            );
            add_gauges(&mut gauges, &text);
        }
        let expected = Series {
            first: 3.0,
            last: 5.0,
            max: 9.0,
        };
        assert_eq!(gauges, BTreeMap::from([("depth".to_owned(), expected)]));
    }

    #[test]
    fn a_long_watch_keeps_a_bounded_number_of_samples() {
        let kept = thinned(line(3_601, |_| 1.0));
        assert_eq!(kept.len(), 515);
        assert!((kept[1].seconds - 7.0).abs() < 1e-9);
        assert_eq!(thinned(line(20, |_| 1.0)).len(), 20);
    }
}
