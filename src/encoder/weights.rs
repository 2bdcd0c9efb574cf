//! Named tensors of a model folder.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};

use super::names::is_head;
use super::{EncoderError, Family};
use crate::ops::{Linear, Norm};

/// Tensors by name, in f32, without the family's prefix.
#[derive(Clone, Debug, Default)]
pub struct Weights(BTreeMap<String, Tensor>);

impl Weights {
    /// Reads `model.safetensors` of a folder.
    pub fn read(dir: &Path, family: Family, device: &Device) -> Result<Self, EncoderError> {
        let path = dir.join("model.safetensors");
        if !path.is_file() {
            let pickle = dir.join("pytorch_model.bin");
            if pickle.exists() {
                return Err(EncoderError::Pickle { path: pickle });
            }
            let source = std::io::Error::from(std::io::ErrorKind::NotFound);
            return Err(EncoderError::Read { path, source });
        }
        let prefix = format!("{}.", family.name());
        candle_core::safetensors::load(&path, device)?
            .into_iter()
            .filter(|(name, _)| !name.ends_with("position_ids"))
            .map(|(name, tensor)| {
                let name = name.strip_prefix(&prefix).unwrap_or(&name).to_owned();
                Ok((name, tensor.to_dtype(DType::F32)?))
            })
            .collect()
    }

    pub fn iter(&self) -> impl Iterator<Item = (&String, &Tensor)> {
        self.0.iter()
    }

    pub fn find(&self, name: &str) -> Option<&Tensor> {
        self.0.get(name)
    }

    /// The weights that are not the head's.
    pub fn encoder(&self) -> impl Iterator<Item = (&String, &Tensor)> {
        self.0.iter().filter(|(name, _)| !is_head(name))
    }

    pub fn contains(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    /// The weights of the classification head.
    pub fn head(&self) -> BTreeMap<String, Tensor> {
        let head = |(name, _): &(&String, &Tensor)| is_head(name);
        self.0
            .iter()
            .filter(head)
            .map(|(n, t)| (n.clone(), t.clone()))
            .collect()
    }

    /// Number of weights that are not the head's.
    pub(super) fn encoder_parameters(&self) -> usize {
        self.encoder().map(|(_, tensor)| tensor.elem_count()).sum()
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

impl FromIterator<(String, Tensor)> for Weights {
    fn from_iter<I: IntoIterator<Item = (String, Tensor)>>(iter: I) -> Self {
        Self(iter.into_iter().collect())
    }
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
