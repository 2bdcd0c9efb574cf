//! LayerNorm, alone or of a sum with the residual.

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp2, CustomOp3, Device, Layout, Result, Shape, Tensor};

use super::crew::{in_parts, is_helped};
#[cfg(feature = "cuda")]
use super::cuda;
use super::packed::Place;
use super::simd::{sum, sum_pairs, vectorize};
use super::{contiguous, if_tracked, output, with_values};

/// Parameters of a LayerNorm over the last dimension.
#[derive(Clone, Debug)]
pub struct Norm {
    /// γ and β as the rows of `[2, hidden]`.
    pub gamma_beta: Tensor,
    pub eps: f64,
}

/// `LayerNorm(x)` for `x` of `[rows, hidden]`.
pub fn norm(x: &Tensor, norm: &Norm) -> Result<Tensor> {
    let op = LayerNorm {
        eps: norm.eps as f32,
    };
    if x.track_op() || norm.gamma_beta.track_op() {
        x.apply_op2(&norm.gamma_beta, op)
    } else {
        x.apply_op2_no_bwd(&norm.gamma_beta, &op)
    }
}

/// `LayerNorm(x + bias + residual)`, `x` and the residual `[rows, hidden]`.
///
/// `bias`, `[hidden]`, is what the linear that made `x` has not added yet.
pub fn add_norm(
    x: &Tensor,
    bias: Option<&Tensor>,
    residual: &Tensor,
    parameters: &Norm,
) -> Result<Tensor> {
    match bias {
        Some(bias) if x.device().is_cpu() || x.track_op() => {
            add_norm(&x.broadcast_add(bias)?, None, residual, parameters)
        }
        bias => add_biased_norm(x, bias, residual, parameters),
    }
}

fn add_biased_norm(
    x: &Tensor,
    bias: Option<&Tensor>,
    residual: &Tensor,
    parameters: &Norm,
) -> Result<Tensor> {
    let tracked = [x, residual, &parameters.gamma_beta];
    if tracked.iter().any(|tensor| tensor.track_op()) {
        let sum = match x.device() {
            Device::Cpu => x.apply_op2(residual, Add)?,
            _ => (x + residual)?,
        };
        return norm(&sum, parameters);
    }
    let op = AddNorm {
        bias,
        norm: parameters,
    };
    x.apply_op2_no_bwd(residual, &op)
}

/// Both steps at once, where nothing is kept for a backward pass.
struct AddNorm<'a> {
    /// In a device's memory only.
    #[cfg_attr(not(feature = "cuda"), expect(dead_code))]
    bias: Option<&'a Tensor>,
    norm: &'a Norm,
}

/// Rows of a part that another core may take.
const PART_ROWS: usize = 8;

impl CustomOp2 for AddNorm<'_> {
    fn name(&self) -> &'static str {
        "add-norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        layout: &Layout,
        residual: &CpuStorage,
        residual_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (rows, hidden) = layout.shape().dims2()?;
        if layout.dims() != residual_layout.dims() {
            let other = residual_layout.dims();
            candle_core::bail!("cannot add {:?} and {other:?}", layout.dims());
        }
        let mut y = contiguous(x, layout)?.to_vec();
        let residual = contiguous(residual, residual_layout)?;
        let eps = self.norm.eps as f32;
        with_values(&self.norm.gamma_beta, |gamma_beta| {
            let (gamma, beta) = gamma_beta.split_at(hidden);
            let place = Place(y.as_mut_ptr());
            let per_part = if is_helped() { PART_ROWS } else { rows.max(1) };
            in_parts(rows.div_ceil(per_part), &|part| {
                let rows = part * per_part..((part + 1) * per_part).min(rows);
                let range = rows.start * hidden..rows.end * hidden;
                // SAFETY: each part has rows of its own of the `rows · hidden` values.
                #[allow(unsafe_code)]
                let y = unsafe {
                    std::slice::from_raw_parts_mut(place.get().add(range.start), range.len())
                };
                let residual = &residual[range];
                vectorize(
                    #[inline(always)]
                    || {
                        let residual = residual.chunks_exact(hidden);
                        for (row, residual) in y.chunks_exact_mut(hidden).zip(residual) {
                            for (y, r) in row.iter_mut().zip(residual) {
                                *y += r;
                            }
                            normalise(row, gamma, beta, eps);
                        }
                    },
                );
            });
            Ok(())
        })?;
        output(y, (rows, hidden))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        layout: &Layout,
        residual: &CudaStorage,
        residual_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        cuda::add_norm(
            (x, layout),
            (residual, residual_layout),
            self.bias,
            self.norm,
        )
    }
}

struct Add;

impl CustomOp2 for Add {
    fn name(&self) -> &'static str {
        "add"
    }

    fn cpu_fwd(
        &self,
        a: &CpuStorage,
        a_layout: &Layout,
        b: &CpuStorage,
        b_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        if a_layout.dims() != b_layout.dims() {
            candle_core::bail!("cannot add {:?} and {:?}", a_layout.dims(), b_layout.dims());
        }
        let a = contiguous(a, a_layout)?;
        let b = contiguous(b, b_layout)?;
        output(
            a.iter().zip(b).map(|(a, b)| a + b).collect(),
            a_layout.shape(),
        )
    }

    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        _sum: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        Ok((
            if_tracked(a, || Ok(gradient.clone()))?,
            if_tracked(b, || Ok(gradient.clone()))?,
        ))
    }
}

impl Norm {
    /// Of rows of values in host memory, in place.
    pub(super) fn normalise_rows(&self, rows: &mut [f32]) -> Result<()> {
        with_values(&self.gamma_beta, |gamma_beta| {
            normalise_rows(rows, gamma_beta, self.eps as f32);
            Ok(())
        })
    }

    /// Makes of the gradient of the result, `[rows, hidden]`, that of the input `x`.
    pub(super) fn input_gradient(&self, x: &[f32], gradient: &mut [f32]) -> Result<()> {
        with_values(&self.gamma_beta, |gamma_beta| {
            input_gradient(gradient, x, gamma_beta, self.eps as f32);
            Ok(())
        })
    }
}

fn normalise_rows(rows: &mut [f32], gamma_beta: &[f32], eps: f32) {
    let hidden = gamma_beta.len() / 2;
    let (gamma, beta) = gamma_beta.split_at(hidden);
    vectorize(
        #[inline(always)]
        || {
            for row in rows.chunks_exact_mut(hidden) {
                normalise(row, gamma, beta, eps);
            }
        },
    );
}

/// (d − mean(d) − x̂ · mean(d ∘ x̂)) / σ for d = γ ∘ ∂L/∂y, in the place of ∂L/∂y.
fn input_gradient(gradient: &mut [f32], x: &[f32], gamma_beta: &[f32], eps: f32) {
    let hidden = gamma_beta.len() / 2;
    let gamma = &gamma_beta[..hidden];
    let n = hidden as f32;
    vectorize(
        #[inline(always)]
        || {
            for (d, x) in gradient
                .chunks_exact_mut(hidden)
                .zip(x.chunks_exact(hidden))
            {
                let (mean, scale) = moments(x, eps);
                for (d, gamma) in d.iter_mut().zip(gamma) {
                    *d *= gamma;
                }
                let mean_d = sum(d, |d| d) / n;
                let mean_dx = sum_pairs(d, x, |d, x| d * (x - mean) * scale) / n;
                for (d, x) in d.iter_mut().zip(x) {
                    *d = (*d - mean_d - (x - mean) * scale * mean_dx) * scale;
                }
            }
        },
    );
}

struct LayerNorm {
    eps: f32,
}

/// Mean and reciprocal standard deviation of a row.
#[inline(always)]
fn moments(row: &[f32], eps: f32) -> (f32, f32) {
    let n = row.len() as f32;
    let mean = sum(row, |x| x) / n;
    let variance = sum(row, |x| (x - mean) * (x - mean)) / n;
    (mean, 1.0 / (variance + eps).sqrt())
}

#[inline(always)]
fn normalise(row: &mut [f32], gamma: &[f32], beta: &[f32], eps: f32) {
    let (mean, scale) = moments(row, eps);
    for ((y, g), b) in row.iter_mut().zip(gamma).zip(beta) {
        *y = (*y - mean) * scale * g + b;
    }
}

impl CustomOp2 for LayerNorm {
    fn name(&self) -> &'static str {
        "layer-norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        layout: &Layout,
        gamma_beta: &CpuStorage,
        gamma_beta_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let mut y = contiguous(x, layout)?.to_vec();
        let gamma_beta = contiguous(gamma_beta, gamma_beta_layout)?;
        normalise_rows(&mut y, gamma_beta, self.eps);
        output(y, layout.shape())
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        layout: &Layout,
        gamma_beta: &CudaStorage,
        gamma_beta_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        cuda::norm((x, layout), (gamma_beta, gamma_beta_layout), self.eps)
    }

    fn bwd(
        &self,
        x: &Tensor,
        gamma_beta: &Tensor,
        _y: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let gradient = gradient.contiguous()?;
        let dx = if_tracked(x, || {
            let op = InputGradient { eps: self.eps };
            gradient.apply_op3_no_bwd(x, gamma_beta, &op)
        })?;
        let dgb = if_tracked(gamma_beta, || {
            gradient.apply_op2_no_bwd(x, &ParameterGradient { eps: self.eps })
        })?;
        Ok((dx, dgb))
    }
}

/// See [`input_gradient`].
struct InputGradient {
    eps: f32,
}

impl CustomOp3 for InputGradient {
    fn name(&self) -> &'static str {
        "layer-norm-backward"
    }

    fn cpu_fwd(
        &self,
        gradient: &CpuStorage,
        layout: &Layout,
        x: &CpuStorage,
        x_layout: &Layout,
        gamma_beta: &CpuStorage,
        gamma_beta_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let mut dx = contiguous(gradient, layout)?.to_vec();
        let x = contiguous(x, x_layout)?;
        let gamma_beta = contiguous(gamma_beta, gamma_beta_layout)?;
        input_gradient(&mut dx, x, gamma_beta, self.eps);
        output(dx, layout.shape())
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        gradient: &CudaStorage,
        layout: &Layout,
        x: &CudaStorage,
        x_layout: &Layout,
        gamma_beta: &CudaStorage,
        gamma_beta_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let gamma_beta = (gamma_beta, gamma_beta_layout);
        cuda::norm_gradient((gradient, layout), (x, x_layout), gamma_beta, self.eps)
    }
}

/// Σ d ∘ x̂ and Σ d over the rows: the gradients of γ and β, as the rows of `[2, hidden]`.
struct ParameterGradient {
    eps: f32,
}

impl CustomOp2 for ParameterGradient {
    fn name(&self) -> &'static str {
        "layer-norm-parameters-backward"
    }

    fn cpu_fwd(
        &self,
        gradient: &CpuStorage,
        layout: &Layout,
        x: &CpuStorage,
        x_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (_, hidden) = layout.shape().dims2()?;
        let gradient = contiguous(gradient, layout)?;
        let x = contiguous(x, x_layout)?;
        let mut sums = vec![0f32; 2 * hidden];
        let (gamma, beta) = sums.split_at_mut(hidden);
        vectorize(
            #[inline(always)]
            || {
                for (d, x) in gradient.chunks_exact(hidden).zip(x.chunks_exact(hidden)) {
                    let (mean, scale) = moments(x, self.eps);
                    for i in 0..hidden {
                        gamma[i] += d[i] * ((x[i] - mean) * scale);
                        beta[i] += d[i];
                    }
                }
            },
        );
        output(sums, (2, hidden))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        gradient: &CudaStorage,
        layout: &Layout,
        x: &CudaStorage,
        x_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        cuda::norm_parameters_gradient((gradient, layout), (x, x_layout), self.eps)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::gradient_check::{assert_gradient, random};

    #[test]
    fn backward_agrees_with_finite_differences() {
        let inputs = [random(1, (3, 19)), random(2, (3, 19)), random(3, (2, 19))];
        assert_gradient(&inputs, |t| {
            let parameters = Norm {
                gamma_beta: t[2].clone(),
                eps: 1e-5,
            };
            add_norm(&t[0], None, &t[1], &parameters)
        });
    }

    #[test]
    fn rows_have_the_mean_and_deviation_asked_for() {
        let gamma_beta = Tensor::cat(
            &[
                &Tensor::full(2f32, (1, 33), &candle_core::Device::Cpu).unwrap(),
                &Tensor::full(3f32, (1, 33), &candle_core::Device::Cpu).unwrap(),
            ],
            0,
        );
        let parameters = Norm {
            gamma_beta: gamma_beta.unwrap(),
            eps: 1e-12,
        };
        for row in norm(&random(5, (4, 33)), &parameters)
            .unwrap()
            .to_vec2::<f32>()
            .unwrap()
        {
            let mean = row.iter().sum::<f32>() / 33.0;
            let variance = row.iter().map(|v| (v - mean).powi(2)).sum::<f32>() / 33.0;
            assert!((mean - 3.0).abs() < 1e-5 && (variance - 4.0).abs() < 1e-4);
        }
    }
}
