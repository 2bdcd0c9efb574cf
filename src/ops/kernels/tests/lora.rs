//! Low-rank updates and heads of many segments.

use std::ops::Range;

use super::*;
use crate::ops::{self, Activation, ColumnMap, Linear, LoraUpdate};

/// An update as the CPU and as the device take it, with the device's memory.
struct Both {
    rows: Range<usize>,
    cpu: LoraUpdate,
    device: Update,
    _buffers: Vec<Buffer>,
}

struct Shape {
    rows: Range<usize>,
    rank: usize,
    column: usize,
    width: usize,
    mapped: bool,
}

fn update(t: Scalar, seed: u64, input_of: usize, shape: Shape) -> Both {
    let Shape {
        rows,
        rank,
        column,
        width,
        mapped,
    } = shape;
    let (a, of_a) = input(t, seed, (rank, input_of));
    let (b, of_b) = input(t, seed + 1, (width, rank));
    let (gain, of_gain) = vector(seed + 2, width);
    let (shift, of_shift) = vector(seed + 3, width);
    let scale = 0.25 + (seed % 7) as f32 / 8.0;
    let device = Update {
        rows: rows.clone(),
        a: of_a.ptr(),
        b: of_b.ptr(),
        gain: mapped.then(|| of_gain.ptr()),
        shift: mapped.then(|| of_shift.ptr()),
        scale,
        rank,
        column,
        width,
    };
    let cpu = LoraUpdate {
        a,
        b,
        scale: f64::from(scale),
        column,
        map: mapped.then_some(ColumnMap { gain, shift }),
    };
    Both {
        rows,
        cpu,
        device,
        _buffers: vec![of_a, of_b, of_gain, of_shift],
    }
}

/// Shrinks and expands beside [`ops::linear_rows`] on a linear that gives `y` as it is.
fn check(
    t: Scalar,
    (rows, input_of, out): (usize, usize, usize),
    updates: &[Both],
    kind: Activation,
) {
    let (x, of_x) = input(t, 500, (rows, input_of));
    let (y, of_y) = input(t, 501, (rows, out));
    let (bias, of_bias) = vector(502, out);
    let device: Vec<Update> = updates.iter().map(|update| update.device.clone()).collect();
    let h = Buffer::poisoned(Scalar::F32, shrink_values(&device));
    run(shrink(t, of_x.ptr(), input_of, &device, h.ptr()));
    let place = Some(of_bias.ptr());
    run(expand(
        t,
        of_y.ptr(),
        rows,
        out,
        place,
        &device,
        h.ptr(),
        kind,
    ));

    let mut expected = y.broadcast_add(&bias).unwrap();
    for update in updates.iter().filter(|update| !update.rows.is_empty()) {
        let part = |tensor: &Tensor, rows: Range<usize>| {
            tensor
                .narrow(0, rows.start, rows.len())
                .unwrap()
                .contiguous()
                .unwrap()
        };
        let Range { start, end } = update.rows;
        let x = part(&x, start..end);
        let middle = part(&expected, start..end);
        let middle = ops::add_updates(&middle, &x, std::slice::from_ref(&update.cpu)).unwrap();
        let ends = [part(&expected, 0..start), part(&expected, end..rows)];
        expected = Tensor::cat(&[&ends[0], &middle, &ends[1]], 0).unwrap();
    }
    let expected = ops::activation(&expected, kind).unwrap();
    // Where an update on top of others was rounded in between, none is; so the rounding is one.
    assert_close(
        &of_y.values(),
        &values(&expected),
        t,
        5e-5,
        "low-rank updates",
    );
}

#[test]
fn one_adapter_of_all_rows() {
    for t in SCALARS {
        for (rank, rows) in [(8, 33), (64, 17), (16, 1), (5, 16), (256, 3), (100, 20)] {
            let shape = |column| Shape {
                rows: 0..rows,
                rank,
                column,
                width: 40,
                mapped: false,
            };
            let updates = [update(t, 1, 96, shape(0)), update(t, 11, 96, shape(80))];
            check(t, (rows, 96, 120), &updates, Activation::None);
        }
    }
}

#[test]
fn adapters_of_few_rows_each() {
    for t in SCALARS {
        let updates: Vec<Both> = (0..100)
            .map(|i| {
                let shape = Shape {
                    rows: 3 * i..3 * i + 1 + i % 3,
                    rank: 1 + i % 9,
                    column: 7 * (i % 3),
                    width: 12,
                    mapped: i % 4 == 0,
                };
                update(t, 1000 + 10 * i as u64, 19, shape)
            })
            .collect();
        check(t, (302, 19, 33), &updates, Activation::Gelu);
    }
}

#[test]
fn updates_lie_on_each_other_in_their_order() {
    for t in SCALARS {
        // Ranges of rows overlap and are not sorted; some are empty; columns overlap too.
        let shapes = [
            (9..20, 3, 70),
            (0..12, 60, 9),
            (4..4, 0, 5),
            (11..40, 0, 75),
            (0..40, 61, 4),
        ];
        let updates: Vec<Both> = shapes
            .into_iter()
            .enumerate()
            .map(|(i, (rows, column, width))| {
                let shape = Shape {
                    rows,
                    rank: 3 + 8 * i,
                    column,
                    width,
                    mapped: i != 1,
                };
                update(t, 1 + 10 * i as u64, 130, shape)
            })
            .collect();
        check(t, (45, 130, 77), &updates, Activation::Tanh);
    }
}

#[test]
fn more_updates_on_a_row_than_a_launch_takes() {
    let updates: Vec<Both> = (0..70)
        .map(|i| {
            let shape = Shape {
                rows: 1..4 + i % 3,
                rank: 2,
                column: i % 5,
                width: 6,
                mapped: i % 30 == 3,
            };
            update(Scalar::F32, 1 + 10 * i as u64, 8, shape)
        })
        .collect();
    check(Scalar::F32, (7, 8, 12), &updates, Activation::Relu);
}

#[test]
fn random_updates_agree_with_the_cpu() {
    let mut state = 1u64;
    let mut below = |bound: usize| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (state >> 33) as usize % bound
    };
    for round in 0..30 {
        let t = SCALARS[round % 3];
        let (rows, input_of, out) = (1 + below(50), 1 + below(150), 1 + below(150));
        let updates: Vec<Both> = (0..below(9))
            .map(|i| {
                let start = below(rows);
                let column = below(out);
                let shape = Shape {
                    rows: start..start + below(rows - start + 1),
                    rank: 1 + below(40),
                    column,
                    width: 1 + below(out - column),
                    mapped: below(2) == 0,
                };
                update(t, (round * 100 + 10 * i) as u64, input_of, shape)
            })
            .collect();
        check(t, (rows, input_of, out), &updates, Activation::Gelu);
    }
}

#[test]
fn rows_without_updates_get_bias_and_activation() {
    for t in SCALARS {
        for (rows, out) in [(1, 1), (17, 384), (5, 67)] {
            check(t, (rows, 4, out), &[], Activation::Gelu);
        }
    }
}

#[test]
fn heads_of_many_tasks() {
    for t in SCALARS {
        for out_scalar in [t, Scalar::F32] {
            for (input_of, tasks, kind) in [
                (384, 3, Activation::Tanh),
                (19, 130, Activation::None),
                (72, 1, Activation::Relu),
            ] {
                let rows = 2 * tasks + 20;
                let (x, of_x) = input(t, 1, (rows, input_of));
                let mut segments = Vec::new();
                let mut kept = Vec::new();
                let mut expected = Vec::new();
                for task in 0..tasks {
                    let out_features = 1 + (task * 7) % 35;
                    let (weight, of_weight) = input(t, task as u64, (out_features, input_of));
                    let (bias, of_bias) = vector(task as u64, out_features);
                    let bias = (task % 2 == 0).then_some(bias);
                    let rows = 2 * task..2 * task + [1, 20, 0, 2][task % 4];
                    segments.push(SegmentLinear {
                        rows: rows.clone(),
                        weight: of_weight.ptr(),
                        bias: bias.as_ref().map(|_| of_bias.ptr()),
                        out_features,
                        output: expected.len(),
                    });
                    kept.push([of_weight, of_bias]);
                    if !rows.is_empty() {
                        let x = x.narrow(0, rows.start, rows.len()).unwrap();
                        let head = Linear { weight, bias };
                        let y = ops::linear(&x.contiguous().unwrap(), &head, kind);
                        expected.extend(values(&y.unwrap()));
                    }
                }
                let out = Buffer::poisoned(out_scalar, expected.len());
                let x = of_x.ptr();
                let to = out.ptr();
                run(segment_linear(
                    t, x, input_of, &segments, kind, to, out_scalar,
                ));
                let found = out.values();
                assert_close(&found, &expected, out_scalar, 1e-5, "heads");
            }
        }
    }
}
