//! What was found while reading a data set, for the report and for error messages.

use std::fmt;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{Dataset, FEW_TEST_ROWS, FEW_VALIDATION_ROWS, Label, Row, splits};
use crate::adapter::ProblemType;

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
    /// Counts the rows of each class over all splits, in the order of the label names.
    pub(super) fn classes(&self) -> Vec<ClassCount> {
        let mut all = self.train.classes.clone();
        for split in [&self.validation, &self.test] {
            for (class, more) in all.iter_mut().zip(&split.classes) {
                class.rows += more.rows;
            }
        }
        all
    }

    pub fn split(&self, split: Split) -> &SplitChecks {
        match split {
            Split::Train => &self.train,
            Split::Validation => &self.validation,
            Split::Test => &self.test,
        }
    }

    pub fn split_mut(&mut self, split: Split) -> &mut SplitChecks {
        match split {
            Split::Train => &mut self.train,
            Split::Validation => &mut self.validation,
            Split::Test => &mut self.test,
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

/// Counts the rows of one split.
pub(super) fn count(rows: &[Row], task_kind: ProblemType, label_names: &[String]) -> SplitChecks {
    let mut classes = vec![0usize; label_names.len()];
    let mut values = Vec::new();
    for label in rows.iter().filter_map(|row| row.label.as_ref()) {
        match label {
            Label::Class(class) => classes[*class] += 1,
            Label::Labels(labels) => labels.iter().for_each(|&label| classes[label] += 1),
            Label::Value(value) => values.push(*value),
        }
    }
    let classes = match task_kind {
        ProblemType::Regression => Vec::new(),
        _ => label_names
            .iter()
            .zip(classes)
            .map(|(label, rows)| ClassCount {
                label: label.clone(),
                rows,
            })
            .collect(),
    };
    SplitChecks {
        rows: rows.len(),
        labelled: rows.iter().filter(|row| row.label.is_some()).count(),
        with_teacher_logits: rows
            .iter()
            .filter(|row| row.teacher_logits.is_some())
            .count(),
        duplicates: splits::count_duplicates(rows),
        classes,
        targets: TargetRange::of(&values),
        truncated: None,
    }
}

impl TargetRange {
    fn of(values: &[f32]) -> Option<Self> {
        let sum: f64 = values.iter().map(|&value| f64::from(value)).sum();
        Some(Self {
            min: values.iter().copied().reduce(f32::min)?,
            mean: (sum / values.len() as f64) as f32,
            max: values.iter().copied().reduce(f32::max)?,
        })
    }
}

/// Columns of row numbers, which hold neither texts nor labels. In lower case; pandas has no name
/// for its own.
const ROW_NUMBERS: [&str; 6] = ["", "id", "idx", "index", "unnamed: 0", "__index_level_0__"];

/// What to say of columns that are not read and may hold a text or a label; `None` if there are
/// none.
pub(super) fn ignored_columns<'a>(fields: impl IntoIterator<Item = &'a String>) -> Option<String> {
    let may_matter = |field: &&String| !ROW_NUMBERS.contains(&field.to_lowercase().as_str());
    let fields: Vec<String> = fields
        .into_iter()
        .filter(may_matter)
        .map(|field| format!("\"{field}\""))
        .collect();
    (!fields.is_empty()).then(|| {
        format!(
            "columns that are not read: {}; if one holds the text or the label, name it in \
             \"data.columns\"",
            fields.join(", ")
        )
    })
}

/// What may spoil the result though the pass can run.
pub(super) fn warnings(dataset: &Dataset, trained_teacher: bool) -> Vec<String> {
    let checks = &dataset.checks;
    let mut warnings = Vec::new();
    let untaught: Vec<&str> = checks
        .train
        .classes
        .iter()
        .filter(|class| class.rows == 0)
        .map(|class| class.label.as_str())
        .take(5)
        .collect();
    if !untaught.is_empty() && checks.train.labelled > 0 && !trained_teacher {
        warnings.push(format!(
            "no training row has the label \"{}\", so the model cannot learn it",
            untaught.join("\", \"")
        ));
    }
    match checks.test.labelled {
        0 => warnings.push(
            "no test row has a label, so only the likeness to the teacher can be judged".into(),
        ),
        rows if rows < FEW_TEST_ROWS => warnings.push(format!(
            "the test split has only {rows} labelled rows, so its scores are uncertain"
        )),
        _ => {}
    }
    let tested = checks.test.classes.iter().filter(|class| class.rows > 0);
    if checks.test.labelled > 0
        && dataset.task_kind == ProblemType::SingleLabelClassification
        && tested.count() == 1
    {
        warnings.push("all test rows have the same label, so any constant answer scores 1".into());
    }
    let pairs = dataset.rows().filter(|row| row.input.text_pair.is_some());
    let pairs = pairs.count();
    if pairs > 0 && pairs < dataset.len() {
        warnings.push(format!(
            "{pairs} of {} rows are pairs and the others single texts",
            dataset.len()
        ));
    }
    warnings
}

/// What to say of a teacher that scores so much better on the training rows than on the validation
/// rows that it must have learnt their labels: its answers then teach the student little that the
/// labels do not. Scores are at most 1.
pub(in crate::distill) fn repeated_labels(
    checks: &DataChecks,
    train: f64,
    validation: f64,
) -> Option<String> {
    let SplitChecks { rows, labelled, .. } = checks.train;
    let mostly_labelled = rows - labelled < labelled;
    let enough_rows = checks.validation.labelled >= FEW_VALIDATION_ROWS;
    let half_the_errors = 1.0 - train <= 0.5 * (1.0 - validation);
    (mostly_labelled && enough_rows && validation < 1.0 && half_the_errors).then(|| {
        format!(
            "the teacher scores {train:.3} on the training rows and {validation:.3} on the \
             validation rows, so it has learnt the former's labels and its answers add little to \
             them; texts of the same kind without labels would teach the student more"
        )
    })
}
