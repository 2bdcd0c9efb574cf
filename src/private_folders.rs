//! Folders of the machine that are kept out of what clients read.

use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Folders whose place on the machine is not told to clients: of a path below one of them, only the
/// part below it is.
#[derive(Clone, Debug, Default)]
pub struct PrivateFolders(Arc<[String]>);

impl PrivateFolders {
    pub fn new<'a>(folders: impl IntoIterator<Item = &'a Path>) -> Self {
        let forms = |folder: &Path| [Some(folder.to_path_buf()), folder.canonicalize().ok()];
        let hidden = |folder: &PathBuf| folder.is_absolute() && folder.parent().is_some();
        let mut folders: Vec<String> = folders
            .into_iter()
            .flat_map(forms)
            .flatten()
            .filter(hidden)
            .map(|folder| {
                folder
                    .display()
                    .to_string()
                    .trim_end_matches('/')
                    .to_owned()
            })
            .collect();
        // The innermost first: what is below it is told relative to it.
        folders.sort_by_key(|folder| std::cmp::Reverse(folder.len()));
        folders.dedup();
        Self(folders.into())
    }

    /// Takes the folders out of a text: `/var/state/jobs/7` becomes `jobs/7`.
    pub fn hide(&self, text: &str) -> String {
        let mut text = text.to_owned();
        for folder in self.0.iter() {
            text = without(&text, folder);
        }
        text
    }
}

/// The text with paths below `folder` made relative to it, and `folder` itself replaced by its last
/// part. What only contains the same letters, such as a URL, stays.
fn without(text: &str, folder: &str) -> String {
    let is_part = |c: char| c.is_alphanumeric() || "/._-~%".contains(c);
    let mut kept = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find(folder) {
        let (before, found) = rest.split_at(at);
        let after = &found[folder.len()..];
        kept.push_str(before);
        let begins = !kept.ends_with(is_part);
        rest = after;
        match after.strip_prefix('/') {
            Some(below) if begins => rest = below,
            _ if begins && !after.starts_with(is_part) => {
                kept.push_str(folder.rsplit('/').next().unwrap_or_default());
            }
            _ => kept.push_str(folder),
        }
    }
    kept + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_become_relative_and_nothing_else_changes() {
        let folders = ["/srv/state", "/srv/state/cache", "/data/", "relative", "/"];
        let folders = PrivateFolders::new(folders.map(Path::new));
        for (text, shown) in [
            (
                "cannot read /srv/state/jobs/7/a.csv",
                "cannot read jobs/7/a.csv",
            ),
            ("`/data/t`: \"/data/t/x\", (/data/y)", "`t`: \"t/x\", (y)"),
            (
                "/srv/state/cache/encoders is not there",
                "encoders is not there",
            ),
            ("the folder /srv/state is full", "the folder state is full"),
            ("the folder /srv/state: full", "the folder state: full"),
            ("http://host/data/predict", "http://host/data/predict"),
            ("/database/x and /srv/states", "/database/x and /srv/states"),
            ("a relative/path and /etc/x", "a relative/path and /etc/x"),
            ("/mnt/data/x", "/mnt/data/x"),
            ("", ""),
        ] {
            assert_eq!(folders.hide(text), shown);
        }
    }

    #[test]
    fn links_are_known_by_both_names() {
        let place = tempfile::tempdir().unwrap();
        let real = place.path().canonicalize().unwrap().join("real");
        let link = place.path().join("link");
        std::fs::create_dir(&real).unwrap();
        std::os::unix::fs::symlink(&real, &link).unwrap();
        let folders = PrivateFolders::new([link.as_path()]);
        for folder in [real, link] {
            assert_eq!(folders.hide(&format!("{}/x", folder.display())), "x");
        }
    }
}
