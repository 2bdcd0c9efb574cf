//! One pass, from the request to a version's folder: data, teacher, student, evaluation, report.

mod judge;
mod teach;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Instant;

use candle_core::Tensor;

use super::dataset::{self, DataError, Dataset, Row, Split};
use super::evaluation::EvaluationError;
use super::models::{ADAPTER_WEIGHTS, Base, Places, file_bytes};
use super::peak;
use super::progress::{Event, Stage, Step};
use super::report::{PeakMemory, Report, ReportError, TrainingSummary};
use super::spec::{DistillSpec, SpecError, TrainingSpec};
use super::teacher_http::HttpTeacherError;
use super::training::{
    Checkpoint, Example, LayerTeacher, Learning, TrainError, Trainee, predict, train,
};
use crate::adapter::{AdapterError, AdapterFolder, write_folder};
use crate::encoder::{Encoder, EncoderError, TaskWeights};
use crate::hub::HubError;
use crate::text::{Sequence, TokenizerError};
pub(in crate::distill) use judge::forward;
use teach::{AnyTeacher, Taught};

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
    #[error("the row whose text begins {beginning:?} can't be used")]
    Row {
        beginning: String,
        #[source]
        error: TokenizerError,
    },
    #[error(transparent)]
    Train(#[from] TrainError),
    #[error(transparent)]
    Evaluation(#[from] EvaluationError),
    #[error(transparent)]
    Report(#[from] ReportError),
    #[error(transparent)]
    HttpTeacher(#[from] HttpTeacherError),
    #[error("cannot use the cache of the teacher's answers")]
    Cache(#[from] std::io::Error),
    #[error("the checkpoints of the pass cannot be removed")]
    Checkpoints(#[source] std::io::Error),
    #[error("the output folder {0} exists already")]
    OutputExists(PathBuf),
}

/// Hears of everything that happens in a pass.
pub type Listener<'a> = &'a mut (dyn FnMut(Event) + Send);

/// Runs a pass. The version's folder (PEFT adapter and `report.json`) appears at `out`, whole or
/// not at all; a teacher that was fine-tuned by LoRA is kept at `teacher_out`, if that is given.
///
/// Trainings go on from the checkpoints that `places` names, if an earlier process has left some of
/// the same pass; they are removed at the end.
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
    let student = match &spec.student {
        Some(student) => Base::load(&student.name(), places)?,
        None => Base::load(&places.student, places)?,
    };
    let teacher = match &spec.teacher {
        Some(teacher) => Some(AnyTeacher::load(teacher, &spec.data, places)?),
        None => None,
    };
    let known = teacher.as_ref().and_then(AnyTeacher::known_task);
    let behind = match (&teacher, &known) {
        (None, _) => dataset::Teacher::None,
        (Some(_), None) => dataset::Teacher::Untrained,
        (Some(_), Some(task)) => dataset::Teacher::Trained(task),
    };
    let data = Dataset::load(&spec.data, spec.training.seed, behind);
    let data = data.map_err(|error| match (&error, &teacher) {
        (DataError::WrongKind { .. }, Some(AnyTeacher::Http(teacher))) => teacher
            .only_label()
            .map_or_else(|| PassError::from(error), PassError::from),
        _ => PassError::from(error),
    })?;
    let mut pass = Pass {
        spec,
        places,
        data,
        listener,
    };
    pass.tell_warnings();
    let taught = match teacher {
        Some(AnyTeacher::Local(teacher)) => Some(pass.teach(*teacher, teacher_out)?),
        Some(AnyTeacher::Http(teacher)) => Some(pass.ask(&teacher)?),
        None => None,
    };
    let report = pass.distil(student, taught, out)?;
    if let Some(checkpoints) = &places.checkpoints {
        checkpoints.clear().map_err(PassError::Checkpoints)?;
    }
    Ok(report)
}

/// What a training learns from beside the rows' labels. Everything goes by the rows' ids.
#[derive(Clone, Copy)]
struct Lessons<'a> {
    sequences: &'a [Sequence],
    teacher: Answers<'a>,
    /// Whose hidden states are learnt from, and the rows as it reads them.
    layers: Option<(&'a LayerTeacher, &'a [Sequence])>,
    checkpoint: Option<&'a Checkpoint>,
}

/// The teacher's answers that a training learns from.
#[derive(Clone, Copy)]
pub(in crate::distill) enum Answers<'a> {
    /// None, whatever rows bring: it learns from the labels alone.
    None,
    /// Those that rows bring.
    Given,
    /// The logits of all rows by their ids.
    Of(&'a [Vec<f32>]),
}

/// The rows that there is something to learn from. `sequences` go by the rows' ids, and so do
/// `teacher_sequences`, where the teacher's hidden states are learnt from.
pub(in crate::distill) fn examples(
    rows: &[Row],
    sequences: &[Sequence],
    teacher: Answers<'_>,
    teacher_sequences: Option<&[Sequence]>,
) -> Vec<Example> {
    let of = |row: &Row| Example {
        sequence: sequences[row.id].clone(),
        label: row.label.clone(),
        teacher: match teacher {
            Answers::None => None,
            Answers::Given => row.teacher_logits.clone(),
            Answers::Of(logits) => Some(logits[row.id].clone()),
        },
        teacher_sequence: teacher_sequences.map(|sequences| sequences[row.id].clone()),
    };
    rows.iter()
        .map(of)
        .filter(|example| example.label.is_some() || example.teacher.is_some())
        .collect()
}

struct Pass<'a> {
    spec: &'a DistillSpec,
    places: &'a Places,
    data: Dataset,
    listener: Listener<'a>,
}

/// How far the answering of sequences is.
pub(in crate::distill) struct Answering {
    start: Instant,
    sequences: usize,
    tokens: usize,
    total: usize,
}

impl Answering {
    pub(in crate::distill) fn of(total: usize) -> Self {
        Self {
            start: Instant::now(),
            sequences: 0,
            tokens: 0,
            total,
        }
    }

    pub(in crate::distill) fn add(&mut self, sequences: usize, tokens: usize) -> Step {
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
            gpu_peak_bytes: None,
        }
    }
}

impl Pass<'_> {
    fn stage(&mut self, stage: Stage) {
        (self.listener)(Event::Stage { stage });
    }

    fn tell_warnings(&mut self) {
        let warnings = self.data.checks.warnings.clone();
        (self.listener)(Event::Data { warnings });
    }

    /// The checkpoint of the training of an encoder in this pass.
    fn checkpoint(&self, training: &str, base: &Base) -> Option<Checkpoint> {
        let checkpoints = self.places.checkpoints.as_ref()?;
        let context = format!("{} {} {}", base.name, base.digest, self.spec.without_rows());
        Some(checkpoints.of(training, &context))
    }

    /// Trains on the rows that there is something to learn from.
    fn train(
        &mut self,
        trainee: &Trainee,
        lessons: Lessons<'_>,
        training: &TrainingSpec,
        dropout: f64,
    ) -> Result<(BTreeMap<String, Tensor>, TrainingSummary), PassError> {
        let learning = Learning {
            spec: training,
            dropout,
            problem_type: self.data.task_kind,
            metric: self.data.metric,
            label_names: &self.data.label_names,
            class_weights: self.data.class_weights.as_deref(),
            threads: self.places.threads,
            gpu: self.places.gpu,
            layer_teacher: lessons.layers.map(|(teacher, _)| teacher),
            memory_limit: self.places.memory_limit,
            checkpoint: lessons.checkpoint,
        };
        let Lessons {
            sequences, teacher, ..
        } = lessons;
        let read = lessons.layers.map(|(_, sequences)| sequences);
        let train_rows = examples(&self.data.train, sequences, teacher, read);
        let validation_rows = examples(&self.data.validation, sequences, teacher, None);
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

    /// Records the share of rows that the student does not see whole.
    fn count_truncated(&mut self, sequences: &[Sequence]) {
        for split in Split::ALL {
            let rows = self.data.split(split);
            let cut = rows
                .iter()
                .filter(|row| sequences[row.id].truncated)
                .count();
            let share = cut as f64 / rows.len().max(1) as f64;
            self.data.checks.split_mut(split).truncated = Some(share);
        }
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
        let sequences =
            student.sequences(self.data.rows(), max_length, spec.training.truncation)?;
        self.count_truncated(&sequences);
        if let Some(taught) = &taught {
            self.warn_of_repeated_labels(taught)?;
        }

        self.stage(Stage::StudentTraining);
        let device = student.encoder.device().clone();
        peak::begin(&device);
        let labels = self.data.label_names.len();
        let trainee = Trainee::lora(
            self.places.placement.for_training(&student.encoder)?,
            &spec.lora,
            labels,
            spec.training.seed,
        )?;
        let layers = match (&taught, &spec.training.layers) {
            (
                Some(Taught {
                    model: Some(taught),
                    ..
                }),
                Some(losses),
            ) => {
                let depth = student.encoder.config().num_hidden_layers;
                let (encoder, weights) = (taught.encoder()?, taught.weights.clone());
                let teacher =
                    LayerTeacher::new(losses, encoder, weights, depth).map_err(TrainError::from)?;
                Some((teacher, taught.sequences.as_slice()))
            }
            _ => None,
        };
        let trainee = match &layers {
            Some((teacher, _)) => {
                trainee.with_projection(teacher.hidden_size(), spec.training.seed)?
            }
            None => trainee,
        };
        let checkpoint = self.checkpoint("student", &student);
        let lessons = Lessons {
            sequences: &sequences,
            teacher: match &taught {
                Some(taught) => Answers::Of(&taught.logits),
                None => Answers::Given,
            },
            layers: layers.as_ref().map(|(teacher, read)| (teacher, *read)),
            checkpoint: checkpoint.as_ref(),
        };
        let (best, training) = self.train(&trainee, lessons, &spec.training, spec.lora.dropout)?;
        let training_bytes = peak::end(&device);
        drop(layers);
        let (_, weights) = trainee.network_of(best.clone())?;

        self.stage(Stage::Evaluation);
        peak::begin(&device);
        let all: Vec<&Sequence> = sequences.iter().collect();
        let answers = self.answers(&student.encoder, &weights, &all)?;
        let inference_bytes = peak::end(&device);
        let task = student.task_config(&self.data, &spec.training);
        let Some(mut adapter) = trainee.adapter(&best, task)? else {
            return Err(AdapterError::NoLora.into());
        };
        let adapter_bytes = Some(4 * adapter.parameters() as u64);
        let size = student.size(&weights, Some(trainee.trainable()), adapter_bytes);
        let mut report = self.score(&answers, taught.as_ref(), size, training)?;
        if let Some(calibration) = report.student.calibration {
            adapter.task.temperature = calibration.temperature as f32;
        }

        self.stage(Stage::Latency);
        report.latency = self.latency(&student, &weights, &sequences, taught.as_ref())?;
        report.peak_memory = PeakMemory {
            training_bytes,
            inference_bytes,
        };
        write_version(out, &adapter, &mut report)?;
        Ok(report)
    }
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
