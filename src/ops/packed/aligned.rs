//! Memory that begins with a cache line.

use std::ops::Range;

/// Values of a cache line.
const LINE_BYTES: usize = 64;

/// A fixed number of values, the first at the begin of a cache line: a load of the kernels never
/// touches two lines.
pub(super) struct Aligned<T> {
    memory: Vec<T>,
    place: Range<usize>,
}

impl<T: Copy + Default> Aligned<T> {
    pub(super) fn zeroed(len: usize) -> Self {
        let memory = vec![T::default(); len + LINE_BYTES / size_of::<T>()];
        let start = memory.as_ptr().align_offset(LINE_BYTES);
        Self {
            memory,
            place: start..start + len,
        }
    }

    pub(super) fn as_slice(&self) -> &[T] {
        &self.memory[self.place.clone()]
    }

    pub(super) fn as_mut_slice(&mut self) -> &mut [T] {
        &mut self.memory[self.place.clone()]
    }
}
