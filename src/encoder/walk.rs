//! One batch's way through the network.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::backprop::GradStore;
use candle_core::{DType, Tensor, Var};

use super::layer::Adapted;
use super::relative::BatchPositions;
use super::{Encoder, EncoderError, HeadNames, Segment, ShareDropout, Site};
use crate::ops::{self, Activation, AttentionShape, Borders, Dropout, EmbedIndices};
use crate::text::PackedBatch;

/// What all layers need to know of a batch.
pub(super) struct Walk<'a> {
    encoder: &'a Encoder,
    segments: &'a [Segment<'a>],
    /// LoRA of the rows, a row a token, and a row a sequence.
    tokens: Adapted<'a>,
    sequences: Adapted<'a>,
    over_sequences: Option<Dropout>,
    /// Each sequence's first token, which the heads go by.
    firsts: Tensor,
    first_rows: Arc<[u32]>,
    positions: BatchPositions,
    indices: EmbedIndices,
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
        let (firsts, borders, indices) = upload(encoder, batch)?;
        let first_rows = batch.offsets[..batch.sequences()].iter();
        let first_rows = first_rows.map(|start| *start as u32);
        let longest = (0..batch.sequences()).map(|i| batch.span(i).len()).max();
        let positions = encoder.relative.of_batch(longest.unwrap_or(0))?;
        Ok(Self {
            tokens: Adapted::tokens(batch, segments, over_tokens),
            sequences: Adapted::sequences(segments, over_sequences),
            over_sequences,
            firsts,
            first_rows: first_rows.collect(),
            indices,
            attention: AttentionShape {
                offsets: borders,
                heads: encoder.config.num_attention_heads,
                scale: encoder.config.attention_scale(),
                positions: positions.positions.clone(),
            },
            positions,
            encoder,
            segments,
        })
    }

    /// The states of first tokens behind the last layer, `[sequences, hidden]`, and all states
    /// `[tokens, hidden]` behind some layers, counted from 1; 0 is behind the embeddings.
    pub(super) fn states(
        &self,
        wanted: &[usize],
    ) -> Result<(Tensor, BTreeMap<usize, Tensor>), EncoderError> {
        let mut states = BTreeMap::new();
        let mut x = self.embed()?;
        let count = self.encoder.layers.len();
        if wanted.contains(&0) {
            states.insert(0, x.clone());
        }
        for index in 0..count {
            // Where all of the last layer's rows are wanted, the heads choose theirs of them.
            let whole = index + 1 == count && wanted.contains(&count);
            x = self.layer(index, &x, !whole)?;
            if wanted.contains(&(index + 1)) {
                states.insert(index + 1, x.clone());
            }
            if whole {
                x = x.index_select(&self.firsts, 0)?;
            }
        }
        Ok((x, states))
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

    /// All logits behind one another, of the states of first tokens, `[sequences, hidden]`; a row
    /// has as many as its task has labels. On a GPU the heads of many tasks are computed at once.
    pub(super) fn all_logits(&self, first: &Tensor) -> Result<Tensor, EncoderError> {
        if first.device().is_cuda()
            && let Some(logits) = self.heads_at_once(first)?
        {
            return Ok(logits);
        }
        let flat = self
            .heads(first)?
            .into_iter()
            .map(|logits| logits.flatten_all());
        let flat = flat.collect::<candle_core::Result<Vec<_>>>()?;
        Ok(Tensor::cat(&flat, 0)?)
    }

    /// `None` where a head carries LoRA.
    fn heads_at_once(&self, first: &Tensor) -> Result<Option<Tensor>, EncoderError> {
        let encoder_dense = self.encoder.head_dense.as_ref();
        let mut dense = Vec::with_capacity(self.segments.len());
        let mut projections = Vec::with_capacity(self.segments.len());
        for Segment { sequences, weights } in self.segments {
            let Some((first, second)) = weights.plain_head(encoder_dense)? else {
                return Ok(None);
            };
            dense.push((sequences.clone(), first));
            projections.push((sequences.clone(), second));
        }
        let activation = HeadNames::of(self.encoder.config.family).activation;
        let x = ops::segment_linears(first, &dense, activation, first.dtype())?;
        let x = x.reshape(first.dims())?;
        let logits = ops::segment_linears(&x, &projections, Activation::None, DType::F32)?;
        Ok(Some(logits))
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
        let encoder = self.encoder;
        let mut embedded = ops::embed(
            &encoder.word,
            &encoder.position,
            &encoder.token_type,
            self.indices.clone(),
        )?;
        if let Some(projection) = &encoder.projection {
            embedded =
                self.tokens
                    .linear(&embedded, projection, Site::Embeddings, Activation::None)?;
        }
        Ok(ops::norm(&embedded, &encoder.embedding_norm)?)
    }
}

/// What the ops need to know of a batch, where the encoder is: the sequences' first tokens, their
/// borders, and the indices of embeddings.
fn upload(
    encoder: &Encoder,
    batch: &PackedBatch,
) -> Result<(Tensor, Borders, EmbedIndices), EncoderError> {
    let (config, device) = (&encoder.config, encoder.device());
    let borders: Vec<u32> = batch.offsets.iter().map(|start| *start as u32).collect();
    let firsts = &borders[..batch.sequences()];
    let nothing = || vec![0; batch.tokens()].into();
    let mut indices = EmbedIndices {
        word: batch.ids.as_slice().into(),
        position: match config.position_embeddings {
            true => config.positions(batch).into(),
            false => nothing(),
        },
        token_type: match config.type_vocab_size {
            0 => nothing(),
            _ => batch.type_ids.as_slice().into(),
        },
        on_device: None,
    };
    if device.is_cpu() {
        let firsts = Tensor::from_slice(firsts, firsts.len(), device)?;
        return Ok((firsts, Borders::new(&batch.offsets, None), indices));
    }
    let arrays = [
        &borders,
        &*indices.word,
        &*indices.position,
        &*indices.token_type,
    ];
    let uploaded = ops::device::upload(device, &arrays)?;
    let [on_device, word, position, token_type] = <[Tensor; 4]>::try_from(uploaded)
        .map_err(|_| candle_core::Error::msg("as many tensors as arrays"))?;
    indices.on_device = Some([word, position, token_type]);
    let firsts = on_device.narrow(0, 0, firsts.len())?;
    let borders = Borders::new(&batch.offsets, Some(on_device));
    Ok((firsts, borders, indices))
}

/// The gradient of a variable, taken out of the last store.
pub(super) fn taken(stores: &mut [GradStore], variable: &Var) -> Option<Tensor> {
    stores.last_mut()?.remove(variable.as_tensor())
}
