//! Finite differences against backward passes.

use candle_core::{Device, Result, Shape, Tensor, Var};

/// Values in about [-1, 1], the same for the same seed.
pub(super) fn random(seed: u64, shape: impl Into<Shape>) -> Tensor {
    let shape = shape.into();
    let values: Vec<f32> = (0..shape.elem_count() as u64)
        .map(|i| {
            let mut z = (seed << 32 ^ i).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            ((z ^ (z >> 31)) >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        })
        .collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

/// The gradients of `Σ w ∘ f(inputs)`, with fixed random `w`, for every input, against central
/// differences.
pub(super) fn assert_gradient(inputs: &[Tensor], f: impl Fn(&[Tensor]) -> Result<Tensor>) {
    let weights = random(99, f(inputs).unwrap().shape().clone());
    let loss = |x: &[Tensor]| (f(x).unwrap() * &weights).unwrap().sum_all().unwrap();

    let variables: Vec<Var> = inputs
        .iter()
        .map(|t| Var::from_tensor(t).unwrap())
        .collect();
    let tracked: Vec<Tensor> = variables.iter().map(|v| v.as_tensor().clone()).collect();
    let gradients = loss(&tracked).backward().unwrap();

    for (i, input) in inputs.iter().enumerate() {
        let gradient = gradients
            .get(&tracked[i])
            .unwrap_or_else(|| panic!("no gradient for input {i}"))
            .flatten_all()
            .unwrap()
            .to_vec1::<f32>()
            .unwrap();
        let values = input.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let scale = gradient.iter().fold(1f64, |m, g| m.max(f64::from(g.abs())));
        for j in 0..values.len() {
            let at = |delta: f32| {
                let mut moved = values.clone();
                moved[j] += delta;
                let mut x = inputs.to_vec();
                x[i] = Tensor::from_vec(moved, input.shape(), &Device::Cpu).unwrap();
                f64::from(loss(&x).to_scalar::<f32>().unwrap())
            };
            let numeric = (at(1e-2) - at(-1e-2)) / 2e-2;
            let error = (numeric - f64::from(gradient[j])).abs() / scale;
            assert!(
                error < 5e-3,
                "input {i}, element {j}: backward {}, finite difference {numeric}",
                gradient[j]
            );
        }
    }
}
