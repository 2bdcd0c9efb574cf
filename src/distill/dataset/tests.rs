use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::distill::spec::SplitSpec;

fn spec(train: SplitSpec) -> DataSpec {
    DataSpec::of(train)
}

fn rows(rows: Value) -> SplitSpec {
    match rows {
        Value::Array(rows) => SplitSpec::Rows(rows),
        other => panic!("{other} is not a list"),
    }
}

/// `n` texts, their labels in turn from `labels`.
fn labelled(n: usize, labels: &[Value]) -> SplitSpec {
    prefixed("text", n, labels)
}

fn prefixed(prefix: &str, n: usize, labels: &[Value]) -> SplitSpec {
    let row =
        |i: usize| json!({"text": format!("{prefix} {i}"), "label": labels[i % labels.len()]});
    SplitSpec::Rows((0..n).map(row).collect())
}

fn unlabelled(n: usize) -> SplitSpec {
    SplitSpec::Rows(
        (0..n)
            .map(|i| json!({"text": format!("bare {i}")}))
            .collect(),
    )
}

pub(super) fn file(dir: &Path, name: &str, content: impl AsRef<[u8]>) -> SplitSpec {
    let path = dir.join(name);
    fs::write(&path, content).unwrap();
    SplitSpec::Path(path)
}

pub(super) fn golden(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/parquet");
    folder.join(name)
}

pub(super) fn load(spec: &DataSpec) -> Result<Dataset, DataError> {
    Dataset::load(spec, 42, Teacher::None)
}

fn teacher(problem_type: ProblemType, labels: &[&str]) -> KnownTask {
    KnownTask {
        problem_type,
        labels: labels.iter().map(ToString::to_string).collect(),
    }
}

pub(super) fn message(result: Result<Dataset, DataError>) -> String {
    result
        .expect_err("the data set should be refused")
        .to_string()
}

fn find<'a>(dataset: &'a Dataset, text: &str) -> &'a Row {
    dataset
        .rows()
        .find(|row| row.input.text == text)
        .unwrap_or_else(|| panic!("no row {text:?}"))
}

#[test]
fn strings_are_classes_in_sorted_order_and_ids_are_places() {
    let dataset = load(&spec(labelled(60, &[json!("b"), json!("a"), json!(" c ")]))).unwrap();
    assert_eq!(dataset.task_kind, ProblemType::SingleLabelClassification);
    assert_eq!(dataset.label_names, ["a", "b", "c"]);
    assert_eq!(find(&dataset, "text 0").label, Some(Label::Class(1)));
    assert_eq!(find(&dataset, "text 2").label, Some(Label::Class(2)));
    let ids: Vec<usize> = dataset.rows().map(|row| row.id).collect();
    assert_eq!(ids, (0..60).collect::<Vec<_>>());
    assert_eq!(dataset.checks.train.classes[0].rows, 16);
}

#[test]
fn class_names_that_are_numbers_are_sorted_by_value() {
    let labels: Vec<Value> = (1..=11).map(|i| json!(i.to_string())).collect();
    let dataset = load(&spec(labelled(110, &labels))).unwrap();
    assert_eq!(dataset.label_names[8..], ["9", "10", "11"]);
}

#[test]
fn numbers_are_targets_of_a_regression() {
    let dataset = load(&spec(labelled(50, &[json!(1), json!(2.5), json!(-4)]))).unwrap();
    assert_eq!(dataset.task_kind, ProblemType::Regression);
    assert_eq!(dataset.label_names, ["value"]);
    assert_eq!(find(&dataset, "text 1").label, Some(Label::Value(2.5)));
    let range = dataset.checks.train.targets.unwrap();
    assert_eq!((range.min, range.max), (-4.0, 2.5));
}

#[test]
fn lists_are_several_labels_and_may_be_empty() {
    let labels = [json!(["x", "y", "x"]), json!([]), json!(["y"])];
    let dataset = load(&spec(labelled(60, &labels))).unwrap();
    assert_eq!(dataset.task_kind, ProblemType::MultiLabelClassification);
    assert_eq!(
        find(&dataset, "text 0").label,
        Some(Label::Labels(vec![0, 1]))
    );
    assert_eq!(find(&dataset, "text 1").label, Some(Label::Labels(vec![])));
}

#[test]
fn whole_numbers_from_zero_are_refused_until_their_meaning_is_given() {
    let mut spec = spec(labelled(60, &[json!(0), json!(1), json!(2)]));
    let text = message(load(&spec));
    assert!(
        text.contains("0 to 2") && text.contains("problem_type"),
        "{text}"
    );

    spec.problem_type = Some(ProblemType::Regression);
    assert_eq!(load(&spec).unwrap().task_kind, ProblemType::Regression);

    spec.problem_type = Some(ProblemType::SingleLabelClassification);
    assert_eq!(load(&spec).unwrap().label_names, ["0", "1", "2"]);

    spec.problem_type = None;
    spec.labels = Some(vec!["no".into(), "maybe".into(), "yes".into()]);
    let dataset = load(&spec).unwrap();
    assert_eq!(dataset.label_names, ["no", "maybe", "yes"]);
    assert_eq!(find(&dataset, "text 1").label, Some(Label::Class(1)));
}

#[test]
fn numbers_among_the_names_are_names_and_others_are_places() {
    let known = teacher(
        ProblemType::SingleLabelClassification,
        &["1", "2", "3", "4", "5"],
    );
    let spec = spec(labelled(60, &[json!(1), json!(2), json!(4)]));
    let dataset = Dataset::load(&spec, 1, Teacher::Trained(&known)).unwrap();
    assert_eq!(find(&dataset, "text 0").label, Some(Label::Class(0)));

    let known = teacher(ProblemType::SingleLabelClassification, &["a", "b", "c"]);
    let text = message(Dataset::load(&spec, 1, Teacher::Trained(&known)));
    assert!(
        text.contains("label 4 does not count from 0 in the 3 label names"),
        "{text}"
    );
}

#[test]
fn kinds_of_labels_do_not_mix() {
    let text = message(load(&spec(labelled(20, &[json!("a"), json!(1)]))));
    assert!(text.contains("train row 1 has \"a\""), "{text}");
    assert!(text.contains("train row 2 has 1"), "{text}");
}

#[test]
fn the_teacher_fixes_names_and_their_order() {
    let known = teacher(
        ProblemType::SingleLabelClassification,
        &["pos", "neg", "mixed"],
    );
    let spec = spec(labelled(60, &[json!("neg"), json!("pos")]));
    let dataset = Dataset::load(&spec, 1, Teacher::Trained(&known)).unwrap();
    assert_eq!(dataset.label_names, ["pos", "neg", "mixed"]);
    assert_eq!(find(&dataset, "text 0").label, Some(Label::Class(1)));
}

#[test]
fn names_that_the_teacher_does_not_have_are_refused_with_both_sets() {
    let known = teacher(
        ProblemType::SingleLabelClassification,
        &["Positive", "Negative"],
    );
    let spec = spec(labelled(60, &[json!("positive"), json!("negative")]));
    let text = message(Dataset::load(&spec, 1, Teacher::Trained(&known)));
    for part in [
        "\"negative\", \"positive\"",
        "\"Positive\", \"Negative\"",
        "upper and lower",
    ] {
        assert!(text.contains(part), "{text}");
    }
}

#[test]
fn a_teacher_of_another_kind_is_refused() {
    let known = teacher(ProblemType::Regression, &["value"]);
    let mut spec = spec(labelled(60, &[json!("a"), json!("b")]));
    let text = message(Dataset::load(&spec, 1, Teacher::Trained(&known)));
    assert!(
        text.contains("the teacher asks for regression, but train row 1 has \"a\""),
        "{text}"
    );
    spec.problem_type = Some(ProblemType::SingleLabelClassification);
    let text = message(Dataset::load(&spec, 1, Teacher::Trained(&known)));
    assert!(text.contains("the teacher answers a regression"), "{text}");
}

#[test]
fn a_trained_teacher_needs_no_labels() {
    let known = teacher(ProblemType::SingleLabelClassification, &["a", "b"]);
    let dataset = Dataset::load(&spec(unlabelled(50)), 1, Teacher::Trained(&known)).unwrap();
    assert_eq!(
        (
            dataset.train.len(),
            dataset.validation.len(),
            dataset.test.len()
        ),
        (40, 5, 5)
    );
    assert_eq!(dataset.checks.train.labelled, 0);
    assert!(dataset.checks.warnings[0].contains("no test row has a label"));
}

#[test]
fn a_teacher_that_has_learnt_the_labels_is_found_out() {
    let mut checks = DataChecks::default();
    (checks.train.rows, checks.train.labelled) = (1_000, 1_000);
    checks.validation.labelled = 100;
    let warning = repeated_labels(&checks, 0.98, 0.93).expect("a warning");
    assert!(warning.contains("0.980 on the training rows and 0.930"));
    assert_eq!(repeated_labels(&checks, 0.96, 0.93), None);
    assert_eq!(repeated_labels(&checks, 1.0, 1.0), None);
    let mut few = checks.clone();
    few.validation.labelled = 20;
    assert_eq!(repeated_labels(&few, 0.98, 0.93), None);
    checks.train.rows = 2_000;
    assert_eq!(repeated_labels(&checks, 0.98, 0.93), None);
}

#[test]
fn without_labels_and_teacher_there_is_nothing_to_learn() {
    assert!(matches!(
        load(&spec(unlabelled(50))),
        Err(DataError::NoLabels { .. })
    ));
    let mut labels_in_test_only = spec(unlabelled(50));
    labels_in_test_only.test = Some(labelled(50, &[json!("a"), json!("b")]));
    assert!(matches!(
        Dataset::load(&labels_in_test_only, 1, Teacher::Untrained),
        Err(DataError::NoTrainingLabels)
    ));
}

#[test]
fn logits_in_the_data_stand_for_a_teacher() {
    let row = |i| json!({"text": format!("t {i}"), "teacher_logits": [0.5, i]});
    let mut spec = spec(SplitSpec::Rows((0..40).map(row).collect()));
    spec.labels = Some(vec!["a".into(), "b".into()]);
    spec.problem_type = Some(ProblemType::SingleLabelClassification);
    let dataset = load(&spec).unwrap();
    assert_eq!(find(&dataset, "t 7").teacher_logits, Some(vec![0.5, 7.0]));

    spec.labels = Some(vec!["a".into(), "b".into(), "c".into()]);
    let text = message(load(&spec));
    assert!(
        text.contains("2 teacher_logits for 3 label names"),
        "{text}"
    );
}

#[test]
fn one_class_or_one_target_only_is_refused() {
    let text = message(load(&spec(labelled(40, &[json!("spam")]))));
    assert!(text.contains("is \"spam\""), "{text}");
    assert!(matches!(
        load(&spec(labelled(40, &[json!(1.5)]))),
        Err(DataError::OneTarget { .. })
    ));
}

#[test]
fn rows_that_cannot_be_used_are_rejected_with_line_and_reason() {
    let mut list = match labelled(100, &[json!("a"), json!("b")]) {
        SplitSpec::Rows(rows) => rows,
        SplitSpec::Path(_) => unreachable!(),
    };
    list.push(json!({"text": "  ", "label": "a"}));
    list.push(json!({"text": 7, "label": "a"}));
    list.push(json!({"sentence": "x", "label": "a"}));
    list.push(json!("just a text"));
    list.push(json!({"text": "x", "label": true}));
    list.push(json!({"text": "no label"}));
    list.push(json!({"text": "x", "label": "a", "teacher_logits": ["NaN", 1]}));
    let dataset = load(&spec(SplitSpec::Rows(list))).unwrap();
    assert_eq!(dataset.checks.rejected, 7);
    assert_eq!(dataset.len(), 100);
    let found: Vec<(usize, &str)> = dataset
        .checks
        .rejections
        .iter()
        .map(|rejection| (rejection.line, rejection.reason.as_str()))
        .collect();
    assert_eq!(
        found,
        [
            (101, "\"text\" is empty"),
            (102, "\"text\" is a number instead of a text"),
            (103, "no \"text\" (its fields: sentence, label)"),
            (104, "a string instead of an object"),
            (
                105,
                "\"label\" is a boolean; write a string, a number or a list of strings"
            ),
            (106, "no \"label\", and there is no teacher to give one"),
            (
                107,
                "\"teacher_logits\" holds something that is not a finite number"
            ),
        ]
    );
    assert_eq!(dataset.checks.ignored_fields, ["sentence"]);
}

#[test]
fn more_than_one_rejected_row_in_ten_is_an_error_that_shows_some() {
    let text = message(load(&spec(rows(json!([
        {"text": "good", "label": "a"},
        {"text": "bad", "label": {"a": 1}},
    ])))));
    assert!(
        text.starts_with("1 of the 2 rows of the list of train rows"),
        "{text}"
    );
    assert!(
        text.contains("train row 2: \"label\" is an object"),
        "{text}"
    );
}

#[test]
fn rejections_are_counted_beyond_those_kept() {
    let mut list: Vec<Value> = (0..300)
        .map(|i| json!({"text": format!("t {i}"), "label": (i % 2).to_string()}))
        .collect();
    list.extend((0..30).map(|_| json!({"text": ""})));
    let dataset = load(&spec(SplitSpec::Rows(list))).unwrap();
    assert_eq!(dataset.checks.rejected, 30);
    assert_eq!(dataset.checks.rejections.len(), MAX_REJECTIONS);
}

#[test]
fn texts_of_a_later_split_are_removed_from_an_earlier_one() {
    let labels = [json!("a"), json!("b")];
    let mut spec = spec(labelled(50, &labels));
    spec.validation = Some(rows(json!([
        {"text": "text 1", "label": "b"},
        {"text": "text 2", "label": "a"},
        {"text": "fresh", "label": "a"},
    ])));
    spec.test = Some(rows(json!([
        {"text": "text 2", "label": "a"},
        {"text": "text 3", "text_pair": "other", "label": "b"},
    ])));
    let dataset = load(&spec).unwrap();
    assert_eq!(
        (
            dataset.train.len(),
            dataset.validation.len(),
            dataset.test.len()
        ),
        (48, 2, 2)
    );
    assert_eq!(dataset.checks.overlap_removed, 3);
    assert!(dataset.checks.cut_from_train.is_empty());

    spec.validation = Some(rows(json!([{"text": "text 2", "label": "a"}])));
    assert!(matches!(
        load(&spec),
        Err(DataError::AllOverlap {
            split: Split::Validation
        })
    ));
}

#[test]
fn duplicates_and_conflicts_are_counted_and_kept() {
    let mut list: Vec<Value> = (0..50)
        .map(|i| json!({"text": format!("t {i}"), "label": if i % 2 == 0 { "a" } else { "b" }}))
        .collect();
    list.extend((0..3).map(|_| json!({"text": "t 0", "label": "a"})));
    list.push(json!({"text": "t 1", "label": "a"}));
    let mut spec = spec(SplitSpec::Rows(list));
    spec.validation = Some(prefixed("v", 10, &[json!("a"), json!("b")]));
    spec.test = Some(prefixed("w", 10, &[json!("a"), json!("b")]));
    let dataset = load(&spec).unwrap();
    assert_eq!(dataset.train.len(), 54);
    assert_eq!(dataset.checks.train.duplicates, 4);
    assert_eq!(dataset.checks.conflicting_labels, 1);
}

#[test]
fn missing_splits_are_cut_by_class_and_the_seed_decides_which_rows() {
    let labels: Vec<Value> = (0..10)
        .map(|i| json!(if i == 0 { "rare" } else { "common" }))
        .collect();
    let spec = spec(labelled(1000, &labels));
    let dataset = load(&spec).unwrap();
    assert_eq!(
        dataset.checks.cut_from_train,
        [Split::Validation, Split::Test]
    );
    for split in [Split::Validation, Split::Test] {
        let counts: Vec<usize> = dataset
            .checks
            .split(split)
            .classes
            .iter()
            .map(|c| c.rows)
            .collect();
        assert_eq!(counts, [90, 10]);
    }
    let texts = |dataset: &Dataset| -> Vec<String> {
        dataset
            .test
            .iter()
            .map(|row| row.input.text.clone())
            .collect()
    };
    assert_eq!(texts(&dataset), texts(&load(&spec).unwrap()));
    let other = Dataset::load(&spec, 43, Teacher::None).unwrap();
    assert_ne!(texts(&dataset), texts(&other));
}

#[test]
fn a_small_class_still_reaches_every_split() {
    let labels: Vec<Value> = (0..100)
        .map(|i| json!(if i < 3 { "rare" } else { "common" }))
        .collect();
    let dataset = load(&spec(labelled(100, &labels))).unwrap();
    for split in Split::ALL {
        assert_eq!(dataset.checks.split(split).classes[1].rows, 1, "{split}");
    }
}

#[test]
fn a_cut_of_a_regression_covers_the_range_of_targets() {
    let targets: Vec<Value> = (0..100).map(|i| json!(i as f64 + 0.5)).collect();
    let dataset = load(&spec(labelled(100, &targets))).unwrap();
    let deciles: BTreeSet<usize> = dataset
        .test
        .iter()
        .map(|row| match row.label {
            Some(Label::Value(value)) => value as usize / 10,
            _ => unreachable!(),
        })
        .collect();
    assert_eq!(deciles.len(), 10);
}

#[test]
fn a_cut_takes_at_most_its_limit() {
    let dataset = load(&spec(labelled(30_000, &[json!("a"), json!("b")]))).unwrap();
    assert_eq!(dataset.test.len(), MAX_CUT);
    assert_eq!(dataset.validation.len(), MAX_CUT);
}

#[test]
fn too_few_rows_to_cut_a_split_from_are_refused() {
    let text = message(load(&spec(labelled(4, &[json!("a"), json!("b")]))));
    assert!(
        text.contains("4 rows with 4 different texts are too few"),
        "{text}"
    );
}

#[test]
fn json_lines_are_read_with_blank_lines_byte_order_mark_and_carriage_returns() {
    let dir = tempfile::tempdir().unwrap();
    let mut content = String::from("\u{feff}");
    for i in 0..40 {
        content.push_str(&format!(
            "{{\"text\": \"t {i}\", \"label\": \"{}\"}}\r\n\n",
            i % 2
        ));
    }
    let dataset = load(&spec(file(dir.path(), "a.jsonl", content))).unwrap();
    assert_eq!(dataset.len(), 40);
    assert_eq!(dataset.checks.rejected, 0);
}

#[test]
fn a_csv_file_is_read_by_its_header() {
    let dir = tempfile::tempdir().unwrap();
    let mut content = String::from("label,idx,text,text_pair,teacher_logits\n");
    for i in 0..40 {
        content.push_str(&format!(
            "{}, {i},\"quoted, \"\"{i}\"\"\nand more\",,\"[1, {i}]\"\n",
            ["x", "y"][i % 2]
        ));
    }
    let dataset = load(&spec(file(dir.path(), "a.csv", content))).unwrap();
    assert_eq!(dataset.label_names, ["x", "y"]);
    let row = find(&dataset, "quoted, \"3\"\nand more");
    assert_eq!(row.input.text_pair, None);
    assert_eq!(row.label, Some(Label::Class(1)));
    assert_eq!(row.teacher_logits, Some(vec![1.0, 3.0]));
    assert_eq!(dataset.checks.ignored_fields, ["idx"]);
}

#[test]
fn quotes_in_a_tsv_file_are_ordinary_characters() {
    let dir = tempfile::tempdir().unwrap();
    let mut content = String::from("text\tlabel\n");
    for i in 0..40 {
        content.push_str(&format!("\"unclosed {i}\t{}\n", ["x", "y"][i % 2]));
    }
    let dataset = load(&spec(file(dir.path(), "a.tsv", content))).unwrap();
    assert_eq!(find(&dataset, "\"unclosed 5").label, Some(Label::Class(1)));
}

#[test]
fn cells_are_numbers_if_all_are_and_a_stray_one_is_rejected() {
    let dir = tempfile::tempdir().unwrap();
    let table = |extra: &str| {
        let mut content = String::from("text,label\n");
        for i in 0..40 {
            content.push_str(&format!("t {i},{}\n", f64::from(i) / 4.0));
        }
        content + extra
    };
    let dataset = load(&spec(file(
        dir.path(),
        "a.csv",
        table("t 41,N/A\nt 42,nan\n"),
    )))
    .unwrap();
    assert_eq!(dataset.task_kind, ProblemType::Regression);
    let reasons: Vec<&str> = dataset
        .checks
        .rejections
        .iter()
        .map(|r| r.reason.as_str())
        .collect();
    assert_eq!(
        reasons,
        [
            "label \"N/A\" is not a number",
            "label \"nan\" is not a number"
        ]
    );
}

#[test]
fn cells_that_are_names_of_the_teacher_are_classes() {
    let dir = tempfile::tempdir().unwrap();
    let mut content = String::from("text,label\n");
    (0..50).for_each(|i| content.push_str(&format!("t {i},{}\n", i % 5 + 1)));
    let known = teacher(
        ProblemType::SingleLabelClassification,
        &["5", "4", "3", "2", "1"],
    );
    let spec = spec(file(dir.path(), "a.csv", content));
    let dataset = Dataset::load(&spec, 1, Teacher::Trained(&known)).unwrap();
    assert_eq!(find(&dataset, "t 0").label, Some(Label::Class(4)));
}

#[test]
fn a_table_without_its_columns_or_with_ragged_rows_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let text = message(load(&spec(file(
        dir.path(),
        "a.csv",
        "sentence,label\nx,a\n",
    ))));
    assert!(
        text.contains("among them \"text\"; it reads \"sentence, label\""),
        "{text}"
    );
    let text = message(load(&spec(file(
        dir.path(),
        "b.csv",
        "text,label,text\nx,a,y\n",
    ))));
    assert!(text.contains("names \"text\" twice"), "{text}");
    let text = message(load(&spec(file(
        dir.path(),
        "c.csv",
        "text,label\nx, y,a\n",
    ))));
    assert!(
        text.contains("3 cells where the header names 2 columns"),
        "{text}"
    );
}

#[test]
fn files_that_are_no_data_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let refused =
        |name: &str, content: &[u8]| message(load(&spec(file(dir.path(), name, content))));
    for name in ["empty.jsonl", "empty.csv"] {
        assert!(refused(name, b"").contains("has no rows"));
    }
    assert!(refused("header.csv", b"text,label\n").contains("has no rows"));
    assert!(refused("a.xlsx", b"PK").contains(".jsonl, .ndjson"));
    assert!(refused("a.json", b"[\n{\"text\": \"x\"}]").contains("one JSON array"));
    let latin1 = b"{\"text\": \"x\"}\n{\"text\": \"caf\xe9\"}\n";
    assert!(refused("latin.jsonl", latin1).contains("not UTF-8 text (line 2)"));
    assert!(refused("latin.csv", b"text,label\ncaf\xe9,a\n").contains("not UTF-8 text (line 2)"));
    assert!(refused("utf16.jsonl", b"\xff\xfe{\0\"\0").contains("UTF-16 text"));

    let missing = SplitSpec::Path(dir.path().join("missing.jsonl"));
    assert!(matches!(load(&spec(missing)), Err(DataError::Read { .. })));
    let folder = dir.path().join("folder.jsonl");
    fs::create_dir(&folder).unwrap();
    assert!(matches!(
        load(&spec(SplitSpec::Path(folder))),
        Err(DataError::NotAFile { .. })
    ));
}

#[test]
fn an_overlong_line_is_rejected_and_the_next_one_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let mut content = format!("{{\"text\": \"{}\"}}\n", "x".repeat(MAX_ROW_BYTES));
    for i in 0..40 {
        content.push_str(&format!(
            "{{\"text\": \"t {i}\", \"label\": \"{}\"}}\n",
            i % 2
        ));
    }
    let dataset = load(&spec(file(dir.path(), "a.jsonl", content))).unwrap();
    assert_eq!(dataset.len(), 40);
    assert_eq!(dataset.checks.rejections[0].line, 1);
    assert!(dataset.checks.rejections[0].reason.contains("longer than"));
}

#[test]
fn a_quote_that_never_closes_is_suspected() {
    let dir = tempfile::tempdir().unwrap();
    let content = format!(
        "text,label\n\"open,a\n{}",
        "x,a\n".repeat(MAX_ROW_BYTES / 4)
    );
    let text = message(load(&spec(file(dir.path(), "a.csv", content))));
    assert!(
        text.contains("line 2") && text.contains("never closes"),
        "{text}"
    );
}

#[test]
fn the_splits_of_the_shipped_tasks_are_read_whole() {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("data");
    for (task, kind, classes, counts) in [
        (
            "movie-sentiment",
            ProblemType::SingleLabelClassification,
            2,
            [8_229, 1_014, 1_073],
        ),
        (
            "movie-rating5",
            ProblemType::SingleLabelClassification,
            5,
            [8_451, 1_055, 1_097],
        ),
        (
            "tweet-valence",
            ProblemType::Regression,
            1,
            [3_351, 428, 421],
        ),
    ] {
        let path = |split: &str| SplitSpec::Path(data.join(task).join(format!("{split}.jsonl")));
        let mut spec = spec(path("train"));
        spec.validation = Some(path("validation"));
        spec.test = Some(path("test"));
        let dataset = load(&spec).unwrap();
        assert_eq!(dataset.task_kind, kind);
        assert_eq!(dataset.label_names.len(), classes);
        assert_eq!(
            [
                dataset.train.len(),
                dataset.validation.len(),
                dataset.test.len()
            ],
            counts,
            "{task}"
        );
        assert_eq!(dataset.checks.rejected, 0);
    }
}

proptest! {
    #[test]
    fn a_cut_loses_no_row_and_never_parts_equal_texts(
        texts in prop::collection::vec((0u8..60, 0u8..3), 20..200),
        seed: u64,
    ) {
        let list = texts
            .iter()
            .map(|(text, label)| json!({"text": text.to_string(), "label": label.to_string()}))
            .collect();
        match Dataset::load(&spec(SplitSpec::Rows(list)), seed, Teacher::None) {
            Ok(dataset) => {
                prop_assert_eq!(dataset.len(), texts.len());
                let mut home = BTreeMap::new();
                for split in Split::ALL {
                    for row in dataset.split(split) {
                        let first = *home.entry(row.input.text.clone()).or_insert(split);
                        prop_assert_eq!(first, split);
                    }
                }
            }
            Err(DataError::OneClass { .. } | DataError::TooFewToCut { .. }) => {}
            Err(error) => prop_assert!(false, "{}", error),
        }
    }

    #[test]
    fn no_file_makes_the_reader_panic(
        content in prop::collection::vec(any::<u8>(), 0..400),
        name in prop::sample::select(vec!["a.jsonl", "a.csv", "a.tsv"]),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let mut bytes = b"text,label\tteacher_logits\n".to_vec();
        bytes.extend(content);
        let _ = load(&spec(file(dir.path(), name, bytes)));
    }
}
