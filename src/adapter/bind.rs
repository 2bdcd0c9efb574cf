//! Adapters and encoders: whose weight goes where.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};

use super::folder::Parts;
use super::tensor_names::{LORA_A, LORA_B, MAGNITUDE};
use super::{AdapterConfig, AdapterError, AdapterFolder, TaskConfig};
use crate::encoder::{Encoder, Family, HeadNames, LinearSpec, LoraModule, TaskWeights};

/// Name of PEFT's `modules_to_save` for BERT's pooler.
const POOLER: &str = "pooler";

impl AdapterConfig {
    /// The linears of an encoder that carry LoRA, in the network's order.
    pub fn target_linears<'a>(&self, encoder: &'a Encoder) -> Vec<&'a LinearSpec> {
        let family = encoder.config().family;
        let targeted = |spec: &&LinearSpec| self.targets(&family.full_name(&spec.name));
        encoder.linears().iter().filter(targeted).collect()
    }
}

impl AdapterFolder {
    /// Resolves the adapter to the places of an encoder, on the encoder's device.
    ///
    /// # Errors
    /// A module of another family, a linear that the encoder lacks, a linear that
    /// `target_modules` names and that has no weights, a shape that does not fit, a head without
    /// one output a label; [`AdapterError::OnlyMerged`] for one that changes more than linears.
    pub fn bind(&self, encoder: &Encoder) -> Result<TaskWeights, AdapterError> {
        let parts = self.fitting(encoder)?;
        let family = encoder.config().family;
        let on_device = |tensor: &Tensor| tensor.to_device(encoder.device());
        let mut modules = Vec::with_capacity(parts.lora.len());
        for (name, adapted) in &parts.lora {
            modules.push(LoraModule {
                name: short_name(family, name)?.to_owned(),
                a: on_device(adapted.a)?,
                b: on_device(adapted.b)?,
                scale: self.config.scale(name),
                magnitude: adapted.magnitude.map(on_device).transpose()?,
                bias: adapted.bias.map(on_device).transpose()?,
            });
        }
        let names = HeadNames::of(family);
        let mut head = BTreeMap::new();
        for (name, tensor) in &parts.replaced {
            let short = short_name(family, name)?;
            let module = short.rsplit_once('.').map_or(short, |(module, _)| module);
            if !family.is_head(short) && module != names.dense {
                return Err(AdapterError::OnlyMerged((*name).to_owned()));
            }
            head.insert(short.to_owned(), on_device(tensor)?);
        }
        complete_dense(&names, encoder, &mut head);
        let weights = TaskWeights::new(encoder, modules, head)?;
        check_labels(&self.task, &weights)?;
        self.config.check_budget()?;
        Ok(weights)
    }

    /// The adapter's parts, checked against the linears that the encoder has.
    pub(super) fn fitting(&self, encoder: &Encoder) -> Result<Parts<'_>, AdapterError> {
        let parts = self.parts()?;
        let family = encoder.config().family;
        for name in parts.lora.keys().chain(parts.replaced.keys()) {
            short_name(family, name)?;
        }
        for spec in self.config.target_linears(encoder) {
            if !parts
                .lora
                .contains_key(family.full_name(&spec.name).as_str())
            {
                return Err(AdapterError::Mismatch(format!(
                    "target_modules names {}, but the file holds no LoRA weights for it; was the \
                     adapter made for another encoder?",
                    spec.name
                )));
            }
        }
        Ok(parts)
    }

    /// A folder of trained weights, copied: training may go on.
    ///
    /// `head` is named as for [`TaskWeights::new`]. `pooler` joins `modules_to_save` where the head
    /// has one. The folder stores a scale only through its configuration, so the modules' scales
    /// must be [`AdapterConfig::scale`].
    pub fn from_weights(
        encoder: &Encoder,
        mut config: AdapterConfig,
        task: TaskConfig,
        modules: &[LoraModule],
        head: &BTreeMap<String, Tensor>,
    ) -> Result<Self, AdapterError> {
        let family = encoder.config().family;
        let mut tensors = BTreeMap::new();
        for module in modules {
            let name = family.full_name(&module.name);
            let scale = config.scale(&name);
            if (scale - module.scale).abs() > 1e-9 * scale {
                return Err(AdapterError::Mismatch(format!(
                    "{name} was trained with the scale {}, its configuration gives {scale}",
                    module.scale
                )));
            }
            tensors.insert(format!("{name}{LORA_A}"), snapshot(&module.a)?);
            tensors.insert(format!("{name}{LORA_B}"), snapshot(&module.b)?);
            if let Some(magnitude) = &module.magnitude {
                tensors.insert(format!("{name}{MAGNITUDE}"), snapshot(magnitude)?);
            }
            if let Some(bias) = &module.bias {
                tensors.insert(format!("{name}.bias"), snapshot(bias)?);
            }
        }
        for (name, tensor) in head {
            tensors.insert(family.full_name(name), snapshot(tensor)?);
        }
        let pooler = head.keys().any(|name| name.starts_with("pooler."));
        if pooler && !config.modules_to_save.iter().any(|saved| saved == POOLER) {
            config.modules_to_save.push(POOLER.to_owned());
        }
        let adapter = Self {
            config,
            task,
            tensors,
        };
        adapter.bind(encoder)?;
        Ok(adapter)
    }
}

/// The name of a module or tensor without the family's prefix.
pub(super) fn short_name(family: Family, name: &str) -> Result<&str, AdapterError> {
    family.short_name(name).ok_or_else(|| {
        let model = family.model_type();
        AdapterError::Mismatch(format!("{name} is not a part of a {model} model"))
    })
}

/// Where an adapter brings only the bias of a head's dense linear, its weight is the encoder's.
fn complete_dense(names: &HeadNames, encoder: &Encoder, head: &mut BTreeMap<String, Tensor>) {
    let parts = ["weight", "bias"].map(|part| format!("{}.{part}", names.dense));
    if names.stands_alone && parts.iter().any(|part| head.contains_key(part)) {
        for part in parts {
            if let Some(tensor) = encoder.weights().find(&part) {
                head.entry(part).or_insert_with(|| tensor.clone());
            }
        }
    }
}

/// One output a label.
pub(super) fn check_labels(task: &TaskConfig, weights: &TaskWeights) -> Result<(), AdapterError> {
    if weights.num_labels() == task.labels.len() {
        return Ok(());
    }
    Err(AdapterError::Mismatch(format!(
        "the head has {} outputs, config.json names {} labels",
        weights.num_labels(),
        task.labels.len()
    )))
}

/// A copy on the CPU that later steps of training do not change.
pub(super) fn snapshot(tensor: &Tensor) -> Result<Tensor, AdapterError> {
    Ok(tensor
        .detach()
        .to_device(&Device::Cpu)?
        .to_dtype(DType::F32)?
        .copy()?)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn an_adapter_without_its_head_is_told_how_peft_stores_one() {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
        for (model, name) in [
            ("bert-pairs", "bert-pairs-qv"),
            ("roberta-classes", "roberta-classes-all"),
            ("distilbert-classes", "distilbert-classes-qv"),
            ("deberta-classes", "deberta-classes-qv"),
        ] {
            let encoder = Encoder::load(&golden.join("models").join(model), &Device::Cpu).unwrap();
            let mut adapter = AdapterFolder::read(&golden.join("adapters").join(name)).unwrap();
            adapter
                .tensors
                .retain(|name, _| !name.starts_with("classifier"));
            let error = adapter.bind(&encoder).unwrap_err().to_string();
            assert!(
                error.contains("head is missing") && error.contains("modules_to_save"),
                "{name}: {error}"
            );
        }
    }
}
