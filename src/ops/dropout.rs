//! Dropout whose mask is a function of its place, not of a generator's state.

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};

#[cfg(feature = "cuda")]
use super::cuda;
use super::simd::vectorize;
use super::{contiguous, if_tracked, output};

/// Which elements are dropped: a pure function of the seed, the site in the network and the
/// element's row in the whole training batch. So the mask is the same however the batch is
/// shared out among threads, and backward draws it again instead of keeping it.
#[derive(Clone, Copy, Debug)]
pub struct Dropout {
    /// Probability of an element to be dropped, below 1.
    pub rate: f64,
    /// Differs for every step.
    pub seed: u64,
    /// Row of the batch at which the tensor's first row stands.
    pub first_row: usize,
}

impl Dropout {
    /// The same rate with a mask of its own for another place in the network.
    pub fn at_site(self, site: u64) -> Self {
        Self {
            seed: mix(self.seed ^ mix(site)),
            ..self
        }
    }

    /// The same for rows that begin `rows` further on.
    pub(super) fn further_on(self, rows: usize) -> Self {
        Self {
            first_row: self.first_row + rows,
            ..self
        }
    }

    /// Drops from rows of `columns` values.
    pub(super) fn drop_from(&self, values: &mut [f32], columns: usize) {
        let threshold = (self.rate * f64::from(u32::MAX)) as u32;
        let scale = (1.0 / (1.0 - self.rate)) as f32;
        for (i, row) in values.chunks_exact_mut(columns).enumerate() {
            let key = mix(self.seed ^ mix((self.first_row + i) as u64)) as u32;
            vectorize(
                #[inline(always)]
                || {
                    for (j, value) in row.iter_mut().enumerate() {
                        let keep = mix32(key ^ (j as u32)) >= threshold;
                        *value = if keep { *value * scale } else { 0.0 };
                    }
                },
            );
        }
    }
}

/// Zeroes elements of `x`, `[rows, columns]`, and scales the others by 1 / (1 − rate).
pub fn dropout(x: &Tensor, dropout: Dropout) -> Result<Tensor> {
    if dropout.rate <= 0.0 {
        return Ok(x.clone());
    }
    x.apply_op1(dropout)
}

/// The output function of SplitMix64 (Steele, Lea & Flood, OOPSLA 2014).
#[inline(always)]
fn mix(mut z: u64) -> u64 {
    z = z.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A 32-bit finaliser (Wellons' lowbias32), which vectorises.
#[inline(always)]
fn mix32(mut x: u32) -> u32 {
    x ^= x >> 16;
    x = x.wrapping_mul(0x7feb_352d);
    x ^= x >> 15;
    x = x.wrapping_mul(0x846c_a68b);
    x ^ (x >> 16)
}

impl CustomOp1 for Dropout {
    fn name(&self) -> &'static str {
        "dropout"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (_, columns) = layout.shape().dims2()?;
        let mut y = contiguous(x, layout)?.to_vec();
        self.drop_from(&mut y, columns);
        output(y, layout.shape())
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, x: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        cuda::dropout((x, layout), self)
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        if_tracked(x, || gradient.contiguous()?.apply_op1_no_bwd(self))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::gradient_check::{assert_gradient, random};

    const DROPOUT: Dropout = Dropout {
        rate: 0.25,
        seed: 7,
        first_row: 0,
    };

    #[test]
    fn drops_the_asked_share_and_keeps_the_mean() {
        let x = Tensor::ones(
            (400, 384),
            candle_core::DType::F32,
            &candle_core::Device::Cpu,
        );
        let y = dropout(&x.unwrap(), DROPOUT).unwrap();
        let values = y.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let dropped = values.iter().filter(|v| **v == 0.0).count() as f64 / values.len() as f64;
        assert!((dropped - 0.25).abs() < 0.01, "{dropped}");
        assert!(
            values
                .iter()
                .all(|v| *v == 0.0 || (*v - 4.0 / 3.0).abs() < 1e-6)
        );
    }

    #[test]
    fn a_row_has_the_same_mask_in_any_share_of_the_batch() {
        let x = random(3, (10, 40));
        let whole = dropout(&x, DROPOUT).unwrap();
        let part = Dropout {
            first_row: 4,
            ..DROPOUT
        };
        let part = dropout(&x.narrow(0, 4, 6).unwrap().contiguous().unwrap(), part).unwrap();
        let whole = whole.narrow(0, 4, 6).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(whole, part.to_vec2::<f32>().unwrap());
    }

    #[test]
    fn backward_uses_the_mask_of_forward() {
        assert_gradient(&[random(1, (6, 20))], |x| dropout(&x[0], DROPOUT));
    }
}
