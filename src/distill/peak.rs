//! The greatest memory of a stage of a pass.

use candle_core::Device;

use crate::ops::device;
use crate::telemetry::memory;

/// Lets the peak begin anew at what is in use at this moment.
pub(super) fn begin(device: &Device) {
    memory::reset_peak();
    device::reset_peak(device);
}

/// The most since then, in bytes: of the GPU's memory where the process computes on one, resident
/// on a CPU. `None` where the system does not say.
pub(super) fn end(device: &Device) -> Option<u64> {
    match device::memory(device) {
        Some(memory) => Some(memory.peak),
        None => memory::peak_resident_bytes(),
    }
}
