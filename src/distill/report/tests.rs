use serde_json::json;

use super::*;
use crate::distill::dataset::{ClassCount, Label, Rejection, Split, SplitChecks};
use crate::distill::evaluation::{Calibration, Quantiles, Scoring, evaluate, majority};
use crate::distill::spec::GateSpec;

const KIND: ProblemType = ProblemType::SingleLabelClassification;

fn names() -> Vec<String> {
    vec!["negative".into(), "positive".into()]
}

/// A model that errs in every `every`-th of 100 rows.
fn scored(every: usize) -> Evaluation {
    let labels: Vec<Label> = (0..100).map(|i| Label::Class(i % 2)).collect();
    let logits: Vec<Vec<f32>> = (0..100)
        .map(|i| {
            let answer = if i % every == 0 { 1 - i % 2 } else { i % 2 };
            vec![1.0 - 2.0 * answer as f32, 0.0]
        })
        .collect();
    let labels: Vec<Option<&Label>> = labels.iter().map(Some).collect();
    evaluate(Scoring::of(KIND), &names(), &logits, &labels, 7).unwrap()
}

fn baseline() -> Evaluation {
    let labels: Vec<Label> = (0..100).map(|i| Label::Class(i % 2)).collect();
    let labels: Vec<Option<&Label>> = labels.iter().map(Some).collect();
    majority(Scoring::of(KIND), &names(), &labels, &labels, 7).unwrap()
}

fn quantiles(p50_ms: f64) -> Quantiles {
    Quantiles {
        p50_ms,
        p90_ms: p50_ms * 1.5,
        p99_ms: p50_ms * 3.0,
    }
}

fn latency_at(batch: usize) -> LatencyAt {
    LatencyAt {
        batch,
        rounds: 50,
        student: quantiles(2.0 * batch as f64),
        teacher: Some(quantiles(18.0 * batch as f64)),
        speed_up: Some(9.0),
    }
}

fn data() -> DataSummary {
    let split = |rows: usize| SplitChecks {
        rows,
        labelled: rows,
        classes: names()
            .into_iter()
            .map(|label| ClassCount {
                label,
                rows: rows / 2,
            })
            .collect(),
        truncated: Some(0.25),
        ..SplitChecks::default()
    };
    DataSummary {
        labels: names(),
        test_digest: None,
        checks: DataChecks {
            train: split(8_000),
            validation: split(100),
            test: split(100),
            cut_from_train: vec![Split::Validation],
            overlap_removed: 3,
            conflicting_labels: 1,
            rejected: 1,
            rejections: vec![Rejection {
                split: Split::Train,
                line: 12,
                reason: "\"text\" is empty".into(),
            }],
            ignored_fields: vec!["idx".into()],
            warnings: vec![
                "the test split has only 100 labelled rows, so its scores are uncertain".into(),
            ],
        },
    }
}

fn full() -> Report {
    let (mut student, teacher) = (scored(10), scored(20));
    student.calibration = Some(Calibration {
        temperature: 1.2,
        ece: 0.01,
    });
    let majority = baseline();
    Report {
        task: "movie-sentiment".into(),
        problem_type: KIND,
        created_at: timestamp(SystemTime::UNIX_EPOCH),
        seed: 42,
        spec: json!({"task": "movie-sentiment"}),
        data: data(),
        reference: Reference::Labels,
        share_kept: share_kept(&student, &teacher),
        likeness: Some(Likeness {
            agreement: 0.93,
            mean_kl: Some(0.0412),
        }),
        student_model: ModelSize {
            encoder: "minilm-l6".into(),
            encoder_digest: None,
            parameters: 22_861_442,
            trainable: Some(148_226),
            encoder_bytes: 90_868_376,
            adapter_bytes: Some(597_000),
        },
        teacher_model: Some(ModelSize {
            encoder: "mpnet-base".into(),
            encoder_digest: None,
            parameters: 109_488_386,
            trainable: None,
            encoder_bytes: 437_967_672,
            adapter_bytes: None,
        }),
        latency: Some(Latency {
            device: "cpu".into(),
            threads: 2,
            batch_1: latency_at(1),
            batch_32: latency_at(32),
        }),
        peak_memory: PeakMemory {
            training_bytes: Some(1 << 30),
            inference_bytes: None,
        },
        training: Some(TrainingSummary {
            epochs: 2,
            steps: 500,
            seconds: 61.5,
            tokens_per_second: 4_321.0,
            best_epoch: 2,
            history: vec![EpochSummary {
                epoch: 1,
                loss: 0.5,
                validation_score: Some(0.9),
            }],
        }),
        teacher_training: None,
        gate: Some(Gate::judge(
            &GateSpec {
                keep: 0.99,
                ..GateSpec::default()
            },
            &student,
            Some(&teacher),
            Some(&majority),
        )),
        differences: Vec::new(),
        student,
        teacher: Some(teacher),
        control: None,
        majority: Some(majority),
    }
}

/// A pass on labels alone that measured next to nothing.
fn bare() -> Report {
    let full = full();
    Report {
        teacher: None,
        share_kept: None,
        likeness: None,
        teacher_model: None,
        latency: None,
        peak_memory: PeakMemory::default(),
        training: None,
        gate: None,
        differences: Vec::new(),
        data: DataSummary {
            labels: names(),
            test_digest: None,
            checks: DataChecks::default(),
        },
        ..full
    }
}

#[test]
fn a_report_is_read_as_it_was_written() {
    for report in [full(), bare()] {
        let dir = tempfile::tempdir().unwrap();
        report.write(dir.path()).unwrap();
        report.write(dir.path()).unwrap();
        assert_eq!(Report::read(dir.path()).unwrap(), report);
        let names: Vec<_> = fs::read_dir(dir.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        assert_eq!(names, [FILE_NAME]);
    }
}

#[test]
fn what_was_not_measured_is_absent() {
    let json = serde_json::to_value(bare()).unwrap();
    for field in [
        "teacher", "control", "latency", "training", "gate", "likeness",
    ] {
        assert!(json.get(field).is_none(), "{field}");
    }
    assert_eq!(json["peak_memory"], json!({}));
    assert!(json["student"].get("pearson").is_none());
}

#[test]
fn a_report_that_cannot_be_read_says_which() {
    let dir = tempfile::tempdir().unwrap();
    assert!(matches!(
        Report::read(dir.path()),
        Err(ReportError::Read { .. })
    ));
    fs::write(dir.path().join(FILE_NAME), "{}").unwrap();
    let error = Report::read(dir.path()).unwrap_err();
    assert!(error.to_string().contains(FILE_NAME), "{error}");
    let nowhere = dir.path().join("nowhere");
    assert!(matches!(
        bare().write(&nowhere),
        Err(ReportError::Write { .. })
    ));
}

#[test]
fn the_table_has_a_column_for_each_model() {
    insta::assert_snapshot!(full().to_markdown());
}

#[test]
fn the_table_of_a_bare_report_has_no_empty_rows() {
    insta::assert_snapshot!(bare().to_markdown());
}

fn version(every: usize, digest: &str, lora: serde_json::Value) -> Report {
    let mut report = full();
    report.student = scored(every);
    report.data.test_digest = Some(digest.into());
    report.spec = json!({"task": "movie-sentiment", "lora": lora, "training": {"seed": 1}});
    report
}

#[test]
fn versions_are_compared_figure_by_figure() {
    let first = version(4, "same", json!({"r": 4}));
    let second = version(20, "same", json!({"r": 8, "use_dora": true}));
    let comparison = Comparison::of("movie-sentiment", [1, 2], &first, &second);
    assert!(comparison.comparable && comparison.reason.is_none());
    assert_eq!(comparison.significant, Some(true));
    let score = &comparison.figures[0];
    assert_eq!((score.first, score.second), (Some(0.75), Some(0.95)));
    assert!((score.difference.unwrap() - 0.2).abs() < 1e-9);
    let fields: Vec<_> = comparison
        .request
        .iter()
        .map(|c| c.field.as_str())
        .collect();
    assert_eq!(fields, ["/lora/r", "/lora/use_dora"]);
    assert_eq!(comparison.request[1].first, serde_json::Value::Null);
    assert_eq!(comparison.gates[0].len(), 3);
    insta::assert_snapshot!(comparison.to_markdown());
}

#[test]
fn scores_on_other_rows_are_not_called_comparable() {
    let first = version(4, "these", json!({}));
    let second = version(4, "those", json!({}));
    let comparison = Comparison::of("movie-sentiment", [1, 2], &first, &second);
    assert_eq!(
        (comparison.comparable, comparison.significant),
        (false, None)
    );
    assert_eq!(comparison.reason.as_deref(), Some("the test rows differ"));
    let old = Comparison::of("movie-sentiment", [1, 2], &full(), &second);
    assert!(old.reason.unwrap().contains("does not say"));
}

#[test]
fn texts_of_rows_are_taken_out_of_what_everybody_sees() {
    let mut report = serde_json::to_value(full()).unwrap();
    report["differences"] = json!([{"text": "private"}]);
    without_texts(&mut report);
    assert_eq!(report, serde_json::to_value(full()).unwrap());
}
