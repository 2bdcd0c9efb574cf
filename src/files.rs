//! Files that others may have put in place: only regular ones, and none that is too large.

use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Largest JSON file of a model folder. A `config.json` of a thousand labels has 100 kB.
pub const MAX_JSON_BYTES: u64 = 16 << 20;

/// Opens a regular file of at most `limit` bytes.
///
/// # Errors
/// Other kinds of files are refused with [`ErrorKind::InvalidInput`]: a pipe would make its reader
/// wait, and a device would never end. A larger file is refused with [`ErrorKind::FileTooLarge`].
pub fn open(path: &Path, limit: u64) -> io::Result<File> {
    // Otherwise, opening a pipe waits for its writer.
    let file = File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        let error = io::Error::new(ErrorKind::InvalidInput, "it is not a regular file");
        return Err(error);
    }
    if metadata.len() > limit {
        let text = format!("it has {} bytes, more than {limit}", metadata.len());
        return Err(io::Error::new(ErrorKind::FileTooLarge, text));
    }
    Ok(file)
}

/// Reads a file that [`open`] takes.
pub fn read(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    // It may grow meanwhile.
    open(path, limit)?.take(limit).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Hands what is left of a file to `take`, piece by piece, and returns its length in bytes.
pub fn read_pieces(file: &mut File, mut take: impl FnMut(&[u8])) -> io::Result<u64> {
    let mut buffer = vec![0; 1 << 16];
    let mut bytes = 0;
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(bytes),
            read => {
                take(&buffer[..read]);
                bytes += read as u64;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::process::Command;

    use super::*;

    #[test]
    fn only_regular_files_up_to_the_limit_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        fs::write(path("file"), "12345").unwrap();
        std::os::unix::fs::symlink("file", path("link")).unwrap();
        for name in ["file", "link"] {
            assert_eq!(read(&path(name), 5).unwrap(), b"12345");
            assert_eq!(
                read(&path(name), 4).unwrap_err().kind(),
                ErrorKind::FileTooLarge
            );
        }
        let made = Command::new("mkfifo").arg(path("pipe")).status();
        assert!(made.unwrap().success());
        for other in [path("pipe"), "/dev/zero".into(), path("")] {
            let error = read(&other, 5).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidInput, "{other:?}");
        }
        let missing = read(&path("missing"), 5).unwrap_err();
        assert_eq!(missing.kind(), ErrorKind::NotFound);
    }
}
