//! The cache folder: finding a whole pull, and putting one there.

use std::collections::BTreeMap;
use std::fs::{self, File, TryLockError};
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

use super::progress::Progress;
use super::{Entry, HubError, OPTIONAL, REQUIRED, WEIGHTS};

const MARKER: &str = ".kdlora.json";

/// Written last into a folder whose files have all been verified.
#[derive(Debug, Deserialize, Serialize)]
struct Marker {
    source: String,
    files: BTreeMap<String, Sum>,
}

#[derive(Debug, Deserialize, Serialize)]
struct Sum {
    bytes: u64,
    sha256: String,
}

/// What a source knows about the files it has delivered.
pub(super) struct Delivery {
    /// For the marker: where the files come from, to the commit or version.
    pub(super) source: String,
    /// Sums that the files must have, by file name; the catalog's sum of the weights comes on top.
    pub(super) expected: BTreeMap<String, String>,
}

/// The place of one encoder in the cache.
pub(super) struct Installation<'a> {
    entry: &'a Entry,
    /// `cache/encoders`.
    encoders: PathBuf,
}

impl<'a> Installation<'a> {
    pub(super) fn new(entry: &'a Entry, cache: &Path) -> Self {
        Self {
            entry,
            encoders: cache.join("encoders"),
        }
    }

    /// The encoder's folder, if a pull of these weights has been completed. Lengths are compared,
    /// sums are not: they were when the marker was written, and 400 MB take a second to hash.
    pub(super) fn find(&self) -> Option<PathBuf> {
        let folder = self.folder();
        let marker = fs::read(folder.join(MARKER)).ok()?;
        let marker: Marker = serde_json::from_slice(&marker).ok()?;
        let same_length = |(name, sum): (&String, &Sum)| {
            fs::metadata(folder.join(name)).is_ok_and(|file| file.len() == sum.bytes)
        };
        let complete = REQUIRED.iter().all(|file| marker.files.contains_key(*file));
        let weights = marker.files.get(WEIGHTS).map(|sum| &sum.sha256);
        let right_weights =
            self.entry.weights_sha256.is_none() || self.entry.weights_sha256.as_ref() == weights;
        let whole = complete && right_weights && marker.files.iter().all(same_length);
        whole.then_some(folder)
    }

    /// Waits until no other process pulls this encoder. The lock ends with the returned file.
    pub(super) fn lock(&self, progress: &Progress) -> Result<File, HubError> {
        fs::create_dir_all(&self.encoders)
            .map_err(HubError::io("make the folder", &self.encoders))?;
        let path = self.encoders.join(format!(".{}.lock", self.entry.name));
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(HubError::io("open", &path))?;
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::WouldBlock) => {}
            Err(TryLockError::Error(error)) => return Err(HubError::io("lock", &path)(error)),
        }
        let name = &self.entry.name;
        let _waiting = progress.waiting(&format!("{name}: another process is pulling it"));
        file.lock().map_err(HubError::io("lock", &path))?;
        Ok(file)
    }

    /// An empty folder to fetch into. What killed pulls left behind is removed: the caller holds
    /// the lock.
    pub(super) fn incoming(&self) -> Result<Incoming, HubError> {
        let prefix = format!(".incoming-{}-", self.entry.name);
        let entries = fs::read_dir(&self.encoders).map_err(HubError::io("list", &self.encoders))?;
        for entry in entries.flatten() {
            if entry.file_name().to_string_lossy().starts_with(&prefix) {
                remove(&entry.path())?;
            }
        }
        let holder = tempfile::Builder::new()
            .prefix(&prefix)
            .tempdir_in(&self.encoders)
            .map_err(HubError::io("make a folder in", &self.encoders))?;
        let incoming = Incoming {
            files: holder.path().join("files"),
            scratch: holder.path().join("scratch"),
            holder,
        };
        for folder in [&incoming.files, &incoming.scratch] {
            fs::create_dir(folder).map_err(HubError::io("make the folder", folder))?;
        }
        Ok(incoming)
    }

    /// Verifies what was fetched and moves it to its place in one step.
    pub(super) fn install(
        &self,
        incoming: Incoming,
        mut delivery: Delivery,
    ) -> Result<PathBuf, HubError> {
        if let Some(sum) = &self.entry.weights_sha256 {
            delivery.expected.insert(WEIGHTS.to_owned(), sum.clone());
        }
        let marker = verify(&incoming.files, delivery)?;
        write_marker(&incoming.files, &marker)?;
        let folder = self.folder();
        // An older or damaged folder goes away with the incoming one; a process that has its
        // files open keeps them.
        match fs::rename(&folder, incoming.holder.path().join("replaced")) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                return Err(HubError::io("replace", &folder)(error));
            }
            _ => {}
        }
        fs::rename(&incoming.files, &folder).map_err(HubError::io("move a pull to", &folder))?;
        flush(&self.encoders)?;
        Ok(folder)
    }

    fn folder(&self) -> PathBuf {
        self.encoders.join(&self.entry.name)
    }
}

/// A pull under way; removed when dropped.
pub(super) struct Incoming {
    holder: TempDir,
    files: PathBuf,
    scratch: PathBuf,
}

impl Incoming {
    /// Where the encoder's files go.
    pub(super) fn files(&self) -> &Path {
        &self.files
    }

    /// For whatever a source needs on the way.
    pub(super) fn scratch(&self) -> &Path {
        &self.scratch
    }
}

fn verify(folder: &Path, delivery: Delivery) -> Result<Marker, HubError> {
    let mut files = BTreeMap::new();
    for name in REQUIRED.into_iter().chain(OPTIONAL) {
        let path = folder.join(name);
        if !path.is_file() {
            if REQUIRED.contains(&name) {
                return Err(HubError::NoSuchFile { file: name });
            }
            continue;
        }
        let sum = sum_and_flush(&path)?;
        match delivery.expected.get(name) {
            Some(expected) if *expected != sum.sha256 => {
                return Err(HubError::WrongSum {
                    file: name.to_owned(),
                    expected: expected.clone(),
                    found: sum.sha256,
                });
            }
            _ => files.insert(name.to_owned(), sum),
        };
    }
    Ok(Marker {
        source: delivery.source,
        files,
    })
}

fn write_marker(folder: &Path, marker: &Marker) -> Result<(), HubError> {
    let path = folder.join(MARKER);
    let write = || {
        let text = serde_json::to_vec_pretty(marker)?;
        fs::write(&path, text)?;
        File::open(&path)?.sync_all()
    };
    write().map_err(HubError::io("write", &path))?;
    flush(folder)
}

fn sum_and_flush(path: &Path) -> Result<Sum, HubError> {
    let read = || {
        let mut file = File::open(path)?;
        let mut hasher = Sha256::new();
        let mut buffer = vec![0; 1 << 16];
        let mut bytes = 0;
        loop {
            let read = file.read(&mut buffer)?;
            if read == 0 {
                break;
            }
            hasher.update(&buffer[..read]);
            bytes += read as u64;
        }
        file.sync_all()?;
        let digest = hasher.finalize();
        let sha256 = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(Sum { bytes, sha256 })
    };
    read().map_err(HubError::io("verify", path))
}

fn flush(folder: &Path) -> Result<(), HubError> {
    File::open(folder)
        .and_then(|folder| folder.sync_all())
        .map_err(HubError::io("flush", folder))
}

fn remove(folder: &Path) -> Result<(), HubError> {
    fs::remove_dir_all(folder).map_err(HubError::io("remove", folder))
}
