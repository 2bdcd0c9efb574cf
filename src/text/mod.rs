//! Inputs, sequences and packed batches.

mod lookahead;
mod packed;
mod tokenizer;
mod truncation;

pub use packed::{PackedBatch, Sequence};
pub use tokenizer::{Tokenizer, TokenizerError};
pub use tokenizers::TruncationDirection;
pub use truncation::Truncation;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// One text, or a pair of texts, to classify.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Input {
    pub text: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text_pair: Option<String>,
}
