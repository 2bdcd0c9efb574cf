//! The live task table: which version answers for which task.

use std::collections::BTreeMap;
use std::sync::Arc;

use arc_swap::ArcSwap;

use crate::adapter::{Mode, TaskConfig};
use crate::encoder::{Encoder, TaskWeights};

/// A version that answers requests. Whoever holds it can finish with it, even after another
/// version has gone live.
pub struct LiveTask {
    pub name: String,
    pub version: u64,
    pub config: TaskConfig,
    /// The adapter, bound to the student; of a merged task the head alone.
    pub weights: TaskWeights,
    /// The encoder with the adapter folded in, for a merged task.
    pub merged: Option<Arc<Encoder>>,
    /// How the task was to be served; one that can't be hot is merged all the same.
    pub asked_mode: Mode,
    /// Bytes of memory that the task takes beside the student.
    pub weight_bytes: u64,
    /// The version's `report.json`.
    pub report: Option<serde_json::Value>,
    /// Tokens a sequence is cut to: the task's limit, or the encoder's if that is less.
    pub max_length: usize,
}

impl LiveTask {
    pub fn mode(&self) -> Mode {
        match self.merged {
            None => Mode::Hot,
            Some(_) => Mode::Merged,
        }
    }
}

type Tasks = BTreeMap<String, Arc<LiveTask>>;

/// All live tasks by name. Reading takes no lock; a change swaps the whole table, so that a reader
/// sees the table before it or after it, never between.
#[derive(Default)]
pub struct TaskTable {
    tasks: ArcSwap<Tasks>,
}

impl TaskTable {
    pub fn get(&self, name: &str) -> Option<Arc<LiveTask>> {
        self.tasks.load().get(name).cloned()
    }

    /// The table as it is at this moment.
    pub fn all(&self) -> Arc<Tasks> {
        self.tasks.load_full()
    }

    /// Puts `task` in the place of the version that answered before.
    pub fn publish(&self, task: LiveTask) {
        let task = Arc::new(task);
        self.tasks.rcu(|tasks| {
            let mut tasks = Tasks::clone(tasks);
            tasks.insert(task.name.clone(), Arc::clone(&task));
            tasks
        });
    }

    /// Takes a task out; the version that answered, if there was one.
    pub fn remove(&self, name: &str) -> Option<Arc<LiveTask>> {
        let before = self.tasks.rcu(|tasks| {
            let mut tasks = Tasks::clone(tasks);
            tasks.remove(name);
            tasks
        });
        before.get(name).cloned()
    }
}
