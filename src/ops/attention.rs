//! softmax(Q Kᵀ / √d + bias) V, within each sequence of a packed batch.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Tensor};

use super::matrix::{Into, Matrix, MatrixMut, multiply};
use super::simd::{exp, sum, vectorize};
use super::{contiguous, if_tracked, output, with_values};

/// Where sequences begin, and how heads and relative positions are laid out.
#[derive(Clone, Debug)]
pub struct AttentionShape {
    /// Sequence borders, `[sequences + 1]`.
    pub offsets: Arc<[usize]>,
    pub heads: usize,
    /// Relative positions j − i become columns of the bias; absent where a model has no bias.
    pub buckets: Option<RelativeBuckets>,
}

/// The bucket of every relative position j − i in (−limit, limit).
#[derive(Clone, Debug)]
pub struct RelativeBuckets {
    /// `bucket_of[j − i + limit − 1]`.
    pub bucket_of: Arc<[u32]>,
    pub limit: usize,
}

impl RelativeBuckets {
    fn bucket(&self, i: usize, j: usize) -> usize {
        self.bucket_of[self.limit - 1 + j - i] as usize
    }
}

/// Attention over `qkv`, `[tokens, 3 · hidden]` (Q, K and V side by side): `[tokens, hidden]`.
///
/// `bias` is the relative bias by bucket, `[buckets, heads]`, for a shape with buckets.
///
/// # Errors
/// A sequence longer than the buckets reach.
pub fn attention(qkv: &Tensor, bias: Option<&Tensor>, shape: AttentionShape) -> Result<Tensor> {
    match bias {
        Some(bias) if bias.track_op() => qkv.apply_op2(bias, Attention { shape, bias: None }),
        _ => {
            let op = Attention {
                shape,
                bias: bias.cloned(),
            };
            if qkv.track_op() {
                qkv.apply_op1(op)
            } else {
                qkv.apply_op1_no_bwd(&op)
            }
        }
    }
}

struct Attention {
    shape: AttentionShape,
    /// A frozen bias; one that trains is an argument.
    bias: Option<Tensor>,
}

/// One head of one sequence.
struct Head<'a> {
    /// First token and number of tokens.
    start: usize,
    len: usize,
    head: usize,
    q: Matrix<'a>,
    k: Matrix<'a>,
    v: Matrix<'a>,
}

impl AttentionShape {
    /// Calls `f` for each head of each sequence.
    fn for_each_head<'a>(
        &self,
        qkv: &'a [f32],
        hidden: usize,
        mut f: impl FnMut(Head<'a>),
    ) -> Result<()> {
        let width = hidden / self.heads;
        for window in self.offsets.windows(2) {
            let (start, len) = (window[0], window[1] - window[0]);
            if let Some(buckets) = &self.buckets
                && len > buckets.limit
            {
                candle_core::bail!("a sequence of {len} tokens exceeds {}", buckets.limit);
            }
            for head in 0..self.heads {
                let part = |which: usize| {
                    let first = start * 3 * hidden + which * hidden + head * width;
                    Matrix::new(&qkv[first..], len, width, 3 * hidden)
                };
                f(Head {
                    start,
                    len,
                    head,
                    q: part(0),
                    k: part(1),
                    v: part(2),
                });
            }
        }
        Ok(())
    }

    /// Softmax probabilities `[len, len]` of a head.
    fn probabilities(&self, head: &Head<'_>, bias: Option<&[f32]>, width: usize, p: &mut [f32]) {
        let len = head.len;
        let scale = 1.0 / (width as f32).sqrt();
        let target = MatrixMut::new(p, len, len, len);
        multiply(target, Into::Overwrite, scale, head.q, head.k.transposed());
        if let (Some(bias), Some(buckets)) = (bias, &self.buckets) {
            for (i, row) in p.chunks_exact_mut(len).enumerate() {
                for (j, score) in row.iter_mut().enumerate() {
                    *score += bias[buckets.bucket(i, j) * self.heads + head.head];
                }
            }
        }
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
        bias: Option<&[f32]>,
    ) -> Result<(CpuStorage, Shape)> {
        let (tokens, hidden) = self.dims(layout)?;
        let qkv = contiguous(qkv, layout)?;
        let width = hidden / self.heads;
        let longest = self.longest();
        let mut scores = vec![0f32; longest * longest];
        let mut out = vec![0f32; tokens * hidden];
        self.for_each_head(qkv, hidden, |head| {
            let len = head.len;
            let p = &mut scores[..len * len];
            self.probabilities(&head, bias, width, p);
            let first = head.start * hidden + head.head * width;
            multiply(
                MatrixMut::new(&mut out[first..], len, width, hidden),
                Into::Overwrite,
                1.0,
                Matrix::new(p, len, len, len),
                head.v,
            );
        })?;
        output(out, (tokens, hidden))
    }
}

#[inline(always)]
fn softmax(row: &mut [f32]) {
    let max = row.iter().fold(f32::NEG_INFINITY, |m, x| m.max(*x));
    row.iter_mut().for_each(|x| *x = exp(*x - max));
    let scale = 1.0 / sum(row.len(), |i| row[i]);
    row.iter_mut().for_each(|x| *x *= scale);
}

fn with_bias<R>(bias: Option<&Tensor>, f: impl FnOnce(Option<&[f32]>) -> Result<R>) -> Result<R> {
    match bias {
        Some(bias) => with_values(bias, |bias| f(Some(bias))),
        None => f(None),
    }
}

impl CustomOp1 for Attention {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn cpu_fwd(&self, qkv: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        with_bias(self.bias.as_ref(), |bias| {
            self.shape.forward(qkv, layout, bias)
        })
    }

    fn bwd(&self, qkv: &Tensor, _out: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        if_tracked(qkv, || {
            qkv_gradient(&self.shape, self.bias.as_ref(), qkv, gradient)
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
        bias: &CpuStorage,
        bias_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let bias = contiguous(bias, bias_layout)?;
        self.shape.forward(qkv, layout, Some(bias))
    }

    fn bwd(
        &self,
        qkv: &Tensor,
        bias: &Tensor,
        _out: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let dqkv = if_tracked(qkv, || qkv_gradient(&self.shape, Some(bias), qkv, gradient))?;
        let dbias = if_tracked(bias, || {
            let op = BiasGradient {
                shape: self.shape.clone(),
                bias: bias.clone(),
            };
            qkv.apply_op2_no_bwd(&gradient.contiguous()?, &op)
        })?;
        Ok((dqkv, dbias))
    }
}

fn qkv_gradient(
    shape: &AttentionShape,
    bias: Option<&Tensor>,
    qkv: &Tensor,
    gradient: &Tensor,
) -> Result<Tensor> {
    let op = QkvGradient {
        shape: shape.clone(),
        bias: bias.cloned(),
    };
    qkv.apply_op2_no_bwd(&gradient.contiguous()?, &op)
}

/// Computes the probabilities P again, then for dO: dV = Pᵀ dO, dP = dO Vᵀ,
/// dS = P ∘ (dP − Σⱼ dP ∘ P), dQ = dS K / √d, dK = dSᵀ Q / √d.
struct QkvGradient {
    shape: AttentionShape,
    bias: Option<Tensor>,
}

impl AttentionShape {
    /// Writes P into `p` and dS into `ds`, both `[len, len]`.
    fn score_gradient(
        &self,
        head: &Head<'_>,
        bias: Option<&[f32]>,
        gradient: Matrix<'_>,
        width: usize,
        p: &mut [f32],
        ds: &mut [f32],
    ) {
        let len = head.len;
        self.probabilities(head, bias, width, p);
        let target = MatrixMut::new(ds, len, len, len);
        multiply(target, Into::Overwrite, 1.0, gradient, head.v.transposed());
        vectorize(
            #[inline(always)]
            || {
                for (ds, p) in ds.chunks_exact_mut(len).zip(p.chunks_exact(len)) {
                    let dot = sum(len, |j| ds[j] * p[j]);
                    for (ds, p) in ds.iter_mut().zip(p) {
                        *ds = p * (*ds - dot);
                    }
                }
            },
        );
    }
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
        let width = hidden / self.shape.heads;
        let scale = 1.0 / (width as f32).sqrt();
        let longest = self.shape.longest();
        let mut p = vec![0f32; longest * longest];
        let mut ds = vec![0f32; longest * longest];
        let mut dqkv = vec![0f32; tokens * 3 * hidden];
        with_bias(self.bias.as_ref(), |bias| {
            self.shape.for_each_head(qkv, hidden, |head| {
                let len = head.len;
                let (p, ds) = (&mut p[..len * len], &mut ds[..len * len]);
                let first = head.start * hidden + head.head * width;
                let gradient = Matrix::new(&gradient[first..], len, width, hidden);
                self.shape
                    .score_gradient(&head, bias, gradient, width, p, ds);
                let p = Matrix::new(p, len, len, len);
                let ds = Matrix::new(ds, len, len, len);
                let mut write = |which: usize, scale, a, b| {
                    let first = head.start * 3 * hidden + which * hidden + head.head * width;
                    let target = MatrixMut::new(&mut dqkv[first..], len, width, 3 * hidden);
                    multiply(target, Into::Overwrite, scale, a, b);
                };
                write(0, scale, ds, head.k);
                write(1, scale, ds.transposed(), head.q);
                write(2, 1.0, p.transposed(), gradient);
            })
        })?;
        output(dqkv, (tokens, 3 * hidden))
    }
}

/// Sums dS by bucket and head: `[buckets, heads]`.
struct BiasGradient {
    shape: AttentionShape,
    bias: Tensor,
}

impl CustomOp2 for BiasGradient {
    fn name(&self) -> &'static str {
        "attention-bias-backward"
    }

    fn cpu_fwd(
        &self,
        qkv: &CpuStorage,
        layout: &Layout,
        gradient: &CpuStorage,
        gradient_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let Some(buckets) = &self.shape.buckets else {
            candle_core::bail!("a bias without buckets has no gradient");
        };
        let (_, hidden) = self.shape.dims(layout)?;
        let qkv = contiguous(qkv, layout)?;
        let gradient = contiguous(gradient, gradient_layout)?;
        let heads = self.shape.heads;
        let width = hidden / heads;
        let longest = self.shape.longest();
        let mut p = vec![0f32; longest * longest];
        let mut ds = vec![0f32; longest * longest];
        let mut dbias = vec![0f32; self.bias.elem_count()];
        with_values(&self.bias, |bias| {
            self.shape.for_each_head(qkv, hidden, |head| {
                let len = head.len;
                let (p, ds) = (&mut p[..len * len], &mut ds[..len * len]);
                let first = head.start * hidden + head.head * width;
                let gradient = Matrix::new(&gradient[first..], len, width, hidden);
                self.shape
                    .score_gradient(&head, Some(bias), gradient, width, p, ds);
                for i in 0..len {
                    for j in 0..len {
                        dbias[buckets.bucket(i, j) * heads + head.head] += ds[i * len + j];
                    }
                }
            })
        })?;
        output(dbias, self.bias.shape())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::gradient_check::{assert_gradient, random};

    fn shape(offsets: &[usize], buckets: bool) -> AttentionShape {
        AttentionShape {
            offsets: offsets.into(),
            heads: 2,
            buckets: buckets.then(|| RelativeBuckets {
                bucket_of: (0..9).map(|d: u32| d.min(5)).collect::<Vec<_>>().into(),
                limit: 5,
            }),
        }
    }

    #[test]
    fn backward_agrees_with_finite_differences() {
        let qkv = random(1, (8, 3 * 6));
        let bias = random(2, (6, 2));
        let offsets = [0, 3, 4, 8];
        assert_gradient(std::slice::from_ref(&qkv), |t| {
            attention(&t[0], None, shape(&offsets, false))
        });
        assert_gradient(std::slice::from_ref(&qkv), |t| {
            attention(&t[0], Some(&bias), shape(&offsets, true))
        });
        assert_gradient(&[qkv, bias], |t| {
            attention(&t[0], Some(&t[1]), shape(&offsets, true))
        });
    }

    #[test]
    fn a_sequence_does_not_see_its_neighbours() {
        let qkv = random(1, (8, 18));
        let bias = random(2, (6, 2));
        let together = attention(&qkv, Some(&bias), shape(&[0, 3, 8], true)).unwrap();
        let alone = qkv.narrow(0, 3, 5).unwrap().contiguous().unwrap();
        let alone = attention(&alone, Some(&bias), shape(&[0, 5], true)).unwrap();
        assert_eq!(
            together.narrow(0, 3, 5).unwrap().to_vec2::<f32>().unwrap(),
            alone.to_vec2::<f32>().unwrap()
        );
    }

    #[test]
    fn equal_keys_average_the_values() {
        let mut rows = vec![[0f32; 18]; 4];
        for (i, row) in rows.iter_mut().enumerate() {
            row[12..].fill(i as f32);
        }
        let qkv = Tensor::from_vec(rows.concat(), (4, 18), &candle_core::Device::Cpu).unwrap();
        let out = attention(&qkv, None, shape(&[0, 4], false)).unwrap();
        for value in out.flatten_all().unwrap().to_vec1::<f32>().unwrap() {
            assert!((value - 1.5).abs() < 1e-6);
        }
    }

    #[test]
    fn a_sequence_beyond_the_buckets_is_an_error() {
        let bias = random(2, (6, 2));
        let error = attention(&random(1, (6, 18)), Some(&bias), shape(&[0, 6], true));
        assert!(
            error
                .unwrap_err()
                .to_string()
                .contains("6 tokens exceeds 5")
        );
    }
}
