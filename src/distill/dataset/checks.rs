//! What was found while reading a data set, for the report and for error messages.

use std::fmt;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// The three parts of a data set.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, ToSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum Split {
    Train,
    Validation,
    Test,
}

impl Split {
    pub const ALL: [Self; 3] = [Self::Train, Self::Validation, Self::Test];
}

impl fmt::Display for Split {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Train => "train",
            Self::Validation => "validation",
            Self::Test => "test",
        })
    }
}

/// What the reader noticed. None of it stopped the pass; what stops it is a
/// [`DataError`](super::DataError).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct DataChecks {
    pub train: SplitChecks,
    pub validation: SplitChecks,
    pub test: SplitChecks,
    /// Splits that were not given and were cut from the training rows.
    pub cut_from_train: Vec<Split>,
    /// Rows taken out because the same text stands in a split that is judged later: train rows
    /// that stand in validation or test, validation rows that stand in test.
    pub overlap_removed: usize,
    /// Distinct texts that occur with different labels.
    pub conflicting_labels: usize,
    /// Rows that were left out, over all splits.
    pub rejected: usize,
    /// The first of them, at most [`MAX_REJECTIONS`](super::MAX_REJECTIONS).
    pub rejections: Vec<Rejection>,
    /// Fields that no part of the program reads.
    pub ignored_fields: Vec<String>,
    /// Sentences for the user about what may spoil the result.
    pub warnings: Vec<String>,
}

impl DataChecks {
    pub fn split(&self, split: Split) -> &SplitChecks {
        match split {
            Split::Train => &self.train,
            Split::Validation => &self.validation,
            Split::Test => &self.test,
        }
    }
}

/// Counts over the rows of one split that are used.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct SplitChecks {
    pub rows: usize,
    pub labelled: usize,
    /// Rows that bring their own teacher logits.
    pub with_teacher_logits: usize,
    /// Rows whose text stands in an earlier row of the split too.
    pub duplicates: usize,
    /// Rows of each class, in the order of the label names; empty for a regression.
    pub classes: Vec<ClassCount>,
    /// Range of the targets of a regression.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub targets: Option<TargetRange>,
    /// Share of the rows that the tokenizer cut to the greatest length; known once they have been
    /// tokenised.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub truncated: Option<f64>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ClassCount {
    pub label: String,
    pub rows: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct TargetRange {
    pub min: f32,
    pub mean: f32,
    pub max: f32,
}

/// A row that was left out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Rejection {
    pub split: Split,
    /// Line of the file, or place in the list of inline rows; counted from 1.
    pub line: usize,
    pub reason: String,
}

impl fmt::Display for Rejection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} row {}: {}", self.split, self.line, self.reason)
    }
}
