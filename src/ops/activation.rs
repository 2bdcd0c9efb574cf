//! Element-wise activations.

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Tensor};

#[cfg(feature = "cuda")]
use super::cuda;
use super::simd::{erf, exp, tanh, vectorize};
use super::tile::{COLUMNS, TileKernel};
use super::{contiguous, if_tracked, output};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    None,
    /// x · Φ(x) with the exact normal distribution, Hugging Face's `gelu`.
    Gelu,
    Tanh,
    Relu,
}

impl Activation {
    pub(super) fn apply(self, values: &mut [f32]) {
        match self {
            Self::None => {}
            Self::Gelu => gelu_all(values),
            Self::Tanh => map(values, tanh),
            Self::Relu => map(values, |x| x.max(0.0)),
        }
    }

    /// The same for code that is compiled for an instruction set already.
    #[inline(always)]
    pub(super) fn apply_inline(self, values: &mut [f32]) {
        match self {
            Self::None => {}
            Self::Gelu => values.iter_mut().for_each(
                #[inline(always)]
                |x| *x = gelu(*x),
            ),
            Self::Tanh => values.iter_mut().for_each(
                #[inline(always)]
                |x| *x = tanh(*x),
            ),
            Self::Relu => values.iter_mut().for_each(
                #[inline(always)]
                |x| *x = x.max(0.0),
            ),
        }
    }

    /// Multiplies `gradient` by the derivative at the pre-activations `x`.
    pub(super) fn backward(self, x: &[f32], gradient: &mut [f32]) {
        match self {
            Self::None => {}
            Self::Gelu => multiply_by(gradient, x, gelu_derivative),
            Self::Tanh => multiply_by(gradient, x, |x| 1.0 - tanh(x) * tanh(x)),
            Self::Relu => multiply_by(gradient, x, |x| if x > 0.0 { 1.0 } else { 0.0 }),
        }
    }
}

// Plain loops: iterator adapters would be compiled apart, for the baseline instruction set.

fn map(values: &mut [f32], f: impl Fn(f32) -> f32) {
    vectorize(
        #[inline(always)]
        || {
            for x in values {
                *x = f(*x);
            }
        },
    );
}

fn multiply_by(gradient: &mut [f32], x: &[f32], derivative: impl Fn(f32) -> f32) {
    vectorize(
        #[inline(always)]
        || {
            for (g, x) in gradient.iter_mut().zip(x) {
                *g *= derivative(*x);
            }
        },
    );
}

fn gelu_all(values: &mut [f32]) {
    let Some(kernel) = TileKernel::best() else {
        return map(values, gelu);
    };
    let (whole, rest) = values.as_chunks_mut();
    for values in whole {
        kernel.gelu(values);
    }
    let mut last = [0f32; COLUMNS];
    last[..rest.len()].copy_from_slice(rest);
    kernel.gelu(&mut last);
    rest.copy_from_slice(&last[..rest.len()]);
}

#[inline(always)]
fn normal_cdf(x: f32) -> f32 {
    0.5 * (1.0 + erf(x * std::f32::consts::FRAC_1_SQRT_2))
}

#[inline(always)]
fn gelu(x: f32) -> f32 {
    x * normal_cdf(x)
}

#[inline(always)]
fn gelu_derivative(x: f32) -> f32 {
    const ONE_OVER_SQRT_TAU: f32 = 0.398_942_3;
    normal_cdf(x) + x * ONE_OVER_SQRT_TAU * exp(-0.5 * x * x)
}

/// The activation of every element.
pub fn activation(x: &Tensor, activation: Activation) -> Result<Tensor> {
    if activation == Activation::None {
        return Ok(x.clone());
    }
    x.apply_op1(Elementwise(activation))
}

struct Elementwise(Activation);

impl CustomOp1 for Elementwise {
    fn name(&self) -> &'static str {
        "activation"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let mut y = contiguous(x, layout)?.to_vec();
        self.0.apply(&mut y);
        output(y, layout.shape())
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, x: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        cuda::activation((x, layout), self.0)
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        if_tracked(x, || {
            gradient
                .contiguous()?
                .apply_op2_no_bwd(x, &ElementwiseBackward(self.0))
        })
    }
}

struct ElementwiseBackward(Activation);

impl CustomOp2 for ElementwiseBackward {
    fn name(&self) -> &'static str {
        "activation-backward"
    }

    fn cpu_fwd(
        &self,
        gradient: &CpuStorage,
        layout: &Layout,
        x: &CpuStorage,
        x_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let mut dx = contiguous(gradient, layout)?.to_vec();
        self.0.backward(contiguous(x, x_layout)?, &mut dx);
        output(dx, layout.shape())
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        gradient: &CudaStorage,
        layout: &Layout,
        x: &CudaStorage,
        x_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        cuda::activation_gradient((gradient, layout), (x, x_layout), self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::gradient_check::{assert_gradient, random};

    #[test]
    fn gelu_has_known_values() {
        // torch.nn.functional.gelu
        let mut x = [-3.0, -1.0, 0.0, 0.5, 2.0];
        Activation::Gelu.apply(&mut x);
        let expected = [-0.004_049_7, -0.158_655_3, 0.0, 0.345_731_2, 1.954_499_7];
        for (x, e) in x.iter().zip(expected) {
            assert!((x - e).abs() < 1e-6, "{x} {e}");
        }
    }

    #[test]
    fn backward_agrees_with_finite_differences() {
        for act in [Activation::Gelu, Activation::Tanh] {
            assert_gradient(&[random(1, (5, 19))], |x| activation(&x[0], act));
        }
    }
}
