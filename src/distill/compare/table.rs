//! The table of a comparison: its cells, put together row by row.

use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use super::CompareError;
use super::cell::Outcome;
use super::latency::{Latencies, RowLatency};
use super::plan::Cell;
use super::spec::{CompareSpec, Method};
use crate::adapter::ProblemType;
use crate::distill::dataset::{self, Dataset, Label};
use crate::distill::evaluation::{Metric, interval_of_sum, majority};
use crate::distill::report::timestamp;

/// The result of a comparison.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Comparison {
    pub task: String,
    pub problem_type: ProblemType,
    pub metric: Metric,
    /// RFC 3339, UTC.
    pub created_at: String,
    /// Rows to train on, to choose the epoch by, and to score.
    pub train_rows: usize,
    pub validation_rows: usize,
    pub test_rows: usize,
    /// Score of the most common training answer.
    pub majority: Option<f64>,
    pub machine: Machine,
    pub rows: Vec<RowSummary>,
    /// The request, with inline rows replaced by their number.
    pub spec: serde_json::Value,
}

/// What the figures of time and memory were measured on.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Machine {
    /// Model name of the processor, where the system says.
    pub processor: Option<String>,
    pub cores: usize,
    /// `cpu` or `cuda:N`.
    pub device: String,
}

/// One row over its seeds.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RowSummary {
    pub row: String,
    pub method: Method,
    pub encoder: String,
    pub seeds: Vec<SeedScore>,
    /// Mean over the seeds, and the sample's standard deviation if there are several.
    pub mean: f64,
    pub deviation: Option<f64>,
    /// 95 % bootstrap interval of the mean over resamples of the test rows.
    pub low: f64,
    pub high: f64,
    /// Mean as a share of the mean of `lora-teacher` and of `fft-teacher`.
    pub kept_of_lora: Option<f64>,
    pub kept_of_fft: Option<f64>,
    /// Mean less the mean of `lora-student`: what the teacher is worth.
    pub over_control: Option<Difference>,
    pub parameters: usize,
    pub trainable: Option<usize>,
    /// What the task adds on disk: an adapter and head, or a whole model.
    pub task_bytes: u64,
    /// Greatest over the seeds.
    pub training_bytes: Option<u64>,
    pub inference_bytes: Option<u64>,
    /// Means over the seeds.
    pub training_seconds: Option<f64>,
    pub training_tokens_per_second: Option<f64>,
    pub latency: Option<RowLatency>,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct SeedScore {
    pub seed: u64,
    pub score: f64,
}

/// A difference of means with its 95 % bootstrap interval, both models on the same resamples.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Difference {
    pub mean: f64,
    pub low: f64,
    pub high: f64,
}

impl Comparison {
    /// Puts outcomes together; they are in the order of the cells.
    pub(super) fn new(
        spec: &CompareSpec,
        data: &Dataset,
        cells: &[Cell],
        outcomes: Vec<Outcome>,
        latencies: &Latencies,
    ) -> Result<Self, CompareError> {
        let labels = dataset::labels(&data.test);
        let seed = spec.pass.training.seed;
        let scorer = Scorer { data, labels, seed };
        let mut groups: Vec<Group> = Vec::new();
        for (cell, outcome) in cells.iter().zip(outcomes) {
            match groups.iter_mut().find(|group| group.cell.row == cell.row) {
                Some(group) => group.outcomes.push(outcome),
                None => groups.push(Group {
                    cell: cell.clone(),
                    outcomes: vec![outcome],
                }),
            }
        }
        let mean_of = |method: Method| {
            let group = groups.iter().find(|group| group.cell.row == method.name());
            group.map(Group::mean)
        };
        let lora = mean_of(Method::LoraTeacher);
        let fft = mean_of(Method::FftTeacher);
        let control = groups
            .iter()
            .find(|g| g.cell.row == Method::LoraStudent.name());
        let mut rows = Vec::with_capacity(groups.len());
        for group in &groups {
            let control = control.filter(|control| {
                control.cell.row != group.cell.row && group.cell.method == Method::KdLoraStudent
            });
            let mut row = group.summary(&scorer, control)?;
            row.kept_of_lora = lora.filter(|mean| *mean > 0.0).map(|mean| row.mean / mean);
            row.kept_of_fft = fft.filter(|mean| *mean > 0.0).map(|mean| row.mean / mean);
            row.latency = latencies.rows.get(&row.row).copied();
            rows.push(row);
        }
        let train_labels = dataset::labels(&data.train);
        let (scoring, names) = (data.scoring(), &data.label_names);
        let majority = majority(scoring, names, &train_labels, &scorer.labels, seed);
        let mut spec_value = serde_json::to_value(spec).unwrap_or_default();
        spec_value["pass"] = spec.pass.without_rows();
        Ok(Self {
            task: spec.pass.task.clone(),
            problem_type: data.task_kind,
            metric: data.metric,
            created_at: timestamp(SystemTime::now()),
            train_rows: data.train.len(),
            validation_rows: data.validation.len(),
            test_rows: data.test.len(),
            majority: majority.ok().map(|majority| majority.score.value),
            machine: Machine::this(&latencies.device),
            rows,
            spec: spec_value,
        })
    }
}

struct Scorer<'a> {
    data: &'a Dataset,
    labels: Vec<Option<&'a Label>>,
    seed: u64,
}

impl Scorer<'_> {
    fn interval(&self, models: &[(f64, &[Vec<f32>])]) -> Result<(f64, f64), CompareError> {
        Ok(interval_of_sum(
            self.data.scoring(),
            &self.data.label_names,
            models,
            &self.labels,
            self.seed,
        )?)
    }
}

/// A row's cells; the first one stands for what they share.
struct Group {
    cell: Cell,
    outcomes: Vec<Outcome>,
}

impl Group {
    fn mean(&self) -> f64 {
        mean(self.outcomes.iter().map(|o| o.evaluation.score.value)).unwrap_or_default()
    }

    /// Logits with weights that add up to `total`.
    fn weighted(&self, total: f64) -> Vec<(f64, &[Vec<f32>])> {
        let weight = total / self.outcomes.len() as f64;
        let logits = self.outcomes.iter().map(|o| o.test_logits.as_slice());
        logits.map(|logits| (weight, logits)).collect()
    }

    fn summary(
        &self,
        scorer: &Scorer<'_>,
        control: Option<&Self>,
    ) -> Result<RowSummary, CompareError> {
        let (low, high) = scorer.interval(&self.weighted(1.0))?;
        let over_control = match control {
            Some(control) => {
                let models = [self.weighted(1.0), control.weighted(-1.0)].concat();
                let (low, high) = scorer.interval(&models)?;
                Some(Difference {
                    mean: self.mean() - control.mean(),
                    low,
                    high,
                })
            }
            None => None,
        };
        let outcomes = || self.outcomes.iter();
        let trainings = || outcomes().filter_map(|outcome| outcome.training.as_ref());
        let size = outcomes().next().map(|outcome| &outcome.size);
        Ok(RowSummary {
            row: self.cell.row.clone(),
            method: self.cell.method,
            encoder: self.cell.encoder.clone(),
            seeds: outcomes()
                .map(|outcome| SeedScore {
                    seed: outcome.seed,
                    score: outcome.evaluation.score.value,
                })
                .collect(),
            mean: self.mean(),
            deviation: deviation(outcomes().map(|o| o.evaluation.score.value)),
            low,
            high,
            kept_of_lora: None,
            kept_of_fft: None,
            over_control,
            parameters: size.map_or(0, |size| size.parameters),
            trainable: size.and_then(|size| size.trainable),
            task_bytes: size.map_or(0, |size| size.adapter_bytes.unwrap_or(size.encoder_bytes)),
            training_bytes: outcomes().filter_map(|o| o.training_bytes).max(),
            inference_bytes: outcomes().filter_map(|o| o.inference_bytes).max(),
            training_seconds: mean(trainings().map(|training| training.seconds)),
            training_tokens_per_second: mean(trainings().map(|t| t.tokens_per_second)),
            latency: None,
        })
    }
}

fn mean(values: impl Iterator<Item = f64>) -> Option<f64> {
    let (count, sum) = values.fold((0usize, 0.0), |(n, sum), value| (n + 1, sum + value));
    (count > 0).then(|| sum / count as f64)
}

/// Of a sample, with n − 1.
fn deviation(values: impl Iterator<Item = f64> + Clone) -> Option<f64> {
    let count = values.clone().count();
    let mean = mean(values.clone())?;
    let squares: f64 = values.map(|value| (value - mean).powi(2)).sum();
    (count > 1).then(|| (squares / (count - 1) as f64).sqrt())
}

impl Machine {
    fn this(device: &str) -> Self {
        let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let line = info.lines().find(|line| line.starts_with("model name"));
        let name = line.and_then(|line| line.split_once(':'));
        Self {
            processor: name.map(|(_, name)| name.trim().to_owned()),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            device: device.to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spread_is_that_of_a_sample() {
        let values = [0.5, 0.7, 0.9];
        assert!((mean(values.into_iter()).unwrap() - 0.7).abs() < 1e-12);
        assert!((deviation(values.into_iter()).unwrap() - 0.2).abs() < 1e-12);
        assert_eq!(deviation([0.5].into_iter()), None);
        assert_eq!(mean(std::iter::empty()), None);
    }
}
