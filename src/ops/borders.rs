//! Where the sequences of a packed batch begin.

use std::ops::Deref;
use std::sync::Arc;

use candle_core::{Result, Tensor};

/// Where each sequence begins, and where the last one ends: `[sequences + 1]`.
#[derive(Clone, Debug)]
pub struct Borders {
    offsets: Arc<[usize]>,
    on_device: Option<Tensor>,
}

impl Borders {
    /// `on_device` is the same, u32 `[sequences + 1]`, where the batch is not in host memory.
    pub fn new(offsets: &[usize], on_device: Option<Tensor>) -> Self {
        Self {
            offsets: offsets.into(),
            on_device,
        }
    }

    /// The borders beside the tensors.
    ///
    /// # Errors
    /// They are in host memory alone.
    pub fn on_device(&self) -> Result<&Tensor> {
        match &self.on_device {
            Some(borders) => Ok(borders),
            None => candle_core::bail!("the borders are not where the sequences are"),
        }
    }
}

impl<const N: usize> From<[usize; N]> for Borders {
    fn from(offsets: [usize; N]) -> Self {
        Self::new(&offsets, None)
    }
}

impl Deref for Borders {
    type Target = [usize];

    fn deref(&self) -> &[usize] {
        &self.offsets
    }
}
