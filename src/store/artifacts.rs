//! Folders of bytes: brought in whole or not at all. Everything here blocks.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{ErrorKind, Read, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use tempfile::TempDir;

use super::StoreError;
use crate::adapter::{AdapterBase, FileSums, KnownEncoders, read_report};
use crate::files;
use crate::telemetry::chain;

/// Folders that are being filled start with this, and no task can.
pub(super) const INCOMING: &str = ".incoming-";

/// Begins the name of a mark. It is a file beside a folder that does not exist yet in the database.
pub(super) const UNFINISHED: &str = ".unfinished-";

/// What a job's process has to say, in the job's folder.
pub(super) const LOG: &str = "log.txt";

/// A complete and flushed folder that waits for its number. Dropped without
/// [`Staged::publish`], its bytes are removed.
#[derive(Debug)]
pub(super) struct Staged {
    holder: TempDir,
    pub(super) digest: String,
    pub(super) bytes: u64,
    /// `report.json` as JSON.
    pub(super) report: Option<String>,
    pub(super) files: FileSums,
    /// The student that the adapter's files name.
    pub(super) base: AdapterBase,
}

/// What a folder holds.
pub(super) struct Contents {
    /// SHA-256 over the names, lengths and bytes of all files.
    pub(super) digest: String,
    pub(super) files: FileSums,
    pub(super) bytes: u64,
}

impl Staged {
    /// Copies `source` below `artifacts` under a temporary name and flushes it to the disk.
    pub(super) fn new(artifacts: &Path, source: &Path) -> Result<Self, StoreError> {
        let holder = tempfile::Builder::new()
            .prefix(INCOMING)
            .tempdir_in(artifacts)
            .map_err(StoreError::io("make a folder in", artifacts))?;
        let folder = holder.path().join("folder");
        copy(source, &folder)?;
        flush(&folder)?;
        let contents = contents(&folder)?;
        Ok(Self {
            report: report_of(&folder)?,
            // Whether an adapter can be used has been checked; one that can't has no base.
            base: AdapterBase::read(&folder, &KnownEncoders::default()).unwrap_or_default(),
            holder,
            digest: contents.digest,
            files: contents.files,
            bytes: contents.bytes,
        })
    }

    /// Renames the folder to `place` and marks it as unfinished; the caller calls [`unmark`] when
    /// its transaction is committed. The caller holds the number in that transaction, so a folder
    /// that stands there is the remains of a transaction that was not committed, or an orphan.
    pub(super) fn publish(self, place: &Path) -> Result<(), StoreError> {
        let parent = place.parent().unwrap_or(place);
        fs::create_dir_all(parent).map_err(StoreError::io("make the folder", parent))?;
        // Only what is known to be unfinished is deleted.
        if place.exists() && !mark_of(place).exists() {
            set_aside(place, parent.parent().unwrap_or(parent))?;
        }
        mark(place)?;
        remove_folder(place)?;
        fs::rename(self.holder.path().join("folder"), place)
            .map_err(StoreError::io("move an adapter folder to", place))?;
        flush_folder(parent)?;
        // The task's own folder may be new too.
        flush_folder(parent.parent().unwrap_or(parent))
    }
}

/// Says of a folder that it is not in the database yet: if the process is killed now, the next
/// server may delete the folder.
pub(super) fn mark(folder: &Path) -> Result<(), StoreError> {
    let mark = mark_of(folder);
    File::create(&mark)
        .map(drop)
        .map_err(StoreError::io("make", &mark))
}

/// Takes the mark of a folder away; one without a mark is no error.
pub(super) fn unmark(folder: &Path) -> Result<(), StoreError> {
    let mark = mark_of(folder);
    match fs::remove_file(&mark) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(StoreError::io("remove", &mark)(error))
        }
        _ => Ok(()),
    }
}

/// Moves a folder below `top` to `.orphans` in `top`, and returns where it is now.
pub(super) fn set_aside(folder: &Path, top: &Path) -> Result<PathBuf, StoreError> {
    let orphans = top.join(".orphans");
    fs::create_dir_all(&orphans).map_err(StoreError::io("make the folder", &orphans))?;
    let inside = folder.strip_prefix(top).unwrap_or(folder);
    let name = inside.to_string_lossy().replace('/', "-");
    let free = (0u32..).map(|copy| match copy {
        0 => orphans.join(&name),
        copy => orphans.join(format!("{name}.{copy}")),
    });
    let place = free
        .into_iter()
        .find(|place| !place.exists())
        .unwrap_or(orphans);
    fs::rename(folder, &place).map_err(StoreError::io("move to .orphans", folder))?;
    Ok(place)
}

fn mark_of(folder: &Path) -> PathBuf {
    let name = folder.file_name().unwrap_or_default();
    let mut mark = OsString::from(UNFINISHED);
    mark.push(name);
    folder.with_file_name(mark)
}

/// Reads all files below `folder`.
pub(super) fn contents(folder: &Path) -> Result<Contents, StoreError> {
    let mut hasher = Sha256::new();
    let mut sums = FileSums::default();
    let mut bytes = 0;
    for path in files_below(folder)? {
        let (length, sha256) = hash_file(folder, &path, &mut hasher)?;
        bytes += length;
        sums.add(folder, &path, sha256);
    }
    Ok(Contents {
        digest: format!("{:x}", hasher.finalize()),
        files: sums,
        bytes,
    })
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

/// Writes all files below `folder` to the disk, and the folders that name them.
fn flush(folder: &Path) -> Result<(), StoreError> {
    let mut folders = vec![folder.to_owned()];
    for path in files_below(folder)? {
        File::open(&path)
            .and_then(|file| file.sync_all())
            .map_err(StoreError::io("flush", &path))?;
        folders.extend(path.parent().map(Path::to_owned));
    }
    folders.dedup();
    for path in folders {
        flush_folder(&path)?;
    }
    Ok(())
}

/// Hashes a file with its name; returns its length.
/// Adds a file to the digest of its folder. Returns its length and its own SHA-256.
fn hash_file(folder: &Path, path: &Path, hasher: &mut Sha256) -> Result<(u64, String), StoreError> {
    let mut file = File::open(path).map_err(StoreError::io("open", path))?;
    let length = file.metadata().map_err(StoreError::io("read", path))?.len();
    let name = path.strip_prefix(folder).unwrap_or(path);
    let name = name.as_os_str().as_encoded_bytes();
    hasher.update((name.len() as u64).to_le_bytes());
    hasher.update(name);
    hasher.update(length.to_le_bytes());
    let mut own = Sha256::new();
    let take = |piece: &[u8]| {
        hasher.update(piece);
        own.update(piece);
    };
    files::read_pieces(&mut file, take).map_err(StoreError::io("read", path))?;
    Ok((length, format!("{:x}", own.finalize())))
}

fn flush_folder(path: &Path) -> Result<(), StoreError> {
    File::open(path)
        .and_then(|folder| folder.sync_all())
        .map_err(StoreError::io("flush", path))
}

/// The report as JSON that is read back as it is: checked by [`read_report`], and written anew.
fn report_of(folder: &Path) -> Result<Option<String>, StoreError> {
    let report = read_report(folder).map_err(|error| {
        let shown = format!("{}/", folder.display());
        StoreError::BadReport(chain(&error).replace(&shown, ""))
    })?;
    Ok(report.map(|report| report.to_string()))
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
        let staged = Staged::new(parent.path(), &source);
        assert!(
            matches!(staged, Err(StoreError::NotPlainFiles(_))),
            "{staged:?}"
        );
    }

    #[test]
    fn the_digest_knows_names_and_bytes() {
        let parent = tempfile::tempdir().unwrap();
        let make = |name: &str, file: &str, content: &str| {
            let folder = parent.path().join(name);
            fs::create_dir(&folder).unwrap();
            fs::write(folder.join(file), content).unwrap();
            contents(&folder).unwrap().digest
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
        drop(Staged::new(&artifacts, &source).unwrap());
        assert_eq!(children(&artifacts).unwrap(), Vec::<PathBuf>::new());
        assert!(source.join("file").exists());
    }
}
