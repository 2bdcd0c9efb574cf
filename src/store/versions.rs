//! Versions of tasks: adding and listing them.

use std::path::{Path, PathBuf};

use serde::{Serialize, Serializer};
use sqlx::sqlite::{SqliteExecutor, SqliteRow};
use sqlx::{Row, Sqlite, SqliteConnection};
use utoipa::ToSchema;

use super::artifacts::{self, Staged};
use super::live::promote;
use super::{Store, StoreError, Timestamp, check_task_name};
use crate::adapter::{AdapterBase, FileSums};
use crate::encoder::shown_encoder;
use crate::parse;
use crate::telemetry::chain;

/// An adapter with its report, immutable once added.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[schema(example = json!({"task": "film-mood", "version": 2, "live": true, "origin": "imported",
    "created_at": "2026-11-24T08:53:01.002Z", "bytes": 1887436,
    "digest": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"}))]
pub struct Version {
    pub task: String,
    /// 1, 2, … for each task.
    pub version: u64,
    /// Whether the task answers with this version.
    pub live: bool,
    #[serde(flatten)]
    pub origin: Origin,
    pub created_at: Timestamp,
    /// SHA-256 over the names and bytes of the folder's files.
    pub digest: String,
    /// Bytes of the folder's files.
    pub bytes: u64,
    /// The folder's `report.json`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub report: Option<serde_json::Value>,
    /// The folder is gone from the disk: the version is history only.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub missing: bool,
    /// The encoder that it was trained on: `student_name` and `student_digest`, as far as they are
    /// known. Without a digest it is not known whether the version belongs to this server's student.
    #[serde(flatten, serialize_with = "students")]
    #[schema(value_type = Student)]
    pub base: AdapterBase,
    /// SHA-256 of each file of the folder; empty where the folder was damaged before they were
    /// taken.
    #[serde(skip)]
    pub files: FileSums,
    /// The PEFT folder. Not told to clients.
    #[serde(skip)]
    pub path: PathBuf,
}

/// How clients read of a version's encoder.
#[derive(Serialize, ToSchema)]
struct Student {
    /// The encoder that the version was trained on.
    #[serde(skip_serializing_if = "Option::is_none")]
    student_name: Option<String>,
    /// SHA-256 of what that encoder computes with. Absent where it is not known: whether the version
    /// belongs to this server's student is unverified then.
    #[serde(skip_serializing_if = "Option::is_none")]
    student_digest: Option<String>,
}

fn students<S: Serializer>(base: &AdapterBase, serializer: S) -> Result<S::Ok, S::Error> {
    let student = Student {
        student_name: base.name.as_deref().map(shown_encoder).map(str::to_owned),
        student_digest: base.digest.clone(),
    };
    student.serialize(serializer)
}

/// Where a version comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(tag = "origin", rename_all = "snake_case")]
pub enum Origin {
    /// Came with the program.
    Shipped,
    /// Made by a job of this server.
    Distilled { job: String },
    /// Brought by an administrator.
    Imported,
}

/// Columns that [`Version::from_row`] reads.
pub(super) const SELECT: &str = "SELECT v.*, l.version IS NOT NULL AS is_live
    FROM versions v LEFT JOIN live l ON l.task = v.task AND l.version = v.version";

impl Store {
    /// Adds a copy of the adapter in `folder` as the task's next version; it does not go live.
    pub async fn add_version(
        &self,
        task: &str,
        folder: &Path,
        origin: Origin,
    ) -> Result<Version, StoreError> {
        let staged = self.stage(task, folder).await?;
        let add = async |connection: &mut SqliteConnection| {
            let number = insert(connection, task, &staged, &origin).await?;
            self.publish(staged, task, number).await?;
            select_version(connection, &self.artifacts(), task, number).await
        };
        let version = self.write(add).await?;
        self.finished(&version).await;
        Ok(version)
    }

    /// Adds an adapter that came with the program, unless the task already has these very bytes.
    /// It goes live if the task has no live version or a shipped one; what an administrator
    /// made live stays.
    pub async fn ensure_shipped(&self, task: &str, folder: &Path) -> Result<Version, StoreError> {
        let source = folder.to_owned();
        let shipped = self.blocking(move || artifacts::contents(&source)).await?;
        let versions = self.versions_or_none(task).await?;
        let same = |version: &&Version| version.digest == shipped.digest && !version.missing;
        if let Some(version) = versions.iter().find(same) {
            return Ok(version.clone());
        }
        let version = self.add_version(task, folder, Origin::Shipped).await?;
        let live = versions.iter().find(|version| version.live);
        if live.is_none_or(|live| live.origin == Origin::Shipped) {
            let reason = "came with the program";
            return self.promote(task, version.version, "server", reason).await;
        }
        Ok(version)
    }

    /// All versions of the task, oldest first. Errors with [`StoreError::UnknownTask`] if there
    /// are none.
    pub async fn versions(&self, task: &str) -> Result<Vec<Version>, StoreError> {
        let versions = self.versions_or_none(task).await?;
        if versions.is_empty() {
            return Err(StoreError::UnknownTask(task.to_owned()));
        }
        Ok(versions)
    }

    /// One version of the task.
    pub async fn version(&self, task: &str, version: u64) -> Result<Version, StoreError> {
        select_version(self.pool(), &self.artifacts(), task, version).await
    }

    /// Names of all tasks that have a version, live or not.
    pub async fn tasks(&self) -> Result<Vec<String>, StoreError> {
        let sql = "SELECT DISTINCT task FROM versions ORDER BY task";
        Ok(sqlx::query_scalar(sql).fetch_all(self.pool()).await?)
    }

    /// Ends a job that has made an adapter in `folder`, in one step: a copy of it is a version,
    /// which is live if `promote_because` gives the reason, and the job has succeeded. After an
    /// error or a kill nothing of it has happened, and it can be tried again.
    pub async fn finish_with_version(
        &self,
        job: &str,
        folder: &Path,
        promote_because: Option<&str>,
    ) -> Result<Version, StoreError> {
        let task = self.job(job).await?.task;
        let origin = Origin::Distilled {
            job: job.to_owned(),
        };
        let staged = self.stage(&task, folder).await?;
        let finish = async |connection: &mut SqliteConnection| {
            let number = insert(connection, &task, &staged, &origin).await?;
            super::jobs::succeed(connection, job, number).await?;
            self.publish(staged, &task, number).await?;
            if let Some(reason) = promote_because {
                let actor = format!("job {job}");
                promote(connection, &task, number, &actor, reason).await?;
            }
            select_version(connection, &self.artifacts(), &task, number).await
        };
        let version = self.write(finish).await?;
        self.finished(&version).await;
        Ok(version)
    }

    async fn stage(&self, task: &str, folder: &Path) -> Result<Staged, StoreError> {
        check_task_name(task)?;
        let (artifacts, folder) = (self.artifacts(), folder.to_owned());
        self.blocking(move || Staged::new(&artifacts, &folder))
            .await
    }

    /// Puts the folder in its place, marked as unfinished.
    async fn publish(&self, staged: Staged, task: &str, number: u64) -> Result<(), StoreError> {
        let place = artifact(&self.artifacts(), task, number);
        tokio::task::spawn_blocking(move || staged.publish(&place)).await?
    }

    /// Takes the mark of a version away that has been committed. If that fails, the next server
    /// does it.
    async fn finished(&self, version: &Version) {
        let place = version.path.clone();
        if let Err(error) = self.blocking(move || artifacts::unmark(&place)).await {
            tracing::warn!(
                task = version.task,
                version = version.version,
                error = chain(&error),
                "the mark of an unfinished version can't be removed"
            );
        }
    }

    pub(super) async fn versions_or_none(&self, task: &str) -> Result<Vec<Version>, StoreError> {
        let sql = format!("{SELECT} WHERE v.task = ? ORDER BY v.version");
        self.select(sqlx::query(&sql).bind(task)).await
    }

    pub(super) async fn select<'q>(
        &self,
        query: sqlx::query::Query<'q, Sqlite, sqlx::sqlite::SqliteArguments<'q>>,
    ) -> Result<Vec<Version>, StoreError> {
        let artifacts = self.artifacts();
        let rows = query.fetch_all(self.pool()).await?;
        Ok(rows
            .iter()
            .map(|row| Version::from_row(row, &artifacts))
            .collect::<Result<_, _>>()?)
    }
}

impl Version {
    fn from_row(row: &SqliteRow, artifacts: &Path) -> Result<Self, sqlx::Error> {
        let task: String = row.try_get("task")?;
        let version = unsigned(row, "version")?;
        let origin = match row.try_get("origin")? {
            "shipped" => Origin::Shipped,
            "imported" => Origin::Imported,
            _ => Origin::Distilled {
                job: row.try_get("job")?,
            },
        };
        let report: Option<&str> = row.try_get("report")?;
        // An unreadable report must not keep the version from being managed.
        let report = report.and_then(|report| {
            parse::json(report.as_bytes())
                .inspect_err(|error| {
                    tracing::warn!(task, version, %error, "ignored an unreadable report");
                })
                .ok()
        });
        let path = artifact(artifacts, &task, version);
        Ok(Self {
            version,
            live: row.try_get("is_live")?,
            origin,
            created_at: Timestamp::from_millis(row.try_get("created_at")?),
            digest: row.try_get("digest")?,
            bytes: unsigned(row, "bytes")?,
            report,
            missing: !path.is_dir(),
            base: base(row)?,
            files: files(row)?,
            path,
            task,
        })
    }
}

/// One version of a task, read by any connection.
pub(super) async fn select_version(
    executor: impl SqliteExecutor<'_>,
    artifacts: &Path,
    task: &str,
    version: u64,
) -> Result<Version, StoreError> {
    let row = sqlx::query(&format!("{SELECT} WHERE v.task = ? AND v.version = ?"))
        .bind(task)
        .bind(database_int(version))
        .fetch_optional(executor)
        .await?;
    match row {
        Some(row) => Ok(Version::from_row(&row, artifacts)?),
        None => Err(StoreError::UnknownVersion {
            task: task.to_owned(),
            version,
        }),
    }
}

/// Folder of a version.
pub(super) fn artifact(artifacts: &Path, task: &str, version: u64) -> PathBuf {
    artifacts.join(task).join(version.to_string())
}

/// The student of a version's row.
pub(super) fn base(row: &SqliteRow) -> Result<AdapterBase, sqlx::Error> {
    Ok(AdapterBase {
        name: row.try_get("student_name")?,
        digest: row.try_get("student_digest")?,
    })
}

/// The sums in a version's row.
pub(super) fn files(row: &SqliteRow) -> Result<FileSums, sqlx::Error> {
    let files: Option<&str> = row.try_get("files")?;
    // Sums that can't be read are as good as none: nothing fits them.
    Ok(files
        .and_then(|files| parse::json(files.as_bytes()).ok())
        .unwrap_or_default())
}

/// A non-negative integer column.
pub(super) fn unsigned(row: &SqliteRow, column: &str) -> Result<u64, sqlx::Error> {
    let value: i64 = row.try_get(column)?;
    u64::try_from(value).map_err(|error| sqlx::Error::Decode(error.into()))
}

/// SQLite's integers are signed; a number beyond them matches no row.
pub(super) fn database_int(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

async fn insert(
    connection: &mut SqliteConnection,
    task: &str,
    staged: &Staged,
    origin: &Origin,
) -> Result<u64, StoreError> {
    let (origin, job) = match origin {
        Origin::Shipped => ("shipped", None),
        Origin::Distilled { job } => ("distilled", Some(job)),
        Origin::Imported => ("imported", None),
    };
    let sql = "INSERT INTO versions (task, version, origin, job, digest, bytes, report, created_at,
            files, student_name, student_digest)
        SELECT ?1, COALESCE(MAX(version), 0) + 1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10
        FROM versions WHERE task = ?1
        RETURNING version";
    let row = sqlx::query(sql)
        .bind(task)
        .bind(origin)
        .bind(job)
        .bind(&staged.digest)
        .bind(database_int(staged.bytes))
        .bind(&staged.report)
        .bind(Timestamp::now().millis())
        .bind(staged.files.to_json())
        .bind(&staged.base.name)
        .bind(&staged.base.digest)
        .fetch_one(connection)
        .await?;
    Ok(unsigned(&row, "version")?)
}

#[cfg(test)]
mod tests {
    use super::super::testing::{adapter, store};
    use super::*;

    async fn add(folder: &tempfile::TempDir, store: &Store, content: &str) -> Version {
        let adapter = adapter(folder, content);
        store
            .add_version("topic", &adapter, Origin::Imported)
            .await
            .unwrap()
    }

    #[tokio::test]
    async fn versions_count_up_and_carry_their_report() {
        let (folder, store) = store().await;
        let first = add(&folder, &store, "one").await;
        let second = add(&folder, &store, "two").await;
        assert_eq!((first.version, second.version), (1, 2));
        assert_eq!(second.report.unwrap()["note"], "two");
        let bytes = std::fs::read(second.path.join("adapter_model.safetensors")).unwrap();
        assert_eq!(bytes, b"two");
        assert!(store.live("topic").await.unwrap().is_none());
    }

    #[tokio::test]
    async fn shipped_adapters_are_taken_in_once_and_do_not_override_the_administrator() {
        let (folder, store) = store().await;
        let one = adapter(&folder, "one");
        let first = store.ensure_shipped("topic", &one).await.unwrap();
        let again = store.ensure_shipped("topic", &one).await.unwrap();
        assert_eq!((first.version, again.version), (1, 1));
        assert!(again.live);

        let next_release = adapter(&folder, "two");
        let next = store.ensure_shipped("topic", &next_release).await.unwrap();
        assert!(next.live);

        let own = add(&folder, &store, "own").await;
        store
            .promote("topic", own.version, "admin", "")
            .await
            .unwrap();
        let later = adapter(&folder, "three");
        let later = store.ensure_shipped("topic", &later).await.unwrap();
        assert_eq!((later.version, later.live), (4, false));
    }

    #[tokio::test]
    async fn a_row_with_an_unreadable_report_can_be_managed() {
        // What SQLite takes for JSON, and this program can't read.
        let nested = format!("{}1{}", "[".repeat(200), "]".repeat(200));
        for report in [r#"{"x": 1e400}"#, r#"{"x": "\ud800"}"#, &nested] {
            let (folder, store) = store().await;
            let one = adapter(&folder, "one");
            store.ensure_shipped("topic", &one).await.unwrap();
            let two = add(&folder, &store, "two").await;
            sqlx::query("UPDATE versions SET report = ?")
                .bind(report)
                .execute(store.pool())
                .await
                .unwrap();
            let versions = store.versions("topic").await.unwrap();
            assert!(versions.iter().all(|version| version.report.is_none()));
            store.ensure_shipped("topic", &one).await.unwrap();
            store.set_mode("topic", None).await.unwrap();
            let live = store.promote("topic", two.version, "admin", "").await;
            assert!(live.unwrap().live);
            let back = store.rollback("topic", "admin", "").await.unwrap();
            assert_eq!(back.version, 1);
            store.withdraw("topic", "admin", "").await.unwrap();
            let three = adapter(&folder, "three");
            assert!(store.ensure_shipped("topic", &three).await.unwrap().live);
        }
    }

    #[tokio::test]
    async fn a_report_that_could_not_be_read_back_is_refused() {
        let (folder, store) = store().await;
        for report in [r#"{"x": 1e400}"#, r#"{"x": "\ud800"}"#, "", "{} {}"] {
            let bad = adapter(&folder, "bad");
            std::fs::write(bad.join("report.json"), report).unwrap();
            let refused = store.add_version("topic", &bad, Origin::Imported).await;
            assert!(
                matches!(refused, Err(StoreError::BadReport(_))),
                "{refused:?}"
            );
        }
        assert_eq!(store.tasks().await.unwrap(), Vec::<String>::new());
    }

    #[tokio::test]
    async fn versions_added_at_the_same_time_get_their_own_numbers() {
        let (folder, store) = store().await;
        let adds = (0..8).map(|index| {
            let adapter = adapter(&folder, &format!("c{index}"));
            let store = store.clone();
            tokio::spawn(async move {
                store
                    .add_version("topic", &adapter, Origin::Imported)
                    .await
                    .map(|version| version.version)
            })
        });
        let mut numbers = Vec::new();
        for add in adds.collect::<Vec<_>>() {
            numbers.push(add.await.unwrap().unwrap());
        }
        numbers.sort();
        assert_eq!(numbers, (1..=8).collect::<Vec<_>>());
    }
}
