//! Copies between host and device: one to the device for a batch, one back, through host memory
//! that the device reaches by itself (pinned), and counted.

#[cfg(test)]
use std::cell::Cell;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::cuda_backend::cudarc::driver::sys::CUevent_flags;
use candle_core::cuda_backend::cudarc::driver::{CudaEvent, CudaStream, DevicePtr as _, result};
use candle_core::cuda_backend::{CudaDevice, CudaStorage, WrapErr};
use candle_core::op::BackpropOp;
use candle_core::{DType, Result, Storage, Tensor};

use super::view::with_view;

#[cfg(test)]
thread_local! {
    /// Copies to the device and back that this thread has made.
    static COPIES: Cell<(usize, usize)> = const { Cell::new((0, 0)) };
}

#[cfg(test)]
pub(in crate::ops) fn copies() -> (usize, usize) {
    COPIES.get()
}

#[cfg(test)]
fn note(to_device: usize, to_host: usize) {
    let (before, back) = COPIES.get();
    COPIES.set((before + to_device, back + to_host));
}

/// Pinned memory of some 32-bit values, and when the device has done with it.
struct Pinned {
    values: *mut u32,
    capacity: usize,
    done: CudaEvent,
}

// SAFETY: the memory belongs to this value alone and is as good from any thread.
#[allow(unsafe_code)]
unsafe impl Send for Pinned {}

/// Pinned memory is dear to get: it is kept for the next copy, never given back.
static FREE: Mutex<Vec<Pinned>> = Mutex::new(Vec::new());

const SMALLEST: usize = 4096;

/// Returns how a thread waits for an event. `None` is the driver's default: it spins, which answers
/// a lone request soonest. Where cores are few, tokenizing needs them more.
fn waiting_blocks() -> Option<CUevent_flags> {
    const FEW: usize = 8;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    (cores <= FEW).then_some(CUevent_flags::CU_EVENT_BLOCKING_SYNC)
}

impl Pinned {
    fn take(stream: &Arc<CudaStream>, count: usize) -> Result<Self> {
        let mut free = FREE.lock().unwrap_or_else(PoisonError::into_inner);
        let fitting = free.iter().position(|pinned| pinned.capacity >= count);
        if let Some(fitting) = fitting {
            return Ok(free.swap_remove(fitting));
        }
        drop(free);
        let capacity = count.next_power_of_two().max(SMALLEST);
        let context = stream.context();
        let done = context.new_event(waiting_blocks()).w()?;
        // SAFETY: the context is current behind `new_event`.
        #[allow(unsafe_code)]
        let values = unsafe { result::malloc_host(capacity * size_of::<u32>(), 0) }.w()?;
        Ok(Self {
            values: values.cast(),
            capacity,
            done,
        })
    }

    fn give_back(self) {
        FREE.lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(self);
    }

    /// The first of the values.
    fn as_mut_slice(&mut self, count: usize) -> &mut [u32] {
        assert!(count <= self.capacity, "more values than pinned memory");
        // SAFETY: there are that many, nobody else has them, and any bits are a number.
        #[allow(unsafe_code)]
        unsafe {
            std::slice::from_raw_parts_mut(self.values, count)
        }
    }
}

/// Several arrays in the device's memory, by one copy: a tensor of each, `[values]`.
pub(in crate::ops) fn upload(device: &CudaDevice, arrays: &[&[u32]]) -> Result<Vec<Tensor>> {
    let count: usize = arrays.iter().map(|array| array.len()).sum();
    let stream = device.cuda_stream();
    let mut pinned = Pinned::take(&stream, count)?;
    // Until the copy before this one has been made.
    pinned.done.synchronize().w()?;
    let values = pinned.as_mut_slice(count);
    let mut filled = 0;
    for array in arrays {
        values[filled..filled + array.len()].copy_from_slice(array);
        filled += array.len();
    }
    // SAFETY: all values are written by the copy.
    #[allow(unsafe_code)]
    let target = unsafe { device.alloc::<u32>(count.max(1)) }?;
    let (address, _) = target.device_ptr(&stream);
    // SAFETY: both sides have room for the values, and `done` keeps the source until they are read.
    #[allow(unsafe_code)]
    unsafe { result::memcpy_htod_async(address, values, stream.cu_stream()) }.w()?;
    pinned.done.record(&stream).w()?;
    pinned.give_back();
    #[cfg(test)]
    note(1, 0);
    let storage = Storage::Cuda(CudaStorage::wrap_cuda_slice(target, device.clone()));
    let all = Tensor::from_storage(storage, count.max(1), BackpropOp::none(), false);
    let mut start = 0;
    arrays
        .iter()
        .map(|array| {
            let part = all.narrow(0, start, array.len());
            start += array.len();
            part
        })
        .collect()
}

/// Values on their way back.
pub(in crate::ops) struct Download {
    pinned: Option<Pinned>,
    count: usize,
}

impl Download {
    /// Asks for all values of a contiguous tensor in f32; does not wait.
    pub(in crate::ops) fn begin(tensor: &Tensor) -> Result<Self> {
        with_view(tensor, |view| {
            let view = view.of(DType::F32, "what is read back")?;
            let count = view.count();
            let stream = view.device.cuda_stream();
            let mut pinned = Pinned::take(&stream, count)?;
            let target = pinned.as_mut_slice(count);
            // SAFETY: the memory stays with this value until the event says that all is there.
            #[allow(unsafe_code)]
            unsafe { result::memcpy_dtoh_async(target, view.at.0, stream.cu_stream()) }.w()?;
            pinned.done.record(&stream).w()?;
            #[cfg(test)]
            note(0, 1);
            Ok(Self {
                pinned: Some(pinned),
                count,
            })
        })
    }

    /// Waits for them, and for nothing that was asked for later.
    pub(in crate::ops) fn wait(mut self) -> Result<Vec<f32>> {
        let Some(mut pinned) = self.pinned.take() else {
            return Ok(Vec::new());
        };
        let waited = pinned.done.synchronize().w();
        let bits = pinned.as_mut_slice(self.count).iter();
        let values = bits.map(|bits| f32::from_bits(*bits)).collect();
        pinned.give_back();
        waited.map(|()| values)
    }
}

impl Drop for Download {
    /// One that nobody waits for: the device may still write there.
    fn drop(&mut self) {
        if let Some(pinned) = self.pinned.take() {
            let _ = pinned.done.synchronize();
            pinned.give_back();
        }
    }
}
