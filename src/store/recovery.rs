//! Puts the state folder in order after a server that did not stop properly.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use sqlx::{Row, SqlitePool};

use super::artifacts::{self, INCOMING};
use super::jobs::MAX_ATTEMPTS;
use super::versions::{artifact, database_int, unsigned};
use super::{StoreError, Timestamp};

/// What was found and repaired when the state folder was opened.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Recovery {
    /// Jobs that were running and go on from where they were. Queued jobs stay queued.
    pub requeued_jobs: Vec<String>,
    /// Jobs that were running in their last attempt and have been marked as failed.
    pub failed_jobs: Vec<String>,
    /// Folders without a row, removed: their version or job was never acknowledged.
    pub removed_folders: Vec<PathBuf>,
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
    for folder in artifacts::children(&root.join("artifacts"))? {
        if name_of(&folder).starts_with(INCOMING) {
            recovery.remove(folder)?;
            continue;
        }
        for version in artifacts::children(&folder)? {
            if !known.contains(version.as_path()) {
                recovery.remove(version)?;
            }
        }
    }
    for folder in artifacts::children(&root.join("jobs"))? {
        let id = name_of(&folder);
        if jobs.over.contains(id) {
            artifacts::keep_only_log(&folder)?;
        } else if !jobs.queued.contains(id) {
            recovery.remove(folder)?;
        }
    }
    recovery.missing_versions = versions
        .iter()
        .filter(|known| !known.path.is_dir())
        .map(|known| (known.task.clone(), known.version))
        .collect();
    Ok(recovery)
}

impl Recovery {
    fn remove(&mut self, folder: PathBuf) -> Result<(), StoreError> {
        artifacts::remove_folder(&folder)?;
        self.removed_folders.push(folder);
        Ok(())
    }
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
        let store = reopen(store, &folder).await;
        assert!(kept.path.is_dir() && !copying.exists() && !renamed.exists());
        assert_eq!(store.recovery().removed_folders.len(), 2);
        assert_eq!(store.versions("topic").await.unwrap().len(), 1);
        let next = store
            .add_version("topic", &source, Origin::Imported)
            .await
            .unwrap();
        assert_eq!(next.version, 2);
    }

    #[tokio::test]
    async fn a_folder_left_by_a_rolled_back_addition_does_not_block_the_next_one() {
        let (folder, store) = store().await;
        let left = store.root().join("artifacts/topic/1");
        fs::create_dir_all(&left).unwrap();
        fs::write(left.join("stale"), "half").unwrap();
        let source = adapter(&folder, "one");
        let version = store
            .add_version("topic", &source, Origin::Imported)
            .await
            .unwrap();
        assert_eq!(version.version, 1);
        assert!(!version.path.join("stale").exists());
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
        let store = reopen(store, &folder).await;
        assert!(!upload.exists());
        assert_eq!(store.recovery().removed_folders, [upload]);
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
