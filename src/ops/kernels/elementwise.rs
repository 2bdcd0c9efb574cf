//! Kernels that treat every value alike, and sums of columns.

use super::launch::{Args, Launch, Ptr, Scalar};
use super::rows::warp_a_row;
use crate::ops::{Activation, Dropout};

/// Values of a thread, read as vectors where they are aligned.
const VALUES: usize = 8;
const THREADS: usize = 256;

/// The number by which kernels know an activation.
pub(super) fn kind(activation: Activation) -> usize {
    match activation {
        Activation::None => 0,
        Activation::Gelu => 1,
        Activation::Tanh => 2,
        Activation::Relu => 3,
    }
}

fn all(kernel: &str, t: Scalar, count: usize, args: Args) -> Option<Launch> {
    if count == 0 {
        return None;
    }
    let blocks = count.div_ceil(VALUES * THREADS);
    Some(Launch::new(kernel, t, (blocks, 1), THREADS, args))
}

/// `y = act(x)`, `count` values; `y` may be `x`.
pub(in crate::ops) fn activation(
    t: Scalar,
    activation: Activation,
    x: Ptr,
    y: Ptr,
    count: usize,
) -> Option<Launch> {
    let args = Args::default().ptr(x).ptr(y).word(count as u64);
    all("activation", t, count, args.size(kind(activation)))
}

/// `dx = gradient ∘ act′(x)`, `count` values; `dx` may be either.
pub(in crate::ops) fn activation_gradient(
    t: Scalar,
    activation: Activation,
    gradient: Ptr,
    x: Ptr,
    dx: Ptr,
    count: usize,
) -> Option<Launch> {
    let args = Args::default().ptr(gradient).ptr(x).ptr(dx);
    let args = args.word(count as u64).size(kind(activation));
    all("activation_gradient", t, count, args)
}

/// The mask of [`crate::ops::dropout`] on `x`, `[rows, columns]`; `y` may be `x`.
pub(in crate::ops) fn dropout(
    t: Scalar,
    x: Ptr,
    y: Ptr,
    rows: usize,
    columns: usize,
    dropout: &Dropout,
) -> Option<Launch> {
    if rows == 0 || columns == 0 {
        return None;
    }
    let threshold = (dropout.rate * f64::from(u32::MAX)) as u32;
    let args = Args::default()
        .ptr(x)
        .ptr(y)
        .size(rows)
        .size(columns)
        .word(dropout.seed)
        .word(dropout.first_row as u64)
        .word(threshold.into())
        .float((1.0 / (1.0 - dropout.rate)) as f32);
    Some(warp_a_row("dropout", t, rows, args))
}

/// `out = y ∘ gain + shift` for the `width` columns from `column` on of `[rows, width_of_row]`, and
/// `out = y` for the others; gain and shift f32 `[width]`. `out` may be `y`.
#[allow(clippy::too_many_arguments)]
pub(in crate::ops) fn map_columns(
    t: Scalar,
    y: Ptr,
    gain: Ptr,
    shift: Option<Ptr>,
    out: Ptr,
    rows: usize,
    width_of_row: usize,
    column: usize,
    width: usize,
) -> Option<Launch> {
    if rows == 0 || width_of_row == 0 {
        return None;
    }
    let args = Args::default().ptr(y).ptr(gain).optional(shift).ptr(out);
    let args = args.size(rows).size(width_of_row).size(column).size(width);
    Some(warp_a_row("map_columns", t, rows, args))
}

/// Sums of the columns of `x`, `[rows, columns]`: f32 `[columns]`, in a fixed order.
pub(in crate::ops) fn column_sums(
    t: Scalar,
    x: Ptr,
    sums: Ptr,
    rows: usize,
    columns: usize,
) -> Option<Launch> {
    const COLUMNS: usize = 32;
    const WARPS: usize = 32;
    if columns == 0 {
        return None;
    }
    let args = Args::default().ptr(x).ptr(sums).size(rows).size(columns);
    let blocks = columns.div_ceil(COLUMNS);
    let launch = Launch::new("column_sums", t, (blocks, 1), COLUMNS * WARPS, args);
    Some(launch.with_shared(4 * COLUMNS * WARPS))
}
