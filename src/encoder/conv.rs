//! The convolution beside the first layer of DeBERTa v2's larger models.

use candle_core::Tensor;

use super::{EncoderConfig, EncoderError, Weights};
use crate::ops::{self, Activation, Borders, Linear, Norm};

/// `conv_kernel_size`, `conv_groups` and `conv_act` of `config.json`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConvConfig {
    /// Tokens in a window, odd.
    pub kernel_size: usize,
    pub groups: usize,
    pub activation: Activation,
}

/// LayerNorm(output of the first layer + act(convolution of the embeddings)).
#[derive(Clone)]
pub(super) struct Conv {
    config: ConvConfig,
    /// Of a window: `[hidden, kernel · hidden]`.
    linear: Linear,
    norm: Norm,
}

impl Conv {
    pub(super) fn new(
        config: &EncoderConfig,
        weights: &Weights,
    ) -> Result<Option<Self>, EncoderError> {
        let Some(conv) = config.conv else {
            return Ok(None);
        };
        let hidden = config.hidden_size;
        let ConvConfig {
            kernel_size,
            groups,
            ..
        } = conv;
        let shape = [hidden, hidden / groups, kernel_size];
        let weight = weights.get("encoder.conv.conv.weight", &shape)?;
        Ok(Some(Self {
            config: conv,
            linear: Linear {
                weight: over_windows(&weight, groups)?,
                bias: Some(weights.get("encoder.conv.conv.bias", &[hidden])?),
            },
            norm: weights.norm("encoder.conv.LayerNorm", hidden, config.layer_norm_eps)?,
        }))
    }

    /// `embedded` is `[tokens, hidden]`; `output` are the first layer's rows of all tokens, or of
    /// those that `rows` names: `[rows, hidden]`.
    pub(super) fn forward(
        &self,
        embedded: &Tensor,
        borders: &Borders,
        output: &Tensor,
        rows: Option<&Tensor>,
    ) -> Result<Tensor, EncoderError> {
        let mut windows = ops::unfold(embedded, borders, self.config.kernel_size)?;
        if let Some(rows) = rows {
            windows = windows.index_select(rows, 0)?;
        }
        let convolved = ops::linear(&windows, &self.linear, self.config.activation)?;
        Ok(ops::add_norm(&convolved, None, output, &self.norm)?)
    }
}

/// A weight of `[out, in / groups, kernel]` as one of `[out, kernel · in]`, zeros between groups.
fn over_windows(weight: &Tensor, groups: usize) -> Result<Tensor, EncoderError> {
    let (out, part, kernel) = weight.dims3()?;
    let hidden = part * groups;
    let weight = weight.permute((0, 2, 1))?.contiguous()?;
    let mut rows = Vec::with_capacity(groups);
    for group in 0..groups {
        let of_group = weight.narrow(0, group * out / groups, out / groups)?;
        rows.push(of_group.pad_with_zeros(2, group * part, hidden - (group + 1) * part)?);
    }
    let dense = Tensor::cat(&rows, 0)?;
    Ok(dense.reshape((out, kernel * hidden))?)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn groups_see_their_own_part_of_the_input() {
        let weight = Tensor::arange(1f32, 9., &Device::Cpu).unwrap();
        let weight = weight.reshape((4, 1, 2)).unwrap();
        let dense = over_windows(&weight, 4).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(dense[0], [1., 0., 0., 0., 2., 0., 0., 0.]);
        assert_eq!(dense[3], [0., 0., 0., 7., 0., 0., 0., 8.]);
    }
}
