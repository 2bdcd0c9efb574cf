//! Sums of products of 8-bit numbers: a few rows by a panel of sixteen columns or two.

use crate::ops::tile::COLUMNS;

/// Products that one lane of 32 bits sums up.
pub(super) const QUAD: usize = 4;

/// Ways to compute the sums; all give the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Int8Kernel {
    /// In plain Rust, for any machine.
    Scalar,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// One instruction for four products (VNNI), as AVX-512 has it.
    #[cfg(target_arch = "x86_64")]
    Avx512Vnni,
    /// The same as AVX has it.
    #[cfg(target_arch = "x86_64")]
    AvxVnni,
}

impl Int8Kernel {
    /// Those that this machine has, the best one last.
    pub(super) fn all() -> Vec<Self> {
        let mut all = vec![Self::Scalar];
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx2") {
                all.push(Self::Avx2);
            }
            if is_x86_feature_detected!("avxvnni") {
                all.push(Self::AvxVnni);
            }
            if is_x86_feature_detected!("avx512vnni") && is_x86_feature_detected!("avx512f") {
                all.push(Self::Avx512Vnni);
            }
        }
        all
    }

    pub(super) fn best() -> Self {
        *Self::all().last().expect("there is always the scalar one")
    }

    /// Most rows of a call: as many as leave registers for what is in between.
    pub(super) fn rows(self) -> usize {
        match self {
            Self::Scalar => 4,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => 4,
            #[cfg(target_arch = "x86_64")]
            Self::AvxVnni => 6,
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Vnni => avx512::ROWS,
        }
    }

    /// Most panels of a call.
    pub(super) fn panels(self) -> usize {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Vnni => 2,
            _ => 1,
        }
    }

    /// Σ x·w for each row of `x`, `[rows, depth]`, and each column of `weights`,
    /// `[panels][depth / 4][16][4]`: `[rows, panels, 16]`. `depth` is a whole number of quads.
    pub(super) fn dot(self, x: &[u8], weights: &[i8], depth: usize, sums: &mut [[i32; COLUMNS]]) {
        let panels = weights.len() / (depth * COLUMNS);
        let rows = x.len() / depth;
        assert!(
            depth.is_multiple_of(QUAD)
                && weights.len() == panels * depth * COLUMNS
                && x.len() == rows * depth
                && sums.len() == rows * panels
                && (1..=self.panels()).contains(&panels),
            "shapes of a product in eight bits"
        );
        match self {
            Self::Scalar => scalar(x, weights, sums),
            // SAFETY: the shapes are checked above, and only kernels that the machine has are made.
            #[cfg(target_arch = "x86_64")]
            #[allow(unsafe_code)]
            Self::Avx2 => unsafe { x86::avx2::dot(x, weights, sums) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            #[allow(unsafe_code)]
            Self::Avx512Vnni => unsafe { avx512::dot(x, weights, depth, sums) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            #[allow(unsafe_code)]
            Self::AvxVnni => unsafe { x86::avx_vnni::dot(x, weights, sums) },
        }
    }
}

fn scalar(x: &[u8], weights: &[i8], sums: &mut [[i32; COLUMNS]]) {
    let depth = weights.len() / COLUMNS;
    for (x, sums) in x.chunks_exact(depth).zip(sums) {
        *sums = [0; COLUMNS];
        for (x, w) in x
            .chunks_exact(QUAD)
            .zip(weights.chunks_exact(QUAD * COLUMNS))
        {
            for (sum, w) in sums.iter_mut().zip(w.chunks_exact(QUAD)) {
                for (x, w) in x.iter().zip(w) {
                    *sum += i32::from(*x) * i32::from(*w);
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
mod x86 {
    /// A kernel by its instruction set and its way to add four products to each lane.
    macro_rules! kernel {
        ($name:ident, $features:literal, |$sum:ident, $x:ident, $w:ident| $add:expr) => {
            pub(super) mod $name {
                use std::arch::x86_64::*;

                use super::super::{COLUMNS, QUAD};

                #[target_feature(enable = $features)]
                pub(in super::super) unsafe fn dot(
                    x: &[u8],
                    weights: &[i8],
                    sums: &mut [[i32; COLUMNS]],
                ) {
                    // SAFETY: the caller has checked the shapes.
                    unsafe {
                        match sums.len() {
                            1 => tile::<1>(x, weights, sums),
                            2 => tile::<2>(x, weights, sums),
                            3 => tile::<3>(x, weights, sums),
                            4 => tile::<4>(x, weights, sums),
                            5 => tile::<5>(x, weights, sums),
                            6 => tile::<6>(x, weights, sums),
                            rows => unreachable!("a tile of {rows} rows"),
                        }
                    }
                }

                #[target_feature(enable = $features)]
                unsafe fn tile<const R: usize>(
                    x: &[u8],
                    weights: &[i8],
                    sums: &mut [[i32; COLUMNS]],
                ) {
                    let depth = weights.len() / COLUMNS;
                    let mut lanes = [[_mm256_setzero_si256(); 2]; R];
                    // SAFETY: `x` has R rows of `depth` values, `weights` sixteen columns of them.
                    unsafe {
                        let mut w = weights.as_ptr();
                        for k in (0..depth).step_by(QUAD) {
                            let low = _mm256_loadu_si256(w.cast());
                            let high = _mm256_loadu_si256(w.add(32).cast());
                            w = w.add(QUAD * COLUMNS);
                            // The columns that come next, into the second-level cache.
                            _mm_prefetch::<_MM_HINT_T1>(w.wrapping_add(weights.len()));
                            for (r, lanes) in lanes.iter_mut().enumerate() {
                                let quad = x.as_ptr().add(r * depth + k);
                                let $x = _mm256_set1_epi32(quad.cast::<i32>().read_unaligned());
                                for (lane, $w) in lanes.iter_mut().zip([low, high]) {
                                    let $sum = *lane;
                                    *lane = $add;
                                }
                            }
                        }
                        for (lanes, sums) in lanes.iter().zip(sums) {
                            let to = sums.as_mut_ptr();
                            _mm256_storeu_si256(to.cast(), lanes[0]);
                            _mm256_storeu_si256(to.add(8).cast(), lanes[1]);
                        }
                    }
                }
            }
        };
    }

    // Pairs of products in i16, which the weights are chosen not to saturate, and pairs of pairs.
    kernel!(avx2, "avx2", |sum, x, w| {
        let pairs = _mm256_maddubs_epi16(x, w);
        _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
    });
    kernel!(avx_vnni, "avx2,avxvnni", |sum, x, w| {
        _mm256_dpbusd_avx_epi32(sum, x, w)
    });
}

/// Fourteen rows by two panels, a panel's quads a register.
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
mod avx512 {
    use std::arch::x86_64::*;

    use super::{COLUMNS, QUAD};

    pub(super) const ROWS: usize = 14;

    #[target_feature(enable = "avx512f,avx512vnni")]
    pub(super) unsafe fn dot(x: &[u8], weights: &[i8], depth: usize, sums: &mut [[i32; COLUMNS]]) {
        let rows = x.len() / depth;
        macro_rules! tiles {
            ($panels:literal: $($height:literal)+) => {
                // SAFETY: the caller has checked the shapes.
                match rows {
                    $($height => unsafe { tile::<$height, $panels>(x, weights, depth, sums) },)+
                    rows => unreachable!("a tile of {rows} rows"),
                }
            };
        }
        match sums.len() == rows {
            true => tiles!(1: 1 2 3 4 5 6 7 8 9 10 11 12 13 14),
            false => tiles!(2: 1 2 3 4 5 6 7 8 9 10 11 12 13 14),
        }
    }

    #[target_feature(enable = "avx512f,avx512vnni")]
    unsafe fn tile<const R: usize, const P: usize>(
        x: &[u8],
        weights: &[i8],
        depth: usize,
        sums: &mut [[i32; COLUMNS]],
    ) {
        let mut lanes = [[_mm512_setzero_si512(); P]; R];
        // SAFETY: `x` has R rows of `depth` values, `weights` P panels of them, `sums` R · P places.
        unsafe {
            let (mut x, mut w) = (x.as_ptr(), weights.as_ptr());
            for _ in 0..depth / QUAD {
                let mut quads = [_mm512_setzero_si512(); P];
                for (p, quads) in quads.iter_mut().enumerate() {
                    let panel = w.add(p * depth * COLUMNS);
                    *quads = _mm512_loadu_si512(panel.cast());
                    // The columns that come next, into the second-level cache.
                    _mm_prefetch::<_MM_HINT_T1>(panel.wrapping_add(weights.len()));
                }
                w = w.wrapping_add(QUAD * COLUMNS);
                for (r, lanes) in lanes.iter_mut().enumerate() {
                    let quad = x.add(r * depth).cast::<i32>().read_unaligned();
                    let x = _mm512_set1_epi32(quad);
                    for (lane, quads) in lanes.iter_mut().zip(quads) {
                        *lane = _mm512_dpbusd_epi32(*lane, x, quads);
                    }
                }
                x = x.wrapping_add(QUAD);
            }
            for (lanes, sums) in lanes.as_flattened().iter().zip(sums) {
                _mm512_storeu_si512(sums.as_mut_ptr().cast(), *lanes);
            }
        }
    }
}
