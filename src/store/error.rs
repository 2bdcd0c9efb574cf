//! What can go wrong with the state folder.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use super::{JobState, MAX_TASK_NAME};

// Result codes of SQLite (sqlite.org/rescode.html).
const BUSY: i32 = 5;
const LOCKED: i32 = 6;
const NO_MEMORY: i32 = 7;
const READ_ONLY: i32 = 8;
const IO: i32 = 10;
const FULL: i32 = 13;
const CANNOT_OPEN: i32 = 14;

/// An error of the state folder. Variants before `Io` are the caller's doing, `Io` and later ones
/// the machine's.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    #[error(
        "'{0}' cannot name a task: use lower-case letters, digits and '-', not '-' first, at most {MAX_TASK_NAME} characters"
    )]
    BadTaskName(String),
    #[error("there is no task '{0}'")]
    UnknownTask(String),
    #[error("task '{task}' has no version {version}")]
    UnknownVersion { task: String, version: u64 },
    #[error("the folder of version {version} of task '{task}' is gone from the state folder")]
    MissingArtifact { task: String, version: u64 },
    #[error("task '{0}' has no earlier live version to go back to")]
    NothingToRollBack(String),
    #[error("task '{0}' has no live version")]
    NotLive(String),
    #[error("there is no job '{0}'")]
    UnknownJob(String),
    #[error("job '{id}' is over already ({state})")]
    JobOver { id: String, state: JobState },
    #[error("the idempotency key '{key}' belongs to job '{job}', which a different request made")]
    KeyReused { key: String, job: String },
    #[error("{0} is not an adapter folder: it may hold files and folders only")]
    NotPlainFiles(PathBuf),
    #[error("report.json cannot be used: {0}")]
    BadReport(String),
    #[error("the state folder {0} is in use by another server")]
    InUse(PathBuf),
    #[error(
        "{0} has no kdlora.db, but versions or jobs of one: put the database back together with \
         the artifacts of the same backup, or move the folders artifacts and jobs elsewhere to \
         start without them"
    )]
    LostDatabase(PathBuf),
    #[error(
        "the state folder {root} was written by a later release: its layout is number {found}, and \
         this program knows layouts up to {known}; use that release, or a backup from before it"
    )]
    Newer {
        root: PathBuf,
        found: i64,
        known: i64,
    },
    #[error(
        "version {version} of task '{task}' has a student already, {student}; only a version \
         without one can be adopted"
    )]
    HasStudent {
        task: String,
        version: u64,
        student: String,
    },
    #[error("could not {doing} {path}")]
    Io {
        doing: &'static str,
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("the state database failed")]
    Database(#[from] sqlx::Error),
    #[error("the state database could not be brought to this release's layout")]
    Migration(#[from] sqlx::migrate::MigrateError),
    #[error("a file operation on the state folder was interrupted")]
    Interrupted(#[from] tokio::task::JoinError),
}

impl StoreError {
    /// Whether the disk, the database or the process failed, rather than the caller.
    pub(super) fn is_of_the_machine(&self) -> bool {
        match self {
            Self::Io { .. } | Self::Database(_) | Self::Migration(_) | Self::Interrupted(_) => true,
            Self::BadTaskName(_)
            | Self::UnknownTask(_)
            | Self::UnknownVersion { .. }
            | Self::MissingArtifact { .. }
            | Self::NothingToRollBack(_)
            | Self::NotLive(_)
            | Self::UnknownJob(_)
            | Self::JobOver { .. }
            | Self::KeyReused { .. }
            | Self::NotPlainFiles(_)
            | Self::BadReport(_)
            | Self::InUse(_)
            | Self::LostDatabase(_)
            | Self::Newer { .. }
            | Self::HasStudent { .. } => false,
        }
    }

    /// Whether the same call may succeed later, when there is room on the disk again or the
    /// database is no longer locked.
    pub fn is_temporary(&self) -> bool {
        match self {
            Self::Database(sqlx::Error::Database(error)) => {
                // Without the extended part of the code. Constraints and malformed values stay.
                let code = error.code().and_then(|code| code.parse::<i32>().ok());
                matches!(
                    code.map(|code| code & 0xff),
                    Some(BUSY | LOCKED | NO_MEMORY | READ_ONLY | IO | FULL | CANNOT_OPEN)
                )
            }
            Self::Database(error) => matches!(
                error,
                sqlx::Error::Io(_) | sqlx::Error::PoolTimedOut | sqlx::Error::WorkerCrashed
            ),
            Self::Io { source, .. } => !matches!(
                source.kind(),
                ErrorKind::NotFound | ErrorKind::PermissionDenied | ErrorKind::NotADirectory
            ),
            _ => false,
        }
    }

    /// For `map_err`: says what was being done to which path.
    pub(super) fn io(doing: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io {
            doing,
            path,
            source,
        }
    }
}
