//! What can go wrong with the state folder.

use std::path::{Path, PathBuf};

use super::{JobState, MAX_TASK_NAME};
use crate::parse::ParseError;

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
    #[error("the state folder {0} is in use by another server")]
    InUse(PathBuf),
    #[error("could not {doing} {path}")]
    Io {
        doing: &'static str,
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("{path} is not a report")]
    BadReport { path: PathBuf, source: ParseError },
    #[error("the state database failed")]
    Database(#[from] sqlx::Error),
    #[error("the state database could not be brought to this release's layout")]
    Migration(#[from] sqlx::migrate::MigrateError),
    #[error("a file operation on the state folder was interrupted")]
    Interrupted(#[from] tokio::task::JoinError),
}

impl StoreError {
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
