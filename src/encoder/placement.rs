//! Where an encoder is and in what numbers it computes.

use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device, DeviceLocation};

use super::{Encoder, EncoderError, Weights};
use crate::ops::Precision;

/// A device, and the numbers of an encoder on it.
#[derive(Clone, Debug)]
pub struct Placement {
    device: Device,
    /// Of matrices and activations.
    dtype: DType,
    /// How linears are packed for inference on a CPU, and in what frozen ones are trained on.
    precision: Precision,
}

impl Default for Placement {
    /// The CPU, in f32.
    fn default() -> Self {
        Self::cpu(Precision::F32)
    }
}

impl Placement {
    pub fn cpu(precision: Precision) -> Self {
        Self {
            device: Device::Cpu,
            dtype: DType::F32,
            precision,
        }
    }

    /// On a GPU, matrices in bf16, f16 or f32.
    pub fn gpu(device: Device, dtype: DType) -> Self {
        Self {
            device,
            dtype,
            precision: Precision::F32,
        }
    }

    pub fn device(&self) -> &Device {
        &self.device
    }

    pub fn is_gpu(&self) -> bool {
        !self.device.is_cpu()
    }

    /// `cpu` or `cuda:N`.
    pub fn device_name(&self) -> String {
        match self.device.location() {
            DeviceLocation::Cuda { gpu_id } => format!("cuda:{gpu_id}"),
            _ => "cpu".to_owned(),
        }
    }

    /// `f32`, `bf16`, `f16` or `int8`.
    pub fn dtype_name(&self) -> &'static str {
        match self.precision {
            Precision::Int8 => "int8",
            Precision::Bf16 => "bf16",
            Precision::F32 => self.dtype.as_str(),
        }
    }

    /// Weights in host memory as they are to be here: matrices in this type, vectors in f32.
    pub fn place(&self, weights: Weights) -> candle_core::Result<Weights> {
        match self.is_gpu() {
            true => weights.place(&self.device, self.dtype),
            false => Ok(weights),
        }
    }

    /// An encoder that adapters can be trained on, of a folder in Hugging Face's layout.
    pub fn load(&self, folder: &Path) -> Result<Encoder, EncoderError> {
        Encoder::load_on(folder, self)
    }

    /// The same for inference alone.
    pub fn load_for_inference(&self, folder: &Path) -> Result<Encoder, EncoderError> {
        let encoder = self.load(folder)?;
        match self.is_gpu() {
            true => Ok(encoder),
            false => encoder.pack(self.precision),
        }
    }

    /// An encoder as adapters train on it: in bf16, if that is asked of a CPU.
    pub fn for_training(&self, encoder: &Arc<Encoder>) -> Result<Arc<Encoder>, EncoderError> {
        match self.precision {
            Precision::Bf16 => Ok(Arc::new(encoder.train_in_bf16()?)),
            _ => Ok(encoder.clone()),
        }
    }
}
