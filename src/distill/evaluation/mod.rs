//! Scores of a model on labelled rows, its likeness to its teacher, and its speed beside it.

mod answers;
mod bootstrap;
mod calibration;
mod correlation;
mod counts;
mod difference;
mod latency;
mod likeness;

pub use calibration::{Calibration, calibrate};
pub use difference::{Difference, MAX_DIFFERENCES, MAX_SHOWN_CHARS, Opinion, greatest_differences};
pub use latency::{Call, LatencyAt, Quantiles, measure_in_turns, measure_interleaved, quantiles};
pub use likeness::{Likeness, likeness, teacher_answers};

use std::fmt;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use self::answers::Answers;
use super::dataset::Label;
use crate::adapter::ProblemType;

/// The number that a task is judged by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Metric {
    /// Share of rows whose class, or whole set of labels, is right.
    Accuracy,
    /// F1 of the second of two classes, as MRPC and QQP are scored.
    F1,
    /// Matthews correlation coefficient of classes, as CoLA is scored.
    Mcc,
    /// Mean F1 of the labels that occur in truth or answers.
    MacroF1,
    /// The mean of Pearson's and Spearman's correlation, as STS-B is scored.
    PearsonSpearman,
}

impl Metric {
    /// What a kind of task is scored by where nothing else is said.
    pub fn of(problem_type: ProblemType) -> Self {
        match problem_type {
            ProblemType::SingleLabelClassification => Self::Accuracy,
            ProblemType::MultiLabelClassification => Self::MacroF1,
            ProblemType::Regression => Self::PearsonSpearman,
        }
    }

    /// Whether a task of this kind with so many labels can be scored by it.
    pub fn suits(self, problem_type: ProblemType, labels: usize) -> bool {
        use ProblemType::{Regression, SingleLabelClassification};
        match self {
            Self::Accuracy | Self::MacroF1 => problem_type != Regression,
            Self::F1 => problem_type == SingleLabelClassification && labels == 2,
            Self::Mcc => problem_type == SingleLabelClassification,
            Self::PearsonSpearman => problem_type == Regression,
        }
    }
}

impl fmt::Display for Metric {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Accuracy => "accuracy",
            Self::F1 => "F1",
            Self::Mcc => "MCC",
            Self::MacroF1 => "macro-F1",
            Self::PearsonSpearman => "mean of Pearson and Spearman",
        })
    }
}

/// What answers are scored as, and by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scoring {
    pub problem_type: ProblemType,
    /// One that suits the kind of task.
    pub metric: Metric,
}

impl Scoring {
    /// By what a kind of task is scored by where nothing else is said.
    pub fn of(problem_type: ProblemType) -> Self {
        Self {
            problem_type,
            metric: Metric::of(problem_type),
        }
    }
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
    /// F1 of the second of two classes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub f1: Option<f64>,
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
    /// What a temperature fitted on the validation rows makes of the calibration error.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub calibration: Option<Calibration>,
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

/// Why logits cannot be scored. All of them are errors of the program or of the teacher that made
/// the logits, except a model whose training has diverged.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum EvaluationError {
    #[error("{logits} rows of logits for {labels} rows")]
    Rows { logits: usize, labels: usize },
    #[error("row {row} has {found} logits instead of {expected}")]
    Width {
        row: usize,
        found: usize,
        expected: usize,
    },
    #[error(
        "the logits of row {row} are not finite numbers; the model has diverged, a lower learning \
         rate may help"
    )]
    NotFinite { row: usize },
    #[error("the label of row {row} does not fit a {problem_type} of {labels} labels")]
    Label {
        row: usize,
        problem_type: ProblemType,
        labels: usize,
    },
    #[error("no row has a label to score against")]
    NoLabels,
}

/// Scores logits (`[rows][labels]`) against labels. Rows without a label are passed over.
///
/// The answer of a single-label task is its greatest logit, the first of equals; a label of a
/// multi-label task is given where its logit is above 0; the value of a regression is its logit.
/// A ratio whose denominator is 0 counts as 0, as does a correlation with a constant. The interval
/// is the 95 % percentile interval of 1,000 resamples of the rows, drawn with `seed`.
pub fn evaluate(
    scoring: Scoring,
    label_names: &[String],
    logits: &[Vec<f32>],
    labels: &[Option<&Label>],
    seed: u64,
) -> Result<Evaluation, EvaluationError> {
    let Scoring {
        problem_type,
        metric,
    } = scoring;
    check_logits(logits, labels.len(), label_names.len())?;
    let rows = labelled(logits, labels);
    let answers = Answers::new(problem_type, label_names.len(), &rows)?;
    let mut evaluation = answers.evaluation(metric, label_names, seed);
    evaluation.ece = calibration::expected_error(problem_type, &rows, 1.0);
    Ok(evaluation)
}

/// Scores the most common answer of the training rows, given to every test row: the class, each
/// label that more than half of the rows have, or the mean target.
pub fn majority(
    scoring: Scoring,
    label_names: &[String],
    train: &[Option<&Label>],
    test: &[Option<&Label>],
    seed: u64,
) -> Result<Evaluation, EvaluationError> {
    let train: Vec<&Label> = train.iter().copied().flatten().collect();
    if train.is_empty() {
        return Err(EvaluationError::NoLabels);
    }
    let logits = answers::constant_logits(scoring.problem_type, label_names.len(), &train);
    let logits = vec![logits; test.len()];
    let mut evaluation = evaluate(scoring, label_names, &logits, test, seed)?;
    // A constant has no confidence to be right or wrong about.
    evaluation.ece = None;
    Ok(evaluation)
}

/// The 95 % bootstrap interval of a weighted sum of scores of models on the same rows: of their
/// mean, or of the difference of two. Each resample draws the same rows for all of them.
///
/// `models` are weights and logits, `[rows][labels]`.
pub fn interval_of_sum(
    scoring: Scoring,
    label_names: &[String],
    models: &[(f64, &[Vec<f32>])],
    labels: &[Option<&Label>],
    seed: u64,
) -> Result<(f64, f64), EvaluationError> {
    let mut rows = 0;
    let mut terms = Vec::with_capacity(models.len());
    for (weight, logits) in models {
        check_logits(logits, labels.len(), label_names.len())?;
        let labelled = labelled(logits, labels);
        rows = labelled.len();
        terms.push((
            *weight,
            Answers::new(scoring.problem_type, label_names.len(), &labelled)?,
        ));
    }
    Ok(bootstrap::interval(rows, seed, |drawn| {
        terms
            .iter()
            .map(|(weight, answers)| weight * answers.score(scoring.metric, drawn))
            .sum()
    }))
}

/// A row with its label: place among all rows, logits, label.
type Labelled<'a> = (usize, &'a [f32], &'a Label);

fn labelled<'a>(logits: &'a [Vec<f32>], labels: &[Option<&'a Label>]) -> Vec<Labelled<'a>> {
    logits
        .iter()
        .zip(labels)
        .enumerate()
        .filter_map(|(row, (logits, label))| Some((row, logits.as_slice(), (*label)?)))
        .collect()
}

fn check_logits(logits: &[Vec<f32>], rows: usize, expected: usize) -> Result<(), EvaluationError> {
    if logits.len() != rows {
        return Err(EvaluationError::Rows {
            logits: logits.len(),
            labels: rows,
        });
    }
    for (row, logits) in logits.iter().enumerate() {
        if logits.len() != expected {
            return Err(EvaluationError::Width {
                row,
                found: logits.len(),
                expected,
            });
        }
        if !logits.iter().all(|logit| logit.is_finite()) {
            return Err(EvaluationError::NotFinite { row });
        }
    }
    Ok(())
}

/// The class of the greatest logit, the first of equals.
fn greatest(logits: &[f32]) -> usize {
    let mut best = 0;
    for (class, logit) in logits.iter().enumerate() {
        if *logit > logits[best] {
            best = class;
        }
    }
    best
}

/// The labels whose logit is above 0.
fn given(logits: &[f32]) -> Vec<usize> {
    (0..logits.len()).filter(|&i| logits[i] > 0.0).collect()
}

#[cfg(test)]
mod tests;
