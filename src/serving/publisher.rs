//! The live task table follows the store: a version is loaded and tried before it answers.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use tokio::sync::Mutex;
use tokio::task::{JoinError, spawn_blocking};

use super::{LiveTask, Model, ModelError, TaskSegment, TaskTable};
use crate::adapter::{AdapterError, AdapterFolder, Classifier, Mode};
use crate::encoder::Encoder;
use crate::store::{Store, StoreError, Version};
use crate::telemetry::{MeasuredLatency, Metrics};
use crate::text::{Input, PackedBatch, Tokenizer, TokenizerError, Truncation};

/// Why a version does not answer.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("the adapter can't be used with this student")]
    Adapter(#[from] AdapterError),
    #[error("the adapter failed on a first text")]
    WarmUp(#[from] ModelError),
    #[error("the adapter failed on a first text: its logits are {0:?}")]
    Logits(Vec<f32>),
    #[error("the first text can't be tokenised")]
    Tokenize(#[from] TokenizerError),
    #[error(
        "the adapter needs {needed} bytes, and with those of the other tasks that is {total}, more \
         than --adapter-memory {limit}"
    )]
    Memory { needed: u64, total: u64, limit: u64 },
    #[error("loading the adapter was interrupted")]
    Interrupted(#[from] JoinError),
}

/// Brings versions from the store into the task table.
#[derive(Clone)]
pub struct Publisher {
    student: Student,
    store: Store,
    tasks: Arc<TaskTable>,
    metrics: Arc<Metrics>,
    adapter_memory: Option<u64>,
    merged: Arc<MergedTasks>,
    /// One change at a time: an older version must not overtake a newer one.
    change: Arc<Mutex<()>>,
}

/// The tasks that are served merged though they could be hot.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum MergedTasks {
    #[default]
    None,
    Some(BTreeSet<String>),
    All,
}

impl MergedTasks {
    fn mode(&self, task: &str) -> Mode {
        let merged = match self {
            Self::None => false,
            Self::Some(tasks) => tasks.contains(task),
            Self::All => true,
        };
        if merged { Mode::Merged } else { Mode::Hot }
    }
}

/// The encoder that serves, with its tokenizer.
#[derive(Clone)]
pub struct Student {
    pub encoder: Arc<Encoder>,
    pub tokenizer: Tokenizer,
}

impl Publisher {
    /// `adapter_memory`: most bytes for the adapters of all live tasks together.
    pub fn new(
        student: Student,
        store: Store,
        tasks: Arc<TaskTable>,
        metrics: Arc<Metrics>,
        adapter_memory: Option<u64>,
        merged: MergedTasks,
    ) -> Self {
        Self {
            student,
            store,
            tasks,
            metrics,
            adapter_memory,
            merged: Arc::new(merged),
            change: Arc::default(),
        }
    }

    /// Makes the table answer with what the store says is live, in the mode that it says; `None` if the task has no live
    /// version. Until this ends, and if it fails, the version before goes on answering.
    pub async fn refresh(&self, task: &str) -> Result<Option<u64>, PublishError> {
        let _change = self.change.lock().await;
        let Some(version) = self.store.live(task).await? else {
            return Ok(None);
        };
        let mode = self.store.mode(task).await?;
        let mode = mode.unwrap_or_else(|| self.merged.mode(task));
        let answering = self.tasks.get(task);
        let answering = answering.map(|live| (live.version, live.asked_mode));
        if answering != Some((version.version, mode)) {
            let loaded = self.load_version(&version, mode).await?;
            self.publish(&version, loaded);
        }
        Ok(Some(version.version))
    }

    /// [`Self::refresh`] for all tasks. A task that can't be loaded is logged and left out: the
    /// others answer all the same.
    pub async fn refresh_all(&self) -> Result<(), StoreError> {
        for version in self.store.live_versions().await? {
            if let Err(error) = self.refresh(&version.task).await {
                tracing::error!(
                    task = version.task,
                    version = version.version,
                    error = crate::telemetry::chain(&error),
                    "the live version of a task can't be loaded; the task does not answer"
                );
            }
        }
        Ok(())
    }

    async fn load_version(&self, version: &Version, mode: Mode) -> Result<Loaded, PublishError> {
        let (student, folder) = (self.student.clone(), version.path.clone());
        let loaded = spawn_blocking(move || student.load(&folder, mode)).await??;
        let others: u64 = self
            .tasks
            .all()
            .values()
            .filter(|task| task.name != version.task)
            .map(|task| task.weight_bytes)
            .sum();
        let needed = loaded.weight_bytes;
        let total = others + needed;
        match self.adapter_memory {
            Some(limit) if total > limit => Err(PublishError::Memory {
                needed,
                total,
                limit,
            }),
            _ => Ok(loaded),
        }
    }

    fn publish(&self, version: &Version, loaded: Loaded) {
        let measured = measured_latency(version.report.as_ref());
        self.tasks.publish(LiveTask {
            name: version.task.clone(),
            version: version.version,
            report: version.report.clone(),
            ..loaded
        });
        self.metrics
            .task_live(&version.task, version.version, measured);
        let tasks = self.tasks.all();
        let bytes = tasks.values().map(|task| task.weight_bytes).sum();
        self.metrics.adapters(tasks.len(), bytes);
        tracing::info!(task = version.task, version = version.version, "live");
    }
}

/// A task that has no name and number yet.
type Loaded = LiveTask;

impl Student {
    /// Whether the adapter of `folder` can answer.
    pub fn check(&self, folder: &Path) -> Result<(), PublishError> {
        self.load(folder, Mode::Hot).map(drop)
    }

    /// Reads the adapter of `folder`, puts it on the encoder, and lets it answer a text. An adapter
    /// that can't be hot is merged.
    fn load(&self, folder: &Path, mode: Mode) -> Result<Loaded, PublishError> {
        let adapter = AdapterFolder::read(folder)?;
        let Classifier {
            encoder, weights, ..
        } = match mode {
            Mode::Hot => Classifier::from_adapter(Arc::clone(&self.encoder), &adapter)?,
            Mode::Merged => Classifier::merged(&self.encoder, &adapter)?,
        };
        let merged = (!Arc::ptr_eq(&encoder, &self.encoder)).then_some(encoder);
        let elements = match &merged {
            None => adapter.parameters(),
            Some(own) => own.weights().beside(self.encoder.weights()),
        };
        let most = self.encoder.config().max_sequence_length();
        let task = LiveTask {
            name: String::new(),
            version: 0,
            weights,
            merged,
            asked_mode: mode,
            // f32.
            weight_bytes: 4 * elements as u64,
            report: None,
            max_length: adapter.task.max_length.min(most),
            config: adapter.task,
        };
        self.warm_up(&task)?;
        Ok(task)
    }

    fn warm_up(&self, task: &LiveTask) -> Result<(), PublishError> {
        let input = Input {
            text: "A first text.".to_owned(),
            text_pair: None,
        };
        let sequence =
            self.tokenizer
                .encode(&input, task.max_length, Some(Truncation::LongestFirst))?;
        let batch = PackedBatch::new([&sequence]);
        let segment = TaskSegment {
            sequences: 0..1,
            task,
        };
        let rows = Model::logits(&*self.encoder, &batch, &[segment])?;
        let row = rows.into_iter().next().unwrap_or_default();
        let fits = row.len() == task.config.labels.len();
        if fits && row.iter().all(|logit| logit.is_finite()) {
            Ok(())
        } else {
            Err(PublishError::Logits(row))
        }
    }
}

/// The figures of `report.json` at `latency.batch_1`.
fn measured_latency(report: Option<&Value>) -> MeasuredLatency {
    let figure = |path: &str| report?.pointer(path)?.as_f64();
    let p50 = |model: &str| {
        let milliseconds = figure(&format!("/latency/batch_1/{model}/p50_ms"))?;
        Duration::try_from_secs_f64(milliseconds / 1000.0).ok()
    };
    MeasuredLatency {
        student_p50: p50("student"),
        teacher_p50: p50("teacher"),
        speed_up: figure("/latency/batch_1/speed_up"),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn latency_is_taken_from_the_report_where_it_is_there() {
        let report = json!({"latency": {"batch_1": {
            "student": {"p50_ms": 2.5}, "teacher": {"p50_ms": 20.0}, "speed_up": 8.0,
        }}});
        let measured = measured_latency(Some(&report));
        assert_eq!(measured.student_p50, Some(Duration::from_micros(2500)));
        assert_eq!(measured.teacher_p50, Some(Duration::from_millis(20)));
        assert_eq!(measured.speed_up, Some(8.0));
        for report in [None, Some(&json!({"latency": null})), Some(&json!(3))] {
            assert_eq!(measured_latency(report), MeasuredLatency::default());
        }
    }
}
