use proptest::prelude::*;

use super::*;

/// The product in plain Rust, in the kernels' order.
fn reference(problem: &Problem, activation: Activation) -> Vec<f32> {
    let Problem {
        rows,
        depth,
        columns,
        ..
    } = *problem;
    let mut y = problem.target.clone();
    for r in 0..rows {
        for c in 0..columns {
            let (panel, lane) = (c / COLUMNS, c % COLUMNS);
            let mut sum = 0f32;
            for k in 0..depth {
                let weight = problem.right[(panel * depth + k) * COLUMNS + lane];
                sum = problem.left[r * depth + k].mul_add(weight, sum);
            }
            let start = match problem.start {
                0 => 0.0,
                1 => problem.bias[c],
                _ => y[r * columns + c],
            };
            let mut value = [sum.mul_add(0.75, start)];
            activation.apply_inline(&mut value);
            y[r * columns + c] = value[0];
        }
    }
    y
}

fn by_kernel(kernel: TileKernel, problem: &Problem, activation: Activation) -> Vec<f32> {
    let mut y = problem.target.clone();
    let left = Left {
        values: problem.left.as_ptr(),
        stride: problem.depth,
        rows: problem.rows,
        depth: problem.depth,
    };
    let right = Right {
        values: problem.right.as_ptr(),
        stride: COLUMNS,
        panels: problem.columns.div_ceil(COLUMNS),
        apart: problem.depth * COLUMNS,
    };
    let target = Target {
        values: y.as_mut_ptr(),
        stride: problem.columns,
        columns: problem.columns,
    };
    let finish = Finish {
        scale: 0.75,
        start: match problem.start {
            0 => Start::Zero,
            1 => Start::Bias(problem.bias.as_ptr()),
            _ => Start::Target,
        },
        activation,
    };
    // SAFETY: the vectors have the extents that the problem says.
    #[allow(unsafe_code)]
    unsafe {
        kernel.multiply(left, right, target, finish);
    }
    y
}

#[derive(Clone, Debug)]
struct Problem {
    rows: usize,
    depth: usize,
    columns: usize,
    start: u8,
    left: Vec<f32>,
    right: Vec<f32>,
    bias: Vec<f32>,
    target: Vec<f32>,
}

fn problem() -> impl Strategy<Value = Problem> {
    (1usize..32, 1usize..40, 1usize..90, 0u8..3).prop_flat_map(|(rows, depth, columns, start)| {
        let values = |n| prop::collection::vec(-2.0f32..2.0, n);
        let padded = columns.next_multiple_of(COLUMNS);
        let matrices = (
            values(rows * depth),
            values(depth * padded),
            values(padded),
            values(rows * columns),
        );
        matrices.prop_map(move |(left, right, bias, target)| Problem {
            rows,
            depth,
            columns,
            start,
            left,
            right,
            bias,
            target,
        })
    })
}

proptest! {
    #[test]
    fn every_kernel_of_the_machine_sums_as_plain_rust_does(problem in problem()) {
        for kernel in TileKernel::all() {
            let found = by_kernel(kernel, &problem, Activation::None);
            prop_assert_eq!(&found, &reference(&problem, Activation::None), "{:?}", kernel);
            for activation in [Activation::Gelu, Activation::Tanh, Activation::Relu] {
                let found = by_kernel(kernel, &problem, activation);
                for (a, b) in found.iter().zip(reference(&problem, activation)) {
                    prop_assert!((a - b).abs() <= 1e-6 * (1.0 + b.abs()), "{kernel:?}: {a} {b}");
                }
            }
        }
    }
}

/// A number in both halves of the place of an f32.
fn twice(value: f32) -> f32 {
    let bits = value.to_bits() >> 16;
    f32::from_bits(bits | bits << 16)
}

proptest! {
    #[test]
    fn kernels_for_pairs_agree_and_do_not_depend_on_the_batch(
        problem in problem(), blocks in 0usize..4
    ) {
        // Depths of whole tile registers, and others.
        let mut problem = problem;
        if blocks > 0 {
            problem.depth = 16 * blocks;
        }
        let fill = |values: &[f32], n: usize| -> Vec<f32> {
            values.iter().cycle().take(n).map(|value| twice(*value)).collect()
        };
        let padded = problem.columns.next_multiple_of(COLUMNS);
        problem.left = fill(&problem.left, problem.rows * problem.depth);
        problem.right = fill(&problem.right, padded * problem.depth);
        let mut first = None;
        for kernel in TileKernel::all_bf16() {
            let found = by_kernel(kernel, &problem, Activation::None);
            let expected = first.get_or_insert_with(|| found.clone());
            for (a, b) in found.iter().zip(&*expected) {
                prop_assert!((a - b).abs() <= 1e-3 * (1.0 + b.abs()), "{kernel:?}: {a} {b}");
            }
            for row in 0..problem.rows {
                let mut alone = problem.clone();
                let depth = problem.depth;
                alone.rows = 1;
                alone.left = problem.left[row * depth..][..depth].to_vec();
                alone.target = problem.target[row * problem.columns..][..problem.columns].to_vec();
                let one = by_kernel(kernel, &alone, Activation::None);
                prop_assert_eq!(&one[..], &found[row * problem.columns..][..problem.columns]);
            }
        }
    }
}

proptest! {
    #[test]
    fn narrow_products_are_the_same_by_every_kernel_and_in_every_batch(
        rows in 1usize..8, depth in 1usize..70, rank in 1usize..11, seed in any::<u32>()
    ) {
        let mut state = seed;
        let mut values = |n: usize| -> Vec<f32> {
            let mut next = || {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 8) as f32 / (1 << 23) as f32 - 1.0
            };
            (0..n).map(|_| next()).collect()
        };
        let (x, a) = (values(rows * depth), values(rank * depth));
        let by = |kernel: TileKernel, x: &[f32]| {
            let mut h = vec![0f32; x.len() / depth * rank];
            kernel.dots(x, &a, depth, 2.0, &mut h);
            h
        };
        for kernel in TileKernel::all() {
            let found = by(kernel, &x);
            prop_assert_eq!(&found, &by(TileKernel::all()[0], &x), "{:?}", kernel);
            for (r, x) in x.chunks_exact(depth).enumerate() {
                prop_assert_eq!(&found[r * rank..(r + 1) * rank], &by(kernel, x)[..]);
                for (j, a) in a.chunks_exact(depth).enumerate() {
                    let products = x.iter().zip(a).map(|(x, a)| f64::from(x * a));
                    let exact = 2.0 * products.sum::<f64>() as f32;
                    let error = (found[r * rank + j] - exact).abs();
                    prop_assert!(error < 1e-5 * depth as f32, "{} off", error);
                }
            }
        }
    }
}

#[test]
fn gelu_is_the_one_of_the_other_machines() {
    for kernel in TileKernel::all() {
        for i in -600..600 {
            let x: [f32; COLUMNS] = std::array::from_fn(|j| i as f32 / 50.0 + j as f32 / 800.0);
            let (mut found, mut expected) = (x, x);
            kernel.gelu(&mut found);
            Activation::Gelu.apply_inline(&mut expected);
            for (a, b) in found.iter().zip(expected) {
                assert!((a - b).abs() <= 1e-6 * (1.0 + b.abs()), "{x:?}: {a} {b}");
            }
        }
        let mut values = [f32::NAN; COLUMNS];
        kernel.gelu(&mut values);
        assert!(values.iter().all(|value| value.is_nan()));
    }
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
