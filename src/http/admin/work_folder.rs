//! A folder for what a request brings.

use std::io;
use std::path::PathBuf;

/// Removed when dropped, unless something has come of the request that needs it.
pub(super) struct WorkFolder {
    pub(super) path: PathBuf,
    pub(super) keep: bool,
}

impl WorkFolder {
    pub(super) fn new(path: PathBuf) -> Self {
        Self { path, keep: false }
    }

    /// Where uploaded files are.
    pub(super) fn data(&self) -> PathBuf {
        self.path.join("data")
    }
}

impl Drop for WorkFolder {
    fn drop(&mut self) {
        if !self.keep
            && let Err(error) = std::fs::remove_dir_all(&self.path)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(folder = %self.path.display(), %error, "could not remove an upload");
        }
    }
}
