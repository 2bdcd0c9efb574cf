//! The live task table: which version answers for which task, in memory or not.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use arc_swap::ArcSwap;
use serde_json::Value;

use super::budget::Reservation;
use super::residents::LoadError;
use crate::adapter::{FileSums, Fit, Mismatch, Mode, TaskConfig, read_report};
use crate::encoder::{Encoder, TaskWeights};
use crate::telemetry::chain;

/// A version in memory, ready to answer. Whoever holds it can finish with it, even after another
/// version has gone live; its memory is free when the last one lets go.
pub struct LiveTask {
    pub name: String,
    pub version: u64,
    pub config: TaskConfig,
    /// The adapter, bound to the student; of a merged task the head alone.
    pub weights: TaskWeights,
    /// The encoder with the adapter folded in, for a merged task.
    pub merged: Option<Arc<Encoder>>,
    /// Bytes of memory that the task takes beside the student.
    pub weight_bytes: u64,
    /// Tokens a sequence is cut to: the task's limit, or the encoder's if that is less.
    pub max_length: usize,
    /// Its part of the adapters' memory.
    pub(super) memory: Reservation,
}

impl LiveTask {
    pub fn mode(&self) -> Mode {
        match self.merged {
            None => Mode::Hot,
            Some(_) => Mode::Merged,
        }
    }
}

impl fmt::Debug for LiveTask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.name, self.version)
    }
}

/// The live version of a task. It is read into memory when it is first used, and may have to leave
/// again; see [`Residents`](super::Residents).
pub struct Entry {
    pub name: String,
    pub version: u64,
    /// How the task is to be served; one that can't be hot is merged all the same.
    pub mode: Mode,
    /// The PEFT folder.
    pub folder: PathBuf,
    /// Stays in memory once it is there.
    pub pinned: bool,
    /// Sums that the folder's files must have when they are read; not compared if absent.
    pub sums: Option<FileSums>,
    /// Whether the version was trained on the encoder that serves. One that was not is not loaded.
    pub fit: Fit,
    /// Has to answer a text when it is loaded: a version that has not answered before.
    pub(super) unproven: AtomicBool,
    /// Whether the metrics name this version.
    pub(super) is_reported: AtomicBool,
    state: Mutex<EntryState>,
    /// Held by the one who loads.
    pub(super) loading: Arc<tokio::sync::Mutex<()>>,
    /// Grows from use to use, over all entries.
    last_used: AtomicU64,
}

#[derive(Default)]
struct EntryState {
    resident: Option<Arc<LiveTask>>,
    failed: Option<(Instant, Arc<LoadError>)>,
}

/// Counts uses over all entries.
static USES: AtomicU64 = AtomicU64::new(0);

impl Entry {
    pub fn new(name: String, version: u64, mode: Mode, folder: PathBuf, pinned: bool) -> Self {
        Self {
            name,
            version,
            mode,
            folder,
            pinned,
            sums: None,
            fit: Fit::Verified,
            unproven: AtomicBool::new(false),
            is_reported: AtomicBool::new(false),
            state: Mutex::default(),
            loading: Arc::default(),
            last_used: AtomicU64::new(0),
        }
    }

    /// Why the version can't answer, as far as that is known; a sentence for clients.
    pub fn unready(&self) -> Option<String> {
        if let Fit::Mismatch(mismatch) = &self.fit {
            return Some(self.other_student(mismatch));
        }
        self.failed().map(|_| {
            "the live version could not be loaded when it was last needed; the server's log has the \
             reason"
                .to_owned()
        })
    }

    /// Says to clients that the version is another encoder's.
    pub fn other_student(&self, mismatch: &Mismatch) -> String {
        format!(
            "version {} of task {:?} does not answer here: {mismatch}; start the server with that \
             student, or promote a version of this one",
            self.version, self.name
        )
    }

    /// Reads the version's `report.json` from its folder. `None` for one that came without, or
    /// whose report can't be read: the task answers all the same. Blocks.
    pub fn report(&self) -> Option<Value> {
        read_report(&self.folder).unwrap_or_else(|error| {
            tracing::warn!(
                task = self.name,
                version = self.version,
                error = chain(&error),
                "ignored an unreadable report"
            );
            None
        })
    }

    /// What answers, if it is in memory. Does not count as a use.
    pub fn resident(&self) -> Option<Arc<LiveTask>> {
        self.lock().resident.clone()
    }

    pub fn is_resident(&self) -> bool {
        self.lock().resident.is_some()
    }

    /// What answers, if it is in memory.
    pub(super) fn in_use(&self) -> Option<Arc<LiveTask>> {
        let resident = self.resident()?;
        let now = USES.fetch_add(1, Ordering::Relaxed);
        self.last_used.store(now, Ordering::Relaxed);
        Some(resident)
    }

    pub(super) fn last_used(&self) -> u64 {
        self.last_used.load(Ordering::Relaxed)
    }

    /// When and why it could not be loaded the last time.
    pub(super) fn failed(&self) -> Option<(Instant, Arc<LoadError>)> {
        self.lock().failed.clone()
    }

    pub(super) fn set(&self, outcome: Result<Arc<LiveTask>, Arc<LoadError>>) {
        let mut state = self.lock();
        match outcome {
            Ok(task) => {
                state.failed = None;
                state.resident = Some(task);
            }
            Err(error) => state.failed = Some((Instant::now(), error)),
        }
    }

    /// Lets go of the memory, unless the task is pinned or somebody uses it; says whether it did.
    pub(super) fn evict(&self) -> bool {
        let mut state = self.lock();
        let idle = |task: &Arc<LiveTask>| Arc::strong_count(task) == 1;
        let evicted = !self.pinned && state.resident.as_ref().is_some_and(idle);
        if evicted {
            state.resident = None;
        }
        evicted
    }

    fn lock(&self) -> MutexGuard<'_, EntryState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

type Entries = BTreeMap<Arc<str>, Arc<Entry>>;

/// All live tasks by name. Reading takes no lock; a change swaps the whole table, so that a reader
/// sees the table before it or after it, never between.
#[derive(Default)]
pub struct TaskTable {
    tasks: ArcSwap<Entries>,
}

impl TaskTable {
    pub fn get(&self, name: &str) -> Option<Arc<Entry>> {
        self.tasks.load().get(name).cloned()
    }

    /// The table as it is at this moment.
    pub fn all(&self) -> Arc<Entries> {
        self.tasks.load_full()
    }

    /// Puts the entries in the place of what answered before.
    pub fn publish<E: Into<Arc<Entry>>>(&self, entries: impl IntoIterator<Item = E>) {
        let entries: Vec<Arc<Entry>> = entries.into_iter().map(Into::into).collect();
        self.tasks.rcu(|tasks| {
            let mut tasks = Entries::clone(tasks);
            for entry in &entries {
                tasks.insert(entry.name.as_str().into(), Arc::clone(entry));
            }
            tasks
        });
    }

    /// Takes a task out; the version that answered, if there was one.
    pub fn remove(&self, name: &str) -> Option<Arc<Entry>> {
        let before = self.tasks.rcu(|tasks| {
            let mut tasks = Entries::clone(tasks);
            tasks.remove(name);
            tasks
        });
        before.get(name).cloned()
    }
}
