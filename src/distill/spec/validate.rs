//! Whether the numbers and names of a request are possible, before anything runs.

use std::collections::BTreeSet;
use std::fmt;
use std::ops::RangeInclusive;

use super::{
    ClassWeights, DataSpec, DistillSpec, FinetuneSpec, HttpTeacherSpec, JobSpec, LayerLossSpec,
    LoraSpec, SplitSpec, StudentSpec, TeacherSpec, TrainingSpec, address,
};
use crate::distill::dataset::{MAX_LABEL_BYTES, MAX_LABELS, shared_column};
use crate::store::{MAX_TASK_NAME, is_task_name};

const MAX_TARGETS: usize = 64;
const MAX_LAYERS: usize = 256;

/// Everything that is wrong with a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SpecError {
    /// At least one.
    pub fields: Vec<FieldError>,
}

/// One field whose value is impossible.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FieldError {
    /// Path within the request: `training.epochs`.
    pub field: String,
    pub value: String,
    /// What is allowed, as a clause: `must be 1 to 100`.
    pub allowed: String,
}

impl fmt::Display for FieldError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} is {} but {}", self.field, self.value, self.allowed)
    }
}

impl fmt::Display for SpecError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, field) in self.fields.iter().enumerate() {
            let separator = if i == 0 { "" } else { "; " };
            write!(f, "{separator}{field}")?;
        }
        Ok(())
    }
}

impl std::error::Error for SpecError {}

impl DistillSpec {
    /// Checks every field that can be checked without reading a file. Names all that are wrong.
    pub fn validate(&self) -> Result<(), SpecError> {
        let mut check = Check { fields: Vec::new() };
        check.task(&self.task);
        check.data(&self.data);
        if let Some(student) = &self.student {
            check.student(student);
        }
        if let Some(teacher) = &self.teacher {
            check.teacher(teacher);
        }
        check.lora("lora", &self.lora);
        check.training(&self.training);
        check.number("gate.keep", self.gate.keep, 0.0..=1.5);
        if let Some(score) = self.gate.min_score {
            check.number("gate.min_score", score, -1.0..=1.0);
        }
        if let Some(error) = self.gate.max_calibration_error {
            check.number("gate.max_calibration_error", error, 0.0..=1.0);
        }
        check.job(&self.job);
        if self.training.layers.is_some() {
            match &self.teacher {
                None => check.fail("training.layers", "given", "there is no teacher"),
                Some(TeacherSpec { http: Some(_), .. }) => {
                    let allowed = "a teacher over HTTP shows no hidden states";
                    check.fail("training.layers", "given", allowed);
                }
                Some(_) => {}
            }
        }
        check.result()
    }
}

impl TrainingSpec {
    /// Checks the numbers of a training by itself.
    pub fn validate(&self) -> Result<(), SpecError> {
        let mut check = Check { fields: Vec::new() };
        check.training(self);
        check.result()
    }
}

struct Check {
    fields: Vec<FieldError>,
}

impl Check {
    fn result(self) -> Result<(), SpecError> {
        match self.fields.is_empty() {
            true => Ok(()),
            false => Err(SpecError {
                fields: self.fields,
            }),
        }
    }

    fn fail(&mut self, field: &str, value: impl fmt::Display, allowed: impl fmt::Display) {
        self.fields.push(FieldError {
            field: field.into(),
            value: value.to_string(),
            allowed: allowed.to_string(),
        });
    }

    fn count(&mut self, field: &str, value: usize, range: RangeInclusive<usize>) {
        if !range.contains(&value) {
            let allowed = format!("must be {} to {}", range.start(), range.end());
            self.fail(field, value, allowed);
        }
    }

    fn number(&mut self, field: &str, value: f64, range: RangeInclusive<f64>) {
        if !range.contains(&value) {
            let allowed = format!("must be {} to {}", range.start(), range.end());
            self.fail(field, value, allowed);
        }
    }

    /// Greater than 0 and at most `max`.
    fn positive(&mut self, field: &str, value: f64, max: f64) {
        if !(value > 0.0 && value <= max) {
            self.fail(
                field,
                value,
                format!("must be greater than 0 and at most {max}"),
            );
        }
    }

    /// At least 0 (or more than 0) and less than 1.
    fn below_one(&mut self, field: &str, value: f64, zero: bool) {
        let from = if zero { "at least" } else { "greater than" };
        if !((value > 0.0 || zero && value == 0.0) && value < 1.0) {
            self.fail(field, value, format!("must be {from} 0 and less than 1"));
        }
    }

    fn name(&mut self, field: &str, value: &str, longest: usize) {
        if value.trim().is_empty() || value.len() > longest || value.contains(char::is_control) {
            self.fail(
                field,
                quoted(value),
                format!("must be 1 to {longest} bytes of plain text"),
            );
        }
    }

    fn task(&mut self, task: &str) {
        if !is_task_name(task) {
            self.fail(
                "task",
                quoted(task),
                format!(
                    "must be 1 to {MAX_TASK_NAME} lower-case letters, digits and hyphens, and not \
                     begin with a hyphen"
                ),
            );
        }
    }

    fn data(&mut self, data: &DataSpec) {
        let splits = [
            ("data.train", Some(&data.train)),
            ("data.validation", data.validation.as_ref()),
            ("data.test", data.test.as_ref()),
        ];
        for (field, split) in splits {
            match split {
                Some(SplitSpec::Rows(rows)) if rows.is_empty() => {
                    self.fail(
                        &format!("{field}.rows"),
                        "empty",
                        "must hold at least one row",
                    );
                }
                Some(SplitSpec::Path(path)) if path.as_os_str().is_empty() => {
                    self.fail(&format!("{field}.path"), "empty", "must name a file");
                }
                _ => {}
            }
        }
        if let Some(labels) = &data.labels {
            self.labels(labels);
        }
        if let Some(columns) = &data.columns {
            let names = [
                ("text", &columns.text),
                ("text_pair", &columns.text_pair),
                ("label", &columns.label),
                ("teacher_logits", &columns.teacher_logits),
            ];
            for (field, name) in names {
                if let Some(name) = name {
                    self.name(&format!("data.columns.{field}"), name, MAX_LABEL_BYTES);
                }
            }
        }
        if let Some((column, [first, second])) = shared_column(data) {
            self.fail(
                "data.columns",
                format!("{} for both {first} and {second}", quoted(&column)),
                "must give each field a column of its own",
            );
        }
        if let Some(ClassWeights::ByLabel(weights)) = &data.class_weights {
            for (label, weight) in weights.iter().take(MAX_LABELS) {
                let field = format!("data.class_weights[{}]", quoted(label));
                self.positive(&field, *weight, 1_000.0);
            }
        }
    }

    fn labels(&mut self, labels: &[String]) {
        if labels.is_empty() || labels.len() > MAX_LABELS {
            self.fail(
                "data.labels",
                format!("a list of {}", labels.len()),
                format!("must hold 1 to {MAX_LABELS} names"),
            );
        }
        let mut seen = BTreeSet::new();
        for (i, label) in labels.iter().take(MAX_LABELS).enumerate() {
            let field = format!("data.labels[{i}]");
            self.name(&field, label, MAX_LABEL_BYTES);
            if !seen.insert(label) {
                self.fail(
                    &field,
                    quoted(label),
                    "must differ from the names before it",
                );
            }
        }
    }

    fn student(&mut self, student: &StudentSpec) {
        self.name("student.model", &student.model, 4_096);
        let Some(layers) = &student.layers else {
            return;
        };
        let different: BTreeSet<_> = layers.iter().collect();
        if different.len() != layers.len() || layers.is_empty() || layers.len() > MAX_LAYERS {
            let allowed = format!("must hold 1 to {MAX_LAYERS} numbers, each once");
            self.fail("student.layers", quoted(&format!("{layers:?}")), allowed);
        }
    }

    fn teacher(&mut self, teacher: &TeacherSpec) {
        match &teacher.http {
            None => self.name("teacher.model", &teacher.model, 4_096),
            Some(http) => {
                self.http_teacher(http);
                let alone = teacher.model.is_empty()
                    && teacher.adapter.is_none()
                    && teacher.finetune.is_none();
                if !alone {
                    self.fail(
                        "teacher.http",
                        "given",
                        "must stand without model, adapter and finetune",
                    );
                }
            }
        }
        if let Some(adapter) = &teacher.adapter {
            self.name("teacher.adapter", adapter, 4_096);
        }
        if let Some(FinetuneSpec {
            mode: _,
            epochs,
            learning_rate,
            lora,
        }) = &teacher.finetune
        {
            self.lora("teacher.finetune.lora", lora);
            self.count("teacher.finetune.epochs", *epochs, 1..=100);
            if let Some(rate) = learning_rate {
                self.below_one("teacher.finetune.learning_rate", *rate, false);
            }
        }
    }

    fn http_teacher(&mut self, http: &HttpTeacherSpec) {
        if let Err(allowed) = address::check(&http.url) {
            self.fail("teacher.http.url", quoted(&http.url), allowed);
        }
        for (theirs, name) in &http.labels {
            let field = format!("teacher.http.labels[{}]", quoted(theirs));
            self.name(&field, name, MAX_LABEL_BYTES);
        }
        self.count("teacher.http.batch_size", http.batch_size, 1..=1_024);
        self.count("teacher.http.concurrency", http.concurrency, 1..=64);
        let seconds = [
            (
                "teacher.http.timeout_seconds",
                http.timeout_seconds,
                1..=3_600,
            ),
            (
                "teacher.http.patience_seconds",
                http.patience_seconds,
                0..=86_400,
            ),
        ];
        for (field, value, range) in seconds {
            if !range.contains(&value) {
                let allowed = format!("must be {} to {}", range.start(), range.end());
                self.fail(field, value, allowed);
            }
        }
        if let Some(revision) = &http.revision {
            self.name("teacher.http.revision", revision, MAX_LABEL_BYTES);
        }
    }

    fn lora(&mut self, at: &str, lora: &LoraSpec) {
        self.count(&format!("{at}.r"), lora.r, 1..=256);
        self.positive(&format!("{at}.alpha"), lora.alpha, 4_096.0);
        self.below_one(&format!("{at}.dropout"), lora.dropout, true);
        if lora.targets.is_empty() || lora.targets.len() > MAX_TARGETS {
            self.fail(
                &format!("{at}.targets"),
                format!("a list of {}", lora.targets.len()),
                format!("must hold 1 to {MAX_TARGETS} module names, or \"all-linear\""),
            );
        }
        for (i, target) in lora.targets.iter().take(MAX_TARGETS).enumerate() {
            self.name(&format!("{at}.targets[{i}]"), target, 256);
        }
    }

    fn training(&mut self, training: &TrainingSpec) {
        self.count("training.epochs", training.epochs, 1..=100);
        self.count("training.batch_size", training.batch_size, 1..=1_024);
        self.below_one("training.learning_rate", training.learning_rate, false);
        self.positive("training.temperature", training.temperature, 100.0);
        self.number("training.alpha", training.alpha, 0.0..=1.0);
        self.count("training.label_repeats", training.label_repeats, 1..=100);
        self.count("training.max_length", training.max_length, 8..=512);
        self.below_one("training.warmup_ratio", training.warmup_ratio, true);
        self.number("training.weight_decay", training.weight_decay, 0.0..=1.0);
        self.positive("training.max_grad_norm", training.max_grad_norm, 1_000.0);
        if let Some(layers) = &training.layers {
            self.layer_losses(layers, training.gradient_checkpointing);
        }
    }

    fn layer_losses(&mut self, layers: &LayerLossSpec, gradient_checkpointing: bool) {
        self.number("training.layers.hidden", layers.hidden, 0.0..=1_000.0);
        self.number("training.layers.cosine", layers.cosine, 0.0..=1_000.0);
        if layers.hidden == 0.0 && layers.cosine == 0.0 {
            self.fail(
                "training.layers",
                "without weights",
                "must give hidden or cosine more than 0",
            );
        }
        if gradient_checkpointing {
            self.fail(
                "training.gradient_checkpointing",
                "true",
                "does not go with training.layers",
            );
        }
        if layers.map.as_ref().is_some_and(Vec::is_empty) {
            self.fail("training.layers.map", "empty", "must hold a pair of layers");
        }
    }

    fn job(&mut self, job: &JobSpec) {
        if !(-100..=100).contains(&job.priority) {
            self.fail("job.priority", job.priority, "must be -100 to 100");
        }
        for (field, bound) in [
            ("job.time_limit_seconds", job.time_limit_seconds),
            ("job.memory_limit_bytes", job.memory_limit_bytes),
        ] {
            if bound == Some(0) {
                self.fail(field, 0, "must be at least 1");
            }
        }
    }
}

fn quoted(text: &str) -> String {
    match text.char_indices().nth(80) {
        Some((end, _)) => format!("{:?}…", &text[..end]),
        None => format!("{text:?}"),
    }
}

#[cfg(test)]
mod tests;
