//! Folders of bytes: brought in whole or not at all. Everything here blocks.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Read, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use tempfile::TempDir;

use super::StoreError;
use crate::parse;

/// Folders that are being filled start with this, and no task can.
pub(super) const INCOMING: &str = ".incoming-";

/// What a job's process has to say, in the job's folder.
pub(super) const LOG: &str = "log.txt";

/// How the source folder gets in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Transfer {
    /// The source stays as it is.
    Copy,
    /// The source is gone afterwards.
    Move,
}

/// A complete and flushed folder that waits for its number. Dropped without
/// [`Staged::publish`], its bytes are removed.
#[derive(Debug)]
pub(super) struct Staged {
    holder: TempDir,
    pub(super) digest: String,
    pub(super) bytes: u64,
    /// The text of `report.json`, which is JSON.
    pub(super) report: Option<String>,
}

impl Staged {
    /// Brings `source` below `artifacts` under a temporary name and flushes it to the disk.
    pub(super) fn new(
        artifacts: &Path,
        source: &Path,
        transfer: Transfer,
    ) -> Result<Self, StoreError> {
        let holder = tempfile::Builder::new()
            .prefix(INCOMING)
            .tempdir_in(artifacts)
            .map_err(StoreError::io("make a folder in", artifacts))?;
        let folder = holder.path().join("folder");
        bring(source, &folder, transfer)?;
        let (digest, bytes) = digest_and_flush(&folder)?;
        let report = read_report(&folder)?;
        Ok(Self {
            holder,
            digest,
            bytes,
            report,
        })
    }

    /// Renames the folder to `place`. The caller holds the number in a transaction, so a folder
    /// that stands there is the remains of a transaction that was not committed.
    pub(super) fn publish(self, place: &Path) -> Result<(), StoreError> {
        let parent = place.parent().unwrap_or(place);
        fs::create_dir_all(parent).map_err(StoreError::io("make the folder", parent))?;
        remove_folder(place)?;
        fs::rename(self.holder.path().join("folder"), place)
            .map_err(StoreError::io("move an adapter folder to", place))?;
        flush_folder(parent)?;
        // The task's own folder may be new too.
        flush_folder(parent.parent().unwrap_or(parent))
    }
}

/// SHA-256 over the names, lengths and bytes of all files below `folder`.
pub(super) fn digest(folder: &Path) -> Result<String, StoreError> {
    let mut hasher = Sha256::new();
    for path in files_below(folder)? {
        hash_file(folder, &path, &mut hasher)?;
    }
    Ok(format!("{:x}", hasher.finalize()))
}

/// Removes a folder and what is in it; one that is not there is no error.
pub(super) fn remove_folder(path: &Path) -> Result<(), StoreError> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(StoreError::io("remove the folder", path)(error))
        }
        _ => Ok(()),
    }
}

/// Removes everything in `folder` except `log.txt`.
pub(super) fn keep_only_log(folder: &Path) -> Result<(), StoreError> {
    for path in children(folder)? {
        if path.file_name().is_some_and(|name| name == LOG) {
            continue;
        }
        let removed = if path.is_dir() && !path.is_symlink() {
            fs::remove_dir_all(&path)
        } else {
            fs::remove_file(&path)
        };
        removed.map_err(StoreError::io("remove", &path))?;
    }
    Ok(())
}

/// The last `bytes` of a text file, from the beginning of a line on; empty if there is no file.
pub(super) fn tail(path: &Path, bytes: u64) -> Result<String, StoreError> {
    let mut file = match File::open(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(String::new()),
        file => file.map_err(StoreError::io("open", path))?,
    };
    let mut read = || {
        let length = file.metadata()?.len();
        let start = length.saturating_sub(bytes);
        file.seek(SeekFrom::Start(start))?;
        let mut text = Vec::new();
        // Not to the end: a process that still writes could keep it away.
        (&mut file).take(bytes).read_to_end(&mut text)?;
        let cut = match start {
            0 => 0,
            _ => text.iter().position(|&b| b == b'\n').map_or(0, |i| i + 1),
        };
        Ok(String::from_utf8_lossy(&text[cut..]).into_owned())
    };
    read().map_err(StoreError::io("read", path))
}

/// The paths directly below `folder`, sorted; none if the folder is not there.
pub(super) fn children(folder: &Path) -> Result<Vec<PathBuf>, StoreError> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(StoreError::io("list", folder))?,
    };
    let mut paths = entries
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<Result<Vec<_>, _>>()
        .map_err(StoreError::io("list", folder))?;
    paths.sort();
    Ok(paths)
}

fn bring(source: &Path, target: &Path, transfer: Transfer) -> Result<(), StoreError> {
    if transfer == Transfer::Move {
        match fs::rename(source, target) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == ErrorKind::CrossesDevices => {}
            Err(error) => return Err(StoreError::io("move", source)(error)),
        }
    }
    copy(source, target)?;
    if transfer == Transfer::Move {
        remove_folder(source)?;
    }
    Ok(())
}

fn copy(source: &Path, target: &Path) -> Result<(), StoreError> {
    fs::create_dir_all(target).map_err(StoreError::io("make the folder", target))?;
    // Listing first refuses links before anything is copied.
    for file in files_below(source)? {
        let inside = file.strip_prefix(source).unwrap_or(&file);
        let destination = target.join(inside);
        if let Some(parent) = destination.parent() {
            fs::create_dir_all(parent).map_err(StoreError::io("make the folder", parent))?;
        }
        fs::copy(&file, &destination).map_err(StoreError::io("copy", &file))?;
    }
    Ok(())
}

/// All files below `folder`, sorted by path. A link or a device is refused: what it leads to
/// could change, or be none of the client's business.
fn files_below(folder: &Path) -> Result<Vec<PathBuf>, StoreError> {
    let metadata = fs::metadata(folder).map_err(StoreError::io("read", folder))?;
    if !metadata.is_dir() {
        return Err(StoreError::NotPlainFiles(folder.to_owned()));
    }
    let mut files = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(next) = folders.pop() {
        for path in children(&next)? {
            let kind = fs::symlink_metadata(&path).map_err(StoreError::io("read", &path))?;
            if kind.is_dir() {
                folders.push(path);
            } else if kind.is_file() {
                files.push(path);
            } else {
                return Err(StoreError::NotPlainFiles(folder.to_owned()));
            }
        }
    }
    files.sort();
    Ok(files)
}

fn digest_and_flush(folder: &Path) -> Result<(String, u64), StoreError> {
    let mut hasher = Sha256::new();
    let mut bytes = 0;
    let mut folders = vec![folder.to_owned()];
    for path in files_below(folder)? {
        let file = hash_file(folder, &path, &mut hasher)?;
        file.sync_all().map_err(StoreError::io("flush", &path))?;
        bytes += file
            .metadata()
            .map_err(StoreError::io("read", &path))?
            .len();
        folders.extend(path.parent().map(Path::to_owned));
    }
    folders.dedup();
    for path in folders {
        flush_folder(&path)?;
    }
    Ok((format!("{:x}", hasher.finalize()), bytes))
}

fn hash_file(folder: &Path, path: &Path, hasher: &mut Sha256) -> Result<File, StoreError> {
    let mut file = File::open(path).map_err(StoreError::io("open", path))?;
    let length = file.metadata().map_err(StoreError::io("read", path))?.len();
    let name = path.strip_prefix(folder).unwrap_or(path);
    let name = name.as_os_str().as_encoded_bytes();
    hasher.update((name.len() as u64).to_le_bytes());
    hasher.update(name);
    hasher.update(length.to_le_bytes());
    copy_into_hasher(&mut file, hasher).map_err(StoreError::io("read", path))?;
    Ok(file)
}

fn copy_into_hasher(file: &mut File, hasher: &mut Sha256) -> io::Result<()> {
    let mut buffer = vec![0; 1 << 16];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(()),
            read => hasher.update(&buffer[..read]),
        }
    }
}

fn flush_folder(path: &Path) -> Result<(), StoreError> {
    File::open(path)
        .and_then(|folder| folder.sync_all())
        .map_err(StoreError::io("flush", path))
}

fn read_report(folder: &Path) -> Result<Option<String>, StoreError> {
    let path = folder.join("report.json");
    let text = match fs::read_to_string(&path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        text => text.map_err(StoreError::io("read", &path))?,
    };
    parse::json::<serde_json::Map<String, serde_json::Value>>(text.as_bytes())
        .map_err(|source| StoreError::BadReport { path, source })?;
    Ok(Some(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_a_folder_with_a_link() {
        let parent = tempfile::tempdir().unwrap();
        let source = parent.path().join("source");
        fs::create_dir(&source).unwrap();
        std::os::unix::fs::symlink("/etc/hostname", source.join("report.json")).unwrap();
        for transfer in [Transfer::Copy, Transfer::Move] {
            let staged = Staged::new(parent.path(), &source, transfer);
            assert!(
                matches!(staged, Err(StoreError::NotPlainFiles(_))),
                "{staged:?}"
            );
        }
    }

    #[test]
    fn the_digest_knows_names_and_bytes() {
        let parent = tempfile::tempdir().unwrap();
        let make = |name: &str, file: &str, content: &str| {
            let folder = parent.path().join(name);
            fs::create_dir(&folder).unwrap();
            fs::write(folder.join(file), content).unwrap();
            digest(&folder).unwrap()
        };
        let first = make("first", "a", "1");
        assert_eq!(first, make("same", "a", "1"));
        assert_ne!(first, make("renamed", "b", "1"));
        assert_ne!(first, make("changed", "a", "2"));
    }

    #[test]
    fn what_is_staged_and_dropped_leaves_nothing() {
        let parent = tempfile::tempdir().unwrap();
        let (source, artifacts) = (parent.path().join("s"), parent.path().join("a"));
        fs::create_dir(&source).unwrap();
        fs::create_dir(&artifacts).unwrap();
        fs::write(source.join("file"), "bytes").unwrap();
        drop(Staged::new(&artifacts, &source, Transfer::Copy).unwrap());
        assert_eq!(children(&artifacts).unwrap(), Vec::<PathBuf>::new());
        assert!(source.join("file").exists());
    }
}
