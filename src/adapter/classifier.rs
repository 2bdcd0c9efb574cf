//! A classifier that is ready to answer, and fully fine-tuned ones as folders of `transformers`.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use serde_json::{Map, Value, json};

use super::bind::{check_labels, snapshot};
use super::files::{copy_existing, read_json, write_folder, write_json, write_tensors};
use super::folder::WEIGHTS;
use super::merge::without_classifier;
use super::tensor_names::{self, Stored};
use super::{AdapterError, AdapterFolder, Mode, Scores, TaskConfig};
use crate::encoder::{
    Encoder, EncoderConfig, Family, HeadNames, Placement, Segment, StoredTensors, TaskWeights,
    Weights,
};
use crate::text::PackedBatch;

/// Files that make up a tokenizer, whatever its kind.
const TOKENIZER_FILES: [&str; 9] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spm.model",
    "sentencepiece.bpe.model",
];

/// An encoder with the weights of one task.
#[derive(Clone)]
pub struct Classifier {
    pub encoder: Arc<Encoder>,
    pub weights: TaskWeights,
    pub task: TaskConfig,
}

impl Classifier {
    /// An adapter on a shared encoder; on one of its own where no shared encoder can carry it.
    pub fn from_adapter(
        encoder: Arc<Encoder>,
        adapter: &AdapterFolder,
    ) -> Result<Self, AdapterError> {
        match adapter.bind(&encoder) {
            Ok(weights) => Ok(Self {
                weights,
                task: adapter.task.clone(),
                encoder,
            }),
            Err(AdapterError::OnlyMerged(_)) => Self::merged(&encoder, adapter),
            Err(error) => Err(error),
        }
    }

    /// Bytes that the adapter in `dir` is expected to take beside a shared encoder. Of its file
    /// only the header is read.
    pub fn expected_bytes(encoder: &Encoder, dir: &Path, mode: Mode) -> Result<u64, AdapterError> {
        let stored = StoredTensors::of_file(dir.join(WEIGHTS))?;
        let family = encoder.config().family;
        let dense = HeadNames::of(family).dense;
        let mut bytes = 0u64;
        let mut is_merged = mode == Mode::Merged;
        for (name, tensor) in stored.tensors() {
            let shape = tensor.shape.iter().map(|size| *size as u64);
            // Saturating: nobody has checked the header yet.
            let numbers = shape.fold(1, u64::saturating_mul);
            bytes = numbers
                .saturating_mul(DType::F32.size_in_bytes() as u64)
                .saturating_add(bytes);
            if let Stored::As(name) = tensor_names::read(name)
                && let Some(name) = family.short_name(&name)
            {
                let of_hot = name.contains(".lora_") || name.ends_with(".bias");
                is_merged |= !of_hot && !family.is_head(name) && !name.starts_with(dense);
            }
        }
        if is_merged {
            bytes = bytes.saturating_add(encoder.linear_bytes() as u64);
        }
        Ok(bytes)
    }

    /// An adapter folded into an encoder of its own, which shares what the adapter leaves as it is.
    pub fn merged(encoder: &Encoder, adapter: &AdapterFolder) -> Result<Self, AdapterError> {
        let changed = adapter.changed_weights(encoder)?;
        let family = encoder.config().family;
        let brought = changed.iter().map(|(n, t)| (n.clone(), t.clone()));
        let head = without_classifier(encoder.weights()).with(brought);
        let head = head.head(family);
        let merged = encoder.with_weights(&changed)?;
        Self::with_head(merged, head, adapter.task.clone())
    }

    /// A fully fine-tuned `…ForSequenceClassification` in Hugging Face's layout.
    pub fn load(dir: &Path, placement: &Placement) -> Result<Self, AdapterError> {
        let config = EncoderConfig::read(dir)?;
        let stored = Weights::read(dir, config.family, &Device::Cpu)?;
        if stored.head(config.family).is_empty() {
            return Err(AdapterError::NoHead(dir.to_path_buf()));
        }
        Self::new(config, &placement.place(stored)?, TaskConfig::read(dir)?)
    }

    /// An encoder and its head, of the weights of both.
    fn new(
        config: EncoderConfig,
        weights: &Weights,
        task: TaskConfig,
    ) -> Result<Self, AdapterError> {
        let head = weights.head(config.family);
        Self::with_head(Encoder::new(config, weights)?, head, task)
    }

    fn with_head(
        encoder: Encoder,
        head: BTreeMap<String, Tensor>,
        task: TaskConfig,
    ) -> Result<Self, AdapterError> {
        let weights = TaskWeights::new(&encoder, Vec::new(), head)?;
        check_labels(&task, &weights)?;
        Ok(Self {
            encoder: Arc::new(encoder),
            weights,
            task,
        })
    }

    /// Tokens a sequence is cut to: the task's limit, and never more than the encoder takes.
    pub fn max_length(&self) -> usize {
        let limit = self.encoder.config().max_sequence_length();
        self.task.max_length.min(limit)
    }

    /// One row of logits a sequence, in order. Runs on the calling thread.
    pub fn logits(&self, batch: &PackedBatch) -> Result<Vec<Vec<f32>>, AdapterError> {
        if batch.sequences() == 0 {
            return Ok(Vec::new());
        }
        let segment = Segment {
            sequences: 0..batch.sequences(),
            weights: &self.weights,
        };
        Ok(self.encoder.logits(batch, &[segment])?)
    }

    /// What a row of logits means.
    pub fn scores(&self, logits: &[f32]) -> Scores {
        self.task.scores(logits)
    }
}

/// Writes a fully fine-tuned classifier as a folder that [`Classifier::load`] and `transformers`
/// read, whole or not at all.
///
/// `encoder_dir` is the folder of the encoder that training began with: it gives the rest of
/// `config.json` and the tokenizer. `weights` are all of the model's, head included.
pub fn write_classifier(
    dir: &Path,
    encoder_dir: &Path,
    task: &TaskConfig,
    weights: &Weights,
    dtype: DType,
) -> Result<(), AdapterError> {
    let family = EncoderConfig::read(encoder_dir)?.family;
    let config = classifier_config(encoder_dir, family, task, dtype)?;
    let tensors = classifier_tensors(family, weights)?;
    write_folder(dir, |temporary| {
        write_json(&temporary.join("config.json"), &config)?;
        write_tensors(&temporary.join("model.safetensors"), &tensors, dtype)?;
        copy_existing(encoder_dir, temporary, &TOKENIZER_FILES)
    })
}

/// The encoder's `config.json` with the fields of the task.
fn classifier_config(
    encoder_dir: &Path,
    family: Family,
    task: &TaskConfig,
    dtype: DType,
) -> Result<Map<String, Value>, AdapterError> {
    let mut config: Map<String, Value> = read_json(
        &encoder_dir.join("config.json"),
        "an encoder's folder has one",
    )?;
    config.insert("architectures".to_owned(), json!([family.architecture()]));
    // Of the field's two names the old one is read by every version of transformers.
    config.remove("dtype");
    let name = match dtype {
        DType::F16 => "float16",
        DType::BF16 => "bfloat16",
        _ => "float32",
    };
    config.insert("torch_dtype".to_owned(), json!(name));
    // Of the encoder that training began with: these weights are another encoder's.
    let task = TaskConfig {
        base_digest: None,
        ..task.clone()
    };
    task.set(&mut config);
    Ok(config)
}

/// Copies under the names of `…ForSequenceClassification`.
fn classifier_tensors(
    family: Family,
    weights: &Weights,
) -> Result<BTreeMap<String, Tensor>, AdapterError> {
    let mut tensors = BTreeMap::new();
    for (name, tensor) in weights.iter() {
        tensors.insert(family.full_name(name), snapshot(tensor)?);
    }
    Ok(tensors)
}
