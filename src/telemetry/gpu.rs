//! Memory of NVIDIA GPUs, through the driver's own library. It is looked for at run time: without
//! a driver there are no GPUs, and nothing fails.

use nvml_wrapper::enums::device::UsedGpuMemory;
use nvml_wrapper::{Device, Nvml};

/// The GPUs of this machine.
pub(super) struct Gpus {
    nvml: Option<Nvml>,
}

/// Memory of one GPU, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct GpuMemory {
    pub(super) index: u32,
    pub(super) total: u64,
    /// By any process.
    pub(super) used: u64,
    /// By this process.
    pub(super) own: u64,
}

impl Gpus {
    pub(super) fn find() -> Self {
        Self {
            nvml: Nvml::init().ok(),
        }
    }

    /// What the driver says at this moment; a GPU that does not answer is left out.
    pub(super) fn memory(&self) -> Vec<GpuMemory> {
        let Some(nvml) = &self.nvml else {
            return Vec::new();
        };
        (0..nvml.device_count().unwrap_or(0))
            .filter_map(|index| {
                let device = nvml.device_by_index(index).ok()?;
                let memory = device.memory_info().ok()?;
                Some(GpuMemory {
                    index,
                    total: memory.total,
                    used: memory.used,
                    own: own_bytes(&device),
                })
            })
            .collect()
    }
}

fn own_bytes(device: &Device<'_>) -> u64 {
    let processes = device.running_compute_processes().unwrap_or_default();
    processes
        .iter()
        .filter(|process| process.pid == std::process::id())
        .map(|process| match process.used_gpu_memory {
            UsedGpuMemory::Used(bytes) => bytes,
            UsedGpuMemory::Unavailable => 0,
        })
        .sum()
}
