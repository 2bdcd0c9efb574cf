//! A frozen weight in bf16, beside which something trains.

use candle_core::Result;

use super::panels::{Panels, pairs};
use super::terms::Terms;
use super::{PackedLinear, Precision, bf16_kernel};
use crate::ops::activation::Activation;
use crate::ops::linear::Linear;
use crate::ops::matrix::{Into, Matrix};
use crate::ops::with_values;

/// A frozen linear `[out, in]`, its weight rounded to bf16, for products by the weight and by its
/// transpose. What is multiplied is rounded too, sums are in f32.
pub struct FrozenBf16 {
    forward: PackedLinear,
    /// The transposed weight.
    backward: Panels,
}

impl FrozenBf16 {
    /// # Errors
    /// The weight is not in f32 and in host memory, or the processor does not multiply in bf16.
    pub fn new(linear: &Linear) -> Result<Self> {
        let (out, input) = linear.weight.dims2()?;
        let kernel = bf16_kernel()?;
        with_values(&linear.weight, |weight| {
            let weight = Matrix::new(weight, out, input, input).transposed();
            Ok(Self {
                forward: PackedLinear::new(linear, Precision::Bf16)?,
                backward: Panels::of_pairs(weight, kernel),
            })
        })
    }

    pub fn bytes(&self) -> usize {
        self.forward.bytes() + self.backward.bytes()
    }

    /// `x Wᵀ + b` of `x`, `[rows, in]`: `[rows, out]`.
    pub(in crate::ops) fn forward(&self, x: &[f32]) -> Vec<f32> {
        let (terms, activation) = (Terms::default(), Activation::None);
        self.forward.forward(x, &terms, activation)
    }

    /// `dy W` of `dy`, `[rows, out]`, into or onto `dx`, `[rows, in]`.
    pub(in crate::ops) fn input_gradient(&self, dy: &[f32], dx: &mut [f32], into: Into) {
        let (out, input) = (self.forward.out, self.forward.input);
        assert_eq!(dy.len() / out * input, dx.len(), "rows of a gradient");
        if into == Into::Overwrite {
            dx.fill(0.0);
        }
        let (dy, activation) = (pairs(dy, out), Activation::None);
        let panels = &self.backward;
        // SAFETY: `dx` has a place for each input of each row, and is borrowed exclusively.
        #[allow(unsafe_code)]
        unsafe {
            panels.multiply(0..panels.count(), &dy, dx.as_mut_ptr(), None, activation);
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Tensor};
    use proptest::prelude::*;

    use super::super::has_bf16;
    use super::*;
    use crate::ops::gradient_check::random;

    fn rounded(tensor: &Tensor) -> Tensor {
        let bf16 = tensor.to_dtype(DType::BF16).unwrap();
        bf16.to_dtype(DType::F32).unwrap()
    }

    fn values(tensor: &Tensor) -> Vec<f32> {
        tensor.flatten_all().unwrap().to_vec1().unwrap()
    }

    fn assert_close(found: &[f32], expected: &Tensor) {
        let expected = values(expected);
        assert_eq!(found.len(), expected.len());
        for (found, expected) in found.iter().zip(expected) {
            let error = (found - expected).abs();
            assert!(error < 1e-4 * (1.0 + expected.abs()), "{found} {expected}");
        }
    }

    proptest! {
        #[test]
        fn both_products_are_those_of_the_rounded_numbers(
            rows in 1usize..20, out in 1usize..70, input in 1usize..90
        ) {
            let linear = Linear {
                weight: random(1, (out, input)),
                bias: Some(random(2, out)),
            };
            if !has_bf16() {
                prop_assert!(FrozenBf16::new(&linear).is_err());
                return Ok(());
            }
            let frozen = FrozenBf16::new(&linear).unwrap();
            let weight = rounded(&linear.weight);
            let (x, dy) = (random(3, (rows, input)), random(4, (rows, out)));
            let y = rounded(&x).matmul(&weight.t().unwrap()).unwrap();
            let y = y.broadcast_add(linear.bias.as_ref().unwrap()).unwrap();
            assert_close(&frozen.forward(&values(&x)), &y);
            let expected = rounded(&dy).matmul(&weight).unwrap();
            let mut dx = vec![7.0; rows * input];
            frozen.input_gradient(&values(&dy), &mut dx, Into::Overwrite);
            assert_close(&dx, &expected);
            frozen.input_gradient(&values(&dy), &mut dx, Into::Accumulate);
            assert_close(&dx, &(expected * 2.0).unwrap());
        }
    }

    #[test]
    fn numbers_are_rounded_as_elsewhere() {
        let x = [
            0.0,
            -0.0,
            1.0,
            1.003_906_3,
            1.011_718_8,
            3.4e38,
            1e-41,
            f32::INFINITY,
            f32::NAN,
        ];
        let lanes = pairs(&x, 3);
        let pair = |lane: &f32| [lane.to_bits() << 16, lane.to_bits() & 0xffff_0000];
        let found: Vec<f32> = lanes.iter().flat_map(pair).map(f32::from_bits).collect();
        let rows = Tensor::from_slice(&x, (3, 3), &candle_core::Device::Cpu).unwrap();
        let expected = values(&rounded(&rows));
        for (found, expected) in found.chunks(4).zip(expected.chunks(3)) {
            let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&found[..2]), bits(&expected[..2]));
            assert_eq!(found[3], 0.0);
            match expected[2].is_nan() {
                true => assert!(found[2].is_nan()),
                false => assert_eq!(found[2].to_bits(), expected[2].to_bits()),
            }
        }
    }
}
