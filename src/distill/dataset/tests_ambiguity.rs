//! Nothing is reinterpreted in silence: what can be read in two ways is an error or a warning.

use std::path::Path;

use serde_json::{Value, json};

use super::tests::{file, golden, load, message};
use super::*;
use crate::distill::spec::ColumnSpec;

const SINGLE: Option<ProblemType> = Some(ProblemType::SingleLabelClassification);

fn rows(labels: &[Value]) -> SplitSpec {
    let row = |i: usize| json!({"text": format!("t {i}"), "label": labels[i % labels.len()]});
    SplitSpec::Rows((0..60).map(row).collect())
}

/// A table whose labels come in turn from `labels`.
fn csv(dir: &Path, labels: &[&str]) -> DataSpec {
    let mut text = String::from("text,label\n");
    (0..60).for_each(|i| text += &format!("t {i},{}\n", labels[i % labels.len()]));
    DataSpec::of(file(dir, "rows.csv", text))
}

fn table(dir: &Path, name: &str, text: impl AsRef<[u8]>) -> Result<Dataset, DataError> {
    load(&DataSpec::of(file(dir, name, text)))
}

/// Lines of a table of two classes, with `line` as the fifth row.
fn with_line(separator: &str, line: &str) -> String {
    let mut text = format!("text{separator}label\n");
    for i in 0..40 {
        if i == 4 {
            text += &format!("{line}\n");
        }
        text += &format!("t {i}{separator}{}\n", ["pos", "neg"][i % 2]);
    }
    text
}

fn labels_of(data: &Dataset, text: &str) -> Vec<String> {
    let row = data.rows().find(|row| row.input.text == text);
    match row.and_then(|row| row.label.as_ref()) {
        Some(Label::Class(class)) => vec![data.label_names[*class].clone()],
        Some(Label::Labels(labels)) => labels
            .iter()
            .map(|&label| data.label_names[label].clone())
            .collect(),
        Some(Label::Value(value)) => vec![value.to_string()],
        None => Vec::new(),
    }
}

fn class(i: usize) -> &'static str {
    ["a", "b"][i % 2]
}

fn warnings(spec: &DataSpec) -> String {
    load(spec).unwrap().checks.warnings.join("\n")
}

#[test]
fn whole_numbers_of_any_kind_are_refused_until_their_meaning_is_given() {
    let dir = tempfile::tempdir().unwrap();
    for (labels, shown) in [
        (vec![json!(0.0), json!(1.0)], "(0 to 1)"),
        (vec![json!(0), json!(1.0), json!(2)], "(0 to 2)"),
        (vec![json!(1), json!(2), json!(3), json!(4)], "(1 to 4)"),
        (vec![json!(-1), json!(1)], "(-1, 1)"),
        (vec![json!(-1e0), json!(-0.0), json!(1)], "(-1 to 1)"),
        (vec![json!(101), json!(205), json!(999)], "(101, 205, 999)"),
        (
            vec![json!(9007199254740993i64), json!(18014398509481985i64)],
            "(9007199254740993, 18014398509481985)",
        ),
    ] {
        let cells: Vec<String> = labels.iter().map(ToString::to_string).collect();
        let cells: Vec<&str> = cells.iter().map(String::as_str).collect();
        let mut missing = cells.clone();
        missing.extend(["nan", cells[0], cells[1]]);
        let specs = [
            DataSpec::of(rows(&labels)),
            csv(dir.path(), &cells),
            csv(dir.path(), &missing),
        ];
        for spec in specs {
            let text = message(load(&spec));
            for part in [shown, "\"problem_type\"", "\"labels\""] {
                assert!(text.contains(part), "{labels:?}: {text}");
            }
        }
        let mut regression = DataSpec::of(rows(&labels));
        regression.problem_type = Some(ProblemType::Regression);
        assert_eq!(
            load(&regression).unwrap().task_kind,
            ProblemType::Regression
        );
    }
}

#[test]
fn more_whole_numbers_than_classes_are_targets() {
    let row = |i: usize| json!({"text": format!("t {i}"), "label": 3 * i});
    let many = SplitSpec::Rows((0..=MAX_LABELS).map(row).collect());
    assert_eq!(
        load(&DataSpec::of(many)).unwrap().task_kind,
        ProblemType::Regression
    );
}

#[test]
fn ids_of_20_digits_are_not_taken_for_equal_numbers() {
    let ids = [18446744073709551614u64, 18446744073709551615];
    let text = message(load(&DataSpec::of(rows(&ids.map(|id| json!(id))))));
    assert!(text.contains("write it as a string"), "{text}");
    let dir = tempfile::tempdir().unwrap();
    let data = load(&csv(
        dir.path(),
        &ids.map(|id| id.to_string()).each_ref().map(|id| &**id),
    ));
    assert_eq!(data.unwrap().label_names, ids.map(|id| id.to_string()));
}

#[test]
fn the_number_1_is_one_class_however_it_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let json = DataSpec::of(rows(&[json!(0), json!(1.0), json!(0.0), json!(1)]));
    for mut spec in [json, csv(dir.path(), &["0", "1.0", "0.0", "1"])] {
        spec.problem_type = SINGLE;
        let data = load(&spec).unwrap();
        assert_eq!(data.label_names, ["0", "1"]);
        assert_eq!(labels_of(&data, "t 1"), ["1"]);
        for names in [["no", "yes"], ["0", "1"], ["0.0", "1.0"]] {
            spec.problem_type = None;
            spec.labels = Some(names.map(str::to_owned).to_vec());
            let data = load(&spec).unwrap();
            assert_eq!(labels_of(&data, "t 1"), [names[1]]);
            assert_eq!(labels_of(&data, "t 2"), [names[0]]);
        }
    }
    let mut signs = DataSpec::of(rows(&[json!(-1.0), json!(1)]));
    signs.problem_type = SINGLE;
    assert_eq!(load(&signs).unwrap().label_names, ["-1", "1"]);
}

#[test]
fn numbers_that_do_not_fit_the_names_are_not_moved_to_their_neighbours() {
    let names = |names: &[&str]| Some(names.iter().map(ToString::to_string).collect());
    // A rare class must not be the only one that is noticed.
    let mut labels = vec![json!(1), json!(2), json!(3)];
    labels.extend((0..12).map(|i| json!(1 + i % 3)));
    labels.push(json!(4));
    let mut spec = DataSpec::of(rows(&labels));
    spec.labels = names(&["bad", "fair", "good", "best"]);
    let text = message(load(&spec));
    assert!(
        text.contains("train row 16: label 4 does not count from 0 in the 4 label names"),
        "{text}"
    );
    spec.labels = names(&["1", "2", "3", "best"]);
    assert!(message(load(&spec)).contains("do not match those of the request"));
    spec.labels = names(&["none", "bad", "fair", "good", "best"]);
    assert!(
        warnings(&spec).contains("no label is 0"),
        "{}",
        warnings(&spec)
    );
}

#[test]
fn numbers_count_in_the_names_of_the_request_though_the_teacher_has_another_order() {
    let teacher = KnownTask {
        problem_type: ProblemType::SingleLabelClassification,
        labels: vec!["yes".into(), "no".into()],
    };
    let mut spec = DataSpec::of(rows(&[json!(0), json!(1)]));
    let data = Dataset::load(&spec, 1, Teacher::Trained(&teacher)).unwrap();
    assert_eq!(labels_of(&data, "t 0"), ["yes"]);
    spec.labels = Some(vec!["no".into(), "yes".into()]);
    let data = Dataset::load(&spec, 1, Teacher::Trained(&teacher)).unwrap();
    assert_eq!(data.label_names, ["yes", "no"]);
    assert_eq!(labels_of(&data, "t 0"), ["no"]);
}

#[test]
fn quotes_that_swallow_rows_are_refused_with_their_line() {
    let dir = tempfile::tempdir().unwrap();
    let cases = [
        ("\"t opens,pos", "line 6 ", "never closes"),
        ("t,\"pos", "line 6 ", "never closes"),
        ("\"t opens,pos\n\"and again\",neg", "line 6 ", "line 7"),
        (
            "\"t opens,pos\nt,neg\nand closes\",neg",
            "line 6 ",
            "read like rows",
        ),
        (
            "\"t opens,pos\nand closes\",neg",
            "line 6 ",
            "read like rows",
        ),
        (
            "\"t opens,pos\r\nand closes\",neg",
            "line 6 ",
            "read like rows",
        ),
        ("\"say \"yes\"\",pos", "line 6 ", "behind the quote"),
        ("\"say \\\"yes\\\"\",pos", "line 6 ", "behind the quote"),
        ("\"t\" ,pos", "line 6 ", "behind the quote"),
    ];
    for (line, place, reason) in cases {
        let text = message(table(dir.path(), "a.csv", with_line(",", line)));
        assert!(
            text.contains(place) && text.contains(reason),
            "{line}: {text}"
        );
    }
    let label_first = "label,text\npos,a\nneg,\"b\npos,c\nneg,d\"\npos,e\nneg,f\n";
    let text = message(table(dir.path(), "b.csv", label_first));
    assert!(
        text.contains("line 3") && text.contains("read like rows"),
        "{text}"
    );
}

#[test]
fn texts_of_several_lines_with_commas_and_quotes_are_read() {
    let dir = tempfile::tempdir().unwrap();
    let texts = [
        "first, and\nsecond, or\nthird",
        "he said, \"\"pos\"\",\nand left",
        "rated it, pos\n\nas ever,\nbut, no",
        "\"\"\n\"\"",
    ];
    for text in texts {
        let line = format!("\"{text}\",pos");
        let data = table(dir.path(), "a.csv", with_line(",", &line)).unwrap();
        assert_eq!(data.len(), 41);
        assert_eq!(labels_of(&data, &text.replace("\"\"", "\"")), ["pos"]);
    }
}

#[test]
fn line_ends_of_every_system_are_read() {
    let dir = tempfile::tempdir().unwrap();
    for end in ["\n", "\r\n", "\r"] {
        let text = with_line(",", "\"two\nlines\",pos").replace('\n', end);
        let text = format!("\u{feff}{text}");
        let data = table(dir.path(), "a.csv", text).unwrap();
        assert_eq!((data.len(), data.checks.rejected), (41, 0), "{end:?}");
        assert_eq!(labels_of(&data, &format!("two{end}lines")), ["pos"]);
    }
    let lines = "{\"text\": \"a\", \"label\": \"x\"}\r{\"text\": \"b\", \"label\": \"y\"}\r";
    let text = message(table(dir.path(), "a.jsonl", lines));
    assert!(text.contains("end in CR alone"), "{text}");
}

#[test]
fn a_row_with_spaces_before_a_quote_is_rejected() {
    let dir = tempfile::tempdir().unwrap();
    let data = table(dir.path(), "a.csv", with_line(",", "t, \"pos\"")).unwrap();
    assert_eq!(data.checks.rejections[0].line, 6);
    assert!(
        data.checks.rejections[0]
            .reason
            .contains("spaces before the quote")
    );
}

#[test]
fn quotes_of_csv_in_a_tsv_file_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let cases = [
        ("\"He said \"\"no\"\"\"\tpos", 6),
        ("t\t\"\"\"pos\"\"\"", 6),
        ("\"two\nlines\"\tpos", 6),
        ("\"a\ttab\"\tpos", 6),
        ("t\t\"[\"\"pos\"\"]\"", 6),
    ];
    for (line, place) in cases {
        let text = message(table(dir.path(), "a.tsv", with_line("\t", line)));
        assert!(
            text.contains(&format!("in quotes (line {place})")),
            "{line}: {text}"
        );
        assert!(text.contains("QUOTE_NONE"), "{text}");
    }
    let all = "\"text\"\t\"label\"\n\"a\"\t\"x\"\n\"b\"\t\"y\"\n";
    assert!(message(table(dir.path(), "b.tsv", all)).contains("in quotes (line 1)"));
    let texts = "text\tlabel\n\"a\"\tx\n\"b\"\ty\n\"c\"\tx\n\"d\"\ty\n";
    assert!(message(table(dir.path(), "c.tsv", texts)).contains("in quotes"));
}

#[test]
fn ordinary_quotes_in_a_tsv_file_are_text() {
    let dir = tempfile::tempdir().unwrap();
    for line in [
        "\"Yes\" he said\tpos",
        "\"Yes\"\tpos",
        "5\" wide\tpos",
        "say \"\"yes\"\"\tpos",
    ] {
        let data = table(dir.path(), "a.tsv", with_line("\t", line)).unwrap();
        assert_eq!(labels_of(&data, line.trim_end_matches("\tpos")), ["pos"]);
    }
}

#[test]
fn other_separators_are_named() {
    let dir = tempfile::tempdir().unwrap();
    for (name, separator, shown) in [
        ("a.csv", ";", "';' instead of ','"),
        ("a.csv", "\t", "'\\t' instead of ','"),
        ("a.csv", "|", "'|' instead of ','"),
        ("a.tsv", ",", "',' instead of '\\t'"),
        ("a.tsv", ";", "';' instead of '\\t'"),
    ] {
        let text = message(table(dir.path(), name, with_line(separator, "")));
        assert!(text.contains(shown), "{text}");
    }
}

#[test]
fn a_list_that_is_written_as_text_is_no_class() {
    let dir = tempfile::tempdir().unwrap();
    for label in [
        "['pos']",
        "['a', 'b']",
        "[\"it's\", 'b']",
        "('a',)",
        "{'a', 'b'}",
        "['a' 'b']",
        "[a, b]",
        "[]",
        "()",
    ] {
        let lines = rows(&[json!("pos"), json!(label)]);
        let text = message(load(&DataSpec::of(lines)));
        assert!(text.contains("list written as text"), "{label}: {text}");
        if label != "[]" {
            let cell = format!("\"{}\"", label.replace('"', "\"\""));
            let text = message(load(&csv(dir.path(), &["pos", &cell])));
            assert!(text.contains("list written as text"), "{label}: {text}");
        }
    }
    let several = csv(
        dir.path(),
        &["\"[\"\"a\"\", \"\"b\"\"]\"", "\"[\"\"b\"\"]\"", "[]"],
    );
    let data = load(&several).unwrap();
    assert_eq!(data.task_kind, ProblemType::MultiLabelClassification);
    assert_eq!(labels_of(&data, "t 0"), ["a", "b"]);
    let brackets = load(&csv(dir.path(), &["[spam]", "(ham)"])).unwrap();
    assert_eq!(brackets.label_names, ["(ham)", "[spam]"]);
}

#[test]
fn classes_that_are_not_what_they_seem_are_told_of() {
    for (labels, part) in [
        (
            vec!["pos", "neg", "nan"],
            "\"nan\" (20 rows) reads like a missing value",
        ),
        (vec!["pos", "neg", "None"], "\"None\" (20 rows)"),
        (vec!["pos", "neg", "N/A"], "\"N/A\" (20 rows)"),
        (
            vec!["POS", "pos", "neg"],
            "\"POS\" and \"pos\" differ only in",
        ),
        (
            vec!["caf\u{e9}", "cafe\u{301}"],
            "\"cafe\\u{301}\" and \"caf\\u{e9}\"",
        ),
        (
            vec!["pos", "p\u{200b}os", "neg"],
            "\"pos\" and \"p\\u{200b}os\"",
        ),
        (vec!["pos", "\u{feff}pos", "neg"], "\"\\u{feff}pos\""),
        (vec!["pos", "po\u{ad}s", "neg"], "\"po\\u{ad}s\""),
        (
            vec!["very good", "very\u{a0}good", "bad"],
            "\"very\\u{a0}good\"",
        ),
        (
            vec!["very good", "very  good", "bad"],
            "\"very  good\" and \"very good\"",
        ),
        (vec!["\u{ff30}\u{ff2f}\u{ff33}", "pos"], "\\u{ff30}"),
        (vec!["1", "1.0", "x"], "\"1\" and \"1.0\""),
        (vec!["a", "b", "a|b"], "\"a|b\" is made of other classes"),
        (vec!["a", "b", "a, b"], "\"a, b\" is made of other classes"),
        (vec!["0.5", "1.25"], "written as text"),
        (vec!["0,5", "1,25"], "written as text"),
        (vec!["\"pos\"", "neg"], "quotes of the class \"pos\""),
    ] {
        let labels: Vec<Value> = labels.iter().map(|label| json!(label)).collect();
        let told = warnings(&DataSpec::of(rows(&labels)));
        assert!(told.contains(part), "{labels:?}: {told}");
    }
    let mut once: Vec<Value> = (0..60).map(|i| json!(class(i))).collect();
    once[59] = json!("nge");
    let told = warnings(&DataSpec::of(rows(&once)));
    assert!(
        told.contains("only one row has the label \"nge\""),
        "{told}"
    );

    let plain = warnings(&DataSpec::of(rows(&[json!("pos"), json!("neg")])));
    assert!(!plain.contains("class"), "{plain}");
    let mut meant = DataSpec::of(rows(&[json!("none"), json!("spam")]));
    meant.labels = Some(vec!["none".into(), "spam".into()]);
    assert!(
        !warnings(&meant).contains("missing"),
        "{}",
        warnings(&meant)
    );
}

#[test]
fn names_that_only_look_like_those_of_the_request_are_refused_with_a_reason() {
    for label in ["POS", "p\u{200b}os", "\u{ff30}os"] {
        let mut spec = DataSpec::of(rows(&[json!(label), json!("neg")]));
        spec.labels = Some(vec!["neg".into(), "pos".into()]);
        let text = message(load(&spec));
        assert!(text.contains("invisible characters count"), "{text}");
    }
}

#[test]
fn columns_that_are_not_read_are_named_with_the_setting_for_them() {
    for column in ["labels", "sentence", "review", "Text", "Kommentar"] {
        let row =
            |i: usize| json!({"text": format!("t {i}"), "label": class(i), "id": i, column: "x"});
        let mut spec = DataSpec::of(SplitSpec::Rows((0..60).map(row).collect()));
        let told = warnings(&spec);
        let part = format!("not read: \"{column}\"; ");
        assert!(
            told.contains(&part) && told.contains("data.columns"),
            "{told}"
        );
        spec.columns = Some(ColumnSpec {
            text: Some("text".into()),
            label: Some("label".into()),
            ..ColumnSpec::default()
        });
        assert!(!warnings(&spec).contains("not read"));
    }
    let numbered = |i: usize| json!({"text": format!("t {i}"), "label": class(i), "idx": i});
    let told = warnings(&DataSpec::of(SplitSpec::Rows(
        (0..60).map(numbered).collect(),
    )));
    assert!(!told.contains("not read"), "{told}");

    let labels = |i: usize| json!({"text": format!("t {i}"), "labels": class(i)});
    let rows = SplitSpec::Rows((0..60).map(labels).collect());
    for error in [
        message(load(&DataSpec::of(rows.clone()))),
        message(Dataset::load(&DataSpec::of(rows), 1, Teacher::Untrained)),
    ] {
        assert!(
            error.contains("\"labels\"") && error.contains("data.columns"),
            "{error}"
        );
    }
}

#[test]
fn a_file_of_another_format_is_called_by_its_name() {
    let dir = tempfile::tempdir().unwrap();
    for (content, what) in [
        (
            &b"\x1f\x8b\x08\0more"[..],
            "compressed with gzip; decompress",
        ),
        (b"PK\x03\x04more", "Excel workbook"),
        (b"\xd0\xcf\x11\xe0more", "Excel workbook"),
        (b"\x28\xb5\x2f\xfdmore", "zstd"),
        (b"PAR1\x15more", "Parquet"),
        (b"\xff\xfet\0e\0", "UTF-16 text"),
        (b"\xfe\xff\0t\0e", "UTF-16 text"),
        (b"t\0e\0x\0t\0,\0l\0", "NUL byte (line 1)"),
        (b"text,label\na,x\nb\0,y\n", "NUL byte (line 3)"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
    ] {
        let text = message(table(dir.path(), "a.csv", content));
        assert!(
            text.contains(what.split(';').next().unwrap_or(what)),
            "{what}: {text}"
        );
    }
    for name in ["a.jsonl", "a.tsv", "a.parquet"] {
        let text = message(table(dir.path(), name, b"\x1f\x8b\x08\0more"));
        assert!(text.contains("compressed with gzip"), "{text}");
    }
    for array in [
        "[{\"text\": \"a\", \"label\": \"x\"}]\n",
        "\n [\n{\"text\": \"a\"}]",
    ] {
        assert!(message(table(dir.path(), "a.json", array)).contains("one JSON array"));
    }
    let text = message(table(
        dir.path(),
        "a.jsonl",
        "{\"text\": \"a\", \"label\": NaN}\n",
    ));
    assert!(text.contains("JSON has no NaN"), "{text}");
}

#[test]
fn a_header_has_a_greatest_length() {
    let dir = tempfile::tempdir().unwrap();
    let text = message(table(dir.path(), "a.csv", ",".repeat(8 << 20)));
    assert!(text.contains("longer than 1048576 bytes"), "{text}");
    let names = format!("text,label{}\n", ",".repeat(MAX_COLUMNS));
    let text = message(table(dir.path(), "a.csv", names));
    assert!(text.contains("it names 10002 columns"), "{text}");
    let rows = format!("text,label\n{}\n", ",".repeat(1 << 19));
    let text = message(table(dir.path(), "a.csv", rows));
    assert!(
        text.contains("524289 cells where the header names 2"),
        "{text}"
    );
}

fn parquet(name: &str) -> DataSpec {
    DataSpec::of(SplitSpec::Path(golden(name)))
}

#[test]
fn class_ids_of_a_parquet_file_have_the_names_that_it_gives_them() {
    let data = load(&parquet("classes.parquet"));
    // Rows without a label are two of 24, which is less than one in ten.
    let data = data.unwrap();
    assert_eq!(data.label_names, ["negative", "positive"]);
    assert_eq!(labels_of(&data, "text 1"), ["positive"]);
    let lines: Vec<usize> = data.checks.rejections.iter().map(|row| row.line).collect();
    assert_eq!(lines, [6, 8]);

    let several = load(&parquet("lists-of-classes.parquet")).unwrap();
    assert_eq!(several.task_kind, ProblemType::MultiLabelClassification);
    assert_eq!(labels_of(&several, "text 1"), ["negative", "positive"]);

    let text = message(load(&parquet("beyond-classes.parquet")));
    assert!(
        text.contains("has the class 2, but 2 class names"),
        "{text}"
    );
}

#[test]
fn names_of_a_parquet_file_go_by_name_and_not_by_the_order_of_the_request() {
    let mut spec = parquet("classes.parquet");
    spec.labels = Some(vec!["positive".into(), "negative".into()]);
    let data = load(&spec).unwrap();
    assert_eq!(labels_of(&data, "text 1"), ["positive"]);

    spec.labels = Some(vec!["bad".into(), "good".into()]);
    let data = load(&spec).unwrap();
    assert_eq!(labels_of(&data, "text 1"), ["good"]);
    let told = data.checks.warnings.join("\n");
    assert!(
        told.contains("\"bad\", \"good\"") && told.contains("\"negative\""),
        "{told}"
    );

    spec.labels = Some(vec!["bad".into(), "fair".into(), "good".into()]);
    let text = message(load(&spec));
    assert!(
        text.contains("they are \"negative\", \"positive\""),
        "{text}"
    );

    let teacher = KnownTask {
        problem_type: ProblemType::SingleLabelClassification,
        labels: vec!["LABEL_0".into(), "LABEL_1".into()],
    };
    let mut spec = parquet("classes.parquet");
    let text = message(Dataset::load(&spec, 1, Teacher::Trained(&teacher)));
    assert!(
        text.contains("do not match") && text.contains("\"labels\""),
        "{text}"
    );
    spec.labels = Some(teacher.labels.clone());
    let data = Dataset::load(&spec, 1, Teacher::Trained(&teacher)).unwrap();
    assert_eq!(labels_of(&data, "text 1"), ["LABEL_1"]);

    let mut spec = parquet("classes.parquet");
    spec.problem_type = Some(ProblemType::Regression);
    assert_eq!(labels_of(&load(&spec).unwrap(), "text 1"), ["1"]);
}

#[test]
fn values_of_parquet_keep_their_kind() {
    let columns = |label: &str| {
        Some(ColumnSpec {
            label: Some(label.into()),
            ..ColumnSpec::default()
        })
    };
    for label in ["half", "decimal"] {
        let mut spec = parquet("types.parquet");
        spec.columns = columns(label);
        let data = load(&spec).unwrap();
        assert_eq!(data.task_kind, ProblemType::Regression, "{label}");
        assert_eq!(labels_of(&data, "text 3"), ["0.75"]);
    }
    let mut spec = parquet("types.parquet");
    spec.columns = columns("struct");
    assert!(message(load(&spec)).contains("\"label\" is an object"));
    spec.columns = columns("bytes");
    assert!(message(load(&spec)).contains("column \"bytes\": it holds bytes"));
}
