//! What a name means: an encoder of the catalog or a folder, whole or some of its layers.

use std::fmt;
use std::path::{Path, PathBuf};

use super::{Entry, HubError, catalog};

/// An encoder, as `NAME`, `DIR`, `NAME@0,4,8` or `DIR@0,4,8` names it.
///
/// The numbers are layers, counted from 0, in the order in which they follow one another in the
/// encoder that is made of them. So a student gets its teacher's layers (DistilBERT:
/// [arXiv 1910.01108](https://arxiv.org/abs/1910.01108), section 3). A catalog name wins over a
/// folder of that name (write `./name` for the folder), and a folder's name may have an `@`.
#[derive(Clone, Debug)]
pub struct Choice {
    pub(super) source: Source,
    /// None: all.
    pub(super) layers: Option<Vec<usize>>,
}

#[derive(Clone, Debug)]
pub(super) enum Source {
    /// An entry that can be fetched.
    Catalog(&'static Entry),
    Folder(PathBuf),
}

impl Choice {
    /// # Errors
    /// There is neither an entry nor a folder of that name, or the layers are written wrongly.
    pub fn parse(name: &str) -> Result<Self, HubError> {
        if let Some(entry) = catalog::find(name) {
            return Self::of_entry(entry);
        }
        if Path::new(name).is_dir() {
            return Ok(Self {
                source: Source::Folder(name.into()),
                layers: None,
            });
        }
        let unknown = || HubError::Unknown(name.to_owned());
        let (base, layers) = name.rsplit_once('@').ok_or_else(unknown)?;
        let whole = Self::parse(base).map_err(|error| match error {
            HubError::Unknown(_) => unknown(),
            other => other,
        })?;
        whole.take(parse_layers(name, layers)?)
    }

    fn of_entry(entry: &'static Entry) -> Result<Self, HubError> {
        let (Some(of), Some(layers)) = (&entry.of, &entry.layers) else {
            return Ok(Self {
                source: Source::Catalog(entry),
                layers: None,
            });
        };
        Self::parse(of)?.take(layers.clone())
    }

    /// These layers of those that are chosen already.
    pub fn take(self, layers: Vec<usize>) -> Result<Self, HubError> {
        check(&layers)?;
        let chosen = match &self.layers {
            None => layers,
            Some(before) => {
                let layer = |layer: &usize| {
                    before.get(*layer).copied().ok_or(HubError::NoSuchLayer {
                        of: self.to_string(),
                        layer: *layer,
                        layers: before.len(),
                    })
                };
                layers.iter().map(layer).collect::<Result<_, _>>()?
            }
        };
        Ok(Self {
            layers: Some(chosen),
            ..self
        })
    }

    /// The same encoder, named in a way that does not depend on the working folder.
    pub fn absolute(self) -> Self {
        let source = match self.source {
            Source::Folder(path) => Source::Folder(path.canonicalize().unwrap_or(path)),
            source @ Source::Catalog(_) => source,
        };
        Self { source, ..self }
    }

    /// Whether both mean the same encoder, however it is named.
    pub fn is_same(&self, other: &Self) -> bool {
        let same_source = match (&self.source, &other.source) {
            (Source::Catalog(one), Source::Catalog(other)) => one.name == other.name,
            (Source::Folder(one), Source::Folder(other)) => {
                let real = |path: &PathBuf| path.canonicalize().unwrap_or_else(|_| path.clone());
                real(one) == real(other)
            }
            _ => false,
        };
        same_source && self.layers == other.layers
    }
}

/// The name in its plainest form, which [`Choice::parse`] reads.
impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.source {
            Source::Catalog(entry) => f.write_str(&entry.name)?,
            Source::Folder(path) => write!(f, "{}", path.display())?,
        }
        match &self.layers {
            Some(layers) => write!(f, "@{}", list(layers)),
            None => Ok(()),
        }
    }
}

/// As it stands behind the `@`.
pub(super) fn list(layers: &[usize]) -> String {
    let layers: Vec<_> = layers.iter().map(usize::to_string).collect();
    layers.join(",")
}

fn parse_layers(name: &str, layers: &str) -> Result<Vec<usize>, HubError> {
    if layers.is_empty() {
        return Err(HubError::NoLayers);
    }
    layers
        .split(',')
        .map(|layer| layer.parse().ok())
        .collect::<Option<_>>()
        .ok_or_else(|| HubError::MalformedLayers {
            name: name.to_owned(),
            layers: layers.to_owned(),
        })
}

/// That there are layers, each once: a layer that is there twice would be two different ones after
/// the first step of a training, which is seldom meant.
fn check(layers: &[usize]) -> Result<(), HubError> {
    if layers.is_empty() {
        return Err(HubError::NoLayers);
    }
    let repeated = |(i, layer): (usize, &usize)| layers[..i].contains(layer).then_some(*layer);
    match layers.iter().enumerate().find_map(repeated) {
        Some(layer) => Err(HubError::LayerTwice { layer }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(name: &str) -> Choice {
        Choice::parse(name).unwrap()
    }

    fn refused(name: &str) -> String {
        Choice::parse(name).unwrap_err().to_string()
    }

    #[test]
    fn layers_stand_behind_the_last_at_sign() {
        let folder = tempfile::tempdir().unwrap();
        let odd = folder.path().join("a@b");
        std::fs::create_dir(&odd).unwrap();
        let odd = odd.to_str().unwrap();
        for (name, layers) in [
            ("mpnet-base".to_owned(), None),
            ("mpnet-base@0,4,8".to_owned(), Some(vec![0, 4, 8])),
            ("mpnet-base@11,0".to_owned(), Some(vec![11, 0])),
            (odd.to_owned(), None),
            (format!("{odd}@2"), Some(vec![2])),
        ] {
            let choice = parse(&name);
            assert_eq!(choice.layers, layers, "{name}");
            assert_eq!(choice.to_string(), name);
        }
    }

    #[test]
    fn what_cannot_be_meant_is_refused_with_the_reason() {
        assert!(refused("mpnet-base@").contains("no layer"));
        assert!(refused("mpnet-base@3,1,3").contains("layer 3 is named twice"));
        for layers in [
            "a",
            "0,",
            ",0",
            "0-3",
            "-1",
            "0;1",
            "1.5",
            "99999999999999999999",
        ] {
            let message = refused(&format!("mpnet-base@{layers}"));
            assert!(message.contains("mpnet-base@0,2,4"), "{message}");
        }
        for name in ["nothing@0,1", "@0", "nobody@nowhere", ""] {
            assert!(refused(name).contains(&format!("'{name}' is neither")));
        }
    }

    #[test]
    fn names_of_the_same_encoder_are_the_same() {
        let entry = catalog::find("mpnet-base-l3").unwrap();
        let layers = list(entry.layers.as_ref().unwrap());
        assert!(parse("mpnet-base-l3").is_same(&parse(&format!("mpnet-base@{layers}"))));
        assert!(!parse("mpnet-base-l3").is_same(&parse("mpnet-base")));
        assert!(!parse("mpnet-base@0,1").is_same(&parse("mpnet-base@1,0")));
        assert!(parse("mpnet-base@0,4,8@2,0").is_same(&parse("mpnet-base@8,0")));
        assert!(refused("mpnet-base@0,4,8@3").contains("no layer 3"));
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().to_str().unwrap();
        assert!(parse(&format!("{path}/.@0")).is_same(&parse(&format!("{path}@0"))));
    }
}
