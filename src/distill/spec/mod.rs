//! What one distillation pass is asked to do: the body of `POST /admin/distill`.

pub(crate) mod address;
mod training;
mod validate;

pub use training::{LayerLossSpec, LoraSpec, TrainingSpec};
pub use validate::{FieldError, SpecError};

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::dataset::Preset;
use super::evaluation::Metric;
use crate::adapter::ProblemType;

/// The request for one pass. Unknown fields are refused, so that a typing error is not silently
/// a default.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"task": "film-mood", "data": {"train": {"path": "films/train.jsonl"}},
    "teacher": {"model": "mpnet-base", "adapter": "movie-sentiment"},
    "lora": {"r": 8, "targets": ["all-linear"]}, "gate": {"keep": 0.85}}))]
pub struct DistillSpec {
    /// Name of the task that gets the version: `[a-z0-9][a-z0-9-]*`.
    pub task: String,
    pub data: DataSpec,
    /// By hand it stands for `--student`. A server takes no other student than its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub student: Option<StudentSpec>,
    /// Without a teacher the student trains on the labels alone (the control of a comparison).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub teacher: Option<TeacherSpec>,
    #[serde(default)]
    pub lora: LoraSpec,
    #[serde(default)]
    pub training: TrainingSpec,
    #[serde(default)]
    pub gate: GateSpec,
    /// Promote the version when it passes the gate.
    #[serde(default = "yes")]
    pub promote: bool,
    /// How a server runs the job; by hand it has no effect.
    #[serde(default, skip_serializing_if = "JobSpec::is_default")]
    pub job: JobSpec,
}

impl DistillSpec {
    /// The request for the report: inline rows are replaced by their number, and of absolute paths
    /// the last two parts stay, since a report is shown to whoever may ask for the task.
    pub fn without_rows(&self) -> serde_json::Value {
        let mut spec = serde_json::to_value(self).unwrap_or_default();
        for split in ["train", "validation", "test"] {
            if let Some(rows) = spec.pointer_mut(&format!("/data/{split}/rows")) {
                *rows = rows.as_array().map_or(0, Vec::len).into();
            }
            shorten(spec.pointer_mut(&format!("/data/{split}/path")));
        }
        shorten(spec.pointer_mut("/student/model"));
        shorten(spec.pointer_mut("/teacher/model"));
        shorten(spec.pointer_mut("/teacher/adapter"));
        // Where a teacher runs is nobody's business but the operator's.
        if let Some(url) = spec.pointer_mut("/teacher/http/url") {
            *url = "…".into();
        }
        spec
    }
}

/// Leaves the last two parts of an absolute path.
fn shorten(path: Option<&mut serde_json::Value>) {
    let Some(value) = path else { return };
    let Some(path) = value.as_str().map(Path::new) else {
        return;
    };
    if path.is_absolute() {
        let parts: Vec<_> = path.iter().collect();
        let last: PathBuf = parts[parts.len().saturating_sub(2).max(1)..]
            .iter()
            .collect();
        *value = last.to_string_lossy().into();
    }
}

#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DataSpec {
    pub train: SplitSpec,
    /// Cut from the training rows, stratified, when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub validation: Option<SplitSpec>,
    /// Cut from the training rows, stratified, when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub test: Option<SplitSpec>,
    /// What the labels mean. Needed only where they leave it open: whole numbers without a trained
    /// teacher may be classes or targets of a regression.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem_type: Option<ProblemType>,
    /// Names of the classes in the order of the logits. Whole-number labels count from 0 in it,
    /// unless all of them are among the names.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub labels: Option<Vec<String>>,
    /// Names of the columns or JSON fields of the rows, where they are others than `text`,
    /// `text_pair`, `label` and `teacher_logits`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub columns: Option<ColumnSpec>,
    /// A task of GLUE: sets columns, labels, kind of task and metric. `train.path` may then be the
    /// folder of its files; the development rows are the test split, for GLUE's own test rows have
    /// no labels.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub preset: Option<Preset>,
    /// What the task is scored by: accuracy for classes, macro-F1 for several labels, the mean of
    /// Pearson's and Spearman's correlation for a regression, if nothing is said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metric: Option<Metric>,
    /// How much a label counts in the task loss, for classes that are rare.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub class_weights: Option<ClassWeights>,
}

impl DataSpec {
    /// The data set of these training rows, with defaults for everything else.
    pub fn of(train: SplitSpec) -> Self {
        Self {
            train,
            validation: None,
            test: None,
            problem_type: None,
            labels: None,
            columns: None,
            preset: None,
            metric: None,
            class_weights: None,
        }
    }

    /// The names of the classes that the request or its preset gives.
    pub fn known_labels(&self) -> Option<Vec<String>> {
        self.labels.clone().or_else(|| self.preset?.labels())
    }

    /// The kind of task that the request or its preset gives.
    pub fn known_problem_type(&self) -> Option<ProblemType> {
        let by_preset = self.preset.map(Preset::problem_type);
        self.problem_type.or(by_preset)
    }
}

/// Names of columns, each only where it is not the field's own.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ColumnSpec {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text_pair: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub label: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub teacher_logits: Option<String>,
}

/// How much each label counts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(
    untagged,
    expecting = "expected \"balanced\", or an object with a number for each label"
)]
pub enum ClassWeights {
    /// In inverse proportion to the training rows that have it.
    Balanced(Balanced),
    /// By name; 1 for labels that are not named. A greater weight makes rows of the class (or for
    /// several labels the presence of the label) count for more.
    ByLabel(BTreeMap<String, f64>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Balanced {
    Balanced,
}

/// Rows in the request, or a JSONL, CSV, TSV or Parquet file below the data root.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum SplitSpec {
    #[schema(value_type = Vec<Object>)]
    Rows(Vec<serde_json::Value>),
    #[schema(value_type = String)]
    Path(PathBuf),
}

/// The encoder that carries the adapter.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct StudentSpec {
    /// Catalog name or folder.
    pub model: String,
    /// Of its layers, counted from 0, only these, in this order; all if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layers: Option<Vec<usize>>,
}

impl StudentSpec {
    /// The student in a word, as `--student` takes it.
    pub fn name(&self) -> String {
        let Some(layers) = &self.layers else {
            return self.model.clone();
        };
        let layers: Vec<_> = layers.iter().map(usize::to_string).collect();
        format!("{}@{}", self.model, layers.join(","))
    }
}

#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TeacherSpec {
    /// Catalog name, or a folder below the data root, of an encoder or a fine-tuned classifier;
    /// absent for a teacher over HTTP.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub model: String,
    /// A teacher that runs elsewhere.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub http: Option<HttpTeacherSpec>,
    /// Name of a shipped teacher adapter, or a PEFT folder below the data root.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adapter: Option<String>,
    /// Fine-tune the teacher on the training rows first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finetune: Option<FinetuneSpec>,
}

/// An endpoint that classifies texts. The value of the variable `KDLORA_TEACHER_TOKEN` is sent along
/// as a bearer token if `--teacher-origin` names the endpoint's origin.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct HttpTeacherSpec {
    /// Whole address, `http` or `https`: `http://127.0.0.1:8081/predict`.
    pub url: String,
    #[serde(default)]
    pub api: HttpApi,
    /// Names of the task's labels by those that the endpoint answers with, where they differ.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// What the scores are. Absent: logits from text-embeddings-inference, which is asked for raw
    /// scores; probabilities from Hugging Face (values of a regression as they are).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scores: Option<HttpScores>,
    /// Texts in one request.
    #[serde(default = "http_batch_size")]
    #[schema(minimum = 1, maximum = 1024, default = 32)]
    pub batch_size: usize,
    /// Requests at a time.
    #[serde(default = "http_concurrency")]
    #[schema(minimum = 1, maximum = 64, default = 4)]
    pub concurrency: usize,
    /// Longest time for one request.
    #[serde(default = "http_timeout")]
    #[schema(minimum = 1, maximum = 3600, default = 60)]
    pub timeout_seconds: u64,
    /// How long a request that fails is tried again: the time that the endpoint may be away.
    #[serde(default = "http_patience")]
    #[schema(maximum = 86400, default = 600)]
    pub patience_seconds: u64,
    /// Told apart in the cache of answers: change it when the model behind the address changes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
}

/// How an endpoint is spoken to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum HttpApi {
    /// `/predict` of text-embeddings-inference.
    #[default]
    TextEmbeddingsInference,
    /// Text classification as Hugging Face's endpoints have it: `{"inputs": …}` →
    /// `[[{"label", "score"}]]`.
    HuggingFace,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum HttpScores {
    Logits,
    Probabilities,
}

fn http_batch_size() -> usize {
    32
}

fn http_concurrency() -> usize {
    4
}

fn http_timeout() -> u64 {
    60
}

fn http_patience() -> u64 {
    600
}

#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct FinetuneSpec {
    pub mode: FinetuneMode,
    pub epochs: usize,
    /// Defaults: 3e-4 for LoRA, 3e-5 for full fine-tuning.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub learning_rate: Option<f64>,
    /// LoRA of the teacher; rank 8 on every linear by default.
    #[serde(default = "teacher_lora")]
    pub lora: LoraSpec,
}

impl FinetuneSpec {
    /// The asked learning rate, or the mode's own.
    pub fn learning_rate(&self) -> f64 {
        self.learning_rate.unwrap_or(match self.mode {
            FinetuneMode::Lora => 3e-4,
            FinetuneMode::Full => 3e-5,
        })
    }

    /// How a teacher of the pass is trained: on the labels alone.
    pub fn training(&self, pass: &TrainingSpec) -> TrainingSpec {
        TrainingSpec {
            epochs: self.epochs,
            learning_rate: self.learning_rate(),
            ..pass.clone().without_teacher()
        }
    }
}

fn teacher_lora() -> LoraSpec {
    LoraSpec {
        targets: vec![crate::adapter::ALL_LINEAR.into()],
        ..LoraSpec::default()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum FinetuneMode {
    /// Every weight of the teacher trains.
    Full,
    /// Only LoRA weights and the head train.
    Lora,
}

/// When a version may go live.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct GateSpec {
    /// Share of the teacher's score that the student must keep.
    pub keep: f64,
    /// Least score of the student, whatever its teacher's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_score: Option<f64>,
    /// Greatest expected calibration error on the test rows, at the temperature that is served.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_calibration_error: Option<f64>,
}

impl Default for GateSpec {
    fn default() -> Self {
        Self {
            keep: 0.95,
            min_score: None,
            max_calibration_error: None,
        }
    }
}

/// The job's place in the queue and the bounds of its process.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct JobSpec {
    /// From −100 to 100. Of the queued jobs the one of the greatest priority starts first, among
    /// equals the oldest; one that runs is not interrupted.
    #[schema(minimum = -100, maximum = 100)]
    pub priority: i32,
    /// A job that runs longer ends as failed. The server may have a lower limit of its own.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1)]
    pub time_limit_seconds: Option<u64>,
    /// A job whose process needs more memory ends as failed. The server may have a lower limit of
    /// its own. Files that the process has mapped don't count.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1)]
    pub memory_limit_bytes: Option<u64>,
}

impl JobSpec {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

fn yes() -> bool {
    true
}
