//! Kernels that go by rows: embeddings, LayerNorm and windows over tokens.

use super::launch::{Args, Launch, Ptr, Scalar};

/// Rows of a block of kernels that give each row a warp.
const ROWS: usize = 4;
const WARP: usize = 32;

/// A launch with a warp for each row.
pub(super) fn warp_a_row(kernel: &str, t: Scalar, rows: usize, args: Args) -> Launch {
    Launch::new(kernel, t, (rows.div_ceil(ROWS), 1), ROWS * WARP, args)
}

/// `word[ids] + position[positions] + type[type ids]`: `out` of `[tokens, hidden]`. Tables are
/// `[_, hidden]` of T, indices u32 `[tokens]`, both in the order word, position, type. Indices are
/// not checked.
pub(in crate::ops) fn embed(
    t: Scalar,
    tables: [Ptr; 3],
    indices: [Ptr; 3],
    out: Ptr,
    tokens: usize,
    hidden: usize,
) -> Option<Launch> {
    if tokens == 0 || hidden == 0 {
        return None;
    }
    let pointers = tables.into_iter().chain(indices).chain([out]);
    let args = pointers.fold(Args::default(), Args::ptr);
    let args = args.size(tokens).size(hidden);
    Some(warp_a_row("embed", t, tokens, args))
}

/// Up to this width a row stays in a warp's registers.
const KEPT_HIDDEN: usize = 1024;

/// `y = LayerNorm(x + bias + residual)`, all `[rows, hidden]`; `bias` f32 `[hidden]`, `gamma_beta`
/// f32 `[2, hidden]`. `y` may be `x` or the residual.
#[allow(clippy::too_many_arguments)]
pub(in crate::ops) fn norm(
    t: Scalar,
    x: Ptr,
    residual: Option<Ptr>,
    bias: Option<Ptr>,
    gamma_beta: Ptr,
    y: Ptr,
    rows: usize,
    hidden: usize,
    eps: f32,
) -> Option<Launch> {
    if rows == 0 || hidden == 0 {
        return None;
    }
    let kernel = if hidden <= KEPT_HIDDEN {
        "norm"
    } else {
        "norm_long"
    };
    let args = Args::default()
        .ptr(x)
        .optional(residual)
        .optional(bias)
        .ptr(gamma_beta)
        .ptr(y)
        .size(rows)
        .size(hidden)
        .float(eps);
    Some(warp_a_row(kernel, t, rows, args))
}

/// The gradient of LayerNorm's input `x` for the `gradient` of its output: `dx`, all
/// `[rows, hidden]`. `dx` may be `gradient`.
#[allow(clippy::too_many_arguments)]
pub(in crate::ops) fn norm_gradient(
    t: Scalar,
    gradient: Ptr,
    x: Ptr,
    gamma_beta: Ptr,
    dx: Ptr,
    rows: usize,
    hidden: usize,
    eps: f32,
) -> Option<Launch> {
    if rows == 0 || hidden == 0 {
        return None;
    }
    let args = [gradient, x, gamma_beta, dx]
        .into_iter()
        .fold(Args::default(), Args::ptr);
    let args = args.size(rows).size(hidden).float(eps);
    Some(warp_a_row("norm_gradient", t, rows, args))
}

/// The gradients of γ and β: `out`, f32 `[2, hidden]`. Sums in a fixed order.
pub(in crate::ops) fn norm_parameters_gradient(
    t: Scalar,
    gradient: Ptr,
    x: Ptr,
    out: Ptr,
    rows: usize,
    hidden: usize,
    eps: f32,
) -> Option<Launch> {
    const WARPS: usize = 8;
    if hidden == 0 {
        return None;
    }
    let args = Args::default().ptr(gradient).ptr(x).ptr(out);
    let args = args.size(rows).size(hidden).float(eps);
    let blocks = hidden.div_ceil(WARP);
    let launch = Launch::new(
        "norm_parameters_gradient",
        t,
        (blocks, 1),
        WARPS * WARP,
        args,
    );
    // Mean and deviation of 32 rows, then two sums of each thread.
    Some(launch.with_shared(4 * (2 * WARP + 2 * WARPS * WARP)))
}

/// Of each token the `kernel` rows around it, side by side: `[tokens, hidden]` to
/// `[tokens, kernel · hidden]`; `offsets` u32 `[sequences + 1]`.
#[allow(clippy::too_many_arguments)]
pub(in crate::ops) fn unfold(
    t: Scalar,
    x: Ptr,
    offsets: Ptr,
    out: Ptr,
    sequences: usize,
    tokens: usize,
    hidden: usize,
    kernel: usize,
) -> Option<Launch> {
    windows(
        "unfold",
        t,
        [x, offsets, out],
        [sequences, tokens, hidden, kernel],
    )
}

/// The reverse of [`unfold`] for gradients: sums what the windows say of each token.
#[allow(clippy::too_many_arguments)]
pub(in crate::ops) fn fold(
    t: Scalar,
    windows_of: Ptr,
    offsets: Ptr,
    out: Ptr,
    sequences: usize,
    tokens: usize,
    hidden: usize,
    kernel: usize,
) -> Option<Launch> {
    windows(
        "fold",
        t,
        [windows_of, offsets, out],
        [sequences, tokens, hidden, kernel],
    )
}

fn windows(name: &str, t: Scalar, pointers: [Ptr; 3], sizes: [usize; 4]) -> Option<Launch> {
    let [sequences, tokens, hidden, kernel] = sizes;
    if tokens == 0 || hidden == 0 || kernel == 0 {
        return None;
    }
    let args = pointers.into_iter().fold(Args::default(), Args::ptr);
    let args = args.size(sequences).size(tokens).size(hidden).size(kernel);
    Some(warp_a_row(name, t, tokens, args))
}
