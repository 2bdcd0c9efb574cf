//! Training of tiny random encoders.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{Device, Tensor};

use super::{Example, Learning, Trainee, train};
use crate::adapter::{Classifier, ProblemType, TaskConfig};
use crate::distill::dataset::Label;
use crate::distill::evaluation::Metric;
use crate::distill::rng::CounterRng;
use crate::distill::spec::{LoraSpec, TrainingSpec};
use crate::encoder::{Encoder, EncoderConfig, Weights};
use crate::text::Sequence;

/// Tiny random encoders, one of each family.
const ENCODERS: [&str; 5] = [
    "bert-pairs",
    "roberta-classes",
    "distilbert-classes",
    "mpnet-value",
    "deberta-conv",
];

fn config(name: &str) -> EncoderConfig {
    EncoderConfig::read(&golden(name)).unwrap()
}

fn golden(name: &str) -> PathBuf {
    let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/models");
    models.join(name)
}

/// The weights of an encoder, without the head of the classifier that its folder holds.
fn weights(name: &str) -> Weights {
    let family = config(name).family;
    let stored = Weights::read(&golden(name), family, &Device::Cpu).unwrap();
    let encoder = stored.encoder(family);
    encoder.map(|(n, t)| (n.clone(), t.clone())).collect()
}

fn lora_trainee(model: &str) -> Trainee {
    let encoder = Arc::new(Encoder::new(config(model), &weights(model)).unwrap());
    let lora = LoraSpec {
        r: 2,
        targets: vec!["all-linear".into()],
        ..LoraSpec::default()
    };
    Trainee::lora(encoder, &lora, 2, 7).unwrap()
}

/// Sequences whose class is whether token 5 stands in them.
fn examples(count: u64) -> Vec<Example> {
    (0..count)
        .map(|i| {
            let rng = CounterRng::new(11, i);
            let length = 4 + rng.below_at(0, 8);
            let mut ids: Vec<u32> = (1..=length as u64)
                .map(|j| 6 + rng.below_at(j, 20) as u32)
                .collect();
            ids[0] = 2;
            let class = i as usize % 2;
            if class == 1 {
                ids[1 + rng.below_at(99, length - 1)] = 5;
            }
            Example {
                sequence: Sequence {
                    type_ids: vec![0; ids.len()],
                    ids,
                    truncated: false,
                },
                label: Some(Label::Class(class)),
                teacher: Some(if class == 1 {
                    vec![-2.0, 2.0]
                } else {
                    vec![2.0, -2.0]
                }),
            }
        })
        .collect()
}

fn spec(epochs: usize) -> TrainingSpec {
    TrainingSpec {
        epochs,
        batch_size: 8,
        learning_rate: 1e-2,
        ..TrainingSpec::default()
    }
}

fn run(
    trainee: &Trainee,
    spec: &TrainingSpec,
    threads: usize,
) -> (BTreeMap<String, Tensor>, Option<f64>) {
    let names = ["no".to_owned(), "yes".to_owned()];
    let learning = Learning {
        spec,
        dropout: 0.1,
        problem_type: ProblemType::SingleLabelClassification,
        metric: Metric::Accuracy,
        label_names: &names,
        class_weights: None,
        threads,
    };
    let data = examples(96);
    let (best, summary) = train(trainee, &data[..64], &data[64..], &learning, &mut |_| {}).unwrap();
    let score = summary.history[summary.best_epoch - 1].validation_score;
    (best, score)
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn every_variable_moves_within_two_steps() {
    // B begins at zero, so that A has no gradient in the first step.
    for model in ENCODERS {
        let full = Trainee::full(config(model), &weights(model), 2, 7).unwrap();
        for trainee in [lora_trainee(model), full] {
            let before = trainee.snapshot().unwrap();
            let one_epoch = TrainingSpec {
                batch_size: 32,
                ..spec(1)
            };
            run(&trainee, &one_epoch, 1);
            for (name, variable) in trainee.variables() {
                assert_ne!(
                    values(variable.as_tensor()),
                    values(&before[name]),
                    "{model}: {name} did not move"
                );
            }
        }
    }
}

#[test]
fn the_frozen_encoder_stays_as_it_is() {
    let weights = weights("bert-pairs");
    let before: Vec<Vec<f32>> = weights.iter().map(|(_, tensor)| values(tensor)).collect();
    let encoder = Arc::new(Encoder::new(config("bert-pairs"), &weights).unwrap());
    let trainee = Trainee::lora(encoder, &LoraSpec::default(), 2, 7).unwrap();
    run(&trainee, &spec(1), 1);
    let after: Vec<Vec<f32>> = weights.iter().map(|(_, tensor)| values(tensor)).collect();
    assert_eq!(before, after);
}

#[test]
fn the_same_seed_and_threads_give_the_same_bits() {
    for threads in [1, 3] {
        let mut results = (0..2).map(|_| run(&lora_trainee("bert-pairs"), &spec(2), threads).0);
        let (first, second) = (results.next().unwrap(), results.next().unwrap());
        for (name, tensor) in &first {
            assert_eq!(values(tensor), values(&second[name]), "{name}");
        }
    }
}

#[test]
fn another_number_of_threads_changes_roundings_only() {
    let one = run(&lora_trainee("mpnet-value"), &spec(1), 1).0;
    let three = run(&lora_trainee("mpnet-value"), &spec(1), 3).0;
    for (name, tensor) in &one {
        for (a, b) in values(tensor).iter().zip(values(&three[name])) {
            assert!((a - b).abs() < 2e-3, "{name}: {a} {b}");
        }
    }
}

#[test]
fn a_task_is_learnt() {
    for model in ENCODERS {
        let (_, score) = run(&lora_trainee(model), &spec(40), 2);
        assert!(score.unwrap() > 0.9, "{model}: {score:?}");
    }
}

#[test]
fn a_target_that_no_linear_has_is_refused_with_the_names_there_are() {
    let encoder = Arc::new(Encoder::new(config("bert-pairs"), &weights("bert-pairs")).unwrap());
    let lora = LoraSpec {
        targets: vec!["q_proj".into()],
        ..LoraSpec::default()
    };
    let error = Trainee::lora(encoder, &lora, 2, 7)
        .err()
        .unwrap()
        .to_string();
    assert!(
        error.contains("q_proj") && error.contains("query"),
        "{error}"
    );
}

#[test]
fn query_and_value_are_understood_in_every_family() {
    for model in ENCODERS {
        let encoder = Arc::new(Encoder::new(config(model), &weights(model)).unwrap());
        let trainee = Trainee::lora(encoder, &LoraSpec::default(), 2, 7).unwrap();
        let lora = trainee
            .variables()
            .keys()
            .filter(|name| name.ends_with("lora_B.weight"));
        let layers = config(model).num_hidden_layers;
        assert_eq!(lora.count(), 2 * layers, "{model}: query and value");
    }
}

#[test]
fn the_adapter_that_is_written_answers_like_the_trained_network() {
    for model in ENCODERS {
        let trainee = lora_trainee(model);
        let (best, _) = run(&trainee, &spec(2), 1);
        let task = TaskConfig {
            labels: vec!["no".into(), "yes".into()],
            problem_type: ProblemType::SingleLabelClassification,
            max_length: 16,
            truncation: crate::text::Truncation::LongestFirst,
            temperature: 1.0,
            base_model: Some("tiny".into()),
        };
        let place = tempfile::tempdir().unwrap();
        let dir = place.path().join("adapter");
        trainee
            .adapter(&best, task)
            .unwrap()
            .unwrap()
            .write(&dir)
            .unwrap();
        let read = crate::adapter::AdapterFolder::read(&dir).unwrap();

        let (encoder, weights) = trainee.network_of(best).unwrap();
        let classifier = Classifier::from_adapter(encoder.clone(), &read).unwrap();
        let data = examples(5);
        let sequences: Vec<&Sequence> = data.iter().map(|e| &e.sequence).collect();
        let trained = super::predict(&encoder, &weights, &sequences, 1, &|_, _| {}).unwrap();
        let served =
            super::predict(&encoder, &classifier.weights, &sequences, 1, &|_, _| {}).unwrap();
        assert_eq!(trained, served, "{model}");
    }
}
