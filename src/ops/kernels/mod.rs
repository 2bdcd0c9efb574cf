//! The kernels of the CUDA device, and how each is launched.
//!
//! The kernels themselves are the `.cuh` files, put together by `kernels.cu`; every one exists for
//! f32, f16 and bf16 tensors and computes in f32. The functions here know nothing of a device: they
//! take addresses and sizes and say what is to be launched. So the tests run the very same launches
//! on an emulator in `host/`, to which a C++ compiler translates the kernels, and compare them with
//! the operations of the CPU.
//!
//! Vectors (biases, γ and β, gains and shifts, MPNet's table) are f32 whatever the type T of
//! activations and matrices is. Nothing is launched where there is nothing to do.

mod attention;
mod elementwise;
mod launch;
mod lora;
mod optimizer;
mod product;
mod rows;
mod segments;
#[cfg(test)]
mod tests;

pub(in crate::ops) use attention::{
    AttentionPlan, DevicePositions, DeviceTable, LARGEST_HEAD, attention, attention_gradient,
    attention_scratch_values, attention_table_gradient,
};
pub(in crate::ops) use elementwise::{
    activation, activation_gradient, column_sums, dropout, map_columns,
};
pub(in crate::ops) use launch::{Launch, Ptr, Scalar};
pub(in crate::ops) use lora::{Update, expand, shrink, shrink_values};
pub(in crate::ops) use optimizer::{PARTIALS, adamw, sum_squares};
pub(in crate::ops) use product::{Operand, Product};
pub(in crate::ops) use rows::{embed, fold, norm, norm_gradient, norm_parameters_gradient, unfold};
pub(in crate::ops) use segments::{SegmentLinear, segment_linear};
