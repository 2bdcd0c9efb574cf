//! The tasks of GLUE (Wang et al., arXiv 1804.07461) as their files come: names of the columns,
//! labels, and the metric that each is scored by.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::columns::Columns;
use crate::adapter::ProblemType;
use crate::distill::evaluation::Metric;

/// A data set whose layout is known: GLUE's own tables, or the Parquet and JSONL files of its copies
/// on the Hugging Face hub.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Preset {
    Cola,
    Sst2,
    Mrpc,
    Qqp,
    Stsb,
    /// Judged on the matched rows.
    Mnli,
    /// Judged on the mismatched rows.
    MnliMm,
    Qnli,
    Rte,
    Wnli,
}

/// Labels of the data sets of inference as numbers stand for them on the hub.
const INFERENCE: &[&str] = &["entailment", "neutral", "contradiction"];
const ENTAILMENT: &[&str] = &["entailment", "not_entailment"];

/// Endings of data files, the preferred first.
const ENDINGS: [&str; 3] = ["tsv", "parquet", "jsonl"];

/// The files of a preset in its folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PresetFiles {
    pub train: PathBuf,
    /// GLUE's development rows: those of its test files have no labels.
    pub test: PathBuf,
}

impl Preset {
    pub const ALL: [Self; 10] = [
        Self::Cola,
        Self::Sst2,
        Self::Mrpc,
        Self::Qqp,
        Self::Stsb,
        Self::Mnli,
        Self::MnliMm,
        Self::Qnli,
        Self::Rte,
        Self::Wnli,
    ];

    pub fn problem_type(self) -> ProblemType {
        match self {
            Self::Stsb => ProblemType::Regression,
            _ => ProblemType::SingleLabelClassification,
        }
    }

    /// What the task is scored by in GLUE; where it has two figures, the one that the paper's
    /// tables show.
    pub fn metric(self) -> Metric {
        match self {
            Self::Cola => Metric::Mcc,
            Self::Mrpc | Self::Qqp => Metric::F1,
            Self::Stsb => Metric::PearsonSpearman,
            _ => Metric::Accuracy,
        }
    }

    /// Names of the classes in the order of the numbers that stand for them; of the two of a pair
    /// the second is the positive one.
    pub fn labels(self) -> Option<Vec<String>> {
        let labels: &[&str] = match self {
            Self::Cola => &["unacceptable", "acceptable"],
            Self::Sst2 => &["negative", "positive"],
            Self::Mrpc => &["not_equivalent", "equivalent"],
            Self::Qqp => &["not_duplicate", "duplicate"],
            Self::Stsb => return None,
            Self::Mnli | Self::MnliMm => INFERENCE,
            Self::Qnli | Self::Rte => ENTAILMENT,
            Self::Wnli => &["not_entailment", "entailment"],
        };
        Some(labels.iter().map(ToString::to_string).collect())
    }

    pub(super) fn columns(self) -> Columns {
        let (text, pair, label): (&[&str], &[&str], &[&str]) = match self {
            Self::Cola | Self::Sst2 => (&["sentence"], &[], &["label"]),
            Self::Mrpc => (
                &["sentence1", "#1 String"],
                &["sentence2", "#2 String"],
                &["label", "Quality"],
            ),
            Self::Qqp => (&["question1"], &["question2"], &["label", "is_duplicate"]),
            Self::Stsb => (&["sentence1"], &["sentence2"], &["label", "score"]),
            Self::Mnli | Self::MnliMm => (
                &["premise", "sentence1"],
                &["hypothesis", "sentence2"],
                &["label", "gold_label"],
            ),
            Self::Qnli => (&["question"], &["sentence"], &["label"]),
            Self::Rte | Self::Wnli => (&["sentence1"], &["sentence2"], &["label"]),
        };
        Columns::of_preset(
            text,
            pair,
            label,
            match self {
                // CoLA's tables have no line of names.
                Self::Cola => &["source", "label", "star", "sentence"],
                _ => &[],
            },
        )
    }

    /// Finds the files in `folder`: `train.tsv` and `dev.tsv` as GLUE has them, or
    /// `train-….parquet` and `validation-….parquet` (or `.jsonl`) as the hub has them.
    ///
    /// # Errors
    /// The folder cannot be read, or one of the files is not there or there several times.
    pub fn files(self, folder: &Path) -> io::Result<PresetFiles> {
        let test: &[&str] = match self {
            Self::Mnli => &["dev_matched", "validation_matched"],
            Self::MnliMm => &["dev_mismatched", "validation_mismatched"],
            _ => &["dev", "validation"],
        };
        let mut names = Vec::new();
        for entry in fs::read_dir(folder)? {
            if let Ok(name) = entry?.file_name().into_string() {
                names.push(name);
            }
        }
        Ok(PresetFiles {
            train: folder.join(one_of(&names, &["train"])?),
            test: folder.join(one_of(&names, test)?),
        })
    }
}

/// The one file whose name is a stem, or a stem with the number of the only part, and an ending.
fn one_of<'a>(names: &'a [String], stems: &[&str]) -> io::Result<&'a str> {
    for ending in ENDINGS {
        let is_wanted = |name: &&String| {
            let stem = name.strip_suffix(ending).and_then(|n| n.strip_suffix('.'));
            stem.is_some_and(|found| {
                stems.iter().any(|stem| {
                    let rest = found.strip_prefix(stem);
                    rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('-'))
                })
            })
        };
        let mut found = names.iter().filter(is_wanted);
        match (found.next(), found.next()) {
            (Some(name), None) => return Ok(name),
            (Some(first), Some(second)) => {
                return Err(io::Error::other(format!(
                    "it has both {first} and {second}; name the files one by one"
                )));
            }
            _ => {}
        }
    }
    Err(io::Error::new(
        io::ErrorKind::NotFound,
        format!(
            "it has no file named {} and .{}",
            stems.join(" or "),
            ENDINGS.join(", .")
        ),
    ))
}
