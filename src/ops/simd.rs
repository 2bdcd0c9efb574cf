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

const LANES: usize = 16;

/// Sum of `f` of each value, in sixteen lanes, which the compiler keeps in registers.
#[inline(always)]
pub(super) fn sum(values: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [0f32; LANES];
    let whole = values.chunks_exact(LANES);
    let rest = whole.remainder();
    for values in whole {
        for (lane, value) in lanes.iter_mut().zip(values) {
            *lane += f(*value);
        }
    }
    let total = fold(lanes, |a, b| a + b);
    rest.iter().fold(total, |total, value| total + f(*value))
}

/// The same of `f` of each two values in the same place.
#[inline(always)]
pub(super) fn sum_pairs(left: &[f32], right: &[f32], f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = [0f32; LANES];
    let (lefts, rights) = (left.chunks_exact(LANES), right.chunks_exact(LANES));
    let rest = lefts.remainder().iter().zip(rights.remainder());
    for (left, right) in lefts.zip(rights) {
        for ((lane, left), right) in lanes.iter_mut().zip(left).zip(right) {
            *lane += f(*left, *right);
        }
    }
    let total = fold(lanes, |a, b| a + b);
    rest.fold(total, |total, (left, right)| total + f(*left, *right))
}

/// The greatest value, in sixteen lanes; −∞ if there is none.
#[inline(always)]
pub(super) fn max(values: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let whole = values.chunks_exact(LANES);
    let rest = whole.remainder();
    for values in whole {
        for (lane, value) in lanes.iter_mut().zip(values) {
            *lane = if *value > *lane { *value } else { *lane };
        }
    }
    let most = fold(lanes, |a, b| if a > b { a } else { b });
    rest.iter().fold(most, |most, x| most.max(*x))
}

/// All lanes as one, by halves: one after the other, each step would wait for the one before.
#[inline(always)]
fn fold(lanes: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> f32 {
    let eight: [f32; 8] = std::array::from_fn(
        #[inline(always)]
        |i| f(lanes[i], lanes[i + 8]),
    );
    let four: [f32; 4] = std::array::from_fn(
        #[inline(always)]
        |i| f(eight[i], eight[i + 4]),
    );
    f(f(four[0], four[2]), f(four[1], four[3]))
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
    fn sums_and_the_greatest_take_all_lanes_and_the_tail() {
        for n in [0usize, 1, 15, 16, 17, 100] {
            let values: Vec<f32> = (0..n).map(|i| i as f32).collect();
            let expected = (n * n.saturating_sub(1) / 2) as f32;
            assert_eq!(sum(&values, |x| x), expected);
            assert_eq!(sum_pairs(&values, &values, |a, b| 2.0 * a - b), expected);
            for greatest in 0..n {
                let mut values = values.clone();
                values[greatest] = 1000.0;
                assert_eq!(max(&values), 1000.0);
            }
        }
        assert_eq!(max(&[]), f32::NEG_INFINITY);
    }
}
