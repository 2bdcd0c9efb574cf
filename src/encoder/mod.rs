//! The transformer families, their heads, and LoRA on any of their linears.
//!
//! One network for serving, training and teachers. It works on packed batches; only attention
//! knows where sequences begin and end. Weights are named as Hugging Face names them, without the
//! family's prefix (`bert.`, `mpnet.`).

mod config;
mod error;
mod family;
mod head;
mod layer;
mod names;
mod task;
mod weights;

pub use config::EncoderConfig;
pub use error::EncoderError;
pub use family::Family;
pub use head::HeadNames;
pub use task::{LoraModule, TaskWeights};
pub use weights::Weights;

use std::ops::Range;
use std::path::Path;

use candle_core::{Device, Tensor};

use crate::ops::{self, AttentionShape, Dropout, EmbedIndices, Norm, RelativeBuckets};
use crate::text::PackedBatch;
use layer::{Adapted, Layer};
use names::Names;

/// A transformer encoder, `[tokens]` ids to `[tokens, hidden]` states.
pub struct Encoder {
    config: EncoderConfig,
    word: Tensor,
    position: Tensor,
    /// `[types, hidden]`; one row of zeros for a family without segment embeddings.
    token_type: Tensor,
    embedding_norm: Norm,
    layers: Vec<Layer>,
    relative: Option<RelativeBias>,
    /// The head's first linear that came with the encoder (BERT's pooler).
    head_dense: Option<ops::Linear>,
    linears: Vec<LinearSpec>,
    parameters: usize,
}

/// MPNet's bias by relative position, shared by all layers.
struct RelativeBias {
    /// `[buckets, heads]`
    bias: Tensor,
    buckets: RelativeBuckets,
}

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
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Site {
    Layer(usize, layer::Slot),
    HeadDense,
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
    /// Reads a folder in Hugging Face's layout: `config.json` and `model.safetensors`.
    pub fn load(dir: &Path, device: &Device) -> Result<Self, EncoderError> {
        let config = EncoderConfig::read(dir)?;
        let weights = Weights::read(dir, config.family, device)?;
        Self::new(config, &weights)
    }

    /// An encoder over `weights`, which it shares and, where linears are fused, copies.
    /// Variables among the weights train.
    pub fn new(config: EncoderConfig, weights: &Weights) -> Result<Self, EncoderError> {
        let names = Names::of(config.family);
        let hidden = config.hidden_size;
        let word = weights.get(
            "embeddings.word_embeddings.weight",
            &[config.vocab_size, hidden],
        )?;
        let position = weights.get(
            "embeddings.position_embeddings.weight",
            &[config.max_position_embeddings, hidden],
        )?;
        let token_type = match config.type_vocab_size {
            0 => Tensor::zeros((1, hidden), word.dtype(), word.device())?,
            types => weights.get("embeddings.token_type_embeddings.weight", &[types, hidden])?,
        };
        let embedding_norm = weights.norm("embeddings.LayerNorm", hidden, config.layer_norm_eps)?;
        let layers = (0..config.num_hidden_layers)
            .map(|index| Layer::new(&config, weights, &names, index))
            .collect::<Result<Vec<_>, _>>()?;
        let relative = match config.relative_attention_num_buckets {
            0 => None,
            buckets => Some(RelativeBias {
                bias: weights.get(
                    "encoder.relative_attention_bias.weight",
                    &[buckets, config.num_attention_heads],
                )?,
                buckets: mpnet_buckets(buckets, config.max_sequence_length()),
            }),
        };
        let head = HeadNames::of(config.family);
        let has_dense = head.stands_alone && weights.contains(&format!("{}.weight", head.dense));
        let head_dense = match has_dense {
            true => Some(weights.linear(head.dense, hidden, hidden)?),
            false => None,
        };
        let mut linears: Vec<LinearSpec> = (0..layers.len())
            .flat_map(|index| names.linears(&config, index))
            .collect();
        if head.stands_alone {
            linears.push(LinearSpec {
                name: head.dense.into(),
                in_features: hidden,
                out_features: hidden,
                site: Site::HeadDense,
                column: 0,
            });
        }
        Ok(Self {
            parameters: weights
                .encoder(config.family)
                .map(|(_, tensor)| tensor.elem_count())
                .sum(),
            config,
            word,
            position,
            token_type,
            embedding_norm,
            layers,
            relative,
            head_dense,
            linears,
        })
    }

    pub fn config(&self) -> &EncoderConfig {
        &self.config
    }

    /// Number of weights, heads not counted.
    pub fn parameters(&self) -> usize {
        self.parameters
    }

    pub fn device(&self) -> &Device {
        self.word.device()
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
    /// Runs on the calling thread: call it from several threads to use several cores.
    pub fn logits(
        &self,
        batch: &PackedBatch,
        segments: &[Segment<'_>],
    ) -> Result<Vec<Vec<f32>>, EncoderError> {
        let mut rows = Vec::with_capacity(batch.sequences());
        for logits in self.forward(batch, segments, None)? {
            rows.extend(logits.to_vec2::<f32>()?);
        }
        Ok(rows)
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
        self.check(batch, segments)?;
        if segments.is_empty() {
            return Ok(Vec::new());
        }
        let over_tokens = dropout.map(|dropout| dropout.of_rows(dropout.first_token));
        let over_sequences = dropout.map(|dropout| dropout.of_rows(dropout.first_sequence));
        let tokens = Adapted::tokens(batch, segments, over_tokens);
        let sequences = Adapted::sequences(segments, over_sequences);
        let first = self.first_states(batch, &tokens, &sequences)?;
        segments
            .iter()
            .map(|segment| {
                let Range { start, end } = segment.sequences;
                let first = first.narrow(0, start, end - start)?;
                segment
                    .weights
                    .head_logits(self.head_dense.as_ref(), &first, over_sequences)
            })
            .collect()
    }

    /// States of each sequence's first token, `[sequences, hidden]`, which the heads go by.
    ///
    /// Behind its attention the last layer works on these rows alone.
    fn first_states(
        &self,
        batch: &PackedBatch,
        tokens: &Adapted<'_>,
        sequences: &Adapted<'_>,
    ) -> Result<Tensor, EncoderError> {
        let firsts: Vec<u32> = batch.offsets[..batch.sequences()]
            .iter()
            .map(|start| *start as u32)
            .collect();
        let firsts = Tensor::from_vec(firsts, batch.sequences(), self.device())?;
        let attention = AttentionShape {
            offsets: batch.offsets.as_slice().into(),
            heads: self.config.num_attention_heads,
            buckets: self.relative.as_ref().map(|r| r.buckets.clone()),
        };
        let bias = self.relative.as_ref().map(|r| &r.bias);
        let mut x = self.embed(batch)?;
        for (i, layer) in self.layers.iter().enumerate() {
            let context = layer.attend(&x, bias, &attention, tokens)?;
            x = if i + 1 == self.layers.len() {
                let context = context.index_select(&firsts, 0)?;
                layer.finish(&context, &x.index_select(&firsts, 0)?, sequences)?
            } else {
                layer.finish(&context, &x, tokens)?
            };
        }
        Ok(x)
    }

    /// Normalised embeddings, `[tokens, hidden]`.
    fn embed(&self, batch: &PackedBatch) -> Result<Tensor, EncoderError> {
        let indices = EmbedIndices {
            word: batch.ids.as_slice().into(),
            position: self.config.positions(batch).into(),
            token_type: match self.config.type_vocab_size {
                0 => vec![0; batch.tokens()].into(),
                _ => batch.type_ids.as_slice().into(),
            },
        };
        let embedded = ops::embed(&self.word, &self.position, &self.token_type, indices)?;
        Ok(ops::norm(&embedded, &self.embedding_norm)?)
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

/// MPNet's buckets (T5's, bidirectional, up to distance 128): half for each direction; of these
/// half exact, the others logarithmic.
fn mpnet_buckets(buckets: usize, limit: usize) -> RelativeBuckets {
    const MAX_DISTANCE: f64 = 128.0;
    let half = (buckets / 2) as u32;
    let exact = half / 2;
    let bucket = |offset: i64| {
        let distance = offset.unsigned_abs() as u32;
        let direction = if offset > 0 { half } else { 0 };
        let within = if distance < exact {
            distance
        } else {
            // In f32, as the reference computes it: the borders between buckets depend on it.
            let log = (distance as f32 / exact as f32).ln();
            let scale = (MAX_DISTANCE / f64::from(exact)).ln() as f32;
            (exact + (log / scale * (half - exact) as f32) as u32).min(half - 1)
        };
        direction + within
    };
    let reach = limit as i64 - 1;
    RelativeBuckets {
        bucket_of: (-reach..=reach).map(bucket).collect::<Vec<_>>().into(),
        limit,
    }
}

impl LinearSpec {
    fn lora_update(&self, a: Tensor, b: Tensor, scale: f64) -> ops::LoraUpdate {
        ops::LoraUpdate {
            a,
            b,
            scale,
            column: self.column,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mpnet_buckets_follow_the_reference() {
        // transformers' MPNetEncoder.relative_position_bucket for j - i.
        let buckets = mpnet_buckets(32, 200);
        let of = |offset: i64| buckets.bucket_of[(offset + 199) as usize];
        let expected = [
            (0, 0),
            (1, 17),
            (-1, 1),
            (7, 23),
            (-7, 7),
            (8, 24),
            (-11, 8),
            (-12, 9),
            (16, 26),
            (-64, 14),
            (127, 31),
            (199, 31),
            (-199, 15),
        ];
        for (offset, bucket) in expected {
            assert_eq!(of(offset), bucket, "offset {offset}");
        }
    }
}
