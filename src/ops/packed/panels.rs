//! Weights in panels of sixteen columns, as the kernels read them: f32, or pairs of bf16 in the
//! place of f32.

use std::ops::Range;

use super::aligned::Aligned;
use crate::ops::activation::Activation;
use crate::ops::matrix::Matrix;
use crate::ops::simd::vectorize;
use crate::ops::tile::{COLUMNS, Finish, Left, Right, Start, Target, TileKernel};

/// A block of this many rows of a panel (24 KiB) stays in the first-level cache while all rows of
/// the left matrix pass by.
const DEPTH: usize = 384;
/// Values of the left matrix that stay in the second-level cache meanwhile.
const LEFT_VALUES: usize = 48 * 1024;

/// A weight `[out, in]`, as `[out / 16][in][16]`, zeros in place of missing outputs.
pub(super) struct Panels {
    values: Aligned<f32>,
    /// Of pairs there are half as many.
    input: usize,
    out: usize,
    kernel: TileKernel,
}

impl Panels {
    pub(super) fn new(weight: &[f32], out: usize, input: usize, kernel: TileKernel) -> Self {
        Self::filled(out, input, kernel, |column, k| weight[column * input + k])
    }

    /// In bf16, which `kernel` must be for.
    pub(super) fn of_pairs(weight: Matrix<'_>, kernel: TileKernel) -> Self {
        let (out, input) = weight.shape();
        Self::filled(out, input.div_ceil(2), kernel, |column, k| {
            let second = match 2 * k + 1 < input {
                true => weight.at(column, 2 * k + 1),
                false => 0.0,
            };
            pair(weight.at(column, 2 * k), second)
        })
    }

    fn filled(
        out: usize,
        input: usize,
        kernel: TileKernel,
        value: impl Fn(usize, usize) -> f32,
    ) -> Self {
        let panels = out.div_ceil(COLUMNS);
        let mut values = Aligned::zeroed(panels * input * COLUMNS);
        let panel_of = values.as_mut_slice().chunks_exact_mut(input * COLUMNS);
        for (panel, values) in panel_of.enumerate() {
            for column in 0..COLUMNS.min(out - panel * COLUMNS) {
                for k in 0..input {
                    values[k * COLUMNS + column] = value(panel * COLUMNS + column, k);
                }
            }
        }
        Self {
            values,
            input,
            out,
            kernel,
        }
    }

    pub(super) fn count(&self) -> usize {
        self.out.div_ceil(COLUMNS)
    }

    pub(super) fn bytes(&self) -> usize {
        size_of_val(self.values.as_slice())
    }

    /// The outputs of some panels: `act(x Wᵀ + bias)`, `bias` with zeros up to a whole panel;
    /// without one, the products are added to what stands in `y`.
    ///
    /// # Safety
    /// `y` must be writable memory of `[rows, out]` of which nobody else uses these columns.
    #[allow(unsafe_code)]
    pub(super) unsafe fn multiply(
        &self,
        panels: Range<usize>,
        x: &[f32],
        y: *mut f32,
        bias: Option<&[f32]>,
        activation: Activation,
    ) {
        let rows = x.len() / self.input;
        assert!(
            panels.end <= self.count()
                && bias.is_none_or(|bias| bias.len() >= panels.end * COLUMNS)
        );
        let block = (LEFT_VALUES / DEPTH.min(self.input)).max(self.kernel.rows());
        for first in (0..rows).step_by(block) {
            let rows = block.min(rows - first);
            for start in (0..self.input).step_by(DEPTH) {
                let depth = DEPTH.min(self.input - start);
                let ends = start + depth == self.input;
                let column = panels.start * COLUMNS;
                // SAFETY: rows, depth and panels are within the three matrices.
                unsafe {
                    let left = Left {
                        values: x.as_ptr().add(first * self.input + start),
                        stride: self.input,
                        rows,
                        depth,
                    };
                    let all = self.values.as_slice().as_ptr();
                    let right = Right {
                        values: all.add((panels.start * self.input + start) * COLUMNS),
                        stride: COLUMNS,
                        panels: panels.len(),
                        apart: self.input * COLUMNS,
                    };
                    let target = Target {
                        values: y.add(first * self.out + column),
                        stride: self.out,
                        columns: (panels.len() * COLUMNS).min(self.out - column),
                    };
                    let finish = Finish {
                        scale: 1.0,
                        start: match bias {
                            Some(bias) if start == 0 => Start::Bias(bias.as_ptr().add(column)),
                            _ => Start::Target,
                        },
                        activation: if ends { activation } else { Activation::None },
                    };
                    self.kernel.multiply(left, right, target, finish);
                }
            }
        }
    }
}

/// Two numbers rounded to bf16, the first one in the lower half, as the bits of an f32, which is
/// only ever moved.
#[inline(always)]
fn pair(first: f32, second: f32) -> f32 {
    f32::from_bits(bf16(first) | bf16(second) << 16)
}

/// The bits of the nearest bf16, ties to even.
#[inline(always)]
fn bf16(x: f32) -> u32 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    // Rounding could carry a NaN over into a number.
    if x.is_nan() {
        bits >> 16 | 0x40
    } else {
        rounded
    }
}

/// Rows of `input` values as pairs of bf16, each row filled up to a whole pair.
pub(super) fn pairs(x: &[f32], input: usize) -> Vec<f32> {
    let mut pairs = vec![0f32; x.len() / input * input.div_ceil(2)];
    vectorize(
        #[inline(always)]
        || {
            let rows = x.chunks_exact(input);
            for (x, pairs) in rows.zip(pairs.chunks_exact_mut(input.div_ceil(2))) {
                let whole = x.chunks_exact(2);
                if let (&[last], Some(place)) = (whole.remainder(), pairs.last_mut()) {
                    *place = pair(last, 0.0);
                }
                for (place, x) in pairs.iter_mut().zip(whole) {
                    *place = pair(x[0], x[1]);
                }
            }
        },
    );
    pairs
}
