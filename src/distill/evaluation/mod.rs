//! Scores of a model on labelled rows, its likeness to its teacher, and its speed beside it.

mod latency;

pub use latency::{Call, LatencyAt, Quantiles, measure_interleaved};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// The number that a task is judged by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Metric {
    /// Single-label classification.
    Accuracy,
    /// Multi-label classification.
    MacroF1,
    /// Regression: the mean of Pearson's and Spearman's correlation, as STS-B is scored.
    PearsonSpearman,
}

/// The main score with its 95 % bootstrap interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Score {
    pub metric: Metric,
    pub value: f64,
    pub low: f64,
    pub high: f64,
}

/// How well logits match labels. Figures that the kind of task does not have are absent.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Evaluation {
    /// Labelled rows that were scored.
    pub rows: usize,
    pub score: Score,
    /// Share of rows whose class, or whole set of labels, is right.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accuracy: Option<f64>,
    /// Mean F1 of the classes that occur in labels or predictions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub macro_f1: Option<f64>,
    /// F1 of all decisions of a multi-label task together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub micro_f1: Option<f64>,
    /// Matthews correlation coefficient of a single-label task.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mcc: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pearson: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spearman: Option<f64>,
    /// Mean absolute error of a regression, in the unit of the targets.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mean_absolute_error: Option<f64>,
    /// Expected calibration error over 15 bins of confidence.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ece: Option<f64>,
    /// In the order of the label names; empty for a regression.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub classes: Vec<ClassScore>,
    /// `[true class][predicted class]`, for single-label tasks of at most
    /// [`MAX_CONFUSION`] classes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub confusion: Option<Vec<Vec<usize>>>,
}

/// More classes than this, and the confusion matrix is left out of the report.
pub const MAX_CONFUSION: usize = 32;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ClassScore {
    pub label: String,
    pub precision: f64,
    pub recall: f64,
    pub f1: f64,
    /// Rows that have the label.
    pub support: usize,
    /// Rows that were given the label.
    pub predicted: usize,
}

/// How alike student and teacher answer, over all rows, labelled or not.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Likeness {
    /// Share of rows with the same class, or the same set of labels; Pearson's correlation of the
    /// values for a regression.
    pub agreement: f64,
    /// Mean KL(teacher ‖ student) at temperature 1, in nats, summed over the labels of a
    /// multi-label task; absent for a regression.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mean_kl: Option<f64>,
}
