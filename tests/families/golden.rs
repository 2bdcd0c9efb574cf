//! Logits and gradients against `transformers` and `peft`: see `tests/golden/make_golden.py`.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use candle_core::{D, DType, Device, Tensor, Var};
use kdlora::adapter::{AdapterFolder, Classifier, write_classifier};
use kdlora::encoder::{Encoder, EncoderConfig, LoraModule, Segment, TaskWeights, Weights};
use kdlora::text::{PackedBatch, Sequence};
use serde::Deserialize;

#[derive(Deserialize)]
struct Case {
    name: String,
    model: String,
    adapter: Option<String>,
    sequences: Vec<GoldenSequence>,
}

#[derive(Deserialize)]
struct GoldenSequence {
    ids: Vec<u32>,
    type_ids: Vec<u32>,
    logits: Vec<f32>,
    padded_logits: Vec<f32>,
}

impl Case {
    fn all() -> Vec<Self> {
        let text = std::fs::read_to_string(folder("cases.json")).unwrap();
        let cases: Vec<Self> = serde_json::from_str(&text).unwrap();
        assert!(cases.len() >= 10);
        cases
    }

    fn named(name: &str) -> Self {
        Self::all()
            .into_iter()
            .find(|case| case.name == name)
            .unwrap()
    }

    fn model_folder(&self) -> PathBuf {
        folder("models").join(&self.model)
    }

    fn adapter(&self) -> Option<AdapterFolder> {
        let dir = folder("adapters").join(self.adapter.as_ref()?);
        Some(AdapterFolder::read(&dir).unwrap())
    }

    fn classifier(&self) -> Classifier {
        let dir = self.model_folder();
        match self.adapter() {
            None => Classifier::load(&dir, &Device::Cpu).unwrap(),
            Some(adapter) => {
                let encoder = Encoder::load(&dir, &Device::Cpu).unwrap();
                Classifier::from_adapter(Arc::new(encoder), &adapter).unwrap()
            }
        }
    }

    fn sequences(&self) -> Vec<Sequence> {
        self.sequences
            .iter()
            .map(|golden| Sequence {
                ids: golden.ids.clone(),
                type_ids: golden.type_ids.clone(),
                truncated: false,
            })
            .collect()
    }

    fn batch(&self) -> PackedBatch {
        PackedBatch::new(&self.sequences())
    }

    /// The batch of a golden training step: all but the last sequence.
    fn training_batch(&self) -> PackedBatch {
        let mut sequences = self.sequences();
        sequences.pop();
        PackedBatch::new(&sequences)
    }
}

fn folder(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(name)
}

fn assert_close(found: &[f32], expected: &[f32], tolerance: f32, what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (found, expected) in found.iter().zip(expected) {
        let difference = (found - expected).abs();
        assert!(
            difference <= tolerance,
            "{what}: {found}, expected {expected}"
        );
    }
}

#[test]
fn logits_are_those_of_transformers_and_peft() {
    for case in Case::all() {
        let classifier = case.classifier();
        for (i, (sequence, golden)) in case.sequences().iter().zip(&case.sequences).enumerate() {
            let rows = classifier.logits(&PackedBatch::new([sequence])).unwrap();
            let what = format!(
                "{}, sequence {i} of {} tokens",
                case.name,
                sequence.ids.len()
            );
            assert_close(&rows[0], &golden.logits, 1e-4, &what);
            assert_close(&rows[0], &golden.padded_logits, 1e-4, &what);
        }
    }
}

#[test]
fn a_packed_batch_answers_as_its_sequences_one_by_one() {
    for case in Case::all() {
        let classifier = case.classifier();
        let packed = classifier.logits(&case.batch()).unwrap();
        for (sequence, row) in case.sequences().iter().zip(&packed) {
            let alone = classifier.logits(&PackedBatch::new([sequence])).unwrap();
            assert_close(row, &alone[0], 1e-5, &case.name);
        }
    }
}

#[test]
fn tasks_in_one_batch_do_not_touch_each_other() {
    let first = Case::named("bert-pairs-qv");
    let second = Case::named("bert-pairs-pooler");
    let encoder = Encoder::load(&first.model_folder(), &Device::Cpu).unwrap();
    let first_weights = first.adapter().unwrap().bind(&encoder).unwrap();
    let second_weights = second.adapter().unwrap().bind(&encoder).unwrap();
    let count = first.sequences.len();
    let sequences = [first.sequences(), second.sequences(), first.sequences()].concat();
    let segment = |part: usize, weights| Segment {
        sequences: part * count..(part + 1) * count,
        weights,
    };
    let segments = [
        segment(0, &first_weights),
        segment(1, &second_weights),
        segment(2, &first_weights),
    ];
    let rows = encoder
        .logits(&PackedBatch::new(&sequences), &segments)
        .unwrap();
    let golden = [&first, &second, &first];
    let golden = golden.iter().flat_map(|case| &case.sequences);
    for (row, golden) in rows.iter().zip(golden) {
        assert_close(row, &golden.logits, 1e-4, "mixed batch");
    }
}

/// Targets and, under `LOSS/`, the loss and its gradients, as `make_golden.py` stores them.
struct Step {
    tensors: BTreeMap<String, Tensor>,
    device: Device,
}

const TEMPERATURE: f64 = 2.0;

impl Step {
    fn read(name: &str) -> Self {
        let path = folder("training").join(format!("{name}.safetensors"));
        let device = Device::Cpu;
        let tensors = candle_core::safetensors::load(path, &device).unwrap();
        Self {
            tensors: tensors.into_iter().collect(),
            device,
        }
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

#[test]
fn gradients_of_lora_and_head_are_those_of_torch() {
    for name in [
        "bert-pairs-qv",
        "bert-labels-all",
        "mpnet-classes-qv",
        "roberta-classes-all",
        "distilbert-classes-qv",
        "distilbert-classes-plain",
        "deberta-classes-qv",
        "deberta-conv-all",
        "deberta-value-all",
    ] {
        let case = Case::named(name);
        let step = Step::read(name);
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
            })
        });
        let head = variables.keys().filter(|name| !name.contains(".lora_"));
        let head = head.map(|name| (name.clone(), tensor(name)));
        let weights = TaskWeights::new(&encoder, modules.collect(), head.collect()).unwrap();
        for loss in step.losses() {
            let logits = forward(&encoder, &weights, &case.training_batch());
            step.compare(loss, &logits, &variables, name);
        }
    }
}

#[test]
fn gradients_of_a_whole_model_are_those_of_torch() {
    for name in [
        "bert-pairs",
        "mpnet-value",
        "distilbert-classes",
        "deberta-classes",
        "deberta-value",
    ] {
        let case = Case::named(name);
        let step = Step::read(name);
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
            step.compare(loss, &logits, &variables, name);
        }
    }
}

#[test]
fn a_trained_adapter_answers_the_same_after_a_round_through_its_folder() {
    let place = tempfile::tempdir().unwrap();
    for case in Case::all() {
        let Some(adapter) = case.adapter() else {
            continue;
        };
        let encoder = Encoder::load(&case.model_folder(), &Device::Cpu).unwrap();
        let family = encoder.config().family;
        let modules: Vec<LoraModule> = adapter
            .tensors
            .keys()
            .filter_map(|name| name.strip_suffix(".lora_A.weight"))
            .map(|module| LoraModule {
                name: family.short_name(module).unwrap().to_owned(),
                a: adapter.tensors[&format!("{module}.lora_A.weight")].clone(),
                b: adapter.tensors[&format!("{module}.lora_B.weight")].clone(),
                scale: adapter.config.scale(module),
            })
            .collect();
        let head = adapter
            .tensors
            .iter()
            .filter(|(name, _)| !name.contains(".lora_"));
        let head = head.map(|(name, tensor)| {
            let name = family.short_name(name).unwrap_or(name);
            (name.to_owned(), tensor.clone())
        });
        let written = AdapterFolder::from_weights(
            &encoder,
            adapter.config.clone(),
            adapter.task.clone(),
            &modules,
            &head.collect(),
        );
        let dir = place.path().join(&case.name);
        written.unwrap().write(&dir).unwrap();
        let read = AdapterFolder::read(&dir).unwrap();
        let classifier = Classifier::from_adapter(Arc::new(encoder), &read).unwrap();
        let rows = classifier.logits(&case.batch()).unwrap();
        for (row, golden) in rows.iter().zip(&case.sequences) {
            assert_close(row, &golden.logits, 1e-4, &case.name);
        }
    }
}

#[test]
fn a_fine_tuned_classifier_answers_the_same_after_a_round_through_its_folder() {
    let place = tempfile::tempdir().unwrap();
    for case in Case::all().iter().filter(|case| case.adapter.is_none()) {
        let source = case.model_folder();
        let family = EncoderConfig::read(&source).unwrap().family;
        let weights = Weights::read(&source, family, &Device::Cpu).unwrap();
        let mut task = Classifier::load(&source, &Device::Cpu).unwrap().task;
        task.max_length = 33;
        let dir = place.path().join(&case.name);
        write_classifier(&dir, &source, &task, &weights).unwrap();
        let classifier = Classifier::load(&dir, &Device::Cpu).unwrap();
        assert_eq!(classifier.task, task);
        assert_eq!(classifier.max_length(), 33);
        let rows = classifier.logits(&case.batch()).unwrap();
        for (row, golden) in rows.iter().zip(&case.sequences) {
            assert_close(row, &golden.logits, 1e-4, &case.name);
        }
    }
}

/// The message of binding a golden adapter after a change.
fn refused(name: &str, change: impl FnOnce(&mut AdapterFolder)) -> String {
    let case = Case::named(name);
    let encoder = Encoder::load(&case.model_folder(), &Device::Cpu).unwrap();
    let mut adapter = case.adapter().unwrap();
    change(&mut adapter);
    adapter.bind(&encoder).unwrap_err().to_string()
}

#[test]
fn an_adapter_that_does_not_fit_its_encoder_is_refused_with_the_reason() {
    let missing = refused("bert-pairs-qv", |adapter| {
        adapter
            .tensors
            .retain(|name, _| !name.contains("layer.1.attention.self.value"));
    });
    assert!(
        missing.contains("encoder.layer.1.attention.self.value"),
        "{missing}"
    );

    let shape = refused("bert-pairs-qv", |adapter| {
        let name = "bert.encoder.layer.0.attention.self.query.lora_A.weight";
        let narrow = adapter.tensors[name].narrow(1, 0, 16).unwrap();
        adapter.tensors.insert(name.to_owned(), narrow);
    });
    assert!(shape.contains("layer.0.attention.self.query"), "{shape}");

    let labels = refused("bert-pairs-qv", |adapter| {
        adapter.task.labels.push("more".to_owned())
    });
    assert!(
        labels.contains("2 outputs") && labels.contains("3 labels"),
        "{labels}"
    );

    let head = refused("bert-pairs-qv", |adapter| {
        adapter.tensors.remove("classifier.bias");
    });
    assert!(head.contains("classifier.bias"), "{head}");

    let case = Case::named("bert-pairs-qv");
    let other = folder("models").join("mpnet-classes");
    let encoder = Encoder::load(&other, &Device::Cpu).unwrap();
    let family = case
        .adapter()
        .unwrap()
        .bind(&encoder)
        .unwrap_err()
        .to_string();
    assert!(family.contains("mpnet"), "{family}");
}
