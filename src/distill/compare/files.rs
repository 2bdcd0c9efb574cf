//! Where a comparison keeps what it has. Files of JSON appear whole or not at all, so that a rerun
//! can trust those that there are.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::parse;

/// The folder of a comparison.
#[derive(Clone, Debug)]
pub(super) struct Files {
    root: PathBuf,
}

impl Files {
    pub(super) fn new(root: &Path) -> Self {
        Self {
            root: root.to_owned(),
        }
    }

    /// The result of a cell.
    pub(super) fn outcome(&self, cell: &str) -> PathBuf {
        self.root.join("cells").join(format!("{cell}.json"))
    }

    /// A PEFT folder, or a classifier's.
    pub(super) fn model(&self, cell: &str) -> PathBuf {
        self.root.join("models").join(cell)
    }

    /// A teacher's logits of all rows, `[rows][labels]`, by row id.
    pub(super) fn logits(&self, cell: &str) -> PathBuf {
        self.root.join("logits").join(format!("{cell}.json"))
    }

    /// What training has left for the evaluation.
    pub(super) fn trained(&self, cell: &str) -> PathBuf {
        self.root.join("work").join(format!("{cell}.trained.json"))
    }

    pub(super) fn checkpoints(&self, cell: &str) -> PathBuf {
        self.root.join("work").join(format!("{cell}.checkpoint"))
    }

    /// What a process is asked to do.
    pub(super) fn order(&self) -> PathBuf {
        self.root.join("work").join("order.json")
    }

    pub(super) fn latency(&self) -> PathBuf {
        self.root.join("latency.json")
    }

    /// The report in one of its forms.
    pub(super) fn report(&self, form: &str) -> PathBuf {
        self.root.join(format!("compare.{form}"))
    }
}

/// Reads a file of JSON.
pub(super) fn read<T: DeserializeOwned>(path: &Path) -> io::Result<T> {
    let named =
        |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
    let bytes = fs::read(path).map_err(named)?;
    parse::json(&bytes).map_err(|error| named(error.into()))
}

/// Writes a file of JSON, see [`write_text`].
pub(super) fn write(path: &Path, value: &impl Serialize) -> io::Result<()> {
    write_text(path, &serde_json::to_vec(value)?)
}

/// Writes a file, whole or not at all, and its folder if that is missing.
pub(super) fn write_text(path: &Path, bytes: &[u8]) -> io::Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    let part = path.with_extension("part");
    let mut file = File::create(&part)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&part, path)
}

/// Removes a file or folder that may not be there.
pub(super) fn remove(path: &Path) -> io::Result<()> {
    let removed = match path.is_dir() {
        true => fs::remove_dir_all(path),
        false => fs::remove_file(path),
    };
    match removed {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}
