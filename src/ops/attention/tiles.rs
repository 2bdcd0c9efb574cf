//! Attention's forward pass by the tile kernel: keys are turned once a head, queries and values
//! read where they are.

use std::cell::RefCell;

use candle_core::Result;

use super::{AttentionShape, softmax};
use crate::ops::activation::Activation;
use crate::ops::crew::{in_parts, is_helped};
use crate::ops::packed::Place;
use crate::ops::simd::vectorize;
use crate::ops::tile::{COLUMNS, Finish, Left, Right, Start, Target, TileKernel};

/// Heads of a sequence that a part does, where several cores compute.
const PART_HEADS: usize = 2;

thread_local! {
    static MEMORY: RefCell<Memory> = RefCell::default();
}

/// Memory for one head, used again by the next.
#[derive(Default)]
struct Memory {
    /// Kᵀ in panels, `[len / 16][width][16]`.
    keys: Vec<f32>,
    /// `[len, len]`, rows a whole number of panels apart.
    scores: Vec<f32>,
    positions: Vec<f32>,
}

/// The kernel for heads of this width, if one can do them.
pub(super) fn kernel(width: usize) -> Option<TileKernel> {
    TileKernel::best().filter(|_| width.is_multiple_of(COLUMNS))
}

/// Attention over `qkv`, `[tokens, 3 · hidden]`: `[tokens, hidden]`. The shape fits, and
/// its heads are as wide as a whole number of panels.
pub(super) fn forward(
    kernel: TileKernel,
    shape: &AttentionShape,
    qkv: &[f32],
    hidden: usize,
    tables: &[&[f32]],
) -> Result<Vec<f32>> {
    let tokens = qkv.len() / (3 * hidden);
    let columns = shape.positions.columns(hidden, shape.heads);
    for (window, table) in shape.offsets.windows(2).zip(tables) {
        let in_order = window[0] <= window[1] && window[1] <= tokens;
        assert!(in_order, "sequences follow each other");
        let len = window[1] - window[0];
        shape.positions.check(len, table.len(), columns)?;
    }
    // Zeros at once would be fresh pages from the kernel, for each layer of each batch.
    let mut out = Vec::with_capacity(tokens * hidden);
    out.resize(tokens * hidden, 0f32);
    let place = Place(out.as_mut_ptr());
    let all = shape.sequences() * shape.heads;
    let per_part = if is_helped() { PART_HEADS } else { all.max(1) };
    in_parts(all.div_ceil(per_part), &|part| {
        MEMORY.with_borrow_mut(|memory| {
            for i in part * per_part..((part + 1) * per_part).min(all) {
                let (sequence, head) = (i / shape.heads, i % shape.heads);
                // SAFETY: each sequence and head writes rows and columns of its own.
                #[allow(unsafe_code)]
                unsafe {
                    let table = tables[sequence];
                    attend(
                        kernel,
                        shape,
                        qkv,
                        hidden,
                        (sequence, head),
                        table,
                        place.get(),
                        memory,
                    );
                }
            }
        });
    });
    Ok(out)
}

/// One head of one sequence.
///
/// # Safety
/// `out` must be writable memory of `[tokens, hidden]` of which nobody else uses this sequence's
/// rows in this head's columns.
#[allow(unsafe_code)]
#[expect(clippy::too_many_arguments, reason = "one call")]
unsafe fn attend(
    kernel: TileKernel,
    shape: &AttentionShape,
    qkv: &[f32],
    hidden: usize,
    (sequence, head): (usize, usize),
    table: &[f32],
    out: *mut f32,
    memory: &mut Memory,
) {
    let offsets = &shape.offsets[sequence..];
    let view = shape.head(qkv, hidden, offsets[0]..offsets[1], head);
    let (len, width) = (view.len, view.width);
    if len == 0 {
        return;
    }
    let padded = len.next_multiple_of(COLUMNS);
    let row = 3 * hidden;
    let first = view.start * row + head * width;
    let part = |which: usize| &qkv[first + which * hidden..];
    turn_keys(part(1), row, len, width, &mut memory.keys);
    memory.scores.resize(len * padded, 0.0);
    let scores = &mut memory.scores[..len * padded];
    let finish = |scale| Finish {
        scale,
        start: Start::Zero,
        activation: Activation::None,
    };
    let left = Left {
        values: part(0).as_ptr(),
        stride: row,
        rows: len,
        depth: width,
    };
    let right = Right {
        values: memory.keys.as_ptr(),
        stride: COLUMNS,
        panels: padded / COLUMNS,
        apart: width * COLUMNS,
    };
    let target = Target {
        values: scores.as_mut_ptr(),
        stride: padded,
        columns: padded,
    };
    // SAFETY: `len` queries of `width` values lie in `qkv`, the panels of keys in `keys`, and their
    // columns in each row of `scores`.
    unsafe { kernel.multiply(left, right, target, finish(shape.scale)) };
    let positions = &mut memory.positions;
    shape
        .positions
        .add_scores(&view, table, shape.scale, scores, padded, positions);
    vectorize(
        #[inline(always)]
        || {
            for row in scores.chunks_exact_mut(padded) {
                row[len..].fill(f32::NEG_INFINITY);
                softmax(row);
            }
        },
    );
    let left = Left {
        values: scores.as_ptr(),
        stride: padded,
        rows: len,
        depth: len,
    };
    let right = Right {
        values: part(2).as_ptr(),
        stride: row,
        panels: width / COLUMNS,
        apart: COLUMNS,
    };
    // SAFETY: `len` rows of probabilities lie in `scores`, `len` values of `width` columns in
    // `qkv`, and the target's rows and columns are this call's.
    unsafe {
        let target = Target {
            values: out.add(view.start * hidden + head * width),
            stride: hidden,
            columns: width,
        };
        kernel.multiply(left, right, target, finish(1.0));
    }
}

/// Kᵀ in panels of sixteen keys, zeros in place of keys that are not there.
fn turn_keys(k: &[f32], row: usize, len: usize, width: usize, keys: &mut Vec<f32>) {
    keys.clear();
    keys.resize(len.next_multiple_of(COLUMNS) * width, 0.0);
    for (panel, keys) in keys.chunks_exact_mut(COLUMNS * width).enumerate() {
        for j in 0..COLUMNS.min(len - panel * COLUMNS) {
            let key = &k[(panel * COLUMNS + j) * row..][..width];
            for (d, value) in key.iter().enumerate() {
                keys[d * COLUMNS + j] = *value;
            }
        }
    }
}
