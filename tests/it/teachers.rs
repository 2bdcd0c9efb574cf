//! `POST /admin/tasks/{task}/teacher` with the real processes.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::common::{Install, Server, is_over, job, letters_or_digits, program, queue, teacher};
use serde_json::{Value, json};

fn start(install: &Install, root: &tempfile::TempDir, more: &[&str]) -> Server {
    let mut command = install.command();
    command.arg("--data-root").arg(root.path()).args(more);
    Server::start(&mut command)
}

/// A version of `kind` that has learnt from the teacher.
async fn distilled(server: &Server) {
    let rows: Vec<_> = (0..60)
        .map(|i| json!({"text": format!("{} {} a", char::from(b'a' + i % 8), 1 + i % 7)}))
        .collect();
    let spec = json!({
        "task": "kind",
        "data": {"train": {"rows": rows}},
        "teacher": {"model": "teacher"},
        "training": {"epochs": 1, "max_length": 16},
        "gate": {"keep": 0.0},
    });
    let path = queue(server, &spec).await;
    let job = job(server, &path, is_over).await;
    assert_eq!(job["state"], "succeeded", "{job}");
}

async fn ask(server: &Server, body: Value) -> (u16, Value) {
    server.post("/admin/tasks/kind/teacher", &body).await
}

#[tokio::test]
async fn the_teacher_of_a_version_answers_and_stays_in_memory() {
    let install = Install::new();
    let root = teacher(&install);
    let server = start(&install, &root, &[]);
    distilled(&server).await;
    let texts = json!({"inputs": ["a b 1", {"text": "a", "text_pair": "2"}], "version": 1});
    let (status, first) = ask(&server, texts.clone()).await;
    assert_eq!(status, 200, "{first}");
    assert_eq!(first["version"], 1);
    assert!(
        first["teacher"]
            .as_str()
            .is_some_and(|name| name.ends_with("/teacher")),
        "{first}"
    );
    let predictions = first["predictions"].as_array().expect("a list");
    assert_eq!(predictions.len(), 2);
    let scores = predictions[0]["scores"].as_object().expect("scores");
    let sum: f64 = scores.values().filter_map(Value::as_f64).sum();
    assert!((sum - 1.0).abs() < 1e-5, "{first}");
    assert!(first["load_ms"].as_f64().is_some_and(|ms| ms > 0.0));
    let (_, second) = ask(&server, texts).await;
    assert_eq!(second["load_ms"], Value::Null, "it is in memory");
    assert_eq!(second["predictions"], first["predictions"]);

    // Its weights are gone: what is in memory answers on, the next server says so.
    drop(server);
    fs::remove_file(root.path().join("teacher/model.safetensors")).expect("a file");
    let server = start(&install, &root, &[]);
    let (status, problem) = ask(&server, json!({"inputs": "a", "version": 1})).await;
    assert_eq!(status, 422, "{problem}");
    let detail = problem["detail"].as_str().expect("a sentence");
    assert!(detail.contains("not on this machine"), "{detail}");
}

#[tokio::test]
async fn what_cannot_be_asked_is_refused_with_a_reason() {
    let install = Install::new();
    let root = teacher(&install);
    let server = start(&install, &root, &["--teacher-memory", "1KiB"]);
    distilled(&server).await;
    for (task, body, status, word) in [
        (
            "kind",
            json!({"inputs": "a", "version": 1}),
            422,
            "--teacher-memory allows 1024",
        ),
        ("kind", json!({"inputs": "a", "version": 9}), 404, "9"),
        ("kind", json!({"inputs": [], "version": 1}), 422, "empty"),
        (
            "kind",
            json!({"inputs": vec!["a"; 17], "version": 1}),
            413,
            "16",
        ),
        ("pairs", json!({"inputs": "a"}), 422, "no report"),
        ("none", json!({"inputs": "a"}), 404, "none"),
    ] {
        let path = format!("/admin/tasks/{task}/teacher");
        let (got, problem) = server.post(&path, &body).await;
        assert_eq!(got, status, "{task}: {problem}");
        let detail = problem["detail"].as_str().expect("a sentence");
        assert!(detail.contains(word), "{detail}");
    }
    let (status, known) = server.get("/admin/teachers").await;
    assert_eq!(status, 200);
    let encoders = known["encoders"].as_array().expect("a list");
    assert!(
        encoders
            .iter()
            .any(|encoder| encoder["name"] == "mpnet-base")
    );
    assert_eq!(known["adapters"], json!([]));
}

/// Runs `kdlora distill`, whose folder `out` is to be.
fn distilled_by_hand(install: &Install, spec: &Value, out: &Path, options: &[&str]) {
    let path = out.with_extension("spec");
    fs::write(&path, spec.to_string()).expect("write");
    let output = Command::new(program())
        .args(["--log", "warn", "distill", "--spec"])
        .arg(&path)
        .arg("--student")
        .arg(install.student())
        .arg("--out")
        .arg(out)
        .args(options)
        .output()
        .expect("it runs");
    assert!(output.status.success(), "{output:?}");
}

#[test]
fn a_teacher_is_not_asked_for_rows_that_bring_its_logits() {
    let install = Install::new();
    let root = teacher(&install);
    let folder = tempfile::tempdir().expect("a folder");
    let rows: Vec<Value> = (0..60)
        .map(|i| {
            let text = format!("{} {} a", char::from(b'a' + i % 8), 1 + i % 7);
            match i % 2 {
                0 => json!({"text": text, "teacher_logits": [1.0, -1.0]}),
                _ => json!({"text": text}),
            }
        })
        .collect();
    let spec = json!({
        "task": "kind",
        "data": {"train": {"rows": rows}},
        "teacher": {"model": root.path().join("teacher")},
        "training": {"epochs": 1, "max_length": 16},
    });
    let cache = folder.path().join("cache");
    let options = ["--state-cache", cache.to_str().expect("a path")];
    distilled_by_hand(&install, &spec, &folder.path().join("out"), &options);
    let files = fs::read_dir(cache).expect("a cache");
    let files: Vec<_> = files.map(|file| file.expect("a file").path()).collect();
    assert_eq!(files.len(), 1);
    let lines = fs::read_to_string(&files[0]).expect("answers");
    let answers = lines.lines().filter(|line| !line.is_empty()).count();
    assert_eq!(answers, 28, "of 30 rows, two texts stand there twice");
}

/// A pass whose validation rows have the other one's label each: the teacher can only be wrong.
#[test]
fn the_report_says_if_the_teacher_has_learnt_the_labels() {
    let install = Install::of("bert-pairs");
    let mut rows = letters_or_digits(260);
    let mut validation = rows.split_off(200);
    for row in &mut validation {
        let other = match row["label"].as_str() {
            Some("letters") => "digits",
            _ => "letters",
        };
        row["label"] = json!(other);
    }
    let folder = tempfile::tempdir().expect("a folder");
    let warnings = |more: usize| {
        let without_labels = (0..more).map(|i| json!({"text": format!("a {i}")}));
        let train: Vec<Value> = rows.iter().cloned().chain(without_labels).collect();
        let spec = json!({
            "task": "kind",
            "data": {
                "train": {"rows": train},
                "validation": {"rows": validation},
                "test": {"rows": [{"text": "a d 1", "label": "letters"}]},
            },
            "teacher": {
                "model": install.student(),
                "finetune": {"mode": "full", "epochs": 4, "learning_rate": 0.003},
            },
            "training": {"epochs": 1, "batch_size": 16, "max_length": 16},
        });
        let out = folder.path().join(more.to_string());
        distilled_by_hand(&install, &spec, &out, &[]);
        let report = fs::read(out.join("report.json")).expect("a report");
        let report: Value = serde_json::from_slice(&report).expect("JSON");
        report["data"]["checks"]["warnings"].to_string()
    };
    let all_labelled = warnings(0);
    assert!(all_labelled.contains("has learnt"), "{all_labelled}");
    let few_labelled = warnings(400);
    assert!(!few_labelled.contains("has learnt"), "{few_labelled}");
}
