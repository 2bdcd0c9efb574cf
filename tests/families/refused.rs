//! Adapters that do not fit.

use candle_core::Device;
use kdlora::adapter::AdapterFolder;
use kdlora::encoder::Encoder;

use crate::cases::Case;
use crate::common::golden;

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
