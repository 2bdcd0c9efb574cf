//! The heads of many tasks in one op.

use std::ops::Range;

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp1, DType, Layout, Result, Shape, Tensor};

use super::activation::Activation;
#[cfg(feature = "cuda")]
use super::cuda;
use super::linear::Linear;
use super::{contiguous, output};

/// `act(x Wᵀ + b)` where each range of rows has a linear of its own; `x` is `[rows, in]`. The
/// outputs stand one behind the other, `[Σ rows · out]`, in `dtype`. Frozen tensors only.
///
/// # Errors
/// `x` has another width than a linear.
pub fn segment_linears(
    x: &Tensor,
    segments: &[(Range<usize>, &Linear)],
    activation: Activation,
    dtype: DType,
) -> Result<Tensor> {
    x.apply_op1_no_bwd(&SegmentLinears {
        segments,
        activation,
        dtype,
    })
}

struct SegmentLinears<'a> {
    segments: &'a [(Range<usize>, &'a Linear)],
    activation: Activation,
    #[cfg_attr(not(feature = "cuda"), expect(dead_code))]
    dtype: DType,
}

impl CustomOp1 for SegmentLinears<'_> {
    fn name(&self) -> &'static str {
        "segment-linears"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (_, input) = layout.shape().dims2()?;
        contiguous(x, layout)?;
        let mut all = Vec::new();
        for (rows, linear) in self.segments {
            let part = layout.narrow(0, rows.start, rows.len())?;
            if linear.in_features() != input {
                candle_core::bail!("a head of {} inputs got {input}", linear.in_features());
            }
            all.append(&mut linear.forward(x, &part)?);
        }
        self.activation.apply(&mut all);
        let count = all.len();
        output(all, count)
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, x: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        cuda::segment_linears((x, layout), self.segments, self.activation, self.dtype)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::gradient_check::random;
    use crate::ops::linear;

    #[test]
    fn each_range_of_rows_goes_through_its_own_linear() {
        let x = random(1, (5, 6));
        let heads = [(2, 3), (3, 1)].map(|(seed, out)| Linear {
            weight: random(seed, (out, 6)),
            bias: Some(random(seed + 10, out)),
        });
        let segments = [(0..2, &heads[0]), (2..5, &heads[1])];
        let all = segment_linears(&x, &segments, Activation::Tanh, DType::F32).unwrap();
        let mut expected = Vec::new();
        for (rows, head) in &segments {
            let x = x.narrow(0, rows.start, rows.len()).unwrap();
            let y = linear(&x, head, Activation::Tanh).unwrap();
            expected.extend(y.flatten_all().unwrap().to_vec1::<f32>().unwrap());
        }
        assert_eq!(all.to_vec1::<f32>().unwrap(), expected);
    }

    #[test]
    fn a_head_of_another_width_is_an_error() {
        let head = Linear {
            weight: random(2, (3, 7)),
            bias: None,
        };
        let x = random(1, (5, 6));
        assert!(segment_linears(&x, &[(0..5, &head)], Activation::None, DType::F32).is_err());
    }
}
