//! Live versions in memory: read when they are first used, within a budget of bytes.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use tokio::sync::Semaphore;
use tokio::task::{JoinError, spawn_blocking};
use tokio::time::timeout;

use super::budget::{Budget, Reservation};
use super::{Entry, LiveTask, ModelError};
use crate::adapter::{AdapterError, Fit, Mismatch};
use crate::telemetry::{MeasuredLatency, Metrics, chain};
use crate::text::TokenizerError;

/// Versions that are read at a time. Reading takes a core from the workers.
const LOADS: usize = 2;
/// A version that could not be loaded is not tried again before this: every request would read it.
const RETRY_AFTER: Duration = Duration::from_secs(5);

/// Why a version can't be brought into memory.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error("the adapter can't be used with this student")]
    Adapter(#[from] AdapterError),
    #[error("the adapter failed on a first text")]
    WarmUp(#[from] ModelError),
    #[error("the adapter failed on a first text: its logits are {0:?}")]
    Logits(Vec<f32>),
    #[error("the first text can't be tokenised")]
    Tokenize(#[from] TokenizerError),
    #[error("the adapter needs {needed} bytes, more than --adapter-memory {limit}")]
    Memory { needed: u64, limit: u64 },
    #[error(
        "the adapter needs {needed} bytes, and those of other tasks, which are pinned or in use, \
         leave less of --adapter-memory {limit}"
    )]
    NoRoom { needed: u64, limit: u64 },
    #[error("loading the adapter was interrupted")]
    Interrupted(#[from] JoinError),
}

impl LoadError {
    /// The mismatch, of a version that was trained on another encoder.
    pub fn mismatch(&self) -> Option<&Mismatch> {
        match self {
            Self::Adapter(AdapterError::OtherEncoder(mismatch)) => Some(mismatch),
            _ => None,
        }
    }
}

/// Reads a version from its folder; called on threads that may block.
pub trait Load: Send + Sync + 'static {
    /// The memory that the version is expected to take, found without loading it. It is reserved
    /// first.
    fn expected_bytes(&self, entry: &Entry) -> u64;

    fn load(&self, entry: &Entry) -> Result<LiveTask, LoadError>;
}

/// The versions in memory. When their budget is used up, the least recently used leaves, but no
/// pinned one and none that a request uses.
pub struct Residents {
    loader: Arc<dyn Load>,
    budget: Arc<Budget>,
    /// Entries that were loaded, each once; some may have been evicted or replaced since.
    entries: Mutex<Vec<Weak<Entry>>>,
    loads: Semaphore,
    /// How long a version waits for others to be used no more.
    room_timeout: Duration,
    metrics: Arc<Metrics>,
}

impl Residents {
    /// `limit`: most bytes for all versions in memory together; `None` for no limit.
    pub fn new(loader: Arc<dyn Load>, limit: Option<u64>, metrics: Arc<Metrics>) -> Arc<Self> {
        let told = Arc::clone(&metrics);
        let tell = move |reserved: super::budget::Reserved| {
            told.adapters(reserved.count, reserved.bytes);
        };
        Arc::new(Self {
            loader,
            budget: Budget::new(limit.unwrap_or(u64::MAX), tell),
            entries: Mutex::default(),
            loads: Semaphore::new(LOADS),
            room_timeout: Duration::from_secs(10),
            metrics,
        })
    }

    /// The version, ready to answer; read now if it is not in memory. Whoever asks for it
    /// meanwhile waits for the same reading, and nobody else does.
    pub async fn acquire(
        self: &Arc<Self>,
        entry: &Arc<Entry>,
    ) -> Result<Arc<LiveTask>, Arc<LoadError>> {
        if let Some(task) = entry.in_use() {
            return Ok(task);
        }
        if let Fit::Mismatch(mismatch) = &entry.fit {
            return Err(Arc::new(AdapterError::from(mismatch.clone()).into()));
        }
        let (residents, entry) = (Arc::clone(self), Arc::clone(entry));
        // A task of its own: a client that goes away must not end what others wait for.
        tokio::spawn(async move { residents.load(&entry).await })
            .await
            .unwrap_or_else(|error| Err(Arc::new(error.into())))
    }

    /// Tells the metrics, once, that a version answers. It must be in the task table.
    pub(super) async fn report(&self, entry: &Arc<Entry>) {
        if entry.is_reported.swap(true, Ordering::Relaxed) {
            return;
        }
        let (metrics, entry) = (Arc::clone(&self.metrics), Arc::clone(entry));
        let report =
            move || metrics.task_live(&entry.name, entry.version, measured_latency(&entry));
        if let Err(error) = spawn_blocking(report).await {
            tracing::error!(%error, "could not tell the metrics which version answers");
        }
    }

    /// The task does not answer any more.
    pub(super) fn forget(&self, task: &str) {
        self.metrics.task_gone(task);
    }

    async fn load(&self, entry: &Arc<Entry>) -> Result<Arc<LiveTask>, Arc<LoadError>> {
        let _turn = entry.loading.lock().await;
        if let Some(task) = entry.in_use() {
            return Ok(task);
        }
        if let Some((at, error)) = entry.failed()
            && at.elapsed() < RETRY_AFTER
        {
            return Err(error);
        }
        // A version that has not answered before is loaded before it goes into the task table. Any
        // other one is in it, and has no series until it is first used: there may be 10,000 tasks.
        let is_published = !entry.unproven.load(Ordering::Relaxed);
        let started = Instant::now();
        let outcome = self.read(entry).await.map_err(Arc::new);
        self.metrics
            .adapter_load(outcome.is_ok(), started.elapsed());
        if let Err(error) = &outcome {
            tracing::error!(
                task = entry.name,
                version = entry.version,
                error = chain(&**error),
                "a version can't be loaded"
            );
        }
        entry.set(outcome.clone());
        let task = outcome?;
        self.remember(entry);
        entry.in_use();
        if is_published {
            self.report(entry).await;
        }
        Ok(task)
    }

    /// Adds a loaded entry to those that may be evicted.
    fn remember(&self, entry: &Arc<Entry>) {
        let mut entries = self.lock();
        // Each once, and none that has been replaced: promotions go on for as long as it runs.
        entries.retain(|other| {
            let other = other.upgrade();
            other.is_some_and(|other| other.is_resident() && !Arc::ptr_eq(&other, entry))
        });
        entries.push(Arc::downgrade(entry));
    }

    async fn read(&self, entry: &Arc<Entry>) -> Result<Arc<LiveTask>, LoadError> {
        let (loader, read) = (Arc::clone(&self.loader), Arc::clone(entry));
        let expected = spawn_blocking(move || loader.expected_bytes(&read)).await?;
        let limit = self.budget.limit();
        // An expectation is no reason to refuse a version.
        let expected = expected.min(limit);
        let mut memory = self.room(expected, expected).await?;
        let mut task = {
            // Never closed. Taken when there is room, so that nobody who waits for room keeps
            // others from loading.
            let _permit = self.loads.acquire().await;
            let (loader, read) = (Arc::clone(&self.loader), Arc::clone(entry));
            spawn_blocking(move || loader.load(&read)).await??
        };
        let needed = task.weight_bytes;
        if needed > limit {
            return Err(LoadError::Memory { needed, limit });
        }
        match needed.saturating_sub(memory.bytes()) {
            0 => memory.shrink(needed),
            more => memory.absorb(self.room(more, needed).await?),
        }
        task.memory = memory;
        Ok(Arc::new(task))
    }

    /// Reserves bytes, of the `needed` ones of a version, and makes room for them.
    async fn room(&self, bytes: u64, needed: u64) -> Result<Reservation, LoadError> {
        let limit = self.budget.limit();
        let room = self.budget.reserve(bytes, || self.evict_one());
        timeout(self.room_timeout, room)
            .await
            .map_err(|_| LoadError::NoRoom { needed, limit })
    }

    /// Lets the least recently used version go that can go; says whether there was one.
    fn evict_one(&self) -> bool {
        let entries = self.lock();
        let resident = entries.iter().filter_map(Weak::upgrade);
        let mut by_use: Vec<(u64, Arc<Entry>)> = resident
            .filter(|entry| entry.is_resident())
            .map(|entry| (entry.last_used(), entry))
            .collect();
        by_use.sort_unstable_by_key(|(last_used, _)| *last_used);
        let evicted = by_use.iter().any(|(_, entry)| entry.evict());
        if evicted {
            self.metrics.adapter_evicted();
        }
        evicted
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Weak<Entry>>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The figures of the report at `latency.batch_1`.
fn measured_latency(entry: &Entry) -> MeasuredLatency {
    let report = entry.report();
    let figure = |path: &str| report.as_ref()?.pointer(path)?.as_f64();
    let p50 = |model: &str| {
        let milliseconds = figure(&format!("/latency/batch_1/{model}/p50_ms"))?;
        Duration::try_from_secs_f64(milliseconds / 1000.0).ok()
    };
    MeasuredLatency {
        student_p50: p50("student"),
        teacher_p50: p50("teacher"),
        speed_up: figure("/latency/batch_1/speed_up"),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc;

    use super::*;
    use crate::adapter::Mode;
    use crate::serving::fixture;

    /// Versions of ten bytes; one named `broken` can't be read, `slow` waits at a gate, and `large`
    /// is larger than expected.
    #[derive(Default)]
    struct Shelf {
        loads: Mutex<HashMap<String, usize>>,
        gate: Option<Mutex<mpsc::Receiver<()>>>,
        entered: AtomicUsize,
        /// How often it was asked for a size.
        asked: AtomicUsize,
    }

    impl Shelf {
        fn loads(&self, name: &str) -> usize {
            *self.loads.lock().expect("no panic").get(name).unwrap_or(&0)
        }
    }

    impl Load for Shelf {
        fn expected_bytes(&self, entry: &Entry) -> u64 {
            self.asked.fetch_add(1, Ordering::SeqCst);
            match entry.name.as_str() {
                // A merged task is expected to change all of the encoder.
                name if name.starts_with("small") => 1_000,
                "large" => 4,
                _ => 10,
            }
        }

        fn load(&self, entry: &Entry) -> Result<LiveTask, LoadError> {
            *self
                .loads
                .lock()
                .expect("no panic")
                .entry(entry.name.clone())
                .or_default() += 1;
            self.entered.fetch_add(1, Ordering::SeqCst);
            if let (Some(gate), "slow") = (&self.gate, entry.name.as_str()) {
                let _ = gate.lock().expect("no panic").recv();
            }
            if entry.name == "broken" {
                return Err(LoadError::Logits(vec![f32::NAN]));
            }
            Ok(LiveTask {
                weight_bytes: 10,
                ..fixture::task(&entry.name, entry.version)
            })
        }
    }

    fn entry(name: &str, pinned: bool) -> Arc<Entry> {
        let folder = name.into();
        Arc::new(Entry::new(name.into(), 1, Mode::Hot, folder, pinned))
    }

    fn house(shelf: &Arc<Shelf>, limit: Option<u64>) -> Arc<Residents> {
        let metrics = Arc::new(Metrics::new().expect("metrics"));
        let loader: Arc<Shelf> = Arc::clone(shelf);
        Residents::new(loader, limit, metrics)
    }

    #[test]
    fn latency_is_taken_from_the_report_where_it_is_there() {
        let folder = tempfile::tempdir().expect("a folder");
        let entry = Entry::new("a".into(), 1, Mode::Hot, folder.path().into(), false);
        let measured = |report: &str| {
            std::fs::write(folder.path().join("report.json"), report).expect("a file");
            measured_latency(&entry)
        };
        let report = r#"{"latency": {"batch_1": {
            "student": {"p50_ms": 2.5}, "teacher": {"p50_ms": 20.0}, "speed_up": 8.0}}}"#;
        let expected = MeasuredLatency {
            student_p50: Some(Duration::from_micros(2500)),
            teacher_p50: Some(Duration::from_millis(20)),
            speed_up: Some(8.0),
        };
        assert_eq!(measured(report), expected);
        for report in ["{\"latency\": null}", "3", "no JSON"] {
            assert_eq!(measured(report), MeasuredLatency::default());
        }
    }

    #[tokio::test]
    async fn the_least_recently_used_leaves_and_comes_back() {
        let shelf = Arc::new(Shelf::default());
        let residents = house(&shelf, Some(25));
        let [a, b, c] = ["a", "b", "c"].map(|name| entry(name, false));
        for used in [&a, &b, &a, &c] {
            drop(residents.acquire(used).await.expect("a version"));
        }
        assert!(a.is_resident() && !b.is_resident() && c.is_resident());
        drop(residents.acquire(&b).await.expect("it comes back"));
        assert!(!a.is_resident());
        assert_eq!(["a", "b", "c"].map(|name| shelf.loads(name)), [1, 2, 1]);
        let text = residents.metrics.render().expect("text");
        for line in [
            "kdlora_adapters 2",
            "kdlora_adapter_memory_bytes 20",
            "kdlora_adapter_loads_total{outcome=\"ok\"} 4",
            "kdlora_adapter_evictions_total 2",
        ] {
            assert!(text.contains(line), "{line} in {text}");
        }
    }

    #[tokio::test]
    async fn what_is_pinned_or_in_use_stays_and_the_next_one_waits() {
        let shelf = Arc::new(Shelf::default());
        let residents = house(&shelf, Some(25));
        let (pinned, used, late) = (entry("a", true), entry("b", false), entry("c", false));
        drop(residents.acquire(&pinned).await.expect("a version"));
        let in_use = residents.acquire(&used).await.expect("a version");
        let waits = tokio::spawn({
            let (residents, late) = (Arc::clone(&residents), Arc::clone(&late));
            async move { residents.acquire(&late).await.map(drop) }
        });
        while shelf.asked.load(Ordering::SeqCst) < 3 {
            tokio::task::yield_now().await;
        }
        assert!(pinned.is_resident() && used.is_resident() && !late.is_resident());
        // Nothing is loaded before there is room for it.
        assert_eq!(shelf.loads("c"), 0);
        drop(in_use);
        waits.await.expect("no panic").expect("room");
        assert!(pinned.is_resident() && !used.is_resident() && late.is_resident());
    }

    #[tokio::test]
    async fn who_finds_no_room_is_told_and_takes_none() {
        let shelf = Arc::new(Shelf::default());
        let residents = Residents {
            room_timeout: Duration::from_millis(50),
            ..Arc::into_inner(house(&shelf, Some(15))).expect("one handle")
        };
        let residents = Arc::new(residents);
        let pinned = entry("a", true);
        drop(residents.acquire(&pinned).await.expect("a version"));
        let refused = residents.acquire(&entry("b", false)).await;
        let no_room = LoadError::NoRoom {
            needed: 10,
            limit: 15,
        };
        let reason = refused.map_err(|error| error.to_string());
        assert_eq!(reason.err(), Some(no_room.to_string()));
        assert!(pinned.is_resident());
        let small = house(&shelf, Some(9));
        let refused = small.acquire(&entry("a", false)).await;
        let error = refused.err();
        assert!(matches!(error.as_deref(), Some(LoadError::Memory { .. })));
    }

    #[tokio::test]
    async fn who_waits_for_room_keeps_nobody_else_from_loading() {
        let shelf = Arc::new(Shelf::default());
        let residents = house(&shelf, Some(25));
        let used = entry("a", true);
        let in_use = residents.acquire(&used).await.expect("a version");
        // More than there are permits, and none of them fits.
        let waiting: Vec<_> = (0..=LOADS)
            .map(|number| {
                let late = entry(&format!("small{number}"), true);
                let residents = Arc::clone(&residents);
                tokio::spawn(async move { residents.acquire(&late).await.map(drop) })
            })
            .collect();
        while shelf.asked.load(Ordering::SeqCst) < 1 + waiting.len() {
            tokio::task::yield_now().await;
        }
        assert_eq!(residents.loads.available_permits(), LOADS);
        for wait in &waiting {
            wait.abort();
        }
        drop(in_use);
    }

    #[tokio::test]
    async fn what_is_reserved_becomes_what_is_used() {
        let shelf = Arc::new(Shelf::default());
        let residents = house(&shelf, Some(25));
        let reserved = || {
            let text = residents.metrics.render().expect("text");
            let line = text
                .lines()
                .find_map(|line| line.strip_prefix("kdlora_adapter_memory_bytes "));
            line.expect("the metric").to_owned()
        };
        let (small, large) = (entry("small", false), entry("large", false));
        drop(residents.acquire(&small).await.expect("a version"));
        assert_eq!(reserved(), "10");
        drop(residents.acquire(&large).await.expect("a version"));
        assert_eq!(reserved(), "20");
        assert!(small.is_resident() && large.is_resident());
    }

    #[tokio::test]
    async fn many_who_wait_for_one_version_read_it_once_even_if_the_first_has_gone() {
        let (open, gate) = mpsc::channel();
        let shelf = Arc::new(Shelf {
            gate: Some(Mutex::new(gate)),
            ..Shelf::default()
        });
        let residents = house(&shelf, None);
        let slow = entry("slow", false);
        let ask = |entry: &Arc<Entry>| {
            let (residents, entry) = (Arc::clone(&residents), Arc::clone(entry));
            tokio::spawn(async move { residents.acquire(&entry).await.map(drop) })
        };
        let first = ask(&slow);
        while shelf.entered.load(Ordering::SeqCst) == 0 {
            tokio::task::yield_now().await;
        }
        let others: Vec<_> = (0..5).map(|_| ask(&slow)).collect();
        first.abort();
        // Who asks for another version does not wait.
        ask(&entry("quick", false))
            .await
            .expect("no panic")
            .expect("a version");
        assert!(!slow.is_resident());
        open.send(()).expect("the gate is there");
        for other in others {
            other.await.expect("no panic").expect("a version");
        }
        assert_eq!(shelf.loads("slow"), 1);
    }

    #[tokio::test]
    async fn versions_that_were_replaced_are_forgotten() {
        let shelf = Arc::new(Shelf::default());
        let residents = house(&shelf, None);
        let stays = entry("stays", false);
        for _ in 0..50 {
            stays.evict();
            drop(residents.acquire(&stays).await.expect("a version"));
            let replaced = entry("a", false);
            drop(residents.acquire(&replaced).await.expect("a version"));
        }
        assert!(residents.lock().len() <= 2);
    }

    #[tokio::test]
    async fn a_version_that_fails_is_not_read_for_each_request() {
        let shelf = Arc::new(Shelf::default());
        let residents = house(&shelf, None);
        let broken = entry("broken", false);
        for _ in 0..3 {
            let error = residents.acquire(&broken).await.err();
            assert!(matches!(error.as_deref(), Some(LoadError::Logits(_))));
        }
        assert_eq!(shelf.loads("broken"), 1);
    }
}
