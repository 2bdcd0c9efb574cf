//! What one distillation pass is asked to do: the body of `POST /admin/distill`.

mod validate;

pub use validate::{FieldError, SpecError};

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::adapter::ProblemType;
use crate::text::Truncation;

/// The request for one pass. Unknown fields are refused, so that a typing error is not silently
/// a default.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
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
    /// What the labels mean. Needed only where they leave it open: whole numbers 0, 1, 2 … without
    /// a trained teacher may be classes or targets of a regression.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem_type: Option<ProblemType>,
    /// Names of the classes in the order of the logits. Whole-number labels count from 0 in it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub labels: Option<Vec<String>>,
}

/// Rows in the request, or a JSONL/CSV file below the data root.
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
    /// Catalog name, or a folder below the data root, of an encoder or a fine-tuned classifier.
    pub model: String,
    /// Name of a shipped teacher adapter, or a PEFT folder below the data root.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adapter: Option<String>,
    /// Fine-tune the teacher on the training rows first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finetune: Option<FinetuneSpec>,
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

/// LoRA of the student.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct LoraSpec {
    pub r: usize,
    pub alpha: f64,
    pub dropout: f64,
    /// Last components of module names (`query`, `value`), or `all-linear`.
    pub targets: Vec<String>,
}

impl Default for LoraSpec {
    fn default() -> Self {
        Self {
            r: 8,
            alpha: 16.0,
            dropout: 0.1,
            targets: vec!["query".into(), "value".into()],
        }
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct TrainingSpec {
    pub epochs: usize,
    pub batch_size: usize,
    pub learning_rate: f64,
    /// Temperature T of the distillation loss.
    pub temperature: f64,
    /// Share α of the distillation loss; 1 − α goes to the task loss.
    pub alpha: f64,
    /// Tokens a sequence is cut to.
    pub max_length: usize,
    /// Which text of a pair is cut.
    pub truncation: Truncation,
    pub seed: u64,
    /// Share of the steps in which the learning rate rises.
    pub warmup_ratio: f64,
    pub weight_decay: f64,
    /// Greatest global norm of the gradient.
    pub max_grad_norm: f64,
}

impl Default for TrainingSpec {
    fn default() -> Self {
        Self {
            epochs: 4,
            batch_size: 32,
            learning_rate: 1e-3,
            temperature: 2.0,
            alpha: 0.5,
            max_length: 128,
            truncation: Truncation::LongestFirst,
            seed: 42,
            warmup_ratio: 0.06,
            weight_decay: 0.01,
            max_grad_norm: 1.0,
        }
    }
}

/// When a version may go live.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct GateSpec {
    /// Share of the teacher's score that the student must keep.
    pub keep: f64,
}

impl Default for GateSpec {
    fn default() -> Self {
        Self { keep: 0.95 }
    }
}

fn yes() -> bool {
    true
}
