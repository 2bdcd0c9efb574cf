//! The inner kernels of f32 products: a tile of some rows and columns in registers.
//!
//! Rows of the left matrix and of the right one may lie any distance apart, so that nothing need be
//! copied before: weights are stored in panels of sixteen columns ([`COLUMNS`]), attention reads V
//! where it is. A value of the result is summed in the order of `k` however many rows there are,
//! so that a row's result does not depend on the batch it is in, and all kernels give the same.

#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
mod amx;
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
mod avx2;
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
mod avx512;
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
mod dots;
#[cfg(target_arch = "x86_64")]
mod gelu;

#[cfg(test)]
mod tests;

use std::sync::OnceLock;

use super::activation::Activation;

/// Columns of a panel.
pub(super) const COLUMNS: usize = 16;

/// A kernel that this machine has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TileKernel {
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// Both matrices have pairs of bf16 numbers in the place of f32: of the depth there are half as
    /// many. Sums, bias and target are in f32.
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16,
    /// The same in the processor's tile registers, in another order: sums differ in the last bits.
    #[cfg(target_arch = "x86_64")]
    AmxBf16,
}

/// The left matrix of a product, `rows` rows of `depth` values, `stride` values apart.
#[derive(Clone, Copy)]
pub(super) struct Left {
    pub(super) values: *const f32,
    pub(super) stride: usize,
    pub(super) rows: usize,
    pub(super) depth: usize,
}

/// Panels of sixteen columns of the right matrix. Row k of the first begins at
/// `values + k · stride`, that of the next one `apart` values later; what lies as far behind the
/// last panel is fetched from memory meanwhile, if it is there.
#[derive(Clone, Copy)]
pub(super) struct Right {
    pub(super) values: *const f32,
    pub(super) stride: usize,
    pub(super) panels: usize,
    pub(super) apart: usize,
}

/// Columns of the result, as many as the panels have or fewer; its rows are `stride` values apart.
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
    /// Sixteen values a panel, the same for every row.
    Bias(*const f32),
    /// What stands in the target.
    Target,
}

#[allow(unsafe_code)]
#[cfg_attr(not(target_arch = "x86_64"), allow(unused_variables))]
impl TileKernel {
    /// The kernels for f32 of this machine, the best one last.
    pub(super) fn all() -> Vec<Self> {
        #[cfg(target_arch = "x86_64")]
        {
            let mut all = Vec::new();
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                all.push(Self::Avx2);
            }
            if is_x86_feature_detected!("avx512f") {
                all.push(Self::Avx512);
            }
            all
        }
        #[cfg(not(target_arch = "x86_64"))]
        Vec::new()
    }

    pub(super) fn best() -> Option<Self> {
        static BEST: OnceLock<Option<TileKernel>> = OnceLock::new();
        *BEST.get_or_init(|| Self::all().last().copied())
    }

    /// The kernels for pairs of bf16 of this machine, the best one last.
    pub(super) fn all_bf16() -> Vec<Self> {
        #[cfg(target_arch = "x86_64")]
        {
            let mut all = Vec::new();
            if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bf16") {
                all.push(Self::Avx512Bf16);
                // A depth that is not one of whole registers is left to the other.
                if amx::available() {
                    all.push(Self::AmxBf16);
                }
            }
            all
        }
        #[cfg(not(target_arch = "x86_64"))]
        Vec::new()
    }

    pub(super) fn best_bf16() -> Option<Self> {
        Self::all_bf16().pop()
    }

    /// Most rows of a tile.
    pub(super) fn rows(self) -> usize {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => avx2::ROWS,
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 | Self::Avx512Bf16 => avx512::ROWS,
            #[cfg(target_arch = "x86_64")]
            Self::AmxBf16 => amx::ROWS,
        }
    }

    /// `target = finish(left · right)`.
    ///
    /// # Safety
    /// All rows must lie in memory that may be read or, of the target, written, and sixteen values
    /// be readable in each row of each panel and, for each panel, at a bias.
    pub(super) unsafe fn multiply(self, left: Left, right: Right, target: Target, finish: Finish) {
        match self {
            // SAFETY: the caller's promise, and the machine has the kernel.
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => unsafe { avx2::multiply(left, right, target, finish) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => unsafe { avx512::floats::multiply(left, right, target, finish) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Self::AmxBf16 if left.depth.is_multiple_of(amx::DEPTH) => unsafe {
                amx::multiply(left, right, target, finish);
            },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16 | Self::AmxBf16 => unsafe {
                avx512::bf16_pairs::multiply(left, right, target, finish);
            },
        }
    }

    /// `h = scale · x aᵀ` of `x`, `[rows, depth]`, and `a`, `[rank, depth]`: `[rows, rank]`.
    pub(super) fn dots(self, x: &[f32], a: &[f32], depth: usize, scale: f32, h: &mut [f32]) {
        assert!(
            depth > 0
                && a.len().is_multiple_of(depth)
                && x.len().is_multiple_of(depth)
                && h.len() == x.len() / depth * (a.len() / depth),
            "shapes of a product"
        );
        if h.is_empty() {
            return;
        }
        match self {
            // SAFETY: the machine has the kernel.
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => unsafe { dots::avx2(x, a, depth, scale, h) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 | Self::Avx512Bf16 | Self::AmxBf16 => unsafe {
                dots::avx512(x, a, depth, scale, h)
            },
        }
    }

    /// GELU of each value.
    pub(super) fn gelu(self, values: &mut [f32; COLUMNS]) {
        match self {
            // SAFETY: the machine has the kernel.
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => unsafe { avx2::gelu_lanes(values) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 | Self::Avx512Bf16 | Self::AmxBf16 => unsafe {
                avx512::gelu_lanes(values)
            },
        }
    }
}

#[allow(unsafe_code)]
impl Left {
    /// From row `row` on.
    ///
    /// # Safety
    /// The matrix must have that row.
    unsafe fn row(self, row: usize) -> Self {
        Self {
            // SAFETY: the caller's promise.
            values: unsafe { self.values.add(row * self.stride) },
            ..self
        }
    }
}

#[allow(unsafe_code)]
impl Right {
    /// From panel `panel` on.
    ///
    /// # Safety
    /// The matrix must have that panel.
    unsafe fn panel(self, panel: usize) -> Self {
        Self {
            // SAFETY: the caller's promise.
            values: unsafe { self.values.add(panel * self.apart) },
            panels: self.panels - panel,
            ..self
        }
    }
}

#[allow(unsafe_code)]
impl Target {
    /// From row `row` on.
    ///
    /// # Safety
    /// The matrix must have that row.
    unsafe fn row(self, row: usize) -> Self {
        Self {
            // SAFETY: the caller's promise.
            values: unsafe { self.values.add(row * self.stride) },
            ..self
        }
    }

    /// From panel `panel` on.
    ///
    /// # Safety
    /// The matrix must have a column of that panel.
    unsafe fn panel(self, panel: usize) -> Self {
        Self {
            // SAFETY: the caller's promise.
            values: unsafe { self.values.add(panel * COLUMNS) },
            columns: self.columns - panel * COLUMNS,
            ..self
        }
    }
}

#[allow(unsafe_code)]
impl Finish {
    /// From panel `panel` on.
    ///
    /// # Safety
    /// A bias must have that panel.
    unsafe fn panel(self, panel: usize) -> Self {
        let start = match self.start {
            // SAFETY: the caller's promise.
            Start::Bias(bias) => Start::Bias(unsafe { bias.add(panel * COLUMNS) }),
            start => start,
        };
        Self { start, ..self }
    }
}

/// Cuts `rows` into tiles of about equal height: a tile of one row would wait for its own sums.
pub(super) fn tiles(rows: usize, most: usize) -> impl Iterator<Item = (usize, usize)> {
    let count = rows.div_ceil(most);
    (0..count).map(move |i| {
        let (start, end) = (rows * i / count, rows * (i + 1) / count);
        (start, end - start)
    })
}
