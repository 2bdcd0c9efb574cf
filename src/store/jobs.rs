//! Jobs: one row for each distillation pass that was asked for.

use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use sqlx::sqlite::SqliteRow;
use sqlx::{FromRow, Row, SqliteConnection};
use utoipa::ToSchema;

use super::versions::database_int;
use super::{Store, StoreError, Timestamp, artifacts, check_task_name};
use crate::parse;

/// A distillation pass, as `GET /admin/jobs/{id}` shows it.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
#[schema(example = json!({"id": "01a20cc0-a256-732f-b0de-2804d3ce3042", "task": "film-mood",
    "state": "running", "stage": "student_training", "step": 105, "steps": 228, "loss": 0.302,
    "tokens_per_second": 3759.7, "eta_seconds": 27.5, "created_at": "2026-11-24T08:51:20.810Z",
    "started_at": "2026-11-24T08:51:20.812Z"}))]
pub struct Job {
    pub id: String,
    pub task: String,
    pub state: JobState,
    /// Among queued jobs the greatest starts first.
    pub priority: i32,
    /// What the pass is doing; absent before it starts.
    pub stage: Option<String>,
    pub step: u64,
    pub steps: u64,
    /// Mean training loss since the last step.
    pub loss: Option<f64>,
    pub tokens_per_second: Option<f64>,
    /// Seconds until the stage ends.
    pub eta_seconds: Option<f64>,
    /// How often its process has been started; shown if more than once.
    #[serde(skip_serializing_if = "is_usual")]
    pub attempts: u64,
    /// The version that came of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub version: Option<u64>,
    /// Why it failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// What may spoil the result, as sentences for the user; shown if there are any. The report has
    /// them too, in `data.checks`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
    pub created_at: Timestamp,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub started_at: Option<Timestamp>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub finished_at: Option<Timestamp>,
}

#[derive(
    Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, ToSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum JobState {
    Queued,
    Running,
    Succeeded,
    Failed,
    Cancelled,
}

impl JobState {
    /// All states, in the order of a job's life.
    pub const ALL: [Self; 5] = [
        Self::Queued,
        Self::Running,
        Self::Succeeded,
        Self::Failed,
        Self::Cancelled,
    ];

    /// The state's name in the database, in JSON and in metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Running => "running",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }

    /// Whether nothing more happens to the job.
    pub fn is_over(self) -> bool {
        !matches!(self, Self::Queued | Self::Running)
    }
}

impl fmt::Display for JobState {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.as_str())
    }
}

/// What is known of a job before it exists.
#[derive(Clone, Debug)]
pub struct NewJob {
    /// From [`NewJob::id`]; its folder is ready.
    pub id: String,
    pub task: String,
    pub priority: i32,
    /// The `DistillSpec` whose data are paths.
    pub spec: serde_json::Value,
    /// The client's `Idempotency-Key`.
    pub idempotency_key: Option<String>,
    /// SHA-256 of the request, which tells a repeated request from another one with the same key.
    pub request_digest: String,
    /// What may spoil the result, as far as it is known.
    pub warnings: Vec<String>,
}

impl NewJob {
    /// A fresh identifier. Later ones sort after earlier ones.
    pub fn id() -> String {
        uuid::Uuid::now_v7().to_string()
    }
}

/// The answer to [`Store::create_job`].
#[derive(Clone, Debug, PartialEq)]
pub enum Created {
    New(Job),
    /// The same request with the same key has made this job before.
    Existing(Job),
}

/// How far a running job is.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Progress {
    pub stage: String,
    pub step: u64,
    pub steps: u64,
    pub loss: Option<f64>,
    pub tokens_per_second: Option<f64>,
    pub eta_seconds: Option<f64>,
}

/// Starts of a job's process after which it is not started again.
pub const MAX_ATTEMPTS: u64 = 3;

const OF_ID: &str = "SELECT * FROM jobs WHERE id = ?";
const OF_KEY: &str = "SELECT * FROM jobs WHERE idempotency_key = ?";

impl Store {
    /// Queues a job, or finds the one that the same request made before. The same key with
    /// another request is [`StoreError::KeyReused`].
    pub async fn create_job(&self, new: NewJob) -> Result<Created, StoreError> {
        check_task_name(&new.task)?;
        self.write(async |connection| {
            if let Some(key) = &new.idempotency_key {
                let row = sqlx::query(OF_KEY)
                    .bind(key)
                    .fetch_optional(&mut *connection)
                    .await?;
                if let Some(row) = row {
                    return earlier_job(&row, key, &new.request_digest).map(Created::Existing);
                }
            }
            let sql = "INSERT INTO jobs
                (id, task, priority, spec, state, created_at, idempotency_key, request_digest, warnings)
                VALUES (?, ?, ?, ?, 'queued', ?, ?, ?, ?) RETURNING *";
            let job = sqlx::query_as(sql)
                .bind(&new.id)
                .bind(&new.task)
                .bind(new.priority)
                .bind(new.spec.to_string())
                .bind(Timestamp::now().millis())
                .bind(&new.idempotency_key)
                .bind(&new.request_digest)
                .bind(Value::from(new.warnings).to_string())
                .fetch_one(connection)
                .await?;
            Ok(Created::New(job))
        })
        .await
    }

    /// The job that the same request with the same key made before, if there is one. A key that
    /// belongs to another request is [`StoreError::KeyReused`].
    pub async fn repeated_job(&self, key: &str, digest: &str) -> Result<Option<Job>, StoreError> {
        let row = sqlx::query(OF_KEY)
            .bind(key)
            .fetch_optional(self.pool())
            .await?;
        row.map(|row| earlier_job(&row, key, digest)).transpose()
    }

    pub async fn job(&self, id: &str) -> Result<Job, StoreError> {
        let job = sqlx::query_as(OF_ID)
            .bind(id)
            .fetch_optional(self.pool())
            .await?;
        job.ok_or_else(|| StoreError::UnknownJob(id.to_owned()))
    }

    /// What the job was asked to do, as it was queued.
    pub async fn job_spec(&self, id: &str) -> Result<serde_json::Value, StoreError> {
        let spec: Option<String> = sqlx::query_scalar("SELECT spec FROM jobs WHERE id = ?")
            .bind(id)
            .fetch_optional(self.pool())
            .await?;
        let spec = spec.ok_or_else(|| StoreError::UnknownJob(id.to_owned()))?;
        let spec = parse::json(spec.as_bytes());
        Ok(spec.map_err(|error| sqlx::Error::Decode(error.into()))?)
    }

    /// The latest jobs, newest first.
    pub async fn jobs(&self, limit: u32) -> Result<Vec<Job>, StoreError> {
        Ok(
            sqlx::query_as("SELECT * FROM jobs ORDER BY id DESC LIMIT ?")
                .bind(limit)
                .fetch_all(self.pool())
                .await?,
        )
    }

    /// How many jobs there are in each state, states without jobs left out.
    pub async fn job_counts(&self) -> Result<Vec<(JobState, u64)>, StoreError> {
        let sql = "SELECT state, COUNT(*) AS jobs FROM jobs GROUP BY state";
        let rows = sqlx::query(sql).fetch_all(self.pool()).await?;
        let count = |row: &SqliteRow| -> Result<_, sqlx::Error> {
            Ok((state(row)?, super::versions::unsigned(row, "jobs")?))
        };
        Ok(rows.iter().map(count).collect::<Result<_, _>>()?)
    }

    /// Takes the queued job of the greatest priority, among several the oldest, and marks it as
    /// running.
    pub async fn start_next_job(&self) -> Result<Option<Job>, StoreError> {
        let sql = "UPDATE jobs SET state = 'running', attempts = attempts + 1,
            started_at = COALESCE(started_at, ?)
            WHERE id = (SELECT id FROM jobs WHERE state = 'queued'
                ORDER BY priority DESC, id LIMIT 1)
            RETURNING *";
        self.write(async |connection| {
            Ok(sqlx::query_as(sql)
                .bind(Timestamp::now().millis())
                .fetch_optional(connection)
                .await?)
        })
        .await
    }

    /// Records how far a running job is; a job in another state stays as it is.
    pub async fn record_progress(&self, id: &str, progress: &Progress) -> Result<(), StoreError> {
        let sql = "UPDATE jobs SET stage = ?, step = ?, steps = ?, loss = ?,
            tokens_per_second = ?, eta_seconds = ? WHERE id = ? AND state = 'running'";
        self.write(async |connection| {
            sqlx::query(sql)
                .bind(&progress.stage)
                .bind(database_int(progress.step))
                .bind(database_int(progress.steps))
                .bind(progress.loss)
                .bind(progress.tokens_per_second)
                .bind(progress.eta_seconds)
                .bind(id)
                .execute(connection)
                .await?;
            Ok(())
        })
        .await
    }

    /// Records what may spoil the result of a running job.
    pub async fn record_warnings(&self, id: &str, warnings: &[String]) -> Result<(), StoreError> {
        let sql = "UPDATE jobs SET warnings = ? WHERE id = ? AND state = 'running'";
        self.write(async |connection| {
            sqlx::query(sql)
                .bind(Value::from(warnings).to_string())
                .bind(id)
                .execute(connection)
                .await?;
            Ok(())
        })
        .await
    }

    /// Puts a running job back into the queue, in its old place: its process has ended before its
    /// work was done, and what it has left in the job's folder is gone on with. An interruption
    /// that is not the job's fault does not count as an attempt.
    pub async fn requeue_job(&self, id: &str, counts: bool) -> Result<Job, StoreError> {
        let sql = "UPDATE jobs SET state = 'queued', attempts = attempts - ?, eta_seconds = NULL
            WHERE id = ? AND state = 'running' RETURNING *";
        self.write(async |connection| {
            let job = sqlx::query_as(sql)
                .bind(i64::from(!counts))
                .bind(id)
                .fetch_optional(&mut *connection)
                .await?;
            changed(connection, id, job).await
        })
        .await
    }

    /// Ends a queued or running job without a version.
    pub async fn fail_job(&self, id: &str, error: &str) -> Result<Job, StoreError> {
        self.end_job(id, JobState::Failed, Some(error)).await
    }

    /// Ends a queued or running job because its owner does not want it any more. The caller stops
    /// its process first.
    pub async fn cancel_job(&self, id: &str) -> Result<Job, StoreError> {
        self.end_job(id, JobState::Cancelled, None).await
    }

    /// Marks the folder of a job that is being prepared: the next server removes it unless
    /// [`Store::create_job`] has made the job exist. Blocks.
    pub fn mark_job_folder(&self, id: &str) -> Result<(), StoreError> {
        self.observed(artifacts::mark(&self.job_folder(id)))
    }

    /// Removes the folder of a job that does not exist, and its mark. Blocks.
    pub fn remove_job_folder(&self, id: &str) -> Result<(), StoreError> {
        artifacts::remove_folder(&self.job_folder(id))?;
        self.unmark_job_folder(id)
    }

    /// Takes the mark of a job's folder away, as the job exists. Blocks.
    pub fn unmark_job_folder(&self, id: &str) -> Result<(), StoreError> {
        artifacts::unmark(&self.job_folder(id))
    }

    /// Removes what is in the folder of a job that is over, except its log.
    pub async fn clear_job_folder(&self, id: &str) -> Result<(), StoreError> {
        let folder = self.job_folder(id);
        self.blocking(move || artifacts::keep_only_log(&folder))
            .await
    }

    /// The last `bytes` of what the job's process has logged, from the beginning of a line on;
    /// empty for a job that has not begun.
    pub async fn job_log(&self, id: &str, bytes: u64) -> Result<String, StoreError> {
        self.job(id).await?;
        let path = self.job_folder(id).join(artifacts::LOG);
        self.blocking(move || artifacts::tail(&path, bytes)).await
    }

    async fn end_job(
        &self,
        id: &str,
        state: JobState,
        error: Option<&str>,
    ) -> Result<Job, StoreError> {
        let sql = "UPDATE jobs SET state = ?, error = ?, eta_seconds = NULL, finished_at = ?
            WHERE id = ? AND state IN ('queued', 'running') RETURNING *";
        self.write(async |connection| {
            let job = sqlx::query_as(sql)
                .bind(state.as_str())
                .bind(error)
                .bind(Timestamp::now().millis())
                .bind(id)
                .fetch_optional(&mut *connection)
                .await?;
            changed(connection, id, job).await
        })
        .await
    }
}

/// The job as a change has left it. An error if there was nothing to change: the job is over, or
/// there is none.
async fn changed(
    connection: &mut SqliteConnection,
    id: &str,
    job: Option<Job>,
) -> Result<Job, StoreError> {
    if let Some(job) = job {
        return Ok(job);
    }
    let job: Option<Job> = sqlx::query_as(OF_ID)
        .bind(id)
        .fetch_optional(connection)
        .await?;
    let id = id.to_owned();
    Err(match job {
        Some(Job { state, .. }) => StoreError::JobOver { id, state },
        None => StoreError::UnknownJob(id),
    })
}

fn is_usual(attempts: &u64) -> bool {
    *attempts <= 1
}

/// Marks a running job as succeeded within the transaction that adds its version.
pub(super) async fn succeed(
    connection: &mut SqliteConnection,
    id: &str,
    version: u64,
) -> Result<(), StoreError> {
    let sql = "UPDATE jobs SET state = 'succeeded', version = ?, eta_seconds = NULL, error = NULL,
        finished_at = ? WHERE id = ? AND state = 'running' RETURNING *";
    let job = sqlx::query_as(sql)
        .bind(database_int(version))
        .bind(Timestamp::now().millis())
        .bind(id)
        .fetch_optional(&mut *connection)
        .await?;
    changed(connection, id, job).await.map(drop)
}

fn earlier_job(row: &SqliteRow, key: &str, digest: &str) -> Result<Job, StoreError> {
    let job = Job::from_row(row)?;
    let earlier: &str = row.try_get("request_digest")?;
    if earlier == digest {
        return Ok(job);
    }
    Err(StoreError::KeyReused {
        key: key.to_owned(),
        job: job.id,
    })
}

fn state(row: &SqliteRow) -> Result<JobState, sqlx::Error> {
    let name: &str = row.try_get("state")?;
    JobState::ALL
        .into_iter()
        .find(|state| state.as_str() == name)
        .ok_or_else(|| sqlx::Error::Decode(format!("unknown job state '{name}'").into()))
}

impl FromRow<'_, SqliteRow> for Job {
    fn from_row(row: &SqliteRow) -> Result<Self, sqlx::Error> {
        let number = |column| -> Result<Option<u64>, sqlx::Error> {
            let value: Option<i64> = row.try_get(column)?;
            Ok(value.map(i64::unsigned_abs))
        };
        let time = |column| -> Result<Option<Timestamp>, sqlx::Error> {
            let value: Option<i64> = row.try_get(column)?;
            Ok(value.map(Timestamp::from_millis))
        };
        Ok(Self {
            id: row.try_get("id")?,
            task: row.try_get("task")?,
            state: state(row)?,
            priority: row.try_get("priority")?,
            stage: row.try_get("stage")?,
            step: number("step")?.unwrap_or_default(),
            steps: number("steps")?.unwrap_or_default(),
            loss: row.try_get("loss")?,
            tokens_per_second: row.try_get("tokens_per_second")?,
            eta_seconds: row.try_get("eta_seconds")?,
            attempts: number("attempts")?.unwrap_or_default(),
            version: number("version")?,
            error: row.try_get("error")?,
            // Unreadable ones are no reason to hide the job.
            warnings: parse::json(row.try_get("warnings")?).unwrap_or_default(),
            created_at: Timestamp::from_millis(row.try_get("created_at")?),
            started_at: time("started_at")?,
            finished_at: time("finished_at")?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{adapter, store};
    use super::*;

    fn new_job(key: Option<&str>, digest: &str) -> NewJob {
        NewJob {
            id: NewJob::id(),
            task: "topic".into(),
            priority: 0,
            spec: serde_json::json!({ "task": "topic" }),
            idempotency_key: key.map(str::to_owned),
            request_digest: digest.into(),
            warnings: Vec::new(),
        }
    }

    async fn create(store: &Store) -> Job {
        match store.create_job(new_job(None, "d")).await.unwrap() {
            Created::New(job) => job,
            Created::Existing(job) => panic!("{job:?}"),
        }
    }

    #[tokio::test]
    async fn a_repeated_request_gets_the_same_job_and_a_changed_one_is_refused() {
        let (_folder, store) = store().await;
        let first = store.create_job(new_job(Some("k"), "d1")).await.unwrap();
        let Created::New(job) = first else {
            panic!("{first:?}")
        };
        let again = store.create_job(new_job(Some("k"), "d1")).await.unwrap();
        assert_eq!(again, Created::Existing(job.clone()));
        let other = store.create_job(new_job(Some("k"), "d2")).await;
        assert!(matches!(other, Err(StoreError::KeyReused { .. })));
        assert_eq!(store.jobs(10).await.unwrap(), [job]);
    }

    #[tokio::test]
    async fn jobs_start_in_the_order_they_were_queued() {
        let (_folder, store) = store().await;
        let first = create(&store).await;
        let second = create(&store).await;
        let started = store.start_next_job().await.unwrap().unwrap();
        assert_eq!(started.id, first.id);
        assert_eq!(started.state, JobState::Running);
        assert_eq!(store.start_next_job().await.unwrap().unwrap().id, second.id);
        assert_eq!(store.start_next_job().await.unwrap(), None);
    }

    #[tokio::test]
    async fn a_job_that_is_over_stays_as_it_ended() {
        let (folder, store) = store().await;
        let job = create(&store).await;
        store.start_next_job().await.unwrap();
        store.cancel_job(&job.id).await.unwrap();
        let late = store.fail_job(&job.id, "killed").await.unwrap_err();
        assert!(matches!(
            late,
            StoreError::JobOver {
                state: JobState::Cancelled,
                ..
            }
        ));
        let progress = Progress {
            stage: "evaluation".into(),
            ..Progress::default()
        };
        store.record_progress(&job.id, &progress).await.unwrap();
        let output = adapter(&folder, "late");
        let finished = store.finish_with_version(&job.id, &output, None).await;
        assert!(matches!(finished, Err(StoreError::JobOver { .. })));
        let job = store.job(&job.id).await.unwrap();
        assert_eq!((job.state, job.stage), (JobState::Cancelled, None));
        assert!(store.tasks().await.unwrap().is_empty());
    }

    #[tokio::test]
    async fn success_gives_version_promotion_and_state_together() {
        let (folder, store) = store().await;
        let job = create(&store).await;
        store.start_next_job().await.unwrap();
        let output = adapter(&folder, "out");
        let version = store
            .finish_with_version(&job.id, &output, Some("kept 97 %"))
            .await
            .unwrap();
        assert!(version.live);
        let job = store.job(&job.id).await.unwrap();
        assert_eq!((job.state, job.version), (JobState::Succeeded, Some(1)));
        let history = store.history("topic").await.unwrap();
        assert_eq!(history[0].actor, format!("job {}", job.id));
    }

    #[tokio::test]
    async fn json_has_the_fields_of_the_interface() {
        let (_folder, store) = store().await;
        let job = create(&store).await;
        let json = serde_json::to_value(&job).unwrap();
        let names: Vec<_> = json.as_object().unwrap().keys().cloned().collect();
        let expected = [
            "id",
            "task",
            "state",
            "priority",
            "stage",
            "step",
            "steps",
            "loss",
            "tokens_per_second",
            "eta_seconds",
            "created_at",
        ];
        assert_eq!(names, expected);
        assert_eq!(json["state"], "queued");
    }

    #[tokio::test]
    async fn warnings_are_kept_from_the_request_and_replaced_by_those_of_the_pass() {
        let (_folder, store) = store().await;
        let new = NewJob {
            warnings: vec!["odd \"names\"".into()],
            ..new_job(None, "d")
        };
        let Created::New(job) = store.create_job(new).await.unwrap() else {
            panic!("the job exists already")
        };
        assert_eq!(job.warnings, ["odd \"names\""]);
        store.start_next_job().await.unwrap();
        let more = ["odd names".to_owned(), "few rows".to_owned()];
        store.record_warnings(&job.id, &more).await.unwrap();
        assert_eq!(store.job(&job.id).await.unwrap().warnings, more);
    }

    #[tokio::test]
    async fn a_cancelled_job_is_not_started() {
        let (_folder, store) = store().await;
        create(&store).await;
        store.start_next_job().await.unwrap();
        let second = create(&store).await;
        let cancelled = store.cancel_job(&second.id).await.unwrap();
        assert_eq!(cancelled.state, JobState::Cancelled);
        assert_eq!(store.start_next_job().await.unwrap(), None);
        let counts = store.job_counts().await.unwrap();
        assert_eq!(counts.len(), 2);
        let unknown = store.cancel_job("unknown").await;
        assert!(matches!(unknown, Err(StoreError::UnknownJob(_))));
    }
}
