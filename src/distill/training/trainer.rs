//! The training loop: packed batches shared out over the cores, gradients added up in a fixed
//! order, so that the same seed, data and thread count give the same bits.

use std::collections::BTreeMap;
use std::time::Instant;

use candle_core::Tensor;

use super::loss::{LossWeights, distillation_loss};
use super::optimizer::{AdamW, clip_scale};
use super::predict::{in_parallel, predict, share_out};
use super::schedule::learning_rate;
use super::trainee::Trainee;
use crate::adapter::ProblemType;
use crate::distill::dataset::Label;
use crate::distill::evaluation::{EvaluationError, Metric, Scoring, evaluate};
use crate::distill::progress::Step;
use crate::distill::report::{EpochSummary, TrainingSummary};
use crate::distill::rng::CounterRng;
use crate::distill::spec::TrainingSpec;
use crate::encoder::{EncoderError, Segment, ShareDropout};
use crate::text::{PackedBatch, Sequence};

/// A tokenised row with what it is to be learnt from.
#[derive(Clone, Debug)]
pub struct Example {
    pub sequence: Sequence,
    pub label: Option<Label>,
    /// The teacher's logits, `[labels]`.
    pub teacher: Option<Vec<f32>>,
}

/// How a training runs.
pub struct Learning<'a> {
    pub spec: &'a TrainingSpec,
    /// Dropout on the inputs of LoRA and of the head.
    pub dropout: f64,
    pub problem_type: ProblemType,
    /// What the validation rows are scored by.
    pub metric: Metric,
    pub label_names: &'a [String],
    /// How much each label counts in the task loss, `[labels]`; `None` if all count alike.
    pub class_weights: Option<&'a [f32]>,
    /// Cores to share a batch out over.
    pub threads: usize,
}

#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    #[error(
        "the loss is not a number at step {step}: the training has diverged; a lower learning_rate \
         may help"
    )]
    Diverged { step: usize },
    #[error("there are no rows to train on")]
    NoRows,
    #[error(transparent)]
    Encoder(#[from] EncoderError),
    #[error(transparent)]
    Evaluation(#[from] EvaluationError),
    #[error(transparent)]
    Compute(#[from] candle_core::Error),
}

/// Steps between two lines of progress.
const PROGRESS_STEPS: usize = 5;

/// Stream of random numbers that seeds the dropout of each step.
const DROPOUT: u64 = u64::MAX;

/// Trains, and returns the weights of the epoch with the best score on the validation examples
/// (the last epoch, if none has a label).
pub fn train(
    trainee: &Trainee,
    train: &[Example],
    validation: &[Example],
    learning: &Learning<'_>,
    progress: &mut dyn FnMut(Step),
) -> Result<(BTreeMap<String, Tensor>, TrainingSummary), TrainError> {
    if train.is_empty() {
        return Err(TrainError::NoRows);
    }
    let spec = learning.spec;
    let steps = spec.epochs * train.len().div_ceil(spec.batch_size);
    let mut run = Run {
        trainee,
        learning,
        optimizer: AdamW::new(spec.weight_decay),
        step: 0,
        steps,
        tokens: 0,
        start: Instant::now(),
    };
    let mut best: Option<(f64, usize, BTreeMap<String, Tensor>)> = None;
    let mut history = Vec::new();
    for epoch in 1..=spec.epochs {
        let loss = run.epoch(epoch, train, progress)?;
        let score = run.score(validation)?;
        tracing::info!(epoch, loss, validation_score = score, "epoch done");
        history.push(EpochSummary {
            epoch,
            loss,
            validation_score: score,
        });
        let score = score.unwrap_or(epoch as f64);
        if best.as_ref().is_none_or(|(best, ..)| score > *best) {
            best = Some((score, epoch, trainee.snapshot()?));
        }
    }
    let (_, best_epoch, weights) = best.ok_or(TrainError::NoRows)?;
    let seconds = run.start.elapsed().as_secs_f64();
    let summary = TrainingSummary {
        epochs: spec.epochs,
        steps,
        seconds,
        tokens_per_second: run.tokens as f64 / seconds,
        best_epoch,
        history,
    };
    Ok((weights, summary))
}

struct Run<'a> {
    trainee: &'a Trainee,
    learning: &'a Learning<'a>,
    optimizer: AdamW,
    /// Steps done, and to do in all.
    step: usize,
    steps: usize,
    /// Tokens trained on so far.
    tokens: usize,
    start: Instant,
}

/// Loss sum and gradients by variable of one share of a batch.
struct Share {
    loss: f64,
    gradients: BTreeMap<String, Vec<f32>>,
}

impl Run<'_> {
    /// One pass over the examples in random order; returns the mean loss of its rows.
    fn epoch(
        &mut self,
        epoch: usize,
        examples: &[Example],
        progress: &mut dyn FnMut(Step),
    ) -> Result<f64, TrainError> {
        let spec = self.learning.spec;
        let mut order: Vec<&Example> = examples.iter().collect();
        CounterRng::new(spec.seed, epoch as u64).shuffle(&mut order);
        let mut total = 0.0;
        let (mut recent, mut recent_rows) = (0.0, 0);
        for batch in order.chunks(spec.batch_size) {
            let loss = self.train_batch(batch)?;
            total += loss;
            recent += loss;
            recent_rows += batch.len();
            if self.step.is_multiple_of(PROGRESS_STEPS) || self.step == self.steps {
                progress(self.report(recent / recent_rows as f64));
                (recent, recent_rows) = (0.0, 0);
            }
        }
        Ok(total / examples.len() as f64)
    }

    fn report(&self, loss: f64) -> Step {
        let seconds = self.start.elapsed().as_secs_f64();
        Step {
            step: self.step,
            steps: self.steps,
            loss: Some(loss),
            tokens_per_second: self.tokens as f64 / seconds,
            eta_seconds: seconds / self.step as f64 * (self.steps - self.step) as f64,
        }
    }

    /// One optimizer step; returns the sum of the rows' losses.
    fn train_batch(&mut self, batch: &[&Example]) -> Result<f64, TrainError> {
        let spec = self.learning.spec;
        let lengths: Vec<usize> = batch.iter().map(|e| e.sequence.ids.len()).collect();
        let shares = share_out(&lengths, self.learning.threads);
        let results = in_parallel(shares.len(), |i| {
            let first = shares[i].start;
            let dropout = ShareDropout {
                rate: self.learning.dropout,
                seed: CounterRng::new(spec.seed, DROPOUT).u64_at(self.step as u64),
                first_token: lengths[..first].iter().sum(),
                first_sequence: first,
            };
            self.share(&batch[shares[i].clone()], dropout)
        })?;
        let mut loss = 0.0;
        let mut gradients: BTreeMap<String, Vec<f32>> = BTreeMap::new();
        for share in results {
            loss += share.loss;
            for (name, gradient) in share.gradients {
                match gradients.get_mut(&name) {
                    Some(sum) => sum.iter_mut().zip(&gradient).for_each(|(s, g)| *s += g),
                    None => {
                        gradients.insert(name, gradient);
                    }
                }
            }
        }
        if !loss.is_finite() {
            return Err(TrainError::Diverged {
                step: self.step + 1,
            });
        }
        // Shares sum over rows; the step follows the mean of the batch.
        let mean = 1.0 / batch.len() as f64;
        let clip = clip_scale(&gradients, spec.max_grad_norm / mean);
        let rate = learning_rate(spec.learning_rate, self.step, self.steps, spec.warmup_ratio);
        self.optimizer
            .step(self.trainee.variables(), &gradients, mean * clip, rate)?;
        self.step += 1;
        self.tokens += lengths.iter().sum::<usize>();
        Ok(loss)
    }

    /// Forward and backward of some examples.
    fn share(&self, examples: &[&Example], dropout: ShareDropout) -> Result<Share, TrainError> {
        let batch = PackedBatch::new(examples.iter().map(|example| &example.sequence));
        let (encoder, weights) = self.trainee.network()?;
        let segment = Segment {
            sequences: 0..batch.sequences(),
            weights: &weights,
        };
        let logits = encoder.forward(&batch, &[segment], Some(dropout))?;
        let labels: Vec<Option<&Label>> = examples.iter().map(|e| e.label.as_ref()).collect();
        let teacher: Vec<Option<&[f32]>> = examples.iter().map(|e| e.teacher.as_deref()).collect();
        let loss = distillation_loss(
            self.learning.problem_type,
            &logits[0],
            &labels,
            &teacher,
            LossWeights {
                temperature: self.learning.spec.temperature,
                alpha: self.learning.spec.alpha,
                labels: self.learning.class_weights,
            },
        )?;
        let store = loss.backward()?;
        let mut gradients = BTreeMap::new();
        for (name, variable) in self.trainee.variables() {
            if let Some(gradient) = store.get(variable.as_tensor()) {
                gradients.insert(name.clone(), gradient.flatten_all()?.to_vec1::<f32>()?);
            }
        }
        Ok(Share {
            loss: f64::from(loss.to_scalar::<f32>()?),
            gradients,
        })
    }

    /// Main score on the labelled validation examples, if there are any.
    fn score(&self, validation: &[Example]) -> Result<Option<f64>, TrainError> {
        if validation.iter().all(|example| example.label.is_none()) {
            return Ok(None);
        }
        let (encoder, weights) = self.trainee.network_of(self.trainee.snapshot()?)?;
        let sequences: Vec<&Sequence> = validation.iter().map(|e| &e.sequence).collect();
        let threads = self.learning.threads;
        let logits = predict(&encoder, &weights, &sequences, threads, &|_, _| {})?;
        let labels: Vec<Option<&Label>> = validation.iter().map(|e| e.label.as_ref()).collect();
        let evaluation = evaluate(
            Scoring {
                problem_type: self.learning.problem_type,
                metric: self.learning.metric,
            },
            self.learning.label_names,
            &logits,
            &labels,
            self.learning.spec.seed,
        )?;
        Ok(Some(evaluation.score.value))
    }
}
