//! The cache folder: finding a whole pull, and putting one there.

use std::collections::BTreeMap;
use std::fs::{self, File, TryLockError};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

use super::progress::Progress;
use super::{Entry, HubError, REQUIRED, file_names};
use crate::encoder::{WEIGHTS, WEIGHTS_INDEX};
use crate::files;
use crate::parse;

const MARKER: &str = ".kdlora.json";

/// What a pull has brought. Written last into a folder whose files have all been verified, and, of
/// the first pull from the hub, beside the folders.
#[derive(Clone, Debug, Deserialize, Serialize)]
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
    /// Whether all pulls must bring the same files, and the first one if there was one. Not every
    /// file has a sum in the catalog.
    pub(super) held_to_first: Option<Option<First>>,
}

/// The first pull of an encoder from the hub.
pub(super) struct First(Marker);

impl First {
    /// The commit that was pulled.
    pub(super) fn commit(&self) -> Option<&str> {
        self.0.source.rsplit_once('@').map(|(_, commit)| commit)
    }
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
        let marker = read_marker(&folder.join(MARKER))?;
        let same_length = |(name, sum): (&String, &Sum)| {
            fs::metadata(folder.join(name)).is_ok_and(|file| file.len() == sum.bytes)
        };
        let has = |file: &&str| marker.files.contains_key(*file);
        let complete = REQUIRED.iter().all(has) && [WEIGHTS, WEIGHTS_INDEX].iter().any(has);
        let weights = marker.files.get(WEIGHTS).map(|sum| &sum.sha256);
        let right_weights = self.weights_sha256.is_none() || self.weights_sha256 == weights;
        let whole = complete && right_weights && marker.files.iter().all(same_length);
        whole.then_some((folder, marker))
    }

    /// The first pull from a repository. Caches of earlier versions have no record of it: there it
    /// is the one whose files are in place.
    pub(super) fn first_of(&self, repository: &str) -> Option<First> {
        let in_place = || read_marker(&self.folder().join(MARKER));
        let first = read_marker(&self.record()).or_else(in_place)?;
        let is_same = first
            .source
            .strip_prefix(repository)
            .is_some_and(|rest| rest.starts_with('@'));
        is_same.then_some(First(first))
    }

    /// Compares a pull with the first one, or records it as the first.
    fn hold(&self, marker: &Marker, first: Option<First>) -> Result<(), HubError> {
        let record = self.record();
        let First(first) = first.unwrap_or_else(|| First(marker.clone()));
        for file in first.files.keys().chain(marker.files.keys()) {
            let sum = |marker: &Marker| marker.files.get(file).map(|sum| sum.sha256.clone());
            let (first, found) = (sum(&first), sum(marker));
            if first != found {
                return Err(HubError::NotAsFirst {
                    file: file.clone(),
                    first,
                    found,
                    record,
                });
            }
        }
        let write = || {
            let mut file = tempfile::NamedTempFile::new_in(&self.encoders)?;
            serde_json::to_writer_pretty(&mut file, &first)?;
            file.as_file().sync_all()?;
            file.persist(&record)?;
            Ok(())
        };
        write().map_err(HubError::io("write", &record))
    }

    fn record(&self) -> PathBuf {
        self.encoders.join(format!(".{}.first.json", self.name))
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
        let first = delivery.held_to_first.take();
        let marker = verify(&incoming.files, delivery)?;
        if let Some(first) = first {
            self.hold(&marker, first)?;
        }
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
    for name in file_names(folder)? {
        let sum = sum_and_flush(&folder.join(&name))?;
        files.insert(name, sum);
    }
    let no_file = |name: &str| HubError::NoSuchFile {
        file: name.to_owned(),
    };
    for name in REQUIRED {
        files.get(name).ok_or_else(|| no_file(name))?;
    }
    for (name, expected) in delivery.expected {
        let found = &files.get(&name).ok_or_else(|| no_file(&name))?.sha256;
        if *found != expected {
            let found = found.clone();
            return Err(HubError::WrongSum {
                file: name,
                expected,
                found,
            });
        }
    }
    Ok(Marker {
        source: delivery.source,
        files,
        made_of: delivery.made_of,
    })
}

fn read_marker(path: &Path) -> Option<Marker> {
    parse::json(&fs::read(path).ok()?).ok()
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

/// Computes the sums of the files that an encoder folder consists of.
pub(super) fn sums(folder: &Path) -> Result<BTreeMap<String, Sum>, HubError> {
    let sum = |name: String| {
        let path = folder.join(&name);
        let sum = files::open(&path, u64::MAX).and_then(|mut file| sum(&mut file));
        Ok((name, sum.map_err(HubError::io("read", &path))?))
    };
    file_names(folder)?.into_iter().map(sum).collect()
}

fn sum(file: &mut File) -> io::Result<Sum> {
    let mut hasher = Sha256::new();
    let bytes = files::read_pieces(file, |piece| hasher.update(piece))?;
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
