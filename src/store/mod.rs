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
//! it exist. Until then a mark beside the folder says that it is unfinished. [`Store::open`]
//! removes marked folders that have no row. Other folders without a row may belong to a newer
//! database; they are moved to `.orphans` and never deleted.
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
mod students;
mod timestamp;
mod versions;

use std::fs::{self, DirBuilder, File, TryLockError};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use sqlx::sqlite::{
    SqliteConnectOptions, SqliteJournalMode, SqlitePool, SqlitePoolOptions, SqliteSynchronous,
    SqliteTransactionManager,
};
use sqlx::{Connection, SqliteConnection, TransactionManager};

pub use error::StoreError;
pub use jobs::{Created, Job, JobState, MAX_ATTEMPTS, NewJob, Progress};
pub use live::{Change, ChangeKind, LiveVersion};
pub use recovery::Recovery;
pub use timestamp::Timestamp;
pub use versions::{Origin, Version};

/// Longest name of a task, in bytes: it is a folder name, a URL segment and a metric label.
pub const MAX_TASK_NAME: usize = 64;

/// How long a statement waits for others.
const BUSY_TIMEOUT: Duration = Duration::from_secs(10);

/// Only the server's user may read the state: it holds training texts.
const FOLDER_MODE: u32 = 0o700;
const FILE_MODE: u32 = 0o600;

/// The state folder, opened. Clones share one pool and one lock.
#[derive(Clone)]
pub struct Store {
    inner: Arc<Inner>,
}

struct Inner {
    pool: SqlitePool,
    root: PathBuf,
    recovery: Recovery,
    /// Called after each write that the machine has failed.
    on_failed_write: OnceLock<Box<dyn Fn() + Send + Sync>>,
    /// The operating system frees the lock when the file is closed, also when the process dies.
    _lock: File,
}

impl Store {
    /// Opens the state folder, making it if it is missing, and repairs what a killed server left
    /// behind (see [`Recovery`]).
    ///
    /// # Errors
    /// Another process holds the folder, its database is missing or from a later release, or the
    /// disk refuses.
    pub async fn open(state_dir: &Path) -> Result<Self, StoreError> {
        let root = prepare(state_dir)?;
        let lock = lock(&root)?;
        let database = root.join("kdlora.db");
        make_database(&root, &database)?;
        let pool = connect(&database).await?;
        schema::migrate(&pool, &root).await?;
        let recovery = recovery::recover(&pool, &root).await?;
        Ok(Self {
            inner: Arc::new(Inner {
                pool,
                root,
                recovery,
                on_failed_write: OnceLock::new(),
                _lock: lock,
            }),
        })
    }

    /// What [`Store::open`] found and repaired.
    pub fn recovery(&self) -> &Recovery {
        &self.inner.recovery
    }

    /// Calls `observer` after each write to the state folder that the machine fails: the disk is
    /// full or broken. Only the first observer is kept.
    pub fn on_failed_write(&self, observer: impl Fn() + Send + Sync + 'static) {
        let _ = self.inner.on_failed_write.set(Box::new(observer));
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

    /// Waits for running statements and closes the database; kdlora.db alone then holds all of it.
    /// Later calls on any clone fail.
    pub async fn close(&self) {
        // The pool waits for too few connections that are in use if others are idle, and returns
        // while these are being closed.
        let closed = async {
            loop {
                self.pool().close().await;
                if self.pool().size() == 0 {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        if tokio::time::timeout(BUSY_TIMEOUT, closed).await.is_err() {
            tracing::warn!("the database is still in use");
        }
    }

    fn pool(&self) -> &SqlitePool {
        &self.inner.pool
    }

    fn artifacts(&self) -> PathBuf {
        self.inner.root.join("artifacts")
    }

    /// Runs `work` in a transaction and commits it. What is returned is on the disk; after an
    /// error nothing has changed.
    ///
    /// Every change of the database goes through here. A statement outside of a transaction is
    /// committed when it is reset, after its rows have been read, and an error at that moment is
    /// lost. The transaction takes the write lock at once: one that reads first and writes later
    /// could be refused in the middle without waiting.
    async fn write<T>(
        &self,
        work: impl AsyncFnOnce(&mut SqliteConnection) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let write = async {
            let mut transaction = self.pool().begin_with("BEGIN IMMEDIATE").await?;
            let value = work(&mut transaction).await?;
            transaction.commit().await?;
            Ok(value)
        };
        self.observed(write.await)
    }

    /// Runs file operations on a thread that may block.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let outcome = tokio::task::spawn_blocking(work).await;
        self.observed(outcome.map_err(StoreError::from).flatten())
    }

    fn observed<T>(&self, outcome: Result<T, StoreError>) -> Result<T, StoreError> {
        if let Err(error) = &outcome
            && error.is_of_the_machine()
            && let Some(observer) = self.inner.on_failed_write.get()
        {
            observer();
        }
        outcome
    }
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Store").field(&self.root()).finish()
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
        DirBuilder::new()
            .recursive(true)
            .mode(FOLDER_MODE)
            .create(&path)
            .map_err(StoreError::io("make the folder", &path))?;
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

/// Makes an empty database if there is none, unless the folders belong to one that is lost: with
/// another database their versions and jobs would not exist.
fn make_database(root: &Path, path: &Path) -> Result<(), StoreError> {
    if fs::metadata(path).is_ok_and(|file| file.len() > 0) {
        return Ok(());
    }
    for folder in ["artifacts", "jobs"] {
        let children = artifacts::children(&root.join(folder))?;
        if children.iter().any(|path| recovery::is_plain_folder(path)) {
            return Err(StoreError::LostDatabase(root.to_owned()));
        }
    }
    File::options()
        .create(true)
        .append(true)
        .mode(FILE_MODE)
        .open(path)
        .map(drop)
        .map_err(StoreError::io("make", path))
}

async fn connect(path: &Path) -> Result<SqlitePool, StoreError> {
    let options = SqliteConnectOptions::new()
        .filename(path)
        .journal_mode(SqliteJournalMode::Wal)
        // Full: what has been acknowledged is on the disk, also after a power failure.
        .synchronous(SqliteSynchronous::Full)
        .foreign_keys(true)
        .busy_timeout(BUSY_TIMEOUT);
    let pool = SqlitePoolOptions::new()
        .max_connections(4)
        .after_release(|connection, _| Box::pin(end_transaction(connection)));
    Ok(pool.connect_with(options).await?)
}

/// Makes sure that a connection is in no transaction before it is given to somebody else; one that
/// cannot be brought out of it is closed.
///
/// When the disk is full or fails, SQLite rolls back by itself. The ROLLBACK of sqlx is then
/// refused, and sqlx goes on counting the transaction as open: it would refuse to begin another
/// one on this connection for ever.
async fn end_transaction(connection: &mut SqliteConnection) -> Result<bool, sqlx::Error> {
    // The rollback of a dropped transaction is queued only; the ping is answered after it.
    connection.ping().await?;
    if connection.is_in_transaction() {
        // Gives the ROLLBACK something to end. Refused if SQLite is still in the transaction.
        sqlx::query("BEGIN").execute(&mut *connection).await?;
        SqliteTransactionManager::rollback(connection).await?;
    }
    Ok(!connection.is_in_transaction())
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

    #[tokio::test]
    async fn only_the_user_of_the_server_can_read_the_state() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let state = folder.path().join("deep/state");
        let store = Store::open(&state).await.unwrap();
        let mode = |path: &str| {
            let metadata = fs::metadata(state.join(path)).unwrap();
            metadata.permissions().mode() & 0o777
        };
        for path in ["", "artifacts", "jobs", "cache"] {
            assert_eq!(mode(path), FOLDER_MODE, "{path}");
        }
        store.withdraw("nothing", "admin", "").await.unwrap_err();
        for path in ["kdlora.db", "kdlora.db-wal", "kdlora.db-shm"] {
            assert_eq!(mode(path), FILE_MODE, "{path}");
        }
    }

    /// Lets the database have so many pages, or as many as it has.
    async fn limit_pages(store: &Store, pages: i64) {
        let mut connections = Vec::new();
        for _ in 0..store.pool().options().get_max_connections() {
            let mut connection = store.pool().acquire().await.unwrap();
            sqlx::query(&format!("PRAGMA max_page_count = {pages}"))
                .execute(&mut *connection)
                .await
                .unwrap();
            connections.push(connection);
        }
    }

    fn job_of(bytes: usize) -> NewJob {
        NewJob {
            id: NewJob::id(),
            task: "topic".into(),
            priority: 0,
            spec: serde_json::json!({ "task": "x".repeat(bytes) }),
            idempotency_key: None,
            request_digest: String::new(),
            warnings: Vec::new(),
        }
    }

    #[tokio::test]
    async fn a_full_database_takes_writes_again_when_there_is_room() {
        let (folder, store) = testing::store().await;
        let failed = Arc::new(std::sync::atomic::AtomicUsize::new(0));
        let count = Arc::clone(&failed);
        store.on_failed_write(move || {
            count.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        });
        let adapter = testing::adapter(&folder, "one");
        for round in 1..=2 {
            limit_pages(&store, 1).await;
            // More than there are connections, some of them at the same time.
            let large = (0..12).map(|_| store.create_job(job_of(100_000)));
            for outcome in futures_util::future::join_all(large).await {
                let error = outcome.unwrap_err();
                assert!(error.is_temporary(), "{error:?}");
                let text = crate::telemetry::chain(&error);
                assert!(text.contains("full"), "{text}");
            }
            assert_eq!(failed.load(std::sync::atomic::Ordering::SeqCst), 12 * round);
            let jobs = store.jobs(10).await.unwrap();
            assert_eq!(jobs.len(), round - 1, "nothing half written");

            limit_pages(&store, 1 << 30).await;
            for _ in 0..8 {
                let added = store.add_version("topic", &adapter, Origin::Imported).await;
                store
                    .promote("topic", added.unwrap().version, "admin", "")
                    .await
                    .unwrap();
            }
            store.create_job(job_of(100_000)).await.unwrap();
        }
    }

    #[tokio::test]
    async fn a_version_that_does_not_fit_leaves_its_source_and_no_number() {
        let (folder, store) = testing::store().await;
        let Created::New(job) = store.create_job(job_of(1)).await.unwrap() else {
            panic!("it is new");
        };
        store.start_next_job().await.unwrap();
        let adapter = testing::adapter(&folder, "one");
        let report = serde_json::json!({ "note": "x".repeat(200_000) });
        fs::write(adapter.join("report.json"), report.to_string()).unwrap();
        limit_pages(&store, 1).await;
        for _ in 0..6 {
            let finished = store
                .finish_with_version(&job.id, &adapter, Some("good"))
                .await;
            assert!(finished.unwrap_err().is_temporary());
        }
        assert_eq!(store.job(&job.id).await.unwrap().state, JobState::Running);
        limit_pages(&store, 1 << 30).await;
        let version = store
            .finish_with_version(&job.id, &adapter, Some("good"))
            .await
            .unwrap();
        assert_eq!((version.version, version.live), (1, true));
        let files = fs::read_dir(store.root().join("artifacts")).unwrap();
        assert_eq!(files.count(), 1, "nothing is left of the attempts");
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
