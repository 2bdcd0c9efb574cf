//! Embeddings, LayerNorm and windows over tokens.

use super::*;
use crate::ops::{self, EmbedIndices, Norm};

const EPS: f64 = 1e-5;
/// Rows and hidden sizes: one row, vectors and none, a row too long for registers.
const SHAPES: [(usize, usize); 6] = [(1, 1), (5, 19), (3, 384), (7, 33), (2, 1024), (3, 1100)];

#[test]
fn embed_sums_rows_of_three_tables() {
    for t in SCALARS {
        for hidden in [5, 40, 384] {
            let (word, w) = input(t, 1, (7, hidden));
            let (position, p) = input(t, 2, (6, hidden));
            let (token_type, y) = input(t, 3, (2, hidden));
            let indices = [[3, 0, 3, 6, 1], [0, 1, 2, 0, 5], [0, 0, 1, 1, 0]];
            let of = |i: usize| Buffer::indices(indices[i].map(|x| x as usize));
            let places = [of(0), of(1), of(2)];
            let out = Buffer::poisoned(t, 5 * hidden);
            let tables = [w.ptr(), p.ptr(), y.ptr()];
            let places = [places[0].ptr(), places[1].ptr(), places[2].ptr()];
            run(embed(t, tables, places, out.ptr(), 5, hidden));
            let indices = EmbedIndices {
                word: indices[0].into(),
                position: indices[1].into(),
                token_type: indices[2].into(),
                on_device: None,
            };
            let expected = ops::embed(&word, &position, &token_type, indices).unwrap();
            assert_close(&out.values(), &values(&expected), t, 1e-6, "embed");
        }
    }
}

#[test]
fn norm_is_of_the_sum() {
    for t in SCALARS {
        for (rows, hidden) in SHAPES {
            let (x, of_x) = input(t, 1, (rows, hidden));
            let (residual, of_residual) = input(t, 2, (rows, hidden));
            let (bias, of_bias) = vector(3, hidden);
            let (gamma_beta, parameters) = input(Scalar::F32, 4, (2, hidden));
            for (with_residual, with_bias) in [(true, true), (false, true), (true, false)] {
                let mut sum = x.clone();
                if with_bias {
                    sum = sum.broadcast_add(&bias).unwrap();
                }
                if with_residual {
                    sum = (sum + &residual).unwrap();
                }
                let norm_of = Norm {
                    gamma_beta: gamma_beta.clone(),
                    eps: EPS,
                };
                let expected = values(&ops::norm(&sum, &norm_of).unwrap());
                let in_place = Buffer::of(t, &of_x.values());
                let out = Buffer::poisoned(t, rows * hidden);
                for (x, y) in [(&of_x, &out), (&in_place, &in_place)] {
                    run(norm(
                        t,
                        x.ptr(),
                        with_residual.then(|| of_residual.ptr()),
                        with_bias.then(|| of_bias.ptr()),
                        parameters.ptr(),
                        y.ptr(),
                        rows,
                        hidden,
                        EPS as f32,
                    ));
                    assert_close(&y.values(), &expected, t, 1e-5, "norm");
                }
            }
        }
    }
}

#[test]
fn norm_gradients_are_those_of_the_cpu() {
    for t in SCALARS {
        for (rows, hidden) in SHAPES.into_iter().chain([(70, 40)]) {
            let (x, of_x) = input(t, 1, (rows, hidden));
            let (gradient, of_gradient) = input(t, 2, (rows, hidden));
            let (gamma_beta, parameters) = input(Scalar::F32, 4, (2, hidden));
            let expected = gradients(&[&x, &gamma_beta], &gradient, |inputs| {
                let norm = Norm {
                    gamma_beta: inputs[1].clone(),
                    eps: EPS,
                };
                ops::norm(&inputs[0], &norm)
            });
            let dx = Buffer::poisoned(t, rows * hidden);
            let dparameters = Buffer::poisoned(Scalar::F32, 2 * hidden);
            let (g, x) = (of_gradient.ptr(), of_x.ptr());
            let eps = EPS as f32;
            run(norm_gradient(
                t,
                g,
                x,
                parameters.ptr(),
                dx.ptr(),
                rows,
                hidden,
                eps,
            ));
            let out = dparameters.ptr();
            run(norm_parameters_gradient(t, g, x, out, rows, hidden, eps));
            assert_close(&dx.values(), &expected[0], t, 2e-5, "gradient of x");
            let found = dparameters.values();
            assert_close(&found, &expected[1], Scalar::F32, 2e-5, "γ and β");
        }
    }
}

#[test]
fn windows_unfold_and_fold() {
    let offsets = [0, 1, 1, 4, 9];
    for t in SCALARS {
        for (hidden, kernel) in [(3, 1), (40, 3), (2, 5), (33, 7)] {
            let borders = Buffer::indices(offsets);
            let (x, of_x) = input(t, 1, (9, hidden));
            let (gradient, of_gradient) = input(t, 2, (9, kernel * hidden));
            let out = Buffer::poisoned(t, 9 * kernel * hidden);
            let place = borders.ptr();
            run(unfold(
                t,
                of_x.ptr(),
                place,
                out.ptr(),
                4,
                9,
                hidden,
                kernel,
            ));
            let expected = ops::unfold(&x, &offsets.into(), kernel).unwrap();
            assert_eq!(out.values(), values(&expected));

            let sums = Buffer::poisoned(t, 9 * hidden);
            let g = of_gradient.ptr();
            run(fold(t, g, place, sums.ptr(), 4, 9, hidden, kernel));
            let expected = gradients(&[&x], &gradient, |inputs| {
                ops::unfold(&inputs[0], &offsets.into(), kernel)
            });
            assert_close(&sums.values(), &expected[0], t, 1e-6, "fold");
        }
    }
}
