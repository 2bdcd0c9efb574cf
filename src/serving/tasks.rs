//! The live task table: which version answers for which task, in memory or not.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;
use std::{fmt, fs, io};

use arc_swap::ArcSwap;
use serde_json::Value;

use super::budget::Reservation;
use super::residents::LoadError;
use crate::adapter::{Mode, REPORT, TaskConfig};
use crate::encoder::{Encoder, TaskWeights};
use crate::parse;

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
    /// Has to answer a text when it is loaded: a version that has not answered before.
    pub unproven: bool,
    state: Mutex<EntryState>,
    /// Held by the one who loads.
    pub(super) loading: Arc<tokio::sync::Mutex<()>>,
    /// Grows from use to use, over all entries.
    last_used: AtomicU64,
    /// Whether the metrics know of it.
    told: AtomicBool,
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
            unproven: false,
            state: Mutex::default(),
            loading: Arc::default(),
            last_used: AtomicU64::new(0),
            told: AtomicBool::new(false),
        }
    }

    /// The version's `report.json`, read from its folder; `None` for one that came without.
    ///
    /// # Errors
    /// It can't be read, or is not JSON.
    pub fn report(&self) -> io::Result<Option<Value>> {
        match fs::read(self.folder.join(REPORT)) {
            Ok(bytes) => Ok(Some(parse::json(&bytes)?)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Whether this is the first call.
    pub(super) fn first_told(&self) -> bool {
        !self.told.swap(true, Ordering::Relaxed)
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
