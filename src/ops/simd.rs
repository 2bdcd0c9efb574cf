//! Inner loops that the compiler vectorises, once for each instruction set.

/// Runs `f` compiled for the widest instruction set of this machine. Everything that `f` calls
/// must be `#[inline(always)]` to be compiled for it too.
#[inline(always)]
pub(super) fn vectorize<R>(f: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(f)
}

/// eˣ by range reduction to |r| ≤ ln 2 / 2 and a polynomial of degree 6; relative error below
/// 3e-7. Arguments are clamped to [-87, 88], where f32 neither overflows nor turns subnormal.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    // Adding and subtracting 1.5·2²³ rounds to the nearest integer without a call.
    const ROUND: f32 = 12_582_912.0;
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let x = x.clamp(-87.0, 88.0);
    let rounded = x * std::f32::consts::LOG2_E + ROUND;
    let n = rounded - ROUND;
    let r = x - n * LN2_HIGH - n * LN2_LOW;
    let mut p = 1.388_888_9e-3;
    p = p * r + 8.333_334e-3;
    p = p * r + 4.166_666_8e-2;
    p = p * r + 1.666_666_7e-1;
    p = p * r + 0.5;
    p = p * r + 1.0;
    p = p * r + 1.0;
    // The last bits of the rounded number are n, within [-126, 127], so that the exponent is a
    // normal number's. A conversion of n, which must not overflow, would cost more.
    let scale = f32::from_bits((rounded.to_bits() << 23).wrapping_add(127 << 23));
    p * scale
}

/// tanh x = 1 − 2 / (e²ˣ + 1); absolute error below 3e-7.
#[inline(always)]
pub(super) fn tanh(x: f32) -> f32 {
    1.0 - 2.0 / (exp(2.0 * x.clamp(-20.0, 20.0)) + 1.0)
}

/// The error function by Abramowitz & Stegun 7.1.26; absolute error below 5e-7.
#[inline(always)]
pub(super) fn erf(x: f32) -> f32 {
    let z = x.abs();
    let t = 1.0 / (1.0 + 0.327_591_1 * z);
    let mut p = 1.061_405_4;
    p = p * t - 1.453_152;
    p = p * t + 1.421_413_7;
    p = p * t - 0.284_496_74;
    p = p * t + 0.254_829_6;
    (1.0 - p * t * exp(-z * z)).copysign(x)
}

/// Sum of `f(i)` in sixteen lanes, which the compiler keeps in registers.
#[inline(always)]
pub(super) fn sum(n: usize, f: impl Fn(usize) -> f32) -> f32 {
    const LANES: usize = 16;
    let mut lanes = [0f32; LANES];
    let whole = n - n % LANES;
    let mut i = 0;
    while i < whole {
        for (lane, value) in lanes.iter_mut().enumerate() {
            *value += f(i + lane);
        }
        i += LANES;
    }
    let mut total: f32 = lanes.iter().sum();
    for i in whole..n {
        total += f(i);
    }
    total
}

/// The greatest value, in sixteen lanes; −∞ if there is none.
#[inline(always)]
pub(super) fn max(values: &[f32]) -> f32 {
    const LANES: usize = 16;
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let whole = values.chunks_exact(LANES);
    let rest = whole.remainder();
    for values in whole {
        for (lane, value) in lanes.iter_mut().zip(values) {
            *lane = if *value > *lane { *value } else { *lane };
        }
    }
    lanes
        .iter()
        .chain(rest)
        .fold(f32::NEG_INFINITY, |most, x| most.max(*x))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_and_tanh_follow_the_standard_library() {
        for i in -8000..8000 {
            let x = i as f32 * 0.01;
            let exact = f64::from(x).exp();
            assert!((f64::from(exp(x)) / exact - 1.0).abs() < 6e-7, "exp({x})");
            assert!((tanh(x) - x.tanh()).abs() < 5e-7, "tanh({x})");
        }
    }

    #[test]
    fn erf_has_the_tabulated_values() {
        // Abramowitz & Stegun, table 7.1.
        for (x, value) in [
            (0.0, 0.0),
            (0.1, 0.112_462_9),
            (0.5, 0.520_499_9),
            (1.0, 0.842_700_8),
            (2.0, 0.995_322_3),
            (4.0, 1.0),
        ] {
            assert!((erf(x) - value).abs() < 5e-7, "erf({x}) = {}", erf(x));
            assert!((erf(-x) + value).abs() < 5e-7);
        }
    }

    #[test]
    fn sum_adds_the_tail_too() {
        for n in [0, 1, 15, 16, 17, 100] {
            assert_eq!(sum(n, |i| i as f32), (n * n.saturating_sub(1) / 2) as f32);
        }
    }
}
