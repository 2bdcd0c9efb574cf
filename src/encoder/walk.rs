//! One batch's way through the network.

use std::sync::Arc;

use candle_core::backprop::GradStore;
use candle_core::{Tensor, Var};

use super::layer::Adapted;
use super::relative::BatchPositions;
use super::{Encoder, EncoderError, Segment, ShareDropout, Site};
use crate::ops::{self, Activation, AttentionShape, Dropout, EmbedIndices};
use crate::text::PackedBatch;

/// What all layers need to know of a batch.
pub(super) struct Walk<'a> {
    encoder: &'a Encoder,
    batch: &'a PackedBatch,
    segments: &'a [Segment<'a>],
    /// LoRA of the rows, a row a token, and a row a sequence.
    tokens: Adapted<'a>,
    sequences: Adapted<'a>,
    over_sequences: Option<Dropout>,
    /// Each sequence's first token, which the heads go by.
    pub(super) firsts: Tensor,
    first_rows: Arc<[u32]>,
    positions: BatchPositions,
    attention: AttentionShape,
}

impl<'a> Walk<'a> {
    pub(super) fn new(
        encoder: &'a Encoder,
        batch: &'a PackedBatch,
        segments: &'a [Segment<'a>],
        dropout: Option<ShareDropout>,
    ) -> Result<Self, EncoderError> {
        let over_tokens = dropout.map(|dropout| dropout.of_rows(dropout.first_token));
        let over_sequences = dropout.map(|dropout| dropout.of_rows(dropout.first_sequence));
        let firsts: Vec<u32> = batch.offsets[..batch.sequences()]
            .iter()
            .map(|start| *start as u32)
            .collect();
        let longest = (0..batch.sequences()).map(|i| batch.span(i).len()).max();
        let positions = encoder.relative.of_batch(longest.unwrap_or(0))?;
        Ok(Self {
            tokens: Adapted::tokens(batch, segments, over_tokens),
            sequences: Adapted::sequences(segments, over_sequences),
            over_sequences,
            firsts: Tensor::new(firsts.as_slice(), encoder.device())?,
            first_rows: firsts.into(),
            attention: AttentionShape {
                offsets: batch.offsets.as_slice().into(),
                heads: encoder.config.num_attention_heads,
                scale: encoder.config.attention_scale(),
                positions: positions.positions.clone(),
            },
            positions,
            encoder,
            batch,
            segments,
        })
    }

    /// A layer's output of its input, `[tokens, hidden]` both. With `only_firsts` the last layer
    /// works behind its attention on the rows alone that the heads go by, `[sequences, hidden]`.
    pub(super) fn layer(
        &self,
        index: usize,
        x: &Tensor,
        only_firsts: bool,
    ) -> Result<Tensor, EncoderError> {
        let layer = &self.encoder.layers[index];
        let cut = only_firsts && index + 1 == self.encoder.layers.len();
        let (finish, firsts) = match cut {
            true => (&self.sequences, Some(&self.first_rows)),
            false => (&self.tokens, None),
        };
        let trained = layer.train(
            x,
            &self.positions,
            self.segments,
            &self.attention,
            (&self.tokens, finish),
            firsts,
        )?;
        if let Some(output) = trained {
            return self.convolve(index, x, output, cut);
        }
        let context = layer.attend(
            x,
            &self.positions,
            self.segments,
            &self.attention,
            &self.tokens,
        )?;
        let output = if cut {
            let context = context.index_select(&self.firsts, 0)?;
            layer.finish(&context, &x.index_select(&self.firsts, 0)?, finish)?
        } else {
            layer.finish(&context, x, finish)?
        };
        self.convolve(index, x, output, cut)
    }

    /// Adds the convolution of a family that has one to the first layer's output.
    fn convolve(
        &self,
        index: usize,
        x: &Tensor,
        output: Tensor,
        cut: bool,
    ) -> Result<Tensor, EncoderError> {
        match &self.encoder.conv {
            // It reads the embeddings, which are the first layer's input.
            Some(conv) if index == 0 => {
                let rows = cut.then_some(&self.firsts);
                conv.forward(x, &self.attention.offsets, &output, rows)
            }
            _ => Ok(output),
        }
    }

    /// Logits of each segment, of the states of first tokens, `[sequences, hidden]`.
    pub(super) fn heads(&self, first: &Tensor) -> Result<Vec<Tensor>, EncoderError> {
        self.segments
            .iter()
            .map(|segment| {
                let sequences = &segment.sequences;
                let first = first.narrow(0, sequences.start, sequences.len())?;
                let dense = self.encoder.head_dense.as_ref();
                segment
                    .weights
                    .head_logits(dense, &first, self.over_sequences)
            })
            .collect()
    }

    /// Normalised embeddings, `[tokens, hidden]`.
    pub(super) fn embed(&self) -> Result<Tensor, EncoderError> {
        let (encoder, batch) = (self.encoder, self.batch);
        let indices = EmbedIndices {
            word: batch.ids.as_slice().into(),
            position: match encoder.config.position_embeddings {
                true => encoder.config.positions(batch).into(),
                false => vec![0; batch.tokens()].into(),
            },
            token_type: match encoder.config.type_vocab_size {
                0 => vec![0; batch.tokens()].into(),
                _ => batch.type_ids.as_slice().into(),
            },
        };
        let mut embedded = ops::embed(
            &encoder.word,
            &encoder.position,
            &encoder.token_type,
            indices,
        )?;
        if let Some(projection) = &encoder.projection {
            embedded =
                self.tokens
                    .linear(&embedded, projection, Site::Embeddings, Activation::None)?;
        }
        Ok(ops::norm(&embedded, &encoder.embedding_norm)?)
    }
}

/// The gradient of a variable, taken out of the last store.
pub(super) fn taken(stores: &mut [GradStore], variable: &Var) -> Option<Tensor> {
    stores.last_mut()?.remove(variable.as_tensor())
}
