//! Products with a narrow matrix that lies by outputs, as LoRA's A does: sums along the rows of
//! both, where turning one of them would cost as much as the product.

use std::arch::x86_64::*;

use super::COLUMNS;

/// Rows of `a` of a block.
const OUTPUTS: usize = 4;

/// A kernel by its instruction set, the rows of a block, as many as it has registers for, its values
/// of a register, and how the sums of sixteen become eight.
macro_rules! kernel {
    ($name:ident, $features:literal, $rows:literal, $zero:ident, $load:ident, $fmadd:ident,
        $lanes:literal, $eight:expr) => {
        /// `h = scale · x aᵀ`, `x` of `[rows, depth]`, `a` of `[rank, depth]`.
        ///
        /// # Safety
        /// The machine must have the instructions.
        #[target_feature(enable = $features)]
        pub(super) unsafe fn $name(x: &[f32], a: &[f32], depth: usize, scale: f32, h: &mut [f32]) {
            const ROWS: usize = $rows;
            const STEP: usize = COLUMNS / $lanes;
            let whole = depth - depth % COLUMNS;
            let rank = a.len() / depth;
            let last = rank - 1;
            for (x, h) in x.chunks(ROWS * depth).zip(h.chunks_mut(ROWS * rank)) {
                let rows = x.len() / depth;
                for first in (0..rank).step_by(OUTPUTS) {
                    // Where there are fewer, the last one is computed again and left.
                    let row: [&[f32]; ROWS] =
                        std::array::from_fn(|r| &x[r.min(rows - 1) * depth..][..depth]);
                    let output: [&[f32]; OUTPUTS] =
                        std::array::from_fn(|j| &a[(first + j).min(last) * depth..][..depth]);
                    let mut sums = [[[$zero(); STEP]; OUTPUTS]; ROWS];
                    for k in (0..whole).step_by(COLUMNS) {
                        for s in 0..STEP {
                            let k = k + s * $lanes;
                            let mut x = [$zero(); ROWS];
                            for r in 0..ROWS {
                                // SAFETY: `k` and the lanes are below `whole`.
                                x[r] = unsafe { $load(row[r].as_ptr().add(k)) };
                            }
                            for j in 0..OUTPUTS {
                                // SAFETY: as above.
                                let a = unsafe { $load(output[j].as_ptr().add(k)) };
                                for r in 0..ROWS {
                                    sums[r][j][s] = $fmadd(x[r], a, sums[r][j][s]);
                                }
                            }
                        }
                    }
                    let eight = $eight;
                    for r in 0..ROWS {
                        let sums = sums[r];
                        let found = add_lanes([
                            eight(sums[0]),
                            eight(sums[1]),
                            eight(sums[2]),
                            eight(sums[3]),
                        ]);
                        if r < rows {
                            for j in first..(first + OUTPUTS).min(rank) {
                                let mut sum = found[j - first];
                                for k in whole..depth {
                                    sum = row[r][k].mul_add(output[j - first][k], sum);
                                }
                                h[r * rank + j] = scale * sum;
                            }
                        }
                    }
                }
            }
        }
    };
}

kernel!(
    avx2,
    "avx2,fma",
    2,
    _mm256_setzero_ps,
    _mm256_loadu_ps,
    _mm256_fmadd_ps,
    8,
    |sums: [__m256; 2]| _mm256_add_ps(sums[0], sums[1])
);

kernel!(
    avx512,
    "avx512f",
    4,
    _mm512_setzero_ps,
    _mm512_loadu_ps,
    _mm512_fmadd_ps,
    16,
    |sums: [__m512; 1]| {
        let high = _mm512_extractf64x4_pd::<1>(_mm512_castps_pd(sums[0]));
        _mm256_add_ps(_mm512_castps512_ps256(sums[0]), _mm256_castpd_ps(high))
    }
);

/// The sum of each one's lanes.
#[inline]
#[target_feature(enable = "avx")]
fn add_lanes(sums: [__m256; OUTPUTS]) -> [f32; OUTPUTS] {
    let low = _mm256_hadd_ps(sums[0], sums[1]);
    let high = _mm256_hadd_ps(sums[2], sums[3]);
    let all = _mm256_hadd_ps(low, high);
    let all = _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps::<1>(all));
    let mut found = [0f32; OUTPUTS];
    // SAFETY: there is room for four values.
    unsafe { _mm_storeu_ps(found.as_mut_ptr(), all) };
    found
}
