//! The rows that a pass learns from and is judged by: read, checked, split.

mod checks;

pub use checks::{ClassCount, DataChecks, Rejection, Split, SplitChecks, TargetRange};

use crate::adapter::ProblemType;
use crate::text::Input;

/// Rejected rows that are kept with their reason; further ones are only counted.
pub const MAX_REJECTIONS: usize = 20;

/// One example.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// Place in train ++ validation ++ test: ids are `0..dataset.len()`, each used once.
    pub id: usize,
    pub input: Input,
    pub label: Option<Label>,
    /// Logits that came with the data, `[labels]` in the order of the label names.
    pub teacher_logits: Option<Vec<f32>>,
}

/// The right answer for a row.
#[derive(Clone, Debug, PartialEq)]
pub enum Label {
    /// Index into the label names.
    Class(usize),
    /// Ascending indexes into the label names, possibly none.
    Labels(Vec<usize>),
    /// Target of a regression; finite.
    Value(f32),
}

/// What is known of a task before its data is read: that its teacher is a trained classifier.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KnownTask {
    pub problem_type: ProblemType,
    /// In the order of the teacher's logits; one name for a regression.
    pub labels: Vec<String>,
}

/// What stands behind the rows' labels.
#[derive(Clone, Copy, Debug)]
pub enum Teacher<'a> {
    /// There is none: every training row needs a label.
    None,
    /// An encoder that is fine-tuned on the labelled rows first: some rows need a label.
    Untrained,
    /// A classifier: no row needs a label.
    Trained(&'a KnownTask),
}

/// A data set whose rows all fit one kind of task.
#[derive(Clone, Debug, PartialEq)]
pub struct Dataset {
    pub task_kind: ProblemType,
    /// Names of the classes in the order of the logits: the teacher's if it is trained, else those
    /// of the spec, else sorted (by value if all are whole numbers). One name for a regression.
    pub label_names: Vec<String>,
    pub train: Vec<Row>,
    pub validation: Vec<Row>,
    pub test: Vec<Row>,
    pub checks: DataChecks,
}

impl Dataset {
    /// Rows of all splits.
    pub fn len(&self) -> usize {
        self.train.len() + self.validation.len() + self.test.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// All rows in the order of their ids.
    pub fn rows(&self) -> impl Iterator<Item = &Row> {
        self.train.iter().chain(&self.validation).chain(&self.test)
    }

    pub fn split(&self, split: Split) -> &[Row] {
        match split {
            Split::Train => &self.train,
            Split::Validation => &self.validation,
            Split::Test => &self.test,
        }
    }
}
