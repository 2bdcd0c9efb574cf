//! Memory of NVIDIA GPUs: what the driver's own library says of each, and what this process has of
//! the one on which it computes, by kind. The library is looked for at run time: without a driver
//! there are no GPUs, and nothing fails.

use std::sync::OnceLock;

use nvml_wrapper::enums::device::UsedGpuMemory;
use nvml_wrapper::{Device, Nvml};
use prometheus::{IntGauge, IntGaugeVec, Registry};

use super::metrics::{gauge, gauges, to_i64};
use crate::ops::device::DeviceMemory;

/// The gauges of GPU memory.
pub(super) struct GpuGauges {
    gpus: Gpus,
    total: IntGaugeVec,
    used: IntGaugeVec,
    own: IntGaugeVec,
    by_kind: IntGaugeVec,
    reserved: IntGauge,
    student: OnceLock<StudentMemory>,
}

/// The memory of the GPU on which the student is.
struct StudentMemory {
    /// In use when the student had been loaded, and nothing else.
    weights: u64,
    read: Box<dyn Fn() -> Option<DeviceMemory> + Send + Sync>,
}

impl GpuGauges {
    pub(super) fn new(r: &Registry) -> Result<Self, prometheus::Error> {
        let by_gpu = |name, help| gauges(r, name, help, &["gpu"]);
        Ok(Self {
            gpus: Gpus::find(),
            total: by_gpu("kdlora_gpu_memory_total_bytes", "Memory of the GPU.")?,
            used: by_gpu(
                "kdlora_gpu_memory_used_bytes",
                "Memory of the GPU that is used, by any process.",
            )?,
            own: by_gpu(
                "kdlora_gpu_memory_process_bytes",
                "Memory of the GPU that this process uses.",
            )?,
            by_kind: gauges(
                r,
                "kdlora_gpu_memory_kind_bytes",
                "Memory of the student's GPU by kind: weights of the student, adapters, the most \
                 that activations have taken so far, and the most that the running job has taken.",
                &["kind"],
            )?,
            reserved: gauge(
                r,
                "kdlora_gpu_memory_reserved_bytes",
                "Memory of the student's GPU that the server has taken, in use or kept for later.",
            )?,
            student: OnceLock::new(),
        })
    }

    /// The student has been loaded onto a GPU; `read` says what is used there.
    pub(super) fn student_loaded(
        &self,
        read: impl Fn() -> Option<DeviceMemory> + Send + Sync + 'static,
    ) {
        if let Some(memory) = read() {
            let (weights, read) = (memory.used, Box::new(read));
            let _ = self.student.set(StudentMemory { weights, read });
        }
    }

    /// The most that the running job has taken so far; `None` where none runs on a GPU.
    pub(super) fn training(&self, bytes: Option<u64>) {
        match bytes {
            Some(bytes) => self.kind("training", bytes),
            None => drop(self.by_kind.remove_label_values(&["training"])),
        }
    }

    /// Reads everything anew; `adapters` are the bytes of those in memory.
    pub(super) fn refresh(&self, adapters: u64) {
        for gpu in self.gpus.memory() {
            let index = gpu.index.to_string();
            for (gauges, bytes) in [
                (&self.total, gpu.total),
                (&self.used, gpu.used),
                (&self.own, gpu.own),
            ] {
                gauges.with_label_values(&[&index]).set(to_i64(bytes));
            }
        }
        let Some(student) = self.student.get() else {
            return;
        };
        if let Some(memory) = (student.read)() {
            self.kind("weights", student.weights);
            self.kind("adapters", adapters);
            let others = memory.peak.saturating_sub(student.weights);
            self.kind("activations", others.saturating_sub(adapters));
            self.reserved.set(to_i64(memory.reserved));
        }
    }

    fn kind(&self, kind: &str, bytes: u64) {
        self.by_kind.with_label_values(&[kind]).set(to_i64(bytes));
    }
}

/// The GPUs of this machine.
struct Gpus {
    nvml: Option<Nvml>,
}

/// Memory of one GPU, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct GpuMemory {
    index: u32,
    total: u64,
    /// By any process.
    used: u64,
    /// By this process.
    own: u64,
}

impl Gpus {
    fn find() -> Self {
        Self {
            nvml: Nvml::init().ok(),
        }
    }

    /// What the driver says at this moment; a GPU that does not answer is left out.
    fn memory(&self) -> Vec<GpuMemory> {
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
