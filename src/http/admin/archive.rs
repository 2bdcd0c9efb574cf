//! An adapter's folder as one .zip.
//!
//! The archive is read from its beginning to its end, without its directory, and of its entries only
//! those with the names of an adapter's files are unpacked, under these names: nothing that an
//! archive says becomes a path. It can't unpack to more than a limit.

use std::fs::File;
use std::io::{self, BufReader, Read};
use std::path::{Component, Path};

use zip::read::read_zipfile_from_stream;
use zip::result::ZipError;

use crate::http::error::{ApiError, Problem};

/// Entries that are looked at: an adapter's folder has a dozen.
const MAX_ENTRIES: usize = 1_000;

/// Unpacks the files `names` from the archive into `folder`, at most `most` bytes in all. They lie
/// at the top of the archive or in one folder there. Blocks.
pub(super) fn unpack(
    archive: &Path,
    folder: &Path,
    names: &[&'static str],
    most: u64,
) -> Result<(), ApiError> {
    let mut archive = BufReader::new(File::open(archive).map_err(ApiError::internal)?);
    let mut left = most;
    for _ in 0..MAX_ENTRIES {
        let entry = read_zipfile_from_stream(&mut archive).map_err(unreadable)?;
        let Some(mut entry) = entry else {
            return Ok(());
        };
        let Some(path) = entry.enclosed_name() else {
            return Err(unusable(
                "the archive has an entry whose path leads out of it",
            ));
        };
        let depth = path
            .components()
            .filter(|part| matches!(part, Component::Normal(_)));
        let known = names
            .iter()
            .find(|name| path.file_name().is_some_and(|own| own == **name));
        let Some(name) = known.filter(|_| depth.count() <= 2 && !entry.is_dir()) else {
            continue;
        };
        let mut file = File::create_new(folder.join(name)).map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => unusable(format!("the archive has two files {name}")),
            _ => ApiError::internal(error),
        })?;
        let mut bounded = (&mut entry).take(left + 1);
        let written = io::copy(&mut bounded, &mut file).map_err(|error| {
            unusable(format!("{name} in the archive can't be unpacked: {error}"))
        })?;
        left = left.checked_sub(written).ok_or_else(|| {
            Problem::TooLarge.with(format!("the archive unpacks to more than {most} bytes"))
        })?;
    }
    Err(unusable(format!(
        "the archive has more than {MAX_ENTRIES} entries"
    )))
}

fn unreadable(error: ZipError) -> ApiError {
    unusable(format!(
        "the archive can't be read as a .zip whose entries tell their sizes before their data, as \
         `zip -r` writes it to a file: {error}"
    ))
}

fn unusable(detail: impl Into<String>) -> ApiError {
    Problem::Unusable.with(detail)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Write;

    use zip::write::SimpleFileOptions;

    use super::*;

    const NAMES: [&str; 2] = ["config.json", "adapter_config.json"];

    fn archive(entries: &[(&str, &[u8])]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().expect("a folder");
        let file = File::create(folder.path().join("a.zip")).expect("a file");
        let mut archive = zip::ZipWriter::new(file);
        for (name, content) in entries {
            archive
                .start_file(*name, SimpleFileOptions::default())
                .expect("an entry");
            archive.write_all(content).expect("write");
        }
        archive.finish().expect("an archive");
        fs::create_dir(folder.path().join("out")).expect("a folder");
        folder
    }

    fn outcome(entries: &[(&str, &[u8])], most: u64) -> Result<Vec<String>, String> {
        let folder = archive(entries);
        let out = folder.path().join("out");
        unpack(&folder.path().join("a.zip"), &out, &NAMES, most)
            .map_err(|error| error.detail().to_owned())?;
        let mut names: Vec<String> = fs::read_dir(out)
            .expect("the folder")
            .map(|entry| {
                entry
                    .expect("a file")
                    .file_name()
                    .into_string()
                    .expect("UTF-8")
            })
            .collect();
        names.sort();
        assert_eq!(fs::read_dir(folder.path()).expect("the folder").count(), 2);
        Ok(names)
    }

    #[test]
    fn only_the_files_of_an_adapter_come_out() {
        let both = Ok(vec![
            "adapter_config.json".to_owned(),
            "config.json".to_owned(),
        ]);
        let entries: [(&str, &[u8]); 4] = [
            ("mine/adapter_config.json", b"1"),
            ("mine/config.json", b"2"),
            ("mine/README.md", b"3"),
            ("mine/deep/er/config.json", b"4"),
        ];
        assert_eq!(outcome(&entries, 100), both);
        assert_eq!(outcome(&[("other", b"")], 100), Ok(Vec::new()));
    }

    #[test]
    fn archives_that_want_out_or_explode_are_refused() {
        let refused = |entries: &[(&str, &[u8])], sentence: &str| {
            let error = outcome(entries, 1000).expect_err(sentence);
            assert!(error.contains(sentence), "{error}");
        };
        refused(&[("../config.json", b"x")], "leads out of it");
        refused(&[("a/../../../config.json", b"x")], "leads out of it");
        refused(
            &[("a/config.json", b""), ("config.json", b"")],
            "two files config.json",
        );
        refused(
            &[("config.json", &[b'0'; 1_000_000])],
            "more than 1000 bytes",
        );
        let halves: [(&str, &[u8]); 2] = [
            ("config.json", &[b'0'; 600]),
            ("adapter_config.json", &[b'0'; 600]),
        ];
        refused(&halves, "more than 1000 bytes");
        let names: Vec<String> = (0..1_001).map(|number| format!("{number}")).collect();
        let many: Vec<(&str, &[u8])> = names.iter().map(|name| (name.as_str(), &b""[..])).collect();
        refused(&many, "more than 1000 entries");
    }

    #[test]
    fn what_is_no_archive_is_told() {
        let folder = tempfile::tempdir().expect("a folder");
        for bytes in [
            &b""[..],
            b"PK",
            b"PK\x03\x04",
            b"%PDF-1.7 of some kind",
            &[0; 100],
        ] {
            let path = folder.path().join("a.zip");
            fs::write(&path, bytes).expect("write");
            let error = unpack(&path, folder.path(), &NAMES, 100).expect_err("not an archive");
            assert_eq!(error.problem(), Problem::Unusable);
        }
    }
}
