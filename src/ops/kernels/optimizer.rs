//! The optimizer's kernels, all f32.

use super::launch::{Args, Launch, Ptr, Scalar};
use crate::ops::AdamWStep;

/// Partial sums that [`sum_squares`] leaves.
pub(in crate::ops) const PARTIALS: usize = 256;

const THREADS: usize = 256;

/// Squares of `count` values summed up to [`PARTIALS`] f32 values, in a fixed order.
pub(in crate::ops) fn sum_squares(x: Ptr, partials: Ptr, count: usize) -> Launch {
    let args = Args::default().ptr(x).ptr(partials).word(count as u64);
    let launch = Launch::new("sum_squares", Scalar::F32, (PARTIALS, 1), THREADS, args);
    launch.with_shared(4 * THREADS / 32)
}

/// Moves `value` and both moments, f32 `[count]` each, in place.
pub(in crate::ops) fn adamw(
    value: Ptr,
    gradient: Ptr,
    first: Ptr,
    second: Ptr,
    count: usize,
    step: AdamWStep,
) -> Option<Launch> {
    if count == 0 {
        return None;
    }
    let args = [value, gradient, first, second]
        .into_iter()
        .fold(Args::default(), Args::ptr)
        .word(count as u64)
        .float(step.scale as f32)
        .float((step.learning_rate / step.bias_1) as f32)
        .float((1.0 / step.bias_2) as f32)
        .float(step.decay as f32)
        .float(step.beta_1 as f32)
        .float((1.0 - step.beta_1) as f32)
        .float(step.beta_2 as f32)
        .float((1.0 - step.beta_2) as f32)
        .float(step.epsilon as f32);
    let blocks = count.div_ceil(THREADS);
    Some(Launch::new(
        "adamw",
        Scalar::F32,
        (blocks, 1),
        THREADS,
        args,
    ))
}
