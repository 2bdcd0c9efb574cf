//! What a process has of its device's memory.

use std::ffi::c_void;

use candle_core::cuda_backend::cudarc::driver::{result, sys};
use candle_core::cuda_backend::{CudaDevice, WrapErr};
use candle_core::{Device, Result};

use crate::ops::device::DeviceMemory;

/// `None` for a device in host memory.
pub(in crate::ops) fn memory(device: &Device) -> Option<DeviceMemory> {
    let cuda = device.as_cuda_device().ok()?;
    let read = |attribute| attribute_of(cuda, attribute).ok();
    use sys::CUmemPool_attribute_enum as Attribute;
    Some(DeviceMemory {
        used: read(Attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT)?,
        peak: read(Attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH)?,
        reserved: read(Attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT)?,
    })
}

/// Lets the peak begin anew at what is in use.
pub(in crate::ops) fn reset_peak(device: &Device) {
    if let Ok(cuda) = device.as_cuda_device() {
        let attribute = sys::CUmemPool_attribute_enum::CU_MEMPOOL_ATTR_USED_MEM_HIGH;
        if let Err(error) = set_attribute(cuda, attribute, 0) {
            tracing::debug!(%error, "the peak of the device's memory can't be reset");
        }
    }
}

/// Freed memory goes back to the device at every wait for it, unless told otherwise.
pub(super) fn keep_freed(cuda: &CudaDevice) -> Result<()> {
    let attribute = sys::CUmemPool_attribute_enum::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
    set_attribute(cuda, attribute, u64::MAX)
}

fn attribute_of(cuda: &CudaDevice, attribute: sys::CUmemPool_attribute) -> Result<u64> {
    let mut value = 0u64;
    let pool = pool(cuda)?;
    // SAFETY: the pool is the device's own, and these attributes are of 64 bits.
    #[allow(unsafe_code)]
    unsafe { result::mem_pool::get_attribute(pool, attribute, (&raw mut value).cast::<c_void>()) }
        .w()?;
    Ok(value)
}

fn set_attribute(
    cuda: &CudaDevice,
    attribute: sys::CUmemPool_attribute,
    mut value: u64,
) -> Result<()> {
    let pool = pool(cuda)?;
    // SAFETY: as above.
    #[allow(unsafe_code)]
    unsafe { result::mem_pool::set_attribute(pool, attribute, (&raw mut value).cast::<c_void>()) }
        .w()
}

fn pool(cuda: &CudaDevice) -> Result<sys::CUmemoryPool> {
    let stream = cuda.cuda_stream();
    // SAFETY: the device of a context that is alive.
    #[allow(unsafe_code)]
    unsafe { result::device::get_mem_pool(stream.context().cu_device()) }.w()
}
