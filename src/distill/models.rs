//! Students and teachers: found, loaded, tokenised for, sized.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::PassError;
use super::dataset::{Dataset, KnownTask, Row};
use super::report::ModelSize;
use super::spec::{TeacherSpec, TrainingSpec};
use super::teacher_http::TeacherOrigin;
use super::training::Checkpoints;
use crate::adapter::{
    AdapterError, AdapterFolder, Classifier, EncoderIdentity, KnownEncoders, TaskConfig,
};
use crate::encoder::{
    Encoder, EncoderId, Placement, TaskWeights, cached_encoder_digest, weight_bytes,
};
use crate::hub;
use crate::text::{Sequence, Tokenizer, Truncation};

/// Weights of an adapter, in its folder.
pub const ADAPTER_WEIGHTS: &str = "adapter_model.safetensors";

/// Where a pass finds models.
#[derive(Clone, Debug)]
pub struct Places {
    /// Catalog name or folder of the student's encoder, if the request names none.
    pub student: String,
    /// Cache of fetched encoders.
    pub cache: PathBuf,
    /// Ready-made adapters: `{task}/teacher` holds a teacher's.
    pub adapters: PathBuf,
    /// Encoders by name, to tell whether a teacher's adapter is its encoder's.
    pub known: KnownEncoders,
    /// Folder in which teachers' answers are kept between passes, if they are.
    pub teacher_cache: Option<PathBuf>,
    /// Where models compute.
    pub placement: Placement,
    /// What a training may take of a GPU.
    pub gpu: GpuLimits,
    /// Cores for training and prediction.
    pub threads: usize,
    /// Bytes that the process may take: a training that needs more is refused.
    pub memory_limit: Option<u64>,
    /// Where a pass keeps its trainings while it runs, if it does.
    pub checkpoints: Option<Checkpoints>,
    /// Endpoints that get the token for teachers over HTTP.
    pub teacher_origins: Vec<TeacherOrigin>,
}

/// What a training may take of a GPU that others use too.
#[derive(Clone, Copy, Debug)]
pub struct GpuLimits {
    /// Bytes of its memory; a training that needs more is refused or ended.
    pub memory: Option<u64>,
    /// Of its time, above 0 and at most 1.
    pub share: f64,
}

impl Default for GpuLimits {
    fn default() -> Self {
        Self {
            memory: None,
            share: 1.0,
        }
    }
}

/// An encoder with its tokenizer.
pub struct Base {
    pub name: String,
    /// Digest of the encoder.
    pub digest: String,
    pub dir: PathBuf,
    pub encoder: Arc<Encoder>,
    pub tokenizer: Tokenizer,
}

impl Base {
    /// Loads a catalog entry, fetched if it is not there, or a folder.
    pub fn load(name: &str, places: &Places) -> Result<Self, PassError> {
        let dir = hub::pull(name, &places.cache, false)?;
        Ok(Self {
            name: name.to_owned(),
            digest: cached_encoder_digest(&dir, &places.cache)?,
            encoder: Arc::new(places.placement.load(&dir)?),
            tokenizer: Tokenizer::load(&dir)?,
            dir,
        })
    }

    /// Refuses an adapter of another encoder, and warns of one that does not say whose it is.
    pub(in crate::distill) fn admit(
        &self,
        adapter: &Path,
        known: &KnownEncoders,
    ) -> Result<(), AdapterError> {
        let identity = EncoderIdentity {
            id: EncoderId {
                name: self.name.clone(),
                digest: self.digest.clone(),
            },
            known: known.clone(),
        };
        let base = identity.admit(adapter)?;
        if base.digest.is_none() {
            tracing::warn!(
                encoder = self.name,
                "it is not known which encoder the teacher's adapter was trained on"
            );
        }
        Ok(())
    }

    /// Returns the tokens that the rows of a pass are cut to: the asked length, or the limit of the
    /// encoder or its tokenizer.
    pub fn max_length(&self, asked: usize) -> usize {
        let most = self.encoder.config().max_sequence_length();
        self.tokenizer.max_length(asked.min(most))
    }

    /// What a classifier of this encoder answers and reads that is trained on `data`.
    pub fn task_config(&self, data: &Dataset, training: &TrainingSpec) -> TaskConfig {
        TaskConfig {
            labels: data.label_names.clone(),
            problem_type: data.task_kind,
            problem_type_declared: true,
            max_length: self.max_length(training.max_length),
            truncation: training.truncation,
            temperature: 1.0,
            base_model: Some(self.name.clone()),
            base_digest: Some(self.digest.clone()),
        }
    }

    /// Tokenised rows, in order.
    pub fn sequences<'a>(
        &self,
        rows: impl Iterator<Item = &'a Row>,
        max_length: usize,
        truncation: Truncation,
    ) -> Result<Vec<Sequence>, PassError> {
        rows.map(|row| {
            self.tokenizer
                .encode(&row.input, max_length, Some(truncation))
                .map_err(|error| PassError::Row {
                    beginning: row.input.text.chars().take(60).collect(),
                    error,
                })
        })
        .collect()
    }

    /// The size of this encoder with `weights` on top, which stand in the folder `adapter`.
    pub fn size(
        &self,
        weights: &TaskWeights,
        trainable: Option<usize>,
        adapter_bytes: Option<u64>,
    ) -> ModelSize {
        ModelSize {
            encoder: self.name.clone(),
            encoder_digest: Some(self.digest.clone()),
            parameters: self.encoder.parameters() + weights.parameters(),
            trainable,
            encoder_bytes: weight_bytes(&self.dir),
            adapter_bytes,
        }
    }
}

/// Size of a file, 0 if there is none.
pub fn file_bytes(path: &Path) -> u64 {
    std::fs::metadata(path).map_or(0, |metadata| metadata.len())
}

/// What a teacher is before the data is read.
pub enum TeacherSource {
    /// A classifier that answers as it is.
    Trained {
        classifier: Box<Classifier>,
        adapter_bytes: Option<u64>,
        /// What its answers depend on beside the encoder's digest.
        files: Vec<PathBuf>,
    },
    /// An encoder that is fine-tuned first.
    Untrained,
}

/// A teacher's encoder and what stands on it.
pub struct Teacher {
    pub base: Base,
    pub source: TeacherSource,
}

impl Teacher {
    pub fn load(spec: &TeacherSpec, places: &Places) -> Result<Self, PassError> {
        let mut base = Base::load(&spec.model, places)?;
        if let Some(adapter) = &spec.adapter {
            let dir = adapter_folder(adapter, places);
            base.admit(&dir, &places.known)?;
            let folder = AdapterFolder::read(&dir)?;
            let classifier = Classifier::from_adapter(base.encoder.clone(), &folder)?;
            base.encoder = classifier.encoder.clone();
            let weights = dir.join(ADAPTER_WEIGHTS);
            let adapter_bytes = Some(file_bytes(&weights));
            let source = TeacherSource::Trained {
                classifier: Box::new(classifier),
                adapter_bytes,
                files: vec![weights, dir.join("adapter_config.json")],
            };
            return Ok(Self { base, source });
        }
        if spec.finetune.is_some() {
            let source = TeacherSource::Untrained;
            return Ok(Self { base, source });
        }
        let classifier = Classifier::load(&base.dir, &places.placement)?;
        base.encoder = classifier.encoder.clone();
        let source = TeacherSource::Trained {
            classifier: Box::new(classifier),
            adapter_bytes: None,
            files: Vec::new(),
        };
        Ok(Self { base, source })
    }

    /// The task of a teacher that is a classifier already.
    pub fn known_task(&self) -> Option<KnownTask> {
        match &self.source {
            TeacherSource::Trained { classifier, .. } => Some(KnownTask::of(&classifier.task)),
            TeacherSource::Untrained => None,
        }
    }
}

/// Folder of a teacher's adapter: a ready-made one by its task's name, or a path.
pub fn adapter_folder(name: &str, places: &Places) -> PathBuf {
    let ready_made = places.adapters.join(name).join("teacher");
    match ready_made.is_dir() {
        true => ready_made,
        false => PathBuf::from(name),
    }
}
