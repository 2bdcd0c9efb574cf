//! The transformer families, their heads, and LoRA on any of their linears.
//!
//! One network for serving, training and teachers. It works on packed batches; only attention
//! knows where sequences begin and end. Weights are named as Hugging Face names them, without the
//! family's prefix (`bert.`, `mpnet.`).

mod config;
mod conv;
mod deberta;
mod dense;
mod digest;
mod error;
mod family;
mod head;
mod layer;
mod names;
#[cfg(all(test, feature = "cuda"))]
mod on_gpu;
mod packed;
mod placement;
mod relative;
mod stored;
mod task;
mod walk;
mod weights;

pub use config::EncoderConfig;
pub use conv::ConvConfig;
pub use digest::{EncoderId, cached_encoder_digest, encoder_digest, shown_encoder};
pub use error::EncoderError;
pub use family::Family;
pub use head::HeadNames;
pub use placement::Placement;
pub use relative::{DisentangledConfig, RelativeAttention};
#[cfg(test)]
pub(crate) use stored::tests::copy_in_shards;
pub use stored::{
    RawTensor, StoredTensors, WEIGHTS, WEIGHTS_INDEX, shard_names, weight_bytes, weight_files,
};
pub use task::{LoraModule, TaskWeights, dora_gain};
pub use weights::Weights;

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};

use crate::ops::device::Download;
use crate::ops::{self, Dropout, Norm};
use crate::text::PackedBatch;
use conv::Conv;
use dense::Dense;
use layer::Layer;
use names::Names;
use packed::Packing;
use relative::Relative;
use walk::{Walk, taken};

/// A transformer encoder, `[tokens]` ids to `[tokens, hidden]` states.
#[derive(Clone)]
pub struct Encoder {
    config: EncoderConfig,
    word: Tensor,
    /// `[positions, embedding]`; one row of zeros for an encoder without position embeddings.
    position: Tensor,
    /// `[types, embedding]`; one row of zeros for an encoder without segment embeddings.
    token_type: Tensor,
    /// From the embeddings' size to the hidden size, where they differ.
    projection: Option<Dense>,
    embedding_norm: Norm,
    layers: Vec<Layer>,
    conv: Option<Conv>,
    relative: Relative,
    /// The head's first linear that came with the encoder (BERT's pooler).
    head_dense: Option<ops::Linear>,
    linears: Vec<LinearSpec>,
    /// Without those that only stand in packed linears.
    weights: Weights,
    parameters: usize,
    /// The folder that it was read from.
    folder: Option<PathBuf>,
    packing: Option<Packing>,
}

/// Module name of the projection of the embeddings.
const PROJECTION: &str = "embeddings.embed_proj";

/// A linear of the model that LoRA may target.
#[derive(Clone, Debug)]
pub struct LinearSpec {
    /// Module path without the family's prefix: `encoder.layer.0.attention.self.query`.
    pub name: String,
    pub in_features: usize,
    pub out_features: usize,
    site: Site,
    /// First output column of this linear in the fused one that holds it.
    column: usize,
}

/// A (fused) linear's place in the network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Site {
    Layer(usize, layer::Slot),
    HeadDense,
    /// The projection of the embeddings.
    Embeddings,
}

/// Sequences of a batch that one task answers.
#[derive(Clone)]
pub struct Segment<'a> {
    pub sequences: Range<usize>,
    pub weights: &'a TaskWeights,
}

/// Dropout of one share of a training batch. Masks go by an element's place in the whole batch, so
/// that they are the same however the batch is shared out.
#[derive(Clone, Copy, Debug)]
pub struct ShareDropout {
    /// Probability of an element to be dropped, below 1.
    pub rate: f64,
    /// Differs for every step.
    pub seed: u64,
    /// Place in the whole batch of the share's first token and first sequence.
    pub first_token: usize,
    pub first_sequence: usize,
}

impl ShareDropout {
    fn of_rows(self, first_row: usize) -> Dropout {
        Dropout {
            rate: self.rate,
            seed: self.seed,
            first_row,
        }
    }
}

impl Encoder {
    /// Reads a folder in Hugging Face's layout: `config.json` and the weights (see
    /// [`StoredTensors`]).
    pub fn load(dir: &Path, device: &Device) -> Result<Self, EncoderError> {
        let placement = match device.is_cpu() {
            true => Placement::default(),
            false => Placement::gpu(device.clone(), DType::F32),
        };
        Self::load_on(dir, &placement)
    }

    fn load_on(dir: &Path, placement: &Placement) -> Result<Self, EncoderError> {
        let config = EncoderConfig::read(dir)?;
        let weights = Weights::read(dir, config.family, &Device::Cpu)?;
        let mut encoder = Self::new(config, &placement.place(weights)?)?;
        encoder.folder = Some(dir.to_path_buf());
        Ok(encoder)
    }

    /// An encoder over `weights`, which it shares and, where linears are fused, copies.
    /// Variables among the weights train.
    pub fn new(config: EncoderConfig, weights: &Weights) -> Result<Self, EncoderError> {
        let names = Names::of(config.family);
        let hidden = config.hidden_size;
        let embedding = config.embedding_size;
        let table = |name: &str, rows| {
            weights.get(&format!("embeddings.{name}.weight"), &[rows, embedding])
        };
        let word = table("word_embeddings", config.vocab_size)?;
        let zeros = Tensor::zeros((1, embedding), word.dtype(), word.device())?;
        let position = match config.position_embeddings {
            true => table("position_embeddings", config.max_position_embeddings)?,
            false => zeros.clone(),
        };
        let token_type = match config.type_vocab_size {
            0 => zeros,
            types => table("token_type_embeddings", types)?,
        };
        let projection = match config.has_projection() {
            true => Some(Dense::Plain(ops::Linear {
                weight: weights.get(&format!("{PROJECTION}.weight"), &[hidden, embedding])?,
                bias: None,
            })),
            false => None,
        };
        let embedding_norm = weights.norm("embeddings.LayerNorm", hidden, config.layer_norm_eps)?;
        let relative = Relative::new(&config, weights)?;
        let layers = (0..config.num_hidden_layers)
            .map(|index| Layer::new(&config, weights, &names, &relative, index))
            .collect::<Result<Vec<_>, _>>()?;
        let head = HeadNames::of(config.family);
        let has_dense = head.stands_alone && weights.contains(&format!("{}.weight", head.dense));
        let head_dense = match has_dense {
            true => Some(weights.linear(head.dense, hidden, hidden)?),
            false => None,
        };
        let whole = |name: &str, in_features, site| LinearSpec {
            name: name.into(),
            in_features,
            out_features: hidden,
            site,
            column: 0,
        };
        let mut linears = Vec::new();
        if projection.is_some() {
            linears.push(whole(PROJECTION, embedding, Site::Embeddings));
        }
        linears.extend((0..layers.len()).flat_map(|index| names.linears(&config, index)));
        if head.stands_alone {
            linears.push(whole(head.dense, hidden, Site::HeadDense));
        }
        let counted = weights.encoder(config.family);
        let parameters = counted.map(|(_, tensor)| tensor.elem_count()).sum();
        let mut encoder = Self {
            conv: Conv::new(&config, weights)?,
            config,
            word,
            position,
            token_type,
            projection,
            embedding_norm,
            layers,
            relative,
            head_dense,
            linears,
            weights: weights.clone(),
            parameters,
            folder: None,
            packing: None,
        };
        encoder.share_fused();
        Ok(encoder)
    }

    /// Makes views of the fused linears out of the weights that they were put together from, so
    /// that these are not in memory twice. Not where they train: the views would be ops.
    fn share_fused(&mut self) {
        let names = Names::of(self.config.family);
        for (index, layer) in self.layers.iter().enumerate() {
            let parts = [names.query, names.key, names.value];
            let parts = parts.map(|name| names.in_layer(index, name));
            if let Dense::Plain(qkv) = &layer.qkv {
                self.weights.share(qkv, &parts);
            }
        }
    }

    pub fn config(&self) -> &EncoderConfig {
        &self.config
    }

    /// Number of weights, heads not counted.
    pub fn parameters(&self) -> usize {
        self.parameters
    }

    /// All that the encoder's folder held, a head included. The tensors are the encoder's own, not
    /// copies. A packed encoder has only those that are not packed, see [`Encoder::weight`].
    pub fn weights(&self) -> &Weights {
        &self.weights
    }

    /// Weight `[out, in]` and bias `[out]` of one of the [linears](Self::linears).
    ///
    /// # Errors
    /// It belongs to the head, and the encoder's folder had none.
    pub fn linear(&self, spec: &LinearSpec) -> Result<ops::Linear, EncoderError> {
        let has_bias = spec.site != Site::Embeddings;
        let tensor = |part: &str, shape: &[usize]| {
            let name = format!("{}.{part}", spec.name);
            let tensor = self.weight(&name)?;
            weights::check_shape(&name, &tensor, shape)?;
            Ok::<_, EncoderError>(tensor)
        };
        let (input, out) = (spec.in_features, spec.out_features);
        Ok(ops::Linear {
            weight: tensor("weight", &[out, input])?,
            bias: match has_bias {
                true => Some(tensor("bias", &[out])?),
                false => None,
            },
        })
    }

    /// Outputs of the linear that holds this one: of Q, K and V together for each of them.
    pub fn fused_width(&self, spec: &LinearSpec) -> usize {
        match spec.site {
            Site::Layer(_, layer::Slot::Qkv) => 3 * spec.out_features,
            _ => spec.out_features,
        }
    }

    pub fn device(&self) -> &Device {
        self.word.device()
    }

    /// The type of its matrices and activations.
    pub fn dtype(&self) -> DType {
        self.word.dtype()
    }

    /// A weight where the encoder's are, in their type.
    pub fn place(&self, tensor: &Tensor) -> candle_core::Result<Tensor> {
        weights::place(tensor, self.device(), self.dtype())
    }

    /// The head's first linear that came with the encoder: BERT's pooler, and what a fine-tuned
    /// DistilBERT has.
    pub fn head_dense(&self) -> Option<&ops::Linear> {
        self.head_dense.as_ref()
    }

    /// Every linear that LoRA may target, in the network's order.
    pub fn linears(&self) -> &[LinearSpec] {
        &self.linears
    }

    /// This family's names for LoRA targets given as `query`, `key` and `value`.
    pub fn native_targets(&self, targets: &[String]) -> Vec<String> {
        let names = Names::of(self.config.family);
        targets
            .iter()
            .map(|target| names.native(target).to_owned())
            .collect()
    }

    /// One row of logits a sequence, in the batch's order.
    ///
    /// Runs on the calling thread, and on others only if that leads a forward of a
    /// [`Crew`](ops::Crew): call it from several threads to use several cores.
    pub fn logits(
        &self,
        batch: &PackedBatch,
        segments: &[Segment<'_>],
    ) -> Result<Vec<Vec<f32>>, EncoderError> {
        self.launch(batch, segments)?.wait()
    }

    /// The same, on a GPU without waiting for it: the caller may prepare another batch meanwhile.
    pub fn launch(
        &self,
        batch: &PackedBatch,
        segments: &[Segment<'_>],
    ) -> Result<Logits, EncoderError> {
        self.check(batch, segments)?;
        if segments.is_empty() {
            return Ok(Logits::default());
        }
        let _launching = ops::device::exclusive(self.device());
        let walk = Walk::new(self, batch, segments, None)?;
        let (first, _) = walk.states(&[])?;
        let widths = segments.iter().flat_map(|segment| {
            let labels = segment.weights.num_labels();
            std::iter::repeat_n(labels, segment.sequences.len())
        });
        Ok(Logits {
            widths: widths.collect(),
            values: Some(Download::begin(&walk.all_logits(&first)?)?),
        })
    }

    /// Logits `[sequences, labels]` of each segment. Segments cover the batch's sequences in
    /// order. Tracked for the backward pass where variables take part, which takes one segment.
    /// Dropout applies to the inputs of LoRA and of the head.
    pub fn forward(
        &self,
        batch: &PackedBatch,
        segments: &[Segment<'_>],
        dropout: Option<ShareDropout>,
    ) -> Result<Vec<Tensor>, EncoderError> {
        if segments.is_empty() {
            return self.check(batch, segments).map(|()| Vec::new());
        }
        let (logits, _) = self.forward_with_states(batch, segments, dropout, &[])?;
        Ok(logits)
    }

    /// The logits of [forward](Self::forward), and the states `[tokens, hidden]` behind some
    /// layers, counted from 1; 0 is behind the embeddings.
    pub fn forward_with_states(
        &self,
        batch: &PackedBatch,
        segments: &[Segment<'_>],
        dropout: Option<ShareDropout>,
        wanted: &[usize],
    ) -> Result<(Vec<Tensor>, BTreeMap<usize, Tensor>), EncoderError> {
        self.check(batch, segments)?;
        let walk = Walk::new(self, batch, segments, dropout)?;
        let (first, states) = walk.states(wanted)?;
        Ok((walk.heads(&first)?, states))
    }

    /// Loss and gradients of a training batch with one segment, layer by layer: of each layer only
    /// its input is kept, and the rest is computed again when its turn in the backward pass comes
    /// (gradient checkpointing). `loss` makes a scalar of the logits.
    ///
    /// A variable that several layers share has a gradient in several stores: they add up.
    pub fn backward_by_layer(
        &self,
        batch: &PackedBatch,
        segment: Segment<'_>,
        dropout: Option<ShareDropout>,
        loss: impl FnOnce(&Tensor) -> candle_core::Result<Tensor>,
    ) -> Result<(Download, Vec<GradStore>), EncoderError> {
        let segments = [segment];
        self.check(batch, &segments)?;
        let walk = Walk::new(self, batch, &segments, dropout)?;
        let embedded = walk.embed()?;
        let mut inputs = Vec::with_capacity(self.layers.len());
        let mut x = embedded.detach();
        for index in 0..self.layers.len() {
            let output = walk.layer(index, &x, true)?.detach();
            inputs.push(std::mem::replace(&mut x, output));
        }
        let top = Var::from_tensor(&x)?;
        let logits = walk.heads(top.as_tensor())?;
        let loss = loss(&logits[0])?;
        let value = Download::begin(&loss)?;
        let mut stores = vec![loss.backward()?];
        let mut gradient = taken(&mut stores, &top);
        for (index, input) in inputs.into_iter().enumerate().rev() {
            let Some(dy) = gradient else {
                return Ok((value, stores));
            };
            let x = Var::from_tensor(&input)?;
            let y = walk.layer(index, x.as_tensor(), true)?;
            stores.push((y * dy)?.sum_all()?.backward()?);
            gradient = taken(&mut stores, &x);
        }
        if let (true, Some(dy)) = (embedded.track_op(), gradient) {
            stores.push((embedded * dy)?.sum_all()?.backward()?);
        }
        Ok((value, stores))
    }

    fn check(&self, batch: &PackedBatch, segments: &[Segment<'_>]) -> Result<(), EncoderError> {
        let limit = self.config.max_sequence_length();
        let mut next = 0;
        for segment in segments {
            if segment.sequences.start != next || segment.sequences.is_empty() {
                return Err(EncoderError::Segments);
            }
            next = segment.sequences.end;
        }
        if next != batch.sequences() {
            return Err(EncoderError::Segments);
        }
        for i in 0..batch.sequences() {
            let tokens = batch.span(i).len();
            if tokens == 0 || tokens > limit {
                return Err(EncoderError::SequenceLength { tokens, limit });
            }
        }
        Ok(())
    }
}

/// Logits that are on their way from the device that computes them.
#[derive(Default)]
pub struct Logits {
    /// Labels of each sequence's task.
    widths: Vec<usize>,
    values: Option<Download>,
}

impl Logits {
    /// Waits for them: a row a sequence, in the batch's order.
    pub fn wait(self) -> Result<Vec<Vec<f32>>, EncoderError> {
        let Some(values) = self.values else {
            return Ok(Vec::new());
        };
        let values = values.wait()?;
        let mut rest = values.as_slice();
        let rows = self.widths.iter().map(|labels| {
            let (row, behind) = rest.split_at(*labels);
            rest = behind;
            row.to_vec()
        });
        Ok(rows.collect())
    }
}

impl LinearSpec {
    fn lora_update(
        &self,
        a: Tensor,
        b: Tensor,
        scale: f64,
        map: Option<ops::ColumnMap>,
    ) -> ops::LoraUpdate {
        ops::LoraUpdate {
            a,
            b,
            scale,
            column: self.column,
            map,
        }
    }
}
