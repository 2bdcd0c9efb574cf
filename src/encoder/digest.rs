//! The digest that identifies an encoder: what it computes with, wherever it comes from.
//!
//! It is a SHA-256 over three parts, in this order: the fields of `config.json` that the forward
//! pass reads, the tokenizer as it is parsed, and the encoder's own tensors by their names here
//! (name, type, shape and bytes as they are stored). Heads and the pooler are left out: they belong
//! to a task. So the digest does not depend on the source of the files, on how tensors are shared
//! out over files, on formatting, or on the precision that a server computes in.
//!
//! The digest is stored with every version and every adapter. A change of it makes all of them
//! strangers to their encoder, so a test holds it to a golden value.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::stored::StoredTensors;
use super::weights::name_here;
use super::{EncoderConfig, EncoderError};
use crate::parse;
use crate::text::Tokenizer;

/// Written in front of everything else, so that another layout of the digest gives other values.
const LAYOUT: &str = "kdlora encoder 1";
/// Bytes of a digest that messages show.
const SHOWN: usize = 12;
/// A file that was written this recently may change again without a change of its time.
const SETTLED: Duration = Duration::from_secs(2);

/// An encoder by name and digest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EncoderId {
    /// Catalog name or folder, as the user named it.
    pub name: String,
    /// See [`encoder_digest`].
    pub digest: String,
}

/// For messages: `minilm-l6 (3f9a0c1b2d4e)`. Of a folder only the last part is shown.
impl fmt::Display for EncoderId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({:.SHOWN$})", shown_encoder(&self.name), self.digest)
    }
}

/// Returns the name of an encoder for messages to clients: a catalog or hub name as it is, and of a
/// path on this machine the last part.
pub fn shown_encoder(name: &str) -> &str {
    let is_path = name.starts_with(['/', '.']);
    let last = name.trim_end_matches('/').rsplit('/').next();
    last.filter(|last| is_path && !last.is_empty())
        .unwrap_or(name)
}

/// Computes the digest of the encoder in a folder, in lower-case hexadecimal digits.
///
/// Reads all weights: about a second for 500 MB. See [`cached_encoder_digest`].
///
/// # Errors
/// The folder has no encoder that can be loaded.
pub fn encoder_digest(dir: &Path) -> Result<String, EncoderError> {
    let config = EncoderConfig::read(dir)?;
    let mut hasher = Sha256::new();
    update(&mut hasher, LAYOUT.as_bytes());
    update(&mut hasher, config.canonical().as_bytes());
    let tokenizer = Tokenizer::load(dir)?;
    update(&mut hasher, tokenizer.canonical()?.as_bytes());
    let longest = config.max_sequence_length();
    let most = tokenizer.max_length(longest);
    // Only where it cuts texts: digests of other tokenizers stay as they are.
    if most < longest {
        update(&mut hasher, format!("model_max_length {most}").as_bytes());
    }
    let stored = StoredTensors::open(dir)?;
    let mut names = BTreeMap::new();
    for name in stored.names() {
        if let Some(here) = name_here(config.family, name)
            && !config.family.is_head(&here)
            && !here.starts_with("pooler.")
        {
            names.insert(here, name);
        }
    }
    for (here, name) in names {
        let tensor = stored.raw(name)?;
        update(&mut hasher, here.as_bytes());
        update(&mut hasher, format!("{:?}", tensor.dtype).as_bytes());
        update(&mut hasher, format!("{:?}", tensor.shape).as_bytes());
        update(&mut hasher, &tensor.bytes);
    }
    Ok(format!("{:x}", hasher.finalize()))
}

/// Hashes a part with its length, so that parts cannot run into one another.
fn update(hasher: &mut Sha256, part: &[u8]) {
    hasher.update((part.len() as u64).to_le_bytes());
    hasher.update(part);
}

/// Returns the digest of the encoder in a folder, from a file in `cache` if the encoder's files
/// have not changed since it was written there.
///
/// A cache that cannot be read or written costs time only.
///
/// # Errors
/// As of [`encoder_digest`].
pub fn cached_encoder_digest(dir: &Path, cache: &Path) -> Result<String, EncoderError> {
    let Ok(record) = Record::of(dir) else {
        return encoder_digest(dir);
    };
    let path = record.place(cache);
    if let Some(known) = Record::read(&path)
        && known.layout == record.layout
        && known.folder == record.folder
        && known.files == record.files
    {
        return Ok(known.digest);
    }
    let digest = encoder_digest(dir)?;
    // Files that changed while they were read have other times by now.
    if record.is_settled() && Record::of(dir).is_ok_and(|after| after.files == record.files) {
        let record = Record {
            digest: digest.clone(),
            ..record
        };
        if let Err(error) = record.write(&path) {
            tracing::debug!(path = %path.display(), %error, "the digest of an encoder is not cached");
        }
    }
    Ok(digest)
}

/// What the cache knows of a folder.
#[derive(Debug, Deserialize, Serialize)]
struct Record {
    layout: String,
    /// Canonical path, with what is not UTF-8 replaced.
    folder: String,
    /// By file name.
    files: BTreeMap<String, FileState>,
    digest: String,
}

/// What changes when a file is written or replaced. Times are nanoseconds since the epoch.
#[derive(Debug, PartialEq, Eq, Deserialize, Serialize)]
struct FileState {
    bytes: u64,
    modified: i64,
    /// Of the inode, which a program that sets `modified` back cannot set.
    changed: i64,
    inode: u64,
}

impl Record {
    /// Describes the folder as it is now, without its digest.
    fn of(dir: &Path) -> io::Result<Self> {
        let folder = dir.canonicalize()?;
        let mut files = BTreeMap::new();
        for entry in fs::read_dir(&folder)? {
            let path = entry?.path();
            let kind = path.extension().and_then(|kind| kind.to_str());
            if !matches!(kind, Some("json" | "safetensors")) {
                continue;
            }
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            // A link counts as what it leads to.
            files.insert(name.into_owned(), FileState::of(&fs::metadata(&path)?));
        }
        Ok(Self {
            layout: LAYOUT.to_owned(),
            folder: folder.to_string_lossy().into_owned(),
            files,
            digest: String::new(),
        })
    }

    fn place(&self, cache: &Path) -> PathBuf {
        let folder = format!("{:x}", Sha256::digest(&self.folder));
        cache.join("digests").join(format!("{folder:.32}.json"))
    }

    fn read(path: &Path) -> Option<Self> {
        parse::json(&fs::read(path).ok()?).ok()
    }

    fn write(&self, path: &Path) -> io::Result<()> {
        let folder = path.parent().unwrap_or(path);
        fs::create_dir_all(folder)?;
        let mut file = tempfile::NamedTempFile::new_in(folder)?;
        file.write_all(&serde_json::to_vec(self)?)?;
        file.persist(path)?;
        Ok(())
    }

    fn is_settled(&self) -> bool {
        let Ok(now) = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH) else {
            return false;
        };
        let newest = i64::try_from(now.saturating_sub(SETTLED).as_nanos()).unwrap_or(i64::MAX);
        let is_old = |file: &FileState| file.modified < newest && file.changed < newest;
        self.files.values().all(is_old)
    }
}

impl FileState {
    fn of(metadata: &fs::Metadata) -> Self {
        let nanoseconds =
            |seconds: i64, rest: i64| seconds.saturating_mul(1_000_000_000).saturating_add(rest);
        Self {
            bytes: metadata.len(),
            modified: nanoseconds(metadata.mtime(), metadata.mtime_nsec()),
            changed: nanoseconds(metadata.ctime(), metadata.ctime_nsec()),
            inode: metadata.ino(),
        }
    }
}

#[cfg(test)]
mod tests {
    use safetensors::tensor::{Dtype, TensorView};
    use serde_json::{Value, json};

    use super::*;

    fn golden(path: &str) -> PathBuf {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
        golden.join(path)
    }

    /// A copy of a golden encoder with a tokenizer beside it.
    fn encoder(model: &str) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for from in [
            format!("models/{model}/config.json"),
            format!("models/{model}/model.safetensors"),
            "tokenizers/bert/tokenizer.json".to_owned(),
        ] {
            let from = golden(&from);
            fs::copy(&from, folder.path().join(from.file_name().unwrap())).unwrap();
        }
        folder
    }

    fn digest(folder: &tempfile::TempDir) -> String {
        encoder_digest(folder.path()).unwrap()
    }

    /// A tensor by its name in the file.
    struct Stored {
        name: String,
        dtype: Dtype,
        shape: Vec<usize>,
        bytes: Vec<u8>,
    }

    /// Reads all tensors, lets `change` have them, and writes them back in the order it leaves.
    fn change_tensors(folder: &tempfile::TempDir, change: impl FnOnce(&mut Vec<Stored>)) {
        let path = folder.path().join("model.safetensors");
        let file = fs::read(&path).unwrap();
        let read = safetensors::SafeTensors::deserialize(&file).unwrap();
        let mut tensors: Vec<Stored> = read
            .iter()
            .map(|(name, view)| Stored {
                name: name.to_owned(),
                dtype: view.dtype(),
                shape: view.shape().to_vec(),
                bytes: view.data().to_vec(),
            })
            .collect();
        change(&mut tensors);
        let views = tensors.iter().map(|tensor| {
            let view = TensorView::new(tensor.dtype, tensor.shape.clone(), &tensor.bytes);
            (tensor.name.as_str(), view.unwrap())
        });
        fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
    }

    fn change_json(folder: &tempfile::TempDir, file: &str, change: impl FnOnce(&mut Value)) {
        let path = folder.path().join(file);
        let mut json: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        change(&mut json);
        fs::write(path, serde_json::to_vec_pretty(&json).unwrap()).unwrap();
    }

    #[test]
    fn digests_stay_what_they_are() {
        for (model, expected) in [
            (
                "bert-pairs",
                "8025c7477f2158194ba2a00ef997842fe9b8455487b437d186cc08acc8c02b80",
            ),
            (
                "deberta-conv",
                "7cbdcbc62a81c4dbf097e923541003b10f613cee843f812b21afc84461e69195",
            ),
        ] {
            assert_eq!(digest(&encoder(model)), expected, "{model}");
        }
    }

    #[test]
    fn names_formatting_heads_and_padding_play_no_part() {
        let one = encoder("bert-pairs");
        let expected = digest(&one);

        let other = encoder("bert-pairs");
        change_tensors(&other, |tensors| {
            for tensor in tensors.iter_mut() {
                let bare = tensor.name.strip_prefix("bert.").map(str::to_owned);
                tensor.name = match bare {
                    Some(bare) => bare,
                    None => format!("bert.{}", tensor.name),
                };
                tensor.name = tensor.name.replace("LayerNorm.weight", "LayerNorm.gamma");
            }
            tensors.retain(|tensor| !tensor.name.contains("pooler"));
            for name in [
                "classifier.weight",
                "cls.predictions.bias",
                "embeddings.position_ids",
            ] {
                tensors.push(Stored {
                    name: name.to_owned(),
                    dtype: Dtype::F32,
                    shape: vec![1],
                    bytes: vec![1; 4],
                });
            }
        });
        change_json(&other, "config.json", |config| {
            config["id2label"] = json!({"0": "no", "1": "yes"});
            config["torch_dtype"] = json!("float16");
        });
        change_json(&other, "tokenizer.json", |tokenizer| {
            tokenizer["truncation"] = json!({"direction": "Right", "max_length": 8,
                "strategy": "LongestFirst", "stride": 0});
            tokenizer["padding"] = json!({"strategy": "BatchLongest", "direction": "Right",
                "pad_to_multiple_of": null, "pad_id": 0, "pad_type_id": 0, "pad_token": "[PAD]"});
        });
        assert_eq!(digest(&other), expected);
    }

    #[test]
    fn whatever_answers_depend_on_changes_the_digest() {
        let expected = digest(&encoder("bert-pairs"));
        let changed = |change: &dyn Fn(&tempfile::TempDir)| {
            let folder = encoder("bert-pairs");
            change(&folder);
            digest(&folder)
        };
        let first = |tensors: &mut Vec<Stored>| {
            let position = tensors
                .iter()
                .position(|tensor| tensor.name.contains("encoder.layer.0"));
            position.unwrap()
        };
        let digests = [
            changed(&|folder| {
                change_tensors(folder, |tensors| {
                    let first = first(tensors);
                    tensors[first].bytes[3] ^= 0x80;
                });
            }),
            changed(&|folder| {
                change_tensors(folder, |tensors| {
                    let first = first(tensors);
                    tensors[first].shape.reverse();
                    tensors[first].shape.push(1);
                });
            }),
            changed(&|folder| {
                change_tensors(folder, |tensors| {
                    let first = first(tensors);
                    tensors[first].dtype = Dtype::U32;
                });
            }),
            changed(&|folder| {
                change_json(folder, "config.json", |config| {
                    config["layer_norm_eps"] = json!(1e-5);
                });
            }),
            changed(&|folder| {
                let settings = json!({"tokenizer_class": "BertTokenizer", "do_lower_case": false});
                let path = folder.path().join("tokenizer_config.json");
                fs::write(path, settings.to_string()).unwrap();
            }),
            changed(&|folder| {
                let settings =
                    json!({"tokenizer_class": "BertTokenizer", "truncation_side": "left"});
                let path = folder.path().join("tokenizer_config.json");
                fs::write(path, settings.to_string()).unwrap();
            }),
        ];
        let mut all: Vec<_> = digests.iter().chain([&expected]).collect();
        all.sort();
        all.dedup();
        assert_eq!(all.len(), digests.len() + 1, "{digests:?}");
    }

    #[test]
    fn the_cache_is_used_until_a_file_changes() {
        let (folder, cache) = (encoder("bert-pairs"), tempfile::tempdir().unwrap());
        let cached = || cached_encoder_digest(folder.path(), cache.path()).unwrap();
        let expected = digest(&folder);
        assert_eq!(cached(), expected);
        let record = Record::of(folder.path()).unwrap();
        let place = record.place(cache.path());
        assert!(
            !place.exists(),
            "files that were written just now may change unseen"
        );

        // What the cache says is believed as long as the files are the same.
        let known = |digest: &str| Record {
            digest: digest.to_owned(),
            ..Record::of(folder.path()).unwrap()
        };
        known("believed").write(&place).unwrap();
        assert_eq!(cached(), "believed");
        change_tensors(&folder, |tensors| tensors[0].bytes[0] ^= 1);
        assert_eq!(cached(), digest(&folder));
        assert_ne!(cached(), expected);

        known("other layout").write(&place).unwrap();
        let mut stale = Record::read(&place).unwrap();
        stale.layout = "kdlora encoder 0".to_owned();
        stale.write(&place).unwrap();
        assert_eq!(cached(), digest(&folder));
        fs::write(&place, "not JSON").unwrap();
        assert_eq!(cached(), digest(&folder));
    }

    #[test]
    fn a_folder_is_shown_by_its_last_part() {
        for (name, shown) in [
            ("minilm-l6", "minilm-l6"),
            ("mpnet-base@0,5,11", "mpnet-base@0,5,11"),
            (
                "sentence-transformers/all-MiniLM-L6-v2",
                "sentence-transformers/all-MiniLM-L6-v2",
            ),
            ("/srv/models/own/", "own"),
            ("../own@0", "own@0"),
            ("/", "/"),
        ] {
            assert_eq!(shown_encoder(name), shown);
        }
    }
}
