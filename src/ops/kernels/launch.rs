//! What is launched: a kernel's name, its grid and its arguments.

use std::ffi::c_void;

/// An address in the device's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::ops) struct Ptr(pub u64);

impl Ptr {
    /// What kernels take for "none".
    pub(super) const NULL: Self = Self(0);

    /// Whether vectors of 16 bytes can be read from here.
    pub(super) fn is_aligned(self) -> bool {
        self.0.is_multiple_of(16)
    }
}

/// The type of activations and matrices. Arithmetic is f32 whatever it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::ops) enum Scalar {
    F32,
    F16,
    Bf16,
}

impl Scalar {
    /// The ending of the names of its kernels.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
        }
    }

    /// Bytes of a value.
    pub(super) fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }
}

/// One launch of a kernel.
#[derive(Clone, Debug)]
pub(in crate::ops) struct Launch {
    /// `norm_bf16`, say.
    pub kernel: String,
    pub grid: [u32; 3],
    pub block: [u32; 3],
    /// Dynamic shared memory. There is no other: the kernels declare no array of a fixed size.
    pub shared_bytes: u32,
    pub args: Args,
}

impl Launch {
    pub(super) fn new(
        kernel: &str,
        scalar: Scalar,
        (grid_x, grid_y): (usize, usize),
        threads: usize,
        args: Args,
    ) -> Self {
        Self {
            kernel: format!("{kernel}_{}", scalar.name()),
            grid: [size(grid_x), size(grid_y), 1],
            block: [size(threads), 1, 1],
            shared_bytes: 0,
            args,
        }
    }

    pub(super) fn with_shared(self, bytes: usize) -> Self {
        Self {
            shared_bytes: size(bytes),
            ..self
        }
    }
}

/// Kernel arguments by value, laid out as `cuLaunchKernel` wants them.
///
/// Each argument is a run of 64-bit words, the first bytes of which are the argument: scalars are
/// zero-extended, structs are made of words. That is right on little-endian machines, which all
/// hosts of such a device are.
#[derive(Clone, Debug, Default)]
pub(in crate::ops) struct Args(Vec<Box<[u64]>>);

impl Args {
    /// The address of each argument; they stay valid until `self` is changed or dropped.
    pub(in crate::ops) fn pointers(&mut self) -> Vec<*mut c_void> {
        self.0
            .iter_mut()
            .map(|words| words.as_mut_ptr().cast())
            .collect()
    }

    /// Of all arguments together, at most.
    #[cfg(test)]
    pub(super) fn bytes(&self) -> usize {
        self.0.iter().map(|words| size_of_val::<[u64]>(words)).sum()
    }

    pub(super) fn word(self, word: u64) -> Self {
        self.words(vec![word])
    }

    pub(super) fn ptr(self, ptr: Ptr) -> Self {
        self.word(ptr.0)
    }

    pub(super) fn optional(self, ptr: Option<Ptr>) -> Self {
        self.ptr(ptr.unwrap_or(Ptr::NULL))
    }

    /// A C `unsigned`.
    pub(super) fn size(self, value: usize) -> Self {
        self.word(size(value).into())
    }

    pub(super) fn float(self, value: f32) -> Self {
        self.word(value.to_bits().into())
    }

    /// A struct.
    pub(super) fn words(mut self, words: Vec<u64>) -> Self {
        self.0.push(words.into());
        self
    }
}

/// Two neighbouring 32-bit fields of a struct.
pub(super) fn pair(first: u32, second: u32) -> u64 {
    u64::from(first) | u64::from(second) << 32
}

/// A size as kernels take it.
///
/// # Panics
/// At 2³² and beyond, which no tensor of a batch comes near.
pub(super) fn size(value: usize) -> u32 {
    u32::try_from(value).expect("a size of a batch fits 32 bits")
}
