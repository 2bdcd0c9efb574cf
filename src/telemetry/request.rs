//! One place where a request is counted and timed.

use std::time::{Duration, Instant};

use super::{Metrics, traces};

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    Ok,
    /// The request itself was at fault (4xx).
    Invalid,
    /// The queue was full (429).
    Full,
    /// The deadline passed (504).
    Deadline,
    /// The server was at fault (500).
    Failed,
    /// The client went away before the answer.
    Gone,
}

impl Outcome {
    pub const ALL: [Self; 6] = [
        Self::Ok,
        Self::Invalid,
        Self::Full,
        Self::Deadline,
        Self::Failed,
        Self::Gone,
    ];

    pub(super) fn label(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Invalid => "invalid",
            Self::Full => "full",
            Self::Deadline => "deadline",
            Self::Failed => "failed",
            Self::Gone => "gone",
        }
    }
}

/// Counts a request from its creation until it is dropped, whatever the way out: a request whose
/// client goes away is dropped in the middle, and counts as [`Outcome::Gone`].
pub struct RequestGuard<'a> {
    metrics: &'a Metrics,
    task: String,
    started: Instant,
    outcome: Outcome,
}

impl<'a> RequestGuard<'a> {
    pub(super) fn new(metrics: &'a Metrics, task: &str) -> Self {
        metrics.in_flight.inc();
        Self {
            metrics,
            task: task.to_owned(),
            started: Instant::now(),
            outcome: Outcome::Gone,
        }
    }

    /// The times of a request that was computed.
    pub fn timings(&self, tokenize: Duration, queue: Duration, compute: Duration) {
        let metrics = self.metrics;
        for (histogram, time) in [
            (&metrics.tokenize_seconds, tokenize),
            (&metrics.queue_seconds, queue),
            (&metrics.compute_seconds, compute),
        ] {
            histogram
                .with_label_values(&[&self.task])
                .observe(time.as_secs_f64());
        }
        traces::stages([
            ("tokenize", tokenize),
            ("queue", queue),
            ("compute", compute),
        ]);
    }

    /// The request has ended.
    pub fn finish(mut self, outcome: Outcome) {
        self.outcome = outcome;
    }
}

impl Drop for RequestGuard<'_> {
    fn drop(&mut self) {
        let metrics = self.metrics;
        metrics.in_flight.dec();
        metrics
            .requests
            .with_label_values(&[self.task.as_str(), self.outcome.label()])
            .inc();
        metrics
            .request_seconds
            .with_label_values(&[&self.task])
            .observe(self.started.elapsed().as_secs_f64());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_way_out_counts_once() {
        let metrics = Metrics::new().expect("metrics");
        metrics.request("mood").finish(Outcome::Ok);
        metrics.request("mood").finish(Outcome::Full);
        drop(metrics.request("mood"));
        let running = metrics.request("mood");
        let text = metrics.render().expect("text");
        for line in [
            "kdlora_requests_total{outcome=\"ok\",task=\"mood\"} 1",
            "kdlora_requests_total{outcome=\"full\",task=\"mood\"} 1",
            "kdlora_requests_total{outcome=\"gone\",task=\"mood\"} 1",
            "kdlora_request_seconds_count{task=\"mood\"} 3",
            "kdlora_in_flight_requests 1",
        ] {
            assert!(text.contains(line), "{line} in {text}");
        }
        drop(running);
    }
}
