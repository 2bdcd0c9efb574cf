//! The teacher's part of a pass.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::super::dataset::{KnownTask, Row};
use super::super::models::{ADAPTER_WEIGHTS, Base, Places, Teacher, TeacherSource, file_bytes};
use super::super::progress::{Event, Stage};
use super::super::report::{ModelSize, TrainingSummary};
use super::super::spec::{DataSpec, FinetuneMode, FinetuneSpec, TeacherSpec};
use super::super::teacher_cache::TeacherCache;
use super::super::teacher_http::{Asked, HttpTeacher, TeacherToken};
use super::super::training::{Checkpoint, Trainee};
use super::{Answering, Answers, Lessons, Pass, PassError};
use crate::adapter::AdapterError;
use crate::encoder::{Encoder, EncoderConfig, EncoderError, Placement, TaskWeights, Weights};
use crate::text::{Input, Sequence};

/// Answers of a teacher that are computed between two writes of the cache.
const CACHED_AT_ONCE: usize = 1_000;

/// A teacher of either kind.
pub(super) enum AnyTeacher {
    Local(Box<Teacher>),
    Http(Box<HttpTeacher>),
}

impl AnyTeacher {
    pub(super) fn load(
        spec: &TeacherSpec,
        data: &DataSpec,
        places: &Places,
    ) -> Result<Self, PassError> {
        match &spec.http {
            Some(http) => {
                let token = TeacherToken::from_environment(&places.teacher_origins);
                let teacher = HttpTeacher::connect(http, data, token.as_ref())?;
                Ok(Self::Http(Box::new(teacher)))
            }
            None => Ok(Self::Local(Box::new(Teacher::load(spec, places)?))),
        }
    }

    /// The task of a teacher that is a classifier already.
    pub(super) fn known_task(&self) -> Option<KnownTask> {
        match self {
            Self::Local(teacher) => teacher.known_task(),
            Self::Http(teacher) => Some(teacher.known_task()),
        }
    }
}

/// A teacher that has answered every row.
pub(super) struct Taught {
    /// The model itself, if it is here.
    pub(super) model: Option<TaughtModel>,
    /// `[rows][labels]`, by row id.
    pub(super) logits: Vec<Vec<f32>>,
    pub(super) training: Option<TrainingSummary>,
}

/// A teacher that can be asked again.
pub(super) struct TaughtModel {
    /// Where its encoder can be read again: it does not stay in memory while the student trains.
    dir: PathBuf,
    placement: Placement,
    /// The encoder of a teacher that was fine-tuned as a whole, which is nowhere else.
    tuned: Option<Arc<Encoder>>,
    pub(super) weights: TaskWeights,
    pub(super) size: ModelSize,
    /// `[rows]`, by row id.
    pub(super) sequences: Vec<Sequence>,
}

/// How a teacher is fine-tuned.
struct Tuning<'a> {
    finetune: &'a FinetuneSpec,
    /// Where its adapter is to be kept.
    teacher_out: Option<&'a Path>,
    checkpoint: Option<&'a Checkpoint>,
}

impl TaughtModel {
    pub(super) fn encoder(&self) -> Result<Arc<Encoder>, EncoderError> {
        match &self.tuned {
            Some(encoder) => Ok(encoder.clone()),
            None => Ok(Arc::new(self.placement.load(&self.dir)?)),
        }
    }
}

impl Pass<'_> {
    /// Fine-tunes the teacher, if asked, and lets it answer every row.
    pub(super) fn teach(
        &mut self,
        teacher: Teacher,
        teacher_out: Option<&Path>,
    ) -> Result<Taught, PassError> {
        let Teacher { mut base, source } = teacher;
        let max_length = base.max_length(self.spec.training.max_length);
        let truncation = self.spec.training.truncation;
        let sequences = base.sequences(self.data.rows(), max_length, truncation)?;
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
                    cache = Some(TeacherCache::open(
                        folder,
                        &base.digest,
                        &files,
                        max_length,
                    )?);
                }
                let weights = classifier.weights;
                let size = base.size(&weights, None, adapter_bytes);
                (weights, size, None)
            }
            (TeacherSource::Untrained, Some(finetune)) => {
                let checkpoint = self.checkpoint("teacher", &base);
                let tuning = Tuning {
                    finetune,
                    teacher_out,
                    checkpoint: checkpoint.as_ref(),
                };
                let (weights, size, summary) = self.finetune(&mut base, &sequences, tuning)?;
                if let Some(Checkpoint { path, .. }) = &checkpoint
                    && let Some(folder) = path.parent()
                {
                    // Named by the trained weights, so that a resumed pass finds its answers.
                    let files = std::slice::from_ref(path);
                    cache = Some(TeacherCache::open(folder, &base.digest, files, max_length)?);
                }
                (weights, size, Some(summary))
            }
            (TeacherSource::Untrained, None) => {
                return Err(AdapterError::NoHead(base.dir).into());
            }
        };
        self.stage(Stage::TeacherLogits);
        let mut logits = self.cached_answers(&base.encoder, &weights, &sequences, cache)?;
        self.keep_given(&mut logits);
        let tuned_whole = finetune.is_some_and(|tuning| tuning.mode == FinetuneMode::Full);
        Ok(Taught {
            model: Some(TaughtModel {
                tuned: tuned_whole.then_some(base.encoder),
                dir: base.dir,
                placement: self.places.placement.clone(),
                weights,
                size,
                sequences,
            }),
            logits,
            training,
        })
    }

    /// Asks a teacher over HTTP for the rows that bring no logits of their own.
    pub(super) fn ask(&mut self, teacher: &HttpTeacher) -> Result<Taught, PassError> {
        self.stage(Stage::TeacherLogits);
        let listener = &mut self.listener;
        let unanswered: Vec<&Row> = self
            .data
            .rows()
            .filter(|row| row.teacher_logits.is_none())
            .collect();
        let inputs: Vec<&Input> = unanswered.iter().map(|row| &row.input).collect();
        let mut answering: Option<Answering> = None;
        let mut progress = |asked: Asked, total: usize| {
            let answering = answering.get_or_insert_with(|| Answering::of(total));
            // An endpoint does not say how many tokens it has read.
            listener(Event::Step(answering.add(asked.texts, 0)));
        };
        let cache = self.places.teacher_cache.as_deref();
        let answers = teacher.logits(&inputs, cache, &mut progress)?;
        let mut logits = vec![Vec::new(); self.data.len()];
        for (row, answer) in unanswered.into_iter().zip(answers) {
            logits[row.id] = answer;
        }
        self.keep_given(&mut logits);
        Ok(Taught {
            model: None,
            logits,
            training: None,
        })
    }

    /// Logits that came with a row stand.
    fn keep_given(&self, logits: &mut [Vec<f32>]) {
        for row in self.data.rows() {
            if let Some(given) = &row.teacher_logits {
                logits[row.id].clone_from(given);
            }
        }
    }

    fn finetune(
        &mut self,
        base: &mut Base,
        sequences: &[Sequence],
        tuning: Tuning<'_>,
    ) -> Result<(TaskWeights, ModelSize, TrainingSummary), PassError> {
        self.stage(Stage::TeacherTraining);
        let finetune = tuning.finetune;
        let labels = self.data.label_names.len();
        let seed = self.spec.training.seed;
        let full = finetune.mode == FinetuneMode::Full;
        let trainee = if full {
            let config = EncoderConfig::read(&base.dir)?;
            let weights = Weights::read(&base.dir, config.family, base.encoder.device())?;
            Trainee::full(config, &weights, labels, seed)?
        } else {
            let encoder = self.places.placement.for_training(&base.encoder)?;
            Trainee::lora(encoder, &finetune.lora, labels, seed)?
        };
        let training = finetune.training(&self.spec.training);
        let lessons = Lessons {
            sequences,
            teacher: Answers::None,
            layers: None,
            checkpoint: tuning.checkpoint,
        };
        let (best, summary) = self.train(&trainee, lessons, &training, finetune.lora.dropout)?;
        let (encoder, weights) = trainee.network_of(best.clone())?;
        base.encoder = encoder;
        let task = base.task_config(&self.data, &training);
        let adapter_bytes = match (trainee.adapter(&best, task)?, tuning.teacher_out) {
            (Some(adapter), Some(dir)) => {
                // An attempt before this one may have written it.
                if tuning.checkpoint.is_none() || !dir.exists() {
                    adapter.write(dir)?;
                }
                Some(file_bytes(&dir.join(ADAPTER_WEIGHTS)))
            }
            (Some(adapter), None) => Some(4 * adapter.parameters() as u64),
            (None, _) => None,
        };
        let size = base.size(&weights, Some(trainee.trainable()), adapter_bytes);
        Ok((weights, size, summary))
    }

    /// Logits of all rows by id, as far as they are known from the cache, which gets the others.
    /// Rows that bring logits of their own get none here.
    fn cached_answers(
        &mut self,
        encoder: &Encoder,
        weights: &TaskWeights,
        sequences: &[Sequence],
        cache: Option<TeacherCache>,
    ) -> Result<Vec<Vec<f32>>, PassError> {
        let unanswered: Vec<usize> = self
            .data
            .rows()
            .filter(|row| row.teacher_logits.is_none())
            .map(|row| row.id)
            .collect();
        let asked: Vec<&Sequence> = unanswered.iter().map(|id| &sequences[*id]).collect();
        let mut cache = cache.unwrap_or_else(TeacherCache::in_memory);
        // Each text once, so that what is left after a kill is cut into the same parts.
        let mut seen = HashSet::new();
        let new: Vec<&Sequence> = asked
            .into_iter()
            .filter(|s| cache.get(s).is_none() && seen.insert((&s.ids, &s.type_ids)))
            .collect();
        let mut answering = Answering::of(new.len());
        for part in new.chunks(CACHED_AT_ONCE) {
            let logits = self.part_of_answers(encoder, weights, part, &mut answering)?;
            cache.extend(part.iter().copied().zip(&logits))?;
        }
        let mut logits = vec![Vec::new(); sequences.len()];
        for id in unanswered {
            logits[id] = cache.get(&sequences[id]).cloned().unwrap_or_default();
        }
        Ok(logits)
    }
}
