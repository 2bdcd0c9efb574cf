//! Git LFS pointers: small text files that stand in for large ones until `git lfs pull` has run.

use std::path::{Path, PathBuf};

/// The first bytes of every pointer (<https://git-lfs.com/spec/v1>).
const BEGINNING: &[u8] = b"version https://git-lfs.github.com/spec/";

/// A file whose content Git LFS has not fetched.
#[derive(Debug, thiserror::Error)]
#[error(
    "{path} is a Git LFS pointer, not the file itself: fetch its content with `git lfs pull`",
    path = .path.display()
)]
pub struct LfsPointer {
    path: PathBuf,
}

/// Refuses the file at `path` if its `content`, or the beginning of it, is that of a pointer.
pub fn refuse_pointer(path: &Path, content: &[u8]) -> Result<(), LfsPointer> {
    match content.starts_with(BEGINNING) {
        true => Err(LfsPointer {
            path: path.to_path_buf(),
        }),
        false => Ok(()),
    }
}
