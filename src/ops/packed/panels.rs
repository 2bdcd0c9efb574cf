//! f32 weights in panels of sixteen columns, as the kernel reads them.

use std::ops::Range;

use super::aligned::Aligned;
use crate::ops::activation::Activation;
use crate::ops::tile::{COLUMNS, Finish, Left, Right, Start, Target, TileKernel};

/// A block of this many rows of a panel (24 KiB) stays in the first-level cache while all rows of
/// the left matrix pass by.
const DEPTH: usize = 384;
/// Values of the left matrix that stay in the second-level cache meanwhile.
const LEFT_VALUES: usize = 48 * 1024;

/// A weight `[out, in]`, as `[out / 16][in][16]`, zeros in place of missing outputs.
pub(super) struct Panels {
    values: Aligned<f32>,
    input: usize,
    out: usize,
    kernel: TileKernel,
}

impl Panels {
    pub(super) fn new(weight: &[f32], out: usize, input: usize, kernel: TileKernel) -> Self {
        let panels = out.div_ceil(COLUMNS);
        let mut values = Aligned::zeroed(panels * input * COLUMNS);
        let panel_of = values.as_mut_slice().chunks_exact_mut(input * COLUMNS);
        for (panel, values) in panel_of.enumerate() {
            let rows = weight[panel * COLUMNS * input..].chunks_exact(input);
            for (column, row) in rows.take(COLUMNS).enumerate() {
                for (k, value) in row.iter().enumerate() {
                    values[k * COLUMNS + column] = *value;
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

    /// The outputs of some panels: `act(x Wᵀ + bias)`, `bias` with zeros up to a whole panel.
    ///
    /// # Safety
    /// `y` must be writable memory of `[rows, out]` of which nobody else uses these columns.
    #[allow(unsafe_code)]
    pub(super) unsafe fn multiply(
        &self,
        panels: Range<usize>,
        x: &[f32],
        y: *mut f32,
        bias: &[f32],
        activation: Activation,
    ) {
        let rows = x.len() / self.input;
        assert!(panels.end <= self.count() && bias.len() >= panels.end * COLUMNS);
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
                        start: match start {
                            0 => Start::Bias(bias.as_ptr().add(column)),
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
