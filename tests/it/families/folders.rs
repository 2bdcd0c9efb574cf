//! Folders that are written and read again, and adapters folded into their encoders.

use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device};
use kdlora::adapter::{AdapterError, AdapterFolder, Bias, Classifier, write_classifier};
use kdlora::encoder::{Encoder, EncoderConfig, LoraModule, Placement, Weights};

use crate::families::cases::{Case, assert_close};

pub(crate) fn an_adapter_answers_the_same_after_a_round(model_type: &str) {
    let place = tempfile::tempdir().unwrap();
    for case in Case::of(model_type) {
        let Some(adapter) = case.adapter() else {
            continue;
        };
        let encoder = Arc::new(Encoder::load(&case.model_folder(), &Device::Cpu).unwrap());
        let mut written = vec![adapter.clone()];
        if adapter.config.bias == Bias::None && !case.name.ends_with("-saved") {
            written.push(from_trained(&encoder, &adapter));
        }
        for (i, folder) in written.iter().enumerate() {
            let dir = place.path().join(format!("{}-{i}", case.name));
            folder.write(&dir).unwrap();
            let read = AdapterFolder::read(&dir).unwrap();
            let classifier = Classifier::from_adapter(encoder.clone(), &read).unwrap();
            assert_golden(&classifier, &case);
        }
    }
}

/// The folder that training would write if it had come to these weights.
fn from_trained(encoder: &Encoder, adapter: &AdapterFolder) -> AdapterFolder {
    let family = encoder.config().family;
    let part = |module: &str, end: &str| adapter.tensors.get(&format!("{module}.{end}")).cloned();
    let modules: Vec<LoraModule> = adapter
        .tensors
        .keys()
        .filter_map(|name| name.strip_suffix(".lora_A.weight"))
        .map(|module| LoraModule {
            name: family.short_name(module).unwrap().to_owned(),
            a: part(module, "lora_A.weight").unwrap(),
            b: part(module, "lora_B.weight").unwrap(),
            scale: adapter.config.scale(module),
            magnitude: part(module, "lora_magnitude_vector"),
            bias: None,
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
    let (config, task) = (adapter.config.clone(), adapter.task.clone());
    AdapterFolder::from_weights(encoder, config, task, &modules, &head.collect()).unwrap()
}

pub(crate) fn a_merged_adapter_is_a_classifier_of_its_own(model_type: &str) {
    let place = tempfile::tempdir().unwrap();
    for case in Case::of(model_type) {
        let source = case.model_folder();
        let Some(adapter) = case.adapter() else {
            let family = EncoderConfig::read(&source).unwrap().family;
            let weights = Weights::read(&source, family, &Device::Cpu).unwrap();
            assert_written(&case, &weights, &place.path().join(&case.name));
            continue;
        };
        let encoder = Encoder::load(&source, &Device::Cpu).unwrap();
        assert_golden(&Classifier::merged(&encoder, &adapter).unwrap(), &case);
        let merged = adapter.merge(&encoder).unwrap();
        assert_written(&case, &merged, &place.path().join(&case.name));
    }
}

/// What is written as a plain folder answers like the case.
fn assert_written(case: &Case, weights: &Weights, dir: &Path) {
    let mut task = case.classifier().task;
    task.max_length = 33;
    write_classifier(dir, &case.model_folder(), &task, weights, DType::F32).unwrap();
    let classifier = Classifier::load(dir, &Placement::default()).unwrap();
    assert_eq!(classifier.task, task);
    assert_eq!(classifier.max_length(), 33);
    assert_golden(&classifier, case);
}

fn assert_golden(classifier: &Classifier, case: &Case) {
    let rows = classifier.logits(&case.batch()).unwrap();
    for (row, golden) in rows.iter().zip(&case.sequences) {
        assert_close(row, &golden.logits, 1e-4, &case.name);
    }
}

#[test]
fn what_is_more_than_linears_is_only_merged() {
    for (name, tensor) in [
        ("bert-pairs-saved", "bert.embeddings.LayerNorm.bias"),
        ("roberta-classes-bias", "roberta.embeddings.LayerNorm.bias"),
    ] {
        let case = Case::named(name);
        let encoder = Encoder::load(&case.model_folder(), &Device::Cpu).unwrap();
        match case.adapter().unwrap().bind(&encoder) {
            Err(AdapterError::OnlyMerged(found)) => assert_eq!(found, tensor),
            other => panic!("{name}: {:?}", other.map(|_| "bound")),
        }
    }
}

#[test]
fn a_merged_encoder_shares_what_the_adapter_leaves_as_it_is() {
    let case = Case::named("bert-pairs-qv");
    let encoder = Encoder::load(&case.model_folder(), &Device::Cpu).unwrap();
    let merged = Classifier::merged(&encoder, &case.adapter().unwrap()).unwrap();
    let word = "embeddings.word_embeddings.weight";
    let of = |encoder: &Encoder| encoder.weights().find(word).unwrap().id();
    assert_eq!(of(&encoder), of(&merged.encoder));
}
