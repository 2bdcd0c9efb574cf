//! Where the fields of a row stand in a table, a Parquet file or a JSON object.

use super::preset::Preset;
use crate::adapter::ProblemType;
use crate::distill::spec::{ColumnSpec, DataSpec};

/// The fields of a row, under the names that they have where nothing else is said.
pub(super) const FIELDS: [&str; 4] = ["text", "text_pair", "label", "teacher_logits"];
pub(super) const TEXT: usize = 0;
pub(super) const TEXT_PAIR: usize = 1;
pub(super) const LABEL: usize = 2;
pub(super) const LOGITS: usize = 3;

/// The names under which the fields are looked for.
#[derive(Clone, Debug)]
pub(super) struct Columns {
    /// For each of [`FIELDS`], the first of these that is there.
    names: [Vec<String>; FIELDS.len()],
    /// Whether the request named the column: then it must be there.
    asked: [bool; FIELDS.len()],
    /// Names of the columns of a table whose first line holds none; empty if there is one.
    pub(super) headerless: &'static [&'static str],
    /// Whether a preset of GLUE names the columns. Quotes in its TSV files mean nothing.
    pub(super) preset: bool,
    /// The names of the classes that the request gives.
    pub(super) labels: Option<Vec<String>>,
    /// Whether the request asks for a regression.
    pub(super) numbers_are_targets: bool,
    /// The number that stands for "no label".
    pub(super) no_label: Option<i64>,
}

impl Columns {
    pub(super) fn of(spec: &DataSpec) -> Self {
        let mut columns = match spec.preset {
            Some(preset) => Preset::columns(preset),
            None => Self {
                names: FIELDS.map(|field| vec![field.to_owned()]),
                asked: [false; FIELDS.len()],
                headerless: &[],
                preset: false,
                labels: None,
                numbers_are_targets: false,
                no_label: None,
            },
        };
        if let Some(ColumnSpec {
            text,
            text_pair,
            label,
            teacher_logits,
        }) = &spec.columns
        {
            for (field, name) in [text, text_pair, label, teacher_logits].iter().enumerate() {
                if let Some(name) = name {
                    columns.names[field] = vec![name.clone()];
                    columns.asked[field] = true;
                }
            }
        }
        columns.labels = spec.known_labels();
        columns.numbers_are_targets = spec.known_problem_type() == Some(ProblemType::Regression);
        columns
    }

    pub(super) fn of_preset(
        text: &[&str],
        pair: &[&str],
        label: &[&str],
        headerless: &'static [&'static str],
    ) -> Self {
        let names = [text, pair, label, &["teacher_logits"]];
        Self {
            names: names.map(|names| names.iter().map(ToString::to_string).collect()),
            asked: [true, !pair.is_empty(), false, false],
            headerless,
            preset: true,
            labels: None,
            numbers_are_targets: false,
            // So the copies on the hub mark the rows of GLUE's test files.
            no_label: Some(-1),
        }
    }

    /// See [`shared_column`].
    fn shared(&self) -> Option<(&str, [&'static str; 2])> {
        self.names.iter().enumerate().find_map(|(field, names)| {
            names.iter().find_map(|name| {
                let first = self.field_of(name)?;
                (first != field).then_some((name.as_str(), [FIELDS[first], FIELDS[field]]))
            })
        })
    }

    /// Whether a user has chosen the columns of text and label, and so those that are not read.
    pub(super) fn are_chosen(&self) -> bool {
        self.preset || self.asked[TEXT] && self.asked[LABEL]
    }

    /// Which field a column of this name holds.
    pub(super) fn field_of(&self, column: &str) -> Option<usize> {
        let holds = |names: &Vec<String>| names.iter().any(|name| name == column);
        self.names.iter().position(holds)
    }

    /// The names of a field, the preferred first.
    pub(super) fn names(&self, field: usize) -> &[String] {
        &self.names[field]
    }

    /// Where each field stands among the named columns. The error is the names that one field is
    /// looked for under, which must be there and are not: a text always, others where the request
    /// names their column; rows without a label are welcome outside of `train`.
    pub(super) fn places(
        &self,
        header: &[&str],
        train: bool,
    ) -> Result<[Option<usize>; FIELDS.len()], &[String]> {
        let mut places = [None; FIELDS.len()];
        for (field, names) in self.names.iter().enumerate() {
            places[field] = names
                .iter()
                .find_map(|name| header.iter().position(|column| column == name));
            let needed = match field {
                TEXT => true,
                LABEL => self.asked[field] && train,
                _ => self.asked[field],
            };
            if places[field].is_none() && needed {
                return Err(names);
            }
        }
        Ok(places)
    }
}

/// Returns a column that two fields of a row would be read from, with the names of the fields.
pub(in crate::distill) fn shared_column(spec: &DataSpec) -> Option<(String, [&'static str; 2])> {
    let columns = Columns::of(spec);
    let (name, fields) = columns.shared()?;
    Some((name.to_owned(), fields))
}
