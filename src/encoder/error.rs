//! What can be wrong with an encoder's files or its input.

use std::path::{Path, PathBuf};

use super::stored::{WEIGHTS, WEIGHTS_INDEX};
use crate::lfs::LfsPointer;

use crate::parse::ParseError;
use crate::text::TokenizerError;

#[derive(Debug, thiserror::Error)]
pub enum EncoderError {
    #[error("cannot read {path}", path = .path.display())]
    Read {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("{path} is not a valid model configuration", path = .path.display())]
    Config {
        path: PathBuf,
        #[source]
        source: ParseError,
    },
    #[error(
        "{path} holds weights as pickle, which can run code; convert them to safetensors with \
         Python: {}",
        conversion(folder_of(path)),
        path = .path.display()
    )]
    Pickle { path: PathBuf },
    #[error(
        "{WEIGHTS} is missing in {folder}, and so is {WEIGHTS_INDEX}; weights in another format \
         can be converted with Python: {}",
        conversion(folder),
        folder = .folder.display()
    )]
    NoWeights { folder: PathBuf },
    #[error("{path} cannot be used: {problem}", path = .path.display())]
    Index { path: PathBuf, problem: String },
    #[error(transparent)]
    LfsPointer(#[from] LfsPointer),
    #[error("{0}")]
    Unsupported(String),
    #[error("the weight {name} is missing")]
    MissingWeight { name: String },
    #[error(
        "{folder}: the weight {name} has values that are not finite (NaN or infinity): the model \
         was damaged, or its training diverged",
        folder = .folder.display()
    )]
    NotFinite { folder: PathBuf, name: String },
    #[error("the weight {name} has shape {found:?}, expected {expected:?}")]
    WeightShape {
        name: String,
        found: Vec<usize>,
        expected: Vec<usize>,
    },
    #[error("the encoder has no linear {name}")]
    UnknownLinear { name: String },
    #[error("head weights that no {family} head has: {names}")]
    UnusedHeadWeights { family: &'static str, names: String },
    #[error(
        "the classification head is missing: there is no {name}.weight. PEFT stores the head of an \
         adapter if its configuration has task_type \"SEQ_CLS\", or names \"classifier\" in \
         modules_to_save"
    )]
    MissingHead { name: &'static str },
    #[error(
        "the head needs {name}, and neither the task nor the encoder's folder has it; PEFT stores \
         it if modules_to_save names it"
    )]
    MissingHeadDense { name: &'static str },
    #[error("a sequence of {tokens} tokens; the encoder takes 1 to {limit}")]
    SequenceLength { tokens: usize, limit: usize },
    #[error("segments must cover the batch's sequences in order")]
    Segments,
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    #[error(transparent)]
    Compute(#[from] candle_core::Error),
}

fn folder_of(path: &Path) -> &Path {
    path.parent().unwrap_or(path)
}

/// Python code that writes the weights of `folder` as safetensors. The class matters: `AutoModel`
/// leaves a classification head out without a word.
fn conversion(folder: &Path) -> String {
    let folder = folder.display();
    format!(
        "`from transformers import AutoModelForSequenceClassification as Model; \
         Model.from_pretrained(\"{folder}\").save_pretrained(\"{folder}\")` for a classifier, \
         the same with `AutoModel` for an encoder without a classification head"
    )
}
