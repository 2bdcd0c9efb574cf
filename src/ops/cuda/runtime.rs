//! The kernels of a device, and their launches.

use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use candle_core::Result;
use candle_core::cuda_backend::cudarc::driver::{DriverError, result, sys};
use candle_core::cuda_backend::{CudaDevice, DeviceId, WrapErr};

use super::super::kernels::Launch;

/// The kernels for all GPUs from sm_80 on, made by `build.rs`.
static KERNELS: &FatBinary<[u8]> =
    &FatBinary(*include_bytes!(concat!(env!("OUT_DIR"), "/kernels.fatbin")));

/// The driver reads the header of a fat binary as a structure; bytes alone have no alignment.
#[repr(align(64))]
struct FatBinary<T: ?Sized>(T);

/// Keeps others from computing on any device of this process. Forwards hold it while they are
/// being launched, not until they are computed.
pub(in crate::ops) fn exclusive() -> MutexGuard<'static, ()> {
    static COMPUTING: Mutex<()> = Mutex::new(());
    COMPUTING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The kernels of one device.
pub(super) struct Runtime {
    module: Module,
    functions: Mutex<HashMap<String, Function>>,
}

#[derive(Clone, Copy)]
struct Function(sys::CUfunction);

struct Module(sys::CUmodule);

// SAFETY: handles of the driver, which may be used from any thread; they are never unloaded.
#[allow(unsafe_code)]
unsafe impl Send for Function {}
// SAFETY: as above.
#[allow(unsafe_code)]
unsafe impl Send for Module {}
// SAFETY: as above.
#[allow(unsafe_code)]
unsafe impl Sync for Module {}

impl Runtime {
    /// That of a device, made when it is first asked for.
    pub(super) fn of(device: &CudaDevice) -> Result<Arc<Self>> {
        static RUNTIMES: OnceLock<Mutex<HashMap<DeviceId, Arc<Runtime>>>> = OnceLock::new();
        let runtimes = RUNTIMES.get_or_init(Mutex::default);
        let mut runtimes = runtimes.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(runtime) = runtimes.get(&device.id()) {
            return Ok(Arc::clone(runtime));
        }
        device.cuda_stream().context().bind_to_thread().w()?;
        // SAFETY: the image is a whole fat binary, and the device's context is current.
        #[allow(unsafe_code)]
        let module = unsafe { result::module::load_data(KERNELS.0.as_ptr().cast()) }.w()?;
        let runtime = Arc::new(Self {
            module: Module(module),
            functions: Mutex::default(),
        });
        runtimes.insert(device.id(), Arc::clone(&runtime));
        Ok(runtime)
    }

    fn function(&self, name: &str) -> Result<Function> {
        let mut functions = self
            .functions
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(function) = functions.get(name) {
            return Ok(*function);
        }
        let symbol = CString::new(name).map_err(candle_core::Error::wrap)?;
        // SAFETY: the module is loaded and never unloaded.
        #[allow(unsafe_code)]
        let function = unsafe { result::module::get_function(self.module.0, symbol) }.w()?;
        functions.insert(name.to_owned(), Function(function));
        Ok(Function(function))
    }
}

/// Puts launches on the device's stream.
///
/// The addresses in their arguments must belong to memory of this device that is large enough for
/// what the kernel reads and writes; it may be freed as soon as this returns, since that is put on
/// the stream too.
pub(super) fn launch(
    device: &CudaDevice,
    launches: impl IntoIterator<Item = Launch>,
) -> Result<()> {
    let stream = device.cuda_stream();
    stream.context().bind_to_thread().w()?;
    let runtime = Runtime::of(device)?;
    for mut launch in launches {
        let function = runtime.function(&launch.kernel)?;
        let mut arguments: Vec<*mut c_void> = launch.args.pointers();
        let [gx, gy, gz] = launch.grid;
        let [bx, by, bz] = launch.block;
        // SAFETY: the plan of the launch has laid out the arguments that this kernel takes, which
        // live until the driver has copied them; the callers keep to the rule above.
        #[allow(unsafe_code)]
        let launched = unsafe {
            result::launch_kernel(
                function.0,
                (gx, gy, gz),
                (bx, by, bz),
                launch.shared_bytes,
                stream.cu_stream(),
                &mut arguments,
            )
        };
        launched.map_err(|error| failed(&launch.kernel, error))?;
    }
    Ok(())
}

fn failed(kernel: &str, error: DriverError) -> candle_core::Error {
    candle_core::Error::msg(format!("the kernel {kernel} can't be launched: {error}"))
}
