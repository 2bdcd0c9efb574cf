//! GLUE's data sets as the Hugging Face hub has them (`nyu-mll/glue`), for the presets of data.
//!
//! `cache/data/glue/{task}/` appears whole or not at all.

use std::fs;
use std::path::{Path, PathBuf};

use hf_hub::RepoType;

use super::catalog::Repository;
use super::repository::Remote;
use super::{HubError, Puller};

/// In front of a task's name, where names of encoders are expected too.
const PREFIX: &str = "glue/";

macro_rules! files {
    ($task:literal, $($split:literal),+) => {
        ($task, &[$(concat!($task, "/", $split, "-00000-of-00001.parquet")),+])
    };
}

/// The labelled files of each task.
const FILES: [(&str, &[&str]); 9] = [
    files!("cola", "train", "validation"),
    files!("sst2", "train", "validation"),
    files!("mrpc", "train", "validation"),
    files!("qqp", "train", "validation"),
    files!("stsb", "train", "validation"),
    files!(
        "mnli",
        "train",
        "validation_matched",
        "validation_mismatched"
    ),
    files!("qnli", "train", "validation"),
    files!("rte", "train", "validation"),
    files!("wnli", "train", "validation"),
];

/// A task of GLUE with its files.
pub(super) struct Glue {
    task: &'static str,
    files: &'static [&'static str],
}

impl Glue {
    /// `glue/mrpc`; `None` for a name of something else.
    pub(super) fn parse(name: &str) -> Option<Result<Self, HubError>> {
        let wanted = name.strip_prefix(PREFIX)?;
        let found = FILES.into_iter().find(|(task, _)| *task == wanted);
        Some(match found {
            Some((task, files)) => Ok(Self { task, files }),
            None => Err(HubError::UnknownData(name.to_owned())),
        })
    }

    /// The folder with the files, fetched unless it is there.
    pub(super) fn pull(&self, puller: &Puller, cache: &Path) -> Result<PathBuf, HubError> {
        let all = cache.join("data/glue");
        let folder = all.join(self.task);
        if folder.is_dir() {
            return Ok(folder);
        }
        fs::create_dir_all(&all).map_err(HubError::io("make the folder", &all))?;
        let incoming = tempfile::Builder::new()
            .prefix(".incoming-")
            .tempdir_in(&all)
            .map_err(HubError::io("make a folder in", &all))?;
        let files = incoming.path().join(self.task);
        fs::create_dir(&files).map_err(HubError::io("make the folder", &files))?;
        let source = Repository {
            repository: "nyu-mll/glue".to_owned(),
            revision: "main".to_owned(),
        };
        let scratch = incoming.path().join("hub");
        let mut remote = Remote::new(puller, RepoType::Dataset, &source, &scratch)?;
        for file in self.files {
            remote.download(file, &incoming.path().join(file))?;
        }
        match fs::rename(&files, &folder) {
            // Another process was quicker.
            Err(_) if folder.is_dir() => Ok(folder),
            moved => moved
                .map(|()| folder.clone())
                .map_err(HubError::io("move the files to", &folder)),
        }
    }
}

/// The names that [`Glue::parse`] knows.
pub(super) fn names() -> String {
    let names = FILES.map(|(task, _)| format!("{PREFIX}{task}"));
    names.join(", ")
}
