//! The tile of AVX2 and FMA: six rows by sixteen columns.

use std::arch::x86_64::*;

use super::{Activation, COLUMNS, Finish, Left, Right, Start, Target, gelu, tiles};

/// Most rows of a tile: two accumulators a row leave registers for the operands.
pub(super) const ROWS: usize = 6;

#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn multiply(left: Left, right: Right, target: Target, finish: Finish) {
    for panel in 0..right.panels {
        // SAFETY: the panel and the rows are within the three matrices.
        unsafe {
            let right = right.panel(panel);
            let (target, finish) = (target.panel(panel), finish.panel(panel));
            for (row, rows) in tiles(left.rows, ROWS) {
                let (left, target) = (left.row(row), target.row(row));
                match rows {
                    1 => tile::<1>(left, right, target, finish),
                    2 => tile::<2>(left, right, target, finish),
                    3 => tile::<3>(left, right, target, finish),
                    4 => tile::<4>(left, right, target, finish),
                    5 => tile::<5>(left, right, target, finish),
                    _ => tile::<6>(left, right, target, finish),
                }
            }
        }
    }
}

#[target_feature(enable = "avx2,fma")]
unsafe fn tile<const R: usize>(left: Left, right: Right, target: Target, finish: Finish) {
    // SAFETY: the caller has checked the extent of all three.
    unsafe {
        let mut sums = [[_mm256_setzero_ps(); 2]; R];
        let mut b = right.values;
        let mut next = b.wrapping_add(right.apart);
        for k in 0..left.depth {
            let low = _mm256_loadu_ps(b);
            let high = _mm256_loadu_ps(b.add(8));
            b = b.add(right.stride);
            // Into the second-level cache: the first holds the columns in use.
            _mm_prefetch::<_MM_HINT_T1>(next.cast());
            next = next.wrapping_add(right.stride);
            for (r, sum) in sums.iter_mut().enumerate() {
                let a = _mm256_broadcast_ss(&*left.values.add(r * left.stride + k));
                sum[0] = _mm256_fmadd_ps(a, low, sum[0]);
                sum[1] = _mm256_fmadd_ps(a, high, sum[1]);
            }
        }
        let scale = _mm256_set1_ps(finish.scale);
        for (r, sum) in sums.iter().enumerate() {
            let to = target.values.add(r * target.stride);
            let mut row = [0f32; COLUMNS];
            let whole = target.columns >= COLUMNS;
            let start = match finish.start {
                Start::Zero => [_mm256_setzero_ps(); 2],
                Start::Bias(bias) => [_mm256_loadu_ps(bias), _mm256_loadu_ps(bias.add(8))],
                Start::Target if whole => [_mm256_loadu_ps(to), _mm256_loadu_ps(to.add(8))],
                Start::Target => {
                    std::ptr::copy_nonoverlapping(to, row.as_mut_ptr(), target.columns);
                    let row = row.as_ptr();
                    [_mm256_loadu_ps(row), _mm256_loadu_ps(row.add(8))]
                }
            };
            let low = _mm256_fmadd_ps(sum[0], scale, start[0]);
            let high = _mm256_fmadd_ps(sum[1], scale, start[1]);
            if whole && finish.activation == Activation::None {
                _mm256_storeu_ps(to, low);
                _mm256_storeu_ps(to.add(8), high);
                continue;
            }
            _mm256_storeu_ps(row.as_mut_ptr(), low);
            _mm256_storeu_ps(row.as_mut_ptr().add(8), high);
            match finish.activation {
                Activation::Gelu => gelu_lanes(&mut row),
                activation => activation.apply_inline(&mut row),
            }
            let columns = target.columns.min(COLUMNS);
            std::ptr::copy_nonoverlapping(row.as_ptr(), to, columns);
        }
    }
}

#[target_feature(enable = "avx2,fma")]
pub(super) fn gelu_lanes(values: &mut [f32; COLUMNS]) {
    gelu::each(values);
}
