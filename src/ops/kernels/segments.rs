//! Linears of many tasks at once: each segment of rows has a weight of its own.
//!
//! The table of segments travels in the kernel's arguments, so that nothing is copied to the device
//! before a launch.

use std::ops::Range;

use super::elementwise::kind;
use super::launch::{Args, Launch, Ptr, Scalar, pair, size};
use crate::ops::Activation;

/// A head's linear for some rows.
#[derive(Clone, Debug)]
pub(in crate::ops) struct SegmentLinear {
    pub rows: Range<usize>,
    /// `[out_features, input]` of T.
    pub weight: Ptr,
    /// f32 `[out_features]`.
    pub bias: Option<Ptr>,
    pub out_features: usize,
    /// Where the segment's block of `[rows, out_features]` begins in the output, in values.
    pub output: usize,
}

/// Segments of one launch, by the 4 KB that arguments may have.
const SEGMENTS: usize = 96;
const WORDS: usize = 5;
/// Rows and columns of the tile that a block computes.
pub(super) const TILE: usize = 16;
/// The block's warps share out the inputs, this many at a time.
const WARPS: usize = 4;
const INPUTS: usize = 64;
/// Padding of a row in shared memory, against bank conflicts.
pub(super) const PAD: usize = 8;

/// `act(x Wᵀ + bias)` of each segment; `x` is `[_, input]` of T, what is written is `out_scalar`,
/// T or f32.
pub(in crate::ops) fn segment_linear(
    t: Scalar,
    x: Ptr,
    input: usize,
    segments: &[SegmentLinear],
    activation: Activation,
    out: Ptr,
    out_scalar: Scalar,
) -> Vec<Launch> {
    assert!(
        out_scalar == t || out_scalar == Scalar::F32,
        "heads of {t:?} write {out_scalar:?}"
    );
    let segments: Vec<&SegmentLinear> = segments
        .iter()
        .filter(|segment| !segment.rows.is_empty() && segment.out_features > 0)
        .collect();
    let launch = |segments: &[&SegmentLinear]| {
        let mut tiles = 0;
        let mut table = Vec::with_capacity(SEGMENTS * WORDS + 1);
        for segment in segments {
            table.extend([
                pair(size(segment.rows.start), size(segment.rows.len())),
                segment.weight.0,
                segment.bias.unwrap_or(Ptr::NULL).0,
                segment.output as u64,
                pair(size(segment.out_features), size(tiles)),
            ]);
            tiles += segment.rows.len().div_ceil(TILE) * segment.out_features.div_ceil(TILE);
        }
        table.resize(SEGMENTS * WORDS, 0);
        table.push(segments.len() as u64);
        let args = Args::default()
            .words(table)
            .ptr(x)
            .size(input)
            .ptr(out)
            .size(usize::from(out_scalar == Scalar::F32))
            .size(kind(activation));
        // Each warp's part of x and of the weight; at the end the warps' sums take their place.
        let shared = WARPS * 2 * TILE * (INPUTS + PAD) * t.size();
        Launch::new("segment_linear", t, (tiles, 1), WARPS * 32, args).with_shared(shared)
    };
    segments.chunks(SEGMENTS).map(launch).collect()
}
