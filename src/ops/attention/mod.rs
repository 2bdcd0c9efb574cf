//! softmax(Q Kᵀ / √d + bias) V, within each sequence of a packed batch.

mod positions;
#[cfg(test)]
mod tests;
mod tiles;

use std::ops::Range;

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Tensor};

use super::borders::Borders;
#[cfg(feature = "cuda")]
use super::cuda;
use super::matrix::{Into, Matrix, MatrixMut, multiply};
use super::simd::{exp, max, sum, sum_pairs, vectorize};
use super::{contiguous, if_tracked, output};
use positions::{Content, with_tables};
pub use positions::{Disentangled, PositionTable, Positions, RelativeRows};

/// Where sequences begin, and how heads and relative positions are laid out.
#[derive(Clone, Debug)]
pub struct AttentionShape {
    pub offsets: Borders,
    pub heads: usize,
    /// Factor of all scores that are products: 1/√d, and less where DeBERTa adds several.
    pub scale: f32,
    pub positions: Positions,
}

/// Attention over `qkv`, `[tokens, 3 · hidden]` (Q, K and V side by side): `[tokens, hidden]`.
///
/// `bias`, `[3 · hidden]`, is what the linear that made `qkv` has not added yet.
///
/// `tables` are what the shape's [`Positions`] go by: of all sequences in order, none where there
/// are no positions. Where one takes part in a backward pass it must be the only one.
///
/// # Errors
/// A sequence longer than the positions reach, a table that is too small.
pub fn attention(
    qkv: &Tensor,
    bias: Option<&Tensor>,
    tables: &[PositionTable],
    shape: AttentionShape,
) -> Result<Tensor> {
    match bias {
        Some(bias) if qkv.device().is_cpu() || qkv.track_op() => {
            attend(&qkv.broadcast_add(bias)?, None, tables, shape)
        }
        bias => attend(qkv, bias, tables, shape),
    }
}

fn attend(
    qkv: &Tensor,
    bias: Option<&Tensor>,
    tables: &[PositionTable],
    shape: AttentionShape,
) -> Result<Tensor> {
    if tables.iter().any(|table| table.values.track_op()) {
        let [table] = tables else {
            candle_core::bail!("a position table that trains must be the only one");
        };
        let op = Attention {
            shape,
            bias: None,
            tables: Vec::new(),
        };
        return qkv.apply_op2(&table.values, op);
    }
    let op = Attention {
        shape,
        bias: bias.cloned(),
        tables: tables.to_vec(),
    };
    if qkv.track_op() {
        qkv.apply_op1(op)
    } else {
        qkv.apply_op1_no_bwd(&op)
    }
}

pub(super) struct Attention {
    pub(super) shape: AttentionShape,
    /// In a device's memory only.
    #[cfg_attr(not(feature = "cuda"), expect(dead_code))]
    pub(super) bias: Option<Tensor>,
    /// Frozen tables; one that trains is an argument.
    pub(super) tables: Vec<PositionTable>,
}

impl Attention {
    /// Of `[tokens, 3 · hidden]` in host memory: `[tokens, hidden]`.
    pub(super) fn attend(&self, qkv: &[f32], hidden: usize) -> Result<Vec<f32>> {
        with_tables(&self.tables, self.shape.sequences(), |tables| {
            self.shape.attend(qkv, hidden, tables)
        })
    }

    /// The gradient of `qkv` for that of the result.
    pub(super) fn gradient(&self, qkv: &[f32], dy: &[f32], hidden: usize) -> Result<Vec<f32>> {
        with_tables(&self.tables, self.shape.sequences(), |tables| {
            self.shape.qkv_gradient(qkv, dy, hidden, tables)
        })
    }
}

/// One head of one sequence.
struct Head<'a> {
    /// First token and number of tokens.
    start: usize,
    len: usize,
    head: usize,
    heads: usize,
    /// Columns of Q, K and V each.
    width: usize,
    q: Matrix<'a>,
    k: Matrix<'a>,
    v: Matrix<'a>,
}

impl AttentionShape {
    fn sequences(&self) -> usize {
        self.offsets.len().saturating_sub(1)
    }

    /// Calls `f` for each head of each sequence, with the sequence's table.
    fn for_each_head<'a>(
        &self,
        qkv: &'a [f32],
        hidden: usize,
        tables: &[&[f32]],
        mut f: impl FnMut(Head<'a>, &[f32]),
    ) -> Result<()> {
        let columns = self.positions.columns(hidden, self.heads);
        for (window, table) in self.offsets.windows(2).zip(tables) {
            let tokens = window[0]..window[1];
            if tokens.is_empty() {
                continue;
            }
            self.positions.check(tokens.len(), table.len(), columns)?;
            for head in 0..self.heads {
                f(self.head(qkv, hidden, tokens.clone(), head), table);
            }
        }
        Ok(())
    }

    fn head<'a>(
        &self,
        qkv: &'a [f32],
        hidden: usize,
        tokens: Range<usize>,
        head: usize,
    ) -> Head<'a> {
        let (start, len) = (tokens.start, tokens.len());
        let width = hidden / self.heads;
        let part = |which: usize| {
            let first = start * 3 * hidden + which * hidden + head * width;
            Matrix::new(&qkv[first..], len, width, 3 * hidden)
        };
        Head {
            start,
            len,
            head,
            heads: self.heads,
            width,
            q: part(0),
            k: part(1),
            v: part(2),
        }
    }

    /// Softmax probabilities `[len, len]` of a head.
    fn probabilities(&self, head: &Head<'_>, table: &[f32], p: &mut [f32], scratch: &mut Vec<f32>) {
        let len = head.len;
        let target = MatrixMut::new(p, len, len, len);
        let keys = head.k.transposed();
        multiply(target, Into::Overwrite, self.scale, head.q, keys);
        self.positions
            .add_scores(head, table, self.scale, p, len, scratch);
        vectorize(
            #[inline(always)]
            || p.chunks_exact_mut(len).for_each(softmax),
        );
    }

    fn dims(&self, layout: &Layout) -> Result<(usize, usize)> {
        let (tokens, three_hidden) = layout.shape().dims2()?;
        if self.offsets.last() != Some(&tokens) || !three_hidden.is_multiple_of(3 * self.heads) {
            candle_core::bail!(
                "attention over {:?} does not fit {} heads and {:?} tokens",
                layout.dims(),
                self.heads,
                self.offsets.last()
            );
        }
        Ok((tokens, three_hidden / 3))
    }

    /// Whether the tables fit the sequences; what the kernels of a GPU do not look at.
    #[cfg(feature = "cuda")]
    pub(super) fn check_tables(&self, hidden: usize, tables: &[PositionTable]) -> Result<()> {
        let columns = self.positions.columns(hidden, self.heads);
        let mut sequences = self.offsets.windows(2);
        for table in tables {
            for window in sequences.by_ref().take(table.sequences) {
                let values = table.values.elem_count();
                self.positions
                    .check(window[1] - window[0], values, columns)?;
            }
        }
        let (tabled, count) = (tables.iter().map(|t| t.sequences).sum(), self.sequences());
        if !matches!(self.positions, Positions::None) && usize::ne(&tabled, &count) {
            candle_core::bail!("position tables of {tabled} sequences for {count}");
        }
        Ok(())
    }

    fn longest(&self) -> usize {
        self.offsets
            .windows(2)
            .map(|w| w[1] - w[0])
            .max()
            .unwrap_or(0)
    }

    fn forward(
        &self,
        qkv: &CpuStorage,
        layout: &Layout,
        tables: &[&[f32]],
    ) -> Result<(CpuStorage, Shape)> {
        let (tokens, hidden) = self.dims(layout)?;
        let out = self.attend(contiguous(qkv, layout)?, hidden, tables)?;
        output(out, (tokens, hidden))
    }

    /// Attention over `qkv`, `[tokens, 3 · hidden]`: `[tokens, hidden]`.
    fn attend(&self, qkv: &[f32], hidden: usize, tables: &[&[f32]]) -> Result<Vec<f32>> {
        if let Some(kernel) = tiles::kernel(hidden / self.heads) {
            return tiles::forward(kernel, self, qkv, hidden, tables);
        }
        let longest = self.longest();
        let mut scores = vec![0f32; longest * longest];
        let mut scratch = Vec::new();
        let mut out = vec![0f32; qkv.len() / 3];
        self.for_each_head(qkv, hidden, tables, |head, table| {
            let (len, width) = (head.len, head.width);
            let p = &mut scores[..len * len];
            self.probabilities(&head, table, p, &mut scratch);
            let first = head.start * hidden + head.head * width;
            multiply(
                MatrixMut::new(&mut out[first..], len, width, hidden),
                Into::Overwrite,
                1.0,
                Matrix::new(p, len, len, len),
                head.v,
            );
        })?;
        Ok(out)
    }

    /// dV = Pᵀ dO, dQ = s · dS K and dK = s · dSᵀ Q, and what goes through the positions: of
    /// `gradient`, `[tokens, hidden]`, that of `qkv`, `[tokens, 3 · hidden]`.
    fn qkv_gradient(
        &self,
        qkv: &[f32],
        gradient: &[f32],
        hidden: usize,
        tables: &[&[f32]],
    ) -> Result<Vec<f32>> {
        let mut dqkv = vec![0f32; qkv.len()];
        self.for_each_score_gradient(qkv, hidden, tables, gradient, |found, scratch| {
            let ScoreGradient {
                head,
                table,
                p,
                ds,
                gradient,
            } = found;
            let (len, width) = (head.len, head.width);
            let mut write = |which: usize, into, scale, a: Matrix<'_>, b: Matrix<'_>| {
                let first = head.start * 3 * hidden + which * hidden + head.head * width;
                let target = MatrixMut::new(&mut dqkv[first..], len, width, 3 * hidden);
                multiply(target, into, scale, a, b);
            };
            let p = Matrix::new(p, len, len, len);
            let of_scores = Matrix::new(ds, len, len, len);
            write(0, Into::Overwrite, self.scale, of_scores, head.k);
            let transposed = of_scores.transposed();
            write(1, Into::Overwrite, self.scale, transposed, head.q);
            write(2, Into::Overwrite, 1.0, p.transposed(), gradient);
            self.positions.add_content_gradients(
                &head,
                table,
                ds,
                scratch,
                |content, by_row: Matrix<'_>, position: Matrix<'_>| {
                    let which = match content {
                        Content::Query => 0,
                        Content::Key => 1,
                    };
                    write(which, Into::Accumulate, self.scale, by_row, position);
                },
            );
        })?;
        Ok(dqkv)
    }

    /// For each head of each sequence: computes P again and, for dO, the gradient of the scores,
    /// dS = P ∘ (dP − Σⱼ dP ∘ P) with dP = dO Vᵀ.
    fn for_each_score_gradient<'a>(
        &self,
        qkv: &'a [f32],
        hidden: usize,
        tables: &[&[f32]],
        gradient: &[f32],
        mut f: impl FnMut(ScoreGradient<'a, '_>, &mut Vec<f32>),
    ) -> Result<()> {
        let longest = self.longest();
        let mut p = vec![0f32; longest * longest];
        let mut ds = vec![0f32; longest * longest];
        let mut scratch = Vec::new();
        self.for_each_head(qkv, hidden, tables, |head, table| {
            let len = head.len;
            let (p, ds) = (&mut p[..len * len], &mut ds[..len * len]);
            self.probabilities(&head, table, p, &mut scratch);
            let first = head.start * hidden + head.head * head.width;
            let gradient = Matrix::new(&gradient[first..], len, head.width, hidden);
            let target = MatrixMut::new(ds, len, len, len);
            multiply(target, Into::Overwrite, 1.0, gradient, head.v.transposed());
            vectorize(
                #[inline(always)]
                || {
                    for (ds, p) in ds.chunks_exact_mut(len).zip(p.chunks_exact(len)) {
                        let dot = sum_pairs(ds, p, |ds, p| ds * p);
                        for (ds, p) in ds.iter_mut().zip(p) {
                            *ds = p * (*ds - dot);
                        }
                    }
                },
            );
            let found = ScoreGradient {
                head,
                table,
                p,
                ds,
                gradient,
            };
            f(found, &mut scratch);
        })
    }
}

/// What the backward pass of a head goes by.
struct ScoreGradient<'a, 'b> {
    head: Head<'a>,
    table: &'b [f32],
    /// Probabilities, `[len, len]`.
    p: &'b [f32],
    /// Gradient of the scores, `[len, len]`.
    ds: &'b [f32],
    /// Gradient of the head's output, `[len, width]`.
    gradient: Matrix<'b>,
}

#[inline(always)]
fn softmax(row: &mut [f32]) {
    let max = max(row);
    for x in row.iter_mut() {
        *x = exp(*x - max);
    }
    let scale = 1.0 / sum(row, |x| x);
    for x in row {
        *x *= scale;
    }
}

impl CustomOp1 for Attention {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn cpu_fwd(&self, qkv: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        with_tables(&self.tables, self.shape.sequences(), |tables| {
            self.shape.forward(qkv, layout, tables)
        })
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, qkv: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        let bias = self.bias.as_ref();
        cuda::attention((qkv, layout), bias, &self.shape, &self.tables)
    }

    fn bwd(&self, qkv: &Tensor, _out: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        if_tracked(qkv, || {
            qkv_gradient(&self.shape, self.tables.clone(), qkv, gradient)
        })
    }
}

impl CustomOp2 for Attention {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn cpu_fwd(
        &self,
        qkv: &CpuStorage,
        layout: &Layout,
        table: &CpuStorage,
        table_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let table = contiguous(table, table_layout)?;
        let tables = vec![table; self.shape.sequences()];
        self.shape.forward(qkv, layout, &tables)
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        qkv: &CudaStorage,
        layout: &Layout,
        table: &CudaStorage,
        table_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let table = (table, table_layout);
        cuda::attention_by_table((qkv, layout), table, &self.shape)
    }

    fn bwd(
        &self,
        qkv: &Tensor,
        table: &Tensor,
        _out: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let tables = vec![PositionTable {
            sequences: self.shape.sequences(),
            values: table.clone(),
        }];
        let dqkv = if_tracked(qkv, || {
            qkv_gradient(&self.shape, tables.clone(), qkv, gradient)
        })?;
        let dtable = if_tracked(table, || {
            let op = TableGradient {
                shape: self.shape.clone(),
                tables,
            };
            qkv.apply_op2_no_bwd(&gradient.contiguous()?, &op)
        })?;
        Ok((dqkv, dtable))
    }
}

fn qkv_gradient(
    shape: &AttentionShape,
    tables: Vec<PositionTable>,
    qkv: &Tensor,
    gradient: &Tensor,
) -> Result<Tensor> {
    let op = QkvGradient {
        shape: shape.clone(),
        tables,
    };
    qkv.apply_op2_no_bwd(&gradient.contiguous()?, &op)
}

/// See [`AttentionShape::qkv_gradient`].
struct QkvGradient {
    shape: AttentionShape,
    tables: Vec<PositionTable>,
}

impl CustomOp2 for QkvGradient {
    fn name(&self) -> &'static str {
        "attention-backward"
    }

    fn cpu_fwd(
        &self,
        qkv: &CpuStorage,
        layout: &Layout,
        gradient: &CpuStorage,
        gradient_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (tokens, hidden) = self.shape.dims(layout)?;
        let qkv = contiguous(qkv, layout)?;
        let gradient = contiguous(gradient, gradient_layout)?;
        let dqkv = with_tables(&self.tables, self.shape.sequences(), |tables| {
            self.shape.qkv_gradient(qkv, gradient, hidden, tables)
        })?;
        output(dqkv, (tokens, 3 * hidden))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        qkv: &CudaStorage,
        layout: &Layout,
        gradient: &CudaStorage,
        gradient_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let gradient = (gradient, gradient_layout);
        cuda::attention_gradient((qkv, layout), gradient, &self.shape, &self.tables)
    }
}

/// The gradient of the one table of a batch, in its shape.
struct TableGradient {
    shape: AttentionShape,
    tables: Vec<PositionTable>,
}

impl CustomOp2 for TableGradient {
    fn name(&self) -> &'static str {
        "attention-positions-backward"
    }

    fn cpu_fwd(
        &self,
        qkv: &CpuStorage,
        layout: &Layout,
        gradient: &CpuStorage,
        gradient_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let shape = &self.shape;
        let (_, hidden) = shape.dims(layout)?;
        let qkv = contiguous(qkv, layout)?;
        let gradient = contiguous(gradient, gradient_layout)?;
        let Some(table) = self.tables.first() else {
            candle_core::bail!("no position table");
        };
        let mut dtable = vec![0f32; table.values.elem_count()];
        with_tables(&self.tables, shape.sequences(), |tables| {
            shape.for_each_score_gradient(qkv, hidden, tables, gradient, |found, scratch| {
                shape.positions.add_table_gradient(
                    &found.head,
                    shape.scale,
                    found.ds,
                    &mut dtable,
                    scratch,
                );
            })
        })?;
        output(dtable, table.values.shape())
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        qkv: &CudaStorage,
        layout: &Layout,
        gradient: &CudaStorage,
        gradient_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let gradient = (gradient, gradient_layout);
        cuda::attention_table_gradient((qkv, layout), gradient, &self.shape, &self.tables)
    }
}
