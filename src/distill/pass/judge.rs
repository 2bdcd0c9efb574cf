//! What a version is worth: scores and latency beside its teacher.

use std::time::SystemTime;

use super::super::dataset::{self, Label, Row};
use super::super::evaluation::{
    EvaluationError, calibrate, evaluate, greatest_differences, likeness, majority,
    measure_interleaved, teacher_answers,
};
use super::super::gate::Gate;
use super::super::models::Base;
use super::super::report::{
    DataSummary, Latency, ModelSize, PeakMemory, Reference, Report, TrainingSummary, share_kept,
    timestamp,
};
use super::teach::Taught;
use super::{Pass, PassError};
use crate::encoder::{Encoder, EncoderError, Segment, TaskWeights};
use crate::text::{PackedBatch, Sequence};

/// Batches measured for latency, after some that are not.
const LATENCY_ROUNDS: [(usize, usize); 2] = [(1, 60), (32, 12)];
const LATENCY_WARM_UP: usize = 2;

/// Test rows' labels: the given ones, or the teacher's answers where there are none.
struct TestLabels {
    reference: Reference,
    answers: Vec<Label>,
}

impl Pass<'_> {
    /// The teacher's logits of the test rows: those of the model that taught, or those that came
    /// with the rows, if all of them have some.
    fn teacher_on_test(&self, taught: Option<&Taught>) -> Option<Vec<Vec<f32>>> {
        let test = &self.data.test;
        match taught {
            Some(taught) => Some(by_id(test, &taught.logits)),
            None => test.iter().map(|row| row.teacher_logits.clone()).collect(),
        }
    }

    fn test_labels(&self, teacher: Option<&[Vec<f32>]>) -> TestLabels {
        let labelled = self.data.test.iter().any(|row| row.label.is_some());
        match teacher {
            Some(logits) if !labelled => TestLabels {
                reference: Reference::Teacher,
                answers: teacher_answers(self.data.task_kind, logits),
            },
            _ => TestLabels {
                reference: Reference::Labels,
                answers: Vec::new(),
            },
        }
    }

    /// Warns of a teacher that has learnt the training rows' labels.
    pub(super) fn warn_of_repeated_labels(&mut self, taught: &Taught) -> Result<(), PassError> {
        let data = &self.data;
        let score = |rows: &[Row]| {
            let (logits, labels) = (by_id(rows, &taught.logits), dataset::labels(rows));
            let seed = self.spec.training.seed;
            match evaluate(data.scoring(), &data.label_names, &logits, &labels, seed) {
                Ok(evaluation) => Ok(Some(evaluation.score.value)),
                Err(EvaluationError::NoLabels) => Ok(None),
                Err(error) => Err(error),
            }
        };
        if let (Some(train), Some(validation)) = (score(&data.train)?, score(&data.validation)?) {
            let warning = dataset::repeated_labels(&data.checks, train, validation);
            self.data.checks.warnings.extend(warning);
            self.tell_warnings();
        }
        Ok(())
    }

    pub(super) fn score(
        &self,
        answers: &[Vec<f32>],
        taught: Option<&Taught>,
        student_model: ModelSize,
        training: TrainingSummary,
    ) -> Result<Report, PassError> {
        let Pass { spec, data, .. } = self;
        let (kind, names, seed) = (data.task_kind, &data.label_names, spec.training.seed);
        let scoring = data.scoring();
        let teacher_test = self.teacher_on_test(taught);
        let test_labels = self.test_labels(teacher_test.as_deref());
        let labels: Vec<Option<&Label>> = match test_labels.reference {
            Reference::Labels => dataset::labels(&data.test),
            Reference::Teacher => test_labels.answers.iter().map(Some).collect(),
        };
        let validation = (
            by_id(&data.validation, answers),
            dataset::labels(&data.validation),
        );
        let test = by_id(&data.test, answers);
        let mut student = evaluate(scoring, names, &test, &labels, seed)?;
        student.calibration = calibrate(kind, (&validation.0, &validation.1), (&test, &labels))?;
        let teacher = match &teacher_test {
            Some(logits) => Some(evaluate(scoring, names, logits, &labels, seed)?),
            None => None,
        };
        let majority = match majority(scoring, names, &dataset::labels(&data.train), &labels, seed)
        {
            Ok(majority) => Some(majority),
            Err(EvaluationError::NoLabels) => None,
            Err(error) => return Err(error.into()),
        };
        let alike = match &teacher_test {
            Some(logits) => Some(likeness(kind, &test, logits)?),
            None => None,
        };
        let gate = Gate::judge(&spec.gate, &student, teacher.as_ref(), majority.as_ref());
        Ok(Report {
            task: spec.task.clone(),
            problem_type: kind,
            created_at: timestamp(SystemTime::now()),
            seed,
            spec: spec.without_rows(),
            data: DataSummary {
                labels: names.clone(),
                test_digest: Some(dataset::digest(&data.test)),
                checks: data.checks.clone(),
            },
            reference: test_labels.reference,
            share_kept: teacher
                .as_ref()
                .and_then(|teacher| share_kept(&student, teacher)),
            student,
            teacher,
            control: None,
            majority,
            likeness: alike,
            student_model,
            teacher_model: taught.and_then(|taught| Some(taught.model.as_ref()?.size.clone())),
            latency: None,
            peak_memory: PeakMemory::default(),
            training: Some(training),
            teacher_training: taught.and_then(|taught| taught.training.clone()),
            gate: Some(gate),
            differences: match &teacher_test {
                Some(logits) => greatest_differences(kind, names, &data.test, &test, logits),
                None => Vec::new(),
            },
        })
    }

    /// Student and teacher in turns on the test rows, a forward on one thread each.
    pub(super) fn latency(
        &self,
        student: &Base,
        weights: &TaskWeights,
        sequences: &[Sequence],
        taught: Option<&Taught>,
    ) -> Result<Option<Latency>, PassError> {
        let taught = match taught.and_then(|taught| taught.model.as_ref()) {
            Some(model) => Some((model, model.encoder()?)),
            None => None,
        };
        let ids: Vec<usize> = self.data.test.iter().map(|row| row.id).collect();
        let mut measured = Vec::new();
        for (batch, rounds) in LATENCY_ROUNDS {
            let mut by_student = |ids: &[&usize]| {
                forward(
                    &student.encoder,
                    weights,
                    ids.iter().map(|id| &sequences[**id]),
                )
            };
            let mut by_teacher = taught.as_ref().map(|(taught, encoder)| {
                move |ids: &[&usize]| {
                    let rows = ids.iter().map(|id| &taught.sequences[**id]);
                    forward(encoder, &taught.weights, rows)
                }
            });
            let by_teacher = by_teacher.as_mut().map(|call| call as _);
            let at = measure_interleaved(
                by_teacher,
                &mut by_student,
                &ids,
                batch,
                LATENCY_WARM_UP,
                rounds,
            )?;
            measured.extend(at);
        }
        let Ok([batch_1, batch_32]) = <[_; 2]>::try_from(measured) else {
            return Ok(None);
        };
        Ok(Some(Latency {
            device: self.places.placement.device_name(),
            threads: 1,
            batch_1,
            batch_32,
        }))
    }
}

pub(in crate::distill) fn forward<'a>(
    encoder: &Encoder,
    weights: &TaskWeights,
    sequences: impl Iterator<Item = &'a Sequence>,
) -> Result<(), EncoderError> {
    let batch = PackedBatch::new(sequences);
    let segment = Segment {
        sequences: 0..batch.sequences(),
        weights,
    };
    encoder.logits(&batch, &[segment]).map(|_| ())
}

fn by_id(rows: &[Row], logits: &[Vec<f32>]) -> Vec<Vec<f32>> {
    rows.iter().map(|row| logits[row.id].clone()).collect()
}
