//! The tile of AMX: up to 32 rows by two panels of sixteen columns of pairs of bf16, in the
//! processor's tile registers.
//!
//! As the compiler's intrinsics for AMX are not stable, its instructions are written out.

use std::arch::asm;
use std::arch::x86_64::{__cpuid_count, _xgetbv};
use std::sync::OnceLock;

use super::avx512::finish_all;
use super::{COLUMNS, Finish, Left, Right, Target};

/// Rows of a tile register.
const TILE_ROWS: usize = 16;
/// Most rows of a tile: two registers of sums for each panel.
pub(super) const ROWS: usize = 2 * TILE_ROWS;
/// The depth of a tile register, in pairs.
pub(super) const DEPTH: usize = 16;
/// Bytes of a row of a tile register.
const ROW_BYTES: usize = 64;

/// Whether the processor multiplies tiles of bf16 and the operating system lets this process.
pub(super) fn available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| in_processor() && permitted())
}

fn in_processor() -> bool {
    const OSXSAVE: u32 = 1 << 27;
    const AMX_BF16: u32 = 1 << 22;
    const AMX_TILE: u32 = 1 << 24;
    /// The state of the tile registers, which the operating system must save.
    const TILE_STATE: u64 = 0b11 << 17;

    // AVX-512 is told by leaf 7, so that there is one.
    if !is_x86_feature_detected!("avx512f") {
        return false;
    }
    // Safe in later versions of Rust than the oldest that builds this.
    #[allow(unused_unsafe)]
    // SAFETY: the processor has these leaves.
    let (features, instructions) = unsafe { (__cpuid_count(1, 0).ecx, __cpuid_count(7, 0).edx) };
    if features & OSXSAVE == 0 || instructions & AMX_BF16 == 0 || instructions & AMX_TILE == 0 {
        return false;
    }
    // SAFETY: the processor has XGETBV where OSXSAVE is set.
    let saved = unsafe { enabled_states() };
    saved & TILE_STATE == TILE_STATE
}

#[target_feature(enable = "xsave")]
unsafe fn enabled_states() -> u64 {
    // SAFETY: the caller's promise.
    unsafe { _xgetbv(0) }
}

/// Asks Linux for the tile registers, which it gives to a whole process on demand.
#[cfg(target_os = "linux")]
fn permitted() -> bool {
    const REQUEST_PERMISSION: libc::c_ulong = 0x1023;
    const TILE_DATA: libc::c_ulong = 18;
    // SAFETY: the call takes two numbers and only changes what this process may use.
    unsafe { libc::syscall(libc::SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn permitted() -> bool {
    false
}

/// The shapes of the tile registers, as LDTILECFG reads them.
#[repr(C, align(64))]
struct Shapes {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

impl Shapes {
    /// Sums in 0 to 3, rows of the left matrix in 4 and 5, panels of the right one in 6 and 7. Those
    /// of the rows above sixteen are 2, 3 and 5.
    fn of_height(rows: usize) -> Self {
        let first = rows.min(TILE_ROWS) as u8;
        let second = rows.saturating_sub(TILE_ROWS).max(1) as u8;
        let mut shapes = Self {
            palette: 1,
            start_row: 0,
            reserved: [0; 14],
            row_bytes: [0; 16],
            rows: [0; 16],
        };
        shapes.row_bytes[..8].fill(ROW_BYTES as u16);
        let full = DEPTH as u8;
        shapes.rows[..8]
            .copy_from_slice(&[first, first, second, second, first, second, full, full]);
        shapes
    }
}

/// # Safety
/// As of [`super::TileKernel::multiply`]; [`available`] must have said so, and the depth be a
/// multiple of [`DEPTH`].
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn multiply(left: Left, right: Right, target: Target, finish: Finish) {
    debug_assert!(left.depth.is_multiple_of(DEPTH));
    let whole = left.rows / ROWS * ROWS;
    for (rows, height) in [(0..whole, ROWS), (whole..left.rows, left.rows - whole)] {
        if rows.is_empty() {
            continue;
        }
        let left = Left {
            rows: height,
            ..left
        };
        let shapes = Shapes::of_height(height);
        // SAFETY: the shapes are valid; rows and panels are within the three matrices.
        unsafe {
            asm!("ldtilecfg [{}]", in(reg) &raw const shapes, options(nostack, readonly));
            for panel in (0..right.panels).step_by(2) {
                let both = right.panels - panel > 1;
                let right = right.panel(panel);
                let (target, finish) = (target.panel(panel), finish.panel(panel));
                for row in rows.clone().step_by(ROWS) {
                    let (left, target) = (left.row(row), target.row(row));
                    match (height > TILE_ROWS, both) {
                        (true, true) => tile::<true, true>(left, right, target, finish),
                        (true, false) => tile::<true, false>(left, right, target, finish),
                        (false, true) => tile::<false, true>(left, right, target, finish),
                        (false, false) => tile::<false, false>(left, right, target, finish),
                    }
                }
            }
        }
    }
    // SAFETY: gives the tile registers back, which hold nothing now.
    unsafe { asm!("tilerelease", options(nomem, nostack)) }
}

/// Writes the sums of a tile to `$sums`: `$step` for each register's depth, then `$store`. The rows
/// above sixteen are 2048 bytes further on, the second panel 64.
macro_rules! sum {
    ($left:ident, $right:ident, $sums:ident, [$($step:literal)*], [$($store:literal)*]) => {
        asm!(
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "2:",
            $($step,)*
            "add {upper}, 64",
            "add {lower}, 64",
            "add {first}, {along}",
            "add {second}, {along}",
            "dec {steps}",
            "jnz 2b",
            $($store,)*
            upper = inout(reg) $left.values => _,
            lower = inout(reg) $left.values.wrapping_add(TILE_ROWS * $left.stride) => _,
            across = in(reg) 4 * $left.stride,
            first = inout(reg) $right.values => _,
            second = inout(reg) $right.values.wrapping_add($right.apart) => _,
            down = in(reg) 4 * $right.stride,
            along = in(reg) 4 * $right.stride * DEPTH,
            steps = inout(reg) $left.depth / DEPTH => _,
            sums = in(reg) $sums.as_mut_ptr(),
            row = in(reg) 2 * ROW_BYTES,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        )
    };
}

/// A tile of sixteen rows or fewer, or, if `TALL`, of more, and of one panel, or, if `WIDE`, of two.
#[target_feature(enable = "avx512f")]
unsafe fn tile<const TALL: bool, const WIDE: bool>(
    left: Left,
    right: Right,
    target: Target,
    finish: Finish,
) {
    // Two panels a row, whether both are wanted or not.
    let mut sums = [[0f32; COLUMNS]; 2 * ROWS];
    // SAFETY: the registers have the shapes of this height, and the caller has checked the extent
    // of all three matrices; what a variant does not have it neither loads nor stores.
    unsafe {
        match (TALL, WIDE) {
            (true, true) => sum!(
                left, right, sums,
                [
                    "tileloadd tmm4, [{upper} + {across}*1]"
                    "tileloadd tmm6, [{first} + {down}*1]"
                    "tileloadd tmm7, [{second} + {down}*1]"
                    "tdpbf16ps tmm0, tmm4, tmm6"
                    "tileloadd tmm5, [{lower} + {across}*1]"
                    "tdpbf16ps tmm1, tmm4, tmm7"
                    "tdpbf16ps tmm2, tmm5, tmm6"
                    "tdpbf16ps tmm3, tmm5, tmm7"
                ],
                [
                    "tilestored [{sums} + {row}*1], tmm0"
                    "tilestored [{sums} + {row}*1 + 64], tmm1"
                    "tilestored [{sums} + {row}*1 + 2048], tmm2"
                    "tilestored [{sums} + {row}*1 + 2112], tmm3"
                ]
            ),
            (true, false) => sum!(
                left, right, sums,
                [
                    "tileloadd tmm4, [{upper} + {across}*1]"
                    "tileloadd tmm6, [{first} + {down}*1]"
                    "tdpbf16ps tmm0, tmm4, tmm6"
                    "tileloadd tmm5, [{lower} + {across}*1]"
                    "tdpbf16ps tmm2, tmm5, tmm6"
                ],
                [
                    "tilestored [{sums} + {row}*1], tmm0"
                    "tilestored [{sums} + {row}*1 + 2048], tmm2"
                ]
            ),
            (false, true) => sum!(
                left, right, sums,
                [
                    "tileloadd tmm4, [{upper} + {across}*1]"
                    "tileloadd tmm6, [{first} + {down}*1]"
                    "tdpbf16ps tmm0, tmm4, tmm6"
                    "tileloadd tmm7, [{second} + {down}*1]"
                    "tdpbf16ps tmm1, tmm4, tmm7"
                ],
                [
                    "tilestored [{sums} + {row}*1], tmm0"
                    "tilestored [{sums} + {row}*1 + 64], tmm1"
                ]
            ),
            (false, false) => sum!(
                left, right, sums,
                [
                    "tileloadd tmm4, [{upper} + {across}*1]"
                    "tileloadd tmm6, [{first} + {down}*1]"
                    "tdpbf16ps tmm0, tmm4, tmm6"
                ],
                ["tilestored [{sums} + {row}*1], tmm0"]
            ),
        }
        match WIDE {
            true => finish_all(&sums[..2 * left.rows], 2, target, finish),
            false => {
                for (r, sums) in sums.chunks_exact(2).take(left.rows).enumerate() {
                    finish_all(&sums[..1], 1, target.row(r), finish);
                }
            }
        }
    }
}
