//! Linears laid out for the kernels of this machine: for inference in f32, bf16 or eight bits, and
//! for training on frozen weights in bf16.

mod aligned;
mod frozen;
mod int8;
mod kernel;
mod panels;
mod terms;

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
pub use frozen::FrozenBf16;
use int8::{Int8Panels, Int8Rows};
use panels::{Panels, pairs};
use terms::Terms;

/// Columns of a part of a product that another core may take: some ten microseconds of work for a
/// short sentence.
const PART_PANELS: usize = 4;

/// In which numbers a packed linear multiplies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    F32,
    /// Weights and activations rounded to bf16, sums and all the rest in f32; where
    /// [the processor can](has_bf16).
    Bf16,
    /// Weights symmetric by output, activations by row as they come; sums and all the rest in f32.
    Int8,
}

/// Whether this machine multiplies numbers in bf16.
pub fn has_bf16() -> bool {
    TileKernel::best_bf16().is_some()
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
    /// Of pairs.
    Bf16(Panels),
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
                Precision::Bf16 => {
                    let weight = Matrix::new(weight, out, input, input);
                    Packed::Bf16(Panels::of_pairs(weight, bf16_kernel()?))
                }
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
            Packed::Panels(panels) | Packed::Bf16(panels) => panels.bytes(),
            Packed::Rows(rows) => size_of_val(rows.as_slice()),
            Packed::Int8(panels) => panels.bytes(),
        };
        weight + size_of_val(self.bias.as_slice())
    }

    /// `act(x Wᵀ + b + terms)` of `x`, `[rows, in]`: `[rows, out]`.
    fn forward(&self, x: &[f32], terms: &Terms<'_>, activation: Activation) -> Vec<f32> {
        let rows = x.len() / self.input;
        let mut y = Vec::with_capacity(rows * self.out);
        let place = Place(y.as_mut_ptr());
        let (at_once, later) = match terms.is_empty() {
            true => (activation, Activation::None),
            false => (Activation::None, activation),
        };
        // SAFETY: each part has columns of its own, which have values by then.
        #[allow(unsafe_code)]
        let finish = |part: Range<usize>| unsafe {
            let columns = part.start * COLUMNS..(part.end * COLUMNS).min(self.out);
            terms.add(columns.clone(), place.get(), self.out);
            apply(later, columns, rows, place.get(), self.out);
        };
        let by_panels = |panels: &Panels, x: &[f32]| {
            in_panels(panels.count(), terms, &|part| {
                // SAFETY: each part writes columns of its own, for which there is room.
                #[allow(unsafe_code)]
                unsafe {
                    panels.multiply(part.clone(), x, place.get(), Some(&self.bias), at_once);
                }
                finish(part);
            });
        };
        match &self.weight {
            Packed::Panels(panels) => by_panels(panels, x),
            Packed::Bf16(panels) => by_panels(panels, &pairs(x, self.input)),
            Packed::Int8(panels) => INT8_ROWS.with_borrow_mut(|q| {
                panels.quantize(x, q);
                let q = &*q;
                in_panels(panels.count(), terms, &|part| {
                    // SAFETY: each part writes columns of its own, for which there is room.
                    #[allow(unsafe_code)]
                    unsafe {
                        panels.multiply(part.clone(), q, place.get(), &self.bias, at_once);
                    }
                    finish(part);
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
        in_panels(out.div_ceil(COLUMNS), &Terms::default(), &|part| {
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

fn bf16_kernel() -> Result<TileKernel> {
    let lacking = || candle_core::Error::msg("this processor does not multiply in bf16");
    TileKernel::best_bf16().ok_or_else(lacking)
}

/// Runs `part` over all panels: at once or, if other cores help or what is written is read again
/// for terms, some at a time.
fn in_panels(panels: usize, terms: &Terms<'_>, part: &(dyn Fn(Range<usize>) + Sync)) {
    if !is_helped() && terms.is_empty() {
        return part(0..panels);
    }
    in_parts(panels.div_ceil(PART_PANELS), &|i| {
        part(i * PART_PANELS..((i + 1) * PART_PANELS).min(panels));
    });
}

/// Applies the activation to some columns of `y`, `[rows, out]`.
///
/// # Safety
/// The columns must be there and have values, and nobody else may use them meanwhile.
#[allow(unsafe_code)]
unsafe fn apply(
    activation: Activation,
    columns: Range<usize>,
    rows: usize,
    y: *mut f32,
    out: usize,
) {
    if activation == Activation::None {
        return;
    }
    for row in 0..rows {
        // SAFETY: the caller's promise.
        let values = unsafe {
            let first = y.add(row * out + columns.start);
            std::slice::from_raw_parts_mut(first, columns.len())
        };
        activation.apply(values);
    }
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
        let updates = terms::borrow(self.rows);
        if let Some(terms) = Terms::new(&updates, linear, x)? {
            return output(linear.forward(x, &terms, self.activation), (rows, out));
        }
        let mut y = linear.forward(x, &Terms::default(), Activation::None);
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
    use crate::ops::{LoraUpdate, linear, linear_rows};

    fn layer(out: usize, input: usize) -> Linear {
        Linear {
            weight: random(2, (out, input)),
            bias: Some(random(3, out)),
        }
    }

    /// Those that this machine has.
    fn precisions() -> impl Iterator<Item = Precision> {
        let bf16 = has_bf16().then_some(Precision::Bf16);
        [Precision::F32, Precision::Int8].into_iter().chain(bf16)
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
            for precision in precisions() {
                let alone = x.narrow(0, row, 1).unwrap();
                let alone = packed(&alone, &layer, precision, Activation::Gelu);
                let all = packed(&x, &layer, precision, Activation::Gelu);
                prop_assert_eq!(&all[row * 33..(row + 1) * 33], &alone[..]);
            }
        }
    }

    /// An adapter of `rank` for some rows: on columns that fill panels, and on the last ones.
    fn adapter(rows: Range<usize>, out: usize, input: usize, rank: usize) -> RowUpdates {
        let update = |column, width| LoraUpdate {
            a: random(4, (rank, input)),
            b: random(5, (width, rank)),
            scale: 0.5,
            column,
            map: None,
        };
        let split = out / 32 * COLUMNS;
        let mut updates = vec![update(split, out - split)];
        if split > 0 {
            updates.push(update(0, split));
        }
        RowUpdates {
            rows,
            updates: updates.into(),
        }
    }

    fn adapted(x: &Tensor, layer: &Linear, precision: Precision, rows: &[RowUpdates]) -> Vec<f32> {
        let packed = PackedLinear::new(layer, precision).unwrap();
        values(&packed_linear(x, &packed, rows, Activation::Gelu).unwrap())
    }

    proptest! {
        #[test]
        fn adapters_add_what_they_add_to_a_plain_linear(
            rows in 3usize..40, out in 1usize..90, input in 1usize..300, rank in 1usize..20,
            shift in 0usize..2
        ) {
            let (x, layer) = (random(1, (rows, input)), layer(out, input));
            let mut adapters = vec![
                adapter(0..rows / 2, out, input, rank),
                adapter(rows / 2 + 1..rows, out, input, rank),
            ];
            if shift > 0 && out > 1 {
                // Columns that no panel begins with.
                let mut only = adapters[0].updates[0].clone();
                only.column = 1;
                only.b = random(6, (out - 1, rank));
                adapters[0].updates = [only].into();
            }
            let plain = linear_rows(&x, &layer, adapters.clone(), Activation::Gelu).unwrap();
            let found = adapted(&x, &layer, Precision::F32, &adapters);
            for (a, b) in found.iter().zip(values(&plain)) {
                prop_assert!((a - b).abs() < 1e-5 * (input * rank) as f32, "{} {}", a, b);
            }
        }

        #[test]
        fn an_adapted_row_has_the_same_result_in_every_batch(
            rows in 2usize..40, row in 0usize..40
        ) {
            let row = row % rows;
            let (x, layer) = (random(1, (rows, 400)), layer(33, 400));
            for precision in precisions() {
                let alone = x.narrow(0, row, 1).unwrap();
                let alone = adapted(&alone, &layer, precision, &[adapter(0..1, 33, 400, 8)]);
                let all = adapted(&x, &layer, precision, &[adapter(0..rows, 33, 400, 8)]);
                prop_assert_eq!(&all[row * 33..(row + 1) * 33], &alone[..]);
            }
        }
    }

    #[test]
    fn helpers_change_nothing() {
        let crew = Crew::start(3).unwrap();
        let (x, layer) = (random(1, (30, 400)), layer(530, 400));
        for precision in precisions() {
            for adapters in [Vec::new(), vec![adapter(0..30, 530, 400, 8)]] {
                let alone = adapted(&x, &layer, precision, &adapters);
                for _ in 0..50 {
                    let helped = crew.lead(|| adapted(&x, &layer, precision, &adapters));
                    assert_eq!(helped, alone);
                }
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
