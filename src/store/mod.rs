//! The state folder: a SQLite database of jobs and versions, and folders of bytes.
//!
//! ```text
//! state/
//!   lock                         held by the one server that uses the folder
//!   kdlora.db                    jobs, versions, what is live, and every change of it
//!   artifacts/{task}/{version}/  a PEFT folder and its report.json; never changed once there
//!   jobs/{id}/                   a job's spec, uploads, output and log.txt
//!   cache/                       teacher logits; may be deleted at any time
//! ```
//!
//! The rule that makes a kill harmless: bytes first, then the row. A folder is completed and
//! flushed under a temporary name, renamed to its place, and only then does a transaction make
//! it exist. [`Store::open`] removes folders that no row knows.
//!
//! Everything above calls the async methods of [`Store`]; nothing else opens the database or
//! writes below the state folder's `artifacts`.

mod artifacts;
#[cfg(test)]
mod crash;
mod error;
mod jobs;
mod live;
mod modes;
mod recovery;
mod schema;
mod timestamp;
mod versions;

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use sqlx::sqlite::{
    SqliteConnectOptions, SqliteJournalMode, SqlitePool, SqlitePoolOptions, SqliteSynchronous,
};
use sqlx::{Sqlite, Transaction};

pub use error::StoreError;
pub use jobs::{Created, Job, JobState, MAX_ATTEMPTS, NewJob, Progress};
pub use live::{Change, ChangeKind, LiveVersion};
pub use recovery::Recovery;
pub use timestamp::Timestamp;
pub use versions::{Origin, Version};

/// Longest name of a task, in bytes: it is a folder name, a URL segment and a metric label.
pub const MAX_TASK_NAME: usize = 64;

/// The state folder, opened. Clones share one pool and one lock.
#[derive(Clone, Debug)]
pub struct Store {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    pool: SqlitePool,
    root: PathBuf,
    recovery: Recovery,
    /// The operating system frees the lock when the file is closed, also when the process dies.
    _lock: File,
}

impl Store {
    /// Opens the state folder, making it if it is missing, and repairs what a killed server left
    /// behind (see [`Recovery`]).
    ///
    /// Errors when another process holds the folder, when the database is from a later release,
    /// or when the disk refuses.
    pub async fn open(state_dir: &Path) -> Result<Self, StoreError> {
        let root = prepare(state_dir)?;
        let lock = lock(&root)?;
        let pool = connect(&root.join("kdlora.db")).await?;
        schema::migrator().run(&pool).await?;
        let recovery = recovery::recover(&pool, &root).await?;
        Ok(Self {
            inner: Arc::new(Inner {
                pool,
                root,
                recovery,
                _lock: lock,
            }),
        })
    }

    /// What [`Store::open`] found and repaired.
    pub fn recovery(&self) -> &Recovery {
        &self.inner.recovery
    }

    /// Absolute path of the state folder.
    pub fn root(&self) -> &Path {
        &self.inner.root
    }

    /// Folder of a job's spec, uploads, output and log. It need not exist.
    pub fn job_folder(&self, id: &str) -> PathBuf {
        self.inner.root.join("jobs").join(id)
    }

    /// Folder in which distillation processes keep teacher logits between passes.
    pub fn cache_folder(&self) -> PathBuf {
        self.inner.root.join("cache")
    }

    /// Waits for running statements and closes the database. Later calls on any clone fail.
    pub async fn close(&self) {
        self.inner.pool.close().await;
    }

    fn pool(&self) -> &SqlitePool {
        &self.inner.pool
    }

    fn artifacts(&self) -> PathBuf {
        self.inner.root.join("artifacts")
    }

    /// A transaction that takes the write lock at once: one that reads first and writes later
    /// could be refused in the middle without waiting.
    async fn write(&self) -> Result<Transaction<'static, Sqlite>, StoreError> {
        Ok(self.pool().begin_with("BEGIN IMMEDIATE").await?)
    }
}

/// Whether `name` may name a task: `[a-z0-9][a-z0-9-]*`, at most [`MAX_TASK_NAME`] bytes.
pub fn is_task_name(name: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    !name.is_empty()
        && name.len() <= MAX_TASK_NAME
        && !name.starts_with('-')
        && name.bytes().all(allowed)
}

fn check_task_name(name: &str) -> Result<(), StoreError> {
    if is_task_name(name) {
        Ok(())
    } else {
        Err(StoreError::BadTaskName(name.to_owned()))
    }
}

fn prepare(state_dir: &Path) -> Result<PathBuf, StoreError> {
    for folder in ["artifacts", "jobs", "cache"] {
        let path = state_dir.join(folder);
        fs::create_dir_all(&path).map_err(StoreError::io("make the folder", &path))?;
    }
    state_dir
        .canonicalize()
        .map_err(StoreError::io("find", state_dir))
}

fn lock(root: &Path) -> Result<File, StoreError> {
    let path = root.join("lock");
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .map_err(StoreError::io("open", &path))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(StoreError::InUse(root.to_owned())),
        Err(TryLockError::Error(error)) => Err(StoreError::io("lock", &path)(error)),
    }
}

async fn connect(path: &Path) -> Result<SqlitePool, StoreError> {
    let options = SqliteConnectOptions::new()
        .filename(path)
        .create_if_missing(true)
        .journal_mode(SqliteJournalMode::Wal)
        // Full: what has been acknowledged is on the disk, also after a power failure.
        .synchronous(SqliteSynchronous::Full)
        .foreign_keys(true)
        .busy_timeout(Duration::from_secs(10));
    let pool = SqlitePoolOptions::new().max_connections(4);
    Ok(pool.connect_with(options).await?)
}

#[cfg(test)]
pub(crate) mod testing {
    //! A state folder that goes away with the test.

    use std::fs;
    use std::path::PathBuf;

    use super::Store;

    pub(crate) async fn store() -> (tempfile::TempDir, Store) {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path()).await.unwrap();
        (folder, store)
    }

    /// A folder with a file of `content` and a report that carries it.
    pub(crate) fn adapter(parent: &tempfile::TempDir, content: &str) -> PathBuf {
        let path = parent.path().join(format!("adapter-{content}"));
        fs::create_dir_all(&path).unwrap();
        fs::write(path.join("adapter_model.safetensors"), content).unwrap();
        let report = serde_json::json!({ "note": content, "gate": { "passed": true } });
        fs::write(path.join("report.json"), report.to_string()).unwrap();
        path
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_second_server_is_kept_out_of_the_state_folder() {
        let folder = tempfile::tempdir().unwrap();
        let first = Store::open(folder.path()).await.unwrap();
        let second = Store::open(folder.path()).await;
        assert!(matches!(second, Err(StoreError::InUse(_))), "{second:?}");
        drop(first);
        Store::open(folder.path()).await.unwrap();
    }

    #[test]
    fn task_names_cannot_leave_their_folder() {
        for good in ["a", "movie-sentiment", "7"] {
            assert!(is_task_name(good), "{good}");
        }
        let long = "a".repeat(MAX_TASK_NAME + 1);
        for bad in ["", "-a", "..", "a/b", "A", "a.b", "ä", long.as_str()] {
            assert!(!is_task_name(bad), "{bad}");
        }
    }
}
