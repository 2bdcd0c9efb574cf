//! The ready-made tasks with the real student, which `kdlora pull` fetches if it is not there.

mod common;

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
use kdlora::encoder::Encoder;
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
        train: path("train"),
        validation: Some(path("validation")),
        test: Some(path("test")),
        problem_type: None,
        labels: None,
    };
    Dataset::load(&spec, 42, Teacher::None).unwrap()
}

/// Scores a shipped adapter on the whole test split, as its report says it was.
fn assert_scores_as_reported(task: &str, least: f64) {
    let folder = student();
    let encoder = Arc::new(Encoder::load(&folder, &Device::Cpu).unwrap());
    let tokenizer = Tokenizer::load(&folder).unwrap();
    let version = project(&format!("models/adapters/{task}/student"));
    let adapter = AdapterFolder::read(&version).unwrap();
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
    let logits = predict(
        &encoder,
        &classifier.weights,
        &sequences,
        threads,
        &|_, _| {},
    );
    let labels = dataset::labels(&data.test);
    let names = &data.label_names;
    let score = evaluate(data.task_kind, names, &logits.unwrap(), &labels, 42)
        .unwrap()
        .score;
    assert!(
        (score.value - report.student.score.value).abs() < 0.003,
        "{task}: {} measured, {} reported",
        score.value,
        report.student.score.value
    );
    assert!(score.value > least, "{task}: {}", score.value);
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
