//! A whole transformer layer that trains by LoRA alone, as one op.
//!
//! It does what the single ops do one after the other, and needs less time and memory for it: it
//! keeps only what its own backward pass reads, gradients are added up where they are, and where
//! the graph would make zeros for each gradient, add to them, and copy columns out, nothing is.

mod adapted;
#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex};

use candle_core::{CpuStorage, CustomOp2, DType, Layout, Result, Shape, Tensor};

use super::activation::Activation;
use super::attention::Attention;
use super::matrix::Into;
use super::{
    AttentionShape, Dropout, FrozenBf16, Linear, LoraUpdate, Norm, PositionTable, contiguous,
    if_tracked, output, with_values,
};
use adapted::{AdaptedLinear, Columns, Given};

/// One of a layer's linears, with what trains on it.
#[derive(Clone, Copy)]
pub struct LayerLinear<'a> {
    pub linear: &'a Linear,
    /// The same in bf16, in which it multiplies then.
    pub bf16: Option<&'a Arc<FrozenBf16>>,
    pub updates: &'a [LoraUpdate],
    /// Of what the updates read.
    pub dropout: Option<Dropout>,
}

/// The parts of a layer.
pub struct LayerParts<'a> {
    /// Q, K and V side by side, `[3 · hidden, hidden]`.
    pub qkv: LayerLinear<'a>,
    pub attention_output: LayerLinear<'a>,
    pub attention_norm: &'a Norm,
    pub up: LayerLinear<'a>,
    pub activation: Activation,
    pub down: LayerLinear<'a>,
    pub output_norm: &'a Norm,
    pub attention: AttentionShape,
    pub tables: Vec<PositionTable>,
}

impl LayerParts<'_> {
    fn linears(&self) -> [&LayerLinear<'_>; 4] {
        [&self.qkv, &self.attention_output, &self.up, &self.down]
    }

    /// Whether [`trained_layer`] can do it: in host memory, nothing trains but LoRA whose updates
    /// of a linear have one rank and no map of columns.
    pub fn suit_one_op(&self) -> bool {
        let linear = |part: &LayerLinear<'_>| {
            let rank = |update: &LoraUpdate| update.a.dims()[0];
            let alike = |update: &LoraUpdate| {
                update.map.is_none()
                    && rank(update) == rank(&part.updates[0])
                    && update.a.track_op() == part.updates[0].a.track_op()
            };
            !part.linear.trains() && part.updates.iter().all(alike)
        };
        let norms = [self.attention_norm, self.output_norm];
        self.qkv.linear.weight.device().is_cpu()
            && self.linears().into_iter().all(linear)
            && norms.iter().all(|norm| !norm.gamma_beta.track_op())
            && self.tables.iter().all(|table| !table.values.track_op())
    }
}

/// The output of a layer for `x`, `[tokens, hidden]`: `[tokens, hidden]`, or the rows `firsts` of
/// it, beyond whose attention no other row is computed.
///
/// The parts must [suit](LayerParts::suit_one_op). The backward pass runs once.
pub fn trained_layer(
    x: &Tensor,
    parts: LayerParts<'_>,
    firsts: Option<Arc<[u32]>>,
) -> Result<Tensor> {
    let mut parameters = Vec::new();
    let mut count = 0;
    let mut adapted = |part: LayerLinear<'_>| -> Result<AdaptedLinear> {
        for update in part.updates {
            parameters.push(update.a.flatten_all()?);
        }
        for update in part.updates {
            parameters.push(update.b.flatten_all()?);
        }
        let columns = |update: &LoraUpdate| Columns {
            first: update.column,
            width: update.b.dims()[0],
            scale: update.scale as f32,
        };
        let linear = AdaptedLinear {
            linear: part.linear.clone(),
            bf16: part.bf16.cloned(),
            dropout: part.dropout.filter(|dropout| dropout.rate > 0.0),
            rank: part.updates.first().map_or(0, |update| update.a.dims()[0]),
            first: count,
            updates: part.updates.iter().map(columns).collect(),
            trains_a: part.updates.iter().any(|update| update.a.track_op()),
        };
        count += linear.parameters();
        Ok(linear)
    };
    let op = Layer {
        qkv: adapted(parts.qkv)?,
        attention_output: adapted(parts.attention_output)?,
        up: adapted(parts.up)?,
        down: adapted(parts.down)?,
        attention_norm: parts.attention_norm.clone(),
        activation: parts.activation,
        output_norm: parts.output_norm.clone(),
        attention: Attention {
            shape: parts.attention,
            bias: None,
            tables: parts.tables,
        },
        firsts,
        kept: Mutex::default(),
    };
    let parameters = match parameters.is_empty() {
        true => Tensor::zeros(0, DType::F32, x.device())?,
        false => Tensor::cat(&parameters, 0)?,
    };
    x.apply_op2(&parameters, op)
}

struct Layer {
    qkv: AdaptedLinear,
    attention_output: AdaptedLinear,
    attention_norm: Norm,
    up: AdaptedLinear,
    activation: Activation,
    down: AdaptedLinear,
    output_norm: Norm,
    attention: Attention,
    /// The rows that the layer goes on with behind its attention, if not with all.
    firsts: Option<Arc<[u32]>>,
    kept: Mutex<Option<Kept>>,
}

/// What the backward pass reads of the forward pass, all `[rows, …]`. What only a linear's LoRA
/// needs is empty where it has none.
struct Kept {
    qkv: Vec<f32>,
    qkv_h: Vec<f32>,
    context: Vec<f32>,
    attention_output_h: Vec<f32>,
    /// In front of the first norm, and behind it.
    sum: Vec<f32>,
    x: Vec<f32>,
    up_h: Vec<f32>,
    /// In front of the activation, and behind it.
    wide: Vec<f32>,
    activated: Vec<f32>,
    down_h: Vec<f32>,
    /// In front of the second norm.
    output: Vec<f32>,
}

impl Layer {
    fn hidden(&self) -> usize {
        self.down.linear.out_features()
    }

    /// The rows that the layer goes on with.
    fn select<'a>(&self, x: &'a [f32]) -> std::borrow::Cow<'a, [f32]> {
        let Some(firsts) = &self.firsts else {
            return x.into();
        };
        let hidden = self.hidden();
        let row = |i: &u32| &x[*i as usize * hidden..][..hidden];
        firsts.iter().flat_map(row).copied().collect()
    }

    /// The other way: rows where they were, zeros in place of the others.
    fn spread(&self, rows: Vec<f32>, len: usize) -> Vec<f32> {
        let Some(firsts) = &self.firsts else {
            return rows;
        };
        let hidden = self.hidden();
        let mut spread = vec![0f32; len];
        for (i, row) in firsts.iter().zip(rows.chunks_exact(hidden)) {
            spread[*i as usize * hidden..][..hidden].copy_from_slice(row);
        }
        spread
    }

    fn forward(&self, x: &[f32], parameters: &[f32]) -> Result<(Vec<f32>, Kept)> {
        let (qkv, qkv_h) = self.qkv.forward(x, parameters)?;
        let context = self.attention.attend(&qkv, self.hidden())?;
        let context = self.select(&context).into_owned();
        let (mut sum, attention_output_h) = self.attention_output.forward(&context, parameters)?;
        add(&mut sum, &self.select(x));
        let mut x = sum.clone();
        self.attention_norm.normalise_rows(&mut x)?;
        let (wide, up_h) = self.up.forward(&x, parameters)?;
        let mut activated = wide.clone();
        self.activation.apply(&mut activated);
        let (mut output, down_h) = self.down.forward(&activated, parameters)?;
        add(&mut output, &x);
        let mut y = output.clone();
        self.output_norm.normalise_rows(&mut y)?;
        let if_adapted = |linear: &AdaptedLinear, input| match linear.is_adapted() {
            true => input,
            false => Vec::new(),
        };
        let kept = Kept {
            qkv,
            qkv_h,
            context: if_adapted(&self.attention_output, context),
            attention_output_h,
            sum,
            x: if_adapted(&self.up, x),
            up_h,
            wide,
            activated: if_adapted(&self.down, activated),
            down_h,
            output,
        };
        Ok((y, kept))
    }

    /// The gradients of `x`, if it is wanted, and of the parameters.
    fn backward(
        &self,
        x: &[f32],
        parameters: &[f32],
        dy: &[f32],
        wants_dx: bool,
        kept: Kept,
    ) -> Result<(Option<Vec<f32>>, Vec<f32>)> {
        let mut dparameters = vec![0f32; parameters.len()];
        let (onto, into) = (Into::Accumulate, Into::Overwrite);
        let mut d = dy.to_vec();
        self.output_norm.input_gradient(&kept.output, &mut d)?;
        drop(kept.output);

        let mut wide = vec![0f32; kept.wide.len()];
        let down = Given::new(&kept.activated, &kept.down_h, parameters);
        self.down
            .backward(&d, &down, &mut dparameters, Some((&mut wide, into)))?;
        drop(kept.activated);
        self.activation.backward(&kept.wide, &mut wide);
        drop(kept.wide);
        let up = Given::new(&kept.x, &kept.up_h, parameters);
        self.up
            .backward(&wide, &up, &mut dparameters, Some((&mut d, onto)))?;
        drop((kept.x, wide));

        self.attention_norm.input_gradient(&kept.sum, &mut d)?;
        drop(kept.sum);
        let mut context = vec![0f32; d.len()];
        let attended = Given::new(&kept.context, &kept.attention_output_h, parameters);
        let target = Some((context.as_mut_slice(), into));
        self.attention_output
            .backward(&d, &attended, &mut dparameters, target)?;
        drop(kept.context);
        if !wants_dx && !self.qkv.is_adapted() {
            return Ok((None, dparameters));
        }

        let context = self.spread(context, x.len());
        let dqkv = self
            .attention
            .gradient(&kept.qkv, &context, self.hidden())?;
        drop((kept.qkv, context));
        let mut dx = wants_dx.then(|| self.spread(d, x.len()));
        let target = dx.as_mut().map(|dx| (dx.as_mut_slice(), onto));
        let qkv = Given::new(x, &kept.qkv_h, parameters);
        self.qkv.backward(&dqkv, &qkv, &mut dparameters, target)?;
        Ok((dx, dparameters))
    }
}

fn add(sum: &mut [f32], other: &[f32]) {
    for (sum, other) in sum.iter_mut().zip(other) {
        *sum += other;
    }
}

impl CustomOp2 for Layer {
    fn name(&self) -> &'static str {
        "trained-layer"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        layout: &Layout,
        parameters: &CpuStorage,
        parameters_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let hidden = self.hidden();
        let (_, columns) = layout.shape().dims2()?;
        if columns != hidden {
            candle_core::bail!("a layer of {hidden} columns got {columns}");
        }
        let x = contiguous(x, layout)?;
        let parameters = contiguous(parameters, parameters_layout)?;
        let (y, kept) = self.forward(x, parameters)?;
        *self
            .kept
            .lock()
            .unwrap_or_else(|poison| poison.into_inner()) = Some(kept);
        let rows = y.len() / hidden;
        output(y, (rows, hidden))
    }

    fn bwd(
        &self,
        x: &Tensor,
        parameters: &Tensor,
        _y: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let kept = self
            .kept
            .lock()
            .unwrap_or_else(|poison| poison.into_inner())
            .take();
        let Some(kept) = kept else {
            candle_core::bail!("the backward pass of a layer runs once");
        };
        let gradient = gradient.contiguous()?;
        let (dx, dparameters) = with_values(x, |x_values| {
            with_values(parameters, |parameters| {
                with_values(&gradient, |gradient| {
                    self.backward(x_values, parameters, gradient, x.track_op(), kept)
                })
            })
        })?;
        let dx = dx.map(|dx| Tensor::from_vec(dx, x.shape(), x.device()));
        let dparameters = if_tracked(parameters, || {
            Tensor::from_vec(dparameters, parameters.shape(), parameters.device())
        })?;
        Ok((dx.transpose()?, dparameters))
    }
}
