//! Folders that are written and read again.

use std::sync::Arc;

use candle_core::Device;
use kdlora::adapter::{AdapterFolder, Classifier, write_classifier};
use kdlora::encoder::{Encoder, EncoderConfig, LoraModule, Weights};

use crate::cases::{Case, assert_close};

pub(crate) fn a_trained_adapter_answers_the_same_after_a_round(model_type: &str) {
    let place = tempfile::tempdir().unwrap();
    for case in Case::of(model_type) {
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

pub(crate) fn a_classifier_answers_the_same_after_a_round(model_type: &str) {
    let place = tempfile::tempdir().unwrap();
    for case in Case::of(model_type)
        .iter()
        .filter(|case| case.adapter.is_none())
    {
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
