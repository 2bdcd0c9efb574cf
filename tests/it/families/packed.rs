//! Encoders that are packed for inference.

use std::sync::Arc;

use candle_core::{Device, Var};
use kdlora::adapter::Classifier;
use kdlora::encoder::{Encoder, EncoderConfig, Segment, Weights};
use kdlora::ops::{Crew, Precision, has_bf16};
use kdlora::text::PackedBatch;

use crate::families::cases::{Case, assert_close, relative_error};

/// In f32 the golden logits, in bf16 and eight bits ones near them; hot and merged alike.
pub(crate) fn a_packed_encoder_answers_the_same(model_type: &str) {
    let crew = Crew::start(2).unwrap();
    for case in Case::of(model_type) {
        let Some(adapter) = case.adapter() else {
            continue;
        };
        let plain = Encoder::load(&case.model_folder(), &Device::Cpu).unwrap();
        let parameters = plain.parameters();
        let bf16 = has_bf16().then_some(Precision::Bf16);
        for precision in [Precision::F32, Precision::Int8].into_iter().chain(bf16) {
            let encoder = Encoder::load(&case.model_folder(), &Device::Cpu).unwrap();
            let encoder = Arc::new(encoder.pack(precision).unwrap());
            assert_eq!(encoder.parameters(), parameters);
            let merged = Classifier::merged(&encoder, &adapter).unwrap();
            assert_eq!(merged.encoder.precision(), Some(precision));
            let hot = Classifier::from_adapter(encoder, &adapter).unwrap();
            for classifier in [hot, merged] {
                let rows = crew.lead(|| classifier.logits(&case.batch())).unwrap();
                let what = format!("{} in {precision:?}", case.name);
                match precision {
                    Precision::F32 => {
                        for (row, golden) in rows.iter().zip(&case.sequences) {
                            assert_close(row, &golden.logits, 1e-4, &what);
                        }
                    }
                    Precision::Bf16 | Precision::Int8 => {
                        let error = relative_error(&rows, &case);
                        let bound = match precision {
                            Precision::Bf16 => 0.05,
                            _ => 0.15,
                        };
                        assert!(error < bound, "{what}: off by {error}");
                    }
                }
            }
        }
    }
}

#[test]
fn packing_leaves_each_weight_in_memory_once() {
    let case = Case::named("bert-pairs-qv");
    let encoder = Encoder::load(&case.model_folder(), &Device::Cpu).unwrap();
    let query = "encoder.layer.0.attention.self.query.weight";
    let before = encoder.weights().find(query).unwrap().clone();
    let encoder = encoder.pack(Precision::Int8).unwrap();
    assert!(encoder.weights().find(query).is_none());
    let read = encoder.weight(query).unwrap();
    let difference = (read - before).unwrap().abs().unwrap().max_all().unwrap();
    assert_eq!(difference.to_scalar::<f32>().unwrap(), 0.0);
    assert!(
        encoder
            .weight("encoder.layer.99.output.dense.weight")
            .is_err()
    );
}

#[test]
fn a_merged_packed_encoder_shares_what_the_adapter_leaves_as_it_is() {
    let case = Case::named("bert-pairs-qv");
    let load = || Encoder::load(&case.model_folder(), &Device::Cpu).unwrap();
    let encoder = load().pack(Precision::F32).unwrap();
    let merged = Classifier::merged(&encoder, &case.adapter().unwrap()).unwrap();
    let hidden = encoder.config().hidden_size;
    // Q, K and V of each layer with their biases, and the head: the adapter is one of Q and V.
    let layers = encoder.config().num_hidden_layers;
    let linears = 4 * layers * 3 * hidden * (hidden + 1);
    let beside = merged.encoder.bytes_beside(&encoder);
    let head = 4 * 16 * hidden;
    assert!(
        beside >= linears,
        "{beside} bytes, {linears} of the linears"
    );
    assert!(
        beside <= linears + layers * head,
        "{beside} bytes, {linears} of the linears"
    );
    assert_eq!(encoder.bytes_beside(&encoder), 0);
}

#[test]
fn what_is_packed_is_not_trained() {
    let case = Case::named("bert-pairs-qv");
    let config = EncoderConfig::read(&case.model_folder()).unwrap();
    let weights = Weights::read(&case.model_folder(), config.family, &Device::Cpu).unwrap();
    let query = "encoder.layer.0.attention.self.query.weight";
    let variable = Var::from_tensor(weights.find(query).unwrap()).unwrap();
    let trained = weights.with([(query.to_owned(), variable.as_tensor().clone())]);
    let encoder = Encoder::new(config, &trained).unwrap();
    assert!(encoder.pack(Precision::F32).is_err());

    let encoder = Encoder::load(&case.model_folder(), &Device::Cpu).unwrap();
    let encoder = encoder.pack(Precision::F32).unwrap();
    let mut adapter = case.adapter().unwrap();
    for tensor in adapter.tensors.values_mut() {
        *tensor = Var::from_tensor(tensor).unwrap().as_tensor().clone();
    }
    let weights = adapter.bind(&encoder).unwrap();
    let sequences = case.sequences();
    let batch = PackedBatch::new(&sequences[..1]);
    let segment = Segment {
        sequences: 0..1,
        weights: &weights,
    };
    assert!(encoder.forward(&batch, &[segment], None).is_err());
}
