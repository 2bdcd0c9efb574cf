//! Opening a device, and finding out why one cannot be opened.

use std::ffi::{CStr, CString};

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{CudaContext, DriverError, result, sys};
use candle_core::{Device, Result};

use super::super::device::DeviceError;
use super::runtime::Runtime;

type Opened<T> = std::result::Result<T, DeviceError>;

/// Opens the device of this number, with a stream of its own.
///
/// Memory that is freed stays with the process for its next use, and no events are recorded: there
/// is one stream, which keeps the order by itself.
pub(in crate::ops) fn open(ordinal: usize) -> Opened<Device> {
    let driver = check_driver()?;
    let count = result::init()
        .and_then(|()| CudaContext::device_count())
        .w()
        .map_err(|source| DeviceError::Driver { driver, source })?;
    if usize::try_from(count).unwrap_or(0) <= ordinal {
        return Err(DeviceError::NoDevice { ordinal, count });
    }
    prepare(ordinal).map_err(|source| match missing_library() {
        Some(reason) => DeviceError::NoLibrary(reason),
        None => DeviceError::Open { ordinal, source },
    })
}

/// Returns the CUDA version that the driver supports, if this build can run with it.
///
/// Each of the libraries is loaded when it is first called, and one that is missing answers with an
/// error code that hides the reason. So the reason is asked of the dynamic loader.
fn check_driver() -> Opened<String> {
    let found = match driver_version() {
        Ok(found) => found,
        Err(error) => {
            return Err(match load_error("libcuda.so.1") {
                Some(reason) => DeviceError::NoDriver(reason),
                None => DeviceError::Driver {
                    driver: "of unknown version".to_owned(),
                    source: candle_core::Error::wrap(error),
                },
            });
        }
    };
    let needed = sys::CUDA_VERSION;
    if found < needed {
        return Err(DeviceError::OldDriver {
            found: version_text(found),
            needed: version_text(needed),
        });
    }
    Ok(version_text(found))
}

fn driver_version() -> std::result::Result<u32, DriverError> {
    let mut version = 0;
    // SAFETY: the driver writes one integer there. It may be asked before it is initialized.
    #[allow(unsafe_code)]
    unsafe { sys::cuDriverGetVersion(&raw mut version) }.result()?;
    Ok(u32::try_from(version).unwrap_or(0))
}

/// Formats a version as CUDA encodes it: 13000 is `13.0`, 12040 is `12.4`.
fn version_text(version: u32) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}

/// Names the first library beside the driver's that cannot be loaded, with the reason.
fn missing_library() -> Option<String> {
    let major = sys::CUDA_VERSION / 1000;
    let names = [
        format!("libcublasLt.so.{major}"),
        format!("libcublas.so.{major}"),
        // Version 10 since CUDA 11.
        "libcurand.so.10".to_owned(),
    ];
    names.iter().find_map(|name| load_error(name))
}

/// Returns what the dynamic loader says of a library that it cannot load.
fn load_error(library: &str) -> Option<String> {
    let name = CString::new(library).ok()?;
    // SAFETY: NVIDIA's libraries may be loaded at any time. The text of `dlerror` belongs to this
    // thread and is copied before the next call.
    #[allow(unsafe_code)]
    unsafe {
        if !libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL).is_null() {
            return None;
        }
        let text = libc::dlerror();
        (!text.is_null()).then(|| CStr::from_ptr(text).to_string_lossy().into_owned())
    }
}

fn prepare(ordinal: usize) -> Result<Device> {
    let device = Device::new_cuda_with_stream(ordinal)?;
    let cuda = device.as_cuda_device()?;
    // SAFETY: the device has one stream, on which all its memory is allocated, used and freed.
    #[allow(unsafe_code)]
    unsafe {
        cuda.disable_event_tracking();
    }
    super::memory::keep_freed(cuda)?;
    Runtime::of(cuda)?;
    Ok(device)
}
