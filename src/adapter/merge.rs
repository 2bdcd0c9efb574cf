//! Adapters folded into the weights of their encoder.

use std::collections::BTreeMap;

use candle_core::{DType, Tensor};

use super::bind::short_name;
use super::folder::Adapted;
use super::{AdapterError, AdapterFolder};
use crate::encoder::{Encoder, HeadNames, Weights, dora_gain};

/// Every family's last linear, which an adapter always brings, is this module or in it.
const CLASSIFIER: &str = "classifier.";

impl AdapterFolder {
    /// The encoder's weights with the adapter's part in them, its head included: those of a plain
    /// classifier. What the adapter does not change is shared with the encoder.
    ///
    /// # Errors
    /// As of [`AdapterFolder::bind`], except that an adapter may replace any weight that the
    /// encoder has.
    pub fn merge(&self, encoder: &Encoder) -> Result<Weights, AdapterError> {
        let changed = self.changed_weights(encoder)?;
        Ok(without_classifier(&encoder.all_weights()?).with(changed))
    }

    /// The weights that the adapter changes, as they are with its part in them.
    pub(super) fn changed_weights(
        &self,
        encoder: &Encoder,
    ) -> Result<BTreeMap<String, Tensor>, AdapterError> {
        let parts = self.fitting(encoder)?;
        let family = encoder.config().family;
        let names = HeadNames::of(family);
        let mut changed = BTreeMap::new();
        for (name, adapted) in &parts.lora {
            let short = short_name(family, name)?;
            let spec = encoder.linears().iter().find(|spec| spec.name == short);
            let spec = spec.ok_or_else(|| {
                AdapterError::Mismatch(format!("the encoder has no linear {short}"))
            })?;
            let base = encoder.linear(spec)?;
            let weight = merged_weight(&base.weight, *adapted, self.config.scale(name))
                .map_err(|error| misfit(name, &error))?;
            changed.insert(format!("{short}.weight"), weight);
            if let Some(bias) = adapted.bias {
                let bias = fitting(name, bias, base.bias.as_ref())?;
                changed.insert(format!("{short}.bias"), bias);
            }
        }
        for (name, tensor) in &parts.replaced {
            let short = short_name(family, name)?;
            let module = short.rsplit_once('.').map_or(short, |(module, _)| module);
            let of_head = family.is_head(short) || module == names.dense;
            let tensor = match of_head {
                // Its shape is checked when the classifier is put together.
                true => tensor.to_device(encoder.device())?,
                false => fitting(name, tensor, encoder.weight(short).ok().as_ref())?,
            };
            changed.insert(short.to_owned(), tensor);
        }
        self.config.check_budget()?;
        Ok(changed)
    }
}

/// The weights of a base whose own last linear must not answer under an adapter's name.
pub(super) fn without_classifier(weights: &Weights) -> Weights {
    let kept = weights
        .iter()
        .filter(|(name, _)| !name.starts_with(CLASSIFIER));
    kept.map(|(n, t)| (n.clone(), t.clone())).collect()
}

/// A tensor in the place of one of the encoder's.
fn fitting(name: &str, tensor: &Tensor, old: Option<&Tensor>) -> Result<Tensor, AdapterError> {
    match old {
        Some(old) if old.dims() == tensor.dims() => Ok(tensor.to_device(old.device())?),
        Some(old) => Err(AdapterError::tensor(
            name,
            format!("has the shape {:?}, not {:?}", tensor.dims(), old.dims()),
        )),
        None => Err(AdapterError::Mismatch(format!(
            "the encoder has no weight {name}"
        ))),
    }
}

/// W + s·B A in f32; with magnitudes, each row of it scaled to its own.
fn merged_weight(weight: &Tensor, adapted: Adapted<'_>, scale: f64) -> candle_core::Result<Tensor> {
    let device = weight.device();
    let (a, b) = (adapted.a.to_device(device)?, adapted.b.to_device(device)?);
    let sum = (weight.to_dtype(DType::F32)? + (b.matmul(&a)? * scale)?)?;
    match adapted.magnitude {
        None => Ok(sum),
        Some(magnitude) => {
            let magnitude = magnitude.to_device(device)?;
            let gain = dora_gain(weight, &a, &b, scale, &magnitude)?;
            sum.broadcast_mul(&gain.unsqueeze(1)?)
        }
    }
}

fn misfit(name: &str, error: &candle_core::Error) -> AdapterError {
    AdapterError::Mismatch(format!(
        "the matrices of {name} do not fit the encoder's weight: {error}"
    ))
}
