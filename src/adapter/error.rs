//! What can be wrong with an adapter or classifier folder.

use std::path::{Path, PathBuf};

use super::Mismatch;
use crate::encoder::EncoderError;
use crate::lfs::LfsPointer;
use crate::parse::ParseError;

#[derive(Debug, thiserror::Error)]
pub enum AdapterError {
    #[error("cannot {action} {path}", path = .path.display())]
    Io {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("{path} is missing: {hint}", path = .path.display())]
    MissingFile { path: PathBuf, hint: &'static str },
    #[error(
        "{path} is a pickle, which can run code when it is opened; save the adapter as safetensors \
         (in PEFT: save_pretrained(…, safe_serialization=True))",
        path = .path.display()
    )]
    Pickle { path: PathBuf },
    #[error("{path} is not the JSON expected", path = .path.display())]
    Json {
        path: PathBuf,
        #[source]
        source: ParseError,
    },
    #[error("{path}: {problem}", path = .path.display())]
    Config { path: PathBuf, problem: String },
    #[error("{path}: {option} = {value} is not supported: {reason}", path = .path.display())]
    Unsupported {
        path: PathBuf,
        option: String,
        value: String,
        reason: &'static str,
    },
    #[error(
        "the regular expressions of the adapter (target_modules, exclude_modules, rank_pattern, \
         alpha_pattern, layers_pattern) are too many or take too long; use fewer or simpler ones"
    )]
    SlowPatterns,
    #[error("{path} is not a safetensors file", path = .path.display())]
    SafeTensors {
        path: PathBuf,
        #[source]
        source: safetensors::SafeTensorError,
    },
    #[error("tensor {name}: {problem}")]
    Tensor { name: String, problem: String },
    #[error("the adapter holds no LoRA weights")]
    NoLora,
    #[error("{path} exists already and is not empty", path = .0.display())]
    Exists(PathBuf),
    #[error("{path} has no classification head: is it an encoder that is still to be trained?", path = .0.display())]
    NoHead(PathBuf),
    /// The tensor that no shared encoder can carry.
    #[error("the adapter changes {0} of the encoder; it can only be used merged")]
    OnlyMerged(String),
    #[error(
        "the files of the adapter disagree on its encoder: it is {first} or {next}; correct \
         base_model_name_or_path in adapter_config.json"
    )]
    BaseContradiction { first: String, next: String },
    #[error("{file} is damaged on the disk: {problem}; restore it from a backup")]
    Damaged { file: String, problem: String },
    /// It belongs to another encoder, whatever the shapes.
    #[error("the adapter belongs to another encoder")]
    OtherEncoder(#[from] Mismatch),
    #[error("the adapter does not fit the encoder: {0}")]
    Mismatch(String),
    #[error(transparent)]
    LfsPointer(#[from] LfsPointer),
    #[error(transparent)]
    Encoder(#[from] EncoderError),
    #[error("a tensor operation failed")]
    Candle(#[from] candle_core::Error),
}

impl AdapterError {
    /// For `map_err` of a file operation on `path`.
    pub(super) fn io(
        action: &'static str,
        path: impl AsRef<Path>,
    ) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.as_ref().to_path_buf();
        move |source| Self::Io {
            action,
            path,
            source,
        }
    }

    pub(super) fn tensor(name: &str, problem: impl Into<String>) -> Self {
        Self::Tensor {
            name: name.to_owned(),
            problem: problem.into(),
        }
    }

    pub(super) fn config(path: &Path, problem: impl Into<String>) -> Self {
        Self::Config {
            path: path.to_path_buf(),
            problem: problem.into(),
        }
    }
}
