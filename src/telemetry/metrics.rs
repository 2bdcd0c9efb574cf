//! The Prometheus registry and everything in it.

use std::time::Duration;

use prometheus::core::Collector;
use prometheus::{
    Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge,
    IntGaugeVec, Opts, Registry, TextEncoder,
};

use super::gpu::GpuGauges;
use super::memory;
use super::request::{Outcome, RequestGuard};
use crate::ops::device::DeviceMemory;

/// Seconds: a short text takes about a millisecond on a CPU core.
const SECONDS: [f64; 14] = [
    0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.125, 0.25, 0.5, 1.0, 4.0, 16.0,
];
const BATCH_SEQUENCES: [f64; 9] = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0];
const BATCH_TOKENS: [f64; 10] = [
    8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 4096.0, 16384.0,
];

/// Whose latency a report gives.
const MODELS: [&str; 2] = ["student", "teacher"];

/// All metrics of a server. Each has a registry of its own, so that tests can run several servers
/// in one process.
///
/// The label `task` only ever holds names of tasks that exist, so that no client can make series.
pub struct Metrics {
    registry: Registry,
    http_requests: IntCounterVec,
    pub(super) requests: IntCounterVec,
    pub(super) request_seconds: HistogramVec,
    pub(super) tokenize_seconds: HistogramVec,
    pub(super) queue_seconds: HistogramVec,
    pub(super) compute_seconds: HistogramVec,
    pub(super) in_flight: IntGauge,
    queue_depth: IntGauge,
    batch_sequences: Histogram,
    batch_tokens: Histogram,
    batch_seconds: Histogram,
    live_version: IntGaugeVec,
    students: IntGaugeVec,
    latency: GaugeVec,
    speed_up: GaugeVec,
    adapters: IntGauge,
    adapter_bytes: IntGauge,
    adapter_loads: IntCounterVec,
    adapter_load_seconds: Histogram,
    adapter_evictions: IntCounter,
    jobs: IntGaugeVec,
    store_errors: IntCounter,
    training_loss: Gauge,
    training_tokens_per_second: Gauge,
    process_resident: IntGauge,
    process_peak: IntGauge,
    gpu: GpuGauges,
}

/// Latency of one text alone (batch 1), as the live version's report gives it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct MeasuredLatency {
    pub student_p50: Option<Duration>,
    pub teacher_p50: Option<Duration>,
    /// Teacher's latency over the student's.
    pub speed_up: Option<f64>,
}

impl Metrics {
    pub fn new() -> Result<Self, prometheus::Error> {
        let r = Registry::new();
        let by_task = |name, help| seconds(&r, name, help);
        Ok(Self {
            http_requests: register(
                &r,
                IntCounterVec::new(
                    Opts::new(
                        "kdlora_http_requests_total",
                        "Answered requests of all routes, by method, route template and status.",
                    ),
                    &["method", "route", "status"],
                )?,
            )?,
            requests: register(
                &r,
                IntCounterVec::new(
                    Opts::new(
                        "kdlora_requests_total",
                        "Classification requests by task and outcome.",
                    ),
                    &["task", "outcome"],
                )?,
            )?,
            request_seconds: by_task(
                "kdlora_request_seconds",
                "Time from the head of a request to its answer.",
            )?,
            tokenize_seconds: by_task(
                "kdlora_tokenize_seconds",
                "Time in the tokenizer, with the wait for it.",
            )?,
            queue_seconds: by_task(
                "kdlora_queue_seconds",
                "Time from tokens to the start of the first batch.",
            )?,
            compute_seconds: by_task(
                "kdlora_compute_seconds",
                "Time from the start of a request's first batch to the end of its last.",
            )?,
            in_flight: gauge(&r, "kdlora_in_flight_requests", "Requests in the server.")?,
            queue_depth: gauge(&r, "kdlora_queue_sequences", "Sequences that wait.")?,
            batch_sequences: histogram(
                &r,
                "kdlora_batch_sequences",
                "Sequences in a batch.",
                &BATCH_SEQUENCES,
            )?,
            batch_tokens: histogram(
                &r,
                "kdlora_batch_tokens",
                "Tokens in a batch.",
                &BATCH_TOKENS,
            )?,
            batch_seconds: histogram(
                &r,
                "kdlora_batch_seconds",
                "Forward pass of a batch.",
                &SECONDS,
            )?,
            live_version: gauges(
                &r,
                "kdlora_live_version",
                "Version that answers for the task.",
                &["task"],
            )?,
            students: gauges(
                &r,
                "kdlora_task_students",
                "Tasks by whether their live version was trained on the student that serves.",
                &["student"],
            )?,
            latency: register(
                &r,
                GaugeVec::new(
                    Opts::new(
                        "kdlora_measured_latency_p50_seconds",
                        "Median latency of one text, as the live version's report gives it.",
                    ),
                    &["task", "model"],
                )?,
            )?,
            speed_up: register(
                &r,
                GaugeVec::new(
                    Opts::new(
                        "kdlora_measured_speed_up",
                        "The teacher's latency over the student's, as the live version's report gives it.",
                    ),
                    &["task"],
                )?,
            )?,
            adapters: gauge(&r, "kdlora_adapters", "Adapters in memory.")?,
            adapter_bytes: gauge(
                &r,
                "kdlora_adapter_memory_bytes",
                "Memory of the adapters.",
            )?,
            adapter_loads: register(
                &r,
                IntCounterVec::new(
                    Opts::new(
                        "kdlora_adapter_loads_total",
                        "Versions read into memory, by outcome.",
                    ),
                    &["outcome"],
                )?,
            )?,
            adapter_load_seconds: histogram(
                &r,
                "kdlora_adapter_load_seconds",
                "Time to read a version into memory, with the wait for its turn and for room.",
                &SECONDS,
            )?,
            adapter_evictions: register(
                &r,
                IntCounter::new(
                    "kdlora_adapter_evictions_total",
                    "Versions that left memory to make room.",
                )?,
            )?,
            jobs: gauges(&r, "kdlora_jobs", "Distillation jobs by state.", &["state"])?,
            store_errors: register(
                &r,
                IntCounter::new(
                    "kdlora_store_errors_total",
                    "Writes to the state folder that the disk or the database refused.",
                )?,
            )?,
            training_loss: float(
                &r,
                "kdlora_training_loss",
                "Loss of the running job; NaN where none trains.",
            )?,
            training_tokens_per_second: float(
                &r,
                "kdlora_training_tokens_per_second",
                "Speed of the running job; 0 where none runs.",
            )?,
            process_resident: gauge(
                &r,
                "kdlora_process_resident_memory_bytes",
                "Resident memory of the server process.",
            )?,
            process_peak: gauge(
                &r,
                "kdlora_process_peak_resident_memory_bytes",
                "Highest resident memory of the server process so far.",
            )?,
            gpu: GpuGauges::new(&r)?,
            registry: r,
        }
        .quiet())
    }

    /// No job trains at first.
    fn quiet(self) -> Self {
        self.training(None, None);
        self
    }

    /// A request has been answered. Each label must have few values, whatever clients send.
    pub fn http_request(&self, method: &str, route: &str, status: u16) {
        self.http_requests
            .with_label_values(&[method, route, &status.to_string()])
            .inc();
    }

    /// A write to the state folder has failed.
    pub fn store_failed(&self) {
        self.store_errors.inc();
    }

    /// A classification request has come for `task`, which must be the name of a known one.
    pub fn request(&self, task: &str) -> RequestGuard<'_> {
        RequestGuard::new(self, task)
    }

    /// Sequences that wait in the queue.
    pub fn queue_depth(&self, sequences: usize) {
        self.queue_depth.set(to_i64(sequences));
    }

    /// A batch has been computed.
    pub fn batch(&self, sequences: usize, tokens: usize, took: Duration) {
        self.batch_sequences.observe(sequences as f64);
        self.batch_tokens.observe(tokens as f64);
        self.batch_seconds.observe(took.as_secs_f64());
    }

    /// A version has gone live.
    pub fn task_live(&self, task: &str, version: u64, measured: MeasuredLatency) {
        self.live_version
            .with_label_values(&[task])
            .set(to_i64(version));
        for (model, p50) in MODELS
            .into_iter()
            .zip([measured.student_p50, measured.teacher_p50])
        {
            let labels = [task, model];
            match p50 {
                Some(p50) => self
                    .latency
                    .with_label_values(&labels)
                    .set(p50.as_secs_f64()),
                // The version before may have had a figure.
                None => drop(self.latency.remove_label_values(&labels)),
            }
        }
        match measured.speed_up {
            Some(factor) => self.speed_up.with_label_values(&[task]).set(factor),
            None => drop(self.speed_up.remove_label_values(&[task])),
        }
    }

    /// Tasks whose live version is known to be the student's, is not known to be, and is not.
    pub fn students(&self, verified: usize, unverified: usize, mismatched: usize) {
        for (student, tasks) in [
            ("verified", verified),
            ("unverified", unverified),
            ("mismatch", mismatched),
        ] {
            let gauge = self.students.with_label_values(&[student]);
            gauge.set(to_i64(tasks));
        }
    }

    /// Adapters in memory, and their bytes.
    pub fn adapters(&self, count: usize, bytes: u64) {
        self.adapters.set(to_i64(count));
        self.adapter_bytes.set(to_i64(bytes));
    }

    /// A version has been read into memory, or could not be.
    pub fn adapter_load(&self, loaded: bool, took: Duration) {
        let outcome = if loaded { "ok" } else { "failed" };
        self.adapter_loads.with_label_values(&[outcome]).inc();
        self.adapter_load_seconds.observe(took.as_secs_f64());
    }

    /// A version has left memory to make room.
    pub fn adapter_evicted(&self) {
        self.adapter_evictions.inc();
    }

    /// The task does not answer any more: its series end.
    pub fn task_gone(&self, task: &str) {
        let by_task = [
            &self.request_seconds,
            &self.tokenize_seconds,
            &self.queue_seconds,
            &self.compute_seconds,
        ];
        for histogram in by_task {
            let _ = histogram.remove_label_values(&[task]);
        }
        for outcome in Outcome::ALL {
            let _ = self.requests.remove_label_values(&[task, outcome.label()]);
        }
        let _ = self.live_version.remove_label_values(&[task]);
        let _ = self.speed_up.remove_label_values(&[task]);
        for model in MODELS {
            let _ = self.latency.remove_label_values(&[task, model]);
        }
    }

    /// Number of jobs in one state.
    pub fn jobs(&self, state: &str, count: u64) {
        self.jobs.with_label_values(&[state]).set(to_i64(count));
    }

    /// The student has been loaded onto a GPU; `read` says what this process uses there.
    pub fn student_on_gpu(&self, read: impl Fn() -> Option<DeviceMemory> + Send + Sync + 'static) {
        self.gpu.student_loaded(read);
    }

    /// Progress of the running job; both `None` when it has ended.
    pub fn training(&self, loss: Option<f64>, tokens_per_second: Option<f64>) {
        self.training_loss.set(loss.unwrap_or(f64::NAN));
        self.training_tokens_per_second
            .set(tokens_per_second.unwrap_or(0.0));
    }

    /// The most memory of a GPU that the running job has taken so far; `None` when it has ended.
    pub fn training_gpu_memory(&self, bytes: Option<u64>) {
        self.gpu.training(bytes);
    }

    /// All metrics in the text format of Prometheus.
    pub fn render(&self) -> Result<String, prometheus::Error> {
        if let Some(bytes) = memory::resident_bytes() {
            self.process_resident.set(to_i64(bytes));
        }
        if let Some(bytes) = memory::peak_resident_bytes() {
            self.process_peak.set(to_i64(bytes));
        }
        let adapters = self.adapter_bytes.get();
        self.gpu.refresh(u64::try_from(adapters).unwrap_or(0));
        TextEncoder::new().encode_to_string(&self.registry.gather())
    }
}

/// What is more than a gauge can hold is as much as it can.
pub(super) fn to_i64(count: impl TryInto<i64>) -> i64 {
    count.try_into().unwrap_or(i64::MAX)
}

fn register<C: Collector + Clone + 'static>(
    registry: &Registry,
    collector: C,
) -> Result<C, prometheus::Error> {
    registry.register(Box::new(collector.clone()))?;
    Ok(collector)
}

pub(super) fn gauge(
    registry: &Registry,
    name: &str,
    help: &str,
) -> Result<IntGauge, prometheus::Error> {
    register(registry, IntGauge::new(name, help)?)
}

fn float(registry: &Registry, name: &str, help: &str) -> Result<Gauge, prometheus::Error> {
    register(registry, Gauge::new(name, help)?)
}

pub(super) fn gauges(
    registry: &Registry,
    name: &str,
    help: &str,
    labels: &[&str],
) -> Result<IntGaugeVec, prometheus::Error> {
    register(registry, IntGaugeVec::new(Opts::new(name, help), labels)?)
}

fn histogram(
    registry: &Registry,
    name: &str,
    help: &str,
    buckets: &[f64],
) -> Result<Histogram, prometheus::Error> {
    let opts = HistogramOpts::new(name, help).buckets(buckets.to_vec());
    register(registry, Histogram::with_opts(opts)?)
}

fn seconds(registry: &Registry, name: &str, help: &str) -> Result<HistogramVec, prometheus::Error> {
    let opts = HistogramOpts::new(name, help).buckets(SECONDS.to_vec());
    register(registry, HistogramVec::new(opts, &["task"])?)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    #[test]
    fn memory_of_the_gpu_is_told_by_kind() {
        let metrics = Metrics::new().expect("metrics");
        let kinds = |metrics: &Metrics| {
            let text = metrics.render().expect("text");
            let lines = text.lines().map(str::to_owned);
            let own = lines.filter(|line| line.starts_with("kdlora_gpu_memory_kind_bytes"));
            own.collect::<Vec<_>>()
        };
        metrics.adapters(1, 30);
        assert!(kinds(&metrics).is_empty(), "there is no GPU");

        let told = Arc::new(AtomicU64::new(500));
        let peak = Arc::clone(&told);
        metrics.student_on_gpu(move || {
            let peak = peak.load(Ordering::Relaxed);
            let (used, reserved) = (500, 2000);
            Some(DeviceMemory {
                used,
                peak,
                reserved,
            })
        });
        told.store(1200, Ordering::Relaxed);
        metrics.training_gpu_memory(Some(77));
        let of = |kind: &str, bytes: u64| {
            format!("kdlora_gpu_memory_kind_bytes{{kind=\"{kind}\"}} {bytes}")
        };
        let all = [
            of("activations", 1200 - 500 - 30),
            of("adapters", 30),
            of("training", 77),
            of("weights", 500),
        ];
        assert_eq!(kinds(&metrics), all);
        metrics.training_gpu_memory(None);
        assert!(!kinds(&metrics).contains(&of("training", 77)));
    }

    #[test]
    fn a_version_without_figures_takes_the_old_ones_away() {
        let metrics = Metrics::new().expect("metrics");
        let measured = MeasuredLatency {
            student_p50: Some(Duration::from_millis(2)),
            teacher_p50: Some(Duration::from_millis(9)),
            speed_up: Some(4.5),
        };
        metrics.task_live("mood", 1, measured);
        let text = metrics.render().expect("text");
        assert!(text.contains(
            "kdlora_measured_latency_p50_seconds{model=\"student\",task=\"mood\"} 0.002"
        ));
        assert!(text.contains("kdlora_measured_speed_up{task=\"mood\"} 4.5"));
        metrics.task_live("mood", 2, MeasuredLatency::default());
        let text = metrics.render().expect("text");
        assert!(text.contains("kdlora_live_version{task=\"mood\"} 2"));
        assert!(
            !text.contains("speed_up{") && !text.contains("p50_seconds{"),
            "{text}"
        );
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn process_memory_is_told() {
        let text = Metrics::new()
            .and_then(|metrics| metrics.render())
            .expect("text");
        let resident = text
            .lines()
            .find_map(|line| line.strip_prefix("kdlora_process_resident_memory_bytes "))
            .and_then(|bytes| bytes.parse::<u64>().ok());
        assert!(resident.is_some_and(|bytes| bytes > 100_000), "{text}");
    }
}
