//! Which version of a task is live: promoting, going back, and the history of it.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sqlx::sqlite::SqliteRow;
use sqlx::{Row, SqliteConnection};
use utoipa::ToSchema;

use super::versions::{Version, artifact, base, database_int, files, select_version, unsigned};
use super::{Store, StoreError, Timestamp};
use crate::adapter::{AdapterBase, FileSums, Mode};

/// One change of a task's live version.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct Change {
    pub task: String,
    pub kind: ChangeKind,
    /// Live from this change on; of a withdrawal, the one that was live until then.
    pub version: u64,
    /// Live before it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub previous: Option<u64>,
    /// Who: the name of a token, `admin` where none is asked for, `job {id}` or `server`.
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
    /// The task does not answer from this change on.
    Withdraw,
}

/// Which version a task answers with, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LiveVersion {
    pub task: String,
    pub version: u64,
    /// As an administrator has asked for, if one has.
    pub mode: Option<Mode>,
    /// The PEFT folder.
    pub path: PathBuf,
    /// The sums that its files must have.
    pub files: FileSums,
    /// The encoder that the version was trained on.
    pub base: AdapterBase,
}

/// Columns that [`LiveVersion::from_row`] reads.
const LIVE: &str = "SELECT l.task, l.version, m.mode, v.files, v.student_name, v.student_digest
    FROM live l JOIN versions v ON v.task = l.task AND v.version = l.version
    LEFT JOIN task_modes m ON m.task = l.task";

impl LiveVersion {
    fn from_row(row: &SqliteRow, artifacts: &Path) -> Result<Self, sqlx::Error> {
        let task: String = row.try_get("task")?;
        let version = unsigned(row, "version")?;
        let mode: Option<&str> = row.try_get("mode")?;
        Ok(Self {
            path: artifact(artifacts, &task, version),
            version,
            mode: mode.and_then(Mode::parse),
            files: files(row)?,
            base: base(row)?,
            task,
        })
    }
}

impl Store {
    /// The version that the task answers with, if it has one.
    pub async fn live(&self, task: &str) -> Result<Option<LiveVersion>, StoreError> {
        let row = sqlx::query(&format!("{LIVE} WHERE l.task = ?"))
            .bind(task)
            .fetch_optional(self.pool())
            .await?;
        let live = row.map(|row| LiveVersion::from_row(&row, &self.artifacts()));
        Ok(live.transpose()?)
    }

    /// The live version of each task, by task name.
    pub async fn live_index(&self) -> Result<Vec<LiveVersion>, StoreError> {
        let rows = sqlx::query(&format!("{LIVE} ORDER BY l.task"))
            .fetch_all(self.pool())
            .await?;
        let artifacts = self.artifacts();
        let live = rows
            .iter()
            .map(|row| LiveVersion::from_row(row, &artifacts));
        Ok(live.collect::<Result<_, _>>()?)
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
        self.write(async |connection| {
            promote(connection, task, version, actor, reason).await?;
            select_version(connection, &self.artifacts(), task, version).await
        })
        .await
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
        let artifacts = self.artifacts();
        self.write(async |connection| {
            let live = live_row(connection, task).await?.ok_or_else(nothing)?;
            let mut promotion = live.promotion;
            let (promotion, version) = loop {
                let earlier = replaced_by(connection, promotion).await?;
                let (earlier, version) = earlier.ok_or_else(nothing)?;
                if artifact(&artifacts, task, version).is_dir() {
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
            change.insert(connection).await?;
            set_live(connection, task, version, promotion).await?;
            select_version(connection, &artifacts, task, version).await
        })
        .await
    }

    /// Takes the task out of service. Its versions stay, and each can be promoted again; there is
    /// nothing to go back to after that.
    pub async fn withdraw(&self, task: &str, actor: &str, reason: &str) -> Result<(), StoreError> {
        self.write(async |connection| {
            let live = live_row(connection, task).await?;
            let live = live.ok_or_else(|| StoreError::NotLive(task.to_owned()))?;
            let sql = "INSERT INTO withdrawals (task, version, after, actor, reason, at)
                SELECT ?1, ?2, MAX(id), ?3, ?4, ?5 FROM changes WHERE task = ?1";
            sqlx::query(sql)
                .bind(task)
                .bind(live.version)
                .bind(actor)
                .bind(reason)
                .bind(Timestamp::now().millis())
                .execute(&mut *connection)
                .await?;
            sqlx::query("DELETE FROM live WHERE task = ?")
                .bind(task)
                .execute(connection)
                .await?;
            Ok(())
        })
        .await
    }

    /// Every change of the task's live version, oldest first.
    pub async fn history(&self, task: &str) -> Result<Vec<Change>, StoreError> {
        let sql =
            "SELECT task, kind, version, previous, actor, reason, at, id AS place, 0 AS behind
            FROM changes WHERE task = ?1
            UNION ALL
            SELECT task, 'withdraw', version, version, actor, reason, at, after, 1
            FROM withdrawals WHERE task = ?1
            ORDER BY place, behind";
        let rows = sqlx::query(sql).bind(task).fetch_all(self.pool()).await?;
        Ok(rows
            .iter()
            .map(Change::from_row)
            .collect::<Result<_, _>>()?)
    }
}

impl Change {
    fn from_row(row: &SqliteRow) -> Result<Self, sqlx::Error> {
        let previous: Option<i64> = row.try_get("previous")?;
        Ok(Self {
            task: row.try_get("task")?,
            kind: match row.try_get("kind")? {
                "rollback" => ChangeKind::Rollback,
                "withdraw" => ChangeKind::Withdraw,
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
    async fn insert(&self, connection: &mut SqliteConnection) -> Result<i64, StoreError> {
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
            .execute(connection)
            .await?;
        Ok(result.last_insert_rowid())
    }
}

pub(super) async fn promote(
    connection: &mut SqliteConnection,
    task: &str,
    version: u64,
    actor: &str,
    reason: &str,
) -> Result<(), StoreError> {
    let live = live_row(connection, task).await?;
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
    let promotion = change.insert(connection).await?;
    set_live(connection, task, version, promotion).await
}

async fn live_row(
    connection: &mut SqliteConnection,
    task: &str,
) -> Result<Option<LiveRow>, StoreError> {
    let row: Option<(i64, i64)> =
        sqlx::query_as("SELECT version, promotion FROM live WHERE task = ?")
            .bind(task)
            .fetch_optional(connection)
            .await?;
    Ok(row.map(|(version, promotion)| LiveRow { version, promotion }))
}

async fn set_live(
    connection: &mut SqliteConnection,
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
        .execute(connection)
        .await?;
    Ok(())
}

/// The promotion (id, version) that the given one replaced.
async fn replaced_by(
    connection: &mut SqliteConnection,
    promotion: i64,
) -> Result<Option<(i64, u64)>, StoreError> {
    let sql = "SELECT earlier.id, earlier.version FROM changes AS later
        JOIN changes AS earlier ON earlier.id = later.replaced WHERE later.id = ?";
    let row: Option<(i64, i64)> = sqlx::query_as(sql)
        .bind(promotion)
        .fetch_optional(connection)
        .await?;
    Ok(row.map(|(id, version)| (id, version.unsigned_abs())))
}

#[cfg(test)]
mod tests {
    use super::super::Origin;
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
        let live = store.live("topic").await.unwrap().unwrap();
        assert_eq!((live.version, &live.path), (1, &back.path));
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
    async fn a_withdrawn_task_does_not_answer_until_a_version_is_promoted_again() {
        let (folder, store) = store().await;
        add(&folder, &store, "one").await;
        let withdraw = || store.withdraw("topic", "admin", "no longer used");
        assert!(matches!(withdraw().await, Err(StoreError::NotLive(_))));
        store.promote("topic", 1, "admin", "").await.unwrap();
        withdraw().await.unwrap();
        assert!(store.live("topic").await.unwrap().is_none());
        assert!(store.live_index().await.unwrap().is_empty());
        assert_eq!(store.versions("topic").await.unwrap().len(), 1);
        let back = store.rollback("topic", "admin", "").await;
        assert!(matches!(back, Err(StoreError::NothingToRollBack(_))));

        store.promote("topic", 1, "admin", "again").await.unwrap();
        let history = store.history("topic").await.unwrap();
        let steps: Vec<_> = history
            .iter()
            .map(|change| (change.kind, change.previous))
            .collect();
        let expected = [
            (ChangeKind::Promote, None),
            (ChangeKind::Withdraw, Some(1)),
            (ChangeKind::Promote, None),
        ];
        assert_eq!(steps, expected);
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
        assert!(store.versions("topic").await.unwrap()[1].missing);
        assert_eq!(store.rollback("topic", "a", "").await.unwrap().version, 1);
        let error = store.promote("topic", 2, "admin", "").await;
        assert!(matches!(error, Err(StoreError::MissingArtifact { .. })));
        assert!(first.path.is_dir());
    }
}
