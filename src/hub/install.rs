//! The cache folder: finding a whole pull, and putting one there.

use std::collections::BTreeMap;
use std::fs::{self, File, TryLockError};
use std::io::{self, ErrorKind, Read};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

use super::progress::Progress;
use super::{Entry, HubError, OPTIONAL, REQUIRED, WEIGHTS};
use crate::parse;

const MARKER: &str = ".kdlora.json";

/// Written last into a folder whose files have all been verified.
#[derive(Debug, Deserialize, Serialize)]
struct Marker {
    source: String,
    files: BTreeMap<String, Sum>,
    /// Files of the encoder that this one was made of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    made_of: Option<BTreeMap<String, Sum>>,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub(super) struct Sum {
    bytes: u64,
    sha256: String,
}

/// What a source knows about the files it has delivered.
pub(super) struct Delivery {
    /// For the marker: where the files come from, to the commit or version.
    pub(super) source: String,
    /// Sums that the files must have, by file name; the catalog's sum of the weights comes on top.
    pub(super) expected: BTreeMap<String, String>,
    /// Files of the encoder that this one was made of, if it was.
    pub(super) made_of: Option<BTreeMap<String, Sum>>,
}

/// The place of one encoder in the cache.
pub(super) struct Installation<'a> {
    name: String,
    weights_sha256: Option<&'a String>,
    /// `cache/encoders`.
    encoders: PathBuf,
}

impl<'a> Installation<'a> {
    pub(super) fn of_entry(entry: &'a Entry, cache: &Path) -> Self {
        Self {
            name: entry.name.clone(),
            weights_sha256: entry.weights_sha256.as_ref(),
            encoders: cache.join("encoders"),
        }
    }

    /// Of an encoder that is made of another.
    pub(super) fn of_made(name: String, cache: &Path) -> Self {
        Self {
            name,
            weights_sha256: None,
            encoders: cache.join("encoders"),
        }
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// The encoder's folder, if a pull of these weights has been completed. Lengths are compared,
    /// sums are not: they were when the marker was written, and 400 MB take a second to hash.
    pub(super) fn find(&self) -> Option<PathBuf> {
        self.whole().map(|(folder, _)| folder)
    }

    /// The folder of an encoder that was made of these very files.
    pub(super) fn find_made_of(&self, files: &BTreeMap<String, Sum>) -> Option<PathBuf> {
        let (folder, marker) = self.whole()?;
        (marker.made_of.as_ref() == Some(files)).then_some(folder)
    }

    /// The files of the encoder, and their sums when they were verified.
    pub(super) fn files(&self) -> Option<BTreeMap<String, Sum>> {
        self.whole().map(|(_, marker)| marker.files)
    }

    fn whole(&self) -> Option<(PathBuf, Marker)> {
        let folder = self.folder();
        let marker = fs::read(folder.join(MARKER)).ok()?;
        let marker: Marker = parse::json(&marker).ok()?;
        let same_length = |(name, sum): (&String, &Sum)| {
            fs::metadata(folder.join(name)).is_ok_and(|file| file.len() == sum.bytes)
        };
        let complete = REQUIRED.iter().all(|file| marker.files.contains_key(*file));
        let weights = marker.files.get(WEIGHTS).map(|sum| &sum.sha256);
        let right_weights = self.weights_sha256.is_none() || self.weights_sha256 == weights;
        let whole = complete && right_weights && marker.files.iter().all(same_length);
        whole.then_some((folder, marker))
    }

    /// Waits until no other process pulls this encoder. The lock ends with the returned file.
    pub(super) fn lock(&self, progress: &Progress) -> Result<File, HubError> {
        fs::create_dir_all(&self.encoders)
            .map_err(HubError::io("make the folder", &self.encoders))?;
        let path = self.encoders.join(format!(".{}.lock", self.name));
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
        let name = &self.name;
        let _waiting = progress.waiting(&format!("{name}: another process is pulling it"));
        file.lock().map_err(HubError::io("lock", &path))?;
        Ok(file)
    }

    /// An empty folder to fetch into. What killed pulls left behind is removed: the caller holds
    /// the lock.
    pub(super) fn incoming(&self) -> Result<Incoming, HubError> {
        let prefix = format!(".incoming-{}-", self.name);
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
        if let Some(sum) = self.weights_sha256 {
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
        self.encoders.join(&self.name)
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
        made_of: delivery.made_of,
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

/// Sums of the files of a folder that may be an encoder's.
pub(super) fn sums(folder: &Path) -> Result<BTreeMap<String, Sum>, HubError> {
    REQUIRED
        .into_iter()
        .chain(OPTIONAL)
        .map(|name| (name, folder.join(name)))
        .filter(|(_, path)| path.is_file())
        .map(|(name, path)| {
            let sum = File::open(&path).and_then(|mut file| sum(&mut file));
            Ok((name.to_owned(), sum.map_err(HubError::io("read", &path))?))
        })
        .collect()
}

pub(super) fn sum_of_bytes(bytes: &[u8]) -> Sum {
    Sum {
        bytes: bytes.len() as u64,
        sha256: format!("{:x}", Sha256::digest(bytes)),
    }
}

fn sum(file: &mut File) -> io::Result<Sum> {
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
    let sha256 = format!("{:x}", hasher.finalize());
    Ok(Sum { bytes, sha256 })
}

fn sum_and_flush(path: &Path) -> Result<Sum, HubError> {
    let read = || {
        let mut file = File::open(path)?;
        let sum = sum(&mut file)?;
        file.sync_all()?;
        Ok(sum)
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
