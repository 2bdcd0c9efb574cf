//! Named tensors of a model folder.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};

use super::stored::StoredTensors;
use super::{EncoderError, Family, HeadNames};
use crate::ops::{Linear, Norm, is_finite};

/// Memory of a tensor's elements.
pub(super) fn bytes(tensor: &Tensor) -> usize {
    tensor.elem_count() * tensor.dtype().size_in_bytes()
}

/// Tensors by name, as they are stored in f32, without the family's prefix.
#[derive(Clone, Debug, Default)]
pub struct Weights(BTreeMap<String, Tensor>);

impl Weights {
    /// Reads the weights of a model folder.
    ///
    /// # Errors
    /// A file is missing or damaged, or a value is not finite.
    pub fn read(dir: &Path, family: Family, device: &Device) -> Result<Self, EncoderError> {
        Self::read_where(dir, family, device, |_| true)
    }

    /// Reads those tensors of a folder that are wanted by their names here.
    pub(super) fn read_where(
        dir: &Path,
        family: Family,
        device: &Device,
        wanted: impl Fn(&str) -> bool,
    ) -> Result<Self, EncoderError> {
        let stored = StoredTensors::open(dir)?;
        let read = |name: &str| {
            let tensor = stored.read(name, &Device::Cpu)?;
            // Such a model would answer NaN, or train to it, without a word about the cause.
            if !is_finite(&tensor)? {
                return Err(EncoderError::NotFinite {
                    folder: dir.to_path_buf(),
                    name: name.to_owned(),
                });
            }
            Ok(tensor.to_device(device)?)
        };
        stored
            .names()
            .filter_map(|name| Some((name_here(family, name)?, name)))
            .filter(|(here, _)| wanted(here))
            .map(|(here, name)| Ok((here, read(name)?)))
            .collect()
    }

    /// These on a device, matrices in `dtype`; vectors and MPNet's table of biases stay in f32.
    pub(super) fn place(&self, device: &Device, dtype: DType) -> candle_core::Result<Self> {
        let place = |(name, tensor): (&String, &Tensor)| {
            let dtype = match name == RELATIVE_BIAS {
                true => DType::F32,
                false => dtype,
            };
            Ok((name.clone(), place(tensor, device, dtype)?))
        };
        self.0.iter().map(place).collect()
    }

    /// These without some.
    pub(super) fn remove(&mut self, name: &str) {
        self.0.remove(name);
    }

    pub fn iter(&self) -> impl Iterator<Item = (&String, &Tensor)> {
        self.0.iter()
    }

    pub fn find(&self, name: &str) -> Option<&Tensor> {
        self.0.get(name)
    }

    /// The weights that do not stand beside the encoder.
    pub fn encoder(&self, family: Family) -> impl Iterator<Item = (&String, &Tensor)> {
        self.0.iter().filter(move |(name, _)| !family.is_head(name))
    }

    /// These with others, which take the place of those of the same name.
    pub fn with(&self, others: impl IntoIterator<Item = (String, Tensor)>) -> Self {
        let mut all = self.clone();
        all.0.extend(others);
        all
    }

    /// Memory of those that are not shared with `others`.
    pub fn bytes_beside(&self, others: &Self) -> usize {
        let is_shared = |(name, tensor): &(&String, &Tensor)| {
            others
                .find(name)
                .is_some_and(|other| other.id() == tensor.id())
        };
        let own = self.0.iter().filter(|entry| !is_shared(entry));
        own.map(|(_, tensor)| bytes(tensor)).sum()
    }

    /// Puts views of a frozen fused linear in the place of its parts, whose names are in order.
    pub(super) fn share(&mut self, fused: &Linear, parts: &[String]) {
        if fused.weight.track_op() {
            return;
        }
        let rows = fused.out_features() / parts.len();
        for (i, part) in parts.iter().enumerate() {
            let tensors = [
                ("weight", Some(&fused.weight)),
                ("bias", fused.bias.as_ref()),
            ];
            for (kind, tensor) in tensors {
                let view = tensor.and_then(|tensor| tensor.narrow(0, i * rows, rows).ok());
                if let Some(view) = view {
                    self.0.insert(format!("{part}.{kind}"), view);
                }
            }
        }
    }

    pub fn contains(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    /// The weights of the classification head that stand beside the encoder.
    pub fn head(&self, family: Family) -> BTreeMap<String, Tensor> {
        let head = |(name, _): &(&String, &Tensor)| family.is_head(name);
        self.0
            .iter()
            .filter(head)
            .map(|(n, t)| (n.clone(), t.clone()))
            .collect()
    }

    pub(super) fn get(&self, name: &str, shape: &[usize]) -> Result<Tensor, EncoderError> {
        let tensor = self
            .0
            .get(name)
            .ok_or_else(|| EncoderError::MissingWeight {
                name: name.to_owned(),
            })?;
        check_shape(name, tensor, shape)?;
        Ok(tensor.clone())
    }

    pub(super) fn linear(
        &self,
        name: &str,
        in_features: usize,
        out_features: usize,
    ) -> Result<Linear, EncoderError> {
        Ok(Linear {
            weight: self.get(&format!("{name}.weight"), &[out_features, in_features])?,
            bias: Some(self.get(&format!("{name}.bias"), &[out_features])?),
        })
    }

    pub(super) fn norm(&self, name: &str, hidden: usize, eps: f64) -> Result<Norm, EncoderError> {
        let gamma = self.get(&format!("{name}.weight"), &[hidden])?;
        let beta = self.get(&format!("{name}.bias"), &[hidden])?;
        Ok(Norm {
            gamma_beta: Tensor::stack(&[gamma, beta], 0)?,
            eps,
        })
    }
}

/// MPNet's biases of relative positions.
pub(super) const RELATIVE_BIAS: &str = "encoder.relative_attention_bias.weight";

/// A tensor on a device; a matrix in `dtype`, a vector in f32.
pub(super) fn place(tensor: &Tensor, device: &Device, dtype: DType) -> candle_core::Result<Tensor> {
    let dtype = match tensor.rank() {
        0 | 1 => DType::F32,
        _ => dtype,
    };
    // Halves are half as much to copy.
    tensor.to_dtype(dtype)?.to_device(device)
}

impl FromIterator<(String, Tensor)> for Weights {
    fn from_iter<I: IntoIterator<Item = (String, Tensor)>>(iter: I) -> Self {
        Self(iter.into_iter().collect())
    }
}

/// The name of a weight here; `None` for one that classification does not use.
pub(super) fn name_here(family: Family, stored: &str) -> Option<String> {
    let name = match stored.strip_prefix(family.prefix()) {
        Some(rest) => rest.strip_prefix('.').unwrap_or(stored),
        None => stored,
    };
    let module = name.split('.').next().unwrap_or_default();
    let encoder = ["embeddings", "encoder", "transformer"].contains(&module);
    let pooler = module == "pooler" && HeadNames::of(family).dense.starts_with("pooler.");
    if name.ends_with("position_ids") || !(encoder || pooler || family.is_head(name)) {
        return None;
    }
    // Checkpoints that go back to TensorFlow, among them bert-base-uncased on the hub.
    Some(match name.rsplit_once('.') {
        Some((norm, "gamma")) => format!("{norm}.weight"),
        Some((norm, "beta")) => format!("{norm}.bias"),
        _ => name.to_owned(),
    })
}

pub(super) fn check_shape(
    name: &str,
    tensor: &Tensor,
    expected: &[usize],
) -> Result<(), EncoderError> {
    if tensor.dims() == expected {
        return Ok(());
    }
    Err(EncoderError::WeightShape {
        name: name.to_owned(),
        found: tensor.dims().to_vec(),
        expected: expected.to_vec(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_checkpoints_are_brought_to_one_form() {
        let query = "encoder.layer.0.attention.self.query.weight";
        for (family, stored, name) in [
            (Family::Bert, format!("bert.{query}"), Some(query)),
            (Family::Bert, query.to_owned(), Some(query)),
            (
                Family::Bert,
                "bert.embeddings.LayerNorm.gamma".into(),
                Some("embeddings.LayerNorm.weight"),
            ),
            (
                Family::Bert,
                "bert.embeddings.LayerNorm.beta".into(),
                Some("embeddings.LayerNorm.bias"),
            ),
            (
                Family::Bert,
                "bert.pooler.dense.bias".into(),
                Some("pooler.dense.bias"),
            ),
            (
                Family::DebertaV2,
                "pooler.dense.bias".into(),
                Some("pooler.dense.bias"),
            ),
            (
                Family::DistilBert,
                "pre_classifier.bias".into(),
                Some("pre_classifier.bias"),
            ),
            // What classification does not use.
            (Family::Mpnet, "pooler.dense.bias".into(), None),
            (Family::Bert, "cls.predictions.bias".into(), None),
            (Family::Roberta, "lm_head.dense.weight".into(), None),
            (
                Family::DebertaV2,
                "lm_predictions.lm_head.bias".into(),
                None,
            ),
            (Family::Bert, "bert.embeddings.position_ids".into(), None),
        ] {
            assert_eq!(name_here(family, &stored).as_deref(), name, "{stored}");
        }
    }
}
