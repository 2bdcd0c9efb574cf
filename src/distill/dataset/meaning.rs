//! From labels as they are written to labels as they are meant.
//!
//! - Strings are classes; lists of strings are several labels at once.
//! - Numbers are the targets of a regression, unless the teacher or the request says that the task
//!   is a classification: then they are indexes into its label names, or, if there are none or all
//!   numbers are among them, names themselves. Where neither says anything and the numbers are just 0, 1, 2 … n, both readings
//!   are likely and neither is chosen ([`DataError::Ambiguous`]).
//! - Cells of a table are numbers if all of them read as numbers (and are not names that the
//!   teacher or the request gives), else classes. A stray cell among decimal numbers is rejected.

use std::collections::{BTreeSet, HashMap};

use super::error::{DataError, KnownBy};
use super::fields::{Number, RawLabel, shortened};
use super::read::RawSplit;
use super::{Label, MAX_LABELS, Teacher};
use crate::adapter::ProblemType;
use crate::distill::spec::DataSpec;

/// Name of the one output of a regression whose teacher has no name for it.
const VALUE: &str = "value";

/// What the labels of a data set mean.
#[derive(Debug)]
pub(super) struct Meaning {
    pub(super) task_kind: ProblemType,
    pub(super) names: Vec<String>,
    index: HashMap<String, usize>,
    /// Whole numbers count from 0 in `names`; otherwise they are names themselves.
    numbers_are_indexes: bool,
}

/// What the teacher and the request say before any row is seen.
struct Known<'a> {
    task_kind: Option<(ProblemType, KnownBy)>,
    names: Option<(&'a [String], KnownBy)>,
}

/// One label of each kind that occurs, with its place for the message.
#[derive(Default)]
struct Survey {
    text: Option<String>,
    number: Option<String>,
    list: Option<String>,
    /// Different names, over all rows.
    names: BTreeSet<String>,
    /// Whole numbers, as long as all numbers are whole.
    whole: Option<BTreeSet<i64>>,
}

/// Decides what labels mean, and gives cells their kind.
pub(super) fn resolve(
    splits: &mut [RawSplit],
    spec: &DataSpec,
    teacher: Teacher<'_>,
) -> Result<Meaning, DataError> {
    let known = Known::new(spec, teacher)?;
    read_cells(splits, &known);
    let survey = Survey::new(splits);
    survey.of_one_kind()?;
    let task_kind = survey.task_kind(&known)?;
    let names = survey.label_names(task_kind, &known)?;
    let numbers_are_indexes = known.names.is_some() && !survey.numbers_are_names(&known);
    Ok(Meaning {
        task_kind,
        index: names.iter().cloned().zip(0..).collect(),
        names,
        numbers_are_indexes,
    })
}

impl<'a> Known<'a> {
    fn new(spec: &'a DataSpec, teacher: Teacher<'a>) -> Result<Self, DataError> {
        let names = spec.labels.as_deref();
        if let Some(names) = names {
            check_names(names)?;
        }
        if let Teacher::Trained(task) = teacher {
            if let Some(request) = spec.problem_type.filter(|kind| *kind != task.problem_type) {
                return Err(DataError::TeacherKind {
                    request,
                    teacher: task.problem_type,
                });
            }
            if let Some(names) = names
                && sorted(names) != sorted(&task.labels)
            {
                return Err(DataError::LabelMismatch {
                    known_by: KnownBy::Teacher,
                    data: names.to_vec(),
                    known: task.labels.clone(),
                });
            }
            return Ok(Self {
                task_kind: Some((task.problem_type, KnownBy::Teacher)),
                names: Some((&task.labels, KnownBy::Teacher)),
            });
        }
        Ok(Self {
            task_kind: spec.problem_type.map(|kind| (kind, KnownBy::Request)),
            names: names.map(|names| (names, KnownBy::Request)),
        })
    }

    fn has_name(&self, name: &str) -> bool {
        self.names
            .is_some_and(|(names, _)| names.iter().any(|known| known == name))
    }
}

fn sorted(names: &[String]) -> Vec<&String> {
    let mut names: Vec<&String> = names.iter().collect();
    names.sort_unstable();
    names
}

/// Names in a request: at least one, different, not empty.
fn check_names(names: &[String]) -> Result<(), DataError> {
    let mut seen = BTreeSet::new();
    let reason = if names.is_empty() || names.len() > MAX_LABELS {
        format!("there must be 1 to {MAX_LABELS} of them")
    } else if let Some(name) = names.iter().find(|name| name.trim() != **name) {
        format!("\"{}\" begins or ends with white space", shortened(name))
    } else if names.iter().any(String::is_empty) {
        "one of them is empty".into()
    } else if let Some(name) = names.iter().find(|name| !seen.insert(name.as_str())) {
        format!("\"{}\" stands twice", shortened(name))
    } else {
        return Ok(());
    };
    Err(DataError::LabelNames { reason })
}

/// Turns cells into numbers or texts, all of them alike.
fn read_cells(splits: &mut [RawSplit], known: &Known<'_>) {
    let (mut cells, mut numbers, mut fractions, mut names) = (0usize, 0usize, 0usize, 0usize);
    for label in labels(splits) {
        if let RawLabel::Cell(cell) = label {
            cells += 1;
            names += usize::from(known.has_name(cell));
            if let Some(number) = parse_number(cell) {
                numbers += 1;
                fractions += usize::from(!number.whole);
            }
        }
    }
    if cells == 0 {
        return;
    }
    let regression = matches!(known.task_kind, Some((ProblemType::Regression, _)));
    let mostly_decimals = fractions > 0 && numbers * 10 >= cells * 9;
    let as_numbers = names < cells && (regression || numbers == cells || mostly_decimals);
    for split in splits {
        let mut kept = Vec::with_capacity(split.rows.len());
        for mut row in std::mem::take(&mut split.rows) {
            if let Some(RawLabel::Cell(cell)) = &row.label {
                row.label = match parse_number(cell).filter(|_| as_numbers) {
                    Some(number) => Some(RawLabel::Number(number)),
                    None if as_numbers => {
                        let reason = format!("label \"{}\" is not a number", shortened(cell));
                        split.rejected.add(split.origin.split, row.line, reason);
                        continue;
                    }
                    None => Some(RawLabel::Text(cell.clone())),
                };
            }
            kept.push(row);
        }
        split.rows = kept;
    }
}

fn parse_number(cell: &str) -> Option<Number> {
    Some(Number {
        value: cell.parse().ok()?,
        whole: cell.parse::<i64>().is_ok(),
    })
}

fn labels(splits: &[RawSplit]) -> impl Iterator<Item = &RawLabel> {
    splits
        .iter()
        .flat_map(|split| split.rows.iter().filter_map(|row| row.label.as_ref()))
}

impl Survey {
    fn new(splits: &[RawSplit]) -> Self {
        let mut survey = Self {
            whole: Some(BTreeSet::new()),
            ..Self::default()
        };
        for split in splits {
            for row in &split.rows {
                let Some(label) = &row.label else { continue };
                let place =
                    |what: String| format!("{} row {} {what}", split.origin.split, row.line);
                match label {
                    RawLabel::Text(name) | RawLabel::Cell(name) => {
                        survey
                            .text
                            .get_or_insert_with(|| place(format!("has \"{}\"", shortened(name))));
                        survey.add_name(name);
                    }
                    RawLabel::Number(number) => {
                        survey
                            .number
                            .get_or_insert_with(|| place(format!("has {}", number.value)));
                        survey.add_number(*number);
                    }
                    RawLabel::List(names) => {
                        survey
                            .list
                            .get_or_insert_with(|| place("has a list".into()));
                        names.iter().for_each(|name| survey.add_name(name));
                    }
                }
            }
        }
        survey
    }

    fn add_name(&mut self, name: &str) {
        if !self.names.contains(name) {
            self.names.insert(name.to_owned());
        }
    }

    fn add_number(&mut self, number: Number) {
        match &mut self.whole {
            Some(whole) if number.whole => {
                whole.insert(number.value as i64);
            }
            _ => self.whole = None,
        }
    }

    fn of_one_kind(&self) -> Result<(), DataError> {
        let mut kinds = [&self.text, &self.number, &self.list].into_iter().flatten();
        match (kinds.next(), kinds.next()) {
            (Some(first), Some(second)) => Err(DataError::MixedLabels {
                first: first.clone(),
                second: second.clone(),
            }),
            _ => Ok(()),
        }
    }

    fn task_kind(&self, known: &Known<'_>) -> Result<ProblemType, DataError> {
        use ProblemType::{MultiLabelClassification, Regression, SingleLabelClassification};
        if let Some((expected, known_by)) = known.task_kind {
            let unfit = match expected {
                SingleLabelClassification => self.list.as_ref().or(self.fraction()),
                MultiLabelClassification => self.text.as_ref().or(self.number.as_ref()),
                Regression => self.text.as_ref().or(self.list.as_ref()),
            };
            return match unfit {
                None => Ok(expected),
                Some(found) => Err(DataError::WrongKind {
                    known_by,
                    expected,
                    found: found.clone(),
                }),
            };
        }
        if self.list.is_some() {
            return Ok(MultiLabelClassification);
        }
        if self.text.is_some() {
            return Ok(SingleLabelClassification);
        }
        if let Some((_, known_by)) = known.names {
            return match self.fraction() {
                None => Ok(SingleLabelClassification),
                Some(found) => Err(DataError::WrongKind {
                    known_by,
                    expected: SingleLabelClassification,
                    found: found.clone(),
                }),
            };
        }
        if self.number.is_none() {
            return Err(DataError::NoLabels);
        }
        match self.counts_from_zero() {
            Some(max) => Err(DataError::Ambiguous { max }),
            None => Ok(Regression),
        }
    }

    /// A number, if not all of them are whole.
    fn fraction(&self) -> Option<&String> {
        self.number.as_ref().filter(|_| self.whole.is_none())
    }

    /// The greatest number, if the labels are exactly 0, 1, … up to it.
    fn counts_from_zero(&self) -> Option<usize> {
        let whole = self.whole.as_ref()?;
        let max = whole.len().checked_sub(1).filter(|&max| max > 0)?;
        whole.iter().copied().eq(0..=max as i64).then_some(max)
    }

    /// Labels 1 to 5 for classes named "1" to "5" are names, not places.
    fn numbers_are_names(&self, known: &Known<'_>) -> bool {
        self.whole
            .iter()
            .flatten()
            .all(|number| known.has_name(&number.to_string()))
    }

    fn label_names(
        &self,
        task_kind: ProblemType,
        known: &Known<'_>,
    ) -> Result<Vec<String>, DataError> {
        if task_kind == ProblemType::Regression {
            return match known.names {
                Some(([name], _)) => Ok(vec![name.clone()]),
                Some((names, KnownBy::Request)) => Err(DataError::LabelNames {
                    reason: format!("a regression has one output, not {}", names.len()),
                }),
                _ => Ok(vec![VALUE.into()]),
            };
        }
        if let Some((names, known_by)) = known.names {
            if self.names.iter().any(|name| !names.contains(name)) {
                return Err(DataError::LabelMismatch {
                    known_by,
                    data: self.names.iter().cloned().collect(),
                    known: names.to_vec(),
                });
            }
            return Ok(names.to_vec());
        }
        let names = match &self.whole {
            Some(whole) if self.number.is_some() => whole.iter().map(ToString::to_string).collect(),
            _ => sorted_by_value(&self.names),
        };
        match names.len() {
            0 => Err(DataError::NoLabels),
            count if count > MAX_LABELS => Err(DataError::TooManyLabels { count }),
            _ => Ok(names),
        }
    }
}

/// Whole numbers by their value ("2" before "10"), other names by their spelling.
fn sorted_by_value(names: &BTreeSet<String>) -> Vec<String> {
    let mut names: Vec<String> = names.iter().cloned().collect();
    if names.iter().all(|name| name.parse::<i64>().is_ok()) {
        names.sort_by_key(|name| name.parse::<i64>().unwrap_or(i64::MAX));
    }
    names
}

impl Meaning {
    /// The label of one row, or why it cannot be used.
    pub(super) fn label(&self, raw: RawLabel) -> Result<Label, String> {
        match raw {
            RawLabel::Text(name) | RawLabel::Cell(name) => Ok(Label::Class(self.index_of(&name)?)),
            RawLabel::List(names) => {
                let mut indexes = names
                    .iter()
                    .map(|name| self.index_of(name))
                    .collect::<Result<Vec<_>, _>>()?;
                indexes.sort_unstable();
                indexes.dedup();
                Ok(Label::Labels(indexes))
            }
            RawLabel::Number(number) if self.task_kind == ProblemType::Regression => {
                let value = number.value as f32;
                if value.is_finite() {
                    Ok(Label::Value(value))
                } else {
                    Err(format!("label {} is not a finite number", number.value))
                }
            }
            RawLabel::Number(number) if self.numbers_are_indexes => {
                if number.whole && (0.0..self.names.len() as f64).contains(&number.value) {
                    return Ok(Label::Class(number.value as usize));
                }
                Err(format!(
                    "label {} does not count from 0 in the {} label names",
                    number.value,
                    self.names.len()
                ))
            }
            RawLabel::Number(number) => Ok(Label::Class(
                self.index_of(&(number.value as i64).to_string())?,
            )),
        }
    }

    fn index_of(&self, name: &str) -> Result<usize, String> {
        self.index
            .get(name)
            .copied()
            .ok_or_else(|| format!("label \"{}\" is not a known name", shortened(name)))
    }

    /// Whether logits fit the label names.
    pub(super) fn check_logits(&self, logits: &[f32]) -> Result<(), String> {
        if logits.len() == self.names.len() {
            return Ok(());
        }
        Err(format!(
            "{} teacher_logits for {} label names",
            logits.len(),
            self.names.len()
        ))
    }
}
