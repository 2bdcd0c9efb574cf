//! Training of tiny random encoders.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{Device, Tensor};

use super::{Example, Learning, Trainee, train};
use crate::adapter::{Classifier, ProblemType, TaskConfig};
use crate::distill::dataset::Label;
use crate::distill::rng::CounterRng;
use crate::distill::spec::{LoraSpec, TrainingSpec};
use crate::encoder::{Encoder, EncoderConfig, Family, Weights};
use crate::text::Sequence;

const FAMILIES: [Family; 4] = [
    Family::Bert,
    Family::Roberta,
    Family::DistilBert,
    Family::Mpnet,
];

fn config(family: Family) -> EncoderConfig {
    EncoderConfig {
        family,
        vocab_size: 30,
        hidden_size: 12,
        num_hidden_layers: 2,
        num_attention_heads: 3,
        intermediate_size: 20,
        max_position_embeddings: 20,
        type_vocab_size: match family {
            Family::Bert | Family::Roberta => 2,
            Family::DistilBert | Family::Mpnet => 0,
        },
        padding_idx: match family {
            Family::Bert | Family::DistilBert => None,
            Family::Roberta | Family::Mpnet => Some(1),
        },
        layer_norm_eps: 1e-12,
        relative_attention_num_buckets: if family == Family::Mpnet { 8 } else { 0 },
    }
}

/// Random weights of a tiny encoder.
fn weights(family: Family) -> Weights {
    let (hidden, wide) = (12, 20);
    let mut shapes: Vec<(String, Vec<usize>)> = vec![
        ("embeddings.word_embeddings.weight".into(), vec![30, hidden]),
        (
            "embeddings.position_embeddings.weight".into(),
            vec![20, hidden],
        ),
    ];
    let mut module = |name: String, shape: Vec<usize>| {
        let bias = vec![shape[0]];
        shapes.push((format!("{name}.weight"), shape));
        shapes.push((format!("{name}.bias"), bias));
    };
    module("embeddings.LayerNorm".into(), vec![hidden]);
    let (layers, attention, others) = match family {
        Family::Bert | Family::Roberta => (
            "encoder.layer",
            ["self.query", "self.key", "self.value", "output.dense"],
            [
                "attention.output.LayerNorm",
                "intermediate.dense",
                "output.dense",
                "output.LayerNorm",
            ],
        ),
        Family::DistilBert => (
            "transformer.layer",
            ["q_lin", "k_lin", "v_lin", "out_lin"],
            ["sa_layer_norm", "ffn.lin1", "ffn.lin2", "output_layer_norm"],
        ),
        Family::Mpnet => (
            "encoder.layer",
            ["attn.q", "attn.k", "attn.v", "attn.o"],
            [
                "attention.LayerNorm",
                "intermediate.dense",
                "output.dense",
                "output.LayerNorm",
            ],
        ),
    };
    for layer in 0..2 {
        for linear in attention {
            module(
                format!("{layers}.{layer}.attention.{linear}"),
                vec![hidden, hidden],
            );
        }
        let [norm, up, down, last_norm] = others.map(|name| format!("{layers}.{layer}.{name}"));
        module(norm, vec![hidden]);
        module(up, vec![wide, hidden]);
        module(down, vec![hidden, wide]);
        module(last_norm, vec![hidden]);
    }
    if family == Family::Bert {
        module("pooler.dense".into(), vec![hidden, hidden]);
    }
    if matches!(family, Family::Bert | Family::Roberta) {
        let name = "embeddings.token_type_embeddings.weight".into();
        shapes.push((name, vec![2, hidden]));
    }
    if family == Family::Mpnet {
        shapes.push(("encoder.relative_attention_bias.weight".into(), vec![8, 3]));
    }
    shapes
        .into_iter()
        .enumerate()
        .map(|(stream, (name, shape))| {
            let rng = CounterRng::new(3, stream as u64);
            let count = shape.iter().product::<usize>() as u64;
            let around = if name.to_lowercase().ends_with("norm.weight") {
                1.0
            } else {
                0.0
            };
            let values: Vec<f32> = (0..count)
                .map(|i| around + 0.3 * rng.normal_at(i))
                .collect();
            (name, Tensor::from_vec(values, shape, &Device::Cpu).unwrap())
        })
        .collect()
}

fn lora_trainee(family: Family) -> Trainee {
    let encoder = Arc::new(Encoder::new(config(family), &weights(family)).unwrap());
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
        label_names: &names,
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
    for family in FAMILIES {
        let full = Trainee::full(config(family), &weights(family), 2, 7).unwrap();
        for trainee in [lora_trainee(family), full] {
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
                    "{family:?}: {name} did not move"
                );
            }
        }
    }
}

#[test]
fn the_frozen_encoder_stays_as_it_is() {
    let weights = weights(Family::Bert);
    let before: Vec<Vec<f32>> = weights.iter().map(|(_, tensor)| values(tensor)).collect();
    let encoder = Arc::new(Encoder::new(config(Family::Bert), &weights).unwrap());
    let trainee = Trainee::lora(encoder, &LoraSpec::default(), 2, 7).unwrap();
    run(&trainee, &spec(1), 1);
    let after: Vec<Vec<f32>> = weights.iter().map(|(_, tensor)| values(tensor)).collect();
    assert_eq!(before, after);
}

#[test]
fn the_same_seed_and_threads_give_the_same_bits() {
    for threads in [1, 3] {
        let mut results = (0..2).map(|_| run(&lora_trainee(Family::Bert), &spec(2), threads).0);
        let (first, second) = (results.next().unwrap(), results.next().unwrap());
        for (name, tensor) in &first {
            assert_eq!(values(tensor), values(&second[name]), "{name}");
        }
    }
}

#[test]
fn another_number_of_threads_changes_roundings_only() {
    let one = run(&lora_trainee(Family::Mpnet), &spec(1), 1).0;
    let three = run(&lora_trainee(Family::Mpnet), &spec(1), 3).0;
    for (name, tensor) in &one {
        for (a, b) in values(tensor).iter().zip(values(&three[name])) {
            assert!((a - b).abs() < 2e-3, "{name}: {a} {b}");
        }
    }
}

#[test]
fn a_task_is_learnt() {
    for family in FAMILIES {
        let (_, score) = run(&lora_trainee(family), &spec(25), 2);
        assert!(score.unwrap() > 0.9, "{family:?}: {score:?}");
    }
}

#[test]
fn a_target_that_no_linear_has_is_refused_with_the_names_there_are() {
    let encoder = Arc::new(Encoder::new(config(Family::Bert), &weights(Family::Bert)).unwrap());
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
    for family in FAMILIES {
        let encoder = Arc::new(Encoder::new(config(family), &weights(family)).unwrap());
        let trainee = Trainee::lora(encoder, &LoraSpec::default(), 2, 7).unwrap();
        let lora = trainee
            .variables()
            .keys()
            .filter(|name| name.ends_with("lora_B.weight"));
        assert_eq!(lora.count(), 4, "{family:?}: two layers of query and value");
    }
}

#[test]
fn the_adapter_that_is_written_answers_like_the_trained_network() {
    for family in FAMILIES {
        let trainee = lora_trainee(family);
        let (best, _) = run(&trainee, &spec(2), 1);
        let task = TaskConfig {
            labels: vec!["no".into(), "yes".into()],
            problem_type: ProblemType::SingleLabelClassification,
            max_length: 16,
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
        assert_eq!(trained, served, "{family:?}");
    }
}
