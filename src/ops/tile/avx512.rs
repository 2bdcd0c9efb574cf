//! The tile of AVX-512: fourteen rows by two panels of sixteen columns.

use std::arch::x86_64::*;

use super::{Activation, COLUMNS, Finish, Start, Target, gelu};

/// Most rows of a tile: of 32 registers two accumulators a row leave those of the operands.
pub(super) const ROWS: usize = 14;

/// A kernel by the instruction set that it needs and its way to add products to sixteen sums.
macro_rules! kernel {
    ($name:ident, $features:literal, |$sum:ident, $a:ident, $b:ident| $add:expr) => {
        pub(super) mod $name {
            use std::arch::x86_64::*;

            use super::super::{COLUMNS, Finish, Left, Right, Target, tiles};
            use super::{ROWS, finish_all};

            #[target_feature(enable = $features)]
            pub(in super::super) unsafe fn multiply(
                left: Left,
                right: Right,
                target: Target,
                finish: Finish,
            ) {
                for panel in (0..right.panels).step_by(2) {
                    // SAFETY: one panel or two and the rows are within the three matrices.
                    unsafe {
                        let both = right.panels - panel > 1;
                        let right = right.panel(panel);
                        let (target, finish) = (target.panel(panel), finish.panel(panel));
                        for (row, rows) in tiles(left.rows, ROWS) {
                            let (left, target) = (left.row(row), target.row(row));
                            // The first tile fetches the columns that come next, the others find
                            // them there.
                            let next =
                                right.apart * if row > 0 { 0 } else { 1 + usize::from(both) };
                            match both {
                                true => of_height::<2>(rows, left, right, next, target, finish),
                                false => of_height::<1>(rows, left, right, next, target, finish),
                            }
                        }
                    }
                }
            }

            #[target_feature(enable = $features)]
            unsafe fn of_height<const P: usize>(
                rows: usize,
                left: Left,
                right: Right,
                next: usize,
                target: Target,
                finish: Finish,
            ) {
                // SAFETY: the caller's promise.
                unsafe {
                    match rows {
                        1 => tile::<1, P>(left, right, next, target, finish),
                        2 => tile::<2, P>(left, right, next, target, finish),
                        3 => tile::<3, P>(left, right, next, target, finish),
                        4 => tile::<4, P>(left, right, next, target, finish),
                        5 => tile::<5, P>(left, right, next, target, finish),
                        6 => tile::<6, P>(left, right, next, target, finish),
                        7 => tile::<7, P>(left, right, next, target, finish),
                        8 => tile::<8, P>(left, right, next, target, finish),
                        9 => tile::<9, P>(left, right, next, target, finish),
                        10 => tile::<10, P>(left, right, next, target, finish),
                        11 => tile::<11, P>(left, right, next, target, finish),
                        12 => tile::<12, P>(left, right, next, target, finish),
                        13 => tile::<13, P>(left, right, next, target, finish),
                        14 => tile::<14, P>(left, right, next, target, finish),
                        rows => unreachable!("a tile of {rows} rows"),
                    }
                }
            }

            /// `next` is how far from these columns those lie that come next.
            #[target_feature(enable = $features)]
            unsafe fn tile<const R: usize, const P: usize>(
                left: Left,
                right: Right,
                next: usize,
                target: Target,
                finish: Finish,
            ) {
                let mut sums = [[_mm512_setzero_ps(); P]; R];
                // SAFETY: the caller has checked the extent of all three.
                unsafe {
                    let (mut a, mut b) = (left.values, right.values);
                    for _ in 0..left.depth {
                        let mut columns = [_mm512_setzero_ps(); P];
                        for (p, columns) in columns.iter_mut().enumerate() {
                            let panel = b.add(p * right.apart);
                            *columns = _mm512_loadu_ps(panel);
                            _mm_prefetch::<_MM_HINT_T1>(panel.wrapping_add(next).cast());
                        }
                        b = b.wrapping_add(right.stride);
                        for (r, sums) in sums.iter_mut().enumerate() {
                            let $a = _mm512_set1_ps(*a.add(r * left.stride));
                            for (lanes, $b) in sums.iter_mut().zip(columns) {
                                let $sum = *lanes;
                                *lanes = $add;
                            }
                        }
                        a = a.wrapping_add(1);
                    }
                    // Through memory, by a loop so small that it is unrolled: where anything indexes
                    // the sums at run time, the compiler keeps them in memory all along.
                    let mut values = [[[0f32; COLUMNS]; P]; R];
                    for (values, sums) in values
                        .as_flattened_mut()
                        .iter_mut()
                        .zip(sums.as_flattened())
                    {
                        _mm512_storeu_ps(values.as_mut_ptr(), *sums);
                    }
                    finish_all(values.as_flattened(), P, target, finish);
                }
            }
        }
    };
}

kernel!(floats, "avx512f", |sum, a, b| _mm512_fmadd_ps(a, b, sum));
// Each lane of both matrices is a pair of bf16 numbers, of which the sum gets both products.
kernel!(bf16_pairs, "avx512f,avx512bf16", |sum, a, b| {
    let pairs = |lanes| std::mem::transmute::<__m512, __m512bh>(lanes);
    _mm512_dpbf16_ps(sum, pairs(a), pairs(b))
});

/// Stores the sums of some rows, `panels` panels each.
#[inline(never)]
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn finish_all(
    sums: &[[f32; COLUMNS]],
    panels: usize,
    target: Target,
    finish: Finish,
) {
    for (r, sums) in sums.chunks_exact(panels).enumerate() {
        for (p, sums) in sums.iter().enumerate() {
            // SAFETY: the caller has checked the extent of the target.
            unsafe {
                let sum = _mm512_loadu_ps(sums.as_ptr());
                store(sum, target.row(r).panel(p), finish.panel(p));
            }
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn store(sum: __m512, target: Target, finish: Finish) {
    let there = match target.columns {
        COLUMNS.. => !0,
        columns => (1u16 << columns) - 1,
    };
    // SAFETY: the columns that are there may be read and written.
    unsafe {
        let start = match finish.start {
            Start::Zero => _mm512_setzero_ps(),
            Start::Bias(bias) => _mm512_loadu_ps(bias),
            Start::Target => _mm512_maskz_loadu_ps(there, target.values),
        };
        let mut value = _mm512_fmadd_ps(sum, _mm512_set1_ps(finish.scale), start);
        if finish.activation != Activation::None {
            let mut lanes = [0f32; COLUMNS];
            _mm512_storeu_ps(lanes.as_mut_ptr(), value);
            match finish.activation {
                Activation::Gelu => gelu_lanes(&mut lanes),
                activation => activation.apply_inline(&mut lanes),
            }
            value = _mm512_loadu_ps(lanes.as_ptr());
        }
        _mm512_mask_storeu_ps(target.values, there, value);
    }
}

#[target_feature(enable = "avx512f")]
pub(super) fn gelu_lanes(values: &mut [f32; COLUMNS]) {
    gelu::each(values);
}
