//! Adapters that do not fit.

use candle_core::Device;
use kdlora::adapter::{AdapterFolder, Classifier};
use kdlora::encoder::{Encoder, EncoderConfig, Weights};

use crate::common::golden;
use crate::families::cases::Case;

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
    let other = golden("models/mpnet-classes");
    let encoder = Encoder::load(&other, &Device::Cpu).unwrap();
    let family = case
        .adapter()
        .unwrap()
        .bind(&encoder)
        .unwrap_err()
        .to_string();
    assert!(family.contains("mpnet"), "{family}");
}

#[test]
fn a_head_without_its_first_linear_needs_an_encoder_that_has_one() {
    for (name, dense) in [
        ("deberta-classes-qv", "pooler.dense"),
        ("distilbert-classes-qv", "pre_classifier"),
        ("bert-pairs-pooler", "pooler.dense"),
    ] {
        let case = Case::named(name);
        let mut adapter = case.adapter().unwrap();
        adapter.tensors.retain(|name, _| !name.contains(dense));
        let config = EncoderConfig::read(&case.model_folder()).unwrap();
        let stored = Weights::read(&case.model_folder(), config.family, &Device::Cpu).unwrap();
        let whole = Encoder::new(config.clone(), &stored).unwrap();
        adapter.bind(&whole).unwrap();

        let rest = stored.iter().filter(|(name, _)| !name.starts_with(dense));
        let bare: Weights = rest.map(|(n, t)| (n.clone(), t.clone())).collect();
        let bare = Encoder::new(config, &bare).unwrap();
        let error = adapter.bind(&bare).unwrap_err().to_string();
        assert!(error.contains(dense), "{name}: {error}");
        let error = Classifier::merged(&bare, &adapter).err().unwrap();
        assert!(error.to_string().contains(dense), "{name}: {error}");
    }
}

#[test]
fn the_bases_own_head_never_answers_for_an_adapter() {
    for name in ["bert-pairs-qv", "roberta-classes-all", "deberta-c2p-k"] {
        let case = Case::named(name);
        let encoder = Encoder::load(&case.model_folder(), &Device::Cpu).unwrap();
        let mut adapter = case.adapter().unwrap();
        adapter
            .tensors
            .retain(|name, _| !name.starts_with("classifier."));
        let hot = adapter.bind(&encoder).unwrap_err().to_string();
        let merged = Classifier::merged(&encoder, &adapter).err().unwrap();
        for error in [hot, merged.to_string()] {
            assert!(error.contains("classifier"), "{name}: {error}");
        }
    }
}
