//! Linears in eight bits: weights symmetric by output, activations by row as they come.
//!
//! With a row x = s·(q − z), q in 0..=255, and an output's weights w = t·p, p in -127..=127, the
//! product is x·w = s·t·(Σ q p − z Σ p). The sums are exact in i32 and so the same on every machine.
//!
//! AVX2 multiplies 8-bit numbers in pairs and adds each pair in i16, which saturates. So p is
//! chosen such that it cannot: of two weights side by side those above 0 sum up to 128 at most, and
//! so do those below. 255 · 128 fits. That costs a fraction of a bit, where an eighth bit of all
//! weights, or of all activations, would be a whole one.

use std::ops::Range;

use super::aligned::Aligned;
use super::kernel::{Int8Kernel, QUAD};
use crate::ops::activation::Activation;
use crate::ops::simd::vectorize;
use crate::ops::tile::{COLUMNS, TileKernel, tiles};

/// Greatest weight, and the most that a pair of one sign sums up to.
const MOST: f32 = 127.0;
const MOST_OF_PAIR: i32 = 128;
/// Rows by panels that any kernel sums up at a time.
const MOST_SUMS: usize = 28;

/// A weight `[out, in]`, as `[out / 16][in / 4][16][4]`, zeros in place of what is missing.
pub(super) struct Int8Panels {
    values: Aligned<i8>,
    /// t, by output.
    scales: Vec<f32>,
    /// Σ p, by output.
    sums: Vec<i32>,
    input: usize,
    out: usize,
    kernel: Int8Kernel,
}

/// Rows of activations in eight bits.
#[derive(Default)]
pub(super) struct Int8Rows {
    /// `[rows, in]`, rows a whole number of quads apart.
    values: Vec<u8>,
    /// s and z, by row.
    scales: Vec<(f32, i32)>,
}

impl Int8Panels {
    pub(super) fn new(weight: &[f32], out: usize, input: usize) -> Self {
        let panels = out.div_ceil(COLUMNS);
        let quads = input.div_ceil(QUAD);
        let mut values = Aligned::zeroed(panels * quads * COLUMNS * QUAD);
        let mut scales = vec![0f32; panels * COLUMNS];
        let mut sums = vec![0i32; panels * COLUMNS];
        let mut row = vec![0i8; input];
        for (j, weights) in weight.chunks_exact(input).enumerate() {
            scales[j] = quantize_weights(weights, &mut row);
            sums[j] = row.iter().map(|p| i32::from(*p)).sum();
            let panel = &mut values.as_mut_slice()[j / COLUMNS * quads * COLUMNS * QUAD..];
            for (k, p) in row.iter().enumerate() {
                panel[(k / QUAD * COLUMNS + j % COLUMNS) * QUAD + k % QUAD] = *p;
            }
        }
        Self {
            values,
            scales,
            sums,
            input,
            out,
            kernel: Int8Kernel::best(),
        }
    }

    #[cfg(test)]
    pub(super) fn with_kernel(mut self, kernel: Int8Kernel) -> Self {
        self.kernel = kernel;
        self
    }

    pub(super) fn count(&self) -> usize {
        self.out.div_ceil(COLUMNS)
    }

    pub(super) fn bytes(&self) -> usize {
        self.values.as_slice().len() + 4 * (self.scales.len() + self.sums.len())
    }

    fn row_bytes(&self) -> usize {
        self.input.div_ceil(QUAD) * QUAD
    }

    /// Puts rows `[rows, in]` into eight bits.
    pub(super) fn quantize(&self, x: &[f32], rows: &mut Int8Rows) {
        let count = x.len() / self.input;
        let stride = self.row_bytes();
        rows.values.clear();
        rows.values.resize(count * stride, 0);
        rows.scales.clear();
        let whole = rows.values.chunks_exact_mut(stride);
        for (x, q) in x.chunks_exact(self.input).zip(whole) {
            rows.scales.push(quantize_row(x, &mut q[..self.input]));
        }
    }

    /// The outputs of some panels: `act(x Wᵀ + bias)`, `bias` with zeros up to a whole panel.
    ///
    /// # Safety
    /// `y` must be writable memory of `[rows, out]` of which nobody else uses these columns.
    #[allow(unsafe_code)]
    pub(super) unsafe fn multiply(
        &self,
        panels: Range<usize>,
        x: &Int8Rows,
        y: *mut f32,
        bias: &[f32],
        activation: Activation,
    ) {
        let stride = self.row_bytes();
        let panel_bytes = stride * COLUMNS;
        let tile = TileKernel::best();
        vectorize(
            #[inline(always)]
            || {
                let mut sums = [[0i32; COLUMNS]; MOST_SUMS];
                for panel in panels.clone().step_by(self.kernel.panels()) {
                    let side_by_side = self.kernel.panels().min(panels.end - panel);
                    let weights = &self.values.as_slice()[panel * panel_bytes..];
                    let weights = &weights[..side_by_side * panel_bytes];
                    for (row, rows) in tiles(x.scales.len(), self.kernel.rows()) {
                        let sums = &mut sums[..rows * side_by_side];
                        let values = &x.values[row * stride..][..rows * stride];
                        self.kernel.dot(values, weights, stride, sums);
                        for i in 0..side_by_side {
                            let first = (panel + i) * COLUMNS;
                            let columns = COLUMNS.min(self.out - first);
                            let outputs = Outputs {
                                scales: lanes(&self.scales, first),
                                sums: lanes(&self.sums, first),
                                bias: lanes(bias, first),
                                activation,
                                tile,
                            };
                            let sums = sums[i..].iter().step_by(side_by_side);
                            for (r, sums) in (row..).zip(sums) {
                                let finished = outputs.finish(sums, x.scales[r]);
                                // SAFETY: the row and the columns are within `y`.
                                unsafe {
                                    let to = y.add(r * self.out + first);
                                    if columns == COLUMNS {
                                        to.cast::<[f32; COLUMNS]>().write_unaligned(finished);
                                    } else {
                                        let from = finished.as_ptr();
                                        std::ptr::copy_nonoverlapping(from, to, columns);
                                    }
                                }
                            }
                        }
                    }
                }
            },
        );
    }
}

#[inline(always)]
fn lanes<T>(values: &[T], first: usize) -> &[T; COLUMNS] {
    values[first..]
        .first_chunk()
        .expect("outputs are padded to whole panels")
}

/// What turns sums of sixteen outputs into f32.
struct Outputs<'a> {
    scales: &'a [f32; COLUMNS],
    sums: &'a [i32; COLUMNS],
    bias: &'a [f32; COLUMNS],
    activation: Activation,
    tile: Option<TileKernel>,
}

impl Outputs<'_> {
    #[inline(always)]
    fn finish(&self, sums: &[i32; COLUMNS], (scale, zero): (f32, i32)) -> [f32; COLUMNS] {
        let mut y = [0f32; COLUMNS];
        for j in 0..COLUMNS {
            let sum = (sums[j] - zero * self.sums[j]) as f32;
            y[j] = sum * (scale * self.scales[j]) + self.bias[j];
        }
        match (self.activation, self.tile) {
            (Activation::Gelu, Some(kernel)) => kernel.gelu(&mut y),
            (activation, _) => activation.apply_inline(&mut y),
        }
        y
    }
}

/// s and z of a row, and q. Zero is a value of its own, as an activation that is off must stay so.
fn quantize_row(x: &[f32], q: &mut [u8]) -> (f32, i32) {
    vectorize(
        #[inline(always)]
        || {
            let (low, high) = range(x);
            let scale = (high - low) / 255.0;
            if scale == 0.0 || !scale.is_finite() {
                q.fill(0);
                // What is not finite must not become a number.
                return (if scale == 0.0 { 0.0 } else { f32::NAN }, 0);
            }
            let inverse = 1.0 / scale;
            let zero = (-low * inverse).round();
            for (q, x) in q.iter_mut().zip(x) {
                // Adding 2²³ rounds to an integer and puts it into the last bits.
                const ROUND: f32 = 8_388_608.0;
                *q = ((x * inverse + zero).clamp(0.0, 255.0) + ROUND).to_bits() as u8;
            }
            (scale, zero as i32)
        },
    )
}

/// Least and greatest of the values and 0; NaN if one is.
#[inline(always)]
fn range(x: &[f32]) -> (f32, f32) {
    const LANES: usize = 16;
    let (mut low, mut high) = ([0f32; LANES], [0f32; LANES]);
    // NaN and infinity survive a sum, which minimum and maximum would lose.
    let mut all = [0f32; LANES];
    let whole = x.chunks_exact(LANES);
    let rest = whole.remainder();
    for x in whole {
        for i in 0..LANES {
            low[i] = if x[i] < low[i] { x[i] } else { low[i] };
            high[i] = if x[i] > high[i] { x[i] } else { high[i] };
            all[i] += x[i] * 0.0;
        }
    }
    for (i, x) in rest.iter().enumerate() {
        low[i] = low[i].min(*x);
        high[i] = high[i].max(*x);
        all[i] += x * 0.0;
    }
    let finite: f32 = all.iter().sum();
    let low = low.iter().fold(0f32, |a, b| a.min(*b));
    let high = high.iter().fold(0f32, |a, b| a.max(*b));
    (low + finite, high + finite)
}

/// t and p of an output.
fn quantize_weights(weights: &[f32], p: &mut [i8]) -> f32 {
    let greatest = weights.iter().fold(0f32, |most, w| most.max(w.abs()));
    let of_pair = |pair: &[f32]| {
        let above: f32 = pair.iter().map(|w| w.max(0.0)).sum();
        let below: f32 = pair.iter().map(|w| (-w).max(0.0)).sum();
        above.max(below)
    };
    let pair = weights.chunks(2).map(of_pair).fold(0f32, f32::max);
    let mut scale = (greatest / MOST).max(pair / MOST_OF_PAIR as f32);
    if scale == 0.0 {
        p.fill(0);
        return 0.0;
    }
    loop {
        for (p, w) in p.iter_mut().zip(weights) {
            *p = (w / scale).round().clamp(-MOST, MOST) as i8;
        }
        if p.chunks(2).all(fits) {
            return scale;
        }
        // Rounded up both of a pair: a step wider, and they fit.
        scale *= 1.0 + 1.0 / 512.0;
    }
}

fn fits(pair: &[i8]) -> bool {
    let sum = |sign: i32| -> i32 { pair.iter().map(|p| (sign * i32::from(*p)).max(0)).sum() };
    sum(1) <= MOST_OF_PAIR && sum(-1) <= MOST_OF_PAIR
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The product by the formula, without kernels.
    fn reference(weight: &[f32], out: usize, input: usize, x: &[f32], bias: &[f32]) -> Vec<f32> {
        let mut y = Vec::new();
        let mut q = vec![0u8; input];
        let mut p = vec![0i8; input];
        for x in x.chunks_exact(input) {
            let (scale, zero) = quantize_row(x, &mut q);
            for j in 0..out {
                let t = quantize_weights(&weight[j * input..][..input], &mut p);
                let terms = q.iter().zip(&p);
                let sum: i32 = terms
                    .map(|(q, p)| (i32::from(*q) - zero) * i32::from(*p))
                    .sum();
                y.push(sum as f32 * (scale * t) + bias[j]);
            }
        }
        y
    }

    fn multiply(panels: &Int8Panels, x: &[f32], bias: &[f32]) -> Vec<f32> {
        let mut rows = Int8Rows::default();
        panels.quantize(x, &mut rows);
        let mut padded = bias.to_vec();
        padded.resize(panels.count() * COLUMNS, 0.0);
        let mut y = vec![0f32; x.len() / panels.input * panels.out];
        // SAFETY: `y` has a place for each row and output, and is used here alone.
        #[allow(unsafe_code)]
        unsafe {
            panels.multiply(
                0..panels.count(),
                &rows,
                y.as_mut_ptr(),
                &padded,
                Activation::None,
            );
        }
        y
    }

    /// Shapes that do and do not fill tiles, values whose pairs come close to saturation.
    fn problem() -> impl Strategy<Value = (usize, usize, Vec<f32>, Vec<f32>, Vec<f32>)> {
        (1usize..32, 1usize..70, 1usize..70).prop_flat_map(|(rows, out, input)| {
            let values = |n| prop::collection::vec(-1.0f32..1.0, n);
            let spread = prop::collection::vec(
                prop_oneof![4 => -1.0f32..1.0, 1 => Just(1.0), 1 => Just(-1.0)],
                out * input,
            );
            (
                Just(out),
                Just(input),
                spread,
                values(rows * input),
                values(out),
            )
        })
    }

    proptest! {
        #[test]
        fn every_kernel_of_the_machine_gives_what_the_formula_says(
            (out, input, weight, x, bias) in problem()
        ) {
            let expected = reference(&weight, out, input, &x, &bias);
            for kernel in Int8Kernel::all() {
                let panels = Int8Panels::new(&weight, out, input).with_kernel(kernel);
                prop_assert_eq!(&multiply(&panels, &x, &bias), &expected, "{:?}", kernel);
            }
        }

        #[test]
        fn a_product_is_near_the_one_in_f32((out, input, weight, x, bias) in problem()) {
            let found = multiply(&Int8Panels::new(&weight, out, input), &x, &bias);
            for (i, x) in x.chunks_exact(input).enumerate() {
                for j in 0..out {
                    let weight = &weight[j * input..][..input];
                    let exact: f32 = x.iter().zip(weight).map(|(x, w)| x * w).sum::<f32>() + bias[j];
                    // Half a step of each factor: 2 / 255 / 2 of x, 2 / 128 / 2 of a weight.
                    let most = input as f32 * (1.0 / 255.0 + 1.0 / 128.0 + 1e-4);
                    let error = (found[i * out + j] - exact).abs();
                    prop_assert!(error <= most, "{} off, {} allowed", error, most);
                }
            }
        }
    }

    #[test]
    fn pairs_of_the_greatest_weights_do_not_saturate() {
        let (out, input) = (16, 384);
        let weight = vec![0.5f32; out * input];
        let x = vec![1.0f32; input];
        let y = multiply(&Int8Panels::new(&weight, out, input), &x, &[0.0; 16]);
        for y in y {
            assert!((y - 192.0).abs() < 1.0, "{y}");
        }
    }

    #[test]
    fn what_is_not_finite_stays_so() {
        let panels = Int8Panels::new(&[1.0; 64], 1, 64);
        for bad in [f32::NAN, f32::INFINITY] {
            let mut x = vec![1.0; 64];
            x[17] = bad;
            assert!(!multiply(&panels, &x, &[0.0])[0].is_finite());
        }
        assert_eq!(multiply(&panels, &[0.0; 64], &[2.0]), [2.0]);
    }
}
