//! Each op by its kernels: what `cuda_fwd` calls.

use candle_core::cuda_backend::cudarc::cublas;
use candle_core::cuda_backend::{CudaDevice, CudaStorage, WrapErr};
use candle_core::{CpuStorage, CustomOp1, DType, Layout, Result, Shape, Tensor};

use super::super::activation::Activation;
use super::super::adamw::AdamWStep;
use super::super::dropout::Dropout;
use super::super::kernels::{self, Operand, Product, Ptr, Scalar, Update};
use super::super::linear::Linear;
use super::super::lora::{LoraUpdate, RowUpdates};
use super::super::norm::Norm;
use super::runtime::launch;
use super::view::{Output, View, place_of, scalar, with_view};

type Made = Result<(CudaStorage, Shape)>;

/// A tensor as `cuda_fwd` gets it.
pub(in crate::ops) type Argument<'a> = (&'a CudaStorage, &'a Layout);

fn view<'a>((storage, layout): Argument<'a>) -> Result<View<'a>> {
    View::new(storage, layout)
}

/// C = alpha · A B + beta · C in the type of all three.
fn multiply(device: &CudaDevice, dtype: DType, product: &Product) -> Result<()> {
    use cublas::sys::{cublasComputeType_t, cublasGemmAlgo_t, cublasOperation_t, cudaDataType};
    if product.rows == 0 || product.columns == 0 {
        return Ok(());
    }
    let kind = match scalar(dtype)? {
        Scalar::F32 => cudaDataType::CUDA_R_32F,
        Scalar::F16 => cudaDataType::CUDA_R_16F,
        Scalar::Bf16 => cudaDataType::CUDA_R_16BF,
    };
    let transposed = |transposed| match transposed {
        true => cublasOperation_t::CUBLAS_OP_T,
        false => cublasOperation_t::CUBLAS_OP_N,
    };
    let int = |n: usize| i32::try_from(n).map_err(candle_core::Error::wrap);
    let blas = product.blas();
    let handle = device.cublas_handle();
    device.cuda_stream().context().bind_to_thread().w()?;
    let (alpha, beta) = (&raw const product.alpha, &raw const product.beta);
    // SAFETY: the operands are of the sizes that the product says, see its callers; the handle's
    // stream is the one on which they are made, used and freed. Sums are in f32 whatever the type.
    #[allow(unsafe_code)]
    unsafe {
        cublas::result::gemm_ex(
            *handle.handle(),
            transposed(blas.transpose_a),
            transposed(blas.transpose_b),
            int(blas.m)?,
            int(blas.n)?,
            int(blas.k)?,
            alpha.cast(),
            blas.a.0 as *const _,
            kind,
            int(blas.lda)?,
            blas.b.0 as *const _,
            kind,
            int(blas.ldb)?,
            beta.cast(),
            product.c.0 as *mut _,
            kind,
            int(blas.ldc)?,
            cublasComputeType_t::CUBLAS_COMPUTE_32F,
            cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
        )
    }
    .w()
}

/// `scale · aᵗ bᵗ`, each as it is or transposed.
pub(in crate::ops) fn product(
    a: Argument<'_>,
    transpose_a: bool,
    b: Argument<'_>,
    transpose_b: bool,
    scale: f32,
) -> Made {
    let a = view(a)?;
    let b = view(b)?.of(a.dtype, "the right factor")?;
    let (a_dims, b_dims) = (a.dims2()?, b.dims2()?);
    let turned = |(rows, columns), turn| match turn {
        true => (columns, rows),
        false => (rows, columns),
    };
    let (rows, inner) = turned(a_dims, transpose_a);
    let (b_inner, columns) = turned(b_dims, transpose_b);
    if inner != b_inner {
        candle_core::bail!("a product of {a_dims:?} and {b_dims:?}");
    }
    let c = Output::new(a.device, a.dtype, rows * columns)?;
    let operand = |view: &View<'_>, stride, transposed| Operand {
        at: view.at,
        stride,
        transposed,
    };
    let product = Product {
        rows,
        columns,
        inner,
        a: operand(&a, a_dims.1, transpose_a),
        b: operand(&b, b_dims.1, transpose_b),
        c: c.at,
        c_stride: columns,
        alpha: scale,
        beta: 0.0,
    };
    multiply(a.device, a.dtype, &product)?;
    Ok(c.shaped((rows, columns)))
}

/// x Wᵀ of `[rows, in]`, into `y`, whose rows are `y_stride` values apart.
#[allow(clippy::too_many_arguments)]
fn times_weight(
    x: &View<'_>,
    weight: &View<'_>,
    y: Ptr,
    y_stride: usize,
    alpha: f32,
    beta: f32,
) -> Result<()> {
    let (rows, columns) = x.dims2()?;
    let (out, input) = weight.dims2()?;
    if columns != input || weight.dtype != x.dtype {
        candle_core::bail!(
            "a linear of {input} inputs in {:?} got {columns} columns in {:?}",
            weight.dtype,
            x.dtype
        );
    }
    let product = Product {
        rows,
        columns: out,
        inner: input,
        a: Operand {
            at: x.at,
            stride: input,
            transposed: false,
        },
        b: Operand {
            at: weight.at,
            stride: input,
            transposed: true,
        },
        c: y,
        c_stride: y_stride,
        alpha,
        beta,
    };
    multiply(x.device, x.dtype, &product)
}

/// `act(x Wᵀ + b + updates)`; the bias is in f32.
pub(in crate::ops) fn linear_rows(
    x: Argument<'_>,
    linear: &Linear,
    updates: &[RowUpdates],
    activation: Activation,
) -> Made {
    let x = view(x)?;
    let (rows, input) = x.dims2()?;
    let out = linear.out_features();
    let y = Output::new(x.device, x.dtype, rows * out)?;
    with_view(&linear.weight, |weight| {
        times_weight(&x, &weight, y.at, out, 1.0, 0.0)
    })?;
    let bias = match &linear.bias {
        Some(bias) => Some(place_of(bias, DType::F32, "the bias of a linear")?),
        None => None,
    };
    let updates = places(updates, x.dtype)?;
    update(&x, input, y.at, (rows, out), bias, &updates, activation)?;
    Ok(y.shaped((rows, out)))
}

/// The updates of all ranges of rows, in order.
fn places(ranges: &[RowUpdates], dtype: DType) -> Result<Vec<Update>> {
    let mut all = Vec::new();
    for RowUpdates { rows, updates } in ranges {
        for update in updates.iter() {
            all.push(place_update(update, rows.clone(), dtype)?);
        }
    }
    Ok(all)
}

fn place_update(update: &LoraUpdate, rows: std::ops::Range<usize>, dtype: DType) -> Result<Update> {
    let (width, rank) = update.b.dims2()?;
    let of_map = |part: fn(&super::super::lora::ColumnMap) -> &Tensor| {
        let tensor = update.map.as_ref().map(part);
        tensor
            .map(|tensor| place_of(tensor, DType::F32, "the map of a linear's columns"))
            .transpose()
    };
    Ok(Update {
        rows,
        a: place_of(&update.a, dtype, "A of a LoRA update")?,
        b: place_of(&update.b, dtype, "B of a LoRA update")?,
        gain: of_map(|map| &map.gain)?,
        shift: of_map(|map| &map.shift)?,
        scale: update.scale as f32,
        rank,
        column: update.column,
        width,
    })
}

/// y = act(y + b + updates of x) in place.
fn update(
    x: &View<'_>,
    input: usize,
    y: Ptr,
    (rows, out): (usize, usize),
    bias: Option<Ptr>,
    updates: &[Update],
    activation: Activation,
) -> Result<()> {
    if bias.is_none() && updates.is_empty() && activation == Activation::None {
        return Ok(());
    }
    let t = x.scalar()?;
    let h = Output::new(x.device, DType::F32, kernels::shrink_values(updates))?;
    launch(x.device, kernels::shrink(t, x.at, input, updates, h.at))?;
    let expand = kernels::expand(t, y, rows, out, bias, updates, h.at, activation);
    launch(x.device, expand)
}

/// `y` with updates of all its rows.
pub(in crate::ops) fn add_updates(
    y: Argument<'_>,
    x: Argument<'_>,
    updates: &[LoraUpdate],
) -> Made {
    let (storage, layout) = y;
    let (y, x) = (view(y)?, view(x)?);
    let (rows, out) = y.dims2()?;
    let (_, input) = x.dims2()?;
    let sum = Output::copy_of(&y, storage, layout)?;
    let updates = updates
        .iter()
        .map(|update| place_update(update, 0..rows, x.dtype))
        .collect::<Result<Vec<_>>>()?;
    let none = Activation::None;
    update(&x, input, sum.at, (rows, out), None, &updates, none)?;
    Ok(sum.shaped((rows, out)))
}

/// `y` with `scale · h Bᵀ` added to the columns from `column` on.
pub(in crate::ops) fn lora_add(
    y: Argument<'_>,
    h: Argument<'_>,
    b: Argument<'_>,
    scale: f32,
    column: usize,
) -> Made {
    let (storage, layout) = y;
    let (y, h, b) = (view(y)?, view(h)?, view(b)?);
    let (rows, out) = y.dims2()?;
    let sum = Output::copy_of(&y, storage, layout)?;
    let first = Ptr(sum.at.0 + (column * y.dtype.size_in_bytes()) as u64);
    times_weight(&h, &b, first, out, scale, 1.0)?;
    Ok(sum.shaped((rows, out)))
}

/// x Wᵀ + b with a weight that trains.
pub(in crate::ops) fn trained_linear(
    x: Argument<'_>,
    weight: Argument<'_>,
    bias: Option<Argument<'_>>,
) -> Made {
    let (x, weight) = (view(x)?, view(weight)?);
    let (rows, _) = x.dims2()?;
    let (out, _) = weight.dims2()?;
    let y = Output::new(x.device, x.dtype, rows * out)?;
    times_weight(&x, &weight, y.at, out, 1.0, 0.0)?;
    if let Some(bias) = bias {
        let bias = view(bias)?.of(DType::F32, "the bias of a linear")?.at;
        let (t, nothing) = (x.scalar()?, Ptr(0));
        let expand = kernels::expand(
            t,
            y.at,
            rows,
            out,
            Some(bias),
            &[],
            nothing,
            Activation::None,
        );
        launch(x.device, expand)?;
    }
    Ok(y.shaped((rows, out)))
}

/// `word[ids] + position[positions] + type[type ids]`; the indices are on the device and within
/// their tables.
pub(in crate::ops) fn embed(tables: [Argument<'_>; 3], indices: &[Tensor; 3]) -> Made {
    let [word, position, token_type] = tables.map(view);
    let (word, position, token_type) = (word?, position?, token_type?);
    let (_, hidden) = word.dims2()?;
    let tables = [
        word.at,
        position.of(word.dtype, "the position embeddings")?.at,
        token_type.of(word.dtype, "the segment embeddings")?.at,
    ];
    let tokens = indices[0].elem_count();
    let mut places = [Ptr(0); 3];
    for (place, index) in places.iter_mut().zip(indices) {
        if index.elem_count() != tokens {
            candle_core::bail!("{tokens} words, {} indices", index.elem_count());
        }
        *place = place_of(index, DType::U32, "an index of embeddings")?;
    }
    let sum = Output::new(word.device, word.dtype, tokens * hidden)?;
    let t = word.scalar()?;
    let embed = kernels::embed(t, tables, places, sum.at, tokens, hidden);
    launch(word.device, embed)?;
    Ok(sum.shaped((tokens, hidden)))
}

/// `LayerNorm(x + bias + residual)`.
fn normalise(
    x: Argument<'_>,
    residual: Option<Argument<'_>>,
    bias: Option<Ptr>,
    gamma_beta: Ptr,
    eps: f32,
) -> Made {
    let x = view(x)?;
    let (rows, hidden) = x.dims2()?;
    let residual = match residual {
        Some(residual) => {
            let residual = view(residual)?.of(x.dtype, "the residual")?;
            if residual.dims() != x.dims() {
                candle_core::bail!("cannot add {:?} and {:?}", x.dims(), residual.dims());
            }
            Some(residual.at)
        }
        None => None,
    };
    let y = Output::new(x.device, x.dtype, rows * hidden)?;
    let t = x.scalar()?;
    let norm = kernels::norm(t, x.at, residual, bias, gamma_beta, y.at, rows, hidden, eps);
    launch(x.device, norm)?;
    Ok(y.shaped((rows, hidden)))
}

const GAMMA_BETA: &str = "γ and β of a LayerNorm";

pub(in crate::ops) fn norm(x: Argument<'_>, gamma_beta: Argument<'_>, eps: f32) -> Made {
    let gamma_beta = view(gamma_beta)?.of(DType::F32, GAMMA_BETA)?.at;
    normalise(x, None, None, gamma_beta, eps)
}

pub(in crate::ops) fn add_norm(
    x: Argument<'_>,
    residual: Argument<'_>,
    bias: Option<&Tensor>,
    norm: &Norm,
) -> Made {
    let gamma_beta = place_of(&norm.gamma_beta, DType::F32, GAMMA_BETA)?;
    let bias = match bias {
        Some(bias) => Some(place_of(bias, DType::F32, "the bias of a linear")?),
        None => None,
    };
    normalise(x, Some(residual), bias, gamma_beta, norm.eps as f32)
}

/// The gradient of LayerNorm's input.
pub(in crate::ops) fn norm_gradient(
    gradient: Argument<'_>,
    x: Argument<'_>,
    gamma_beta: Argument<'_>,
    eps: f32,
) -> Made {
    let (gradient, x) = (view(gradient)?, view(x)?);
    let gamma_beta = view(gamma_beta)?.of(DType::F32, GAMMA_BETA)?.at;
    let (rows, hidden) = x.dims2()?;
    let gradient = gradient.of(x.dtype, "the gradient of a LayerNorm")?;
    let dx = Output::new(x.device, x.dtype, x.count())?;
    let t = x.scalar()?;
    let made = kernels::norm_gradient(t, gradient.at, x.at, gamma_beta, dx.at, rows, hidden, eps);
    launch(x.device, made)?;
    Ok(dx.shaped((rows, hidden)))
}

/// The gradients of γ and β, `[2, hidden]` in f32.
pub(in crate::ops) fn norm_parameters_gradient(
    gradient: Argument<'_>,
    x: Argument<'_>,
    eps: f32,
) -> Made {
    let (gradient, x) = (view(gradient)?, view(x)?);
    let (rows, hidden) = x.dims2()?;
    let gradient = gradient.of(x.dtype, "the gradient of a LayerNorm")?;
    let sums = Output::new(x.device, DType::F32, 2 * hidden)?;
    let t = x.scalar()?;
    let (gradient, at) = (gradient.at, sums.at);
    let made = kernels::norm_parameters_gradient(t, gradient, x.at, at, rows, hidden, eps);
    launch(x.device, made)?;
    Ok(sums.shaped((2, hidden)))
}

pub(in crate::ops) fn activation(x: Argument<'_>, activation: Activation) -> Made {
    let x = view(x)?;
    let y = Output::new(x.device, x.dtype, x.count())?;
    let made = kernels::activation(x.scalar()?, activation, x.at, y.at, x.count());
    launch(x.device, made)?;
    Ok(y.shaped(x.dims()))
}

/// The gradient times the derivative at `x`.
pub(in crate::ops) fn activation_gradient(
    gradient: Argument<'_>,
    x: Argument<'_>,
    activation: Activation,
) -> Made {
    let x = view(x)?;
    let gradient = view(gradient)?.of(x.dtype, "the gradient of an activation")?;
    let dx = Output::new(x.device, x.dtype, x.count())?;
    let t = x.scalar()?;
    let (count, gradient) = (x.count(), gradient.at);
    let made = kernels::activation_gradient(t, activation, gradient, x.at, dx.at, count);
    launch(x.device, made)?;
    Ok(dx.shaped(x.dims()))
}

pub(in crate::ops) fn dropout(x: Argument<'_>, dropout: &Dropout) -> Made {
    let x = view(x)?;
    let (rows, columns) = x.dims2()?;
    let y = Output::new(x.device, x.dtype, x.count())?;
    let made = kernels::dropout(x.scalar()?, x.at, y.at, rows, columns, dropout);
    launch(x.device, made)?;
    Ok(y.shaped((rows, columns)))
}

/// `y ∘ gain + shift` for the columns from `column` on; gain and shift in f32.
pub(in crate::ops) fn map_columns(
    y: Argument<'_>,
    gain: Argument<'_>,
    shift: Argument<'_>,
    column: usize,
) -> Made {
    let y = view(y)?;
    let gain = view(gain)?.of(DType::F32, "the map of a linear's columns")?;
    let shift = view(shift)?.of(DType::F32, "the map of a linear's columns")?;
    let (rows, out) = y.dims2()?;
    let (width, t) = (gain.count(), y.scalar()?);
    let mapped = Output::new(y.device, y.dtype, y.count())?;
    let (gain, shift) = (gain.at, Some(shift.at));
    let made = kernels::map_columns(t, y.at, gain, shift, mapped.at, rows, out, column, width);
    launch(y.device, made)?;
    Ok(mapped.shaped((rows, out)))
}

/// Sums of the columns, `[columns]` in f32.
pub(in crate::ops) fn column_sums(x: Argument<'_>) -> Made {
    let x = view(x)?;
    let (rows, columns) = x.dims2()?;
    let sums = Output::new(x.device, DType::F32, columns)?;
    let made = kernels::column_sums(x.scalar()?, x.at, sums.at, rows, columns);
    launch(x.device, made)?;
    Ok(sums.shaped(columns))
}

/// The windows of a convolution.
pub(in crate::ops) fn unfold(x: Argument<'_>, borders: &Tensor, kernel: usize) -> Made {
    let x = view(x)?;
    let (tokens, hidden) = x.dims2()?;
    let sequences = borders.elem_count().saturating_sub(1);
    let offsets = place_of(borders, DType::U32, "the borders of sequences")?;
    let width = kernel * hidden;
    let windows = Output::new(x.device, x.dtype, tokens * width)?;
    let (t, at) = (x.scalar()?, windows.at);
    let made = kernels::unfold(t, x.at, offsets, at, sequences, tokens, hidden, kernel);
    launch(x.device, made)?;
    Ok(windows.shaped((tokens, width)))
}

/// What windows say of each token, summed.
pub(in crate::ops) fn fold(windows: Argument<'_>, borders: &Tensor, kernel: usize) -> Made {
    let windows = view(windows)?;
    let (tokens, width) = windows.dims2()?;
    let hidden = width / kernel;
    let sequences = borders.elem_count().saturating_sub(1);
    let offsets = place_of(borders, DType::U32, "the borders of sequences")?;
    let sums = Output::new(windows.device, windows.dtype, tokens * hidden)?;
    let (t, from) = (windows.scalar()?, windows.at);
    let made = kernels::fold(t, from, offsets, sums.at, sequences, tokens, hidden, kernel);
    launch(windows.device, made)?;
    Ok(sums.shaped((tokens, hidden)))
}

/// Linears of many tasks, each for rows of its own: all outputs one after the other, in f32.
pub(in crate::ops) fn segment_linears(
    x: Argument<'_>,
    segments: &[(std::ops::Range<usize>, &Linear)],
    activation: Activation,
    dtype: DType,
) -> Made {
    let x = view(x)?;
    let (_, input) = x.dims2()?;
    let mut next = 0;
    let mut placed = Vec::with_capacity(segments.len());
    for (rows, linear) in segments {
        let bias = linear.bias.as_ref();
        let bias = bias.map(|bias| place_of(bias, DType::F32, "the bias of a head"));
        let out_features = linear.out_features();
        if linear.in_features() != input {
            candle_core::bail!("a head of {} inputs got {input}", linear.in_features());
        }
        placed.push(kernels::SegmentLinear {
            rows: rows.clone(),
            weight: place_of(&linear.weight, x.dtype, "the weight of a head")?,
            bias: bias.transpose()?,
            out_features,
            output: next,
        });
        next += rows.len() * out_features;
    }
    let out = Output::new(x.device, dtype, next)?;
    let t = x.scalar()?;
    let kind = scalar(dtype)?;
    let made = kernels::segment_linear(t, x.at, input, &placed, activation, out.at, kind);
    launch(x.device, made)?;
    Ok(out.shaped(next))
}

/// The sum of the squares of f32 values, as a few numbers that add up to it.
pub(in crate::ops) struct SumSquares;

impl CustomOp1 for SumSquares {
    fn name(&self) -> &'static str {
        "sum-squares"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        candle_core::bail!("sum-squares is for tensors in the memory of a GPU")
    }

    fn cuda_fwd(&self, x: &CudaStorage, layout: &Layout) -> Made {
        let x = view((x, layout))?.of(DType::F32, "a gradient")?;
        let partials = Output::new(x.device, DType::F32, kernels::PARTIALS)?;
        let made = kernels::sum_squares(x.at, partials.at, x.count());
        launch(x.device, [made])?;
        Ok(partials.shaped(kernels::PARTIALS))
    }
}

/// Moves a variable and its moments in place; all f32.
pub(in crate::ops) fn adamw(
    value: Argument<'_>,
    gradient: &Tensor,
    first: Argument<'_>,
    second: Argument<'_>,
    step: AdamWStep,
) -> Result<()> {
    const WHAT: &str = "what the optimizer moves";
    let value = view(value)?.of(DType::F32, WHAT)?;
    let first = view(first)?.of(DType::F32, WHAT)?;
    let second = view(second)?.of(DType::F32, WHAT)?;
    let count = value.count();
    if [first.count(), second.count(), gradient.elem_count()] != [count; 3] {
        candle_core::bail!("{count} weights, and gradients or moments of another size");
    }
    let gradient = place_of(gradient, DType::F32, "a gradient")?;
    let made = kernels::adamw(value.at, gradient, first.at, second.at, count, step);
    launch(value.device, made)
}
