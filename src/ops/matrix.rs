//! Views of row-major matrices and their product.

use std::marker::PhantomData;

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor};

#[cfg(feature = "cuda")]
use super::cuda;
use super::{contiguous, output};
#[cfg(feature = "cuda")]
use candle_core::CudaStorage;

/// A matrix in borrowed memory.
#[derive(Clone, Copy)]
pub(super) struct Matrix<'a> {
    values: &'a [f32],
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
}

impl<'a> Matrix<'a> {
    /// `rows` rows of `columns` values, `row_stride` values apart.
    pub(super) fn new(values: &'a [f32], rows: usize, columns: usize, row_stride: usize) -> Self {
        check(values.len(), rows, columns, row_stride);
        Self {
            values,
            rows,
            columns,
            row_stride,
            column_stride: 1,
        }
    }

    /// Rows and columns.
    pub(super) fn shape(&self) -> (usize, usize) {
        (self.rows, self.columns)
    }

    pub(super) fn at(&self, row: usize, column: usize) -> f32 {
        self.values[row * self.row_stride + column * self.column_stride]
    }

    pub(super) fn transposed(self) -> Self {
        Self {
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
            ..self
        }
    }
}

/// A row-major matrix in memory that is written.
pub(super) struct MatrixMut<'a> {
    values: *mut f32,
    rows: usize,
    columns: usize,
    row_stride: usize,
    borrowed: PhantomData<&'a mut [f32]>,
}

impl<'a> MatrixMut<'a> {
    pub(super) fn new(
        values: &'a mut [f32],
        rows: usize,
        columns: usize,
        row_stride: usize,
    ) -> Self {
        check(values.len(), rows, columns, row_stride);
        Self {
            values: values.as_mut_ptr(),
            rows,
            columns,
            row_stride,
            borrowed: PhantomData,
        }
    }

    /// Some columns of a matrix of which other threads write others.
    ///
    /// # Safety
    /// The rows must lie in memory that may be written for `'a`, and nobody else may use these
    /// columns meanwhile.
    #[allow(unsafe_code)]
    pub(super) unsafe fn raw(
        values: *mut f32,
        rows: usize,
        columns: usize,
        row_stride: usize,
    ) -> Self {
        Self {
            values,
            rows,
            columns,
            row_stride,
            borrowed: PhantomData,
        }
    }
}

fn check(len: usize, rows: usize, columns: usize, row_stride: usize) {
    assert!(columns <= row_stride || rows <= 1, "rows overlap");
    assert!(
        rows == 0 || columns == 0 || (rows - 1) * row_stride + columns <= len,
        "a matrix of {rows} x {columns} (stride {row_stride}) does not fit {len} values"
    );
}

/// Whether a product replaces what stands in the destination.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Into {
    Overwrite,
    Accumulate,
}

/// `c = scale · a b`, or `c += scale · a b`, on the calling thread.
pub(super) fn multiply(c: MatrixMut<'_>, into: Into, scale: f32, a: Matrix<'_>, b: Matrix<'_>) {
    assert_eq!(
        (a.rows, a.columns, b.columns),
        (c.rows, b.rows, c.columns),
        "shapes of a matrix product"
    );
    // SAFETY: the constructors of the views have checked that every element lies inside its
    // slice, transposing keeps the set of elements, and `c` is borrowed exclusively.
    #[allow(unsafe_code)]
    unsafe {
        gemm::gemm(
            c.rows,
            c.columns,
            a.columns,
            c.values,
            1,
            c.row_stride as isize,
            into == Into::Accumulate,
            a.values.as_ptr(),
            a.column_stride as isize,
            a.row_stride as isize,
            b.values.as_ptr(),
            b.column_stride as isize,
            b.row_stride as isize,
            1.0,
            scale,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

/// `scale · aᵗ bᵗ` of two contiguous tensors, each as it is or transposed. No backward: this is
/// what backward passes are made of.
pub(super) fn product(
    a: &Tensor,
    transpose_a: bool,
    b: &Tensor,
    transpose_b: bool,
    scale: f64,
) -> Result<Tensor> {
    let op = Product {
        transpose_a,
        transpose_b,
        scale: scale as f32,
    };
    a.contiguous()?.apply_op2_no_bwd(&b.contiguous()?, &op)
}

struct Product {
    transpose_a: bool,
    transpose_b: bool,
    scale: f32,
}

impl CustomOp2 for Product {
    fn name(&self) -> &'static str {
        "product"
    }

    fn cpu_fwd(
        &self,
        a: &CpuStorage,
        a_layout: &Layout,
        b: &CpuStorage,
        b_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let view = |values, (rows, columns), transpose| {
            let matrix = Matrix::new(values, rows, columns, columns);
            if transpose {
                matrix.transposed()
            } else {
                matrix
            }
        };
        let a = view(
            contiguous(a, a_layout)?,
            a_layout.shape().dims2()?,
            self.transpose_a,
        );
        let b = view(
            contiguous(b, b_layout)?,
            b_layout.shape().dims2()?,
            self.transpose_b,
        );
        let (rows, columns) = (a.rows, b.columns);
        let mut c = vec![0f32; rows * columns];
        let target = MatrixMut::new(&mut c, rows, columns, columns);
        multiply(target, Into::Overwrite, self.scale, a, b);
        output(c, (rows, columns))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        a: &CudaStorage,
        a_layout: &Layout,
        b: &CudaStorage,
        b_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let (a, b) = ((a, a_layout), (b, b_layout));
        cuda::product(a, self.transpose_a, b, self.transpose_b, self.scale)
    }
}
