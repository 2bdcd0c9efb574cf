//! The rows that a pass learns from and is judged by: read, checked, split.
//!
//! A row is `{"text", "text_pair"?, "label"?, "teacher_logits"?}`, the names of which a request or a
//! [`Preset`] may change. Files are JSON Lines (`.jsonl`, `.ndjson`, `.json`), CSV as in RFC 4180
//! (`.csv`), TSV without quoting (`.tsv`) or Parquet (`.parquet`); the first line of a table names
//! its columns, an empty cell is an absent field, and lists are written as JSON. Files are read row
//! by row.
//!
//! What can be read in two ways is either an error that says what to do, or a sentence in
//! [`DataChecks::warnings`]; nothing is reinterpreted in silence.

mod checks;
mod class_names;
mod columns;
mod error;
mod fields;
mod meaning;
mod names;
mod parquet;
mod preset;
mod read;
mod read_table;
mod signature;
mod splits;
mod table;
mod weights;

use std::borrow::Cow;
use std::path::Path;

use sha2::{Digest as _, Sha256};

pub(in crate::distill) use checks::repeated_labels;
pub use checks::{ClassCount, DataChecks, Rejection, Split, SplitChecks, TargetRange};
pub(in crate::distill) use columns::shared_column;
pub use error::{DataError, KnownBy, Origin};
pub use preset::{Preset, PresetFiles};

use self::columns::Columns;
use self::meaning::Meaning;
use self::read::{RawRow, RawSplit};
use super::evaluation::{Metric, Scoring};
use super::spec::{DataSpec, SplitSpec};
use crate::adapter::{ProblemType, TaskConfig};
use crate::text::Input;

/// Greatest size of a data file.
pub const MAX_FILE_BYTES: u64 = 1 << 30;
/// Greatest number of rows of a split.
pub const MAX_ROWS: usize = 2_000_000;
/// Greatest size of one row; a longer one is rejected, and its rest is not kept in memory.
pub const MAX_ROW_BYTES: usize = 1 << 20;
/// Greatest number of columns of a table.
pub const MAX_COLUMNS: usize = 10_000;
/// Greatest number of classes.
pub const MAX_LABELS: usize = 1_000;
/// Greatest length of a label's name.
pub const MAX_LABEL_BYTES: usize = 200;
/// Rejected rows that are kept with their reason; further ones are only counted.
pub const MAX_REJECTIONS: usize = 20;
/// Share of the training rows that a missing split is cut with.
pub const CUT_SHARE: f64 = 0.1;
/// Greatest number of rows of a split that is cut.
pub const MAX_CUT: usize = 2_000;
/// Fewer labelled test rows than this leave the score uncertain by several points.
const FEW_TEST_ROWS: usize = 200;

/// With fewer labelled validation rows, nothing is concluded from a teacher's score on them.
const FEW_VALIDATION_ROWS: usize = 50;

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

/// The labels of rows, as [`evaluate`](super::evaluation::evaluate) takes them.
pub fn labels(rows: &[Row]) -> Vec<Option<&Label>> {
    rows.iter().map(|row| row.label.as_ref()).collect()
}

/// Whether the name of a file says that it is Parquet.
pub fn is_parquet(path: &Path) -> bool {
    read::Format::of(path) == Some(read::Format::Parquet)
}

/// SHA-256 of rows with their labels, in hexadecimal digits.
pub fn digest(rows: &[Row]) -> String {
    let mut digest = Sha256::new();
    for row in rows {
        // The debug form tells all parts apart, and is the same for equal rows.
        digest.update(format!("{:?} {:?}\n", row.input, row.label));
    }
    format!("{:x}", digest.finalize())
}

/// What is known of a task before its data is read: that its teacher is a trained classifier.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KnownTask {
    pub problem_type: ProblemType,
    /// In the order of the teacher's logits; one name for a regression.
    pub labels: Vec<String>,
}

impl KnownTask {
    /// What a trained classifier answers.
    pub fn of(task: &TaskConfig) -> Self {
        Self {
            problem_type: task.problem_type,
            labels: task.labels.clone(),
        }
    }
}

/// What stands behind the rows' labels.
#[derive(Clone, Copy, Debug)]
pub enum Teacher<'a> {
    /// There is none: every row needs a label, or logits of its own.
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
    /// of the request, else sorted (by value if all are whole numbers). One name for a regression.
    pub label_names: Vec<String>,
    /// What the task is scored by.
    pub metric: Metric,
    /// How much each label counts in the task loss, `[labels]`; `None` if all count alike.
    pub class_weights: Option<Vec<f32>>,
    pub train: Vec<Row>,
    pub validation: Vec<Row>,
    pub test: Vec<Row>,
    pub checks: DataChecks,
}

impl Dataset {
    /// Reads, checks and splits the rows of a request. The same `seed` cuts the same splits.
    ///
    /// Rows that cannot be used are left out and named in [`checks`](Self::checks); more than one
    /// in ten of a split is an error. Train rows whose input also stands in validation or test
    /// are removed, likewise validation rows that stand in test. Rows with the same input are
    /// otherwise kept, and go into the same split when splits are cut.
    pub fn load(spec: &DataSpec, seed: u64, teacher: Teacher<'_>) -> Result<Self, DataError> {
        let spec = &*with_preset(spec)?;
        let columns = Columns::of(spec);
        let given = [
            Some(&spec.train),
            spec.validation.as_ref(),
            spec.test.as_ref(),
        ];
        let mut raw = Vec::new();
        for (split, given) in Split::ALL.into_iter().zip(given) {
            if let Some(given) = given {
                raw.push(read::read(split, given, &columns)?);
                limit_rejections(&raw[raw.len() - 1])?;
            }
        }
        let meaning = meaning::resolve(&mut raw, spec, teacher)?;
        let mut dataset = Self::empty(&meaning, spec)?;
        let mut warnings: Vec<String> = Vec::new();
        warnings.extend(raw.iter_mut().filter_map(|split| split.warning.take()));
        warnings.dedup();
        warnings.extend(meaning.warning.clone());
        for split in raw {
            dataset.add_split(split, &meaning, teacher)?;
        }
        dataset.check_training_labels(teacher)?;
        dataset.part_splits(seed)?;
        dataset.check_variety()?;
        dataset.class_weights = weights::resolve(spec.class_weights.as_ref(), &dataset)?;
        dataset.number_rows();
        dataset.count();
        if !columns.are_chosen() {
            warnings.extend(checks::ignored_columns(&dataset.checks.ignored_fields));
        }
        warnings.extend(names::warnings(
            &dataset.checks.classes(),
            meaning.names_are_given,
        ));
        let trained = matches!(teacher, Teacher::Trained(_));
        warnings.extend(checks::warnings(&dataset, trained));
        dataset.checks.warnings = warnings;
        Ok(dataset)
    }

    fn empty(meaning: &Meaning, spec: &DataSpec) -> Result<Self, DataError> {
        let problem_type = meaning.task_kind;
        let metric = spec.metric.unwrap_or(Metric::of(problem_type));
        if !metric.suits(problem_type, meaning.names.len()) {
            return Err(DataError::Metric {
                problem_type,
                metric,
            });
        }
        Ok(Self {
            task_kind: meaning.task_kind,
            label_names: meaning.names.clone(),
            metric,
            class_weights: None,
            train: Vec::new(),
            validation: Vec::new(),
            test: Vec::new(),
            checks: DataChecks::default(),
        })
    }

    /// What answers are scored as, and by.
    pub fn scoring(&self) -> Scoring {
        Scoring {
            problem_type: self.task_kind,
            metric: self.metric,
        }
    }

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

    fn split_mut(&mut self, split: Split) -> &mut Vec<Row> {
        match split {
            Split::Train => &mut self.train,
            Split::Validation => &mut self.validation,
            Split::Test => &mut self.test,
        }
    }

    fn add_split(
        &mut self,
        mut raw: RawSplit,
        meaning: &Meaning,
        teacher: Teacher<'_>,
    ) -> Result<(), DataError> {
        let split = raw.origin.split;
        let mut rows = Vec::with_capacity(raw.rows.len());
        for row in std::mem::take(&mut raw.rows) {
            let line = row.line;
            match finish_row(row, meaning, teacher) {
                Ok(row) => rows.push(row),
                Err(reason) => raw.rejected.add(split, line, reason),
            }
        }
        raw.rejected.first.sort_by_key(|rejection| rejection.line);
        *self.split_mut(split) = rows;
        limit_rejections_of(&raw, self.split(split).len())?;
        self.checks.rejected += raw.rejected.count;
        self.checks.rejections.extend(raw.rejected.first);
        self.checks.rejections.truncate(MAX_REJECTIONS);
        for field in raw.ignored_fields {
            if !self.checks.ignored_fields.contains(&field) {
                self.checks.ignored_fields.push(field);
            }
        }
        Ok(())
    }

    fn check_training_labels(&self, teacher: Teacher<'_>) -> Result<(), DataError> {
        let labelled = self.train.iter().any(|row| row.label.is_some());
        match teacher {
            Teacher::Untrained if !labelled => Err(DataError::NoTrainingLabels),
            _ => Ok(()),
        }
    }

    /// Removes overlap and cuts what is missing.
    fn part_splits(&mut self, seed: u64) -> Result<(), DataError> {
        self.checks.conflicting_labels = splits::count_conflicts(self.rows());
        let given: Vec<Split> = Split::ALL
            .into_iter()
            .filter(|&split| !self.split(split).is_empty())
            .collect();
        let removed = splits::remove_overlap(&mut self.validation, &self.test)
            + splits::remove_overlap(&mut self.train, &self.test)
            + splits::remove_overlap(&mut self.train, &self.validation);
        self.checks.overlap_removed = removed;
        if let Some(&split) = given.iter().find(|&&split| self.split(split).is_empty()) {
            return Err(DataError::AllOverlap { split });
        }
        let missing: Vec<Split> = Split::ALL
            .into_iter()
            .filter(|split| !given.contains(split))
            .collect();
        let parts = splits::cut(&mut self.train, &missing, seed)?;
        for (&split, rows) in missing.iter().zip(parts) {
            *self.split_mut(split) = rows;
        }
        self.checks.cut_from_train = missing;
        Ok(())
    }

    /// A model can only learn what differs among the labels.
    fn check_variety(&self) -> Result<(), DataError> {
        let mut labels = self.train.iter().filter_map(|row| row.label.as_ref());
        let Some(first) = labels.next() else {
            return Ok(());
        };
        if labels.any(|label| label != first) {
            return Ok(());
        }
        match first {
            Label::Class(class) => Err(DataError::OneClass {
                name: self.label_names[*class].clone(),
            }),
            Label::Labels(labels) => Err(DataError::OneClass {
                name: labels
                    .iter()
                    .map(|&label| self.label_names[label].as_str())
                    .collect::<Vec<_>>()
                    .join(", "),
            }),
            Label::Value(value) => Err(DataError::OneTarget { value: *value }),
        }
    }

    fn number_rows(&mut self) {
        let rows = self
            .train
            .iter_mut()
            .chain(&mut self.validation)
            .chain(&mut self.test);
        for (id, row) in rows.enumerate() {
            row.id = id;
        }
    }

    fn count(&mut self) {
        for split in Split::ALL {
            let counts = checks::count(self.split(split), self.task_kind, &self.label_names);
            *self.checks.split_mut(split) = counts;
        }
    }
}

/// The request with what its preset stands for filled in.
fn with_preset(spec: &DataSpec) -> Result<Cow<'_, DataSpec>, DataError> {
    let Some(preset) = spec.preset else {
        return Ok(Cow::Borrowed(spec));
    };
    let mut spec = spec.clone();
    if let SplitSpec::Path(path) = &spec.train
        && path.is_dir()
    {
        let files = preset
            .files(path)
            .map_err(|source| DataError::PresetFiles {
                path: path.clone(),
                source,
            })?;
        spec.train = SplitSpec::Path(files.train);
        spec.test.get_or_insert(SplitSpec::Path(files.test));
    }
    spec.problem_type.get_or_insert(preset.problem_type());
    spec.metric.get_or_insert(preset.metric());
    spec.labels = spec.labels.or_else(|| preset.labels());
    Ok(Cow::Owned(spec))
}

fn finish_row(raw: RawRow, meaning: &Meaning, teacher: Teacher<'_>) -> Result<Row, String> {
    let label = raw.label.map(|label| meaning.label(label)).transpose()?;
    if let Some(logits) = &raw.teacher_logits {
        meaning.check_logits(logits)?;
    }
    if matches!(teacher, Teacher::None) && label.is_none() && raw.teacher_logits.is_none() {
        return Err("no \"label\", and there is no teacher to give one".into());
    }
    Ok(Row {
        id: 0,
        input: raw.input,
        label,
        teacher_logits: raw.teacher_logits,
    })
}

fn limit_rejections(raw: &RawSplit) -> Result<(), DataError> {
    limit_rejections_of(raw, raw.rows.len())
}

/// More than one rejected row in ten means that the file is not what the user thinks it is.
fn limit_rejections_of(raw: &RawSplit, used: usize) -> Result<(), DataError> {
    let rows = used + raw.rejected.count;
    if raw.rejected.count * 10 > rows {
        return Err(DataError::TooManyRejected {
            origin: raw.origin.clone(),
            rejected: raw.rejected.count,
            rows,
            first: raw.rejected.first.clone(),
            ignored: checks::ignored_columns(&raw.ignored_fields),
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_ambiguity;
#[cfg(test)]
mod tests_files;
