//! A frozen linear with the LoRA that trains on it, forward and backward on rows in host memory.

use std::sync::Arc;

use candle_core::Result;

use crate::ops::FrozenBf16;
use crate::ops::dropout::Dropout;
use crate::ops::linear::Linear;
use crate::ops::matrix::{Into, Matrix, MatrixMut, multiply};
use crate::ops::with_values;

/// Rows that pass through the low-rank matrices at a time: few enough to stay in the cache.
const BLOCK_ROWS: usize = 64;

/// A linear of a layer and where its LoRA lies among the layer's parameters.
///
/// The A of all updates follow each other there, `[updates · r, in]`, and so do the B behind them.
pub(super) struct AdaptedLinear {
    pub(super) linear: Linear,
    pub(super) bf16: Option<Arc<FrozenBf16>>,
    pub(super) dropout: Option<Dropout>,
    /// Of each update the same.
    pub(super) rank: usize,
    /// First of the parameters.
    pub(super) first: usize,
    pub(super) updates: Vec<Columns>,
    /// Whether the A train; the B do.
    pub(super) trains_a: bool,
}

/// The columns that an update adds to.
#[derive(Clone, Copy, Debug)]
pub(super) struct Columns {
    pub(super) first: usize,
    pub(super) width: usize,
    pub(super) scale: f32,
}

/// What a linear was given, for its backward pass.
pub(super) struct Given<'a> {
    /// `[rows, in]`
    x: &'a [f32],
    /// x Aᵀ of all updates, `[rows, updates · r]`.
    h: &'a [f32],
    parameters: &'a [f32],
}

impl<'a> Given<'a> {
    pub(super) fn new(x: &'a [f32], h: &'a [f32], parameters: &'a [f32]) -> Self {
        Self { x, h, parameters }
    }
}

impl AdaptedLinear {
    fn input(&self) -> usize {
        self.linear.in_features()
    }

    fn out(&self) -> usize {
        self.linear.out_features()
    }

    /// Columns of `h`.
    fn ranks(&self) -> usize {
        self.rank * self.updates.len()
    }

    pub(super) fn is_adapted(&self) -> bool {
        !self.updates.is_empty()
    }

    /// Number of parameters.
    pub(super) fn parameters(&self) -> usize {
        let widths: usize = self.updates.iter().map(|columns| columns.width).sum();
        self.ranks() * self.input() + self.rank * widths
    }

    /// All A, `[updates · r, in]`, and where each B, `[width, r]`, begins.
    fn places(&self) -> (usize, impl Iterator<Item = (usize, Columns)>) {
        let mut next = self.first + self.ranks() * self.input();
        let of_b = self.updates.iter().map(move |columns| {
            let start = next;
            next += columns.width * self.rank;
            (start, *columns)
        });
        (self.first, of_b)
    }

    fn a<'a>(&self, parameters: &'a [f32]) -> Matrix<'a> {
        let (first, _) = self.places();
        let (ranks, input) = (self.ranks(), self.input());
        Matrix::new(&parameters[first..], ranks, input, input)
    }

    /// `x Wᵀ + b + Σ s · (drop(x) Aᵀ) Bᵀ`, `[rows, out]`, and `h = drop(x) Aᵀ`.
    pub(super) fn forward(&self, x: &[f32], parameters: &[f32]) -> Result<(Vec<f32>, Vec<f32>)> {
        let mut y = match &self.bf16 {
            Some(bf16) => bf16.forward(x),
            None => self.linear.forward_rows(x)?,
        };
        if !self.is_adapted() {
            return Ok((y, Vec::new()));
        }
        let (input, out, ranks) = (self.input(), self.out(), self.ranks());
        let rows = x.len() / input;
        let mut h = vec![0f32; rows * ranks];
        let a = self.a(parameters).transposed();
        let blocks = x.chunks(BLOCK_ROWS * input);
        for (i, (x, h)) in blocks.zip(h.chunks_mut(BLOCK_ROWS * ranks)).enumerate() {
            let rows = x.len() / input;
            self.dropped(x, i * BLOCK_ROWS, |x| {
                let target = MatrixMut::new(h, rows, ranks, ranks);
                let x = Matrix::new(x, rows, input, input);
                multiply(target, Into::Overwrite, 1.0, x, a);
            });
        }
        let (_, places) = self.places();
        for (i, (place, columns)) in places.enumerate() {
            let b = Matrix::new(&parameters[place..], columns.width, self.rank, self.rank);
            multiply(
                MatrixMut::new(&mut y[columns.first..], rows, columns.width, out),
                Into::Accumulate,
                columns.scale,
                Matrix::new(&h[i * self.rank..], rows, self.rank, ranks),
                b.transposed(),
            );
        }
        Ok((y, h))
    }

    /// Writes the gradients of the parameters into `dparameters`, which are the layer's, and that
    /// of the input, if it is wanted, into or onto `dx`, `[rows, in]`. `dy` is `[rows, out]`.
    pub(super) fn backward(
        &self,
        dy: &[f32],
        given: &Given<'_>,
        dparameters: &mut [f32],
        dx: Option<(&mut [f32], Into)>,
    ) -> Result<()> {
        let (input, ranks) = (self.input(), self.ranks());
        let dh = self.low_rank_gradients(dy, given, dparameters);
        let dx = match dx {
            Some((dx, into)) => {
                self.frozen_input_gradient(dy, dx, into)?;
                Some(dx)
            }
            None => None,
        };
        if !self.is_adapted() {
            return Ok(());
        }
        if self.trains_a {
            let (first, _) = self.places();
            let da = &mut dparameters[first..first + ranks * input];
            for (i, x) in given.x.chunks(BLOCK_ROWS * input).enumerate() {
                let rows = x.len() / input;
                let dh = Matrix::new(&dh[i * BLOCK_ROWS * ranks..], rows, ranks, ranks);
                self.dropped(x, i * BLOCK_ROWS, |x| {
                    let target = MatrixMut::new(da, ranks, input, input);
                    let x = Matrix::new(x, rows, input, input);
                    multiply(target, Into::Accumulate, 1.0, dh.transposed(), x);
                });
            }
        }
        if let Some(dx) = dx {
            self.add_low_rank_input_gradient(&dh, given.parameters, dx);
        }
        Ok(())
    }

    /// `dy W`, `[rows, in]`, into or onto `dx`.
    fn frozen_input_gradient(&self, dy: &[f32], dx: &mut [f32], into: Into) -> Result<()> {
        if let Some(bf16) = &self.bf16 {
            bf16.input_gradient(dy, dx, into);
            return Ok(());
        }
        let (input, out) = (self.input(), self.out());
        let rows = dy.len() / out;
        with_values(&self.linear.weight, |weight| {
            let weight = Matrix::new(weight, out, input, input);
            let target = MatrixMut::new(dx, rows, input, input);
            multiply(target, into, 1.0, Matrix::new(dy, rows, out, out), weight);
            Ok(())
        })
    }

    /// dB = s · dyᵀ h for each update, into `dparameters`; and dh = s · dy B.
    fn low_rank_gradients(
        &self,
        dy: &[f32],
        given: &Given<'_>,
        dparameters: &mut [f32],
    ) -> Vec<f32> {
        let (out, ranks) = (self.out(), self.ranks());
        let rows = dy.len() / out;
        let mut dh = vec![0f32; rows * ranks];
        let (_, places) = self.places();
        for (i, (place, columns)) in places.enumerate() {
            let Columns {
                first,
                width,
                scale,
            } = columns;
            let dy = Matrix::new(&dy[first..], rows, width, out);
            let b = Matrix::new(&given.parameters[place..], width, self.rank, self.rank);
            let dh = MatrixMut::new(&mut dh[i * self.rank..], rows, self.rank, ranks);
            multiply(dh, Into::Overwrite, scale, dy, b);
            let h = Matrix::new(&given.h[i * self.rank..], rows, self.rank, ranks);
            let db = MatrixMut::new(&mut dparameters[place..], width, self.rank, self.rank);
            multiply(db, Into::Overwrite, scale, dy.transposed(), h);
        }
        dh
    }

    /// Adds what comes through the low-rank matrices, dh A where the input was not dropped.
    fn add_low_rank_input_gradient(&self, dh: &[f32], parameters: &[f32], dx: &mut [f32]) {
        let (input, ranks) = (self.input(), self.ranks());
        let a = self.a(parameters);
        let mut part = Vec::new();
        for (i, dx) in dx.chunks_mut(BLOCK_ROWS * input).enumerate() {
            let rows = dx.len() / input;
            let dh = Matrix::new(&dh[i * BLOCK_ROWS * ranks..], rows, ranks, ranks);
            let Some(dropout) = self.dropout else {
                let target = MatrixMut::new(dx, rows, input, input);
                multiply(target, Into::Accumulate, 1.0, dh, a);
                continue;
            };
            part.resize(dx.len(), 0f32);
            let target = MatrixMut::new(&mut part, rows, input, input);
            multiply(target, Into::Overwrite, 1.0, dh, a);
            let dropout = dropout.further_on(i * BLOCK_ROWS);
            dropout.drop_from(&mut part, input);
            for (dx, part) in dx.iter_mut().zip(&part) {
                *dx += part;
            }
        }
    }

    /// Calls `f` with a block of rows as LoRA reads them, `first` the first of them.
    fn dropped(&self, x: &[f32], first: usize, f: impl FnOnce(&[f32])) {
        match self.dropout {
            Some(dropout) => {
                let mut x = x.to_vec();
                dropout.further_on(first).drop_from(&mut x, self.input());
                f(&x);
            }
            None => f(x),
        }
    }
}
