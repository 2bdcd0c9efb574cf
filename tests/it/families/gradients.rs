//! Losses and gradients of one training step beside those of `torch`.

use std::collections::BTreeMap;

use candle_core::{D, DType, Device, Tensor, Var};
use kdlora::encoder::{Encoder, EncoderConfig, LoraModule, Segment, TaskWeights, Weights};
use kdlora::text::PackedBatch;

use crate::common::golden;
use crate::families::cases::{Case, assert_close};

pub(crate) fn gradients_are_the_golden_ones(model_type: &str) {
    let mut compared = 0;
    for case in Case::of(model_type) {
        let Some(step) = Step::read(&case.name) else {
            continue;
        };
        compared += 1;
        match case.adapter {
            Some(_) => of_lora_and_head(&case, &step),
            None => of_a_whole_model(&case, &step),
        }
    }
    assert!(compared > 0, "no golden gradients of {model_type}");
}

fn of_lora_and_head(case: &Case, step: &Step) {
    let adapter = case.adapter().unwrap();
    let encoder = Encoder::load(&case.model_folder(), &Device::Cpu).unwrap();
    let family = encoder.config().family;
    let variables: BTreeMap<String, Var> = adapter
        .tensors
        .iter()
        .map(|(name, tensor)| (name.clone(), step.variable(tensor)))
        .collect();
    let tensor = |name: &str| variables[name].as_tensor().clone();
    let modules = adapter.tensors.keys().filter_map(|name| {
        let module = name.strip_suffix(".lora_A.weight")?;
        Some(LoraModule {
            name: family.short_name(module).unwrap().to_owned(),
            a: tensor(name),
            b: tensor(&format!("{module}.lora_B.weight")),
            scale: adapter.config.scale(module),
            magnitude: variables
                .get(&format!("{module}.lora_magnitude_vector"))
                .map(|variable| variable.as_tensor().clone()),
            bias: None,
        })
    });
    let head = variables.keys().filter(|name| !name.contains(".lora_"));
    let head = head.map(|name| (name.clone(), tensor(name)));
    let weights = TaskWeights::new(&encoder, modules.collect(), head.collect()).unwrap();
    for loss in step.losses() {
        let logits = forward(&encoder, &weights, &case.training_batch());
        step.compare(loss, &logits, &variables, &case.name);
    }
}

fn of_a_whole_model(case: &Case, step: &Step) {
    let config = EncoderConfig::read(&case.model_folder()).unwrap();
    let family = config.family;
    let stored = Weights::read(&case.model_folder(), family, &Device::Cpu).unwrap();
    let mut variables = BTreeMap::new();
    let mut weights = Vec::new();
    for (name, tensor) in stored.encoder(family) {
        let variable = step.variable(tensor);
        weights.push((name.clone(), variable.as_tensor().clone()));
        variables.insert(family.full_name(name), variable);
    }
    for (name, tensor) in stored.head(family) {
        let variable = step.variable(&tensor);
        weights.push((name.clone(), variable.as_tensor().clone()));
        variables.insert(name, variable);
    }
    let weights: Weights = weights.into_iter().collect();
    let encoder = Encoder::new(config, &weights).unwrap();
    let head = TaskWeights::new(&encoder, Vec::new(), weights.head(family)).unwrap();
    for loss in step.losses() {
        let logits = forward(&encoder, &head, &case.training_batch());
        step.compare(loss, &logits, &variables, &case.name);
    }
}

/// Targets and, under `LOSS/`, the loss and its gradients, as `make_golden.py` stores them.
struct Step {
    tensors: BTreeMap<String, Tensor>,
    device: Device,
}

const TEMPERATURE: f64 = 2.0;

impl Step {
    /// `None` where there is no step of that name.
    fn read(name: &str) -> Option<Self> {
        let path = golden(&format!("training/{name}.safetensors"));
        if !path.exists() {
            return None;
        }
        let device = Device::Cpu;
        let tensors = candle_core::safetensors::load(path, &device).unwrap();
        Some(Self {
            tensors: tensors.into_iter().collect(),
            device,
        })
    }

    fn losses(&self) -> Vec<&str> {
        let losses = self.tensors.keys().filter_map(|k| k.strip_suffix("/loss"));
        losses.collect()
    }

    fn loss(&self, name: &str, logits: &Tensor) -> Tensor {
        let teacher = &self.tensors["teacher_logits"];
        let rows = logits.dims()[0] as f64;
        let loss = match name {
            "cross_entropy" => {
                let classes = self.tensors["classes"].to_dtype(DType::U32).unwrap();
                let classes = classes.unsqueeze(1).unwrap();
                let picked = log_softmax(logits).gather(&classes, 1).unwrap();
                picked.mean_all().unwrap().neg()
            }
            "kl" => {
                let student = log_softmax(&(logits / TEMPERATURE).unwrap());
                let teacher = log_softmax(&(teacher / TEMPERATURE).unwrap());
                let terms = (teacher.exp().unwrap() * (teacher - student).unwrap()).unwrap();
                terms.sum_all().unwrap() * (TEMPERATURE * TEMPERATURE / rows)
            }
            "bce" => {
                // log(1 + exp(x)) - x·y: these logits are small, so this form does not overflow.
                let softplus = (logits.exp().unwrap() + 1.0).unwrap().log().unwrap();
                let product = (logits * &self.tensors["labels"]).unwrap();
                (softplus - product).unwrap().mean_all()
            }
            "mse" => (logits - teacher).unwrap().sqr().unwrap().mean_all(),
            other => panic!("no loss named {other}"),
        };
        loss.unwrap()
    }

    /// Compares all that the file holds for a loss; each variable must have a gradient there, and
    /// each gradient there its variable.
    fn compare(&self, name: &str, logits: &Tensor, variables: &BTreeMap<String, Var>, case: &str) {
        let loss = self.loss(name, logits);
        let expected: f32 = self.tensors[&format!("{name}/loss")].to_scalar().unwrap();
        assert_close(&[loss.to_scalar().unwrap()], &[expected], 1e-4, case);
        let gradients = loss.backward().unwrap();
        let prefix = format!("{name}/");
        let stored = self.tensors.iter().filter_map(|(key, tensor)| {
            let name = key.strip_prefix(&prefix).filter(|name| *name != "loss")?;
            let magnitude = name.strip_suffix("lora_magnitude_vector.weight");
            let name = magnitude.map_or(name, |_| name.trim_end_matches(".weight"));
            Some((name, tensor))
        });
        let mut compared = 0;
        for (variable, expected) in stored {
            let what = format!("{case}, {name}: gradient of {variable}");
            let var = variables
                .get(variable)
                .unwrap_or_else(|| panic!("{what}: no variable"));
            let found = gradients.get(var).unwrap_or_else(|| panic!("{what}: none"));
            assert_eq!(found.dims(), expected.dims(), "{what}");
            let flat = |tensor: &Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let expected = flat(expected);
            let greatest = expected.iter().fold(0f32, |top, x| top.max(x.abs()));
            // Keys have a gradient of zero in exact arithmetic for their bias.
            assert_close(&flat(found), &expected, 1e-4 * greatest.max(0.1), &what);
            compared += 1;
        }
        assert_eq!(compared, variables.len(), "{case}, {name}");
        assert!(compared > 4);
    }

    fn variable(&self, tensor: &Tensor) -> Var {
        Var::from_tensor(&tensor.to_device(&self.device).unwrap()).unwrap()
    }
}

fn log_softmax(x: &Tensor) -> Tensor {
    let top = x.max_keepdim(D::Minus1).unwrap().detach();
    let shifted = x.broadcast_sub(&top).unwrap();
    let sum = shifted.exp().unwrap().sum_keepdim(D::Minus1).unwrap();
    shifted.broadcast_sub(&sum.log().unwrap()).unwrap()
}

fn forward(encoder: &Encoder, weights: &TaskWeights, batch: &PackedBatch) -> Tensor {
    let segment = Segment {
        sequences: 0..batch.sequences(),
        weights,
    };
    let mut logits = encoder.forward(batch, &[segment], None).unwrap();
    logits.pop().unwrap()
}
