//! y = act(x Wᵀ + b).

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp1, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor};

use super::activation::{Activation, activation};
#[cfg(feature = "cuda")]
use super::cuda;
use super::matrix::{Into, Matrix, MatrixMut, multiply, product};
use super::simd::vectorize;
use super::{contiguous, if_tracked, output, with_values};

/// A weight `[out, in]` and its bias `[out]`.
#[derive(Clone, Debug)]
pub struct Linear {
    pub weight: Tensor,
    pub bias: Option<Tensor>,
}

impl Linear {
    pub fn out_features(&self) -> usize {
        self.weight.dims()[0]
    }

    pub fn in_features(&self) -> usize {
        self.weight.dims()[1]
    }

    /// x Wᵀ + b, `[rows, out]`, of a contiguous `x` in host memory, `[rows, in]`.
    pub(super) fn forward(&self, x: &CpuStorage, layout: &Layout) -> Result<Vec<f32>> {
        check_columns(layout, self.in_features())?;
        self.forward_rows(contiguous(x, layout)?)
    }

    /// The same for values that are known to be rows of `in`.
    pub(super) fn forward_rows(&self, x: &[f32]) -> Result<Vec<f32>> {
        let dims = self.weight.dims2()?;
        with_values(&self.weight, |weight| match &self.bias {
            Some(bias) => with_values(bias, |bias| Ok(affine(x, weight, dims, Some(bias)))),
            None => Ok(affine(x, weight, dims, None)),
        })
    }

    pub(super) fn trains(&self) -> bool {
        self.weight.track_op() || self.bias.as_ref().is_some_and(Tensor::track_op)
    }
}

fn check_columns(layout: &Layout, input: usize) -> Result<()> {
    let (_, columns) = layout.shape().dims2()?;
    if columns != input {
        candle_core::bail!("a linear of {input} inputs got {columns} columns");
    }
    Ok(())
}

fn affine(
    x: &[f32],
    weight: &[f32],
    (out, input): (usize, usize),
    bias: Option<&[f32]>,
) -> Vec<f32> {
    let rows = x.len() / input;
    let (mut y, into) = match bias {
        Some(bias) => (bias.repeat(rows), Into::Accumulate),
        None => (vec![0f32; rows * out], Into::Overwrite),
    };
    multiply(
        MatrixMut::new(&mut y, rows, out, out),
        into,
        1.0,
        Matrix::new(x, rows, input, input),
        Matrix::new(weight, out, input, input).transposed(),
    );
    y
}

/// `act(x Wᵀ + b)` for `x` of `[rows, in]`: `[rows, out]`.
///
/// The gradient of the weight is computed only if the weight trains, that of `x` only if something
/// below it does.
pub fn linear(x: &Tensor, linear: &Linear, act: Activation) -> Result<Tensor> {
    let fused = |activation| Frozen {
        linear: linear.clone(),
        activation,
    };
    if linear.trains() {
        let y = match &linear.bias {
            Some(bias) => x.apply_op3(&linear.weight, bias, Trained)?,
            None => x.apply_op2(&linear.weight, Trained)?,
        };
        activation(&y, act)
    } else if x.track_op() {
        activation(&x.apply_op1(fused(Activation::None))?, act)
    } else {
        x.apply_op1_no_bwd(&fused(act))
    }
}

struct Frozen {
    linear: Linear,
    activation: Activation,
}

impl CustomOp1 for Frozen {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let mut y = self.linear.forward(x, layout)?;
        self.activation.apply(&mut y);
        output(y, (layout.dims()[0], self.linear.out_features()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, x: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        cuda::linear_rows((x, layout), &self.linear, &[], self.activation)
    }

    /// Without activation only: a tracked input decomposes into linear and activation.
    fn bwd(&self, x: &Tensor, _y: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        if_tracked(x, || {
            product(gradient, false, &self.linear.weight, false, 1.0)
        })
    }
}

/// The same with a weight that trains.
struct Trained;

impl CustomOp2 for Trained {
    fn name(&self) -> &'static str {
        "trained-linear"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let dims = weight_layout.shape().dims2()?;
        check_columns(x_layout, dims.1)?;
        let weight = contiguous(weight, weight_layout)?;
        let y = affine(contiguous(x, x_layout)?, weight, dims, None);
        output(y, (x_layout.dims()[0], dims.0))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        x_layout: &Layout,
        weight: &CudaStorage,
        weight_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        cuda::trained_linear((x, x_layout), (weight, weight_layout), None)
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _y: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        Ok((
            if_tracked(x, || product(gradient, false, weight, false, 1.0))?,
            if_tracked(weight, || product(gradient, true, x, false, 1.0))?,
        ))
    }
}

impl CustomOp3 for Trained {
    fn name(&self) -> &'static str {
        "trained-linear"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
        bias: &CpuStorage,
        bias_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let dims = weight_layout.shape().dims2()?;
        check_columns(x_layout, dims.1)?;
        let weight = contiguous(weight, weight_layout)?;
        let bias = contiguous(bias, bias_layout)?;
        let y = affine(contiguous(x, x_layout)?, weight, dims, Some(bias));
        output(y, (x_layout.dims()[0], dims.0))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        x_layout: &Layout,
        weight: &CudaStorage,
        weight_layout: &Layout,
        bias: &CudaStorage,
        bias_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let bias = Some((bias, bias_layout));
        cuda::trained_linear((x, x_layout), (weight, weight_layout), bias)
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        y: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (dx, dw) = CustomOp2::bwd(self, x, weight, y, gradient)?;
        let db = if_tracked(bias, || {
            gradient.contiguous()?.apply_op1_no_bwd(&ColumnSums)
        })?;
        Ok((dx, dw, db))
    }
}

/// Sums of the columns: `[rows, n]` to `[n]`.
pub(super) struct ColumnSums;

impl CustomOp1 for ColumnSums {
    fn name(&self) -> &'static str {
        "column-sums"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (_, columns) = layout.shape().dims2()?;
        let x = contiguous(x, layout)?;
        let mut sums = vec![0f32; columns];
        vectorize(
            #[inline(always)]
            || {
                for row in x.chunks_exact(columns) {
                    sums.iter_mut().zip(row).for_each(|(sum, x)| *sum += x);
                }
            },
        );
        output(sums, columns)
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, x: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        cuda::column_sums((x, layout))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::gradient_check::{assert_gradient, random};

    #[test]
    fn backward_agrees_with_finite_differences() {
        let inputs = [random(1, (4, 6)), random(2, (5, 6)), random(3, 5)];
        for act in [Activation::None, Activation::Gelu, Activation::Tanh] {
            assert_gradient(&inputs, |t| {
                let layer = Linear {
                    weight: t[1].clone(),
                    bias: Some(t[2].clone()),
                };
                linear(&t[0], &layer, act)
            });
        }
        assert_gradient(&inputs[..2], |t| {
            let layer = Linear {
                weight: t[1].clone(),
                bias: None,
            };
            linear(&t[0], &layer, Activation::None)
        });
    }

    #[test]
    fn a_frozen_weight_passes_the_gradient_on() {
        let layer = Linear {
            weight: random(2, (5, 6)),
            bias: Some(random(3, 5)),
        };
        assert_gradient(&[random(1, (4, 6))], |t| {
            linear(&t[0], &layer, Activation::Gelu)
        });
    }

    #[test]
    fn frozen_and_trained_forward_give_the_same() {
        let layer = Linear {
            weight: random(2, (5, 6)),
            bias: Some(random(3, 5)),
        };
        let x = random(1, (4, 6));
        let frozen = linear(&x, &layer, Activation::Gelu).unwrap();
        let tracked = candle_core::Var::from_tensor(&x).unwrap();
        let trained = linear(tracked.as_tensor(), &layer, Activation::Gelu).unwrap();
        assert_eq!(
            frozen.to_vec2::<f32>().unwrap(),
            trained.to_vec2::<f32>().unwrap()
        );
    }

    #[test]
    fn a_wrong_width_is_an_error() {
        let layer = Linear {
            weight: random(2, (5, 6)),
            bias: None,
        };
        assert!(linear(&random(1, (4, 7)), &layer, Activation::None).is_err());
    }
}
