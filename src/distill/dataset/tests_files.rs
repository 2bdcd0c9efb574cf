//! Files as people have them: named columns, Parquet, GLUE's layouts.

use std::fs;
use std::path::Path;

use serde_json::json;

use super::tests::{file, golden, load};
use super::*;
use crate::distill::spec::{Balanced, ClassWeights, ColumnSpec};

fn preset(preset: Preset, folder: &Path) -> DataSpec {
    DataSpec {
        preset: Some(preset),
        ..DataSpec::of(SplitSpec::Path(folder.to_owned()))
    }
}

fn columns(text: &str, label: &str) -> Option<ColumnSpec> {
    Some(ColumnSpec {
        text: Some(text.into()),
        label: Some(label.into()),
        ..ColumnSpec::default()
    })
}

/// Lines of a table: `line(i)` for each row.
fn table(header: Option<&str>, rows: usize, line: impl Fn(usize) -> String) -> String {
    let mut text = header.map_or(String::new(), |header| format!("{header}\n"));
    (0..rows).for_each(|i| text += &format!("{}\n", line(i)));
    text
}

fn texts(rows: &[Row]) -> Vec<&str> {
    rows.iter().map(|row| row.input.text.as_str()).collect()
}

#[test]
fn columns_have_the_names_that_the_request_gives_them() {
    let dir = tempfile::tempdir().unwrap();
    let csv = table(Some("id,label,Body,stars"), 40, |i| {
        format!("{i},x,\"words, {i}\",{}", ["good", "bad"][i % 2])
    });
    let jsonl = table(None, 40, |i| {
        let stars = ["good", "bad"][i % 2];
        json!({"Body": format!("words, {i}"), "label": 7, "id": i, "stars": stars}).to_string()
    });
    for (name, content) in [("rows.csv", csv), ("rows.jsonl", jsonl)] {
        let spec = DataSpec {
            columns: columns("Body", "stars"),
            ..DataSpec::of(file(dir.path(), name, content))
        };
        let data = load(&spec).unwrap();
        assert_eq!(data.label_names, ["bad", "good"], "{name}");
        assert!(data.rows().any(|row| row.input.text == "words, 7"));
        assert_eq!(data.checks.ignored_fields, ["id", "label"]);
    }
}

#[test]
fn a_column_that_is_not_there_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let content = table(Some("text,label"), 40, |i| format!("w {i},{}", i % 2));
    let spec = |columns| DataSpec {
        columns,
        ..DataSpec::of(file(dir.path(), "rows.csv", &content))
    };
    for (wanted, part) in [
        (columns("body", "label"), "among them \"body\""),
        (columns("text", "lable"), "among them \"lable\""),
    ] {
        let error = load(&spec(wanted)).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }
}

#[test]
fn test_rows_may_lack_the_label_column_that_training_rows_have() {
    let dir = tempfile::tempdir().unwrap();
    let train = table(Some("text,stars"), 40, |i| {
        format!("w {i},{}", ["a", "b"][i % 2])
    });
    let spec = DataSpec {
        columns: columns("text", "stars"),
        test: Some(file(
            dir.path(),
            "test.csv",
            table(Some("text"), 3, |i| format!("t {i}")),
        )),
        ..DataSpec::of(file(dir.path(), "train.csv", train))
    };
    let task = KnownTask {
        problem_type: ProblemType::SingleLabelClassification,
        labels: vec!["a".into(), "b".into()],
    };
    let data = Dataset::load(&spec, 42, Teacher::Trained(&task)).unwrap();
    assert_eq!(data.test.len(), 3);
    assert!(data.test.iter().all(|row| row.label.is_none()));
}

#[test]
fn parquet_of_the_hub_is_read_whole() {
    let spec = preset(Preset::Wnli, &golden(""));
    let data = load(&spec).unwrap();
    assert_eq!(data.label_names, ["not_entailment", "entailment"]);
    assert_eq!(data.train.len() + data.validation.len(), 24);
    assert_eq!(texts(&data.test)[3], "held out 3");
    assert_eq!(data.test[3].input.text_pair.as_deref(), Some("second 3 😀"));
    assert_eq!(data.test[3].label, Some(Label::Class(1)));
    assert_eq!(data.checks.ignored_fields, ["idx"]);
}

#[test]
fn parquet_has_numbers_lists_and_gaps_in_any_compression() {
    let mapped = ColumnSpec {
        text: Some("body".into()),
        label: Some("score".into()),
        teacher_logits: Some("logits".into()),
        text_pair: None,
    };
    for name in ["gzip", "none"] {
        let path = SplitSpec::Path(golden(&format!("mixed-{name}.parquet")));
        let columns = Columns::of(&DataSpec {
            columns: Some(mapped.clone()),
            ..DataSpec::of(path.clone())
        });
        let raw = read::read(Split::Train, &path, &columns).unwrap();
        let texts: Vec<_> = raw.rows.iter().map(|row| row.input.text.as_str()).collect();
        assert_eq!(texts, ["one", "two", "four"], "{name}");
        assert_eq!(raw.rejected.first[0].line, 3);
        assert_eq!(raw.rows[1].teacher_logits, Some(vec![-1.0]));
        assert!(raw.rows[1].label.is_some() && raw.rows[2].label.is_none());
        assert!(raw.ignored_fields.contains("embedding"));
    }
}

#[test]
fn a_compression_that_is_not_built_in_is_named() {
    let spec = DataSpec {
        columns: columns("body", "score"),
        ..DataSpec::of(SplitSpec::Path(golden("mixed-zstd.parquet")))
    };
    let error = load(&spec).unwrap_err().to_string();
    assert!(error.contains("compressed with ZSTD"), "{error}");
    assert!(error.contains("SNAPPY, GZIP"), "{error}");
}

#[test]
fn what_only_calls_itself_parquet_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let whole = fs::read(golden("mixed-none.parquet")).unwrap();
    let cut = [&whole[..40], &whole[whole.len() - 40..]].concat();
    for content in [b"text,label\na,b\n".to_vec(), cut, Vec::new()] {
        let spec = DataSpec::of(file(dir.path(), "rows.parquet", content));
        let error = load(&spec).unwrap_err();
        assert!(matches!(error, DataError::Parquet { .. }), "{error}");
    }
}

#[test]
fn glue_tables_are_read_as_they_come() {
    let dir = tempfile::tempdir().unwrap();
    let folder = |name: &str| {
        let folder = dir.path().join(name);
        fs::create_dir(&folder).unwrap();
        folder
    };
    let yes_no = |i: usize| ["not_entailment", "entailment"][i % 2];
    // Task, header, a line, name of the file that is judged.
    type Line = Box<dyn Fn(&str, usize) -> String>;
    let tasks: Vec<(Preset, Option<&str>, Line, &str)> = vec![
        (
            Preset::Cola,
            None,
            Box::new(|s, i| format!("gj04\t{}\t{}\t{s} {i} \"so\".", i % 2, ["*", ""][i % 2])),
            "dev",
        ),
        (
            Preset::Sst2,
            Some("sentence\tlabel"),
            Box::new(|s, i| format!("{s} {i}\t{}", i % 2)),
            "dev",
        ),
        (
            Preset::Mrpc,
            Some("\u{feff}Quality\t#1 ID\t#2 ID\t#1 String\t#2 String"),
            Box::new(|s, i| format!("{}\t1\t2\t{s} {i}\tother {i}", i % 2)),
            "dev",
        ),
        (
            Preset::Qqp,
            Some("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate"),
            Box::new(|s, i| format!("{i}\t1\t2\t{s} {i}?\twhy {i}?\t{}", i % 2)),
            "dev",
        ),
        (
            Preset::Stsb,
            Some(
                "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
            ),
            Box::new(|s, i| format!("{i}\tg\tf\t2012\t1\tn\tn\t{s} {i}\to {i}\t{}.000", i % 6)),
            "dev",
        ),
        (
            Preset::MnliMm,
            Some("index\tpromptID\tpairID\tgenre\tsentence1\tsentence2\tlabel1\tgold_label"),
            Box::new(|s, i| {
                let label = ["entailment", "neutral", "contradiction"][i % 3];
                format!("{i}\t1\t1e\tfiction\t{s} {i}\to {i}\t{label}\t{label}")
            }),
            "dev_mismatched",
        ),
        (
            Preset::Qnli,
            Some("index\tquestion\tsentence\tlabel"),
            Box::new(move |s, i| format!("{i}\t{s} {i}?\tanswer\t{}", yes_no(i))),
            "dev",
        ),
        (
            Preset::Rte,
            Some("index\tsentence1\tsentence2\tlabel"),
            Box::new(move |s, i| format!("{i}\t{s} {i}\to {i}\t{}", yes_no(i))),
            "dev",
        ),
    ];
    for (task, header, line, judged) in tasks {
        let folder = folder(&format!("{task:?}"));
        fs::write(
            folder.join("train.tsv"),
            table(header, 60, |i| line("train", i)),
        )
        .unwrap();
        fs::write(
            folder.join(format!("{judged}.tsv")),
            table(header, 12, |i| line("dev", i)),
        )
        .unwrap();
        // GLUE's test files have no labels, and are not what a version is judged by.
        fs::write(folder.join("test.tsv"), "index\tsentence\n0\tx\n").unwrap();
        let data = load(&preset(task, &folder)).unwrap_or_else(|e| panic!("{task:?}: {e}"));
        assert_eq!(
            data.checks.rejected, 0,
            "{task:?}: {:?}",
            data.checks.rejections
        );
        assert_eq!(
            (data.train.len() + data.validation.len(), data.test.len()),
            (60, 12)
        );
        assert_eq!(data.metric, task.metric());
        assert_eq!(data.task_kind, task.problem_type());
        assert!(data.rows().all(|row| row.label.is_some()), "{task:?}");
        assert!(
            texts(&data.test)
                .iter()
                .all(|text| text.starts_with("dev "))
        );
        if let Some(labels) = task.labels() {
            assert_eq!(data.label_names, labels);
            let second = data.test.iter().find(|row| row.input.text.contains(" 1"));
            let expected = match task {
                // "entailment" counts from 0.
                Preset::Rte | Preset::Qnli => 0,
                _ => 1,
            };
            assert_eq!(
                second.map(|row| row.label.clone()),
                Some(Some(Label::Class(expected)))
            );
        }
    }
}

#[test]
fn a_folder_without_the_files_of_its_preset_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("train.tsv"), "").unwrap();
    let error = load(&preset(Preset::Mnli, dir.path()))
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("dev_matched or validation_matched"),
        "{error}"
    );
}

#[test]
fn rows_of_the_hub_that_are_marked_as_unlabelled_have_no_label() {
    let dir = tempfile::tempdir().unwrap();
    let rows = table(None, 40, |i| {
        let label = if i < 4 { -1 } else { (i % 2) as i64 };
        json!({"sentence": format!("s {i}"), "label": label, "idx": i}).to_string()
    });
    let task = KnownTask {
        problem_type: ProblemType::SingleLabelClassification,
        labels: Preset::Sst2.labels().unwrap(),
    };
    let mut spec = preset(Preset::Sst2, dir.path());
    spec.train = file(dir.path(), "rows.jsonl", rows);
    let data = Dataset::load(&spec, 42, Teacher::Trained(&task)).unwrap();
    assert_eq!(data.rows().filter(|row| row.label.is_none()).count(), 4);
    assert_eq!(data.checks.rejected, 0);
}

fn unbalanced() -> SplitSpec {
    let row = |i: usize| {
        let label = if i.is_multiple_of(10) {
            "rare"
        } else {
            "usual"
        };
        json!({"text": format!("t {i}"), "label": label})
    };
    SplitSpec::Rows((0..200).map(row).collect())
}

#[test]
fn balanced_weights_make_classes_count_alike() {
    let spec = DataSpec {
        class_weights: Some(ClassWeights::Balanced(Balanced::Balanced)),
        ..DataSpec::of(unbalanced())
    };
    let data = load(&spec).unwrap();
    let weights = data.class_weights.clone().unwrap();
    let counts: Vec<f32> = data
        .checks
        .train
        .classes
        .iter()
        .map(|c| c.rows as f32)
        .collect();
    assert!(
        (weights[0] * counts[0] - weights[1] * counts[1]).abs() < 1e-3,
        "{weights:?}"
    );
    assert!((weights[0] * counts[0] - data.train.len() as f32 / 2.0).abs() < 1e-3);
}

#[test]
fn weights_are_given_by_name() {
    let weights = |name: &str| {
        let json = json!({"train": {"rows": []}, "class_weights": {name: 4.0}});
        let spec: DataSpec = serde_json::from_value(json).unwrap();
        load(&DataSpec {
            class_weights: spec.class_weights,
            ..DataSpec::of(unbalanced())
        })
    };
    assert_eq!(weights("rare").unwrap().class_weights, Some(vec![4.0, 1.0]));
    let error = weights("odd").unwrap_err().to_string();
    assert!(error.contains("\"odd\" is no label"), "{error}");
}

#[test]
fn a_metric_must_suit_the_task() {
    let spec = |metric| DataSpec {
        metric: Some(metric),
        ..DataSpec::of(unbalanced())
    };
    assert_eq!(load(&spec(Metric::Mcc)).unwrap().metric, Metric::Mcc);
    let error = load(&spec(Metric::PearsonSpearman)).unwrap_err();
    assert!(matches!(error, DataError::Metric { .. }), "{error}");
}
