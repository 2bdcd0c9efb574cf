//! What kind of answer a task gives.

use std::fmt;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Hugging Face's `problem_type`, with its spelling in `config.json`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ProblemType {
    /// One of several classes: softmax over the logits.
    SingleLabelClassification,
    /// Any number of labels at once: a sigmoid each.
    MultiLabelClassification,
    /// One number: the logit itself.
    Regression,
}

impl ProblemType {
    /// Returns what a `config.json` without a `problem_type` means by this many labels.
    pub fn of_labels(labels: usize) -> Self {
        match labels {
            1 => Self::Regression,
            _ => Self::SingleLabelClassification,
        }
    }
}

impl fmt::Display for ProblemType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::SingleLabelClassification => "single-label classification",
            Self::MultiLabelClassification => "multi-label classification",
            Self::Regression => "regression",
        })
    }
}
