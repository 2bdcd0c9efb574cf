//! One cell: its model trained in one process, and scored in another, so that the peaks of memory
//! are those of the one model.

use std::path::PathBuf;
use std::sync::Mutex;

use candle_core::DType;
use serde::{Deserialize, Serialize};

use super::files::{self, Files};
use super::plan::Cell;
use super::spec::Method;
use super::{CompareError, latency};
use crate::adapter::{AdapterFolder, Classifier, write_classifier};
use crate::distill::dataset::{self, Dataset, KnownTask, Row};
use crate::distill::evaluation::{Evaluation, calibrate, evaluate};
use crate::distill::models::{ADAPTER_WEIGHTS, Base, Places, adapter_folder, file_bytes};
use crate::distill::pass::{Answering, Answers, Listener, PassError, examples};
use crate::distill::peak;
use crate::distill::progress::{Event, Stage};
use crate::distill::report::{ModelSize, TrainingSummary};
use crate::distill::training::{
    Checkpoints, LayerTeacher, Learning, TrainError, Trainee, predict, train,
};
use crate::encoder::{EncoderConfig, Weights, cached_encoder_digest};
use crate::text::{Sequence, Tokenizer};

/// What a process of a comparison is to do.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Order {
    /// Of the comparison.
    pub folder: PathBuf,
    pub work: Work,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Work {
    Train(Cell),
    Evaluate(Cell),
    /// Measures a model of each row, in turns.
    Latency(Vec<Cell>),
}

/// What the training of a cell leaves beside its model.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Trained {
    /// Of the cell, see [`Cell::digest`].
    pub digest: String,
    pub trainable: usize,
    pub training: TrainingSummary,
    /// Greatest resident memory of the process while it trained.
    pub training_bytes: Option<u64>,
}

/// The result of a cell.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Outcome {
    /// Of the cell, see [`Cell::digest`].
    pub digest: String,
    pub row: String,
    pub seed: u64,
    pub size: ModelSize,
    pub evaluation: Evaluation,
    /// Absent for a model that was taken as it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub training: Option<TrainingSummary>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub training_bytes: Option<u64>,
    /// Greatest resident memory of a process that answers the test rows and does nothing else.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub inference_bytes: Option<u64>,
    /// `[test rows][labels]`
    pub test_logits: Vec<Vec<f32>>,
}

/// Carries out an order.
pub fn carry_out(
    order: &Order,
    places: &Places,
    listener: Listener<'_>,
) -> Result<(), CompareError> {
    let files = Files::new(&order.folder);
    let cell = match &order.work {
        Work::Train(cell) | Work::Evaluate(cell) => cell,
        Work::Latency(cells) => return latency::measure(cells, &files, places, listener),
    };
    let bench = Bench {
        cell,
        places,
        files: &files,
        data: load_data(cell, places)?,
        listener,
    };
    match &order.work {
        Work::Train(_) => bench.train(),
        _ => bench.evaluate(),
    }
}

/// The rows of a comparison. All cells have the same, labels in the order of the teacher's.
pub(super) fn load_data(cell: &Cell, places: &Places) -> Result<Dataset, PassError> {
    let known = match &cell.teacher_adapter {
        Some(adapter) => {
            let folder = AdapterFolder::read(&adapter_folder(adapter, places))?;
            Some(KnownTask::of(&folder.task))
        }
        None => None,
    };
    let behind = match &known {
        Some(known) => dataset::Teacher::Trained(known),
        None => dataset::Teacher::Untrained,
    };
    Ok(Dataset::load(&cell.data, cell.data_seed, behind)?)
}

/// An encoder's cell with all that the work on it needs.
struct Bench<'a> {
    cell: &'a Cell,
    places: &'a Places,
    files: &'a Files,
    data: Dataset,
    listener: Listener<'a>,
}

impl Bench<'_> {
    fn sequences(&self, base: &Base) -> Result<Vec<Sequence>, PassError> {
        let training = &self.cell.training;
        let max_length = base.max_length(training.max_length);
        base.sequences(self.data.rows(), max_length, training.truncation)
    }

    fn train(mut self) -> Result<(), CompareError> {
        let (cell, name) = (self.cell, self.cell.name());
        let training = &cell.training;
        let base = Base::load(&cell.encoder, self.places)?;
        let sequences = self.sequences(&base)?;
        let task = base.task_config(&self.data, training);
        let dir = base.dir.clone();
        let labels = self.data.label_names.len();
        let full = cell.method.is_full();
        let layers = self.layers(&base)?;
        let mut trainee = if full {
            // Nothing of the encoder stays beside the variables.
            drop(base);
            let config = EncoderConfig::read(&dir)?;
            let device = self.places.placement.device();
            let weights = Weights::read(&dir, config.family, device)?;
            Trainee::full(config, &weights, labels, training.seed)?
        } else {
            let encoder = self.places.placement.for_training(&base.encoder)?;
            Trainee::lora(encoder, &cell.lora, labels, training.seed)?
        };
        if let Some((teacher, _)) = &layers {
            trainee = trainee.with_projection(teacher.hidden_size(), training.seed)?;
        }
        let teacher: Option<Vec<Vec<f32>>> = match &cell.teacher {
            Some((teacher, _)) => Some(files::read(&self.files.logits(teacher))?),
            None => None,
        };
        let checkpoints = Checkpoints {
            folder: self.files.checkpoints(&name),
            ..self.places.checkpoints.clone().unwrap_or_default()
        };
        let checkpoint = checkpoints.of("training", &cell.digest());
        let learning = Learning {
            spec: training,
            dropout: if full { 0.1 } else { cell.lora.dropout },
            problem_type: self.data.task_kind,
            metric: self.data.metric,
            label_names: &self.data.label_names,
            class_weights: self.data.class_weights.as_deref(),
            threads: self.places.threads,
            gpu: self.places.gpu,
            memory_limit: self.places.memory_limit,
            layer_teacher: layers.as_ref().map(|(teacher, _)| teacher),
            checkpoint: Some(&checkpoint),
        };
        let read = layers.as_ref().map(|(_, sequences)| sequences.as_slice());
        let answers = teacher.as_deref().map_or(Answers::None, Answers::Of);
        let train_rows = examples(&self.data.train, &sequences, answers, read);
        let validation_rows = examples(&self.data.validation, &sequences, Answers::None, None);
        drop((sequences, teacher));
        peak::begin(trainee.device());
        let listener = &mut self.listener;
        listener(Event::Stage {
            stage: Stage::StudentTraining,
        });
        let mut progress = |step| listener(Event::Step(step));
        let (best, summary) = train(
            &trainee,
            &train_rows,
            &validation_rows,
            &learning,
            &mut progress,
        )?;
        let training_bytes = peak::end(trainee.device());
        let model = self.files.model(&name);
        files::remove(&model)?;
        match trainee.adapter(&best, task.clone())? {
            Some(adapter) => adapter.write(&model)?,
            None => {
                let weights: Weights = best.into_iter().collect();
                write_classifier(&model, &dir, &task, &weights, DType::F32)?;
            }
        }
        let trained = Trained {
            digest: cell.digest(),
            trainable: trainee.trainable(),
            training: summary,
            training_bytes,
        };
        files::write(&self.files.trained(&name), &trained)?;
        Ok(checkpoints.clear()?)
    }

    /// The teacher whose hidden states are learnt from, and the rows as it reads them.
    fn layers(
        &self,
        student: &Base,
    ) -> Result<Option<(LayerTeacher, Vec<Sequence>)>, CompareError> {
        let (Some(losses), Some((name, _))) = (&self.cell.training.layers, &self.cell.teacher)
        else {
            return Ok(None);
        };
        let dir = match &self.cell.teacher_adapter {
            Some(adapter) => adapter_folder(adapter, self.places),
            None => self.files.model(name),
        };
        let base = Base::load(&self.cell.teacher_model, self.places)?;
        let folder = AdapterFolder::read(&dir)?;
        let classifier = Classifier::from_adapter(base.encoder.clone(), &folder)?;
        let depth = student.encoder.config().num_hidden_layers;
        let teacher = LayerTeacher::new(losses, classifier.encoder, classifier.weights, depth)
            .map_err(TrainError::from)?;
        Ok(Some((teacher, self.sequences(&base)?)))
    }

    fn evaluate(mut self) -> Result<(), CompareError> {
        let (cell, name) = (self.cell, self.cell.name());
        let loaded = load_model(cell, self.files, self.places)?;
        let sequences = self.sequences(&loaded.base)?;
        let device = loaded.base.encoder.device();
        peak::begin(device);
        let test = self.answers(&loaded, &self.data.test.clone(), &sequences)?;
        let inference_bytes = peak::end(device);
        let validation = self.answers(&loaded, &self.data.validation.clone(), &sequences)?;
        let (kind, names) = (self.data.task_kind, &self.data.label_names);
        let labels = dataset::labels(&self.data.test);
        let validation_labels = dataset::labels(&self.data.validation);
        let mut evaluation = evaluate(
            self.data.scoring(),
            names,
            &test,
            &labels,
            cell.training.seed,
        )?;
        evaluation.calibration =
            calibrate(kind, (&validation, &validation_labels), (&test, &labels))?;
        let trained: Option<Trained> = match cell.ready {
            Some(_) => None,
            None => Some(files::read(&self.files.trained(&name))?),
        };
        let trainable = match &trained {
            Some(trained) => trained.trainable,
            None => loaded.classifier.weights.parameters(),
        };
        let bytes = loaded.adapter_bytes;
        let weights = &loaded.classifier.weights;
        let outcome = Outcome {
            digest: cell.digest(),
            row: cell.row.clone(),
            seed: cell.training.seed,
            size: loaded.base.size(weights, Some(trainable), bytes),
            evaluation,
            training_bytes: trained.as_ref().and_then(|t| t.training_bytes),
            training: trained.map(|trained| trained.training),
            inference_bytes,
            test_logits: test.clone(),
        };
        if cell.row == Method::LoraTeacher.name() {
            let train = self.lessons(&loaded, &sequences)?;
            let all = [train, validation, test].concat();
            files::write(&self.files.logits(&name), &all)?;
        }
        files::write(&self.files.outcome(&name), &outcome)?;
        files::remove(&self.files.trained(&name))?;
        Ok(())
    }

    /// What a student learns of the training rows, in order: the logits that came with a row, or
    /// the teacher's.
    fn lessons(
        &mut self,
        loaded: &Loaded,
        sequences: &[Sequence],
    ) -> Result<Vec<Vec<f32>>, PassError> {
        let rows = self.data.train.clone();
        let unanswered = rows.iter().filter(|row| row.teacher_logits.is_none());
        let unanswered: Vec<Row> = unanswered.cloned().collect();
        let mut answers = self.answers(loaded, &unanswered, sequences)?.into_iter();
        let lesson = |row: Row| row.teacher_logits.or_else(|| answers.next());
        Ok(rows.into_iter().filter_map(lesson).collect())
    }

    /// Logits of rows, in order.
    fn answers(
        &mut self,
        loaded: &Loaded,
        rows: &[Row],
        sequences: &[Sequence],
    ) -> Result<Vec<Vec<f32>>, PassError> {
        let sequences: Vec<&Sequence> = rows.iter().map(|row| &sequences[row.id]).collect();
        (self.listener)(Event::Stage {
            stage: Stage::Evaluation,
        });
        let state = Mutex::new((Answering::of(sequences.len()), &mut self.listener));
        let done = |sequences: usize, tokens: usize| {
            let mut state = state.lock().unwrap_or_else(|poison| poison.into_inner());
            let step = state.0.add(sequences, tokens);
            state.1(Event::Step(step));
        };
        let Classifier {
            encoder, weights, ..
        } = &loaded.classifier;
        Ok(predict(
            encoder,
            weights,
            &sequences,
            self.places.threads,
            &done,
        )?)
    }
}

/// A cell's model, ready to answer.
pub(super) struct Loaded {
    pub(super) base: Base,
    pub(super) classifier: Classifier,
    adapter_bytes: Option<u64>,
}

pub(super) fn load_model(cell: &Cell, files: &Files, places: &Places) -> Result<Loaded, PassError> {
    let dir = match &cell.ready {
        Some(adapter) => adapter_folder(adapter, places),
        None => files.model(&cell.name()),
    };
    if cell.method.is_full() {
        let classifier = Classifier::load(&dir, &places.placement)?;
        let base = Base {
            name: cell.encoder.clone(),
            digest: cached_encoder_digest(&dir, &places.cache)?,
            encoder: classifier.encoder.clone(),
            tokenizer: Tokenizer::load(&dir)?,
            dir,
        };
        return Ok(Loaded {
            base,
            classifier,
            adapter_bytes: None,
        });
    }
    let mut base = Base::load(&cell.encoder, places)?;
    base.admit(&dir, &places.known)?;
    let folder = AdapterFolder::read(&dir)?;
    let classifier = Classifier::from_adapter(base.encoder.clone(), &folder)?;
    base.encoder = classifier.encoder.clone();
    Ok(Loaded {
        base,
        classifier,
        adapter_bytes: Some(file_bytes(&dir.join(ADAPTER_WEIGHTS))),
    })
}
