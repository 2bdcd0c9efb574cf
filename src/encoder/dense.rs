//! A linear of a layer: as it is, or laid out for inference.

use std::sync::Arc;

use candle_core::Tensor;

use super::EncoderError;
use crate::ops::{self, Activation, Linear, PackedLinear, Precision, RowUpdates};

#[derive(Clone)]
pub(super) enum Dense {
    /// Can be trained.
    Plain(Linear),
    /// Shared by the encoders that leave it as it is.
    Packed(Arc<PackedLinear>),
}

impl Dense {
    pub(super) fn pack(&self, precision: Precision) -> Result<Self, EncoderError> {
        Ok(match self {
            Self::Plain(linear) => Self::Packed(Arc::new(PackedLinear::new(linear, precision)?)),
            Self::Packed(packed) => Self::Packed(Arc::clone(packed)),
        })
    }

    /// Memory of a packed one; that of a plain one is its tensors'.
    pub(super) fn packed(&self) -> Option<&Arc<PackedLinear>> {
        match self {
            Self::Plain(_) => None,
            Self::Packed(packed) => Some(packed),
        }
    }

    /// `act(x Wᵀ + b + updates)` of frozen tensors, `[rows, in]` to `[rows, out]`.
    pub(super) fn infer(
        &self,
        x: &Tensor,
        updates: Vec<RowUpdates>,
        activation: Activation,
    ) -> Result<Tensor, EncoderError> {
        Ok(match self {
            Self::Packed(packed) => ops::packed_linear(x, packed, &updates, activation)?,
            Self::Plain(linear) if updates.is_empty() => ops::linear(x, linear, activation)?,
            Self::Plain(linear) => ops::linear_rows(x, linear, updates, activation)?,
        })
    }

    /// The tensors, for training.
    pub(super) fn plain(&self) -> Result<&Linear, EncoderError> {
        match self {
            Self::Plain(linear) => Ok(linear),
            Self::Packed(_) => Err(EncoderError::Unsupported(
                "an encoder that is packed for inference can't be trained".into(),
            )),
        }
    }
}
