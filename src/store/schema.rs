//! The layout of the database, as steps that are applied once each, in order.

use std::borrow::Cow;
use std::path::Path;

use sqlx::SqlitePool;
use sqlx::migrate::{MigrateError, Migration, MigrationType, Migrator};

use super::StoreError;

/// (number, name, SQL). A published step never changes: the database remembers its checksum.
const STEPS: &[(i64, &str, &str)] = &[
    (
        1,
        "jobs and versions",
        include_str!("../../migrations/0001_jobs_and_versions.sql"),
    ),
    (
        2,
        "task modes",
        include_str!("../../migrations/0002_task_modes.sql"),
    ),
    (
        3,
        "withdrawals",
        include_str!("../../migrations/0003_withdrawals.sql"),
    ),
    (
        4,
        "job priority",
        include_str!("../../migrations/0004_job_priority.sql"),
    ),
    (
        5,
        "job attempts",
        include_str!("../../migrations/0005_job_attempts.sql"),
    ),
    (
        6,
        "students",
        include_str!("../../migrations/0006_students.sql"),
    ),
    (
        8,
        "job warnings",
        include_str!("../../migrations/0008_job_warnings.sql"),
    ),
];

/// Brings the database to the layout of this release.
///
/// # Errors
/// A later release has changed the layout: this one would misread it. Nothing is changed then.
pub(super) async fn migrate(pool: &SqlitePool, root: &Path) -> Result<(), StoreError> {
    let known = STEPS.last().map_or(0, |(number, _, _)| *number);
    match migrator().run(pool).await {
        Err(MigrateError::VersionMissing(found) | MigrateError::VersionTooNew(found, _)) => {
            Err(StoreError::Newer {
                root: root.to_owned(),
                found: latest(pool).await?.max(found),
                known,
            })
        }
        outcome => Ok(outcome?),
    }
}

/// Number of the last step that was applied.
async fn latest(pool: &SqlitePool) -> Result<i64, StoreError> {
    let sql = "SELECT COALESCE(MAX(version), 0) FROM _sqlx_migrations";
    Ok(sqlx::query_scalar(sql).fetch_one(pool).await?)
}

fn migrator() -> Migrator {
    let migrations = STEPS
        .iter()
        .map(|&(number, name, sql)| {
            let kind = MigrationType::Simple;
            Migration::new(number, Cow::Borrowed(name), kind, Cow::Borrowed(sql), false)
        })
        .collect();
    Migrator {
        migrations: Cow::Owned(migrations),
        ..Migrator::DEFAULT
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::adapter;
    use super::super::{Origin, Store};
    use super::*;

    #[tokio::test]
    async fn a_state_folder_of_a_later_release_is_refused_in_words() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path()).await.unwrap();
        let source = adapter(&folder, "one");
        store
            .add_version("topic", &source, Origin::Imported)
            .await
            .unwrap();
        let sql = "INSERT INTO _sqlx_migrations
            (version, description, success, checksum, execution_time)
            VALUES (999, 'of tomorrow', TRUE, x'00', 0)";
        sqlx::query(sql).execute(store.pool()).await.unwrap();
        store.close().await;
        drop(store);
        for _ in 0..2 {
            let error = Store::open(folder.path()).await.unwrap_err();
            let text = error.to_string();
            for part in ["later release", "999", &STEPS.last().unwrap().0.to_string()] {
                assert!(text.contains(part), "{part} in {text}");
            }
        }
        // Whoever goes back to the release that wrote it finds everything as it was.
        let pool = super::super::connect(&folder.path().join("kdlora.db"))
            .await
            .unwrap();
        let sql = "DELETE FROM _sqlx_migrations WHERE version = 999";
        sqlx::query(sql).execute(&pool).await.unwrap();
        pool.close().await;
        let store = Store::open(folder.path()).await.unwrap();
        assert_eq!(store.versions("topic").await.unwrap().len(), 1);
    }
}
