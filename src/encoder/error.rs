//! What can be wrong with an encoder's files or its input.

use std::path::PathBuf;

use crate::parse::ParseError;

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
    #[error("{path} holds weights as pickle, which can run code; convert them to safetensors", path = .path.display())]
    Pickle { path: PathBuf },
    #[error("{0}")]
    Unsupported(String),
    #[error("the weight {name} is missing")]
    MissingWeight { name: String },
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
        "the head needs {name}, and neither the task nor the encoder's folder has it; PEFT stores \
         it if modules_to_save names it"
    )]
    MissingHeadDense { name: &'static str },
    #[error("a sequence of {tokens} tokens; the encoder takes 1 to {limit}")]
    SequenceLength { tokens: usize, limit: usize },
    #[error("segments must cover the batch's sequences in order")]
    Segments,
    #[error(transparent)]
    Compute(#[from] candle_core::Error),
}
