//! The inner kernel of f32 products on AVX2: a tile of six rows and sixteen columns in registers.
//!
//! Rows of the left matrix and of the right one may lie any distance apart, so that nothing need be
//! copied before: weights are stored in panels of sixteen columns ([`COLUMNS`]), attention reads V
//! where it is. A value of the result is summed in the order of `k` however many rows there are,
//! so that a row's result does not depend on the batch it is in.

use super::activation::Activation;

/// Columns of a tile.
pub(super) const COLUMNS: usize = 16;
/// Most rows of a tile: two accumulators a row leave registers for the operands.
pub(super) const ROWS: usize = 6;

/// Whether this machine has the kernel.
pub(super) fn available() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        false
    }
}

/// The left matrix of a product, `rows` rows of `depth` values, `stride` values apart.
#[derive(Clone, Copy)]
pub(super) struct Left {
    pub(super) values: *const f32,
    pub(super) stride: usize,
    pub(super) rows: usize,
    pub(super) depth: usize,
}

/// Sixteen columns of the right matrix: row k begins at `values + k · stride`.
#[derive(Clone, Copy)]
pub(super) struct Right {
    pub(super) values: *const f32,
    pub(super) stride: usize,
    /// Where the columns begin that come next, in the same layout: they are fetched from memory
    /// meanwhile.
    pub(super) next: *const f32,
}

/// Up to sixteen columns of the result, whose rows are `stride` values apart.
#[derive(Clone, Copy)]
pub(super) struct Target {
    pub(super) values: *mut f32,
    pub(super) stride: usize,
    pub(super) columns: usize,
}

/// What happens to a sum before it is stored: `act(scale · sum + start)`.
#[derive(Clone, Copy)]
pub(super) struct Finish {
    pub(super) scale: f32,
    pub(super) start: Start,
    pub(super) activation: Activation,
}

#[derive(Clone, Copy)]
pub(super) enum Start {
    Zero,
    /// Sixteen values, the same for every row.
    Bias(*const f32),
    /// What stands in the target.
    Target,
}

/// `target = finish(left · right)`.
///
/// # Safety
/// The machine must have the kernel ([`available`]); all rows must lie in memory that may be read
/// or, of the target, written, and sixteen values be readable in each row of the right matrix and
/// at a bias.
#[allow(unsafe_code)]
pub(super) unsafe fn multiply(left: Left, right: Right, target: Target, finish: Finish) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the caller's promise.
    unsafe {
        x86::multiply(left, right, target, finish);
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        let _ = (left, right, target, finish);
        unreachable!("`available` says that there is no kernel");
    }
}

/// GELU of each value.
///
/// # Safety
/// The machine must have the kernel ([`available`]).
#[allow(unsafe_code)]
pub(super) unsafe fn gelu(values: &mut [f32; COLUMNS]) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the caller's promise.
    unsafe {
        x86::gelu(values);
    }
    #[cfg(not(target_arch = "x86_64"))]
    Activation::Gelu.apply_inline(values);
}

/// Cuts `rows` into tiles of about equal height: a tile of one row would wait for its own sums.
pub(super) fn tiles(rows: usize, most: usize) -> impl Iterator<Item = (usize, usize)> {
    let count = rows.div_ceil(most);
    (0..count).map(move |i| {
        let (start, end) = (rows * i / count, rows * (i + 1) / count);
        (start, end - start)
    })
}

#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
mod x86 {
    use std::arch::x86_64::*;

    use super::{Activation, COLUMNS, Finish, Left, ROWS, Right, Start, Target, tiles};

    #[target_feature(enable = "avx2,fma")]
    pub(super) unsafe fn multiply(left: Left, right: Right, target: Target, finish: Finish) {
        for (row, rows) in tiles(left.rows, ROWS) {
            // SAFETY: the rows are within both matrices.
            unsafe {
                let left = Left {
                    values: left.values.add(row * left.stride),
                    ..left
                };
                let target = Target {
                    values: target.values.add(row * target.stride),
                    ..target
                };
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

    #[target_feature(enable = "avx2,fma")]
    unsafe fn tile<const R: usize>(left: Left, right: Right, target: Target, finish: Finish) {
        // SAFETY: the caller has checked the extent of all three.
        unsafe {
            let mut sums = [[_mm256_setzero_ps(); 2]; R];
            let (mut b, mut next) = (right.values, right.next);
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
                let whole = target.columns == COLUMNS;
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
                    Activation::Gelu => gelu(&mut row),
                    activation => activation.apply_inline(&mut row),
                }
                std::ptr::copy_nonoverlapping(row.as_ptr(), to, target.columns);
            }
        }
    }

    /// As [`crate::ops::activation`] has it, the error function by Abramowitz & Stegun 7.1.26.
    #[target_feature(enable = "avx2,fma")]
    pub(super) unsafe fn gelu(values: &mut [f32; COLUMNS]) {
        for half in [0, 8] {
            // SAFETY: both halves lie in the array.
            unsafe {
                let place = values.as_mut_ptr().add(half);
                _mm256_storeu_ps(place, gelu_of(_mm256_loadu_ps(place)));
            }
        }
    }

    #[target_feature(enable = "avx2,fma")]
    fn gelu_of(x: __m256) -> __m256 {
        let all = |value: f32| _mm256_set1_ps(value);
        let polynomial = |at: __m256, factors: &[f32]| {
            let first = all(factors[0]);
            let rest = factors[1..].iter();
            rest.fold(first, |sum, factor| _mm256_fmadd_ps(sum, at, all(*factor)))
        };
        let sign = _mm256_and_ps(x, all(-0.0));
        let z = _mm256_mul_ps(_mm256_xor_ps(x, sign), all(std::f32::consts::FRAC_1_SQRT_2));
        let t = _mm256_div_ps(all(1.0), _mm256_fmadd_ps(z, all(0.327_591_1), all(1.0)));
        let p = polynomial(
            t,
            &[
                1.061_405_4,
                -1.453_152,
                1.421_413_7,
                -0.284_496_74,
                0.254_829_6,
                0.0,
            ],
        );
        // exp(-z²), see `simd::exp`. The maximum keeps a NaN, its second operand.
        let y = _mm256_max_ps(all(-87.0), _mm256_mul_ps(_mm256_sub_ps(all(0.0), z), z));
        const ROUND: f32 = 12_582_912.0;
        let rounded = _mm256_fmadd_ps(y, all(std::f32::consts::LOG2_E), all(ROUND));
        let n = _mm256_sub_ps(rounded, all(ROUND));
        let r = _mm256_fnmadd_ps(n, all(0.693_359_4), y);
        let r = _mm256_fnmadd_ps(n, all(-2.121_944_4e-4), r);
        let e = polynomial(
            r,
            &[
                1.388_888_9e-3,
                8.333_334e-3,
                4.166_666_8e-2,
                1.666_666_7e-1,
                0.5,
                1.0,
                1.0,
            ],
        );
        let exponent = _mm256_slli_epi32::<23>(_mm256_castps_si256(rounded));
        let scale = _mm256_add_epi32(exponent, _mm256_set1_epi32(127 << 23));
        let e = _mm256_mul_ps(e, _mm256_castsi256_ps(scale));
        let erf = _mm256_or_ps(_mm256_fnmadd_ps(p, e, all(1.0)), sign);
        let half = _mm256_mul_ps(x, all(0.5));
        _mm256_fmadd_ps(half, erf, half)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gelu_is_the_one_of_the_other_machines() {
        if !available() {
            return;
        }
        for i in -600..600 {
            let x: [f32; COLUMNS] = std::array::from_fn(|j| i as f32 / 50.0 + j as f32 / 800.0);
            let (mut found, mut expected) = (x, x);
            // SAFETY: the machine has the kernel.
            #[allow(unsafe_code)]
            unsafe {
                gelu(&mut found);
            }
            Activation::Gelu.apply_inline(&mut expected);
            for (a, b) in found.iter().zip(expected) {
                assert!((a - b).abs() <= 1e-6 * (1.0 + b.abs()), "{x:?}: {a} {b}");
            }
        }
        let mut values = [f32::NAN; COLUMNS];
        // SAFETY: as above.
        #[allow(unsafe_code)]
        unsafe {
            gelu(&mut values);
        }
        assert!(values.iter().all(|value| value.is_nan()));
    }

    #[test]
    fn tiles_cover_all_rows_and_are_alike() {
        for rows in 0..40 {
            let cut: Vec<_> = tiles(rows, 6).collect();
            let mut next = 0;
            for (start, count) in &cut {
                assert_eq!(*start, next);
                next += count;
            }
            assert_eq!(next, rows);
            let counts = cut.iter().map(|(_, count)| *count);
            let (least, most) = (counts.clone().min(), counts.max());
            assert!(most.unwrap_or(0) <= 6 && most.unwrap_or(0) - least.unwrap_or(0) <= 1);
        }
    }
}
