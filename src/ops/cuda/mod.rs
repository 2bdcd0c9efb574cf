//! The ops on an NVIDIA GPU: one stream, cuBLAS for products, and the kernels of
//! [`super::kernels`] for the rest.
//!
//! All work goes to the one stream of a device, in the order in which it is asked for, so that
//! nothing waits for anything but what is read back. cuBLAS handles belong to one thread at a time:
//! who computes a forward holds [`exclusive`].

mod attention;
mod memory;
mod open;
mod ops;
mod runtime;
#[cfg(test)]
mod tests;
mod transfer;
mod view;

pub(super) use attention::{
    attention, attention_by_table, attention_gradient, attention_table_gradient,
};
pub(super) use memory::{memory, reset_peak};
pub(super) use open::open;
pub(super) use ops::{
    SumSquares, activation, activation_gradient, adamw, add_norm, add_updates, column_sums,
    dropout, embed, fold, linear_rows, lora_add, map_columns, norm, norm_gradient,
    norm_parameters_gradient, product, segment_linears, trained_linear, unfold,
};
pub(super) use runtime::exclusive;
#[cfg(test)]
pub(super) use transfer::copies;
pub(super) use transfer::{Download, upload};
