//! One step of AdamW (Loshchilov & Hutter, arXiv 1711.05101), and the sum of squares that clipping
//! goes by. In place, where the variables are.

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, InplaceOp2, InplaceOp3, Layout, Result, Tensor};

use super::device::Download;
use super::simd::vectorize;
use super::{contiguous, with_values};

/// What a step of AdamW goes by.
#[derive(Clone, Copy, Debug)]
pub struct AdamWStep {
    /// Factor of the gradient (its mean over a batch, and clipping).
    pub scale: f64,
    pub learning_rate: f64,
    /// Factor of the value: 1 − learning rate · weight decay, or 1 for a vector.
    pub decay: f64,
    pub beta_1: f64,
    pub beta_2: f64,
    pub epsilon: f64,
    /// 1 − β₁ᵗ and 1 − β₂ᵗ at step t.
    pub bias_1: f64,
    pub bias_2: f64,
}

/// Moves `value` against its `gradient`, and both moments, all of one shape in f32.
pub fn adamw(
    value: &Tensor,
    gradient: &Tensor,
    first: &Tensor,
    second: &Tensor,
    step: AdamWStep,
) -> Result<()> {
    let gradient = gradient.contiguous()?;
    if value.device().is_cpu() {
        first.inplace_op2(&gradient, &Moment::First(step))?;
        second.inplace_op2(&gradient, &Moment::Second(step))?;
    }
    value.inplace_op3(first, second, &Move { gradient, step })
}

enum Moment {
    First(AdamWStep),
    Second(AdamWStep),
}

impl InplaceOp2 for Moment {
    fn name(&self) -> &'static str {
        "adamw-moment"
    }

    fn cpu_fwd(
        &self,
        moment: &mut CpuStorage,
        layout: &Layout,
        gradient: &CpuStorage,
        gradient_layout: &Layout,
    ) -> Result<()> {
        let gradient = contiguous(gradient, gradient_layout)?;
        let moment = contiguous_mut(moment, layout)?;
        let (beta, scale) = match self {
            Self::First(step) => (step.beta_1, step.scale as f32),
            Self::Second(step) => (step.beta_2, step.scale as f32),
        };
        let (old, new) = (beta as f32, (1.0 - beta) as f32);
        let squared = matches!(self, Self::Second(_));
        vectorize(
            #[inline(always)]
            || {
                for (moment, gradient) in moment.iter_mut().zip(gradient) {
                    let g = gradient * scale;
                    let g = if squared { new * g * g } else { new * g };
                    *moment = old * *moment + g;
                }
            },
        );
        Ok(())
    }
}

/// The value by moments that have moved already; on a GPU these too.
struct Move {
    #[cfg_attr(not(feature = "cuda"), expect(dead_code))]
    gradient: Tensor,
    step: AdamWStep,
}

impl InplaceOp3 for Move {
    fn name(&self) -> &'static str {
        "adamw"
    }

    fn cpu_fwd(
        &self,
        value: &mut CpuStorage,
        layout: &Layout,
        first: &CpuStorage,
        first_layout: &Layout,
        second: &CpuStorage,
        second_layout: &Layout,
    ) -> Result<()> {
        let step = self.step;
        let value = contiguous_mut(value, layout)?;
        let first = contiguous(first, first_layout)?;
        let second = contiguous(second, second_layout)?;
        let rate = (step.learning_rate / step.bias_1) as f32;
        let root = (1.0 / step.bias_2) as f32;
        let (decay, epsilon) = (step.decay as f32, step.epsilon as f32);
        vectorize(
            #[inline(always)]
            || {
                for ((value, first), second) in value.iter_mut().zip(first).zip(second) {
                    let step = rate * first / ((second * root).sqrt() + epsilon);
                    *value = *value * decay - step;
                }
            },
        );
        Ok(())
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        value: &mut CudaStorage,
        layout: &Layout,
        first: &CudaStorage,
        first_layout: &Layout,
        second: &CudaStorage,
        second_layout: &Layout,
    ) -> Result<()> {
        let (first, second) = ((first, first_layout), (second, second_layout));
        super::cuda::adamw((value, layout), &self.gradient, first, second, self.step)
    }
}

/// The f32 values of a contiguous tensor's storage.
fn contiguous_mut<'a>(storage: &'a mut CpuStorage, layout: &Layout) -> Result<&'a mut [f32]> {
    match (storage, layout.contiguous_offsets()) {
        (CpuStorage::F32(values), Some((start, end))) => Ok(&mut values[start..end]),
        _ => candle_core::bail!("expected a contiguous tensor in f32"),
    }
}

/// Σ x² over all values of some tensors in f32, which are on one device.
pub fn sum_squares<'a>(tensors: impl IntoIterator<Item = &'a Tensor>) -> Result<f64> {
    let mut sum = 0.0;
    let mut partials = Vec::new();
    for tensor in tensors {
        if tensor.device().is_cpu() {
            let tensor = tensor.contiguous()?;
            sum += with_values(&tensor, |values| {
                Ok(values.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>())
            })?;
        } else {
            partials.push(on_device(tensor)?);
        }
    }
    if !partials.is_empty() {
        let partials = Download::begin(&Tensor::cat(&partials, 0)?)?.wait()?;
        sum += partials.iter().map(|x| f64::from(*x)).sum::<f64>();
    }
    Ok(sum)
}

/// A few numbers whose sum is that of the squares.
#[cfg(feature = "cuda")]
fn on_device(tensor: &Tensor) -> Result<Tensor> {
    tensor
        .contiguous()?
        .apply_op1_no_bwd(&super::cuda::SumSquares)
}

#[cfg(not(feature = "cuda"))]
fn on_device(tensor: &Tensor) -> Result<Tensor> {
    tensor.sqr()?.sum_all()?.reshape(1)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn squares_of_several_tensors_add_up() {
        let tensor = |values: &[f32]| Tensor::new(values, &Device::Cpu).unwrap();
        let tensors = [tensor(&[3.0]), tensor(&[0.0, 4.0])];
        assert_eq!(sum_squares(&tensors).unwrap(), 25.0);
    }

    #[test]
    fn moments_of_another_type_are_an_error() {
        let x = Tensor::new(&[1f32], &Device::Cpu).unwrap();
        let other = Tensor::new(&[1f64], &Device::Cpu).unwrap();
        let step = AdamWStep {
            scale: 1.0,
            learning_rate: 0.1,
            decay: 1.0,
            beta_1: 0.9,
            beta_2: 0.999,
            epsilon: 1e-8,
            bias_1: 0.1,
            bias_2: 0.001,
        };
        assert!(adamw(&x, &x.copy().unwrap(), &other, &x.copy().unwrap(), step).is_err());
    }
}
