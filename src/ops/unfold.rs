//! The windows of a convolution over tokens.

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};

use super::borders::Borders;
#[cfg(feature = "cuda")]
use super::cuda;
use super::{contiguous, if_tracked, output};

/// Of each token the `kernel` rows around it, side by side: `[tokens, hidden]` to
/// `[tokens, kernel · hidden]`. Rows outside the token's sequence are zeros. Times a weight this is
/// a convolution that never crosses from a sequence into its neighbour.
///
/// `kernel` is odd.
pub fn unfold(x: &Tensor, borders: &Borders, kernel: usize) -> Result<Tensor> {
    let op = Unfold {
        borders: borders.clone(),
        kernel,
    };
    if x.track_op() {
        x.apply_op1(op)
    } else {
        x.apply_op1_no_bwd(&op)
    }
}

#[derive(Clone)]
struct Unfold {
    borders: Borders,
    kernel: usize,
}

impl Unfold {
    /// Calls `f` with token, place in its window and the token that stands there.
    fn for_each_place(&self, mut f: impl FnMut(usize, usize, usize)) {
        let before = self.kernel / 2;
        for window in self.borders.windows(2) {
            for token in window[0]..window[1] {
                for place in 0..self.kernel {
                    let from = token + place;
                    if from >= window[0] + before && from < window[1] + before {
                        f(token, place, from - before);
                    }
                }
            }
        }
    }

    fn check(&self, tokens: usize) -> Result<()> {
        if self.borders.last() != Some(&tokens) || self.kernel.is_multiple_of(2) {
            candle_core::bail!(
                "windows of {} over {tokens} tokens, sequences end at {:?}",
                self.kernel,
                self.borders.last()
            );
        }
        Ok(())
    }
}

impl CustomOp1 for Unfold {
    fn name(&self) -> &'static str {
        "unfold"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (tokens, hidden) = layout.shape().dims2()?;
        self.check(tokens)?;
        let x = contiguous(x, layout)?;
        let width = self.kernel * hidden;
        let mut windows = vec![0f32; tokens * width];
        self.for_each_place(|token, place, from| {
            windows[token * width + place * hidden..][..hidden]
                .copy_from_slice(&x[from * hidden..][..hidden]);
        });
        output(windows, (tokens, width))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, x: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        let (tokens, _) = layout.shape().dims2()?;
        self.check(tokens)?;
        cuda::unfold((x, layout), self.borders.on_device()?, self.kernel)
    }

    fn bwd(&self, x: &Tensor, _windows: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        if_tracked(x, || {
            let fold = Fold(self.clone());
            gradient.contiguous()?.apply_op1_no_bwd(&fold)
        })
    }
}

/// Sums what the windows say of each token.
struct Fold(Unfold);

impl CustomOp1 for Fold {
    fn name(&self) -> &'static str {
        "fold"
    }

    fn cpu_fwd(&self, windows: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (tokens, width) = layout.shape().dims2()?;
        self.0.check(tokens)?;
        let windows = contiguous(windows, layout)?;
        let hidden = width / self.0.kernel;
        let mut sums = vec![0f32; tokens * hidden];
        self.0.for_each_place(|token, place, from| {
            let row = &windows[token * width + place * hidden..][..hidden];
            for (sum, x) in sums[from * hidden..][..hidden].iter_mut().zip(row) {
                *sum += x;
            }
        });
        output(sums, (tokens, hidden))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, windows: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        let (tokens, _) = layout.shape().dims2()?;
        self.0.check(tokens)?;
        let unfold = &self.0;
        cuda::fold(
            (windows, layout),
            unfold.borders.on_device()?,
            unfold.kernel,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::gradient_check::{assert_gradient, random};

    #[test]
    fn windows_end_at_the_borders_of_their_sequence() {
        let x = Tensor::new(&[[1f32], [2.], [3.], [4.]], &candle_core::Device::Cpu).unwrap();
        let windows = unfold(&x, &[0, 1, 4].into(), 3).unwrap();
        assert_eq!(
            windows.to_vec2::<f32>().unwrap(),
            [[0., 1., 0.], [0., 2., 3.], [2., 3., 4.], [3., 4., 0.]]
        );
    }

    #[test]
    fn backward_agrees_with_finite_differences() {
        for kernel in [1, 3, 5] {
            assert_gradient(&[random(1, (6, 2))], |t| {
                unfold(&t[0], &[0, 2, 3, 6].into(), kernel)
            });
        }
    }

    #[test]
    fn an_even_kernel_and_a_wrong_length_are_errors() {
        let x = random(1, (6, 2));
        assert!(unfold(&x, &[0, 6].into(), 2).is_err());
        assert!(unfold(&x, &[0, 5].into(), 3).is_err());
    }
}
