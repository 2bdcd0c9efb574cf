//! Linears laid out for the kernels of this machine: for inference alone, in f32 or eight bits.

mod aligned;
mod int8;
mod kernel;
mod panels;

use std::cell::RefCell;
use std::ops::Range;

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};

use super::activation::Activation;
use super::crew::{in_parts, is_helped};
use super::linear::Linear;
use super::lora::RowUpdates;
use super::matrix::{Into, Matrix, MatrixMut, multiply};
use super::tile::{COLUMNS, TileKernel};
use super::{contiguous, output, with_values};
use int8::{Int8Panels, Int8Rows};
use panels::Panels;

/// Columns of a part of a product that another core may take: some ten microseconds of work for a
/// short sentence.
const PART_PANELS: usize = 4;

/// In which numbers a packed linear multiplies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    F32,
    /// Weights symmetric by output, activations by row as they come; sums and all the rest in f32.
    Int8,
}

/// A frozen linear, `[out, in]`. It has a copy of the weight, which may go.
pub struct PackedLinear {
    input: usize,
    out: usize,
    /// With zeros up to a whole panel.
    bias: Vec<f32>,
    weight: Packed,
}

enum Packed {
    Panels(Panels),
    /// `[out, in]` as it is, for the library's product where there is no kernel.
    Rows(Vec<f32>),
    Int8(Int8Panels),
}

thread_local! {
    /// Memory for activations in eight bits, used again by each product of the thread.
    static INT8_ROWS: RefCell<Int8Rows> = RefCell::default();
}

impl PackedLinear {
    /// # Errors
    /// The weight is not `[out, in]` in f32 and in host memory, or takes part in training.
    pub fn new(linear: &Linear, precision: Precision) -> Result<Self> {
        let (out, input) = linear.weight.dims2()?;
        if linear.weight.track_op() || input == 0 {
            candle_core::bail!("a linear of {out} x {input} that is trained or empty");
        }
        let mut bias = match &linear.bias {
            Some(bias) => with_values(bias, |bias| Ok(bias.to_vec()))?,
            None => vec![0.0; out],
        };
        bias.resize(out.div_ceil(COLUMNS) * COLUMNS, 0.0);
        let weight = with_values(&linear.weight, |weight| {
            Ok(match precision {
                Precision::Int8 => Packed::Int8(Int8Panels::new(weight, out, input)),
                Precision::F32 => match TileKernel::best() {
                    Some(kernel) => Packed::Panels(Panels::new(weight, out, input, kernel)),
                    None => Packed::Rows(weight.to_vec()),
                },
            })
        })?;
        Ok(Self {
            input,
            out,
            bias,
            weight,
        })
    }

    pub fn out_features(&self) -> usize {
        self.out
    }

    pub fn in_features(&self) -> usize {
        self.input
    }

    /// Memory of weight and bias.
    pub fn bytes(&self) -> usize {
        let weight = match &self.weight {
            Packed::Panels(panels) => panels.bytes(),
            Packed::Rows(rows) => size_of_val(rows.as_slice()),
            Packed::Int8(panels) => panels.bytes(),
        };
        weight + size_of_val(self.bias.as_slice())
    }

    /// `act(x Wᵀ + b)` of `x`, `[rows, in]`: `[rows, out]`.
    fn forward(&self, x: &[f32], activation: Activation) -> Vec<f32> {
        let rows = x.len() / self.input;
        let mut y = Vec::with_capacity(rows * self.out);
        let place = Place(y.as_mut_ptr());
        match &self.weight {
            Packed::Panels(panels) => in_panels(panels.count(), &|part| {
                // SAFETY: each part writes columns of its own, for which there is room.
                #[allow(unsafe_code)]
                unsafe {
                    panels.multiply(part, x, place.get(), &self.bias, activation);
                }
            }),
            Packed::Int8(panels) => INT8_ROWS.with_borrow_mut(|q| {
                panels.quantize(x, q);
                let q = &*q;
                in_panels(panels.count(), &|part| {
                    // SAFETY: each part writes columns of its own, for which there is room.
                    #[allow(unsafe_code)]
                    unsafe {
                        panels.multiply(part, q, place.get(), &self.bias, activation);
                    }
                });
            }),
            Packed::Rows(weight) => {
                self.multiply_rows(weight, x, &mut y);
                activation.apply(&mut y);
                return y;
            }
        }
        // SAFETY: the parts have written all outputs of all rows.
        #[allow(unsafe_code)]
        unsafe {
            y.set_len(rows * self.out);
        }
        y
    }

    /// By the library, a range of outputs a part.
    fn multiply_rows(&self, weight: &[f32], x: &[f32], y: &mut Vec<f32>) {
        let (rows, out) = (x.len() / self.input, self.out);
        y.extend(self.bias[..out].iter().cycle().take(rows * out));
        let place = Place(y.as_mut_ptr());
        in_panels(out.div_ceil(COLUMNS), &|part| {
            let columns = part.start * COLUMNS..(part.end * COLUMNS).min(out);
            let weight = &weight[columns.start * self.input..columns.end * self.input];
            let right = Matrix::new(weight, columns.len(), self.input, self.input).transposed();
            let left = Matrix::new(x, rows, self.input, self.input);
            // SAFETY: each part writes columns of its own of the `rows · out` values.
            #[allow(unsafe_code)]
            let target =
                unsafe { MatrixMut::raw(place.get().add(columns.start), rows, columns.len(), out) };
            multiply(target, Into::Accumulate, 1.0, left, right);
        });
    }
}

/// Runs `part` over all panels, at once or, if other cores help, some at a time.
fn in_panels(panels: usize, part: &(dyn Fn(Range<usize>) + Sync)) {
    if !is_helped() {
        return part(0..panels);
    }
    in_parts(panels.div_ceil(PART_PANELS), &|i| {
        part(i * PART_PANELS..((i + 1) * PART_PANELS).min(panels));
    });
}

/// Where several threads write places of their own.
#[derive(Clone, Copy)]
pub(super) struct Place(pub(super) *mut f32);

// SAFETY: who writes through it promises that no two threads touch the same values.
#[allow(unsafe_code)]
unsafe impl Sync for Place {}

impl Place {
    pub(super) fn get(&self) -> *mut f32 {
        self.0
    }
}

/// `act(x Wᵀ + b + updates)` for `x` of `[rows, in]`: `[rows, out]`; each range of rows has updates
/// of its own, in f32. Frozen tensors only.
///
/// # Errors
/// `x` has another width, or takes part in a backward pass.
pub fn packed_linear(
    x: &Tensor,
    linear: &PackedLinear,
    rows: &[RowUpdates],
    activation: Activation,
) -> Result<Tensor> {
    if x.track_op() {
        candle_core::bail!("a packed linear has no backward pass");
    }
    x.apply_op1_no_bwd(&PackedRows {
        linear,
        rows,
        activation,
    })
}

struct PackedRows<'a> {
    linear: &'a PackedLinear,
    rows: &'a [RowUpdates],
    activation: Activation,
}

impl CustomOp1 for PackedRows<'_> {
    fn name(&self) -> &'static str {
        "packed-linear"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (rows, input) = layout.shape().dims2()?;
        let (linear, out) = (self.linear, self.linear.out);
        if input != linear.input {
            candle_core::bail!("a linear of {} inputs got {input} columns", linear.input);
        }
        let x = contiguous(x, layout)?;
        if self.rows.is_empty() {
            return output(linear.forward(x, self.activation), (rows, out));
        }
        let mut y = linear.forward(x, Activation::None);
        RowUpdates::add_all(self.rows, x, input, &mut y, out)?;
        self.activation.apply(&mut y);
        output(y, (rows, out))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::ops::crew::Crew;
    use crate::ops::gradient_check::random;
    use crate::ops::linear;

    fn layer(out: usize, input: usize) -> Linear {
        Linear {
            weight: random(2, (out, input)),
            bias: Some(random(3, out)),
        }
    }

    fn values(tensor: &Tensor) -> Vec<f32> {
        tensor.flatten_all().unwrap().to_vec1().unwrap()
    }

    fn packed(x: &Tensor, layer: &Linear, precision: Precision, act: Activation) -> Vec<f32> {
        let packed = PackedLinear::new(layer, precision).unwrap();
        values(&packed_linear(x, &packed, &[], act).unwrap())
    }

    proptest! {
        #[test]
        fn packed_and_plain_linears_give_the_same(
            rows in 1usize..20, out in 1usize..50, input in 1usize..900
        ) {
            let (x, layer) = (random(1, (rows, input)), layer(out, input));
            for act in [Activation::None, Activation::Gelu, Activation::Tanh, Activation::Relu] {
                let plain = values(&linear(&x, &layer, act).unwrap());
                for (a, b) in packed(&x, &layer, Precision::F32, act).iter().zip(&plain) {
                    prop_assert!((a - b).abs() < 1e-6 * input as f32, "{} {}", a, b);
                }
            }
        }

        #[test]
        fn a_row_has_the_same_result_in_every_batch(rows in 2usize..20, row in 0usize..20) {
            let row = row % rows;
            let (x, layer) = (random(1, (rows, 400)), layer(33, 400));
            for precision in [Precision::F32, Precision::Int8] {
                let alone = x.narrow(0, row, 1).unwrap();
                let alone = packed(&alone, &layer, precision, Activation::Gelu);
                let all = packed(&x, &layer, precision, Activation::Gelu);
                prop_assert_eq!(&all[row * 33..(row + 1) * 33], &alone[..]);
            }
        }
    }

    #[test]
    fn helpers_change_nothing() {
        let crew = Crew::start(3).unwrap();
        let (x, layer) = (random(1, (30, 400)), layer(530, 400));
        for precision in [Precision::F32, Precision::Int8] {
            let alone = packed(&x, &layer, precision, Activation::Gelu);
            for _ in 0..50 {
                let helped = crew.lead(|| packed(&x, &layer, precision, Activation::Gelu));
                assert_eq!(helped, alone);
            }
        }
    }

    #[test]
    fn what_is_trained_is_not_packed() {
        let layer = layer(5, 6);
        let variable = candle_core::Var::from_tensor(&layer.weight).unwrap();
        let trained = Linear {
            weight: variable.as_tensor().clone(),
            bias: None,
        };
        assert!(PackedLinear::new(&trained, Precision::F32).is_err());
        let x = candle_core::Var::from_tensor(&random(1, (4, 6))).unwrap();
        let packed = PackedLinear::new(&layer, Precision::F32).unwrap();
        assert!(packed_linear(x.as_tensor(), &packed, &[], Activation::None).is_err());
        let narrow = random(1, (4, 5));
        assert!(packed_linear(&narrow, &packed, &[], Activation::None).is_err());
    }
}
