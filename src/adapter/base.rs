//! Which encoder an adapter was trained on, and whether that is the one at hand.
//!
//! An adapter on another encoder of the same shape answers, and its answers are noise. So every
//! adapter carries the [digest](crate::encoder::encoder_digest) of its encoder. Those that were
//! made elsewhere, or by the first release, carry names only; a name that [`KnownEncoders`] has
//! stands for the digest that belongs to it, and any other name proves nothing.

use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use super::files::read_report;
use super::{AdapterConfig, AdapterError, TaskConfig};
use crate::encoder::{EncoderId, shown_encoder};
use crate::parse;

/// The encoder that an adapter was trained on, as far as it is known.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AdapterBase {
    pub name: Option<String>,
    pub digest: Option<String>,
}

/// Whether an adapter belongs to an encoder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fit {
    /// The digests are the same.
    Verified,
    /// The adapter has no digest, and its names don't speak against the encoder.
    Unverified,
    /// The adapter belongs to another encoder.
    Mismatch(Mismatch),
}

/// An adapter and an encoder that do not belong together.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("it was trained on the encoder {base}, not on {encoder}")]
pub struct Mismatch {
    /// The adapter's encoder, for messages.
    pub base: String,
    /// The encoder at hand, for messages.
    pub encoder: String,
}

/// The encoders that the program knows by name.
#[derive(Clone, Debug, Default)]
pub struct KnownEncoders(Vec<KnownEncoder>);

#[derive(Clone, Debug)]
pub struct KnownEncoder {
    /// The name in the catalog first, then those that other programs use.
    pub names: Vec<String>,
    pub digest: Option<String>,
}

/// An encoder, and what is known of others: all that says which adapters belong to it.
#[derive(Clone, Debug)]
pub struct EncoderIdentity {
    pub id: EncoderId,
    pub known: KnownEncoders,
}

/// What is read of a report.
#[derive(Default, Deserialize)]
struct Report {
    #[serde(default)]
    student_model: Value,
}

impl AdapterBase {
    /// Reads which encoder the adapter in a folder belongs to: from its `config.json`, its
    /// `report.json` and `base_model_name_or_path`.
    ///
    /// A `config.json` that is not there, or a report that is none, says nothing.
    ///
    /// # Errors
    /// `adapter_config.json` can't be used, or the files contradict each other.
    pub fn read(dir: &Path, known: &KnownEncoders) -> Result<Self, AdapterError> {
        let task = TaskConfig::read(dir).ok();
        let report = read_report(dir).ok().flatten();
        let report: Option<Report> = report.and_then(|report| parse::value(report).ok());
        let report = report.unwrap_or_default().student_model;
        let of_report = |field: &str| Some(report.get(field)?.as_str()?.to_owned());
        let (base_model, base_digest) =
            task.map_or((None, None), |task| (task.base_model, task.base_digest));
        let names = [
            AdapterConfig::read(dir)?.base_model_name_or_path,
            base_model,
            of_report("encoder"),
        ];
        let digests = [base_digest, of_report("encoder_digest")];
        let names: Vec<String> = names
            .into_iter()
            .flatten()
            .filter(|n| !n.is_empty())
            .collect();
        let said = digests.into_iter().flatten().map(|digest| (None, digest));
        let meant = names.iter().filter_map(|name| {
            let digest = known.digest_of(name)?;
            Some((Some(name.as_str()), digest.to_owned()))
        });
        let mut digest: Option<(Option<&str>, String)> = None;
        for next in said.chain(meant) {
            match &digest {
                Some(first) if first.1 != next.1 => {
                    let (first, next) = (claim(first), claim(&next));
                    return Err(AdapterError::BaseContradiction { first, next });
                }
                Some(_) => {}
                None => digest = Some(next),
            }
        }
        Ok(Self {
            digest: digest.map(|(_, digest)| digest),
            name: names.into_iter().next(),
        })
    }
}

/// A digest, or the name that stands for it, for messages.
fn claim((name, digest): &(Option<&str>, String)) -> String {
    match name {
        Some(name) => shown_encoder(name).to_owned(),
        None => format!("the one with the digest {digest:.12}"),
    }
}

/// For messages.
impl std::fmt::Display for AdapterBase {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let name = self
            .name
            .clone()
            .unwrap_or_else(|| "without a name".to_owned());
        match &self.digest {
            Some(digest) => {
                let digest = digest.clone();
                write!(f, "{}", EncoderId { name, digest })
            }
            None => f.write_str(shown_encoder(&name)),
        }
    }
}

impl KnownEncoders {
    pub fn new(encoders: impl IntoIterator<Item = KnownEncoder>) -> Self {
        Self(encoders.into_iter().collect())
    }

    /// The digest of the encoder of that name, if both are known.
    pub fn digest_of(&self, name: &str) -> Option<&str> {
        self.find(name)?.digest.as_deref()
    }

    fn find(&self, name: &str) -> Option<&KnownEncoder> {
        let has_name = |encoder: &&KnownEncoder| encoder.names.iter().any(|known| known == name);
        self.0.iter().find(has_name)
    }

    /// Says whether an adapter of `base` belongs to `encoder`.
    pub fn fit(&self, base: &AdapterBase, encoder: &EncoderId) -> Fit {
        let name = base.name.as_deref();
        let digest = base.digest.as_deref();
        let digest = digest.or_else(|| self.digest_of(name?));
        let fits = match (digest, name) {
            (Some(digest), _) if digest == encoder.digest => return Fit::Verified,
            (Some(_), _) => false,
            (None, Some(name)) => !self.speaks_against(name, encoder),
            (None, None) => true,
        };
        match fits {
            true => Fit::Unverified,
            false => Fit::Mismatch(Mismatch {
                base: base.to_string(),
                encoder: encoder.to_string(),
            }),
        }
    }

    /// Whether a name that no digest belongs to is certainly another encoder's.
    fn speaks_against(&self, name: &str, encoder: &EncoderId) -> bool {
        let by_digest = |known: &&KnownEncoder| known.digest.as_deref() == Some(&encoder.digest);
        let by_name = || self.find(&encoder.name);
        let Some(own) = self.0.iter().find(by_digest).or_else(by_name) else {
            // Nothing is known of the encoder.
            return false;
        };
        let last = |name: &str| name.rsplit('/').next().unwrap_or(name).to_owned();
        let is_own = own.names.iter().any(|own| last(own) == last(name));
        // A repository on the hub; one that another person has copied keeps its last part.
        let is_repository = name.split('/').count() == 2 && !name.starts_with(['.', '/', '~']);
        !is_own && (is_repository || self.find(name).is_some())
    }
}

impl EncoderIdentity {
    /// Says whether an adapter of `base` belongs to the encoder.
    pub fn fit(&self, base: &AdapterBase) -> Fit {
        self.known.fit(base, &self.id)
    }

    /// Reads which encoder the adapter in a folder belongs to. One without a digest is let in
    /// unless its names speak against the encoder; it gets no digest here.
    ///
    /// # Errors
    /// The adapter belongs to another encoder, or its files can't be used.
    pub fn admit(&self, dir: &Path) -> Result<AdapterBase, AdapterError> {
        let base = AdapterBase::read(dir, &self.known)?;
        match self.fit(&base) {
            Fit::Verified | Fit::Unverified => Ok(base),
            Fit::Mismatch(mismatch) => Err(mismatch.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use serde_json::json;

    use super::*;

    fn known() -> KnownEncoders {
        let encoder = |names: &[&str], digest: Option<&str>| KnownEncoder {
            names: names.iter().map(|name| (*name).to_owned()).collect(),
            digest: digest.map(str::to_owned),
        };
        KnownEncoders::new([
            encoder(&["small", "org/all-small", "all-small"], Some("aa")),
            encoder(&["large", "org/all-large", "all-large"], Some("bb")),
            encoder(&["other", "org/other"], None),
        ])
    }

    fn id(name: &str, digest: &str) -> EncoderId {
        EncoderId {
            name: name.to_owned(),
            digest: digest.to_owned(),
        }
    }

    fn base(name: Option<&str>, digest: Option<&str>) -> AdapterBase {
        AdapterBase {
            name: name.map(str::to_owned),
            digest: digest.map(str::to_owned),
        }
    }

    #[test]
    fn only_a_digest_verifies_and_a_known_name_has_one() {
        let (small, own) = (id("small", "aa"), id("/srv/own", "cc"));
        for (name, digest, encoder, expected) in [
            (None, Some("aa"), &small, "verified"),
            (Some("any"), Some("aa"), &small, "verified"),
            (Some("small"), None, &small, "verified"),
            (Some("org/all-small"), None, &small, "verified"),
            (Some("small"), None, &id("/srv/copy", "aa"), "verified"),
            // Another encoder under the same name.
            (Some("small"), Some("aa"), &id("small", "dd"), "mismatch"),
            (Some("small"), None, &id("/srv/small", "dd"), "mismatch"),
            (Some("large"), None, &small, "mismatch"),
            (Some("large"), None, &own, "mismatch"),
            // Names without a digest.
            (Some("other"), None, &small, "mismatch"),
            (Some("someone/all-other"), None, &small, "mismatch"),
            (Some("someone/all-small"), None, &small, "unverified"),
            (Some("checkpoint-12"), None, &small, "unverified"),
            (Some("/tmp/small"), None, &small, "unverified"),
            (Some("./a"), None, &small, "unverified"),
            (Some("other"), None, &id("other", "dd"), "unverified"),
            (Some("other"), None, &own, "unverified"),
            (Some("someone/all-other"), None, &own, "unverified"),
            (None, None, &small, "unverified"),
        ] {
            let fit = known().fit(&base(name, digest), encoder);
            let found = match &fit {
                Fit::Verified => "verified",
                Fit::Unverified => "unverified",
                Fit::Mismatch(_) => "mismatch",
            };
            assert_eq!(found, expected, "{name:?} {digest:?} on {encoder}");
        }
        let fit = known().fit(&base(Some("large"), None), &small);
        let Fit::Mismatch(mismatch) = fit else {
            panic!("they are two");
        };
        let text = mismatch.to_string();
        assert!(text.contains("large") && text.contains("small"), "{text}");
    }

    /// The base of a golden adapter with other words in its files.
    fn read(name: &str, config: &Value, report: &str) -> Result<AdapterBase, AdapterError> {
        let folder = tempfile::tempdir().unwrap();
        let adapter = json!({"peft_type": "LORA", "r": 2, "lora_alpha": 2,
            "target_modules": ["query"], "base_model_name_or_path": name});
        let write = |file: &str, text: String| fs::write(folder.path().join(file), text).unwrap();
        write("adapter_config.json", adapter.to_string());
        write("config.json", config.to_string());
        write("report.json", report.to_owned());
        AdapterBase::read(folder.path(), &known())
    }

    #[test]
    fn the_files_of_an_adapter_must_agree_on_its_encoder() {
        let digest = |digest: &str| json!({"kdlora": {"max_length": 8, "encoder_digest": digest}});
        let nothing = json!({});
        let report = r#"{"student_model": {"encoder": "small"}}"#;
        for (name, config, report, expected) in [
            (
                "own",
                &digest("cc"),
                "no report",
                base(Some("own"), Some("cc")),
            ),
            (
                "small",
                &digest("aa"),
                "{}",
                base(Some("small"), Some("aa")),
            ),
            (
                "org/all-small",
                &nothing,
                report,
                base(Some("org/all-small"), Some("aa")),
            ),
            ("", &nothing, report, base(Some("small"), Some("aa"))),
            ("own", &nothing, "{}", base(Some("own"), None)),
            ("", &nothing, r#"{"student_model": 3}"#, base(None, None)),
        ] {
            assert_eq!(read(name, config, report).unwrap(), expected);
        }
        for (name, config, report) in [
            ("large", &digest("aa"), "{}"),
            ("large", &nothing, report),
            (
                "own",
                &digest("bb"),
                r#"{"student_model": {"encoder_digest": "aa"}}"#,
            ),
        ] {
            let error = read(name, config, report).unwrap_err();
            assert!(
                matches!(error, AdapterError::BaseContradiction { .. }),
                "{error}"
            );
        }
    }
}
