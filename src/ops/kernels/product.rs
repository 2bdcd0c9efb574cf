//! Products of row-major matrices in the terms of cuBLAS, which knows column-major ones only.

use super::Ptr;

/// A row-major matrix, `stride` values from row to row; or its transpose.
#[derive(Clone, Copy, Debug)]
pub(in crate::ops) struct Operand {
    pub at: Ptr,
    pub stride: usize,
    pub transposed: bool,
}

/// C = alpha · A B + beta · C: A is `[rows, inner]`, B `[inner, columns]`, both behind their
/// transposition, and C `[rows, columns]`.
#[derive(Clone, Copy, Debug)]
pub(in crate::ops) struct Product {
    pub rows: usize,
    pub columns: usize,
    pub inner: usize,
    pub a: Operand,
    pub b: Operand,
    pub c: Ptr,
    pub c_stride: usize,
    pub alpha: f32,
    pub beta: f32,
}

/// The arguments of `cublasGemmEx`.
#[derive(Clone, Copy, Debug)]
pub(in crate::ops) struct BlasProduct {
    pub transpose_a: bool,
    pub transpose_b: bool,
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub a: Ptr,
    pub lda: usize,
    pub b: Ptr,
    pub ldb: usize,
    pub ldc: usize,
}

impl Product {
    /// Row-major C is column-major Cᵀ = Bᵀ Aᵀ, and the same memory read column by column is the
    /// transpose of what it is read row by row: the operands change places and nothing else.
    pub(in crate::ops) fn blas(&self) -> BlasProduct {
        BlasProduct {
            transpose_a: self.b.transposed,
            transpose_b: self.a.transposed,
            m: self.columns,
            n: self.rows,
            k: self.inner,
            a: self.b.at,
            lda: self.b.stride,
            b: self.a.at,
            ldb: self.a.stride,
            ldc: self.c_stride,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What `cublasGemmEx` is specified to do, with addresses that count values of `memory`.
    fn gemm(memory: &mut [f32], p: &BlasProduct, c: Ptr, alpha: f32, beta: f32) {
        let at = |Ptr(base): Ptr, ld: usize, row: usize, column: usize| {
            assert!(row < ld, "a column has {ld} values");
            base as usize + column * ld + row
        };
        for column in 0..p.n {
            for row in 0..p.m {
                let sum: f32 = (0..p.k)
                    .map(|i| {
                        let a = match p.transpose_a {
                            false => at(p.a, p.lda, row, i),
                            true => at(p.a, p.lda, i, row),
                        };
                        let b = match p.transpose_b {
                            false => at(p.b, p.ldb, i, column),
                            true => at(p.b, p.ldb, column, i),
                        };
                        memory[a] * memory[b]
                    })
                    .sum();
                let c = at(c, p.ldc, row, column);
                memory[c] = alpha * sum + beta * memory[c];
            }
        }
    }

    #[test]
    fn row_major_products_come_out_of_a_column_major_library() {
        let (rows, columns, inner) = (3, 4, 5);
        for (transpose_a, transpose_b, beta) in [
            (false, false, 0.0),
            (false, true, 1.0),
            (true, false, 0.0),
            (true, true, 1.0),
        ] {
            // Strides greater than the widths, so that a mix-up shows.
            let (a_stride, b_stride, c_stride) = (9, 8, 7);
            let mut memory: Vec<f32> = (0..300).map(|i| ((i * 37 + 11) % 23) as f32).collect();
            let (a, b, c) = (0, 100, 200);
            let value = |memory: &[f32], base: usize, stride: usize, row: usize, column: usize| {
                memory[base + row * stride + column]
            };
            let mut expected = memory.clone();
            for row in 0..rows {
                for column in 0..columns {
                    let sum: f32 = (0..inner)
                        .map(|i| {
                            let a = match transpose_a {
                                false => value(&memory, a, a_stride, row, i),
                                true => value(&memory, a, a_stride, i, row),
                            };
                            let b = match transpose_b {
                                false => value(&memory, b, b_stride, i, column),
                                true => value(&memory, b, b_stride, column, i),
                            };
                            a * b
                        })
                        .sum();
                    let at = c + row * c_stride + column;
                    expected[at] = 0.5 * sum + beta * memory[at];
                }
            }
            let operand = |at: usize, stride, transposed| Operand {
                at: Ptr(at as u64),
                stride,
                transposed,
            };
            let product = Product {
                rows,
                columns,
                inner,
                a: operand(a, a_stride, transpose_a),
                b: operand(b, b_stride, transpose_b),
                c: Ptr(c as u64),
                c_stride,
                alpha: 0.5,
                beta,
            };
            gemm(&mut memory, &product.blas(), product.c, 0.5, beta);
            assert_eq!(memory, expected, "{transpose_a} {transpose_b}");
        }
    }
}
