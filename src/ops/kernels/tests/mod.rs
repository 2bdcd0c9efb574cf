//! Launches against the operations of the CPU.
//!
//! Inputs are rounded to the type at hand first, and outputs are NaN before a launch.

use candle_core::{Device, Result, Tensor, Var};

use super::*;
use crate::ops::gradient_check::random;

mod attention;
mod elementwise;
mod emulator;
mod lora;
mod plans;
mod rows;

use emulator::{Buffer, run};

const SCALARS: [Scalar; 3] = [Scalar::F32, Scalar::F16, Scalar::Bf16];

/// Random values as they are in a buffer of type `t`, and the buffer.
fn input(t: Scalar, seed: u64, shape: (usize, usize)) -> (Tensor, Buffer) {
    let buffer = Buffer::of(t, &values(&random(seed, shape)));
    let tensor = Tensor::from_vec(buffer.values(), shape, &Device::Cpu).unwrap();
    (tensor, buffer)
}

/// The same for a vector, which is f32.
fn vector(seed: u64, len: usize) -> (Tensor, Buffer) {
    let tensor = random(seed, len);
    let buffer = Buffer::of(Scalar::F32, &values(&tensor));
    (tensor, buffer)
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// The gradients of `inputs` for the gradient `of_output` of f's output.
fn gradients(
    inputs: &[&Tensor],
    of_output: &Tensor,
    f: impl FnOnce(&[Tensor]) -> Result<Tensor>,
) -> Vec<Vec<f32>> {
    let variables: Vec<Var> = inputs
        .iter()
        .map(|tensor| Var::from_tensor(tensor).unwrap())
        .collect();
    let tracked: Vec<Tensor> = variables.iter().map(|v| v.as_tensor().clone()).collect();
    let loss = (f(&tracked).unwrap() * of_output).unwrap();
    let all = loss.sum_all().unwrap().backward().unwrap();
    tracked
        .iter()
        .map(|variable| values(all.get(variable).unwrap()))
        .collect()
}

/// Half of a unit in the last place of 1, the rounding of what is stored; for f32 what sums in
/// another order differ by.
fn rounding(t: Scalar) -> f32 {
    match t {
        Scalar::F32 => 1e-5,
        Scalar::F16 => 1.0 / 2048.0,
        Scalar::Bf16 => 1.0 / 256.0,
    }
}

/// That values agree but for the rounding of what is stored and `of_largest` of the largest.
#[track_caller]
fn assert_close(found: &[f32], expected: &[f32], t: Scalar, of_largest: f32, of: &str) {
    assert_eq!(found.len(), expected.len(), "{of}");
    let largest = expected.iter().fold(0f32, |most, x| most.max(x.abs()));
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        let bound = rounding(t) * 1.01 * expected.abs() + of_largest * largest;
        let close = (found - expected).abs() <= bound.max(1e-7);
        assert!(close, "{of}, {t:?}, value {i}: {found}, not {expected}");
    }
}
