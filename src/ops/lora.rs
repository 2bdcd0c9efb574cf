//! Low-rank updates of a linear's output (Hu et al., arXiv 2106.09685): y += s · (x Aᵀ) Bᵀ.

use std::ops::Range;
use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, CustomOp3, Layout, Result, Shape, Tensor};

use super::activation::Activation;
use super::linear::Linear;
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
        for RowUpdates { rows, updates } in &self.rows {
            let x = &x[rows.start * input..rows.end * input];
            let y = &mut y[rows.start * out..rows.end * out];
            for update in updates.iter() {
                update.add(x, rows.len(), y, out)?;
            }
        }
        self.activation.apply(&mut y);
        output(y, (rows, out))
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

/// `y` with `scale · h Bᵀ` added to the columns from `column` on; `y` is `[rows, out]`, `h`
/// `[rows, r]`, `b` `[width, r]`. The part of a trained update behind `h = x Aᵀ`.
pub fn lora_add(y: &Tensor, h: &Tensor, b: &Tensor, scale: f64, column: usize) -> Result<Tensor> {
    y.apply_op3(h, b, LoraAdd { scale, column })
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
}
