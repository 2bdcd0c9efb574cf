//! The fused operations that the network is made of, forward and backward side by side.
//!
//! An op runs on one thread, unless that thread leads a forward of a [`Crew`], whose idle cores then
//! take parts of it. Inner loops are compiled for baseline, AVX2 and AVX-512 and chosen
//! at run time ([`simd::vectorize`]). `unsafe` is allowed in this folder alone.
//!
//! An op whose inputs include a trained variable keeps what its backward needs; an op on frozen
//! tensors leaves no trace in candle's graph. Backward computes the gradients of tracked inputs
//! only, so a frozen weight costs nothing.

mod activation;
mod adamw;
mod attention;
mod borders;
mod crew;
#[cfg(feature = "cuda")]
mod cuda;
pub mod device;
mod dropout;
mod embed;
#[cfg(test)]
mod gradient_check;
mod heads;
#[cfg(any(feature = "cuda", test))]
#[cfg_attr(not(feature = "cuda"), allow(dead_code, unused_imports))]
mod kernels;
mod layer;
mod linear;
mod lora;
mod matrix;
mod norm;
mod packed;
mod simd;
mod tile;
mod unfold;

pub use activation::{Activation, activation};
pub use adamw::{AdamWStep, adamw, sum_squares};
pub use attention::{
    AttentionShape, Disentangled, PositionTable, Positions, RelativeRows, attention,
};
pub use borders::Borders;
pub use crew::Crew;
pub use dropout::{Dropout, dropout};
pub use embed::{EmbedIndices, embed};
pub use heads::segment_linears;
pub use layer::{LayerLinear, LayerParts, trained_layer};
pub use linear::{Linear, linear};
pub use lora::{
    ColumnMap, LoraUpdate, RowUpdates, add_updates, linear_rows, lora_add, map_columns,
};
pub use norm::{Norm, add_norm, norm};
pub use packed::{FrozenBf16, PackedLinear, Precision, has_bf16, packed_linear};
pub use unfold::unfold;

use candle_core::{CpuStorage, Layout, Result, Shape, Storage, Tensor};

/// Keeps candle's own element-wise ops on the calling thread: they would otherwise share one
/// spinning pool behind a global lock, and several forwards at once would wait for each other.
///
/// Must be called before any other thread exists.
pub fn use_calling_thread_only() {
    for variable in ["CANDLE_NUM_THREADS", "RAYON_NUM_THREADS"] {
        if std::env::var_os(variable).is_none() {
            // SAFETY: `main` calls this first, while the process has one thread.
            #[allow(unsafe_code)]
            unsafe {
                std::env::set_var(variable, "1");
            }
        }
    }
}

/// The f32 values of a contiguous tensor's storage.
fn contiguous<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    let values = storage.as_slice::<f32>()?;
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&values[start..end]),
        None => candle_core::bail!(
            "expected a contiguous tensor, got strides {:?}",
            layout.stride()
        ),
    }
}

/// Runs `f` on the f32 values of a contiguous tensor in host memory.
fn with_values<R>(tensor: &Tensor, f: impl FnOnce(&[f32]) -> Result<R>) -> Result<R> {
    let (storage, layout) = tensor.storage_and_layout();
    f(contiguous(host(&storage)?, layout)?)
}

/// Returns whether no value of an f32 tensor in host memory is NaN or infinite.
pub fn is_finite(tensor: &Tensor) -> Result<bool> {
    with_values(tensor, |values| {
        Ok(values.iter().all(|value| value.is_finite()))
    })
}

/// Storage in host memory.
fn host(storage: &Storage) -> Result<&CpuStorage> {
    match storage {
        Storage::Cpu(storage) => Ok(storage),
        _ => candle_core::bail!("expected a tensor in host memory"),
    }
}

fn output(values: Vec<f32>, shape: impl Into<Shape>) -> Result<(CpuStorage, Shape)> {
    Ok((CpuStorage::F32(values), shape.into()))
}

/// Returns the gradient in the argument's type, if the argument takes part in the backward pass.
///
/// Kernels write some gradients in f32 whatever the type of the argument is. candle adds a gradient
/// to others of the same argument, and refuses to add tensors of two types.
fn if_tracked(
    argument: &Tensor,
    gradient: impl FnOnce() -> Result<Tensor>,
) -> Result<Option<Tensor>> {
    if argument.track_op() {
        gradient()?.to_dtype(argument.dtype()).map(Some)
    } else {
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{CustomOp1, DType, Device, Var};

    use super::*;

    /// Doubles f16 values in f32, and computes the gradient in f32 too, as kernels of a GPU do.
    struct Double;

    impl CustomOp1 for Double {
        fn name(&self) -> &'static str {
            "double"
        }

        fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
            let values = x.as_slice::<half::f16>()?.iter();
            output(values.map(|x| 2.0 * x.to_f32()).collect(), layout.shape())
        }

        fn bwd(&self, x: &Tensor, _y: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
            if_tracked(x, || gradient * 2.0)
        }
    }

    #[test]
    fn a_gradient_is_in_the_type_of_its_argument() {
        let x = Tensor::new(&[1f32, -3.0], &Device::Cpu).unwrap();
        let x = Var::from_tensor(&x.to_dtype(DType::F16).unwrap()).unwrap();
        let doubled = x.apply_op1(Double).unwrap().sum_all().unwrap();
        let itself = x.sum_all().unwrap().to_dtype(DType::F32).unwrap();
        let gradients = (doubled + itself).unwrap().backward().unwrap();
        let gradient = gradients.get(&x).unwrap();
        assert_eq!(gradient.dtype(), DType::F16);
        let values = gradient.to_dtype(DType::F32).unwrap();
        assert_eq!(values.to_vec1::<f32>().unwrap(), [3.0, 3.0]);
    }
}
