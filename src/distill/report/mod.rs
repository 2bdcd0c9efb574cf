//! `report.json`: how good, how fast and how large a version is beside its teacher.

use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::dataset::DataChecks;
use super::evaluation::{Difference, Evaluation, LatencyAt, Likeness};
use super::gate::Gate;
use crate::adapter::ProblemType;

mod compare;
mod markdown;

use crate::parse::{self, ParseError};
pub use compare::{ChangedField, Comparison, Figure};

/// Name of the report in a version's folder.
pub const FILE_NAME: &str = "report.json";

/// The report of one version. What a pass did not measure is absent: one without a teacher has no
/// teacher's figures.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Report {
    pub task: String,
    pub problem_type: ProblemType,
    /// RFC 3339, UTC; see [`timestamp`].
    pub created_at: String,
    pub seed: u64,
    /// The request, with inline rows replaced by their number.
    #[schema(value_type = Object)]
    pub spec: serde_json::Value,
    pub data: DataSummary,
    /// What the scores are held against.
    pub reference: Reference,
    /// The model that this version is.
    pub student: Evaluation,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub teacher: Option<Evaluation>,
    /// The student trained on the labels alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub control: Option<Evaluation>,
    /// The most common answer of the training rows given to every test row.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub majority: Option<Evaluation>,
    /// The student's score divided by the teacher's, where that is above 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub share_kept: Option<f64>,
    /// Student and teacher on the test rows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub likeness: Option<Likeness>,
    pub student_model: ModelSize,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub teacher_model: Option<ModelSize>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub latency: Option<Latency>,
    #[serde(default)]
    pub peak_memory: PeakMemory,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub training: Option<TrainingSummary>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub teacher_training: Option<TrainingSummary>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gate: Option<Gate>,
    /// The test rows that student and teacher see most differently; only administrators see them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub differences: Vec<Difference>,
}

/// What a score is held against.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Reference {
    /// The labels of the test rows.
    #[default]
    Labels,
    /// The teacher's answers, since no test row has a label.
    Teacher,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct DataSummary {
    /// In the order of the logits.
    pub labels: Vec<String>,
    /// SHA-256 of the test rows and their labels, by which versions can tell whether they were
    /// scored on the same ones.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub test_digest: Option<String>,
    pub checks: DataChecks,
}

/// Takes the texts of the user's rows out of a report that is shown to whoever may ask for a task.
pub fn without_texts(report: &mut serde_json::Value) {
    if let Some(fields) = report.as_object_mut() {
        fields.remove("differences");
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ModelSize {
    /// Name of the encoder.
    pub encoder: String,
    /// SHA-256 of what the encoder computes with: see `docs/models.md`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub encoder_digest: Option<String>,
    /// Encoder, adapter and head together.
    pub parameters: usize,
    /// Those that trained; absent for a model that was taken as it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trainable: Option<usize>,
    /// Weights of the encoder on disk, in bytes.
    pub encoder_bytes: u64,
    /// Adapter and head on disk, in bytes; absent if the encoder's file holds the head.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adapter_bytes: Option<u64>,
}

/// Latency of student and teacher, measured in turns in one process on the same inputs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Latency {
    /// Where it was measured: `cpu`, or the name of the GPU.
    pub device: String,
    /// Threads that a forward pass may use.
    pub threads: usize,
    pub batch_1: LatencyAt,
    pub batch_32: LatencyAt,
}

/// Greatest memory while the student trained, and while it answered, in bytes. On a CPU it is the
/// resident memory of the process: the program, the student's encoder and the rows with their tokens
/// are in both. On a GPU it is what the process had of the GPU's memory. Absent where the system
/// does not say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PeakMemory {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub training_bytes: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub inference_bytes: Option<u64>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct TrainingSummary {
    /// Epochs that ran.
    pub epochs: usize,
    /// Optimizer steps that ran.
    pub steps: usize,
    pub seconds: f64,
    pub tokens_per_second: f64,
    /// Epoch whose weights were kept, counted from 1.
    pub best_epoch: usize,
    /// One an epoch, in order.
    pub history: Vec<EpochSummary>,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct EpochSummary {
    /// Counted from 1.
    pub epoch: usize,
    /// Mean loss of its steps.
    pub loss: f64,
    /// Main score on the validation rows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub validation_score: Option<f64>,
}

/// A report could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum ReportError {
    #[error("could not read the report {path}")]
    Read { path: PathBuf, source: io::Error },
    #[error("the report {path} is not in the format of this program")]
    Parse { path: PathBuf, source: ParseError },
    #[error("could not write the report {path}")]
    Write { path: PathBuf, source: io::Error },
    #[error("the report cannot be written as JSON")]
    Serialise(#[source] serde_json::Error),
}

impl Report {
    /// Reads `report.json` from a version's folder.
    pub fn read(dir: &Path) -> Result<Self, ReportError> {
        let path = dir.join(FILE_NAME);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(source) => return Err(ReportError::Read { path, source }),
        };
        parse::json(&text).map_err(|source| ReportError::Parse { path, source })
    }

    /// Writes `report.json` into a version's folder: whole or not at all, even if the machine
    /// stops meanwhile.
    pub fn write(&self, dir: &Path) -> Result<(), ReportError> {
        let path = dir.join(FILE_NAME);
        let mut text = serde_json::to_vec_pretty(self).map_err(ReportError::Serialise)?;
        text.push(b'\n');
        replace(dir, &path, &text).map_err(|source| ReportError::Write { path, source })
    }
}

fn replace(dir: &Path, path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = tempfile::Builder::new()
        .prefix(".report")
        .permissions(fs::Permissions::from_mode(0o644))
        .tempfile_in(dir)?;
    file.write_all(bytes)?;
    file.as_file().sync_all()?;
    file.persist(path)?;
    fs::File::open(dir)?.sync_all()
}

/// A point in time as reports spell it: `2025-01-31T12:00:00Z`.
pub fn timestamp(time: SystemTime) -> String {
    humantime::format_rfc3339_seconds(time).to_string()
}

/// The student's score as a share of the teacher's; `None` if the teacher's is not above 0.
pub fn share_kept(student: &Evaluation, teacher: &Evaluation) -> Option<f64> {
    (teacher.score.value > 0.0).then(|| student.score.value / teacher.score.value)
}

#[cfg(test)]
mod tests;
