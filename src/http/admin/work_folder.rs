//! A folder for what a request brings.

use std::fs::File;
use std::io;
use std::path::PathBuf;

use crate::blocking;
use crate::store::{Store, StoreError};
use crate::telemetry::chain;

/// The folder of a job that is being prepared. It is removed when this is dropped, unless the job
/// exists by then, and by the next server if this one is killed.
pub(super) struct WorkFolder {
    pub(super) path: PathBuf,
    pub(super) keep: bool,
    store: Store,
    id: String,
}

impl WorkFolder {
    /// The folder of job `id`. Its parts are made when they are needed.
    pub(super) fn new(store: &Store, id: &str) -> Result<Self, StoreError> {
        blocking::in_place(|| store.mark_job_folder(id))?;
        Ok(Self {
            path: store.job_folder(id),
            keep: false,
            store: store.clone(),
            id: id.to_owned(),
        })
    }

    /// Where uploaded files are.
    pub(super) fn data(&self) -> PathBuf {
        self.path.join("data")
    }

    /// Makes the folder if nothing has been uploaded, and flushes the names of its files.
    pub(super) fn sync(&self) -> io::Result<()> {
        std::fs::create_dir_all(self.data())?;
        for folder in [&self.data(), &self.path] {
            File::open(folder)?.sync_all()?;
        }
        Ok(())
    }
}

impl Drop for WorkFolder {
    fn drop(&mut self) {
        // An upload may have hundreds of megabytes.
        let ended = blocking::in_place(|| match self.keep {
            true => self.store.unmark_job_folder(&self.id),
            false => self.store.remove_job_folder(&self.id),
        });
        if let Err(error) = ended {
            let folder = self.path.display();
            tracing::warn!(%folder, error = chain(&error), "could not tidy up after an upload");
        }
    }
}
