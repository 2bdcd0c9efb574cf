//! GELU for code that is compiled with fused multiplications and additions.

use std::f32::consts::{FRAC_1_SQRT_2, LOG2_E};

/// As [`crate::ops::activation`] has it, the error function by Abramowitz & Stegun 7.1.26.
#[inline(always)]
pub(super) fn each<const N: usize>(values: &mut [f32; N]) {
    for x in values {
        *x = gelu(*x);
    }
}

#[inline(always)]
fn gelu(x: f32) -> f32 {
    let z = x.abs() * FRAC_1_SQRT_2;
    let t = 1.0 / z.mul_add(0.327_591_1, 1.0);
    let p = 1.061_405_4f32;
    let p = p.mul_add(t, -1.453_152);
    let p = p.mul_add(t, 1.421_413_7);
    let p = p.mul_add(t, -0.284_496_74);
    let p = p.mul_add(t, 0.254_829_6) * t;
    let erf = (-p).mul_add(exp_of_minus_square(z), 1.0).copysign(x);
    let half = 0.5 * x;
    half.mul_add(erf, half)
}

/// exp(-z²), see [`crate::ops::simd::exp`].
#[inline(always)]
fn exp_of_minus_square(z: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0;
    let y = -z * z;
    // Keeps a NaN, which `f32::max` would lose.
    let y = if y < -87.0 { -87.0 } else { y };
    let rounded = y.mul_add(LOG2_E, ROUND);
    let n = rounded - ROUND;
    let r = (-n).mul_add(0.693_359_4, y);
    let r = (-n).mul_add(-2.121_944_4e-4, r);
    let e = 1.388_888_9e-3f32;
    let e = e.mul_add(r, 8.333_334e-3);
    let e = e.mul_add(r, 4.166_666_8e-2);
    let e = e.mul_add(r, 1.666_666_7e-1);
    let e = e.mul_add(r, 0.5);
    let e = e.mul_add(r, 1.0);
    let e = e.mul_add(r, 1.0);
    e * f32::from_bits((rounded.to_bits() << 23).wrapping_add(127 << 23))
}
