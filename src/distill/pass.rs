//! One pass, from the request to a version's folder: data, teacher, student, evaluation, report.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Instant, SystemTime};

use candle_core::Tensor;

use super::dataset::{self, DataError, Dataset, Label, Row};
use super::evaluation::{
    EvaluationError, calibrate, evaluate, likeness, majority, measure_interleaved, teacher_answers,
};
use super::gate::Gate;
use super::models::{ADAPTER_WEIGHTS, Base, Places, Teacher, TeacherSource, file_bytes};
use super::progress::{Event, Stage, Step};
use super::report::{
    DataSummary, Latency, ModelSize, PeakMemory, Reference, Report, ReportError, TrainingSummary,
    share_kept, timestamp,
};
use super::spec::{DistillSpec, FinetuneMode, FinetuneSpec, SpecError, TrainingSpec};
use super::teacher_cache::TeacherCache;
use super::training::{Example, Learning, TrainError, Trainee, predict, train};
use crate::adapter::{AdapterError, AdapterFolder, TaskConfig, write_folder};
use crate::encoder::{Encoder, EncoderConfig, EncoderError, Segment, TaskWeights, Weights};
use crate::hub::HubError;
use crate::telemetry::memory;
use crate::text::{PackedBatch, Sequence, TokenizerError};

/// Batches measured for latency, after some that are not.
const LATENCY_ROUNDS: [(usize, usize); 2] = [(1, 60), (32, 12)];
const LATENCY_WARM_UP: usize = 2;

/// Learning rates of a teacher's fine-tuning where the request has none.
const LORA_LEARNING_RATE: f64 = 3e-4;
const FULL_LEARNING_RATE: f64 = 3e-5;

/// Answers of a teacher that are computed between two writes of the cache.
const CACHED_AT_ONCE: usize = 1_000;

/// Why a pass ended without a version.
#[derive(Debug, thiserror::Error)]
pub enum PassError {
    #[error(transparent)]
    Spec(#[from] SpecError),
    #[error(transparent)]
    Data(#[from] DataError),
    #[error(transparent)]
    Hub(#[from] HubError),
    #[error(transparent)]
    Adapter(#[from] AdapterError),
    #[error(transparent)]
    Encoder(#[from] EncoderError),
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    #[error(transparent)]
    Train(#[from] TrainError),
    #[error(transparent)]
    Evaluation(#[from] EvaluationError),
    #[error(transparent)]
    Report(#[from] ReportError),
    #[error("cannot use the cache of the teacher's answers")]
    Cache(#[from] std::io::Error),
    #[error("the output folder {0} exists already")]
    OutputExists(PathBuf),
}

/// Hears of everything that happens in a pass.
pub type Listener<'a> = &'a mut (dyn FnMut(Event) + Send);

/// Runs a pass. The version's folder (PEFT adapter and `report.json`) appears at `out`, whole or
/// not at all; a teacher that was fine-tuned by LoRA is kept at `teacher_out`, if that is given.
pub fn run(
    spec: &DistillSpec,
    places: &Places,
    out: &Path,
    teacher_out: Option<&Path>,
    listener: Listener<'_>,
) -> Result<Report, PassError> {
    spec.validate()?;
    if out.exists() {
        return Err(PassError::OutputExists(out.to_owned()));
    }
    listener(Event::Stage { stage: Stage::Data });
    let student = Base::load(&places.student, places)?;
    let teacher = match &spec.teacher {
        Some(teacher) => Some(Teacher::load(teacher, places)?),
        None => None,
    };
    let known = teacher.as_ref().and_then(Teacher::known_task);
    let behind = match (&teacher, &known) {
        (None, _) => dataset::Teacher::None,
        (Some(_), None) => dataset::Teacher::Untrained,
        (Some(_), Some(task)) => dataset::Teacher::Trained(task),
    };
    let data = Dataset::load(&spec.data, spec.training.seed, behind)?;
    let mut pass = Pass {
        spec,
        places,
        data,
        listener,
    };
    let taught = match teacher {
        Some(teacher) => Some(pass.teach(teacher, teacher_out)?),
        None => None,
    };
    pass.distil(student, taught, out)
}

struct Pass<'a> {
    spec: &'a DistillSpec,
    places: &'a Places,
    data: Dataset,
    listener: Listener<'a>,
}

/// A teacher that has answered every row.
struct Taught {
    base: Base,
    weights: TaskWeights,
    size: ModelSize,
    /// `[rows]`, by row id.
    sequences: Vec<Sequence>,
    /// `[rows][labels]`, by row id.
    logits: Vec<Vec<f32>>,
    training: Option<TrainingSummary>,
}

/// How far the answering of sequences is.
struct Answering {
    start: Instant,
    sequences: usize,
    tokens: usize,
    total: usize,
}

impl Answering {
    fn of(total: usize) -> Self {
        Self {
            start: Instant::now(),
            sequences: 0,
            tokens: 0,
            total,
        }
    }

    fn add(&mut self, sequences: usize, tokens: usize) -> Step {
        self.sequences += sequences;
        self.tokens += tokens;
        let seconds = self.start.elapsed().as_secs_f64();
        let left = self.total - self.sequences;
        Step {
            step: self.sequences,
            steps: self.total,
            loss: None,
            tokens_per_second: self.tokens as f64 / seconds,
            eta_seconds: seconds / self.sequences as f64 * left as f64,
        }
    }
}

/// Test rows' labels: the given ones, or the teacher's answers where there are none.
struct TestLabels {
    reference: Reference,
    answers: Vec<Label>,
}

impl Pass<'_> {
    fn stage(&mut self, stage: Stage) {
        (self.listener)(Event::Stage { stage });
    }

    /// Fine-tunes the teacher, if asked, and lets it answer every row.
    fn teach(&mut self, teacher: Teacher, teacher_out: Option<&Path>) -> Result<Taught, PassError> {
        let Teacher { mut base, source } = teacher;
        let max_length = base.max_length(self.spec.training.max_length);
        let sequences = base.sequences(self.data.rows(), max_length)?;
        let finetune = self.spec.teacher.as_ref().and_then(|t| t.finetune.as_ref());
        let mut cache = None;
        let (weights, size, training) = match (source, finetune) {
            (
                TeacherSource::Trained {
                    classifier,
                    adapter_bytes,
                    files,
                },
                _,
            ) => {
                if let Some(folder) = &self.places.teacher_cache {
                    cache = Some(TeacherCache::open(folder, &files, max_length)?);
                }
                let weights = classifier.weights;
                let size = base.size(&weights, None, adapter_bytes);
                (weights, size, None)
            }
            (TeacherSource::Untrained, Some(finetune)) => {
                let (weights, size, summary) =
                    self.finetune(&mut base, &sequences, finetune, teacher_out)?;
                (weights, size, Some(summary))
            }
            (TeacherSource::Untrained, None) => {
                return Err(AdapterError::NoHead(base.dir).into());
            }
        };
        self.stage(Stage::TeacherLogits);
        let mut logits = self.cached_answers(&base.encoder, &weights, &sequences, cache)?;
        for row in self.data.rows() {
            if let Some(given) = &row.teacher_logits {
                logits[row.id].clone_from(given);
            }
        }
        Ok(Taught {
            base,
            weights,
            size,
            sequences,
            logits,
            training,
        })
    }

    fn finetune(
        &mut self,
        base: &mut Base,
        sequences: &[Sequence],
        finetune: &FinetuneSpec,
        teacher_out: Option<&Path>,
    ) -> Result<(TaskWeights, ModelSize, TrainingSummary), PassError> {
        self.stage(Stage::TeacherTraining);
        let labels = self.data.label_names.len();
        let seed = self.spec.training.seed;
        let full = finetune.mode == FinetuneMode::Full;
        let trainee = if full {
            let config = EncoderConfig::read(&base.dir)?;
            let weights = Weights::read(&base.dir, config.family, base.encoder.device())?;
            Trainee::full(config, &weights, labels, seed)?
        } else {
            Trainee::lora(base.encoder.clone(), &finetune.lora, labels, seed)?
        };
        let training = TrainingSpec {
            epochs: finetune.epochs,
            learning_rate: finetune.learning_rate.unwrap_or(match full {
                true => FULL_LEARNING_RATE,
                false => LORA_LEARNING_RATE,
            }),
            // The teacher learns from the labels alone.
            alpha: 0.0,
            ..self.spec.training.clone()
        };
        let (best, summary) =
            self.train(&trainee, sequences, None, &training, finetune.lora.dropout)?;
        let (encoder, weights) = trainee.network_of(best.clone())?;
        base.encoder = encoder;
        let task = self.task_config(base, &training);
        let adapter_bytes = match (trainee.adapter(&best, task)?, teacher_out) {
            (Some(adapter), Some(dir)) => {
                adapter.write(dir)?;
                Some(file_bytes(&dir.join(ADAPTER_WEIGHTS)))
            }
            (Some(adapter), None) => Some(4 * adapter.parameters() as u64),
            (None, _) => None,
        };
        let size = base.size(&weights, Some(trainee.trainable()), adapter_bytes);
        Ok((weights, size, summary))
    }

    fn task_config(&self, base: &Base, training: &TrainingSpec) -> TaskConfig {
        TaskConfig {
            labels: self.data.label_names.clone(),
            problem_type: self.data.task_kind,
            max_length: base.max_length(training.max_length),
            base_model: Some(base.name.clone()),
        }
    }

    /// Trains on the rows that there is something to learn from.
    fn train(
        &mut self,
        trainee: &Trainee,
        sequences: &[Sequence],
        teacher: Option<&[Vec<f32>]>,
        training: &TrainingSpec,
        dropout: f64,
    ) -> Result<(BTreeMap<String, Tensor>, TrainingSummary), PassError> {
        let examples = |rows: &[Row]| -> Vec<Example> {
            let of = |row: &Row| Example {
                sequence: sequences[row.id].clone(),
                label: row.label.clone(),
                teacher: match teacher {
                    Some(logits) => Some(logits[row.id].clone()),
                    None => row.teacher_logits.clone(),
                },
            };
            rows.iter()
                .map(of)
                .filter(|example| example.label.is_some() || example.teacher.is_some())
                .collect()
        };
        let learning = Learning {
            spec: training,
            dropout,
            problem_type: self.data.task_kind,
            label_names: &self.data.label_names,
            threads: self.places.threads,
        };
        let train_rows = examples(&self.data.train);
        let validation_rows = examples(&self.data.validation);
        let listener = &mut self.listener;
        let mut progress = |step| listener(Event::Step(step));
        Ok(train(
            trainee,
            &train_rows,
            &validation_rows,
            &learning,
            &mut progress,
        )?)
    }

    /// Logits of all rows by id, as far as they are known from the cache, which gets the others.
    fn cached_answers(
        &mut self,
        encoder: &Encoder,
        weights: &TaskWeights,
        sequences: &[Sequence],
        cache: Option<TeacherCache>,
    ) -> Result<Vec<Vec<f32>>, PassError> {
        let all: Vec<&Sequence> = sequences.iter().collect();
        let Some(mut cache) = cache else {
            return self.answers(encoder, weights, &all);
        };
        let new: Vec<&Sequence> = all.into_iter().filter(|s| cache.get(s).is_none()).collect();
        let mut answering = Answering::of(new.len());
        for part in new.chunks(CACHED_AT_ONCE) {
            let logits = self.part_of_answers(encoder, weights, part, &mut answering)?;
            cache.extend(part.iter().copied().zip(&logits))?;
        }
        let known = |sequence| cache.get(sequence).cloned().unwrap_or_default();
        Ok(sequences.iter().map(known).collect())
    }

    /// Logits of sequences, in order.
    fn answers(
        &mut self,
        encoder: &Encoder,
        weights: &TaskWeights,
        sequences: &[&Sequence],
    ) -> Result<Vec<Vec<f32>>, PassError> {
        let mut answering = Answering::of(sequences.len());
        self.part_of_answers(encoder, weights, sequences, &mut answering)
    }

    fn part_of_answers(
        &mut self,
        encoder: &Encoder,
        weights: &TaskWeights,
        sequences: &[&Sequence],
        answering: &mut Answering,
    ) -> Result<Vec<Vec<f32>>, PassError> {
        let state = Mutex::new((answering, &mut self.listener));
        let done = |sequences: usize, tokens: usize| {
            let mut state = state.lock().unwrap_or_else(|poison| poison.into_inner());
            let step = state.0.add(sequences, tokens);
            state.1(Event::Step(step));
        };
        Ok(predict(
            encoder,
            weights,
            sequences,
            self.places.threads,
            &done,
        )?)
    }

    /// Trains the student, scores it, and writes the version.
    fn distil(
        mut self,
        student: Base,
        taught: Option<Taught>,
        out: &Path,
    ) -> Result<Report, PassError> {
        let spec = self.spec;
        let max_length = student.max_length(spec.training.max_length);
        let sequences = student.sequences(self.data.rows(), max_length)?;

        self.stage(Stage::StudentTraining);
        let labels = self.data.label_names.len();
        let trainee = Trainee::lora(
            student.encoder.clone(),
            &spec.lora,
            labels,
            spec.training.seed,
        )?;
        let logits = taught.as_ref().map(|taught| taught.logits.as_slice());
        let (best, training) = self.train(
            &trainee,
            &sequences,
            logits,
            &spec.training,
            spec.lora.dropout,
        )?;
        let training_bytes = memory::peak_resident_bytes();
        let (_, weights) = trainee.network_of(best.clone())?;

        self.stage(Stage::Evaluation);
        let all: Vec<&Sequence> = sequences.iter().collect();
        let answers = self.answers(&student.encoder, &weights, &all)?;
        let task = self.task_config(&student, &spec.training);
        let Some(adapter) = trainee.adapter(&best, task)? else {
            return Err(AdapterError::NoLora.into());
        };
        let adapter_bytes = Some(4 * adapter.parameters() as u64);
        let size = student.size(&weights, Some(trainee.trainable()), adapter_bytes);
        let mut report = self.score(&answers, taught.as_ref(), size, training)?;

        self.stage(Stage::Latency);
        report.latency = self.latency(&student, &weights, &sequences, taught.as_ref())?;
        report.peak_memory = PeakMemory {
            training_bytes,
            inference_bytes: memory::resident_bytes(),
        };
        write_version(out, &adapter, &mut report)?;
        Ok(report)
    }

    fn test_labels(&self, taught: Option<&Taught>) -> TestLabels {
        let labelled = self.data.test.iter().any(|row| row.label.is_some());
        match taught {
            Some(taught) if !labelled => TestLabels {
                reference: Reference::Teacher,
                answers: teacher_answers(
                    self.data.task_kind,
                    &by_id(&self.data.test, &taught.logits),
                ),
            },
            _ => TestLabels {
                reference: Reference::Labels,
                answers: Vec::new(),
            },
        }
    }

    fn score(
        &self,
        answers: &[Vec<f32>],
        taught: Option<&Taught>,
        student_model: ModelSize,
        training: TrainingSummary,
    ) -> Result<Report, PassError> {
        let Pass { spec, data, .. } = self;
        let (kind, names, seed) = (data.task_kind, &data.label_names, spec.training.seed);
        let test_labels = self.test_labels(taught);
        let labels: Vec<Option<&Label>> = match test_labels.reference {
            Reference::Labels => dataset::labels(&data.test),
            Reference::Teacher => test_labels.answers.iter().map(Some).collect(),
        };
        let validation = (
            by_id(&data.validation, answers),
            dataset::labels(&data.validation),
        );
        let test = by_id(&data.test, answers);
        let mut student = evaluate(kind, names, &test, &labels, seed)?;
        student.calibration = calibrate(kind, (&validation.0, &validation.1), (&test, &labels))?;
        let teacher_test = taught.map(|taught| by_id(&data.test, &taught.logits));
        let teacher = match &teacher_test {
            Some(logits) => Some(evaluate(kind, names, logits, &labels, seed)?),
            None => None,
        };
        let majority = match majority(kind, names, &dataset::labels(&data.train), &labels, seed) {
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
            teacher_model: taught.map(|taught| taught.size.clone()),
            latency: None,
            peak_memory: PeakMemory::default(),
            training: Some(training),
            teacher_training: taught.and_then(|taught| taught.training.clone()),
            gate: Some(gate),
        })
    }

    /// Student and teacher in turns on the test rows, a forward on one thread each.
    fn latency(
        &self,
        student: &Base,
        weights: &TaskWeights,
        sequences: &[Sequence],
        taught: Option<&Taught>,
    ) -> Result<Option<Latency>, PassError> {
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
            let mut by_teacher = taught.map(|taught| {
                |ids: &[&usize]| {
                    let rows = ids.iter().map(|id| &taught.sequences[**id]);
                    forward(&taught.base.encoder, &taught.weights, rows)
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
            device: "cpu".into(),
            threads: 1,
            batch_1,
            batch_32,
        }))
    }
}

fn forward<'a>(
    encoder: &Arc<Encoder>,
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

fn write_version(
    out: &Path,
    adapter: &AdapterFolder,
    report: &mut Report,
) -> Result<(), PassError> {
    write_folder(out, |dir| {
        adapter.write_files(dir)?;
        let bytes = file_bytes(&dir.join(ADAPTER_WEIGHTS));
        report.student_model.adapter_bytes = Some(bytes);
        report.write(dir)?;
        Ok(())
    })
}
