//! The layout of the database, as steps that are applied once each, in order.

use std::borrow::Cow;

use sqlx::migrate::{Migration, MigrationType, Migrator};

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
];

pub(super) fn migrator() -> Migrator {
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
