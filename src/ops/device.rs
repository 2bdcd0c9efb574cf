//! Devices as the floors above see them. Whether this build knows GPUs ends here and in the ops'
//! `cuda_fwd`.

use candle_core::{Device, Result, Tensor};

#[cfg(feature = "cuda")]
use super::cuda;

/// Bytes that this process has of a GPU's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceMemory {
    /// In use at this moment.
    pub used: u64,
    /// The most that was in use since the start or the last [`reset_peak`].
    pub peak: u64,
    /// Taken from the device, in use or kept for the next use.
    pub reserved: u64,
}

/// Why a GPU can't be used.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    #[error("this build of kdlora has no CUDA; use --device cpu or auto")]
    NotBuiltIn,
    #[error("NVIDIA's driver is not installed: {0}")]
    NoDriver(String),
    #[error(
        "NVIDIA's driver supports CUDA {found}, but this build needs CUDA {needed}: update the driver"
    )]
    OldDriver { found: String, needed: String },
    /// The driver is there and cannot start. Its error says why: no GPU, a kernel module of another
    /// version, no access to the device files.
    #[error("NVIDIA's driver (CUDA {driver}) cannot be used")]
    Driver {
        /// The CUDA version that it supports.
        driver: String,
        #[source]
        source: candle_core::Error,
    },
    #[error("there is no CUDA device {ordinal}; devices on this machine: {count}")]
    NoDevice { ordinal: usize, count: i32 },
    #[error(
        "a library of CUDA is missing: {0}; install cuBLAS and cuRAND, and name their folders in \
         LD_LIBRARY_PATH"
    )]
    NoLibrary(String),
    #[error("CUDA device {ordinal} cannot be used")]
    Open {
        ordinal: usize,
        #[source]
        source: candle_core::Error,
    },
}

/// Whether this build can compute on a GPU.
pub const HAS_CUDA: bool = cfg!(feature = "cuda");

/// The GPU of this number, with one stream for all that this process does on it.
pub fn open_cuda(ordinal: usize) -> std::result::Result<Device, DeviceError> {
    #[cfg(feature = "cuda")]
    return cuda::open(ordinal);
    #[cfg(not(feature = "cuda"))]
    {
        let _ = ordinal;
        Err(DeviceError::NotBuiltIn)
    }
}

/// What keeps others from launching products while it lives.
pub type Exclusive = Option<std::sync::MutexGuard<'static, ()>>;

/// Held by who launches products on a GPU from one of several threads: cuBLAS takes one at a time.
pub fn exclusive(device: &Device) -> Exclusive {
    #[cfg(feature = "cuda")]
    return device.is_cuda().then(cuda::exclusive);
    #[cfg(not(feature = "cuda"))]
    {
        let _ = device;
        None
    }
}

/// Memory of this process's tensors; `None` where they are in host memory.
pub fn memory(device: &Device) -> Option<DeviceMemory> {
    #[cfg(feature = "cuda")]
    return cuda::memory(device);
    #[cfg(not(feature = "cuda"))]
    {
        let _ = device;
        None
    }
}

/// Lets the peak of a GPU's memory begin anew at what is in use.
pub fn reset_peak(device: &Device) {
    #[cfg(feature = "cuda")]
    cuda::reset_peak(device);
    #[cfg(not(feature = "cuda"))]
    let _ = device;
}

/// Waits until everything that was asked of a device is done.
pub fn wait(device: &Device) -> Result<()> {
    device.synchronize()
}

/// Arrays as tensors on a device, `[values]` each; to a GPU they go by one copy.
pub fn upload(device: &Device, arrays: &[&[u32]]) -> Result<Vec<Tensor>> {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(device) = device {
        return cuda::upload(device, arrays);
    }
    arrays
        .iter()
        .map(|array| Tensor::from_slice(array, array.len(), device))
        .collect()
}

/// Copies to GPUs and back that this thread has made.
#[cfg(all(test, feature = "cuda"))]
pub(crate) fn copies() -> (usize, usize) {
    cuda::copies()
}

/// The values of a tensor in f32, on their way to the host.
pub struct Download(Values);

enum Values {
    Here(Vec<f32>),
    #[cfg(feature = "cuda")]
    Coming(cuda::Download),
}

impl Download {
    /// Asks for them; does not wait for a GPU.
    pub fn begin(tensor: &Tensor) -> Result<Self> {
        let tensor = tensor.flatten_all()?.to_dtype(candle_core::DType::F32)?;
        #[cfg(feature = "cuda")]
        if tensor.device().is_cuda() {
            return Ok(Self(Values::Coming(cuda::Download::begin(&tensor)?)));
        }
        Ok(Self(Values::Here(tensor.to_vec1()?)))
    }

    /// Waits for them, and for nothing that was asked for later.
    pub fn wait(self) -> Result<Vec<f32>> {
        match self.0 {
            Values::Here(values) => Ok(values),
            #[cfg(feature = "cuda")]
            Values::Coming(values) => values.wait(),
        }
    }
}
