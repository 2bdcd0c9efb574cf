//! SHA-256 of files, by which a folder that was changed or damaged on its disk is found out.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::AdapterError;
use crate::files;

/// The SHA-256 of each file of a folder, by its path in the folder.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct FileSums(BTreeMap<String, String>);

impl FileSums {
    /// Adds the SHA-256 of a file of the folder `dir`.
    pub fn add(&mut self, dir: &Path, file: &Path, sha256: String) {
        let name = file.strip_prefix(dir).unwrap_or(file);
        self.0.insert(name.to_string_lossy().into_owned(), sha256);
    }

    /// For a database.
    pub fn to_json(&self) -> String {
        // Texts always serialise.
        serde_json::to_string(self).unwrap_or_default()
    }

    /// Reads the files of a folder and compares their sums.
    ///
    /// # Errors
    /// A file is missing, or is not what it was; the error names it. No sums at all are an error
    /// too: nothing would be compared.
    pub fn verify(&self, dir: &Path) -> Result<(), AdapterError> {
        let damaged = |file: &str, problem: String| AdapterError::Damaged {
            file: file.to_owned(),
            problem,
        };
        if self.0.is_empty() {
            let problem = "its files are not those that were stored".to_owned();
            return Err(damaged("the folder of the version", problem));
        }
        for (name, stored) in &self.0 {
            match sha256(&dir.join(name)) {
                Ok(found) if found == *stored => {}
                Ok(found) => {
                    let problem = format!("its SHA-256 is {found:.12}…, it was {stored:.12}…");
                    return Err(damaged(name, problem));
                }
                Err(error) => return Err(damaged(name, format!("it cannot be read: {error}"))),
            }
        }
        Ok(())
    }
}

/// The SHA-256 of a file in lower-case hexadecimal digits.
pub fn sha256(path: &Path) -> io::Result<String> {
    let mut file = files::open(path, u64::MAX)?;
    let mut hasher = Sha256::new();
    files::read_pieces(&mut file, |piece| hasher.update(piece))?;
    Ok(format!("{:x}", hasher.finalize()))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn the_file_that_is_not_what_it_was_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path();
        let files = ["a", "inner/b"].map(|name| dir.join(name));
        fs::create_dir(dir.join("inner")).unwrap();
        let mut sums = FileSums::default();
        for file in &files {
            fs::write(file, "bytes").unwrap();
            sums.add(dir, file, sha256(file).unwrap());
        }
        sums.verify(dir).unwrap();
        let refused = || sums.verify(dir).unwrap_err().to_string();
        fs::write(&files[1], "bytfs").unwrap();
        assert!(refused().contains("inner/b"), "{}", refused());
        fs::write(&files[1], "bytes").unwrap();
        fs::remove_file(&files[0]).unwrap();
        assert!(refused().starts_with("a is damaged"), "{}", refused());
        assert!(FileSums::default().verify(dir).is_err());
    }
}
