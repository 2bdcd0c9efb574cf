//! `kdlora compare` with tiny encoders: its table, and what a rerun does again.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::common::{Install, letters_or_digits};
use serde_json::{Value, json};

struct Place {
    install: Install,
    folder: tempfile::TempDir,
}

impl Place {
    fn new(spec: Value) -> Self {
        let place = Self {
            install: Install::of("bert-pairs"),
            folder: tempfile::tempdir().expect("a temporary folder"),
        };
        place.ask(spec);
        place
    }

    /// Writes the request; the teacher is the student's own folder.
    fn ask(&self, mut spec: Value) {
        spec["pass"]["teacher"]["model"] = json!(self.install.student());
        fs::write(self.folder.path().join("spec.json"), spec.to_string()).expect("write");
    }

    fn out(&self) -> PathBuf {
        self.folder.path().join("out")
    }

    /// Runs it; what it said it did, line by line, and whether it succeeded.
    fn run(&self) -> (Vec<String>, bool) {
        let output = Command::new(env!("CARGO_BIN_EXE_kdlora"))
            .args(["--log", "warn", "compare", "--threads", "2"])
            .arg("--spec")
            .arg(self.folder.path().join("spec.json"))
            .arg("--student")
            .arg(self.install.student())
            .arg("--out")
            .arg(self.out())
            .output()
            .expect("the program starts");
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        let lines = text.lines().map(str::to_owned).collect();
        (lines, output.status.success())
    }

    fn report(&self) -> Value {
        let text = fs::read(self.out().join("compare.json")).expect("a report");
        serde_json::from_slice(&text).expect("JSON")
    }
}

/// Lines of work: `[1/9] fft-teacher-1: training`.
fn work(lines: &[String]) -> Vec<&str> {
    let named = lines.iter().filter_map(|line| line.strip_prefix('['));
    named
        .filter_map(|line| Some(line.split_once("] ")?.1))
        .collect()
}

fn spec() -> Value {
    json!({
        "pass": {
            "task": "kind",
            "data": {"train": {"rows": letters_or_digits(240)}},
            "teacher": {"finetune": {"mode": "lora", "epochs": 2, "learning_rate": 0.01}},
            "lora": {"r": 2, "alpha": 4, "targets": ["all-linear"]},
            "training": {"epochs": 2, "batch_size": 8, "learning_rate": 0.01, "max_length": 16},
        },
        "seeds": [1, 2],
        "teacher_seeds": [1],
        "full": {
            "teacher": {"epochs": 1, "learning_rate": 0.001},
            "student": {"epochs": 1, "learning_rate": 0.001},
        },
        "variants": [
            {"name": "dora", "patch": {"lora": {"use_dora": true}}},
            {"name": "hidden", "patch": {"training": {"layers": {"hidden": 1.0}}}},
        ],
    })
}

fn score(row: &Value) -> f64 {
    row["mean"].as_f64().expect("a score")
}

#[test]
fn a_comparison_has_all_rows_and_a_rerun_does_what_is_missing() {
    let place = Place::new(spec());
    let (lines, succeeded) = place.run();
    assert!(succeeded, "{lines:#?}");
    let report = place.report();
    let rows = report["rows"].as_array().expect("rows");
    let names: Vec<&str> = rows.iter().filter_map(|row| row["row"].as_str()).collect();
    let expected = [
        "fft-teacher",
        "lora-teacher",
        "fft-student",
        "lora-student",
        "kd-lora-student",
        "dora",
        "hidden",
    ];
    assert_eq!(names, expected);
    for row in rows {
        let name = row["row"].as_str().expect("a name");
        let seeds = row["seeds"].as_array().expect("seeds").len();
        assert_eq!(
            seeds,
            if name.ends_with("teacher") { 1 } else { 2 },
            "{name}"
        );
        assert_eq!(row["deviation"].is_number(), seeds > 1, "{name}");
        assert!(score(row) > 0.2, "{row}");
        let [low, mean] = ["low", "mean"].map(|key| row[key].as_f64().expect("a number"));
        assert!(low <= mean, "{row}");
        assert!(row["training_bytes"].as_u64() > Some(1 << 20), "{row}");
        assert!(
            row["latency"]["batch_1"]["p50_ms"].as_f64() > Some(0.0),
            "{row}"
        );
        let trainable = row["trainable"].as_u64().expect("a number");
        let full = name.starts_with("fft");
        assert_eq!(
            row["parameters"].as_u64() == Some(trainable),
            full,
            "{name}"
        );
        assert_eq!(
            row["over_control"].is_null(),
            !["kd-lora-student", "dora", "hidden"].contains(&name)
        );
    }
    let kept = rows[4]["kept_of_lora"].as_f64().expect("a share");
    assert!((kept - score(&rows[4]) / score(&rows[1])).abs() < 1e-12);
    let table = fs::read_to_string(place.out().join("compare.md")).expect("a table");
    assert!(
        expected
            .iter()
            .all(|name| table.contains(&format!("| {name} |"))),
        "{table}"
    );
    let plot = fs::read_to_string(place.out().join("compare.svg")).expect("a plot");
    assert!(plot.starts_with("<svg ") && plot.contains("kd-lora-student"));

    let again = place.run();
    assert!(again.1 && work(&again.0).is_empty(), "{:#?}", again.0);
    assert_eq!(place.report()["rows"], report["rows"]);

    // A cell that is gone, and only that one, is made anew, with the same result.
    fs::remove_file(place.out().join("cells/dora-2.json")).expect("a cell");
    let (lines, succeeded) = place.run();
    assert!(succeeded);
    assert_eq!(work(&lines), ["dora-2: training", "dora-2: scoring"]);
    assert_eq!(
        place.report()["rows"][5]["seeds"],
        report["rows"][5]["seeds"]
    );

    // Another seed is work for that seed.
    let mut more = spec();
    more["seeds"] = json!([1, 2, 3]);
    more["rows"] = json!(["lora-student"]);
    more["variants"] = json!([]);
    place.ask(more);
    let (lines, succeeded) = place.run();
    assert!(succeeded);
    let done = work(&lines);
    assert_eq!(
        done[..2],
        ["lora-student-3: training", "lora-student-3: scoring"]
    );
    assert!(only_models_of_adapters(&place.out()));
}

#[test]
fn the_metric_of_the_data_is_what_models_are_compared_by() {
    let mut by_mcc = spec();
    by_mcc["pass"]["data"]["metric"] = json!("mcc");
    by_mcc["rows"] = json!(["lora-student"]);
    by_mcc["seeds"] = json!([1]);
    by_mcc["variants"] = json!([]);
    let place = Place::new(by_mcc);
    let (lines, succeeded) = place.run();
    assert!(succeeded, "{lines:#?}");
    let report = place.report();
    assert_eq!(report["metric"], "mcc");
    // No class stands out from an answer that is always the same.
    assert_eq!(report["majority"], 0.0);
    let cell = fs::read(place.out().join("cells/lora-student-1.json")).expect("a cell");
    let cell: Value = serde_json::from_slice(&cell).expect("JSON");
    let evaluation = &cell["evaluation"];
    assert_eq!(evaluation["score"]["metric"], "mcc");
    assert_eq!(evaluation["score"]["value"], evaluation["mcc"]);
    assert_eq!(report["rows"][0]["mean"], evaluation["mcc"]);
}

#[test]
fn answers_that_come_with_rows_are_what_students_learn() {
    let mut given = spec();
    let mut rows = letters_or_digits(240);
    for row in rows.iter_mut().step_by(2) {
        row["teacher_logits"] = json!([3.5, -3.5]);
    }
    given["pass"]["data"]["train"]["rows"] = json!(rows);
    given["rows"] = json!(["lora-teacher", "kd-lora-student"]);
    given["seeds"] = json!([1]);
    given["variants"] = json!([]);
    let place = Place::new(given);
    let (lines, succeeded) = place.run();
    assert!(succeeded, "{lines:#?}");
    let logits = fs::read(place.out().join("logits/lora-teacher-1.json")).expect("logits");
    let logits: Vec<[f64; 2]> = serde_json::from_slice(&logits).expect("JSON");
    let train = place.report()["train_rows"].as_u64().expect("a number") as usize;
    let taken = logits[..train].iter().filter(|row| **row == [3.5, -3.5]);
    // Half of the rows, but for chance in what validation and test are cut from.
    let taken = taken.count();
    assert!(
        taken > train / 3 && taken < train * 2 / 3,
        "{taken} of {train}"
    );
    // Models are scored by what they answer themselves.
    assert!(logits[train..].iter().all(|row| *row != [3.5, -3.5]));
}

#[test]
fn a_control_learns_nothing_from_answers_that_come_with_rows() {
    let mut labelled = letters_or_digits(240);
    let test = labelled.split_off(180);
    let validation = labelled.split_off(120);
    let answered = labelled.iter().map(|row| {
        let text = format!("{} b", row["text"].as_str().expect("a text"));
        json!({"text": text, "teacher_logits": [3.5, -3.5]})
    });
    let more: Vec<Value> = labelled.iter().cloned().chain(answered).collect();
    let scored = |rows: &[Value]| {
        let mut asked = spec();
        asked["pass"]["data"] = json!({
            "train": {"rows": rows},
            "validation": {"rows": validation},
            "test": {"rows": test},
        });
        asked["rows"] = json!(["lora-teacher", "fft-student", "lora-student"]);
        asked["seeds"] = json!([1]);
        asked["variants"] = json!([]);
        let place = Place::new(asked);
        let (lines, succeeded) = place.run();
        assert!(succeeded, "{lines:#?}");
        ["lora-teacher-1", "fft-student-1", "lora-student-1"].map(|name| {
            let cell = fs::read(place.out().join(format!("cells/{name}.json"))).expect("a cell");
            let cell: Value = serde_json::from_slice(&cell).expect("JSON");
            cell["training"]["history"].clone()
        })
    };
    let without = scored(&labelled);
    let trained = |history: &Value| history[0]["loss"].is_number();
    assert!(without.iter().all(trained), "{without:?}");
    assert_eq!(scored(&more), without);
}

/// Whole encoders are not kept.
fn only_models_of_adapters(out: &Path) -> bool {
    let models = fs::read_dir(out.join("models")).expect("models");
    models
        .map(|model| model.expect("a folder").path())
        .all(|model| model.join("adapter_model.safetensors").is_file())
}

#[test]
fn a_request_that_cannot_be_met_is_refused_with_its_reason() {
    let mut wrong = spec();
    wrong["variants"][0]["patch"]["lora"]["r"] = json!(0);
    let place = Place::new(wrong);
    let (lines, succeeded) = place.run();
    assert!(!succeeded);
    let text = lines.join("\n");
    assert!(text.contains("dora") && text.contains("lora.r"), "{text}");
}
