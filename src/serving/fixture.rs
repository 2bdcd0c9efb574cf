//! A tokenizer and a model for tests, which answer by simple rules and can be held at a gate.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::mpsc;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use candle_core::{Device, Tensor};
use tokio::sync::mpsc as async_mpsc;

use super::budget::Reservation;
use super::{
    Entry, LiveTask, Load, LoadError, Model, ModelError, Options, Residents, Serving, TaskSegment,
    Tokenize,
};
use crate::adapter::{Mode, ProblemType, TaskConfig};
use crate::encoder::{Encoder, EncoderConfig, Family, RelativeAttention, TaskWeights, Weights};
use crate::telemetry::Metrics;
use crate::text::{Input, PackedBatch, Sequence, TokenizerError, Truncation, TruncationDirection};

pub(crate) const OPTIONS: Options = Options {
    workers: 1,
    tokenizer_threads: 1,
    max_batch_tokens: 1000,
    max_queue: 1000,
    max_wait: Duration::from_secs(60),
    max_length: 20,
};

/// A task of two classes, `no` and `yes`, with at most 20 tokens.
pub(crate) fn task(name: &str, version: u64) -> LiveTask {
    LiveTask {
        name: name.to_owned(),
        version,
        config: TaskConfig {
            labels: vec!["no".to_owned(), "yes".to_owned()],
            problem_type: ProblemType::SingleLabelClassification,
            problem_type_declared: true,
            max_length: 20,
            truncation: Truncation::LongestFirst,
            temperature: 1.0,
            base_model: None,
            base_digest: None,
        },
        weights: weights(),
        merged: None,
        weight_bytes: 0,
        max_length: 20,
        memory: Reservation::default(),
    }
}

/// A task's entry in the table, in memory from the start.
pub(crate) fn resident(task: LiveTask) -> Entry {
    let (name, folder) = (task.name.clone(), PathBuf::new());
    let entry = Entry::new(name, task.version, Mode::Hot, folder, true);
    entry.set(Ok(Arc::new(task)));
    entry
}

/// Loads nothing: the tasks of tests are in memory.
struct NoFolders;

impl Load for NoFolders {
    fn expected_bytes(&self, _: &Entry) -> u64 {
        0
    }

    fn load(&self, _: &Entry) -> Result<LiveTask, LoadError> {
        Err(LoadError::Logits(Vec::new()))
    }
}

/// Weights of an encoder without layers; [`Scripted`] does not look at them.
fn weights() -> TaskWeights {
    let zeros = |shape: &[usize]| Tensor::zeros(shape, candle_core::DType::F32, &Device::Cpu);
    let named = |names: &[(&str, &[usize])]| -> BTreeMap<String, Tensor> {
        names
            .iter()
            .map(|(name, shape)| ((*name).to_owned(), zeros(shape).expect("a tensor")))
            .collect()
    };
    let encoder = named(&[
        ("embeddings.word_embeddings.weight", &[4, 2]),
        ("embeddings.position_embeddings.weight", &[4, 2]),
        ("embeddings.token_type_embeddings.weight", &[2, 2]),
        ("embeddings.LayerNorm.weight", &[2]),
        ("embeddings.LayerNorm.bias", &[2]),
        ("pooler.dense.weight", &[2, 2]),
        ("pooler.dense.bias", &[2]),
    ]);
    let config = EncoderConfig {
        family: Family::Bert,
        vocab_size: 4,
        hidden_size: 2,
        num_hidden_layers: 0,
        num_attention_heads: 1,
        intermediate_size: 2,
        max_position_embeddings: 4,
        type_vocab_size: 2,
        embedding_size: 2,
        position_embeddings: true,
        padding_idx: None,
        layer_norm_eps: 1e-12,
        relative: RelativeAttention::None,
        score_terms: 1,
        conv: None,
    };
    let encoder = Encoder::new(config, &Weights::from_iter(encoder)).expect("an encoder");
    let head = named(&[("classifier.weight", &[2, 2]), ("classifier.bias", &[2])]);
    TaskWeights::new(&encoder, Vec::new(), head).expect("a head")
}

/// One token for each word: a number is its own id, another word has the id 7.
pub(crate) struct Words;

impl Tokenize for Words {
    fn encode(
        &self,
        input: &Input,
        max_length: usize,
        truncation: Option<Truncation>,
        direction: Option<TruncationDirection>,
    ) -> Result<Sequence, TokenizerError> {
        let words = input.text.split_whitespace();
        let pair = input
            .text_pair
            .iter()
            .flat_map(|pair| pair.split_whitespace());
        let mut ids: Vec<u32> = words
            .chain(pair)
            .map(|word| word.parse().unwrap_or(7))
            .collect();
        let tokens = ids.len();
        if tokens > max_length && truncation.is_none() {
            return Err(TokenizerError::TooLong { tokens, max_length });
        }
        match direction.unwrap_or(TruncationDirection::Right) {
            TruncationDirection::Left => drop(ids.drain(..tokens.saturating_sub(max_length))),
            TruncationDirection::Right => ids.truncate(max_length),
        }
        Ok(Sequence {
            type_ids: vec![0; ids.len()],
            truncated: tokens > ids.len(),
            ids,
        })
    }
}

/// The word that makes [`Scripted`] panic.
pub(crate) const PANIC: u32 = 666;
/// The word that makes [`Scripted`] answer with NaN.
pub(crate) const NAN: u32 = 667;

/// A sequence as [`Scripted`] met it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) task: String,
    pub(crate) version: u64,
    pub(crate) ids: Vec<u32>,
}

/// Answers each sequence with `[version, sum of its ids]`.
#[derive(Default)]
pub(crate) struct Scripted {
    /// The batches so far, by segment.
    batches: Mutex<Vec<Vec<Vec<Seen>>>>,
    gate: Option<Gate>,
}

struct Gate {
    entered: async_mpsc::UnboundedSender<()>,
    pass: Mutex<mpsc::Receiver<()>>,
}

/// The test's end of the gate. When it is dropped, all may pass.
pub(crate) struct Keeper {
    entered: async_mpsc::UnboundedReceiver<()>,
    pass: mpsc::Sender<()>,
}

impl Keeper {
    /// Waits until a batch stands at the gate.
    pub(crate) async fn entered(&mut self) {
        self.entered.recv().await.expect("the model is there");
    }

    /// Lets one batch pass.
    pub(crate) fn pass(&self) {
        self.pass.send(()).expect("the model is there");
    }
}

impl Scripted {
    /// A model that holds each batch until the keeper lets it pass.
    pub(crate) fn gated() -> (Arc<Self>, Keeper) {
        let (entered_sender, entered) = async_mpsc::unbounded_channel();
        let (pass, pass_receiver) = mpsc::channel();
        let model = Self {
            batches: Mutex::default(),
            gate: Some(Gate {
                entered: entered_sender,
                pass: Mutex::new(pass_receiver),
            }),
        };
        (Arc::new(model), Keeper { entered, pass })
    }

    /// The batches so far: segments of sequences.
    pub(crate) fn batches(&self) -> Vec<Vec<Vec<Seen>>> {
        self.batches
            .lock()
            .expect("no panic under the lock")
            .clone()
    }

    /// Whether a sequence with this id has been computed.
    pub(crate) fn has_seen(&self, id: u32) -> bool {
        let batches = self.batches();
        let mut all = batches.iter().flatten().flatten();
        all.any(|seen| seen.ids.contains(&id))
    }
}

impl Model for Scripted {
    fn logits(
        &self,
        batch: &PackedBatch,
        segments: &[TaskSegment<'_>],
    ) -> Result<Vec<Vec<f32>>, ModelError> {
        let seen: Vec<Vec<Seen>> = segments
            .iter()
            .map(|segment| {
                let seen = |i| Seen {
                    task: segment.task.name.clone(),
                    version: segment.task.version,
                    ids: batch.ids[batch.span(i)].to_vec(),
                };
                segment.sequences.clone().map(seen).collect()
            })
            .collect();
        self.batches
            .lock()
            .expect("no panic under the lock")
            .push(seen.clone());
        if let Some(gate) = &self.gate {
            let _ = gate.entered.send(());
            let _ = gate.pass.lock().expect("no panic under the lock").recv();
        }
        assert!(!batch.ids.contains(&PANIC), "told to panic");
        let row = |seen: &Seen| match seen.ids.contains(&NAN) {
            true => vec![f32::NAN, 0.0],
            false => vec![seen.version as f32, seen.ids.iter().sum::<u32>() as f32],
        };
        let rows = segments.iter().zip(&seen).flat_map(|(segment, seen)| {
            let labels = segment.task.config.labels.len();
            seen.iter().map(move |seen| {
                let mut row = row(seen);
                row.truncate(labels);
                row
            })
        });
        Ok(rows.collect())
    }
}

pub(crate) fn start(model: &Arc<Scripted>, options: Options) -> Arc<Serving> {
    let metrics = Arc::new(Metrics::new().expect("metrics"));
    let model: Arc<Scripted> = Arc::clone(model);
    let residents = Residents::new(Arc::new(NoFolders), None, Arc::clone(&metrics));
    let serving = Serving::start(model, Arc::new(Words), residents, options, metrics);
    Arc::new(serving.expect("threads"))
}
