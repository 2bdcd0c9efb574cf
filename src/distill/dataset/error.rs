//! Why a data set cannot be used, in words for the person who sent it.

use std::collections::HashSet;
use std::fmt;
use std::io;
use std::path::PathBuf;

use super::names::likeness;
use super::{MAX_FILE_BYTES, MAX_LABELS, MAX_ROWS, Rejection, Split};
use crate::adapter::ProblemType;
use crate::distill::evaluation::Metric;

/// A data set that no pass can learn from.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    #[error("{origin} cannot be read")]
    Read { origin: Origin, source: io::Error },
    #[error("{origin} is not a regular file")]
    NotAFile { origin: Origin },
    #[error("{origin} has {bytes} bytes; at most {MAX_FILE_BYTES} are read")]
    TooLarge { origin: Origin, bytes: u64 },
    #[error("{origin} must end in .jsonl, .ndjson, .json, .csv, .tsv or .parquet")]
    UnknownFormat { origin: Origin },
    #[error("{origin} is one JSON array; write one object a line instead (JSON Lines)")]
    JsonArray { origin: Origin },
    #[error("{origin} is not UTF-8 text (line {line}); convert it first")]
    NotUtf8 { origin: Origin, line: usize },
    #[error("the header of {origin} cannot be used: {reason}")]
    Header { origin: Origin, reason: String },
    #[error("{origin} cannot be read as Parquet: {reason}")]
    Parquet { origin: Origin, reason: String },
    #[error("the folder {path} does not hold the files of the preset: {source}")]
    PresetFiles { path: PathBuf, source: io::Error },
    #[error("a {problem_type} cannot be scored by {metric}")]
    Metric {
        problem_type: ProblemType,
        metric: Metric,
    },
    #[error("the class weights cannot be used: {reason}")]
    ClassWeights { reason: String },
    #[error(
        "line {line} of {origin} cannot be read as CSV: {reason} (a quote within a cell in quotes \
         is written twice)"
    )]
    Quotes {
        origin: Origin,
        line: usize,
        reason: String,
    },
    #[error(
        "{origin} has cells in quotes (line {line}), but quotes are ordinary characters in TSV; \
         write it as CSV, or without quotes (pandas: quoting=csv.QUOTE_NONE)"
    )]
    QuotedTsv { origin: Origin, line: usize },
    #[error("{origin} is {what}, not what its name says; {remedy}")]
    Foreign {
        origin: Origin,
        what: &'static str,
        remedy: &'static str,
    },
    #[error("{origin} has a NUL byte (line {line}), so it is not UTF-8 text; convert it first")]
    Nul { origin: Origin, line: usize },
    #[error("{origin} has no rows")]
    Empty { origin: Origin },
    #[error("{origin} has more than {MAX_ROWS} rows")]
    TooManyRows { origin: Origin },
    #[error(
        "{rejected} of the {rows} rows of {origin} cannot be used, more than one in ten; first \
         {}{}",
        list_rejections(first),
        and(ignored)
    )]
    TooManyRejected {
        origin: Origin,
        rejected: usize,
        rows: usize,
        first: Vec<Rejection>,
        /// What to say of columns that are not read.
        ignored: Option<String>,
    },
    #[error(
        "no row has a label, and there is no trained teacher to give the answers; add a \"label\" \
         to the rows, or name a teacher that is a classifier{}",
        and(ignored)
    )]
    NoLabels {
        /// What to say of columns that are not read.
        ignored: Option<String>,
    },
    #[error(
        "labels must all be of one kind, but {first} and {second}; use strings for classes, \
         numbers for a regression, lists of strings for several labels"
    )]
    MixedLabels { first: String, second: String },
    #[error(
        "the labels are whole numbers ({}), which may be classes or the targets of a regression; \
         say which with \"problem_type\" in \"data\" (single_label_classification or regression), \
         or name the classes with \"labels\"",
        list_numbers(numbers)
    )]
    Ambiguous {
        /// Ascending.
        numbers: Vec<i64>,
    },
    #[error(
        "{found}: label {number} does not count from 0 in the {names} label names of {known_by}; \
         give names as labels, or numbers from 0 to {}",
        names - 1
    )]
    NotAPlace {
        found: String,
        number: i64,
        names: usize,
        known_by: KnownBy,
    },
    #[error("{known_by} asks for {expected}, but {found}")]
    WrongKind {
        known_by: KnownBy,
        expected: ProblemType,
        found: String,
    },
    #[error(
        "the label names of the rows do not match those of {known_by}: the rows have {}, \
         {known_by} has {}{}",
        list_names(data),
        list_names(known),
        hint(data, known)
    )]
    LabelMismatch {
        known_by: KnownBy,
        data: Vec<String>,
        known: Vec<String>,
    },
    #[error("the request says that the task is a {request}, but the teacher answers a {teacher}")]
    TeacherKind {
        request: ProblemType,
        teacher: ProblemType,
    },
    #[error("the label names in the request cannot be used: {reason}")]
    LabelNames { reason: String },
    #[error(
        "the rows have {count} different classes, and at most {MAX_LABELS} are possible; are the \
         labels numbers written as text?"
    )]
    TooManyLabels { count: usize },
    #[error(
        "every label of the training rows is \"{name}\"; a classifier needs rows of two classes \
         at least"
    )]
    OneClass { name: String },
    #[error("every target of the training rows is {value}; a regression needs different ones")]
    OneTarget { value: f32 },
    #[error(
        "no training row has a label, and the teacher has to be fine-tuned first; add labels, or \
         name a teacher that is a classifier"
    )]
    NoTrainingLabels,
    #[error(
        "the {split} split would be empty: {rows} rows with {texts} different texts are too few \
         to cut it from the training rows; add rows (three different texts a class at least) or \
         give a {split} split"
    )]
    TooFewToCut {
        split: Split,
        rows: usize,
        texts: usize,
    },
    #[error(
        "no row of the {split} split is left once texts that also stand in a later split are \
         removed; the splits must differ"
    )]
    AllOverlap { split: Split },
}

/// Where rows come from, as messages name it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origin {
    pub split: Split,
    /// The file; `None` for rows in the request.
    pub path: Option<PathBuf>,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.path {
            Some(path) => write!(f, "the {} file {}", self.split, path.display()),
            None => write!(f, "the list of {} rows", self.split),
        }
    }
}

/// Who fixed the kind of task or its label names before the rows were read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KnownBy {
    Teacher,
    Request,
}

impl fmt::Display for KnownBy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Teacher => "the teacher",
            Self::Request => "the request",
        })
    }
}

fn and(hint: &Option<String>) -> String {
    hint.as_ref()
        .map_or_else(String::new, |hint| format!("; {hint}"))
}

/// Names shown in a message; there may be a thousand.
const SHOWN_NAMES: usize = 20;

fn list_names(names: &[String]) -> String {
    let mut text = names
        .iter()
        .take(SHOWN_NAMES)
        .map(|name| format!("\"{name}\""))
        .collect::<Vec<_>>()
        .join(", ");
    if names.len() > SHOWN_NAMES {
        text.push_str(&format!(" and {} more", names.len() - SHOWN_NAMES));
    }
    text
}

fn list_numbers(numbers: &[i64]) -> String {
    if let [first, .., last] = numbers
        && last.checked_sub(*first) == Some(numbers.len() as i64 - 1)
    {
        return format!("{first} to {last}");
    }
    let shown = numbers.iter().take(SHOWN_NAMES).map(ToString::to_string);
    let more = match numbers.len() > SHOWN_NAMES {
        true => ", …",
        false => "",
    };
    shown.collect::<Vec<_>>().join(", ") + more
}

fn list_rejections(first: &[Rejection]) -> String {
    let rows: Vec<String> = first.iter().take(3).map(ToString::to_string).collect();
    rows.join("; ")
}

/// What probably went wrong, where the two sets of names tell.
fn hint(data: &[String], known: &[String]) -> String {
    let alike: HashSet<String> = known.iter().map(|name| likeness(name)).collect();
    if data.iter().all(|name| alike.contains(&likeness(name))) {
        return " (upper and lower case, spaces, Unicode form and invisible characters count)"
            .into();
    }
    let unnamed = known
        .iter()
        .enumerate()
        .all(|(i, name)| *name == format!("LABEL_{i}"));
    if unnamed {
        return " (a teacher without names of its own: give the labels as numbers from 0, name \
                them in \"labels\" of the request, or rename its labels in its config.json)"
            .into();
    }
    String::new()
}
