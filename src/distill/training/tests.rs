//! Training of tiny random encoders.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use candle_core::{Device, Tensor};

use super::{Checkpoint, Checkpoints, Example, LayerTeacher, Learning, TrainError, Trainee, train};
use crate::adapter::{Classifier, ProblemType, TaskConfig};
use crate::distill::dataset::Label;
use crate::distill::evaluation::Metric;
use crate::distill::models::GpuLimits;
use crate::distill::progress::Step;
use crate::distill::report::TrainingSummary;
use crate::distill::rng::CounterRng;
use crate::distill::spec::{LayerLossSpec, LoraSpec, TrainingSpec};
use crate::encoder::{Encoder, EncoderConfig, Placement, Weights};
use crate::ops::{Precision, has_bf16};
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
    varied_trainee(model, all_linear())
}

fn all_linear() -> LoraSpec {
    LoraSpec {
        r: 2,
        targets: vec!["all-linear".into()],
        ..LoraSpec::default()
    }
}

fn varied_trainee(model: &str, lora: LoraSpec) -> Trainee {
    Trainee::lora(encoder(model), &lora, 2, 7).unwrap()
}

fn encoder(model: &str) -> Arc<Encoder> {
    Arc::new(Encoder::new(config(model), &weights(model)).unwrap())
}

/// LoRA in each of its forms.
fn variants() -> [LoraSpec; 4] {
    [
        all_linear(),
        LoraSpec {
            use_rslora: true,
            ..all_linear()
        },
        LoraSpec {
            use_dora: true,
            ..all_linear()
        },
        LoraSpec {
            freeze_a: true,
            ..all_linear()
        },
    ]
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
                teacher_sequence: None,
            }
            .read_alike()
        })
        .collect()
}

impl Example {
    /// With a teacher that reads the same tokens.
    fn read_alike(mut self) -> Self {
        self.teacher_sequence = Some(self.sequence.clone());
        self
    }
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
    let (best, summary) = run_with(trainee, spec, threads, None, None).unwrap();
    let score = summary.history[summary.best_epoch - 1].validation_score;
    (best, score)
}

fn run_with(
    trainee: &Trainee,
    spec: &TrainingSpec,
    threads: usize,
    layer_teacher: Option<&LayerTeacher>,
    memory_limit: Option<u64>,
) -> Result<(BTreeMap<String, Tensor>, TrainingSummary), TrainError> {
    let names = ["no".to_owned(), "yes".to_owned()];
    let learning = Learning {
        spec,
        dropout: 0.1,
        problem_type: ProblemType::SingleLabelClassification,
        metric: Metric::Accuracy,
        label_names: &names,
        class_weights: None,
        threads,
        gpu: GpuLimits::default(),
        layer_teacher,
        memory_limit,
        checkpoint: None,
    };
    let data = examples(96);
    train(trainee, &data[..64], &data[64..], &learning, &mut |_| {})
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn every_variable_moves_within_two_steps() {
    // B begins at zero, so that A has no gradient in the first step.
    for model in ENCODERS {
        let full = Trainee::full(config(model), &weights(model), 2, 7).unwrap();
        let by_lora = variants().map(|lora| varied_trainee(model, lora));
        for trainee in by_lora.into_iter().chain([full]) {
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
fn an_epoch_goes_over_rows_with_labels_as_often_as_asked_and_over_others_once() {
    let mut data = examples(10);
    for example in &mut data[..6] {
        example.label = None;
    }
    let rows = super::trainer::rows_of_an_epoch(&data, 3);
    let of = |wanted: &Example| rows.iter().filter(|e| std::ptr::eq(**e, wanted)).count();
    let counts: Vec<usize> = data.iter().map(of).collect();
    assert_eq!(counts, [1, 1, 1, 1, 1, 1, 3, 3, 3, 3]);

    let spec = TrainingSpec {
        label_repeats: 3,
        ..spec(2)
    };
    let trained = run_with(&lora_trainee("bert-pairs"), &spec, 2, None, None);
    assert_eq!(trained.unwrap().1.steps, 2 * 3 * 64 / 8);
}

#[test]
fn a_task_is_learnt() {
    for model in ENCODERS {
        // Networks as small and random as these get stuck with one seed or another, and which one it
        // is changes with the rounding of sums: the middle one of three counts.
        let mut scores = [1, 2, 3].map(|seed| {
            let spec = TrainingSpec { seed, ..spec(40) };
            run(&lora_trainee(model), &spec, 2).1.unwrap()
        });
        scores.sort_by(f64::total_cmp);
        assert!(scores[1] > 0.9, "{model}: {scores:?}");
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
    for (model, lora) in ENCODERS
        .iter()
        .flat_map(|m| variants().map(|lora| (*m, lora)))
    {
        let trainee = varied_trainee(model, lora);
        let (best, _) = run(&trainee, &spec(2), 1);
        let place = tempfile::tempdir().unwrap();
        let dir = place.path().join("adapter");
        trainee
            .adapter(&best, task())
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

#[test]
fn gradient_checkpointing_changes_roundings_only() {
    for model in ENCODERS {
        let full = || Trainee::full(config(model), &weights(model), 2, 7).unwrap();
        let makers: [&dyn Fn() -> Trainee; 2] = [&|| lora_trainee(model), &full];
        for make in makers {
            let checkpointing = TrainingSpec {
                gradient_checkpointing: true,
                learning_rate: 1e-3,
                ..spec(1)
            };
            let plain = TrainingSpec {
                gradient_checkpointing: false,
                ..checkpointing.clone()
            };
            let (with, without) = (run(&make(), &checkpointing, 2).0, run(&make(), &plain, 2).0);
            for (name, tensor) in &with {
                for (a, b) in values(tensor).iter().zip(values(&without[name])) {
                    assert!((a - b).abs() < 2e-3, "{model}, {name}: {a} {b}");
                }
            }
        }
    }
}

#[test]
fn a_training_in_bf16_goes_about_the_same_way() {
    let bf16 = Placement::cpu(Precision::Bf16);
    for model in ["bert-pairs", "mpnet-value"] {
        let encoder = encoder(model);
        if !has_bf16() {
            assert!(bf16.for_training(&encoder).is_err());
            continue;
        }
        let narrow = || {
            let encoder = bf16.for_training(&encoder).unwrap();
            Trainee::lora(encoder, &all_linear(), 2, 7).unwrap()
        };
        let spec = spec(2);
        let (rounded, summary) = run_with(&narrow(), &spec, 2, None, None).unwrap();
        let (_, exact) = run_with(&lora_trainee(model), &spec, 2, None, None).unwrap();
        for (rounded, exact) in summary.history.iter().zip(&exact.history) {
            let apart = (rounded.loss - exact.loss).abs();
            assert!(apart > 0.0 && apart < 0.05 * exact.loss, "{model}: {apart}");
        }
        let again = run(&narrow(), &spec, 2).0;
        for (name, tensor) in &rounded {
            assert_eq!(values(tensor), values(&again[name]), "{name}");
        }
    }
}

#[test]
fn a_frozen_a_stays_as_it_was_drawn() {
    let drawn = lora_trainee("bert-pairs").snapshot().unwrap();
    let [.., lora] = variants();
    let trainee = varied_trainee("bert-pairs", lora);
    let (best, _) = run(&trainee, &spec(2), 1);
    let matrices = best.iter().filter(|(name, _)| name.contains(".lora_"));
    let mut frozen = 0;
    for (name, tensor) in matrices {
        let same = values(tensor) == values(&drawn[name]);
        assert_eq!(same, name.contains(".lora_A."), "{name}");
        frozen += usize::from(same);
    }
    assert!(frozen > 0);
    assert!(trainee.trainable() < lora_trainee("bert-pairs").trainable());
}

#[test]
fn the_scale_of_rslora_goes_by_the_root_of_the_rank() {
    let scale = |lora: LoraSpec| {
        let trainee = varied_trainee("bert-pairs", lora);
        let folder = trainee
            .adapter(&trainee.snapshot().unwrap(), task())
            .unwrap();
        folder
            .unwrap()
            .config
            .scale("bert.encoder.layer.0.attention.self.query")
    };
    let [plain, rslora, ..] = variants();
    assert!((scale(plain) - 16.0 / 2.0).abs() < 1e-9);
    assert!((scale(rslora) - 16.0 / 2f64.sqrt()).abs() < 1e-9);
}

fn task() -> TaskConfig {
    TaskConfig {
        labels: vec!["no".into(), "yes".into()],
        problem_type: ProblemType::SingleLabelClassification,
        problem_type_declared: true,
        max_length: 16,
        truncation: crate::text::Truncation::LongestFirst,
        temperature: 1.0,
        base_model: Some("tiny".into()),
        base_digest: None,
    }
}

/// A teacher without LoRA.
fn layer_teacher(model: &str, losses: LayerLossSpec, student: &str) -> LayerTeacher {
    let (encoder, weights) = lora_trainee(model).network().unwrap();
    let depth = config(student).num_hidden_layers;
    LayerTeacher::new(&losses, encoder, weights, depth).unwrap()
}

#[test]
fn hidden_states_are_learnt_through_a_projection_where_sizes_differ() {
    let student = "bert-pairs";
    let teacher = "mpnet-value";
    assert_ne!(config(student).hidden_size, config(teacher).hidden_size);
    for (hidden, cosine) in [(5.0, 0.0), (0.0, 5.0)] {
        let losses = LayerLossSpec {
            hidden,
            cosine,
            map: None,
        };
        let teacher = layer_teacher(teacher, losses, student);
        let trainee = lora_trainee(student);
        let (plain, names) = (trainee.trainable(), trainee.variables().len());
        let trainee = trainee.with_projection(teacher.hidden_size(), 7).unwrap();
        assert_eq!(trainee.variables().len(), names + 1);
        assert_eq!(trainee.trainable(), plain, "it is no part of the model");
        let before = values(trainee.projection().unwrap());
        let (best, summary) = run_with(&trainee, &spec(12), 2, Some(&teacher), None).unwrap();
        assert_ne!(before, values(trainee.projection().unwrap()));
        let loss = |epoch: usize| summary.history[epoch].loss;
        assert!(loss(11) < 0.9 * loss(0), "{} {}", loss(0), loss(11));
        let adapter = trainee.adapter(&best, task()).unwrap().unwrap();
        assert_eq!(adapter.parameters(), plain);
    }
}

#[test]
fn a_student_that_equals_its_teacher_has_no_loss_between_layers() {
    let model = "bert-pairs";
    let losses = LayerLossSpec {
        hidden: 1.0,
        cosine: 1.0,
        map: Some(vec![(0, 0), (1, 1), (2, 2)]),
    };
    let teacher = layer_teacher(model, losses, model);
    let trainee = lora_trainee(model)
        .with_projection(teacher.hidden_size(), 7)
        .unwrap();
    assert!(trainee.projection().is_none());
    let (encoder, weights) = trainee.network().unwrap();
    let data = examples(5);
    let sequences: Vec<&Sequence> = data.iter().map(|e| &e.sequence).collect();
    let batch = crate::text::PackedBatch::new(sequences.iter().copied());
    let segment = crate::encoder::Segment {
        sequences: 0..5,
        weights: &weights,
    };
    let (logits, states) = encoder
        .forward_with_states(&batch, std::slice::from_ref(&segment), None, &[0, 1, 2])
        .unwrap();
    let loss = teacher.loss(&states, &sequences, None).unwrap();
    let loss = loss.to_scalar::<f32>().unwrap();
    assert!(loss.abs() < 1e-4, "{loss}");
    let plain = encoder.forward(&batch, &[segment], None).unwrap();
    for (a, b) in values(&logits[0]).iter().zip(values(&plain[0])) {
        assert!((a - b).abs() < 1e-5, "{a} {b}");
    }
}

#[test]
fn a_map_beyond_the_layers_and_unlike_tokens_are_refused() {
    let losses = LayerLossSpec {
        map: Some(vec![(1, 9)]),
        ..LayerLossSpec::default()
    };
    let (encoder, weights) = lora_trainee("bert-pairs").network().unwrap();
    let error = LayerTeacher::new(&losses, encoder, weights, 2)
        .err()
        .unwrap();
    assert!(
        error.to_string().contains("layer 1 of the student with 9"),
        "{error}"
    );

    let teacher = layer_teacher("bert-pairs", LayerLossSpec::default(), "bert-pairs");
    let mut data = examples(8);
    data[3].teacher_sequence.as_mut().unwrap().ids.push(3);
    let names = ["no".to_owned(), "yes".to_owned()];
    let spec = spec(1);
    let learning = Learning {
        spec: &spec,
        dropout: 0.1,
        problem_type: ProblemType::SingleLabelClassification,
        metric: Metric::Accuracy,
        label_names: &names,
        class_weights: None,
        threads: 1,
        gpu: GpuLimits::default(),
        layer_teacher: Some(&teacher),
        memory_limit: None,
        checkpoint: None,
    };
    let trainee = lora_trainee("bert-pairs");
    let error = train(&trainee, &data, &[], &learning, &mut |_| {})
        .err()
        .unwrap();
    assert!(matches!(error, TrainError::Tokens { .. }), "{error}");
}

#[test]
fn a_training_that_would_not_fit_is_refused_before_it_starts() {
    let trainee = lora_trainee("bert-pairs");
    let before = trainee.snapshot().unwrap();
    let result = run_with(&trainee, &spec(1), 1, None, Some(1 << 20));
    let error = result.err().unwrap().to_string();
    assert!(error.contains("may take 1 MiB"), "{error}");
    for (name, tensor) in trainee.snapshot().unwrap() {
        assert_eq!(values(&tensor), values(&before[&name]), "{name}");
    }
    assert!(run_with(&trainee, &spec(1), 1, None, Some(64 << 30)).is_ok());
}

#[test]
fn a_training_that_is_cut_off_goes_on_from_its_checkpoint_with_the_same_bits() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoints = Checkpoints {
        folder: folder.path().to_owned(),
        every: Duration::ZERO,
    };
    let checkpoint = checkpoints.of("student", "context");
    let names = ["no".to_owned(), "yes".to_owned()];
    let (spec, data) = (spec(3), examples(96));
    let train_until = |last: usize, checkpoint: Option<&Checkpoint>| {
        let learning = Learning {
            spec: &spec,
            dropout: 0.1,
            problem_type: ProblemType::SingleLabelClassification,
            metric: Metric::Accuracy,
            label_names: &names,
            class_weights: None,
            threads: 2,
            gpu: GpuLimits::default(),
            layer_teacher: None,
            memory_limit: None,
            checkpoint,
        };
        let trainee = varied_trainee("bert-pairs", variants()[2].clone());
        let mut steps = Vec::new();
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let mut progress = |step: Step| {
                steps.push(step.step);
                assert!(step.step < last, "cut off");
            };
            train(&trainee, &data[..64], &data[64..], &learning, &mut progress).unwrap()
        }));
        (steps, result.ok())
    };
    let (_, alone) = train_until(usize::MAX, None);
    let (alone, history) = alone
        .map(|(best, summary)| (best, summary.history))
        .unwrap();
    // Three epochs of eight steps: cut off in the first, and in the third.
    assert!(train_until(5, Some(&checkpoint)).1.is_none());
    assert!(train_until(20, Some(&checkpoint)).1.is_none());
    let (steps, whole) = train_until(usize::MAX, Some(&checkpoint));
    assert_eq!(steps, [20, 24]);
    let (again, nothing_left) = train_until(usize::MAX, Some(&checkpoint));
    assert!(again.is_empty());
    for (best, summary) in [whole.unwrap(), nothing_left.unwrap()] {
        assert_eq!(summary.history, history);
        for (name, tensor) in &best {
            assert_eq!(values(tensor), values(&alone[name]), "{name}");
        }
    }
}
