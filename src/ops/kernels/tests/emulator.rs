//! The kernels as a C++ compiler translates them.

#![allow(unsafe_code)]

use std::ffi::{CString, c_char, c_int, c_uint, c_void};
use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;

use half::{bf16, f16};
use libloading::Library;

use super::{Launch, Ptr, Scalar};

type Emulate = unsafe extern "C" fn(
    *const c_char,
    *const c_uint,
    *const c_uint,
    c_uint,
    *mut *mut c_void,
) -> c_int;

/// The loaded kernels; compiled once for all tests of a process.
fn library() -> &'static Library {
    static LIBRARY: OnceLock<Library> = OnceLock::new();
    LIBRARY.get_or_init(|| {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/ops/kernels/host/emulate.cpp");
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("kernels.so");
        let compiled = Command::new("c++")
            .args(["-std=c++17", "-O2", "-fno-strict-aliasing", "-shared"])
            .args(["-fPIC", "-w", "-o"])
            .arg(&file)
            .arg(source)
            .output()
            .expect("a C++ compiler named c++");
        let errors = String::from_utf8_lossy(&compiled.stderr);
        assert!(compiled.status.success(), "{errors}");
        // SAFETY: the library has constructors of plain tables only.
        unsafe { Library::new(&file) }.unwrap()
    })
}

/// Runs launches one after the other.
#[track_caller]
pub(super) fn run(launches: impl IntoIterator<Item = Launch>) {
    for mut launch in launches {
        assert_within_limits(&launch);
        let name = CString::new(launch.kernel.clone()).unwrap();
        let mut arguments = launch.args.pointers();
        // SAFETY: that is the function's type; the buffers that the launch names are alive.
        let unknown = unsafe {
            let emulate = library().get::<Emulate>(b"emulate").unwrap();
            emulate(
                name.as_ptr(),
                launch.grid.as_ptr(),
                launch.block.as_ptr(),
                launch.shared_bytes,
                arguments.as_mut_ptr(),
            )
        };
        assert_eq!(unknown, 0, "no kernel {}", launch.kernel);
    }
}

/// Of every device from sm_80 on, without asking for more.
fn assert_within_limits(launch: &Launch) {
    let threads: u32 = launch.block.iter().product();
    let [_, grid_y, grid_z] = launch.grid;
    assert!(launch.shared_bytes <= 48 << 10, "{launch:?}");
    assert!(threads <= 1024 && threads.is_multiple_of(32), "{launch:?}");
    assert!(grid_y <= 65_535 && grid_z <= 65_535, "{launch:?}");
    assert!(launch.args.bytes() <= 4096, "{launch:?}");
}

/// Memory of the emulated device, with a margin that must stay as it is.
pub(super) struct Buffer {
    words: Vec<u128>,
    t: Scalar,
    len: usize,
}

const MARGIN: u128 = u128::MAX / 3;

impl Buffer {
    pub(super) fn of(t: Scalar, values: &[f32]) -> Self {
        let bytes = match t {
            Scalar::F32 => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
            Scalar::F16 => encode(values, |x| f16::from_f32(x).to_bits()),
            Scalar::Bf16 => encode(values, |x| bf16::from_f32(x).to_bits()),
        };
        Self::of_bytes(t, &bytes, values.len())
    }

    /// u32 values.
    pub(super) fn indices(values: impl IntoIterator<Item = usize>) -> Self {
        let bits: Vec<f32> = values
            .into_iter()
            .map(|x| f32::from_bits(x as u32))
            .collect();
        Self::of(Scalar::F32, &bits)
    }

    /// Values that nobody has written.
    pub(super) fn poisoned(t: Scalar, len: usize) -> Self {
        Self::of(t, &vec![f32::NAN; len])
    }

    fn of_bytes(t: Scalar, bytes: &[u8], len: usize) -> Self {
        let mut words: Vec<u128> = bytes
            .chunks(16)
            .map(|chunk| {
                let mut word = MARGIN.to_le_bytes();
                word[..chunk.len()].copy_from_slice(chunk);
                u128::from_le_bytes(word)
            })
            .collect();
        words.extend([MARGIN; 2]);
        Self { words, t, len }
    }

    pub(super) fn ptr(&self) -> Ptr {
        Ptr(self.words.as_ptr() as u64)
    }

    pub(super) fn values(&self) -> Vec<f32> {
        // Volatile: the compiler knows nothing of who has written here.
        let bytes: Vec<u8> = (0..self.words.len())
            // SAFETY: inside the vector.
            .map(|i| unsafe { std::ptr::read_volatile(self.words.as_ptr().add(i)) })
            .flat_map(u128::to_le_bytes)
            .collect();
        let (values, margin) = bytes.split_at(self.len * self.t.size());
        let untouched = MARGIN.to_le_bytes()[0];
        assert!(
            margin.iter().all(|byte| *byte == untouched),
            "wrote beyond the end"
        );
        match self.t {
            Scalar::F32 => {
                let values = values.as_chunks().0.iter();
                values.map(|bytes| f32::from_le_bytes(*bytes)).collect()
            }
            Scalar::F16 => decode(values, |bits| f16::from_bits(bits).to_f32()),
            Scalar::Bf16 => decode(values, |bits| bf16::from_bits(bits).to_f32()),
        }
    }
}

fn encode(values: &[f32], bits: impl Fn(f32) -> u16) -> Vec<u8> {
    values.iter().flat_map(|x| bits(*x).to_le_bytes()).collect()
}

fn decode(bytes: &[u8], value: impl Fn(u16) -> f32) -> Vec<f32> {
    let values = bytes.as_chunks().0.iter();
    values
        .map(|bytes| value(u16::from_le_bytes(*bytes)))
        .collect()
}
