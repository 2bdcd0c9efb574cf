//! Puts the state folder in order after a server that did not stop properly.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use sqlx::{Row, SqlitePool};

use super::artifacts::{self, INCOMING, UNFINISHED};
use super::jobs::MAX_ATTEMPTS;
use super::versions::{artifact, database_int, unsigned};
use super::{StoreError, Timestamp, is_task_name};

/// What was found and repaired when the state folder was opened.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Recovery {
    /// Jobs that were running and go on from where they were. Queued jobs stay queued.
    pub requeued_jobs: Vec<String>,
    /// Jobs that were running in their last attempt and have been marked as failed.
    pub failed_jobs: Vec<String>,
    /// Folders that were marked as unfinished and have no row. They are removed: their version or
    /// job was never acknowledged.
    pub removed_folders: Vec<PathBuf>,
    /// Where folders are now that have no row and no mark, as after the restore of an older
    /// database.
    pub orphans: Vec<PathBuf>,
    /// Versions (task, version) whose folder is gone. Their rows stay, so that numbers are not
    /// given twice.
    pub missing_versions: Vec<(String, u64)>,
}

const GIVEN_UP: &str =
    "the server stopped while the job was running, as often as a job is tried again";

pub(super) async fn recover(pool: &SqlitePool, root: &Path) -> Result<Recovery, StoreError> {
    let failed_jobs = fail_last_attempts(pool).await?;
    let requeued_jobs = requeue_running_jobs(pool).await?;
    let versions = known_versions(pool, &root.join("artifacts")).await?;
    let jobs = known_jobs(pool).await?;
    let root = root.to_owned();
    let mut recovery =
        tokio::task::spawn_blocking(move || clean(&root, &versions, &jobs)).await??;
    recovery.requeued_jobs = requeued_jobs;
    recovery.failed_jobs = failed_jobs;
    recovery.log();
    Ok(recovery)
}

impl Recovery {
    fn log(&self) {
        for job in &self.requeued_jobs {
            tracing::warn!(
                job,
                "the server stopped while this job was running; it goes on"
            );
        }
        for job in &self.failed_jobs {
            tracing::warn!(job, "marked as failed: {GIVEN_UP}");
        }
        for folder in &self.removed_folders {
            tracing::info!(folder = %folder.display(), "removed an unfinished folder");
        }
        for folder in &self.orphans {
            tracing::warn!(
                folder = %folder.display(),
                "the database does not know this folder, so it was moved here; it may belong to a \
                 newer kdlora.db, which is to be restored together with its artifacts"
            );
        }
        for (task, version) in &self.missing_versions {
            tracing::error!(task, version, "the folder of this version is gone");
        }
    }
}

struct KnownVersion {
    task: String,
    version: u64,
    path: PathBuf,
}

struct KnownJobs {
    /// Jobs that still need their folder.
    queued: HashSet<String>,
    over: HashSet<String>,
}

async fn fail_last_attempts(pool: &SqlitePool) -> Result<Vec<String>, StoreError> {
    let sql = "UPDATE jobs SET state = 'failed', error = ?, eta_seconds = NULL, finished_at = ?
        WHERE state = 'running' AND attempts >= ? RETURNING id";
    Ok(sqlx::query_scalar(sql)
        .bind(GIVEN_UP)
        .bind(Timestamp::now().millis())
        .bind(database_int(MAX_ATTEMPTS))
        .fetch_all(pool)
        .await?)
}

async fn requeue_running_jobs(pool: &SqlitePool) -> Result<Vec<String>, StoreError> {
    let sql = "UPDATE jobs SET state = 'queued', eta_seconds = NULL WHERE state = 'running'
        RETURNING id";
    Ok(sqlx::query_scalar(sql).fetch_all(pool).await?)
}

async fn known_versions(
    pool: &SqlitePool,
    artifacts: &Path,
) -> Result<Vec<KnownVersion>, StoreError> {
    let rows = sqlx::query("SELECT task, version FROM versions")
        .fetch_all(pool)
        .await?;
    let mut versions = Vec::with_capacity(rows.len());
    for row in rows {
        let task: String = row.try_get("task")?;
        let version = unsigned(&row, "version")?;
        versions.push(KnownVersion {
            path: artifact(artifacts, &task, version),
            task,
            version,
        });
    }
    Ok(versions)
}

async fn known_jobs(pool: &SqlitePool) -> Result<KnownJobs, StoreError> {
    let jobs: Vec<(String, bool)> = sqlx::query_as("SELECT id, state = 'queued' FROM jobs")
        .fetch_all(pool)
        .await?;
    let (queued, over) = jobs
        .into_iter()
        .partition::<Vec<_>, _>(|(_, queued)| *queued);
    let ids = |jobs: Vec<(String, bool)>| jobs.into_iter().map(|(id, _)| id).collect();
    Ok(KnownJobs {
        queued: ids(queued),
        over: ids(over),
    })
}

fn clean(root: &Path, versions: &[KnownVersion], jobs: &KnownJobs) -> Result<Recovery, StoreError> {
    let known: HashSet<&Path> = versions.iter().map(|known| known.path.as_path()).collect();
    let mut recovery = Recovery::default();
    let (all, all_jobs) = (root.join("artifacts"), root.join("jobs"));
    for folder in artifacts::children(&all)? {
        if name_of(&folder).starts_with(INCOMING) {
            recovery.remove(folder)?;
        } else if is_plain_folder(&folder) {
            recovery.sort_out(&folder, &all, |version| known.contains(version))?;
        }
    }
    recovery.sort_out(&all_jobs, &all_jobs, |folder| {
        let id = name_of(folder);
        jobs.over.contains(id) || jobs.queued.contains(id)
    })?;
    for id in &jobs.over {
        artifacts::keep_only_log(&all_jobs.join(id))?;
    }
    recovery.missing_versions = versions
        .iter()
        .filter(|known| !known.path.is_dir())
        .map(|known| (known.task.clone(), known.version))
        .collect();
    Ok(recovery)
}

impl Recovery {
    /// Looks at what lies in `folder`. What is marked as unfinished and unknown is removed; what
    /// is unknown without a mark is moved to `.orphans` in `top`.
    fn sort_out(
        &mut self,
        folder: &Path,
        top: &Path,
        is_known: impl Fn(&Path) -> bool,
    ) -> Result<(), StoreError> {
        // Marks sort before what they mark.
        for path in artifacts::children(folder)? {
            if let Some(name) = name_of(&path).strip_prefix(UNFINISHED) {
                let marked = folder.join(name);
                if is_plain_folder(&marked) && !is_known(&marked) {
                    self.remove(marked.clone())?;
                }
                artifacts::unmark(&marked)?;
            } else if is_plain_folder(&path) && !is_known(&path) {
                self.orphans.push(artifacts::set_aside(&path, top)?);
            }
        }
        Ok(())
    }

    fn remove(&mut self, folder: PathBuf) -> Result<(), StoreError> {
        artifacts::remove_folder(&folder)?;
        self.removed_folders.push(folder);
        Ok(())
    }
}

/// Whether the path is a folder that a task, a version or a job may have: not `.orphans`, and
/// nothing that others have put there, such as `lost+found`.
pub(super) fn is_plain_folder(path: &Path) -> bool {
    is_task_name(name_of(path)) && path.is_dir()
}

fn name_of(path: &Path) -> &str {
    path.file_name()
        .and_then(|name| name.to_str())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::super::testing::{adapter, store};
    use super::super::{Created, JobState, NewJob, Origin, Store};
    use super::*;

    async fn reopen(store: Store, folder: &tempfile::TempDir) -> Store {
        store.close().await;
        drop(store);
        Store::open(folder.path()).await.unwrap()
    }

    async fn job(store: &Store) -> String {
        let new = NewJob {
            id: NewJob::id(),
            task: "topic".into(),
            priority: 0,
            spec: serde_json::json!({}),
            idempotency_key: None,
            request_digest: String::new(),
            warnings: Vec::new(),
        };
        fs::create_dir_all(store.job_folder(&new.id)).unwrap();
        fs::write(store.job_folder(&new.id).join("spec.json"), "{}").unwrap();
        fs::write(store.job_folder(&new.id).join("log.txt"), "said").unwrap();
        match store.create_job(new).await.unwrap() {
            Created::New(job) | Created::Existing(job) => job.id,
        }
    }

    #[tokio::test]
    async fn folders_of_additions_that_were_killed_are_removed() {
        let (folder, store) = store().await;
        let source = adapter(&folder, "one");
        let kept = store
            .add_version("topic", &source, Origin::Imported)
            .await
            .unwrap();
        // Killed while copying, and killed between rename and commit.
        let copying = store.root().join("artifacts/.incoming-x1/folder");
        let renamed = store.root().join("artifacts/topic/2");
        for half in [&copying, &renamed] {
            fs::create_dir_all(half).unwrap();
            fs::write(half.join("adapter_model.safetensors"), "half").unwrap();
        }
        artifacts::mark(&renamed).unwrap();
        // Killed between commit and the removal of the mark.
        artifacts::mark(&kept.path).unwrap();
        let store = reopen(store, &folder).await;
        assert!(kept.path.is_dir() && !copying.exists() && !renamed.exists());
        assert_eq!(store.recovery().removed_folders.len(), 2);
        assert_eq!(names_in(&store.root().join("artifacts/topic")), ["1"]);
        assert_eq!(store.versions("topic").await.unwrap().len(), 1);
        let next = store
            .add_version("topic", &source, Origin::Imported)
            .await
            .unwrap();
        assert_eq!(next.version, 2);
    }

    #[tokio::test]
    async fn a_folder_left_by_a_rolled_back_addition_does_not_block_the_next_one() {
        for is_marked in [true, false] {
            let (folder, store) = store().await;
            let left = store.root().join("artifacts/topic/1");
            fs::create_dir_all(&left).unwrap();
            fs::write(left.join("stale"), "half").unwrap();
            if is_marked {
                artifacts::mark(&left).unwrap();
            }
            let source = adapter(&folder, "one");
            let version = store
                .add_version("topic", &source, Origin::Imported)
                .await
                .unwrap();
            assert_eq!(version.version, 1);
            assert!(!version.path.join("stale").exists());
            // Only what is known to be unfinished is deleted.
            let aside = store.root().join("artifacts/.orphans/topic-1/stale");
            assert_eq!(aside.exists(), !is_marked);
            assert_eq!(names_in(&store.root().join("artifacts/topic")), ["1"]);
        }
    }

    #[tokio::test]
    async fn a_lost_folder_is_reported_and_its_number_not_given_again() {
        let (folder, store) = store().await;
        let source = adapter(&folder, "one");
        let lost = store
            .add_version("topic", &source, Origin::Imported)
            .await
            .unwrap();
        fs::remove_dir_all(&lost.path).unwrap();
        let store = reopen(store, &folder).await;
        assert_eq!(store.recovery().missing_versions, [("topic".into(), 1)]);
        let next = store
            .add_version("topic", &source, Origin::Imported)
            .await
            .unwrap();
        assert_eq!(next.version, 2);
    }

    #[tokio::test]
    async fn running_jobs_go_on_until_their_attempts_are_used_up_and_queued_ones_wait_on() {
        let (folder, mut store) = store().await;
        let (running, queued) = (job(&store).await, job(&store).await);
        for attempt in 1..MAX_ATTEMPTS {
            store.start_next_job().await.unwrap();
            store = reopen(store, &folder).await;
            let again = store.job(&running).await.unwrap();
            assert_eq!((again.state, again.attempts), (JobState::Queued, attempt));
            assert_eq!(
                store.recovery().requeued_jobs,
                std::slice::from_ref(&running)
            );
            let files = artifacts::children(&store.job_folder(&running)).unwrap();
            assert_eq!(files.len(), 2, "what it has left stays");
        }
        store.start_next_job().await.unwrap();
        let store = reopen(store, &folder).await;
        let failed = store.job(&running).await.unwrap();
        assert_eq!(failed.state, JobState::Failed);
        assert_eq!(failed.error.as_deref(), Some(GIVEN_UP));
        assert!(failed.finished_at.is_some());
        assert_eq!(store.recovery().failed_jobs, std::slice::from_ref(&running));
        let folder_of = |id: &str| artifacts::children(&store.job_folder(id)).unwrap();
        assert_eq!(folder_of(&running).len(), 1, "only the log stays");
        assert_eq!(folder_of(&queued).len(), 2);
        assert_eq!(store.start_next_job().await.unwrap().unwrap().id, queued);
    }

    #[tokio::test]
    async fn uploads_of_requests_that_were_never_answered_are_removed() {
        let (folder, store) = store().await;
        let upload = store.job_folder("unknown");
        fs::create_dir_all(&upload).unwrap();
        fs::write(upload.join("train.jsonl"), "rows").unwrap();
        store.mark_job_folder("unknown").unwrap();
        let store = reopen(store, &folder).await;
        assert_eq!(names_in(&store.root().join("jobs")), [""; 0]);
        assert_eq!(store.recovery().removed_folders, [upload]);
    }

    /// The database as it is at this moment.
    async fn back_up(store: &Store) -> Vec<u8> {
        let copy = store.root().join("copy.db");
        sqlx::query("VACUUM INTO ?")
            .bind(copy.to_str())
            .execute(store.pool())
            .await
            .unwrap();
        let bytes = fs::read(&copy).unwrap();
        fs::remove_file(copy).unwrap();
        bytes
    }

    async fn close(store: Store) -> PathBuf {
        store.close().await;
        store.root().to_owned()
    }

    fn names_in(folder: &Path) -> Vec<String> {
        let paths = artifacts::children(folder).unwrap();
        paths.iter().map(|path| name_of(path).to_owned()).collect()
    }

    #[tokio::test]
    async fn an_older_database_deletes_nothing_that_a_newer_one_knew() {
        for newer in 1..=3 {
            let (folder, store) = store().await;
            let add = async |content: &str| {
                let source = adapter(&folder, content);
                let added = store.add_version("topic", &source, Origin::Imported).await;
                added.unwrap();
            };
            add("old").await;
            let backup = back_up(&store).await;
            for number in 0..newer {
                add(&format!("new{number}")).await;
            }
            let queued = job(&store).await;
            let root = close(store.clone()).await;
            drop(store);
            fs::write(root.join("kdlora.db"), backup).unwrap();
            // As for every restore: what is in them belongs to the other database.
            for log in ["kdlora.db-wal", "kdlora.db-shm"] {
                let _ = fs::remove_file(root.join(log));
            }

            let store = Store::open(folder.path()).await.unwrap();
            assert_eq!(store.recovery().removed_folders, Vec::<PathBuf>::new());
            assert_eq!(store.recovery().orphans.len(), newer + 1);
            assert_eq!(names_in(&root.join("artifacts/topic")), ["1"]);
            let orphans = root.join("artifacts/.orphans");
            assert_eq!(names_in(&orphans).len(), newer);
            let weights = orphans.join("topic-2/adapter_model.safetensors");
            assert_eq!(fs::read_to_string(weights).unwrap(), "new0");
            assert_eq!(names_in(&root.join("jobs/.orphans")), [queued.as_str()]);

            // Another version of the same number does not take the orphan's place, and neither
            // `.orphans` nor what others have put there is taken for a task.
            for other in ["lost+found/x", ".hidden/1"] {
                fs::create_dir_all(root.join("artifacts").join(other)).unwrap();
            }
            fs::write(root.join("artifacts/notes.txt"), "mine").unwrap();
            add_again(&folder, &store).await;
            let store = reopen(store, &folder).await;
            assert_eq!(*store.recovery(), Recovery::default());
            assert_eq!(store.tasks().await.unwrap(), ["topic"]);
            assert_eq!(names_in(&orphans).len(), newer);
            assert!(root.join("artifacts/lost+found/x").is_dir());
        }
    }

    async fn add_again(folder: &tempfile::TempDir, store: &Store) {
        let source = adapter(folder, "again");
        let added = store.add_version("topic", &source, Origin::Imported).await;
        assert_eq!(added.unwrap().version, 2);
    }

    #[tokio::test]
    async fn two_orphans_of_one_name_are_both_kept() {
        let (folder, mut store) = store().await;
        for content in ["first", "second"] {
            let left = store.root().join("artifacts/topic/7");
            fs::create_dir_all(&left).unwrap();
            fs::write(left.join("file"), content).unwrap();
            store = reopen(store, &folder).await;
        }
        let orphans = store.root().join("artifacts/.orphans");
        let kept = ["topic-7", "topic-7.1"].map(|name| orphans.join(name).join("file"));
        let kept = kept.map(|file| fs::read_to_string(file).unwrap());
        assert_eq!(kept, ["first", "second"]);
    }

    #[tokio::test]
    async fn a_lost_database_is_not_replaced_by_an_empty_one() {
        for lose in [
            (|path| fs::remove_file(path).unwrap()) as fn(&Path),
            |path| fs::write(path, "").unwrap(),
        ] {
            let (folder, store) = store().await;
            let source = adapter(&folder, "one");
            let version = store.ensure_shipped("topic", &source).await.unwrap();
            let root = close(store.clone()).await;
            drop(store);
            let database = root.join("kdlora.db");
            let backup = fs::read(&database).unwrap();
            lose(&database);
            for _ in 0..2 {
                let refused = Store::open(folder.path()).await;
                let error = refused.err().unwrap().to_string();
                assert!(
                    error.contains("backup") && error.contains("move"),
                    "{error}"
                );
            }
            assert!(version.path.is_dir());
            fs::write(&database, backup).unwrap();
            let store = Store::open(folder.path()).await.unwrap();
            assert_eq!(store.live("topic").await.unwrap().unwrap().version, 1);

            // The way out that the message names.
            let root = close(store.clone()).await;
            drop(store);
            lose(&database);
            fs::rename(root.join("artifacts"), root.join("elsewhere")).unwrap();
            Store::open(folder.path()).await.unwrap();
        }
    }

    #[tokio::test]
    async fn versions_live_and_history_survive_a_reopening() {
        let (folder, store) = store().await;
        let source = adapter(&folder, "one");
        store.ensure_shipped("topic", &source).await.unwrap();
        let history = store.history("topic").await.unwrap();
        let store = reopen(store, &folder).await;
        assert_eq!(*store.recovery(), Recovery::default());
        assert_eq!(store.live("topic").await.unwrap().unwrap().version, 1);
        assert_eq!(store.history("topic").await.unwrap(), history);
    }
}
