//! What a distillation process tells its parent: one JSON object a line on standard output.

use serde::{Deserialize, Serialize};

/// A line of progress. The last line of a run is either [`Event::Done`] or [`Event::Failed`];
/// a process that ends without one has crashed or was killed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// A stage has begun.
    Stage { stage: Stage },
    /// The data have been read, or judged once more; replaces what was said before.
    Data { warnings: Vec<String> },
    /// Work within the stage.
    Step(Step),
    /// The version folder is complete: adapter and `report.json` stand in the output folder.
    Done,
    /// The pass ended without a version; `error` is a sentence for the user.
    Failed { error: String },
}

/// The stages of a pass, in order. A pass may leave some out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// Reading and checking rows.
    Data,
    /// Fine-tuning the teacher.
    TeacherTraining,
    /// Computing the teacher's logits.
    TeacherLogits,
    /// Training the student.
    StudentTraining,
    /// Scoring on the test split.
    Evaluation,
    /// Measuring latency.
    Latency,
}

/// How far a stage is.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Step {
    pub step: usize,
    pub steps: usize,
    /// Mean training loss since the last line; absent outside training.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loss: Option<f64>,
    pub tokens_per_second: f64,
    /// Seconds until the stage ends, at the rate so far.
    pub eta_seconds: f64,
    /// The most memory of a GPU that the process has taken so far, in bytes; absent on a CPU.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu_peak_bytes: Option<u64>,
}
