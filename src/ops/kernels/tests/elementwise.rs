//! Activations, dropout, maps and sums of columns, the optimizer.

use super::*;
use crate::ops::{self, Activation, AdamWStep, ColumnMap, Dropout};

const ACTIVATIONS: [Activation; 4] = [
    Activation::None,
    Activation::Gelu,
    Activation::Tanh,
    Activation::Relu,
];

#[test]
fn activations_and_their_gradients() {
    for t in SCALARS {
        for (kind, count) in ACTIVATIONS.into_iter().zip([1, 4099, 2048, 17]) {
            let (x, of_x) = input(t, 1, (1, count));
            let (gradient, of_gradient) = input(t, 2, (1, count));
            let y = Buffer::poisoned(t, count);
            run(activation(t, kind, of_x.ptr(), y.ptr(), count));
            let expected = values(&ops::activation(&x, kind).unwrap());
            assert_close(&y.values(), &expected, t, 2e-6, "activation");

            let dx = Buffer::poisoned(t, count);
            let g = of_gradient.ptr();
            run(activation_gradient(t, kind, g, of_x.ptr(), dx.ptr(), count));
            let expected = gradients(&[&x], &gradient, |x| ops::activation(&x[0], kind));
            assert_close(&dx.values(), &expected[0], t, 2e-6, "gradient");
        }
    }
}

#[test]
fn dropout_has_the_mask_of_the_cpu() {
    for t in SCALARS {
        for (rows, columns) in [(1, 7), (9, 384), (5, 33)] {
            let (x, of_x) = input(t, 1, (rows, columns));
            let mask = Dropout {
                rate: 0.25,
                seed: 0xfeed_beef_0123_4567,
                first_row: 1000,
            };
            let y = Buffer::poisoned(t, rows * columns);
            run(dropout(t, of_x.ptr(), y.ptr(), rows, columns, &mask));
            let expected = values(&ops::dropout(&x, mask).unwrap());
            assert!(
                y.values()
                    .iter()
                    .zip(&expected)
                    .all(|(a, b)| (*a == 0.0) == (*b == 0.0))
            );
            assert_close(&y.values(), &expected, t, 0.0, "dropout");
        }
    }
}

#[test]
fn columns_are_mapped_and_summed() {
    for t in SCALARS {
        for (rows, columns, column, width) in [(1, 5, 0, 5), (70, 33, 30, 3), (6, 96, 8, 64)] {
            let (x, of_x) = input(t, 1, (rows, columns));
            let (gain, of_gain) = vector(2, width);
            let (shift, of_shift) = vector(3, width);
            let out = Buffer::poisoned(t, rows * columns);
            for shifted in [true, false] {
                run(map_columns(
                    t,
                    of_x.ptr(),
                    of_gain.ptr(),
                    shifted.then(|| of_shift.ptr()),
                    out.ptr(),
                    rows,
                    columns,
                    column,
                    width,
                ));
                let map = ColumnMap {
                    gain: gain.clone(),
                    shift: if shifted {
                        shift.clone()
                    } else {
                        shift.zeros_like().unwrap()
                    },
                };
                let expected = values(&ops::map_columns(&x, &map, column).unwrap());
                assert_close(&out.values(), &expected, t, 1e-6, "map");
            }
            let sums = Buffer::poisoned(Scalar::F32, columns);
            run(column_sums(t, of_x.ptr(), sums.ptr(), rows, columns));
            let expected = values(&x.sum(0).unwrap());
            assert_close(&sums.values(), &expected, Scalar::F32, 1e-5, "sums");
        }
    }
}

#[test]
fn squares_are_summed_in_parts() {
    for count in [1, 255, 70_001] {
        let (x, of_x) = vector(1, count);
        let partials = Buffer::poisoned(Scalar::F32, PARTIALS);
        run([sum_squares(of_x.ptr(), partials.ptr(), count)]);
        let expected: f32 = values(&x.sqr().unwrap().sum_all().unwrap())[0];
        let found: f32 = partials.values().iter().sum();
        assert!(
            (found - expected).abs() <= 1e-5 * expected,
            "{found} {expected}"
        );
    }
}

#[test]
fn adamw_agrees_with_torch() {
    // The same steps and values as in the optimizer's own test.
    let value = Buffer::of(Scalar::F32, &[1.0, -2.0]);
    let first = Buffer::of(Scalar::F32, &[0.0; 2]);
    let second = Buffer::of(Scalar::F32, &[0.0; 2]);
    for (t, gradient) in [(1, [0.5, -1.0]), (2, [0.25, 0.0]), (3, [-1.0, 2.0])] {
        // Half of the gradient is in the factor.
        let gradient = Buffer::of(Scalar::F32, &gradient.map(|g| 2.0 * g));
        let step = AdamWStep {
            scale: 0.5,
            learning_rate: 0.1,
            decay: 1.0 - 0.1 * 0.01,
            beta_1: 0.9,
            beta_2: 0.999,
            epsilon: 1e-8,
            bias_1: 1.0 - 0.9f64.powi(t),
            bias_2: 1.0 - 0.999f64.powi(t),
        };
        let (value, gradient) = (value.ptr(), gradient.ptr());
        run(adamw(value, gradient, first.ptr(), second.ptr(), 2, step));
    }
    for (found, torch) in value.values().iter().zip([0.824_713_9, -1.861_270_7]) {
        assert!((found - torch).abs() < 1e-6, "{found} {torch}");
    }
}
