//! The live task table follows the store: a version is loaded and tried before it answers.

use std::collections::BTreeSet;
use std::sync::Arc;

use tokio::sync::Mutex;

use super::{Entry, LoadError, Residents, TaskTable};
use crate::adapter::Mode;
use crate::store::{LiveVersion, Store, StoreError};

/// Why a version does not answer.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Load(#[from] Arc<LoadError>),
}

/// Brings versions from the store into the task table.
#[derive(Clone)]
pub struct Publisher {
    store: Store,
    tasks: Arc<TaskTable>,
    residents: Arc<Residents>,
    wishes: Arc<Wishes>,
    /// One change at a time: an older version must not overtake a newer one.
    change: Arc<Mutex<()>>,
}

/// How tasks are to be served, as the server was told at its start.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wishes {
    /// Served merged though they could be hot.
    pub merged: TaskSet,
    /// In memory from the start to the end.
    pub pinned: TaskSet,
    /// Tasks that are loaded before the server is ready, beside the pinned ones.
    pub preload: usize,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum TaskSet {
    #[default]
    None,
    Some(BTreeSet<String>),
    All,
}

impl TaskSet {
    pub fn contains(&self, task: &str) -> bool {
        match self {
            Self::None => false,
            Self::Some(tasks) => tasks.contains(task),
            Self::All => true,
        }
    }
}

impl Publisher {
    pub fn new(
        store: Store,
        tasks: Arc<TaskTable>,
        residents: Arc<Residents>,
        wishes: Wishes,
    ) -> Self {
        Self {
            store,
            tasks,
            residents,
            wishes: Arc::new(wishes),
            change: Arc::default(),
        }
    }

    /// Makes the table answer with what the store says is live, in the mode that it says, or take
    /// the task out if it has no live version. Until this ends, and if it fails, the version before
    /// goes on answering.
    pub async fn refresh(&self, task: &str) -> Result<(), PublishError> {
        let _change = self.change.lock().await;
        let Some(live) = self.store.live(task).await? else {
            if self.tasks.remove(task).is_some() {
                self.residents.forget(task);
                tracing::info!(task, "no longer answers");
            }
            return Ok(());
        };
        let mut entry = self.entry(live);
        entry.unproven = true;
        let same =
            |answering: &Entry| (answering.version, answering.mode) == (entry.version, entry.mode);
        if self
            .tasks
            .get(task)
            .is_some_and(|answering| same(&answering))
        {
            return Ok(());
        }
        let entry = Arc::new(entry);
        self.load(&entry).await?;
        self.tasks.publish([Arc::clone(&entry)]);
        tracing::info!(task, version = entry.version, "live");
        Ok(())
    }

    /// Fills the table with all tasks of the store, and loads those that are wanted at once: the
    /// pinned ones, and as many others as [`Wishes::preload`] says. One that can't be loaded is
    /// logged.
    pub async fn start(&self) -> Result<(), StoreError> {
        let _change = self.change.lock().await;
        let live = self.store.live_index().await?;
        let entries: Vec<_> = live
            .into_iter()
            .map(|live| Arc::new(self.entry(live)))
            .collect();
        self.tasks.publish(entries.iter().cloned());
        let (pinned, others): (Vec<_>, Vec<_>) = entries.iter().partition(|entry| entry.pinned);
        for entry in pinned
            .into_iter()
            .chain(others.into_iter().take(self.wishes.preload))
        {
            // The error is in the log.
            let _ = self.load(entry).await;
        }
        Ok(())
    }

    fn entry(&self, live: LiveVersion) -> Entry {
        let default = match self.wishes.merged.contains(&live.task) {
            true => Mode::Merged,
            false => Mode::Hot,
        };
        let mode = live.mode.unwrap_or(default);
        let pinned = self.wishes.pinned.contains(&live.task);
        Entry::new(live.task, live.version, mode, live.path, pinned)
    }

    async fn load(&self, entry: &Arc<Entry>) -> Result<(), Arc<LoadError>> {
        self.residents.acquire(entry).await.map(drop)
    }
}
