//! Versions of tasks: adding, listing, promoting, going back.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sqlx::sqlite::SqliteRow;
use sqlx::{Row, Sqlite, Transaction};
use utoipa::ToSchema;

use super::artifacts::{self, Staged, Transfer};
use super::{Store, StoreError, Timestamp, check_task_name};

/// An adapter with its report, immutable once added.
#[derive(Clone, Debug, Serialize, ToSchema)]
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
    /// The PEFT folder. Not told to clients.
    #[serde(skip)]
    pub path: PathBuf,
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

/// One change of a task's live version.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct Change {
    pub task: String,
    pub kind: ChangeKind,
    /// Live from this change on.
    pub version: u64,
    /// Live before it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub previous: Option<u64>,
    /// Who: `admin`, `job {id}` or `server`.
    pub actor: String,
    /// Why, as the actor put it.
    pub reason: String,
    pub at: Timestamp,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ChangeKind {
    Promote,
    Rollback,
}

/// Columns that [`Version::from_row`] reads.
const SELECT: &str = "SELECT v.*, l.version IS NOT NULL AS is_live
    FROM versions v LEFT JOIN live l ON l.task = v.task AND l.version = v.version";

impl Store {
    /// Adds the adapter in `folder` as the task's next version; it does not go live. The folder
    /// is copied, except for a distilled one, which is moved.
    pub async fn add_version(
        &self,
        task: &str,
        folder: &Path,
        origin: Origin,
    ) -> Result<Version, StoreError> {
        let staged = self.stage(task, folder, &origin).await?;
        let mut transaction = self.write().await?;
        let number = insert(&mut transaction, task, &staged, &origin).await?;
        self.publish(staged, task, number).await?;
        transaction.commit().await?;
        self.version(task, number).await
    }

    /// Adds an adapter that came with the program, unless the task already has these very bytes.
    /// It goes live if the task has no live version or a shipped one; what an administrator
    /// made live stays.
    pub async fn ensure_shipped(&self, task: &str, folder: &Path) -> Result<Version, StoreError> {
        let source = folder.to_owned();
        let digest = tokio::task::spawn_blocking(move || artifacts::digest(&source)).await??;
        let versions = self.versions_or_none(task).await?;
        let same = |version: &&Version| version.digest == digest && !version.missing;
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
        let row = sqlx::query(&format!("{SELECT} WHERE v.task = ? AND v.version = ?"))
            .bind(task)
            .bind(database_int(version))
            .fetch_optional(self.pool())
            .await?;
        match row {
            Some(row) => Ok(Version::from_row(&row, &self.artifacts())?),
            None => Err(StoreError::UnknownVersion {
                task: task.to_owned(),
                version,
            }),
        }
    }

    /// The version that the task answers with, if it has one whose folder is there.
    pub async fn live(&self, task: &str) -> Result<Option<Version>, StoreError> {
        let live = self.live_versions().await?;
        Ok(live.into_iter().find(|version| version.task == task))
    }

    /// The live version of each task, by task name. A version whose folder is gone is left out.
    pub async fn live_versions(&self) -> Result<Vec<Version>, StoreError> {
        let sql = format!("{SELECT} WHERE l.version IS NOT NULL ORDER BY v.task");
        let mut versions = self.select(sqlx::query(&sql)).await?;
        versions.retain(|version| !version.missing);
        Ok(versions)
    }

    /// Names of all tasks that have a version, live or not.
    pub async fn tasks(&self) -> Result<Vec<String>, StoreError> {
        let sql = "SELECT DISTINCT task FROM versions ORDER BY task";
        Ok(sqlx::query_scalar(sql).fetch_all(self.pool()).await?)
    }

    /// Makes a version live, at once and durably. Promoting the live version changes nothing.
    pub async fn promote(
        &self,
        task: &str,
        version: u64,
        actor: &str,
        reason: &str,
    ) -> Result<Version, StoreError> {
        if self.version(task, version).await?.missing {
            return Err(StoreError::MissingArtifact {
                task: task.to_owned(),
                version,
            });
        }
        let mut transaction = self.write().await?;
        promote(&mut transaction, task, version, actor, reason).await?;
        transaction.commit().await?;
        self.version(task, version).await
    }

    /// Makes the version live that was live before the promotion in force; going back again goes
    /// one step further. Versions whose folder is gone are passed over.
    pub async fn rollback(
        &self,
        task: &str,
        actor: &str,
        reason: &str,
    ) -> Result<Version, StoreError> {
        if self.versions_or_none(task).await?.is_empty() {
            return Err(StoreError::UnknownTask(task.to_owned()));
        }
        let nothing = || StoreError::NothingToRollBack(task.to_owned());
        let mut transaction = self.write().await?;
        let live = live_row(&mut transaction, task)
            .await?
            .ok_or_else(nothing)?;
        let mut promotion = live.promotion;
        let (promotion, version) = loop {
            let earlier = replaced_by(&mut transaction, promotion).await?;
            let (earlier, version) = earlier.ok_or_else(nothing)?;
            if artifact(&self.artifacts(), task, version).is_dir() {
                break (earlier, version);
            }
            promotion = earlier;
        };
        let change = NewChange {
            task,
            kind: "rollback",
            version,
            live: Some(live),
            actor,
            reason,
        };
        change.insert(&mut transaction).await?;
        set_live(&mut transaction, task, version, promotion).await?;
        transaction.commit().await?;
        self.version(task, version).await
    }

    /// Every change of the task's live version, oldest first.
    pub async fn history(&self, task: &str) -> Result<Vec<Change>, StoreError> {
        let rows = sqlx::query("SELECT * FROM changes WHERE task = ? ORDER BY id")
            .bind(task)
            .fetch_all(self.pool())
            .await?;
        Ok(rows
            .iter()
            .map(Change::from_row)
            .collect::<Result<_, _>>()?)
    }

    /// The end of a job that made an adapter, in one step: the version exists, is live if
    /// `promote` gives the reason, and the job has succeeded. After a kill there is all of it
    /// or nothing.
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
        let staged = self.stage(&task, folder, &origin).await?;
        let mut transaction = self.write().await?;
        let number = insert(&mut transaction, &task, &staged, &origin).await?;
        self.publish(staged, &task, number).await?;
        if let Some(reason) = promote_because {
            let actor = format!("job {job}");
            promote(&mut transaction, &task, number, &actor, reason).await?;
        }
        super::jobs::succeed(&mut transaction, job, number).await?;
        transaction.commit().await?;
        self.version(&task, number).await
    }

    async fn stage(
        &self,
        task: &str,
        folder: &Path,
        origin: &Origin,
    ) -> Result<Staged, StoreError> {
        check_task_name(task)?;
        let transfer = match origin {
            Origin::Distilled { .. } => Transfer::Move,
            Origin::Shipped | Origin::Imported => Transfer::Copy,
        };
        let (artifacts, folder) = (self.artifacts(), folder.to_owned());
        let staged = move || Staged::new(&artifacts, &folder, transfer);
        tokio::task::spawn_blocking(staged).await?
    }

    async fn publish(&self, staged: Staged, task: &str, number: u64) -> Result<(), StoreError> {
        let place = artifact(&self.artifacts(), task, number);
        tokio::task::spawn_blocking(move || staged.publish(&place)).await?
    }

    async fn versions_or_none(&self, task: &str) -> Result<Vec<Version>, StoreError> {
        let sql = format!("{SELECT} WHERE v.task = ? ORDER BY v.version");
        self.select(sqlx::query(&sql).bind(task)).await
    }

    async fn select<'q>(
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
        let report = report.map(serde_json::from_str).transpose();
        let path = artifact(artifacts, &task, version);
        Ok(Self {
            version,
            live: row.try_get("is_live")?,
            origin,
            created_at: Timestamp::from_millis(row.try_get("created_at")?),
            digest: row.try_get("digest")?,
            bytes: unsigned(row, "bytes")?,
            report: report.map_err(|error| sqlx::Error::Decode(error.into()))?,
            missing: !path.is_dir(),
            path,
            task,
        })
    }
}

impl Change {
    fn from_row(row: &SqliteRow) -> Result<Self, sqlx::Error> {
        let previous: Option<i64> = row.try_get("previous")?;
        Ok(Self {
            task: row.try_get("task")?,
            kind: match row.try_get("kind")? {
                "rollback" => ChangeKind::Rollback,
                _ => ChangeKind::Promote,
            },
            version: unsigned(row, "version")?,
            previous: previous.map(i64::unsigned_abs),
            actor: row.try_get("actor")?,
            reason: row.try_get("reason")?,
            at: Timestamp::from_millis(row.try_get("at")?),
        })
    }
}

/// Folder of a version.
pub(super) fn artifact(artifacts: &Path, task: &str, version: u64) -> PathBuf {
    artifacts.join(task).join(version.to_string())
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
    transaction: &mut Transaction<'_, Sqlite>,
    task: &str,
    staged: &Staged,
    origin: &Origin,
) -> Result<u64, StoreError> {
    let (origin, job) = match origin {
        Origin::Shipped => ("shipped", None),
        Origin::Distilled { job } => ("distilled", Some(job)),
        Origin::Imported => ("imported", None),
    };
    let sql = "INSERT INTO versions (task, version, origin, job, digest, bytes, report, created_at)
        SELECT ?1, COALESCE(MAX(version), 0) + 1, ?2, ?3, ?4, ?5, ?6, ?7
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
        .fetch_one(&mut **transaction)
        .await?;
    Ok(unsigned(&row, "version")?)
}

/// What is in force for a task.
struct LiveRow {
    version: i64,
    promotion: i64,
}

struct NewChange<'a> {
    task: &'a str,
    kind: &'static str,
    version: u64,
    live: Option<LiveRow>,
    actor: &'a str,
    reason: &'a str,
}

impl NewChange<'_> {
    /// Returns the change's id.
    async fn insert(&self, transaction: &mut Transaction<'_, Sqlite>) -> Result<i64, StoreError> {
        let sql = "INSERT INTO changes (task, kind, version, previous, replaced, actor, reason, at)
            VALUES (?, ?, ?, ?, ?, ?, ?, ?)";
        let result = sqlx::query(sql)
            .bind(self.task)
            .bind(self.kind)
            .bind(database_int(self.version))
            .bind(self.live.as_ref().map(|live| live.version))
            .bind(self.live.as_ref().map(|live| live.promotion))
            .bind(self.actor)
            .bind(self.reason)
            .bind(Timestamp::now().millis())
            .execute(&mut **transaction)
            .await?;
        Ok(result.last_insert_rowid())
    }
}

async fn promote(
    transaction: &mut Transaction<'_, Sqlite>,
    task: &str,
    version: u64,
    actor: &str,
    reason: &str,
) -> Result<(), StoreError> {
    let live = live_row(transaction, task).await?;
    if live
        .as_ref()
        .is_some_and(|live| live.version == database_int(version))
    {
        return Ok(());
    }
    let change = NewChange {
        task,
        kind: "promote",
        version,
        live,
        actor,
        reason,
    };
    let promotion = change.insert(transaction).await?;
    set_live(transaction, task, version, promotion).await
}

async fn live_row(
    transaction: &mut Transaction<'_, Sqlite>,
    task: &str,
) -> Result<Option<LiveRow>, StoreError> {
    let row: Option<(i64, i64)> =
        sqlx::query_as("SELECT version, promotion FROM live WHERE task = ?")
            .bind(task)
            .fetch_optional(&mut **transaction)
            .await?;
    Ok(row.map(|(version, promotion)| LiveRow { version, promotion }))
}

async fn set_live(
    transaction: &mut Transaction<'_, Sqlite>,
    task: &str,
    version: u64,
    promotion: i64,
) -> Result<(), StoreError> {
    let sql = "INSERT INTO live (task, version, promotion) VALUES (?, ?, ?)
        ON CONFLICT (task) DO UPDATE SET version = excluded.version, promotion = excluded.promotion";
    sqlx::query(sql)
        .bind(task)
        .bind(database_int(version))
        .bind(promotion)
        .execute(&mut **transaction)
        .await?;
    Ok(())
}

/// The promotion (id, version) that the given one replaced.
async fn replaced_by(
    transaction: &mut Transaction<'_, Sqlite>,
    promotion: i64,
) -> Result<Option<(i64, u64)>, StoreError> {
    let sql = "SELECT earlier.id, earlier.version FROM changes AS later
        JOIN changes AS earlier ON earlier.id = later.replaced WHERE later.id = ?";
    let row: Option<(i64, i64)> = sqlx::query_as(sql)
        .bind(promotion)
        .fetch_optional(&mut **transaction)
        .await?;
    Ok(row.map(|(id, version)| (id, version.unsigned_abs())))
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
    async fn promotion_and_rollback_walk_the_history() {
        let (folder, store) = store().await;
        for content in ["one", "two", "three"] {
            let version = add(&folder, &store, content).await.version;
            let live = store.promote("topic", version, "admin", content).await;
            assert!(live.unwrap().live);
        }
        let back = store.rollback("topic", "admin", "worse").await.unwrap();
        assert_eq!(back.version, 2);
        let back = store.rollback("topic", "admin", "still").await.unwrap();
        assert_eq!(back.version, 1);
        assert_eq!(store.live("topic").await.unwrap().unwrap().version, 1);
        let nothing = store.rollback("topic", "admin", "more").await;
        assert!(matches!(nothing, Err(StoreError::NothingToRollBack(_))));

        let history = store.history("topic").await.unwrap();
        let steps: Vec<_> = history
            .iter()
            .map(|change| (change.previous, change.version, change.reason.as_str()))
            .collect();
        let expected = [
            (None, 1, "one"),
            (Some(1), 2, "two"),
            (Some(2), 3, "three"),
            (Some(3), 2, "worse"),
            (Some(2), 1, "still"),
        ];
        assert_eq!(steps, expected);
    }

    #[tokio::test]
    async fn promoting_the_live_version_again_leaves_rollback_meaningful() {
        let (folder, store) = store().await;
        for content in ["one", "two"] {
            let version = add(&folder, &store, content).await.version;
            store.promote("topic", version, "admin", "").await.unwrap();
        }
        store.promote("topic", 2, "admin", "again").await.unwrap();
        let back = store.rollback("topic", "admin", "").await.unwrap();
        assert_eq!(back.version, 1);
    }

    #[tokio::test]
    async fn unknown_tasks_and_versions_are_named() {
        let (folder, store) = store().await;
        add(&folder, &store, "one").await;
        let error = store.promote("topic", 9, "admin", "").await.unwrap_err();
        assert_eq!(error.to_string(), "task 'topic' has no version 9");
        let error = store.rollback("nope", "admin", "").await.unwrap_err();
        assert_eq!(error.to_string(), "there is no task 'nope'");
        let error = store.versions("nope").await.unwrap_err();
        assert!(matches!(error, StoreError::UnknownTask(_)));
        let adapter = adapter(&folder, "one");
        let error = store.add_version("../up", &adapter, Origin::Imported).await;
        assert!(matches!(error, Err(StoreError::BadTaskName(_))));
    }

    #[tokio::test]
    async fn a_version_whose_folder_is_gone_is_neither_served_nor_promoted() {
        let (folder, store) = store().await;
        let first = add(&folder, &store, "one").await;
        let second = add(&folder, &store, "two").await;
        store.promote("topic", 1, "admin", "").await.unwrap();
        store.promote("topic", 2, "admin", "").await.unwrap();
        std::fs::remove_dir_all(&second.path).unwrap();
        assert!(store.live_versions().await.unwrap().is_empty());
        assert!(store.versions("topic").await.unwrap()[1].missing);
        assert_eq!(store.rollback("topic", "a", "").await.unwrap().version, 1);
        let error = store.promote("topic", 2, "admin", "").await;
        assert!(matches!(error, Err(StoreError::MissingArtifact { .. })));
        assert!(first.path.is_dir());
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
