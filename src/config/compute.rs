//! Where an encoder computes, and in what numbers.

use candle_core::{DType, Device};

use super::units::{DeviceChoice, Dtype};
use crate::encoder::Placement;
use crate::ops::device::{self, DeviceError, HAS_CUDA};
use crate::ops::{Precision, has_bf16};

/// What was asked for.
#[derive(Clone, Copy, Debug)]
pub struct Compute {
    pub device: DeviceChoice,
    /// `None`: f32 on a CPU, bf16 on a GPU.
    pub dtype: Option<Dtype>,
}

/// A device that can't be had.
#[derive(Debug, thiserror::Error)]
pub enum ComputeError {
    #[error("the CPU computes in f32, bf16 or int8; --dtype {0} needs a GPU")]
    NotOnCpu(Dtype),
    #[error("this processor does not multiply in bf16 (it lacks AVX512_BF16): use --dtype f32")]
    NoBf16,
    #[error("--dtype int8 is for the CPU; a GPU computes in bf16, f16 or f32")]
    NotOnGpu,
    #[error(transparent)]
    Device(#[from] DeviceError),
}

impl Compute {
    /// Refuses what works on no machine with this build.
    pub fn check(self) -> Result<(), ComputeError> {
        match (self.device, self.dtype) {
            (DeviceChoice::Cuda(_), _) if !HAS_CUDA => Err(DeviceError::NotBuiltIn.into()),
            (DeviceChoice::Cuda(_), Some(Dtype::Int8)) => Err(ComputeError::NotOnGpu),
            (DeviceChoice::Cpu, dtype) => on_cpu(dtype).map(drop),
            (DeviceChoice::Auto, dtype) if !HAS_CUDA => on_cpu(dtype).map(drop),
            _ => Ok(()),
        }
    }

    /// Opens the device. `auto` takes the first GPU, and the CPU where there is none.
    pub fn open(self) -> Result<Placement, ComputeError> {
        self.check()?;
        match (self.device, self.dtype) {
            (DeviceChoice::Cuda(ordinal), dtype) => on_gpu(device::open_cuda(ordinal)?, dtype),
            (DeviceChoice::Auto, dtype) if HAS_CUDA && dtype != Some(Dtype::Int8) => {
                match device::open_cuda(0) {
                    Ok(gpu) => on_gpu(gpu, dtype),
                    Err(error) => {
                        tracing::warn!(
                            reason = crate::telemetry::chain(&error),
                            "no GPU; computing on the CPU"
                        );
                        on_cpu(dtype)
                    }
                }
            }
            (_, dtype) => on_cpu(dtype),
        }
    }
}

fn on_cpu(dtype: Option<Dtype>) -> Result<Placement, ComputeError> {
    let precision = match dtype {
        None | Some(Dtype::F32) => Precision::F32,
        Some(Dtype::Int8) => Precision::Int8,
        Some(Dtype::Bf16) if has_bf16() => Precision::Bf16,
        Some(Dtype::Bf16) => return Err(ComputeError::NoBf16),
        Some(other) => return Err(ComputeError::NotOnCpu(other)),
    };
    Ok(Placement::cpu(precision))
}

fn on_gpu(device: Device, dtype: Option<Dtype>) -> Result<Placement, ComputeError> {
    let dtype = match dtype {
        None | Some(Dtype::Bf16) => DType::BF16,
        Some(Dtype::F16) => DType::F16,
        Some(Dtype::F32) => DType::F32,
        Some(Dtype::Int8) => return Err(ComputeError::NotOnGpu),
    };
    Ok(Placement::gpu(device, dtype))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn compute(device: DeviceChoice, dtype: Option<Dtype>) -> Compute {
        Compute { device, dtype }
    }

    #[test]
    fn a_cpu_computes_in_f32_unless_told_otherwise() {
        let open = |dtype| compute(DeviceChoice::Cpu, dtype).open();
        assert_eq!(open(None).unwrap().dtype_name(), "f32");
        assert_eq!(open(Some(Dtype::Int8)).unwrap().dtype_name(), "int8");
        match open(Some(Dtype::Bf16)) {
            Ok(placement) => assert!(has_bf16() && placement.dtype_name() == "bf16"),
            Err(refused) => assert!(!has_bf16() && refused.to_string().contains("AVX512_BF16")),
        }
        let refused = open(Some(Dtype::F16)).unwrap_err();
        assert!(refused.to_string().contains("needs a GPU"), "{refused}");
    }

    #[cfg(not(feature = "cuda"))]
    #[test]
    fn a_build_without_cuda_says_so() {
        let refused = compute(DeviceChoice::Cuda(0), None).open().unwrap_err();
        assert!(refused.to_string().contains("no CUDA"), "{refused}");
        let auto = compute(DeviceChoice::Auto, None).open().unwrap();
        assert_eq!(auto.device_name(), "cpu");
    }

    #[cfg(feature = "cuda")]
    #[test]
    fn a_gpu_does_not_compute_in_int8() {
        let refused = compute(DeviceChoice::Cuda(0), Some(Dtype::Int8)).check();
        assert!(matches!(refused, Err(ComputeError::NotOnGpu)));
    }
}
