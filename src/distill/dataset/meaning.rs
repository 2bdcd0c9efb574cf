//! From labels as they are written to labels as they are meant.
//!
//! - Strings are classes; lists of strings are several labels at once.
//! - Numbers are the targets of a regression, unless the teacher or the request says that the task
//!   is a classification: then they count from 0 in its label names, or are names themselves if
//!   each is among the names or there are none. Where neither says anything and all numbers are
//!   whole, both readings are likely and neither is chosen ([`DataError::Ambiguous`]). A number
//!   is whole by its value: 1.0 is 1.
//! - Cells of a table are numbers if all of them read as numbers (and are not names that the
//!   teacher or the request gives), else classes. A stray cell among decimal numbers is rejected,
//!   and so is a cell that stands for a missing value among numbers.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::checks::ignored_columns;
use super::error::{DataError, KnownBy};
use super::fields::{Number, RawLabel, parse_number, shortened};
use super::names::is_missing;
use super::read::RawSplit;
use super::{Label, MAX_LABELS, Split, Teacher};
use crate::adapter::ProblemType;
use crate::distill::spec::DataSpec;

/// Name of the one output of a regression whose teacher has no name for it.
const VALUE: &str = "value";

/// What the labels of a data set mean.
#[derive(Debug)]
pub(super) struct Meaning {
    pub(super) task_kind: ProblemType,
    pub(super) names: Vec<String>,
    /// Whether the teacher or the request gave the names.
    pub(super) names_are_given: bool,
    /// What a reader of the numbers may have meant otherwise.
    pub(super) warning: Option<String>,
    index: HashMap<String, usize>,
    /// The class of each whole number.
    index_of_number: HashMap<i64, usize>,
}

/// What the teacher and the request say before any row is seen.
struct Known<'a> {
    task_kind: Option<(ProblemType, KnownBy)>,
    names: Option<(&'a [String], KnownBy)>,
    /// The names that numbers count in: those of the request, else those of the teacher.
    order: &'a [String],
}

/// One label of each kind that occurs, with its place for the message.
#[derive(Default)]
struct Survey {
    text: Option<String>,
    number: Option<String>,
    list: Option<String>,
    /// Different names, over all rows.
    names: BTreeSet<String>,
    /// Whole numbers, as long as all numbers are whole; each with its first place.
    whole: Option<BTreeMap<i64, (Split, usize)>>,
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
    let hinted = |error| match error {
        DataError::NoLabels { .. } => DataError::NoLabels {
            ignored: ignored_columns(splits.iter().flat_map(|split| &split.ignored_fields)),
        },
        error => error,
    };
    let task_kind = survey.task_kind(&known).map_err(hinted)?;
    let names = survey.label_names(task_kind, &known).map_err(hinted)?;
    let index: HashMap<String, usize> = names.iter().cloned().zip(0..).collect();
    let mut meaning = Meaning {
        task_kind,
        names,
        names_are_given: known.names.is_some(),
        warning: None,
        index,
        index_of_number: HashMap::new(),
    };
    if task_kind != ProblemType::Regression {
        meaning.count_numbers(&survey, &known)?;
    }
    Ok(meaning)
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
                order: names.unwrap_or(&task.labels),
            });
        }
        Ok(Self {
            task_kind: spec.problem_type.map(|kind| (kind, KnownBy::Request)),
            names: names.map(|names| (names, KnownBy::Request)),
            order: names.unwrap_or_default(),
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
            let is_name = known.has_name(cell);
            if is_missing(cell) && !is_name {
                continue;
            }
            cells += 1;
            names += usize::from(is_name);
            if let Some(number) = parse_number(cell) {
                numbers += 1;
                fractions += usize::from(number.whole.is_none());
            }
        }
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

fn labels(splits: &[RawSplit]) -> impl Iterator<Item = &RawLabel> {
    splits
        .iter()
        .flat_map(|split| split.rows.iter().filter_map(|row| row.label.as_ref()))
}

impl Survey {
    fn new(splits: &[RawSplit]) -> Self {
        let mut survey = Self {
            whole: Some(BTreeMap::new()),
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
                        survey.add_number(*number, (split.origin.split, row.line));
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

    fn add_number(&mut self, number: Number, place: (Split, usize)) {
        match (&mut self.whole, number.whole) {
            (Some(all), Some(whole)) => {
                all.entry(whole).or_insert(place);
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
            return Err(DataError::NoLabels { ignored: None });
        }
        match &self.whole {
            Some(whole) if (2..=MAX_LABELS).contains(&whole.len()) => Err(DataError::Ambiguous {
                numbers: whole.keys().copied().collect(),
            }),
            _ => Ok(Regression),
        }
    }

    /// A number, if not all of them are whole.
    fn fraction(&self) -> Option<&String> {
        self.number.as_ref().filter(|_| self.whole.is_none())
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
            Some(whole) if self.number.is_some() => whole.keys().map(ToString::to_string).collect(),
            _ => sorted_by_value(&self.names),
        };
        match names.len() {
            0 => Err(DataError::NoLabels { ignored: None }),
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
    /// Finds the class of each whole number that occurs.
    fn count_numbers(&mut self, survey: &Survey, known: &Known<'_>) -> Result<(), DataError> {
        let Some(whole) = survey.whole.as_ref().filter(|whole| !whole.is_empty()) else {
            return Ok(());
        };
        let named = self.names.iter().zip(0..);
        let mut by_name: HashMap<i64, usize> = named
            .filter_map(|(name, index)| Some((parse_number(name)?.whole?, index)))
            .collect();
        by_name.retain(|number, _| whole.contains_key(number));
        if by_name.len() == whole.len() {
            self.index_of_number = by_name;
            return Ok(());
        }
        let known_by = known
            .names
            .map_or(KnownBy::Request, |(_, known_by)| known_by);
        if !by_name.is_empty() {
            return Err(DataError::LabelMismatch {
                known_by,
                data: whole.keys().map(ToString::to_string).collect(),
                known: self.names.clone(),
            });
        }
        for (&number, (split, line)) in whole {
            let place = usize::try_from(number).ok();
            let name = place.and_then(|place| known.order.get(place));
            let Some(index) = name.and_then(|name| self.index.get(name)) else {
                return Err(DataError::NotAPlace {
                    found: format!("{split} row {line}"),
                    number,
                    names: self.names.len(),
                    known_by,
                });
            };
            self.index_of_number.insert(number, *index);
        }
        if let Some((first, _)) = whole.first_key_value()
            && *first > 0
        {
            self.warning = Some(format!(
                "no label is 0, and numbers count from 0 in the label names: {first} is \"{}\"",
                self.names[self.index_of_number[first]]
            ));
        }
        Ok(())
    }

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
            RawLabel::Number(number) => number
                .whole
                .and_then(|whole| self.index_of_number.get(&whole))
                .map(|&index| Label::Class(index))
                .ok_or_else(|| format!("label {} is not a known number", number.value)),
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
