//! Encoders for inference alone: their linears are laid out for the kernels of this machine.
//!
//! A packed linear takes the place of its tensors, which leave memory. What needs them again, such
//! as an adapter that is merged, reads them from the encoder's folder.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use candle_core::Tensor;

use super::dense::Dense;
use super::layer::{Layer, Slot};
use super::weights::bytes;
use super::{Encoder, EncoderError, LinearSpec, Site, Weights};
use crate::ops::{PackedLinear, Precision};

/// What is packed, and how.
#[derive(Clone, Debug)]
pub(super) struct Packing {
    precision: Precision,
    /// Names of the tensors that are gone.
    gone: BTreeSet<String>,
}

impl Encoder {
    /// This encoder for inference: it can't be trained. Its folder must stay where it is if adapters
    /// are to be merged into it.
    ///
    /// # Errors
    /// Weights take part in training.
    pub fn pack(mut self, precision: Precision) -> Result<Self, EncoderError> {
        let mut gone = BTreeSet::new();
        for spec in self.linears.iter().filter(|spec| is_packed(spec)) {
            gone.insert(format!("{}.weight", spec.name));
        }
        if let Some(projection) = &mut self.projection {
            *projection = projection.pack(precision)?;
        }
        for layer in &mut self.layers {
            // One layer after the other, so that there is never more than one twice in memory.
            *layer = layer.pack(precision)?;
            let index = layer.index();
            for spec in &self.linears {
                if matches!(spec.site, Site::Layer(i, _) if i == index) && is_packed(spec) {
                    self.weights.remove(&format!("{}.weight", spec.name));
                }
            }
        }
        for name in &gone {
            self.weights.remove(name);
        }
        self.packing = Some(Packing { precision, gone });
        Ok(self)
    }

    /// This encoder for training by LoRA with linears in bf16. Where a layer does not train as one
    /// op, and in inference, it computes as before.
    ///
    /// # Errors
    /// The encoder is packed or not in host memory, or the processor does not multiply in bf16.
    pub fn train_in_bf16(&self) -> Result<Self, EncoderError> {
        let mut encoder = self.clone();
        for layer in &mut encoder.layers {
            *layer = layer.with_bf16()?;
        }
        Ok(encoder)
    }

    /// Memory of the linears in bf16 that [training](Self::train_in_bf16) needs beside the others.
    pub fn bf16_bytes(&self) -> usize {
        self.layers.iter().map(Layer::bf16_bytes).sum()
    }

    /// How the encoder is packed, if it is.
    pub fn precision(&self) -> Option<Precision> {
        self.packing.as_ref().map(|packing| packing.precision)
    }

    /// A weight by its name; one that is packed is read from the encoder's folder.
    ///
    /// # Errors
    /// There is none of that name, or the folder can't be read.
    pub fn weight(&self, name: &str) -> Result<Tensor, EncoderError> {
        if let Some(tensor) = self.weights.find(name) {
            return Ok(tensor.clone());
        }
        let wanted = BTreeSet::from([name.to_owned()]);
        let packed = self.packing.as_ref();
        let read = match packed.is_some_and(|packing| packing.gone.contains(name)) {
            true => self.read_packed(&wanted)?,
            false => Weights::default(),
        };
        let tensor = read.find(name).cloned();
        tensor.ok_or_else(|| EncoderError::MissingWeight { name: name.into() })
    }

    /// All weights; those that are packed are read from the encoder's folder.
    ///
    /// # Errors
    /// The folder can't be read.
    pub fn all_weights(&self) -> Result<Weights, EncoderError> {
        let Some(packing) = &self.packing else {
            return Ok(self.weights.clone());
        };
        let read = self.read_packed(&packing.gone)?;
        let read = read.iter().map(|(n, t)| (n.clone(), t.clone()));
        Ok(self.weights.with(read))
    }

    /// Weights that are packed, from the folder.
    fn read_packed(&self, names: &BTreeSet<String>) -> Result<Weights, EncoderError> {
        let wanted = |name: &str| names.contains(name);
        let read = match &self.folder {
            Some(folder) => Weights::read_where(folder, self.config.family, self.device(), wanted)?,
            None => Weights::default(),
        };
        match names.iter().find(|name| read.find(name).is_none()) {
            Some(name) => Err(EncoderError::MissingWeight { name: name.clone() }),
            None => Ok(read),
        }
    }

    /// This encoder with some weights in the place of its own, packed as it is. What they don't
    /// touch is shared.
    ///
    /// # Errors
    /// A weight of another shape, or a folder that can't be read.
    pub fn with_weights(&self, changed: &BTreeMap<String, Tensor>) -> Result<Self, EncoderError> {
        let changes = || changed.iter().map(|(n, t)| (n.clone(), t.clone()));
        let changed_here = changes()
            .map(|(name, tensor)| Ok((name, self.place(&tensor)?)))
            .collect::<candle_core::Result<Vec<_>>>()?;
        let all = self.all_weights()?.with(changed_here);
        let mut other = Self::new(self.config.clone(), &all)?;
        drop(all);
        other.folder.clone_from(&self.folder);
        let touched: BTreeSet<Site> = self
            .linears
            .iter()
            .filter(|spec| {
                let parts = ["weight", "bias"].map(|part| format!("{}.{part}", spec.name));
                parts.iter().any(|part| changed.contains_key(part))
            })
            .map(|spec| spec.site)
            .collect();
        for (own, shared) in other.layers.iter_mut().zip(&self.layers) {
            own.share_untouched(shared, &touched);
        }
        if !touched.contains(&Site::Embeddings) {
            other.projection.clone_from(&self.projection);
        }
        match &self.packing {
            Some(packing) => other.pack(packing.precision),
            None => {
                // What the shared linears are made of, in the place of views of copies.
                let shared = self.linears.iter().filter(|s| !touched.contains(&s.site));
                let shared = shared.flat_map(|spec| {
                    ["weight", "bias"].map(|part| format!("{}.{part}", spec.name))
                });
                let shared = shared.filter_map(|name| {
                    let tensor = self.weights.find(&name)?.clone();
                    Some((name, tensor))
                });
                other.weights = other.weights.with(shared);
                Ok(other)
            }
        }
    }

    /// Bytes of weights that are not shared with `other`.
    pub fn bytes_beside(&self, other: &Self) -> usize {
        let is_theirs = |linear: &&Arc<PackedLinear>| {
            let mut theirs = other.packed_linears();
            theirs.any(|other| Arc::ptr_eq(linear, other))
        };
        let own = self.packed_linears().filter(|linear| !is_theirs(linear));
        let bytes: usize = own.map(|linear| linear.bytes()).sum();
        bytes + self.weights.bytes_beside(&other.weights)
    }

    /// Memory of the linears, which an adapter that is merged changes.
    pub fn linear_bytes(&self) -> usize {
        let packed: usize = self.packed_linears().map(|linear| linear.bytes()).sum();
        let plain = self.linears.iter().filter_map(|spec| {
            let weight = format!("{}.weight", spec.name);
            self.weights.find(&weight).map(bytes)
        });
        packed + plain.sum::<usize>()
    }

    fn packed_linears(&self) -> impl Iterator<Item = &Arc<PackedLinear>> {
        let linears = self.layers.iter().flat_map(Layer::linears);
        let linears = linears.chain(&self.projection);
        linears.filter_map(Dense::packed)
    }
}

/// Whether a linear stands in the packed ones alone. The head's is as it was, and so are the
/// projections of positions, which are used once.
fn is_packed(spec: &LinearSpec) -> bool {
    match spec.site {
        Site::Layer(_, Slot::Positions) | Site::HeadDense => false,
        Site::Layer(..) | Site::Embeddings => true,
    }
}
