//! The training loop: packed batches shared out over the cores, gradients added up in a fixed
//! order, so that the same seed, data and thread count give the same bits, killed and resumed or
//! not.

use std::collections::BTreeMap;
use std::thread;
use std::time::Instant;

use candle_core::Tensor;
use sha2::{Digest as _, Sha256};

use super::checkpoint::{BestEpoch, Checkpoint, Clock, Kind, Position, Stored};
use super::layers::{LayerTeacher, NoSuchLayer};
use super::memory::{self, Mebibytes, MemoryNeed, Source};
use super::optimizer::{AdamW, clip_scale};
use super::predict::predict;
use super::schedule::learning_rate;
use super::step::Share;
use super::trainee::Trainee;
use crate::adapter::ProblemType;
use crate::distill::dataset::Label;
use crate::distill::evaluation::{EvaluationError, Metric, Scoring, evaluate};
use crate::distill::models::GpuLimits;
use crate::distill::progress::Step;
use crate::distill::report::{EpochSummary, TrainingSummary};
use crate::distill::rng::CounterRng;
use crate::distill::spec::TrainingSpec;
use crate::encoder::EncoderError;
use crate::ops::device;
use crate::text::Sequence;

/// A tokenised row with what it is to be learnt from.
#[derive(Clone, Debug)]
pub struct Example {
    pub sequence: Sequence,
    pub label: Option<Label>,
    /// The teacher's logits, `[labels]`.
    pub teacher: Option<Vec<f32>>,
    /// The row as the teacher reads it, where its hidden states are learnt from.
    pub teacher_sequence: Option<Sequence>,
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
    /// Cores to share a batch out over. A resumed training keeps the number that it began with. On
    /// a GPU a batch is computed whole.
    pub threads: usize,
    pub gpu: GpuLimits,
    /// Whose hidden states are learnt from, if anyone's. Does not go with gradient checkpointing.
    pub layer_teacher: Option<&'a LayerTeacher>,
    /// Bytes that the process may take; more, and the training is refused before it starts.
    pub memory_limit: Option<u64>,
    /// Where the training is kept while it runs, and gone on with after a kill.
    pub checkpoint: Option<&'a Checkpoint>,
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
    #[error(
        "training.layers compares token by token, but the teacher's tokenizer cuts a text of \
         {student} tokens into {teacher}"
    )]
    Tokens { student: usize, teacher: usize },
    #[error(transparent)]
    Layers(#[from] NoSuchLayer),
    #[error(
        "the training needs {needed} of memory ({source_of_figure}) and may take {limit}; a smaller \
         training.batch_size or training.max_length needs less, and so does \
         training.gradient_checkpointing"
    )]
    Memory {
        needed: Mebibytes,
        limit: Mebibytes,
        source_of_figure: Source,
    },
    #[error("the checkpoint of the training cannot be written")]
    Checkpoint(#[source] std::io::Error),
    #[error(transparent)]
    Encoder(#[from] EncoderError),
    #[error(transparent)]
    Evaluation(#[from] EvaluationError),
    #[error(transparent)]
    Compute(#[from] candle_core::Error),
}

/// Steps between two lines of progress.
const PROGRESS_STEPS: usize = 5;

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
    if learning.layer_teacher.is_some() {
        check_tokens(train)?;
    }
    let rows = rows_of_an_epoch(train, learning.spec.label_repeats);
    let mut run = Run::begin(trainee, &rows, learning)?;
    if !run.at.finished {
        run.check_memory(&rows)?;
    }
    while !run.at.finished {
        run.rest_of_epoch(&rows, progress)?;
        run.end_epoch(rows.len(), validation)?;
    }
    let best = run.at.best.ok_or(TrainError::NoRows)?;
    let summary = TrainingSummary {
        epochs: learning.spec.epochs,
        steps: run.steps,
        seconds: run.at.seconds,
        tokens_per_second: run.at.tokens as f64 / run.at.seconds,
        best_epoch: best.epoch,
        history: run.at.history,
    };
    Ok((run.best, summary))
}

pub(super) struct Run<'a> {
    pub(super) trainee: &'a Trainee,
    pub(super) learning: &'a Learning<'a>,
    optimizer: AdamW,
    pub(super) at: Position,
    /// Steps in all.
    steps: usize,
    /// Weights of the best epoch so far.
    best: BTreeMap<String, Tensor>,
    /// Seconds of the processes before this one, and when this one began.
    seconds_before: f64,
    start: Instant,
    clock: Clock,
}

impl<'a> Run<'a> {
    /// From the start, or from where a checkpoint says.
    fn begin(
        trainee: &'a Trainee,
        rows: &[&Example],
        learning: &'a Learning<'a>,
    ) -> Result<Self, TrainError> {
        let spec = learning.spec;
        let every = learning.checkpoint.map(|checkpoint| checkpoint.every);
        let mut run = Self {
            trainee,
            learning,
            optimizer: AdamW::new(spec.weight_decay),
            at: Position {
                fingerprint: fingerprint(trainee, rows, learning),
                threads: match trainee.device().is_cpu() {
                    true => learning.threads,
                    false => 1,
                },
                epoch: 1,
                ..Position::default()
            },
            steps: spec.epochs * rows.len().div_ceil(spec.batch_size),
            best: BTreeMap::new(),
            seconds_before: 0.0,
            start: Instant::now(),
            clock: Clock::new(every.unwrap_or_default()),
        };
        let stored = learning
            .checkpoint
            .and_then(|checkpoint| checkpoint.read(&run.at.fingerprint));
        if let Some(stored) = stored {
            run.resume(stored)?;
        }
        Ok(run)
    }

    fn resume(&mut self, stored: Stored) -> Result<(), TrainError> {
        tracing::info!(step = stored.position.step, "going on from a checkpoint");
        for (name, variable) in self.trainee.variables() {
            if let Some(tensor) = stored.variables.get(name) {
                variable.set(&tensor.to_device(variable.device())?)?;
            }
        }
        let step = stored.position.step;
        let variables = self.trainee.variables();
        self.optimizer
            .resume(step, variables, stored.first, stored.second)?;
        self.seconds_before = stored.position.seconds;
        self.best = stored.best;
        self.at = stored.position;
        Ok(())
    }

    /// Refuses a training that would not fit: by estimate, then by a trial step.
    fn check_memory(&self, rows: &[&Example]) -> Result<(), TrainError> {
        let (spec, limit) = (self.learning.spec, self.memory_limit());
        let mut lengths: Vec<usize> = rows.iter().map(|e| e.sequence.ids.len()).collect();
        let tokens = memory::heaviest_batch(&mut lengths, spec.batch_size);
        let (encoder, _) = self.trainee.network()?;
        let need = MemoryNeed::estimate(&encoder, self.trainee, self.learning, tokens);
        drop(encoder);
        tracing::info!(
            estimate = %Mebibytes(need.total()),
            activations = %Mebibytes(need.activations),
            "memory of the training"
        );
        memory::check(need.total(), limit, Source::Estimate)?;
        if limit.is_none() {
            return Ok(());
        }
        let mut heaviest = rows.to_vec();
        heaviest.sort_by_key(|example| std::cmp::Reverse(example.sequence.ids.len()));
        heaviest.truncate(spec.batch_size);
        let needed = memory::probe(self.trainee, || self.gradients(&heaviest).map(drop))?;
        memory::check(needed.unwrap_or(0), limit, Source::Probe)
    }

    /// Of the memory in which the training is.
    fn memory_limit(&self) -> Option<u64> {
        match self.trainee.device().is_cpu() {
            true => self.learning.memory_limit,
            false => self.learning.gpu.memory,
        }
    }

    /// On a GPU that others use too: ends a training that takes more memory than it may, and leaves
    /// the others their time.
    fn share_gpu(&self, began: Instant) -> Result<(), TrainError> {
        let device = self.trainee.device();
        let Some(memory) = device::memory(device) else {
            return Ok(());
        };
        memory::check(memory.peak, self.memory_limit(), Source::Peak)?;
        let share = self.learning.gpu.share;
        if share < 1.0 {
            device.synchronize()?;
            thread::sleep(began.elapsed().mul_f64(1.0 / share - 1.0));
        }
        Ok(())
    }

    /// What is left of an epoch, its rows in random order.
    fn rest_of_epoch(
        &mut self,
        rows: &[&Example],
        progress: &mut dyn FnMut(Step),
    ) -> Result<(), TrainError> {
        let spec = self.learning.spec;
        let mut order = rows.to_vec();
        CounterRng::new(spec.seed, self.at.epoch as u64).shuffle(&mut order);
        let (mut recent, mut recent_rows) = (0.0, 0);
        for batch in order.chunks(spec.batch_size).skip(self.at.batches) {
            let began = Instant::now();
            let loss = self.train_batch(batch)?;
            self.share_gpu(began)?;
            self.at.loss += loss;
            self.at.batches += 1;
            recent += loss;
            recent_rows += batch.len();
            if self.at.step.is_multiple_of(PROGRESS_STEPS) || self.at.step == self.steps {
                progress(self.report(recent / recent_rows as f64));
                (recent, recent_rows) = (0.0, 0);
            }
            if self.clock.is_due() {
                self.save()?;
            }
        }
        Ok(())
    }

    /// Scores the epoch and keeps its weights if they are the best; on to the next one.
    fn end_epoch(&mut self, rows: usize, validation: &[Example]) -> Result<(), TrainError> {
        let epoch = self.at.epoch;
        let loss = self.at.loss / rows as f64;
        let score = self.score(validation)?;
        tracing::info!(epoch, loss, validation_score = score, "epoch done");
        self.at.history.push(EpochSummary {
            epoch,
            loss,
            validation_score: score,
        });
        let score = score.unwrap_or(epoch as f64);
        if self.at.best.is_none_or(|best| score > best.score) {
            self.at.best = Some(BestEpoch { epoch, score });
            self.best = self.trainee.snapshot()?;
        }
        (self.at.epoch, self.at.batches, self.at.loss) = (epoch + 1, 0, 0.0);
        self.at.seconds = self.seconds();
        self.at.finished = epoch == self.learning.spec.epochs;
        if self.at.finished || self.clock.is_due() {
            self.save()?;
        }
        Ok(())
    }

    fn seconds(&self) -> f64 {
        self.seconds_before + self.start.elapsed().as_secs_f64()
    }

    /// Writes the checkpoint, if there is to be one.
    fn save(&mut self) -> Result<(), TrainError> {
        let Some(checkpoint) = self.learning.checkpoint else {
            return Ok(());
        };
        self.at.seconds = self.seconds();
        let tensor = |kind| move |(name, values)| (kind, name, values);
        let best = self.best.iter().map(|(n, t)| (n.as_str(), t));
        let best = best.map(tensor(Kind::Best));
        if self.at.finished {
            let written = checkpoint.write(&mut self.clock, &self.at, best);
            return written.map_err(TrainError::Checkpoint);
        }
        let variables = self.trainee.variables().iter();
        let variables = variables.map(|(n, v)| (n.as_str(), v.as_tensor()));
        let moments = self.optimizer.moments().flat_map(|(name, first, second)| {
            [
                (Kind::FirstMoment, name, first),
                (Kind::SecondMoment, name, second),
            ]
        });
        let all = variables.map(tensor(Kind::Variable)).chain(moments);
        checkpoint
            .write(&mut self.clock, &self.at, all.chain(best))
            .map_err(TrainError::Checkpoint)
    }

    fn report(&self, loss: f64) -> Step {
        let seconds = self.seconds();
        Step {
            step: self.at.step,
            steps: self.steps,
            loss: Some(loss),
            tokens_per_second: self.at.tokens as f64 / seconds,
            eta_seconds: seconds / self.at.step as f64 * (self.steps - self.at.step) as f64,
            gpu_peak_bytes: device::memory(self.trainee.device()).map(|memory| memory.peak),
        }
    }

    /// One optimizer step; returns the sum of the rows' losses.
    fn train_batch(&mut self, batch: &[&Example]) -> Result<f64, TrainError> {
        let spec = self.learning.spec;
        let Share { loss, gradients } = self.gradients(batch)?;
        if !loss.is_finite() {
            return Err(TrainError::Diverged {
                step: self.at.step + 1,
            });
        }
        // Shares sum over rows; the step follows the mean of the batch.
        let mean = 1.0 / batch.len() as f64;
        let clip = clip_scale(&gradients, spec.max_grad_norm / mean)?;
        let rate = learning_rate(
            spec.learning_rate,
            self.at.step,
            self.steps,
            spec.warmup_ratio,
        );
        self.optimizer
            .step(self.trainee.variables(), &gradients, mean * clip, rate)?;
        self.at.step += 1;
        self.at.tokens += batch.iter().map(|e| e.sequence.ids.len()).sum::<usize>();
        Ok(loss)
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

/// Hidden states are compared token by token.
fn check_tokens(examples: &[Example]) -> Result<(), TrainError> {
    for example in examples {
        let student = example.sequence.ids.len();
        let teacher = example.teacher_sequence.as_ref().map_or(0, |s| s.ids.len());
        if student != teacher {
            return Err(TrainError::Tokens { student, teacher });
        }
    }
    Ok(())
}

/// What an epoch goes over: each example, those with labels several times.
pub(super) fn rows_of_an_epoch(train: &[Example], label_repeats: usize) -> Vec<&Example> {
    let again =
        (1..label_repeats).flat_map(|_| train.iter().filter(|example| example.label.is_some()));
    train.iter().chain(again).collect()
}

/// Digest of everything that the trained bits depend on, save the number of shares.
fn fingerprint(trainee: &Trainee, rows: &[&Example], learning: &Learning<'_>) -> String {
    let mut digest = Sha256::new();
    let context = learning.checkpoint.map(|checkpoint| &checkpoint.context);
    digest.update(format!(
        "{context:?} {:?} {} {:?} {:?} {:?} {:?}\n",
        learning.spec,
        learning.dropout,
        learning.problem_type,
        learning.metric,
        learning.label_names,
        learning.class_weights,
    ));
    for (name, variable) in trainee.variables() {
        digest.update(format!("{name} {:?}\n", variable.dims()));
    }
    if trainee.trains_in_bf16() {
        digest.update("bf16\n");
    }
    for example in rows {
        let Sequence { ids, type_ids, .. } = &example.sequence;
        digest.update(format!("{ids:?} {type_ids:?} {:?} ", example.label));
        let teacher: Option<Vec<u32>> = example
            .teacher
            .as_ref()
            .map(|logits| logits.iter().map(|logit| logit.to_bits()).collect());
        digest.update(format!("{teacher:?}\n"));
    }
    format!("{:x}", digest.finalize())
}
