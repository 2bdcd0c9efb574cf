use std::sync::Arc;

use candle_core::{Tensor, Var};

use super::*;
use crate::ops::gradient_check::{assert_gradient, random};
use crate::ops::{Positions, activation, add_norm, attention, dropout, linear, lora_add};

const HIDDEN: usize = 8;
const WIDE: usize = 12;
const RANK: usize = 2;
/// Input and output of each linear: Q, K and V together, the attention's output, up, down.
const LINEARS: [(usize, usize); 4] = [
    (HIDDEN, 3 * HIDDEN),
    (HIDDEN, HIDDEN),
    (HIDDEN, WIDE),
    (WIDE, HIDDEN),
];

/// A layer's frozen weights.
struct Frozen {
    linears: Vec<Linear>,
    norms: [Norm; 2],
    bf16: Option<Vec<Arc<FrozenBf16>>>,
}

impl Frozen {
    fn new() -> Self {
        let linear = |(i, (input, out)): (usize, (usize, usize))| Linear {
            weight: random(50 + i as u64, (out, input)),
            bias: Some(random(60 + i as u64, out)),
        };
        let norm = |seed| Norm {
            gamma_beta: random(seed, (2, HIDDEN)),
            eps: 1e-5,
        };
        Self {
            linears: LINEARS.into_iter().enumerate().map(linear).collect(),
            norms: [norm(70), norm(71)],
            bf16: None,
        }
    }

    fn parts<'a>(&'a self, updates: &'a [Vec<LoraUpdate>], rate: f64) -> LayerParts<'a> {
        let part = |i: usize| LayerLinear {
            linear: &self.linears[i],
            bf16: self.bf16.as_ref().map(|all| &all[i]),
            updates: &updates[i],
            dropout: (rate > 0.0).then_some(Dropout {
                rate,
                seed: 5 + i as u64,
                first_row: 3,
            }),
        };
        LayerParts {
            qkv: part(0),
            attention_output: part(1),
            attention_norm: &self.norms[0],
            up: part(2),
            activation: Activation::Gelu,
            down: part(3),
            output_norm: &self.norms[1],
            attention: AttentionShape {
                offsets: [0, 2, 5].into(),
                heads: 2,
                scale: 0.5,
                positions: Positions::None,
            },
            tables: Vec::new(),
        }
    }
}

/// The input and then A and B of each update: query and value, and what `all` adds.
fn inputs(all: bool) -> Vec<Tensor> {
    let mut inputs = vec![random(1, (5, HIDDEN))];
    for (input, width) in shapes(all) {
        let seed = 10 + inputs.len() as u64;
        inputs.push(random(seed, (RANK, input)));
        inputs.push(random(seed + 1, (width, RANK)));
    }
    inputs
}

fn shapes(all: bool) -> Vec<(usize, usize)> {
    let mut shapes = vec![(HIDDEN, HIDDEN); 2];
    if all {
        shapes.extend(&LINEARS[1..]);
    }
    shapes
}

fn updates(tensors: &[Tensor]) -> Vec<Vec<LoraUpdate>> {
    let mut updates = vec![Vec::new(); 4];
    for (i, pair) in tensors[1..].chunks(2).enumerate() {
        let (site, column) = match i {
            0 => (0, 0),
            1 => (0, 2 * HIDDEN),
            i => (i - 1, 0),
        };
        updates[site].push(LoraUpdate {
            a: pair[0].clone(),
            b: pair[1].clone(),
            scale: 0.7,
            column,
            map: None,
        });
    }
    updates
}

/// The same layer of single ops.
fn composed(x: &Tensor, parts: &LayerParts<'_>, firsts: Option<&[u32]>) -> Result<Tensor> {
    let adapted = |x: &Tensor, part: &LayerLinear<'_>| -> Result<Tensor> {
        let mut y = linear(x, part.linear, Activation::None)?;
        let input = match part.dropout {
            Some(rate) => dropout(x, rate)?,
            None => x.clone(),
        };
        for update in part.updates {
            let h = input.matmul(&update.a.t()?)?;
            y = lora_add(&y, &h, &update.b, update.scale, update.column)?;
        }
        Ok(y)
    };
    let qkv = adapted(x, &parts.qkv)?;
    let mut context = attention(&qkv, None, &parts.tables, parts.attention.clone())?;
    let mut x = x.clone();
    if let Some(firsts) = firsts {
        let firsts = Tensor::new(firsts, x.device())?;
        (context, x) = (
            context.index_select(&firsts, 0)?,
            x.index_select(&firsts, 0)?,
        );
    }
    let attended = adapted(&context, &parts.attention_output)?;
    let x = add_norm(&attended, None, &x, parts.attention_norm)?;
    let wide = activation(&adapted(&x, &parts.up)?, parts.activation)?;
    add_norm(&adapted(&wide, &parts.down)?, None, &x, parts.output_norm)
}

#[test]
fn it_computes_what_its_parts_compute() {
    let frozen = Frozen::new();
    for (all, rate, firsts) in [
        (false, 0.0, None),
        (true, 0.25, None),
        (true, 0.25, Some([0, 2])),
    ] {
        let tensors = inputs(all);
        let variables: Vec<Var> = tensors
            .iter()
            .map(|tensor| Var::from_tensor(tensor).unwrap())
            .collect();
        let tracked: Vec<Tensor> = variables.iter().map(|v| v.as_tensor().clone()).collect();
        let updates = updates(&tracked);
        let parts = || frozen.parts(&updates, rate);
        let rows = firsts.map(Arc::from);
        let one = trained_layer(&tracked[0], parts(), rows.clone()).unwrap();
        let many = composed(&tracked[0], &parts(), rows.as_deref()).unwrap();
        assert_eq!(one.dims(), many.dims());
        let weights = random(99, many.shape().clone());
        let gradients = [&one, &many].map(|y| {
            let loss = (y * &weights).unwrap().sum_all().unwrap();
            loss.backward().unwrap()
        });
        assert_close(&one, &many);
        for variable in &tracked {
            let [one, many] = gradients.each_ref().map(|g| g.get(variable).unwrap());
            assert_close(one, many);
        }
    }
}

#[test]
fn in_bf16_it_computes_about_the_same() {
    let mut frozen = Frozen::new();
    if !crate::ops::has_bf16() {
        assert!(FrozenBf16::new(&frozen.linears[0]).is_err());
        return;
    }
    let of = |frozen: &Frozen| {
        let variables: Vec<Var> = inputs(true)
            .iter()
            .map(|tensor| Var::from_tensor(tensor).unwrap())
            .collect();
        let tracked: Vec<Tensor> = variables.iter().map(|v| v.as_tensor().clone()).collect();
        let y = trained_layer(&tracked[0], frozen.parts(&updates(&tracked), 0.25), None).unwrap();
        let loss = (&y * &random(99, y.shape().clone())).unwrap();
        let gradients = loss.sum_all().unwrap().backward().unwrap();
        let gradients = tracked.iter().map(|v| gradients.get(v).unwrap().clone());
        [y].into_iter().chain(gradients).collect::<Vec<_>>()
    };
    let exact = of(&frozen);
    let narrow = |linear| Arc::new(FrozenBf16::new(linear).unwrap());
    frozen.bf16 = Some(frozen.linears.iter().map(narrow).collect());
    for (rounded, exact) in of(&frozen).iter().zip(&exact) {
        let norm = |t: &Tensor| {
            t.sqr()
                .unwrap()
                .sum_all()
                .unwrap()
                .to_scalar::<f32>()
                .unwrap()
        };
        let error = norm(&(rounded - exact).unwrap());
        assert!(
            error > 0.0 && error < 4e-4 * norm(exact),
            "{error} of {}",
            norm(exact)
        );
    }
}

fn assert_close(one: &Tensor, other: &Tensor) {
    let values = |tensor: &Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    for (one, other) in values(one).iter().zip(values(other)) {
        assert!(
            (one - other).abs() < 1e-4 * (1.0 + other.abs()),
            "{one} {other}"
        );
    }
}

#[test]
fn backward_agrees_with_finite_differences() {
    let frozen = Frozen::new();
    assert_gradient(&inputs(true), |t| {
        trained_layer(&t[0], frozen.parts(&updates(t), 0.25), None)
    });
}

#[test]
fn what_is_frozen_has_no_gradient() {
    let frozen = Frozen::new();
    let tensors = inputs(false);
    let b = Var::from_tensor(&tensors[2]).unwrap();
    let with_b = [&tensors[..2], &[b.as_tensor().clone()], &tensors[3..]].concat();
    let updates = updates(&with_b);
    let y = trained_layer(&tensors[0], frozen.parts(&updates, 0.0), None).unwrap();
    let gradients = y.sum_all().unwrap().backward().unwrap();
    assert!(gradients.get(b.as_tensor()).is_some());
    for tensor in [&tensors[0], &tensors[1], &tensors[4]] {
        assert!(gradients.get(tensor).is_none());
    }
}

#[test]
fn parts_that_train_otherwise_do_not_suit() {
    let mut frozen = Frozen::new();
    let mut updates = updates(&inputs(true));
    assert!(frozen.parts(&updates, 0.0).suit_one_op());
    updates[0][1].a = random(1, (RANK + 1, HIDDEN));
    assert!(!frozen.parts(&updates, 0.0).suit_one_op());
    updates[0].clear();
    frozen.linears[1].weight = Var::from_tensor(&frozen.linears[1].weight)
        .unwrap()
        .as_tensor()
        .clone();
    assert!(!frozen.parts(&updates, 0.0).suit_one_op());
}
