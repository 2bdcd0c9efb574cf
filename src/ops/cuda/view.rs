//! Tensors in a device's memory as kernels see them: an address, a type, a shape.

use candle_core::backend::{BackendDevice as _, BackendStorage as _};
use candle_core::cuda_backend::cudarc::driver::DevicePtr as _;
use candle_core::cuda_backend::{CudaDevice, CudaStorage, CudaStorageSlice};
use candle_core::{DType, Layout, Result, Shape, Storage, Tensor};

use super::super::kernels::{Ptr, Scalar};

/// A contiguous tensor.
#[derive(Clone)]
pub(super) struct View<'a> {
    pub(super) device: &'a CudaDevice,
    pub(super) at: Ptr,
    pub(super) dtype: DType,
    dims: &'a [usize],
}

impl<'a> View<'a> {
    pub(super) fn new(storage: &'a CudaStorage, layout: &'a Layout) -> Result<Self> {
        let Some((start, _)) = layout.contiguous_offsets() else {
            candle_core::bail!(
                "expected a contiguous tensor, got strides {:?}",
                layout.stride()
            );
        };
        let dtype = storage.dtype();
        let Ptr(begin) = address(storage)?;
        Ok(Self {
            device: &storage.device,
            at: Ptr(begin + (start * dtype.size_in_bytes()) as u64),
            dtype,
            dims: layout.dims(),
        })
    }

    pub(super) fn scalar(&self) -> Result<Scalar> {
        scalar(self.dtype)
    }

    pub(super) fn count(&self) -> usize {
        self.dims.iter().product()
    }

    pub(super) fn dims2(&self) -> Result<(usize, usize)> {
        match *self.dims {
            [rows, columns] => Ok((rows, columns)),
            _ => candle_core::bail!("expected a matrix, got {:?}", self.dims),
        }
    }

    pub(super) fn dims(&self) -> &'a [usize] {
        self.dims
    }

    /// This view, if it is of that type.
    pub(super) fn of(self, dtype: DType, what: &str) -> Result<Self> {
        if self.dtype != dtype {
            candle_core::bail!("{what} is of {:?}, not {dtype:?}", self.dtype);
        }
        Ok(self)
    }
}

pub(super) fn scalar(dtype: DType) -> Result<Scalar> {
    Ok(match dtype {
        DType::F32 => Scalar::F32,
        DType::F16 => Scalar::F16,
        DType::BF16 => Scalar::Bf16,
        other => candle_core::bail!("the kernels do not compute in {other:?}"),
    })
}

fn address(storage: &CudaStorage) -> Result<Ptr> {
    let stream = storage.device.cuda_stream();
    let (address, _) = match &storage.slice {
        CudaStorageSlice::F32(slice) => slice.device_ptr(&stream),
        CudaStorageSlice::F16(slice) => slice.device_ptr(&stream),
        CudaStorageSlice::BF16(slice) => slice.device_ptr(&stream),
        CudaStorageSlice::U32(slice) => slice.device_ptr(&stream),
        _ => candle_core::bail!("the kernels do not compute in {:?}", storage.dtype()),
    };
    Ok(Ptr(address))
}

/// Calls `f` with a view of a tensor that an op holds.
pub(super) fn with_view<R>(tensor: &Tensor, f: impl FnOnce(View<'_>) -> Result<R>) -> Result<R> {
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cuda(storage) => f(View::new(storage, layout)?),
        _ => candle_core::bail!("expected a tensor in the memory of a GPU"),
    }
}

/// Where a tensor lies that stays alive until what uses it is launched.
pub(super) fn place_of(tensor: &Tensor, dtype: DType, what: &str) -> Result<Ptr> {
    with_view(tensor, |view| Ok(view.of(dtype, what)?.at))
}

/// Memory for a result, not yet written.
pub(super) struct Output {
    storage: CudaStorage,
    pub(super) at: Ptr,
}

impl Output {
    pub(super) fn new(device: &CudaDevice, dtype: DType, count: usize) -> Result<Self> {
        // The driver refuses an allocation of nothing.
        let count = count.max(1);
        // SAFETY: each type is plain numbers, and the kernels write all of them before any is read.
        #[allow(unsafe_code)]
        let storage = unsafe { device.alloc_uninit(&count.into(), dtype) }?;
        let at = address(&storage)?;
        Ok(Self { storage, at })
    }

    /// A copy of a tensor.
    pub(super) fn copy_of(view: &View<'_>, storage: &CudaStorage, layout: &Layout) -> Result<Self> {
        let mut copy = Self::new(view.device, view.dtype, view.count())?;
        storage.copy_strided_src(&mut copy.storage, 0, layout)?;
        Ok(copy)
    }

    pub(super) fn shaped(self, shape: impl Into<Shape>) -> (CudaStorage, Shape) {
        (self.storage, shape.into())
    }
}
