//! One transformer layer (post-norm) with LoRA on its linears.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;

use candle_core::Tensor;

use super::dense::Dense;
use super::names::Names;
use super::relative::{BatchPositions, PositionProjection, Relative};
use super::{EncoderConfig, EncoderError, Segment, Site, TaskWeights, Weights};
use crate::ops::{
    self, Activation, AttentionShape, Dropout, FrozenBf16, LayerLinear, LayerParts, Linear,
    LoraUpdate, Norm, Precision, RowUpdates,
};
use crate::text::PackedBatch;

/// The linears of a layer, in the order of [`Layer::linears`]; Q, K and V are one, and so are the
/// query and key of positions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Slot {
    Qkv,
    AttentionOutput,
    Up,
    Down,
    Positions,
}

#[derive(Clone)]
pub(super) struct Layer {
    index: usize,
    /// `[3 · hidden, hidden]`
    pub(super) qkv: Dense,
    positions: Option<PositionProjection>,
    attention_output: Dense,
    attention_norm: Norm,
    up: Dense,
    down: Dense,
    output_norm: Norm,
    /// The linears in bf16, where what trains on them is computed in it.
    bf16: Option<Arc<[Arc<FrozenBf16>; 4]>>,
}

impl Layer {
    pub(super) fn new(
        config: &EncoderConfig,
        weights: &Weights,
        names: &Names,
        relative: &Relative,
        index: usize,
    ) -> Result<Self, EncoderError> {
        let (hidden, wide) = (config.hidden_size, config.intermediate_size);
        let linear = |name, input, out| weights.linear(&names.in_layer(index, name), input, out);
        let norm = |name| weights.norm(&names.in_layer(index, name), hidden, config.layer_norm_eps);
        let parts = [names.query, names.key, names.value]
            .map(|name| linear(name, hidden, hidden))
            .into_iter()
            .collect::<Result<Vec<_>, _>>()?;
        let qkv = fuse(&parts)?;
        Ok(Self {
            index,
            positions: PositionProjection::new(config, weights, names, relative, index, &qkv)?,
            qkv: Dense::Plain(qkv),
            attention_output: Dense::Plain(linear(names.attention_output, hidden, hidden)?),
            attention_norm: norm(names.attention_norm)?,
            up: Dense::Plain(linear(names.up, hidden, wide)?),
            down: Dense::Plain(linear(names.down, wide, hidden)?),
            output_norm: norm(names.output_norm)?,
            bf16: None,
        })
    }

    /// This layer for training by LoRA on linears in bf16.
    pub(super) fn with_bf16(&self) -> Result<Self, EncoderError> {
        let narrow = |linear: &Dense| -> Result<_, EncoderError> {
            Ok(Arc::new(FrozenBf16::new(linear.plain()?)?))
        };
        let [qkv, attention_output, up, down] = self.linears();
        let all = [
            narrow(qkv)?,
            narrow(attention_output)?,
            narrow(up)?,
            narrow(down)?,
        ];
        Ok(Self {
            bf16: Some(Arc::new(all)),
            ..self.clone()
        })
    }

    pub(super) fn bf16_bytes(&self) -> usize {
        let all = self.bf16.iter().flat_map(|all| all.iter());
        all.map(|linear| linear.bytes()).sum()
    }

    /// This layer with its linears laid out for inference.
    pub(super) fn pack(&self, precision: Precision) -> Result<Self, EncoderError> {
        Ok(Self {
            qkv: self.qkv.pack(precision)?,
            attention_output: self.attention_output.pack(precision)?,
            up: self.up.pack(precision)?,
            down: self.down.pack(precision)?,
            ..self.clone()
        })
    }

    /// Takes another's linears in place of its own where none of the touched sites is.
    pub(super) fn share_untouched(&mut self, other: &Self, touched: &BTreeSet<Site>) {
        let pairs = [
            (&mut self.qkv, &other.qkv, Slot::Qkv),
            (
                &mut self.attention_output,
                &other.attention_output,
                Slot::AttentionOutput,
            ),
            (&mut self.up, &other.up, Slot::Up),
            (&mut self.down, &other.down, Slot::Down),
        ];
        for (own, other, slot) in pairs {
            if !touched.contains(&Site::Layer(self.index, slot)) {
                own.clone_from(other);
            }
        }
    }

    pub(super) fn index(&self) -> usize {
        self.index
    }

    pub(super) fn linears(&self) -> [&Dense; 4] {
        [&self.qkv, &self.attention_output, &self.up, &self.down]
    }

    /// The whole layer as one op, where that [suits](LayerParts::suit_one_op): `[tokens, hidden]`
    /// to the same, or to the rows `firsts` alone. `finish` adapts the rows behind the attention.
    pub(super) fn train(
        &self,
        x: &Tensor,
        positions: &BatchPositions,
        segments: &[Segment<'_>],
        shape: &AttentionShape,
        (attend, finish): (&Adapted<'_>, &Adapted<'_>),
        firsts: Option<&Arc<[u32]>>,
    ) -> Result<Option<Tensor>, EncoderError> {
        let ([(_, weights)], None) = (attend.rows.as_slice(), &self.positions) else {
            return Ok(None);
        };
        let (Some(qkv), Some(attention_output), Some(up), Some(down)) = (
            self.linear(Slot::Qkv, weights, attend.dropout),
            self.linear(Slot::AttentionOutput, weights, finish.dropout),
            self.linear(Slot::Up, weights, finish.dropout),
            self.linear(Slot::Down, weights, finish.dropout),
        ) else {
            return Ok(None);
        };
        let linears = [&qkv, &attention_output, &up, &down];
        let mut all = linears.iter().flat_map(|part| part.updates);
        let trains = x.track_op() || all.any(LoraUpdate::trains);
        let parts = LayerParts {
            qkv,
            attention_output,
            attention_norm: &self.attention_norm,
            up,
            activation: Activation::Gelu,
            down,
            output_norm: &self.output_norm,
            attention: shape.clone(),
            tables: positions.tables(None, segments, attend)?,
        };
        if !trains || !parts.suit_one_op() {
            return Ok(None);
        }
        Ok(Some(ops::trained_layer(x, parts, firsts.cloned())?))
    }

    /// A linear with what `weights` add to it, unless it is packed.
    fn linear<'a>(
        &'a self,
        slot: Slot,
        weights: &'a TaskWeights,
        dropout: Option<Dropout>,
    ) -> Option<LayerLinear<'a>> {
        let place = slot as usize;
        let Dense::Plain(linear) = self.linears().get(place)? else {
            return None;
        };
        let site = Site::Layer(self.index, slot);
        Some(LayerLinear {
            linear,
            bf16: self.bf16.as_ref().map(|all| &all[place]),
            updates: weights.updates(site).map_or(&[], |updates| updates),
            dropout: dropout.map(|dropout| dropout.at_site(site.number())),
        })
    }

    /// What the tokens attend to: `[tokens, hidden]` to `[tokens, hidden]`.
    pub(super) fn attend(
        &self,
        x: &Tensor,
        positions: &BatchPositions,
        segments: &[Segment<'_>],
        shape: &AttentionShape,
        adapted: &Adapted<'_>,
    ) -> Result<Tensor, EncoderError> {
        let site = Site::Layer(self.index, Slot::Qkv);
        let (qkv, bias) = adapted.linear_before_bias(x, &self.qkv, site)?;
        let tables = positions.tables(self.positions.as_ref(), segments, adapted)?;
        Ok(ops::attention(&qkv, bias, &tables, shape.clone())?)
    }

    /// The rest of the layer, which works on each row by itself: `context` and the layer's input
    /// `x` to its output, all `[rows, hidden]`.
    pub(super) fn finish(
        &self,
        context: &Tensor,
        x: &Tensor,
        adapted: &Adapted<'_>,
    ) -> Result<Tensor, EncoderError> {
        let site = |slot| Site::Layer(self.index, slot);
        let output = &self.attention_output;
        let output = adapted.linear_before_bias(context, output, site(Slot::AttentionOutput));
        let (attended, bias) = output?;
        let x = ops::add_norm(&attended, bias, x, &self.attention_norm)?;
        let wide = adapted.linear(&x, &self.up, site(Slot::Up), Activation::Gelu)?;
        let (narrow, bias) = adapted.linear_before_bias(&wide, &self.down, site(Slot::Down))?;
        Ok(ops::add_norm(&narrow, bias, &x, &self.output_norm)?)
    }
}

/// Linears of one input as one linear, outputs side by side.
pub(super) fn fuse(parts: &[Linear]) -> Result<Linear, EncoderError> {
    let weights: Vec<&Tensor> = parts.iter().map(|part| &part.weight).collect();
    let biases: Vec<&Tensor> = parts.iter().filter_map(|part| part.bias.as_ref()).collect();
    Ok(Linear {
        weight: Tensor::cat(&weights, 0)?,
        bias: Some(Tensor::cat(&biases, 0)?),
    })
}

/// Which rows of a tensor each task's LoRA updates.
pub(super) struct Adapted<'a> {
    rows: Vec<(Range<usize>, &'a TaskWeights)>,
    dropout: Option<Dropout>,
}

impl<'a> Adapted<'a> {
    /// A row a token.
    pub(super) fn tokens(
        batch: &PackedBatch,
        segments: &[Segment<'a>],
        dropout: Option<Dropout>,
    ) -> Self {
        let tokens =
            |sequences: &Range<usize>| batch.offsets[sequences.start]..batch.offsets[sequences.end];
        let rows = segments.iter().map(|s| (tokens(&s.sequences), s.weights));
        Self {
            rows: rows.collect(),
            dropout,
        }
    }

    /// A row a sequence.
    pub(super) fn sequences(segments: &[Segment<'a>], dropout: Option<Dropout>) -> Self {
        let rows = segments.iter().map(|s| (s.sequences.clone(), s.weights));
        Self {
            rows: rows.collect(),
            dropout,
        }
    }

    /// One task for all rows.
    pub(super) fn whole(weights: &'a TaskWeights, rows: usize, dropout: Option<Dropout>) -> Self {
        Self {
            rows: vec![(0..rows, weights)],
            dropout,
        }
    }

    /// Dropout of the positions that a site's LoRA reads, the first of them the row `first_row` of
    /// all: the same for each share of a batch.
    pub(super) fn position_dropout(&self, site: Site, first_row: usize) -> Option<Dropout> {
        let dropout = self.dropout?.at_site(POSITIONS | site.number());
        Some(Dropout {
            first_row,
            ..dropout
        })
    }

    /// A linear with the updates of its site, and the bias that is still to be added: on a GPU what
    /// reads the result does that in passing.
    pub(super) fn linear_before_bias<'b>(
        &self,
        x: &Tensor,
        linear: &'b Dense,
        site: Site,
    ) -> Result<(Tensor, Option<&'b Tensor>), EncoderError> {
        let of_site = || self.rows.iter().filter_map(|(_, w)| w.updates(site));
        let mut updates = of_site().flat_map(|updates| updates.iter());
        // A map of the columns goes by the sum with the bias.
        let at_once = updates.any(|update| update.trains() || update.map.is_some());
        match linear {
            Dense::Plain(plain) if x.device().is_cuda() && !x.track_op() && !at_once => {
                let without = Dense::Plain(Linear {
                    weight: plain.weight.clone(),
                    bias: None,
                });
                let y = self.linear(x, &without, site, Activation::None)?;
                Ok((y, plain.bias.as_ref()))
            }
            _ => Ok((self.linear(x, linear, site, Activation::None)?, None)),
        }
    }

    /// A linear with the updates of its site.
    pub(super) fn linear(
        &self,
        x: &Tensor,
        linear: &Dense,
        site: Site,
        activation: Activation,
    ) -> Result<Tensor, EncoderError> {
        let updates: Vec<RowUpdates> = self
            .rows
            .iter()
            .filter_map(|(rows, weights)| {
                Some(RowUpdates {
                    rows: rows.clone(),
                    updates: weights.updates(site)?.clone(),
                })
            })
            .collect();
        let trains = |row: &RowUpdates| row.updates.iter().any(LoraUpdate::trains);
        if updates.is_empty() {
            linear.infer(x, updates, activation)
        } else if x.track_op() || updates.iter().any(trains) {
            let [only] = updates.as_slice() else {
                return Err(EncoderError::Segments);
            };
            let dropout = self.dropout.map(|dropout| dropout.at_site(site.number()));
            trained_linear(x, linear.plain()?, &only.updates, dropout, activation)
        } else {
            linear.infer(x, updates, activation)
        }
    }
}

/// The tracked form: every step is an op with a backward pass.
fn trained_linear(
    x: &Tensor,
    linear: &Linear,
    updates: &Arc<[LoraUpdate]>,
    dropout: Option<Dropout>,
    activation: Activation,
) -> Result<Tensor, EncoderError> {
    let y = ops::linear(x, linear, Activation::None)?;
    let y = with_updates(y, x, updates, dropout)?;
    Ok(ops::activation(&y, activation)?)
}

/// `y` with the updates for the input `x`, dropout before them.
pub(super) fn with_updates(
    mut y: Tensor,
    x: &Tensor,
    updates: &[LoraUpdate],
    dropout: Option<Dropout>,
) -> Result<Tensor, EncoderError> {
    if updates.is_empty() {
        return Ok(y);
    }
    let tracked = y.track_op() || x.track_op() || updates.iter().any(LoraUpdate::trains);
    if !tracked && dropout.is_none() {
        return Ok(ops::add_updates(&y, x, updates)?);
    }
    let input = match dropout {
        Some(dropout) => ops::dropout(x, dropout)?,
        None => x.clone(),
    };
    for update in updates.iter() {
        let shrink = Linear {
            weight: update.a.clone(),
            bias: None,
        };
        let h = ops::linear(&input, &shrink, Activation::None)?;
        if let Some(map) = &update.map {
            y = ops::map_columns(&y, map, update.column)?;
        }
        y = ops::lora_add(&y, &h, &update.b, update.scale, update.column)?;
    }
    Ok(y)
}

/// Sets the masks of positions apart from those of tokens.
const POSITIONS: u64 = 1 << 32;

impl Site {
    /// A number of its own for each place, for dropout masks.
    fn number(self) -> u64 {
        match self {
            Self::Layer(index, slot) => 16 + 8 * index as u64 + slot as u64,
            Self::HeadDense => 0,
            Self::Embeddings => 1,
        }
    }
}
