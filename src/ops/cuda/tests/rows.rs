//! Ops that know rows and columns, but no sequences.

use std::ops::Range;
use std::sync::Arc;

use super::*;
use crate::ops::{
    self, Activation, AdamWStep, ColumnMap, Dropout, EmbedIndices, Linear, LoraUpdate, Norm,
    RowUpdates,
};

const ACTIVATIONS: [Activation; 4] = [
    Activation::None,
    Activation::Gelu,
    Activation::Relu,
    Activation::Tanh,
];

/// Rows, and widths as encoders have them or not.
fn shape(draw: &mut Draw) -> (usize, usize, usize) {
    let rows = draw.number(1, 300);
    let width = |draw: &mut Draw| draw.one_of(&[8, 33, 64, 96, 384, 385, 768]);
    (rows, width(draw), width(draw))
}

/// A few drawn cases of each type.
fn cases(mut case: impl FnMut(DType, &mut Draw)) {
    for dtype in TYPES {
        for seed in 0..6 {
            case(dtype, &mut Draw::new(seed));
        }
    }
}

fn linear_of(parts: &[Tensor]) -> Linear {
    Linear {
        weight: parts[0].clone(),
        bias: parts.get(1).cloned(),
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn linears_with_activations() {
    cases(|dtype, draw| {
        let (rows, input, out) = shape(draw);
        let act = draw.one_of(&ACTIVATIONS);
        // Of products that neither vanish nor saturate an activation.
        let weight = (draw.tensor((out, input)) * (1.0 / (input as f64).sqrt())).unwrap();
        let x = InType(draw.tensor((rows, input)));
        let parts = [InType(weight), InF32(draw.tensor(out))];
        let of = format!("linear {rows}×{input}→{out} {act:?}");
        let inputs = [x, parts[0].clone(), parts[1].clone()];
        assert_values(&of, dtype, &inputs, |t| {
            ops::linear(&t[0], &linear_of(&t[1..]), act)
        });
        assert_values(&of, dtype, &inputs[..2], |t| {
            ops::linear(&t[0], &linear_of(&t[1..]), act)
        });
        // Frozen weights: the gradient of the input alone.
        let (here, there) = (inputs[1].sides(dtype), inputs[2].sides(dtype));
        assert_gradients(&of, dtype, &inputs[..1], |t| {
            let (weight, bias) = match t[0].device().is_cpu() {
                true => (&here.0, &there.0),
                false => (&here.1, &there.1),
            };
            ops::linear(&t[0], &linear_of(&[weight.clone(), bias.clone()]), act)
        });
        // All train, as a head's do: in f32.
        assert_gradients(&of, DType::F32, &inputs, |t| {
            ops::linear(&t[0], &linear_of(&t[1..]), act)
        });
    });
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn activations() {
    cases(|dtype, draw| {
        let (rows, width, _) = shape(draw);
        for act in ACTIVATIONS {
            let inputs = [InType(draw.tensor((rows, width)))];
            let of = format!("{act:?} {rows}×{width}");
            assert_gradients(&of, dtype, &inputs, |t| ops::activation(&t[0], act));
        }
    });
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn norms() {
    cases(|dtype, draw| {
        let (rows, hidden, _) = shape(draw);
        let of = format!("norm {rows}×{hidden}");
        let norm = |gamma_beta: &Tensor| Norm {
            gamma_beta: gamma_beta.clone(),
            eps: 1e-5,
        };
        let x = InType(draw.tensor((rows, hidden)));
        let residual = InType(draw.tensor((rows, hidden)));
        let (gamma_beta, bias) = (InF32(draw.tensor((2, hidden))), InF32(draw.tensor(hidden)));
        let inputs = [x.clone(), gamma_beta.clone()];
        assert_gradients(&of, dtype, &inputs, |t| ops::norm(&t[0], &norm(&t[1])));
        let inputs = [x.clone(), residual.clone(), gamma_beta.clone()];
        assert_gradients(&of, dtype, &inputs, |t| {
            ops::add_norm(&t[0], None, &t[1], &norm(&t[2]))
        });
        let inputs = [x, residual, gamma_beta, bias];
        assert_values(&of, dtype, &inputs, |t| {
            ops::add_norm(&t[0], Some(&t[3]), &t[1], &norm(&t[2]))
        });
    });
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn dropout_draws_the_same_mask() {
    cases(|dtype, draw| {
        let (rows, width, _) = shape(draw);
        let dropout = Dropout {
            rate: 0.3,
            seed: 7,
            first_row: draw.number(0, 1000),
        };
        let inputs = [InType(draw.tensor((rows, width)))];
        let of = format!("dropout {rows}×{width}");
        assert_gradients(&of, dtype, &inputs, |t| ops::dropout(&t[0], dropout));
    });
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn embeddings() {
    cases(|dtype, draw| {
        let (tokens, hidden, words) = shape(draw);
        let mut indices = |most: usize| -> Arc<[u32]> {
            (0..tokens)
                .map(|_| draw.number(0, most - 1) as u32)
                .collect()
        };
        let indices = [indices(words), indices(17), indices(2)];
        let slices: Vec<&[u32]> = indices.iter().map(|index| &**index).collect();
        let there = device::upload(gpu(), &slices).unwrap();
        let tables = [words, 17, 2].map(|rows| InType(draw.tensor((rows, hidden))));
        let of = format!("embed {tokens} of {words}×{hidden}");
        assert_values(&of, dtype, &tables, |t| {
            let [word, position, token_type] = indices.clone();
            let on_device = (!t[0].device().is_cpu())
                .then(|| [there[0].clone(), there[1].clone(), there[2].clone()]);
            let indices = EmbedIndices {
                word,
                position,
                token_type,
                on_device,
            };
            ops::embed(&t[0], &t[1], &t[2], indices)
        });
    });
}

/// One adapter's updates of a linear, of three parts side by side: A, B, gain and shift of each.
fn update_inputs(draw: &mut Draw, input: usize, width: usize, rank: usize) -> [Input; 4] {
    let a = (draw.tensor((rank, input)) * (1.0 / (input as f64).sqrt())).unwrap();
    [
        InType(a),
        InType(draw.tensor((width, rank))),
        InF32(draw.tensor(width)),
        InF32(draw.tensor(width)),
    ]
}

fn update(t: &[Tensor], column: usize, mapped: bool) -> LoraUpdate {
    LoraUpdate {
        a: t[0].clone(),
        b: t[1].clone(),
        scale: 1.5,
        column,
        map: mapped.then(|| ColumnMap {
            gain: t[2].clone(),
            shift: t[3].clone(),
        }),
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn rows_with_an_adapter_each() {
    cases(|dtype, draw| {
        let (_, input, part) = shape(draw);
        let adapters = draw.one_of(&[1, 3, 5, 100]);
        let act = draw.one_of(&ACTIVATIONS);
        let out = 3 * part;
        let weight = (draw.tensor((out, input)) * (1.0 / (input as f64).sqrt())).unwrap();
        let mut ranges: Vec<Range<usize>> = Vec::new();
        let mut inputs = Vec::new();
        let mut next = 0;
        for _ in 0..adapters {
            // Some rows have no adapter.
            next += draw.number(0, 2);
            let rows = draw.number(1, 30);
            ranges.push(next..next + rows);
            next += rows;
            let rank = draw.one_of(&[1, 4, 8, 16, 33]);
            // Of the first and the last part.
            for _ in 0..2 {
                inputs.extend(update_inputs(draw, input, part, rank));
            }
        }
        let mapped = draw.number(0, 1) == 1;
        let first = [
            InType(draw.tensor((next + 2, input))),
            InType(weight),
            InF32(draw.tensor(out)),
        ];
        let all = [&first[..], &inputs].concat();
        let of = format!("{adapters} adapters, {}×{input}→{out}, {act:?}", next + 2);
        assert_values(&of, dtype, &all, |t| {
            let of_adapters = t[3..].chunks(8).zip(&ranges).map(|(t, rows)| RowUpdates {
                rows: rows.clone(),
                updates: [
                    update(&t[..4], 0, mapped),
                    update(&t[4..], 2 * part, mapped),
                ]
                .into(),
            });
            ops::linear_rows(&t[0], &linear_of(&t[1..3]), of_adapters.collect(), act)
        });
    });
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn updates_of_all_rows() {
    cases(|dtype, draw| {
        let (rows, input, width) = shape(draw);
        let rank = draw.one_of(&[1, 8, 20]);
        let inputs = update_inputs(draw, input, width, rank);
        let y = InType(draw.tensor((rows, width + 5)));
        let x = InType(draw.tensor((rows, input)));
        let all = [&[y.clone(), x][..], &inputs].concat();
        let of = format!("updates {rows}×{input}→{width}, rank {rank}");
        assert_values(&of, dtype, &all, |t| {
            ops::add_updates(&t[0], &t[1], &[update(&t[2..], 5, false)])
        });
        let h = InType(draw.tensor((rows, rank)));
        let all = [y.clone(), h, inputs[1].clone()];
        // What trains is in f32, and so is all that it meets.
        assert_gradients(&of, DType::F32, &all, |t| {
            ops::lora_add(&t[0], &t[1], &t[2], 0.7, 5)
        });
        let all = [y, inputs[2].clone(), inputs[3].clone()];
        assert_gradients(&of, DType::F32, &all, |t| {
            let map = ColumnMap {
                gain: t[1].clone(),
                shift: t[2].clone(),
            };
            ops::map_columns(&t[0], &map, 5)
        });
    });
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn heads_of_many_tasks() {
    cases(|dtype, draw| {
        let (_, input, _) = shape(draw);
        let tasks = draw.number(1, 40);
        let mut inputs = Vec::new();
        let mut ranges = Vec::new();
        let mut next = 0;
        for _ in 0..tasks {
            let (rows, labels) = (draw.number(1, 5), draw.number(1, 9));
            ranges.push(next..next + rows);
            next += rows;
            inputs.push(InType(draw.tensor((labels, input))));
            inputs.push(InF32(draw.tensor(labels)));
        }
        let all = [&[InType(draw.tensor((next, input)))][..], &inputs].concat();
        let of = format!("{tasks} heads of {input}");
        assert_values(&of, dtype, &all, |t| {
            let linears: Vec<Linear> = t[1..].chunks(2).map(linear_of).collect();
            let segments: Vec<_> = ranges.iter().cloned().zip(&linears).collect();
            ops::segment_linears(&t[0], &segments, Activation::Tanh, DType::F32)
        });
    });
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn the_optimizer_moves_alike() {
    for count in [1, 33, 100_000] {
        let step = AdamWStep {
            scale: 0.5,
            learning_rate: 1e-2,
            decay: 0.999,
            beta_1: 0.9,
            beta_2: 0.999,
            epsilon: 1e-8,
            bias_1: 0.1,
            bias_2: 0.001,
        };
        let tensors: Vec<Tensor> = (0..4).map(|seed| random(seed, count)).collect();
        let moved = |device: &Device| -> Vec<Tensor> {
            // Moments of squares are not negative. Copies, for they move in place.
            let start = |i: usize| {
                let start = tensors[i].abs().unwrap().affine(1.0, 0.0).unwrap();
                start.to_device(device).unwrap()
            };
            let (value, first, second) = (start(0), start(2), start(3));
            let gradient = tensors[1].to_device(device).unwrap();
            ops::adamw(&value, &gradient, &first, &second, step).unwrap();
            vec![value, first, second]
        };
        let _alone = device::exclusive(gpu());
        for (found, expected) in moved(gpu()).iter().zip(moved(&Device::Cpu)) {
            assert_close("adamw", DType::F32, found, &expected);
        }
        let here = ops::sum_squares(&tensors).unwrap();
        let there: Vec<_> = tensors
            .iter()
            .map(|t| t.to_device(gpu()).unwrap())
            .collect();
        let there = ops::sum_squares(&there).unwrap();
        assert!((here - there).abs() <= 1e-5 * here, "{there}, not {here}");
    }
}
