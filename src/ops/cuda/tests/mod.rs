//! Each op on the GPU against the same op on the CPU, values and gradients, on random shapes.
//!
//! They need a GPU, so that they run only when asked for: `cargo test --features cuda --lib
//! ops::cuda -- --ignored`, or `tests/gpu.sh`.

mod attention;
mod rows;

use std::sync::OnceLock;

use candle_core::{DType, Device, Result, Tensor, Var};

use crate::ops::device;
use crate::ops::gradient_check::random;

/// Types of matrices and activations.
const TYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

/// The first GPU, which all tests share: products are made one at a time.
fn gpu() -> &'static Device {
    static GPU: OnceLock<Device> = OnceLock::new();
    GPU.get_or_init(|| device::open_cuda(0).expect("a GPU"))
}

/// Shapes and choices that follow from a seed.
struct Draw {
    seed: u64,
    drawn: u64,
}

impl Draw {
    fn new(seed: u64) -> Self {
        Self { seed, drawn: 0 }
    }

    /// From `least` to `most`, both included.
    fn number(&mut self, least: usize, most: usize) -> usize {
        self.drawn += 1;
        let value = random(self.seed << 8 | self.drawn, 1)
            .to_vec1::<f32>()
            .unwrap()[0];
        let share = f64::from(value).clamp(-1.0, 1.0) * 0.5 + 0.5;
        least + ((share * (most - least + 1) as f64) as usize).min(most - least)
    }

    fn one_of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.number(0, choices.len() - 1)]
    }

    /// Lengths of sequences, short and long.
    fn lengths(&mut self) -> Vec<usize> {
        let longest = self.one_of(&[9, 40, 130, 500]);
        let sequences = self.number(1, 12);
        (0..sequences).map(|_| self.number(1, longest)).collect()
    }

    fn tensor(&mut self, shape: impl Into<candle_core::Shape>) -> Tensor {
        self.drawn += 1;
        random(self.seed << 8 | self.drawn, shape)
    }
}

/// What an op takes: a matrix in the type at hand, or one in f32 whatever that is.
#[derive(Clone)]
enum Input {
    InType(Tensor),
    InF32(Tensor),
}

use Input::{InF32, InType};

impl Input {
    /// On both sides with the same values: those that the type can hold.
    fn sides(&self, dtype: DType) -> (Tensor, Tensor) {
        let (values, dtype) = match self {
            InType(values) => (values, dtype),
            InF32(values) => (values, DType::F32),
        };
        let rounded = values.to_dtype(dtype).unwrap();
        let there = rounded.to_device(gpu()).unwrap();
        (rounded.to_dtype(DType::F32).unwrap(), there)
    }
}

/// Holds the op's values on the GPU to those on the CPU.
#[track_caller]
fn assert_values(
    of: &str,
    dtype: DType,
    inputs: &[Input],
    f: impl Fn(&[Tensor]) -> Result<Tensor>,
) {
    let (here, there): (Vec<_>, Vec<_>) = inputs.iter().map(|input| input.sides(dtype)).unzip();
    let _alone = device::exclusive(gpu());
    let found = f(&there).unwrap_or_else(|error| panic!("{of}: {error}"));
    assert_close(of, dtype, &found, &f(&here).unwrap());
}

/// Holds the values and the gradients of all inputs to those on the CPU.
#[track_caller]
fn assert_gradients(
    of: &str,
    dtype: DType,
    inputs: &[Input],
    f: impl Fn(&[Tensor]) -> Result<Tensor>,
) {
    assert_values(of, dtype, inputs, &f);
    let (here, there): (Vec<_>, Vec<_>) = inputs.iter().map(|input| input.sides(dtype)).unzip();
    let _alone = device::exclusive(gpu());
    let gradients = |inputs: &[Tensor]| -> Result<Vec<Tensor>> {
        let variables = inputs.iter().map(Var::from_tensor);
        let variables = variables.collect::<Result<Vec<_>>>()?;
        let tracked: Vec<Tensor> = variables.iter().map(|v| v.as_tensor().clone()).collect();
        let y = f(&tracked)?;
        let weights = random(99, y.shape()).to_dtype(dtype)?.to_dtype(y.dtype())?;
        let loss = (&y * weights.to_device(y.device())?)?.sum_all()?;
        let all = loss.backward()?;
        let of_one = |variable| all.get(variable).cloned();
        Ok(tracked.iter().map(|v| of_one(v).unwrap()).collect())
    };
    let found = gradients(&there).unwrap_or_else(|error| panic!("{of}, backward: {error}"));
    for (i, (found, expected)) in found.iter().zip(gradients(&here).unwrap()).enumerate() {
        assert_close(&format!("{of}, gradient {i}"), dtype, found, &expected);
    }
}

/// Rounding of values in the type, and of the largest for sums of rounded values.
#[track_caller]
fn assert_close(of: &str, dtype: DType, found: &Tensor, expected: &Tensor) {
    assert_eq!(found.dims(), expected.dims(), "{of}");
    let values = |tensor: &Tensor| -> Vec<f32> {
        let tensor = tensor.to_dtype(DType::F32).unwrap();
        tensor.flatten_all().unwrap().to_vec1().unwrap()
    };
    let (found, expected) = (values(found), values(expected));
    let largest = expected.iter().fold(0f32, |most, x| most.max(x.abs()));
    // TF32 is off: products of f32 are in f32.
    let (own, of_largest) = match dtype {
        DType::F32 => (1e-4, 1e-5),
        DType::F16 => (2e-3, 2e-3),
        _ => (1.6e-2, 1.2e-2),
    };
    for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
        let bound = own * expected.abs() + of_largest * largest;
        assert!(
            (found - expected).abs() <= bound.max(1e-6),
            "{of}, {dtype:?}, value {i}: {found}, not {expected}"
        );
    }
}
