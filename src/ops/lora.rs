//! Low-rank updates of a linear's output (Hu et al., arXiv 2106.09685): y += s · (x Aᵀ) Bᵀ.

use std::ops::Range;
use std::sync::Arc;

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp1, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor};

use super::activation::Activation;
#[cfg(feature = "cuda")]
use super::cuda;
use super::linear::{ColumnSums, Linear};
use super::matrix::{Into, Matrix, MatrixMut, multiply, product};
use super::{contiguous, if_tracked, output, with_values};

/// The update of some columns of a linear's output.
#[derive(Clone, Debug)]
pub struct LoraUpdate {
    /// A, `[r, in]`.
    pub a: Tensor,
    /// B, `[width, r]`.
    pub b: Tensor,
    pub scale: f64,
    /// First of the `width` output columns that the update adds to: a linear may be several of
    /// the model's put together (Q, K and V).
    pub column: usize,
    /// What happens to these columns before that.
    pub map: Option<ColumnMap>,
}

/// y ∘ gain + shift, both `[width]`: DoRA's magnitudes, and biases of an adapter's own.
#[derive(Clone, Debug)]
pub struct ColumnMap {
    pub gain: Tensor,
    pub shift: Tensor,
}

/// The updates of one adapter for some rows of a packed batch.
#[derive(Clone, Debug)]
pub struct RowUpdates {
    pub rows: Range<usize>,
    pub updates: Arc<[LoraUpdate]>,
}

/// `act(x Wᵀ + b + updates)`, where each range of rows has an adapter of its own. Frozen tensors
/// only: the low-rank terms are added in place.
pub fn linear_rows(
    x: &Tensor,
    linear: &Linear,
    rows: Vec<RowUpdates>,
    activation: Activation,
) -> Result<Tensor> {
    let op = LinearRows {
        linear: linear.clone(),
        rows,
        activation,
    };
    x.apply_op1_no_bwd(&op)
}

struct LinearRows {
    linear: Linear,
    rows: Vec<RowUpdates>,
    activation: Activation,
}

impl CustomOp1 for LinearRows {
    fn name(&self) -> &'static str {
        "linear-rows"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let mut y = self.linear.forward(x, layout)?;
        let (rows, input) = layout.shape().dims2()?;
        let out = self.linear.out_features();
        let x = contiguous(x, layout)?;
        RowUpdates::add_all(&self.rows, x, input, &mut y, out)?;
        self.activation.apply(&mut y);
        output(y, (rows, out))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, x: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        cuda::linear_rows((x, layout), &self.linear, &self.rows, self.activation)
    }
}

impl RowUpdates {
    /// Adds the updates of all ranges; `x` is `[rows, input]`, `y` `[rows, out]`.
    pub(super) fn add_all(
        ranges: &[Self],
        x: &[f32],
        input: usize,
        y: &mut [f32],
        out: usize,
    ) -> Result<()> {
        for Self { rows, updates } in ranges {
            let x = &x[rows.start * input..rows.end * input];
            let y = &mut y[rows.start * out..rows.end * out];
            for update in updates.iter() {
                update.add(x, rows.len(), y, out)?;
            }
        }
        Ok(())
    }
}

impl LoraUpdate {
    /// Whether A or B takes part in a backward pass.
    pub fn trains(&self) -> bool {
        self.a.track_op() || self.b.track_op()
    }

    fn add(&self, x: &[f32], rows: usize, y: &mut [f32], out: usize) -> Result<()> {
        let (rank, input) = self.a.dims2()?;
        let (width, _) = self.b.dims2()?;
        if let Some(map) = &self.map {
            map.apply(&mut y[self.column..], out)?;
        }
        let mut h = vec![0f32; rows * rank];
        with_values(&self.a, |a| {
            multiply(
                MatrixMut::new(&mut h, rows, rank, rank),
                Into::Overwrite,
                1.0,
                Matrix::new(x, rows, input, input),
                Matrix::new(a, rank, input, input).transposed(),
            );
            Ok(())
        })?;
        with_values(&self.b, |b| {
            multiply(
                MatrixMut::new(&mut y[self.column..], rows, width, out),
                Into::Accumulate,
                self.scale as f32,
                Matrix::new(&h, rows, rank, rank),
                Matrix::new(b, width, rank, rank).transposed(),
            );
            Ok(())
        })
    }
}

impl ColumnMap {
    /// To the first of every `out` values, as many as the map is wide.
    fn apply(&self, y: &mut [f32], out: usize) -> Result<()> {
        with_values(&self.gain, |gain| {
            with_values(&self.shift, |shift| {
                map_rows(y, out, gain, shift);
                Ok(())
            })
        })
    }
}

/// y ∘ gain + shift for the first values of every `out`.
fn map_rows(y: &mut [f32], out: usize, gain: &[f32], shift: &[f32]) {
    for row in y.chunks_mut(out) {
        for ((y, gain), shift) in row.iter_mut().zip(gain).zip(shift) {
            *y = *y * gain + shift;
        }
    }
}

/// `y` with the updates for the input `x`, of all rows: `[rows, out]`. Frozen tensors only.
pub fn add_updates(y: &Tensor, x: &Tensor, updates: &[LoraUpdate]) -> Result<Tensor> {
    y.apply_op2_no_bwd(x, &AddUpdates(updates))
}

struct AddUpdates<'a>(&'a [LoraUpdate]);

impl CustomOp2 for AddUpdates<'_> {
    fn name(&self) -> &'static str {
        "add-updates"
    }

    fn cpu_fwd(
        &self,
        y: &CpuStorage,
        y_layout: &Layout,
        x: &CpuStorage,
        x_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (rows, out) = y_layout.shape().dims2()?;
        let x = contiguous(x, x_layout)?;
        let mut sum = contiguous(y, y_layout)?.to_vec();
        for update in self.0 {
            update.add(x, rows, &mut sum, out)?;
        }
        output(sum, (rows, out))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        y: &CudaStorage,
        y_layout: &Layout,
        x: &CudaStorage,
        x_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        cuda::add_updates((y, y_layout), (x, x_layout), self.0)
    }
}

/// `y` with `scale · h Bᵀ` added to the columns from `column` on; `y` is `[rows, out]`, `h`
/// `[rows, r]`, `b` `[width, r]`. The part of a trained update behind `h = x Aᵀ`.
pub fn lora_add(y: &Tensor, h: &Tensor, b: &Tensor, scale: f64, column: usize) -> Result<Tensor> {
    y.apply_op3(h, b, LoraAdd { scale, column })
}

/// `y` with the map applied to the columns from `column` on; `y` is `[rows, out]`. The form of a
/// [`ColumnMap`] for tracked tensors.
pub fn map_columns(y: &Tensor, map: &ColumnMap, column: usize) -> Result<Tensor> {
    y.apply_op3(&map.gain, &map.shift, MapColumns { column })
}

struct MapColumns {
    column: usize,
}

impl CustomOp3 for MapColumns {
    fn name(&self) -> &'static str {
        "map-columns"
    }

    fn cpu_fwd(
        &self,
        y: &CpuStorage,
        y_layout: &Layout,
        gain: &CpuStorage,
        gain_layout: &Layout,
        shift: &CpuStorage,
        shift_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (rows, out) = y_layout.shape().dims2()?;
        let mut mapped = contiguous(y, y_layout)?.to_vec();
        let gain = contiguous(gain, gain_layout)?;
        let shift = contiguous(shift, shift_layout)?;
        map_rows(&mut mapped[self.column..], out, gain, shift);
        output(mapped, (rows, out))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        y: &CudaStorage,
        y_layout: &Layout,
        gain: &CudaStorage,
        gain_layout: &Layout,
        shift: &CudaStorage,
        shift_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let (gain, shift) = ((gain, gain_layout), (shift, shift_layout));
        cuda::map_columns((y, y_layout), gain, shift, self.column)
    }

    fn bwd(
        &self,
        y: &Tensor,
        gain: &Tensor,
        shift: &Tensor,
        _mapped: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let width = gain.dims()[0];
        let columns = gradient.narrow(1, self.column, width)?.contiguous()?;
        let dy = if_tracked(y, || {
            let gradient = gradient.contiguous()?;
            let nothing = gain.zeros_like()?;
            let gain = gain.detach();
            gradient.apply_op3_no_bwd(&gain, &nothing, self)
        })?;
        let dgain = if_tracked(gain, || {
            let y = y.narrow(1, self.column, width)?;
            (&columns * y)?.apply_op1_no_bwd(&ColumnSums)
        })?;
        let dshift = if_tracked(shift, || columns.apply_op1_no_bwd(&ColumnSums))?;
        Ok((dy, dgain, dshift))
    }
}

struct LoraAdd {
    scale: f64,
    column: usize,
}

impl CustomOp3 for LoraAdd {
    fn name(&self) -> &'static str {
        "lora-add"
    }

    fn cpu_fwd(
        &self,
        y: &CpuStorage,
        y_layout: &Layout,
        h: &CpuStorage,
        h_layout: &Layout,
        b: &CpuStorage,
        b_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (rows, out) = y_layout.shape().dims2()?;
        let (width, rank) = b_layout.shape().dims2()?;
        let mut sum = contiguous(y, y_layout)?.to_vec();
        multiply(
            MatrixMut::new(&mut sum[self.column..], rows, width, out),
            Into::Accumulate,
            self.scale as f32,
            Matrix::new(contiguous(h, h_layout)?, rows, rank, rank),
            Matrix::new(contiguous(b, b_layout)?, width, rank, rank).transposed(),
        );
        output(sum, (rows, out))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        y: &CudaStorage,
        y_layout: &Layout,
        h: &CudaStorage,
        h_layout: &Layout,
        b: &CudaStorage,
        b_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let (y, h, b) = ((y, y_layout), (h, h_layout), (b, b_layout));
        cuda::lora_add(y, h, b, self.scale as f32, self.column)
    }

    fn bwd(
        &self,
        y: &Tensor,
        h: &Tensor,
        b: &Tensor,
        _sum: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let columns = gradient.narrow(1, self.column, b.dims()[0])?.contiguous()?;
        Ok((
            if_tracked(y, || Ok(gradient.clone()))?,
            if_tracked(h, || product(&columns, false, b, false, self.scale))?,
            if_tracked(b, || product(&columns, true, h, false, self.scale))?,
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::gradient_check::{assert_gradient, random};
    use crate::ops::linear;

    #[test]
    fn backward_agrees_with_finite_differences() {
        let inputs = [random(1, (4, 9)), random(2, (4, 2)), random(3, (3, 2))];
        assert_gradient(&inputs, |t| lora_add(&t[0], &t[1], &t[2], 1.7, 3));
    }

    #[test]
    fn the_map_of_columns_agrees_with_finite_differences() {
        let inputs = [random(1, (4, 9)), random(2, 3), random(3, 3)];
        assert_gradient(&inputs, |t| {
            let map = ColumnMap {
                gain: t[1].clone(),
                shift: t[2].clone(),
            };
            map_columns(&t[0], &map, 5)
        });
    }

    #[test]
    fn each_range_of_rows_gets_its_own_update() {
        let base = Linear {
            weight: random(1, (9, 6)),
            bias: Some(random(2, 9)),
        };
        let x = random(3, (5, 6));
        let update = |seed, column| LoraUpdate {
            a: random(seed, (2, 6)),
            b: random(seed + 1, (3, 2)),
            scale: 0.5,
            column,
            map: None,
        };
        let updates: Arc<[LoraUpdate]> = [update(10, 0), update(20, 6)].into();
        let rows = vec![RowUpdates {
            rows: 2..4,
            updates: updates.clone(),
        }];
        let mixed = linear_rows(&x, &base, rows, Activation::None).unwrap();

        let plain = linear(&x, &base, Activation::None).unwrap();
        let mut adapted = plain.clone();
        for u in updates.iter() {
            let h = x.matmul(&u.a.t().unwrap()).unwrap();
            adapted = lora_add(&adapted, &h, &u.b, u.scale, u.column).unwrap();
        }
        let (mixed, plain, adapted) = (
            mixed.to_vec2::<f32>().unwrap(),
            plain.to_vec2::<f32>().unwrap(),
            adapted.to_vec2::<f32>().unwrap(),
        );
        for row in 0..5 {
            let expected = if (2..4).contains(&row) {
                &adapted
            } else {
                &plain
            };
            for (a, b) in mixed[row].iter().zip(&expected[row]) {
                assert!((a - b).abs() < 1e-5, "row {row}: {a} {b}");
            }
        }
    }

    #[test]
    fn columns_are_mapped_before_the_update_is_added() {
        let base = Linear {
            weight: random(1, (9, 6)),
            bias: Some(random(2, 9)),
        };
        let x = random(3, (2, 6));
        let update = LoraUpdate {
            a: random(4, (2, 6)),
            b: random(5, (3, 2)),
            scale: 0.5,
            column: 3,
            map: Some(ColumnMap {
                gain: random(6, 3),
                shift: random(7, 3),
            }),
        };
        let plain = linear(&x, &base, Activation::None).unwrap();
        let columns = plain.narrow(1, 3, 3).unwrap();
        let map = update.map.clone().unwrap();
        let mapped = columns.broadcast_mul(&map.gain).unwrap();
        let mapped = mapped.broadcast_add(&map.shift).unwrap();
        let h = x.matmul(&update.a.t().unwrap()).unwrap();
        let low_rank = (h.matmul(&update.b.t().unwrap()).unwrap() * update.scale).unwrap();
        let ends = [plain.narrow(1, 0, 3), plain.narrow(1, 6, 3)].map(Result::unwrap);
        let middle = (mapped + low_rank).unwrap();
        let expected = Tensor::cat(&[&ends[0], &middle, &ends[1]], 1).unwrap();
        let expected = expected.to_vec2::<f32>().unwrap().concat();

        let alone = add_updates(&plain, &x, std::slice::from_ref(&update)).unwrap();
        let rows = vec![RowUpdates {
            rows: 0..2,
            updates: [update].into(),
        }];
        let fused = linear_rows(&x, &base, rows, Activation::None).unwrap();
        for found in [alone, fused] {
            for (a, b) in found
                .to_vec2::<f32>()
                .unwrap()
                .concat()
                .iter()
                .zip(&expected)
            {
                assert!((a - b).abs() < 1e-5, "{a} {b}");
            }
        }
    }
}
