//! The ready-made tasks with the real student, which `kdlora pull` fetches if it is not there.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use candle_core::Device;
use kdlora::adapter::{AdapterFolder, Classifier};
use kdlora::distill::dataset::{self, Dataset, Teacher};
use kdlora::distill::evaluation::evaluate;
use kdlora::distill::report::Report;
use kdlora::distill::spec::{DataSpec, SplitSpec};
use kdlora::distill::training::predict;
use kdlora::encoder::{Encoder, encoder_digest};
use kdlora::hub;
use kdlora::ops::Precision;
use kdlora::text::{Sequence, Tokenizer};

fn project(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// The student's folder, by way of the program itself.
fn student() -> PathBuf {
    let output = Command::new(env!("CARGO_BIN_EXE_kdlora"))
        .args(["pull", "minilm-l6"])
        .output()
        .unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{error}");
    PathBuf::from(String::from_utf8(output.stdout).unwrap().trim())
}

fn data(task: &str) -> Dataset {
    let path = |split: &str| SplitSpec::Path(project(&format!("data/{task}/{split}.jsonl")));
    let spec = DataSpec {
        validation: Some(path("validation")),
        test: Some(path("test")),
        ..DataSpec::of(path("train"))
    };
    Dataset::load(&spec, 42, Teacher::None).unwrap()
}

/// Scores a shipped adapter on the whole test split, as its report says it was.
fn assert_scores_as_reported(task: &str, least: f64) {
    let folder = student();
    let load = || Encoder::load(&folder, &Device::Cpu).unwrap();
    let encoder = Arc::new(load());
    let tokenizer = Tokenizer::load(&folder).unwrap();
    let version = project(&format!("models/adapters/{task}/student"));
    let adapter = AdapterFolder::read(&version).unwrap();
    assert_eq!(adapter.task.base_digest, encoder_digest(&folder).ok());
    let classifier = Classifier::from_adapter(encoder.clone(), &adapter).unwrap();
    let report = Report::read(&version).unwrap();

    let data = data(task);
    assert_eq!(data.label_names, classifier.task.labels);
    let sequences: Vec<Sequence> = data
        .test
        .iter()
        .map(|row| {
            tokenizer
                .encode(
                    &row.input,
                    classifier.max_length(),
                    Some(classifier.task.truncation),
                )
                .unwrap()
        })
        .collect();
    let sequences: Vec<&Sequence> = sequences.iter().collect();
    let threads = std::thread::available_parallelism().unwrap().get();
    let labels = dataset::labels(&data.test);
    let names = &data.label_names;
    let score = |classifier: &Classifier| {
        let (encoder, weights) = (&classifier.encoder, &classifier.weights);
        let logits = predict(encoder, weights, &sequences, threads, &|_, _| {}).unwrap();
        let found = evaluate(data.scoring(), names, &logits, &labels, 42).unwrap();
        found.score.value
    };
    let exact = score(&classifier);
    let reported = report.student.score.value;
    assert!(
        (exact - reported).abs() < 0.003,
        "{task}: {exact} measured, {reported} reported"
    );
    assert!(exact > least, "{task}: {exact}");

    let packed = Arc::new(load().pack(Precision::Int8).unwrap());
    let merged = Classifier::merged(&packed, &adapter).unwrap();
    let hot = Classifier::from_adapter(packed, &adapter).unwrap();
    for (mode, classifier) in [("hot", hot), ("merged", merged)] {
        let int8 = score(&classifier);
        println!("{task}, {mode}: {exact:.4} in f32, {int8:.4} in int8");
        assert!(
            int8 > exact - 0.005,
            "{task}, {mode}: {int8} in int8, {exact} in f32"
        );
    }
}

#[test]
fn movie_sentiment_scores_as_reported() {
    assert_scores_as_reported("movie-sentiment", 0.80);
}

#[test]
fn movie_rating5_scores_as_reported() {
    assert_scores_as_reported("movie-rating5", 0.40);
}

#[test]
fn tweet_valence_scores_as_reported() {
    assert_scores_as_reported("tweet-valence", 0.60);
}

#[test]
fn ready_made_adapters_and_reports_carry_the_digests_of_the_catalog() {
    let digest = |name: &str| hub::catalog::find(name).unwrap().encoder_digest.clone();
    let (student, teacher) = (digest("minilm-l6"), digest("mpnet-base"));
    assert!(student.is_some() && teacher.is_some());
    for task in ["movie-sentiment", "movie-rating5", "tweet-valence"] {
        for (kind, digest) in [("student", &student), ("teacher", &teacher)] {
            let folder = project(&format!("models/adapters/{task}/{kind}"));
            let adapter = AdapterFolder::read(&folder).unwrap();
            assert_eq!(adapter.task.base_digest, *digest, "{task}, {kind}");
        }
        let report = Report::read(&project(&format!("models/adapters/{task}/student"))).unwrap();
        assert_eq!(report.student_model.encoder_digest, student, "{task}");
        let of_teacher = report.teacher_model.unwrap().encoder_digest;
        assert_eq!(of_teacher, teacher, "{task}");
    }
}
