//! Which student a version belongs to: what is refused, what is said, what is remembered.

use std::fs;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::common::{
    Install, Server, golden, is_over, job, kdlora_adapter, letters_or_digits, printed, program,
    queue, refused,
};
use rustix::process::Signal;
use safetensors::SafeTensors;
use serde_json::{Value, json};

const MISMATCH: &str = "urn:kdlora:problem:student-mismatch";

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

/// Changes the sign of one number in the layers of an encoder, or in an adapter.
fn flip(path: &Path) {
    let mut bytes = fs::read(path).expect("the weights");
    let tensors = SafeTensors::deserialize(&bytes).expect("safetensors");
    let (_, tensor) = tensors
        .iter()
        .find(|(name, _)| name.contains("encoder.layer.0"))
        .expect("a layer");
    let place = tensor.data().as_ptr() as usize - bytes.as_ptr() as usize;
    bytes[place + 3] ^= 0x80;
    fs::write(path, bytes).expect("write");
}

/// A student of the same shape with other weights, in a folder called `other`.
fn other_student(install: &Install) -> PathBuf {
    let other = install.student().with_file_name("other");
    fs::create_dir_all(&other).expect("a folder");
    for entry in fs::read_dir(install.student()).expect("the student") {
        let entry = entry.expect("a file");
        fs::copy(entry.path(), other.join(entry.file_name())).expect("a copy");
    }
    flip(&other.join("model.safetensors"));
    other
}

/// Distils a version of the task `kind`, which goes live.
async fn distil(server: &Server) -> Value {
    let spec = json!({
        "task": "kind",
        "data": {"train": {"rows": letters_or_digits(300)}},
        "lora": {"r": 4, "alpha": 8, "targets": ["all-linear"]},
        "training": {"epochs": 4, "batch_size": 8, "learning_rate": 0.01, "max_length": 16},
        "promote": true,
    });
    let path = queue(server, &spec).await;
    let job = job(server, &path, is_over).await;
    assert_eq!(job["state"], "succeeded", "{job}");
    job
}

async fn classify(server: &Server, task: &str) -> (u16, Value) {
    let body = json!({"inputs": "a b c", "raw_scores": true});
    server.post(&format!("/v1/classify/{task}"), &body).await
}

fn stop(server: Server) {
    server.signal(Signal::TERM);
    assert!(server.ended().success());
}

/// Starts a server whose log can be read when it has been stopped.
fn start_logged(command: &mut Command) -> Server {
    Server::start(command.stderr(Stdio::piped()))
}

/// The log of a server, which is stopped.
fn log_of(mut server: Server) -> String {
    let mut stderr = server.take_stderr();
    stop(server);
    let mut log = String::new();
    stderr.read_to_string(&mut log).expect("text");
    log
}

async fn metric(server: &Server, student: &str) -> String {
    let (_, metrics) = server.get("/metrics").await;
    let series = format!("kdlora_task_students{{student=\"{student}\"}} ");
    let metrics = metrics.as_str().expect("text").to_owned();
    let value = metrics.lines().find_map(|line| line.strip_prefix(&series));
    value.expect("the series").to_owned()
}

fn assert_names_both(detail: &Value) {
    let detail = detail.as_str().expect("a sentence");
    for name in ["student (", "other ("] {
        assert!(detail.contains(name), "{name} in {detail}");
    }
    assert!(!detail.contains('/'), "a path in {detail}");
}

#[tokio::test]
async fn a_student_of_the_same_shape_does_not_answer_with_the_versions_of_another() {
    let install = Install::of("bert-pairs");
    let server = install.start();
    distil(&server).await;
    assert_eq!(classify(&server, "kind").await.0, 200);
    assert_eq!(metric(&server, "verified").await, "1");
    let (_, versions) = server.get("/admin/tasks/kind/versions").await;
    let digest = versions["versions"][0]["student_digest"].clone();
    assert_eq!(digest.as_str().map(str::len), Some(64), "{versions}");
    let report = &versions["versions"][0]["report"]["student_model"];
    assert_eq!(report["encoder_digest"], digest);
    stop(server);

    let other = other_student(&install);
    let server = start_logged(&mut install.command_for(&other));
    let (status, problem) = classify(&server, "kind").await;
    assert_eq!(
        (status, &problem["type"]),
        (409, &json!(MISMATCH)),
        "{problem}"
    );
    assert_names_both(&problem["detail"]);
    let (_, tasks) = server.get("/v1/tasks").await;
    assert_eq!(tasks["tasks"][0]["ready"], false, "{tasks}");
    assert_names_both(&tasks["tasks"][0]["reason"]);
    let (status, ready) = server.get("/v2/models/kind/ready").await;
    assert_eq!(status, 409, "{ready}");
    let (status, ready) = server.get("/v2/models/kind/versions/1/ready").await;
    assert_eq!(status, 409, "{ready}");
    let (_, index) = server.post("/v2/repository/index", &json!({})).await;
    assert_eq!(index[0]["state"], "UNAVAILABLE", "{index}");
    assert_eq!(metric(&server, "mismatch").await, "1");

    let promote = "/admin/tasks/kind/promote";
    let (status, problem) = server.post(promote, &json!({"version": 1})).await;
    assert_eq!(status, 422, "{problem}");

    // A version of this student takes its place, and the other's can't be promoted again.
    distil(&server).await;
    assert_eq!(classify(&server, "kind").await.1["version"], 2);
    let (status, problem) = server.post(promote, &json!({"version": 1})).await;
    assert_eq!(status, 422, "{problem}");
    let detail = problem["detail"].as_str().expect("a sentence");
    assert!(
        detail.contains("student (") && detail.contains("other ("),
        "{detail}"
    );
    let (status, _) = server.post("/admin/tasks/kind/rollback", &json!({})).await;
    assert_eq!(status, 422);
    assert_eq!(classify(&server, "kind").await.1["version"], 2);
    let (_, tasks) = server.get("/v1/tasks").await;
    assert_eq!(tasks["tasks"][0]["ready"], true, "{tasks}");
    let log = log_of(server);
    let lines = log
        .lines()
        .filter(|line| line.contains("belongs to another student"));
    assert_eq!(lines.count(), 1, "{log}");

    // Whoever names no student gets the one that the state was served with.
    let mut command = Command::new(program());
    command.args([
        "--log",
        "warn",
        "serve",
        "--bind",
        "127.0.0.1:0",
        "--threads",
        "1",
    ]);
    command
        .arg("--state")
        .arg(install.state())
        .stdout(Stdio::piped());
    command.env_remove("KDLORA_STUDENT");
    let server = Server::start(&mut command);
    let (status, answer) = classify(&server, "kind").await;
    assert_eq!((status, &answer["version"]), (200, &json!(2)), "{answer}");
}

#[tokio::test]
async fn an_adapter_of_another_student_is_not_taken_in() {
    let install = Install::of("bert-pairs");
    let server = install.start();
    distil(&server).await;
    stop(server);
    let (state, root) = (install.state(), install.state().with_file_name("root"));
    fs::create_dir_all(&root).expect("a folder");
    let exported = root.join("kind");
    let arguments = [
        "export",
        "kind",
        "--state",
        text(&state),
        "--out",
        text(&exported),
    ];
    printed(&kdlora_adapter(&arguments));
    let config = fs::read(exported.join("config.json")).expect("the file");
    let config: Value = serde_json::from_slice(&config).expect("JSON");
    assert!(config["kdlora"]["encoder_digest"].is_string(), "{config}");
    // The same adapter without a digest, under the name of an encoder that everybody knows.
    let renamed = root.join("renamed");
    fs::create_dir_all(&renamed).expect("a folder");
    for file in [
        "adapter_config.json",
        "adapter_model.safetensors",
        "config.json",
    ] {
        let from = golden("adapters/bert-pairs-qv").join(file);
        fs::copy(from, renamed.join(file)).expect("a copy");
    }
    let path = renamed.join("adapter_config.json");
    let config = fs::read_to_string(&path).expect("the file");
    let known = config.replace(
        "\"bert-pairs\"",
        "\"sentence-transformers/all-MiniLM-L6-v2\"",
    );
    assert_ne!(known, config);
    fs::write(&path, known).expect("write");

    let other = other_student(&install);
    for (adapter, name) in [(&exported, "student ("), (&renamed, "all-MiniLM-L6-v2")] {
        let arguments = [
            "--student",
            text(&other),
            "--task",
            "mood",
            "--state",
            text(&state),
        ];
        let error = refused(&kdlora_adapter(
            &[&["import", text(adapter)][..], &arguments].concat(),
        ));
        assert!(error.contains(name) && error.contains("other ("), "{error}");
        for command in ["inspect", "merge"] {
            let arguments = [command, text(adapter), "--student", text(&other)];
            let out = root.join("out");
            let out = ["--out", text(&out)];
            let out = if command == "merge" { &out[..] } else { &[] };
            let error = refused(&kdlora_adapter(&[&arguments[..], out].concat()));
            assert!(error.contains(name), "{error}");
        }
    }
    let server = Server::start(install.command_for(&other).arg("--data-root").arg(&root));
    for (adapter, name) in [("kind", "student ("), ("renamed", "all-MiniLM-L6-v2")] {
        let body = json!({"task": "mood", "path": adapter});
        let (status, problem) = server.post("/admin/adapters", &body).await;
        assert_eq!(status, 422, "{problem}");
        let detail = problem["detail"].as_str().expect("a sentence");
        assert!(
            detail.contains(name) && detail.contains("other ("),
            "{detail}"
        );
        assert!(!detail.contains(text(&root)), "{detail}");
    }
}

#[tokio::test]
async fn a_version_without_a_student_is_served_unverified_until_it_is_adopted() {
    let install = Install::of("bert-pairs");
    install.ship("pairs", "bert-pairs-qv");
    let server = start_logged(&mut install.command());
    assert_eq!(classify(&server, "pairs").await.0, 200);
    assert_eq!(metric(&server, "unverified").await, "1");
    let (_, versions) = server.get("/admin/tasks/pairs/versions").await;
    let version = &versions["versions"][0];
    assert_eq!(version["student_name"], "bert-pairs");
    assert!(version.get("student_digest").is_none(), "{version}");
    let log = log_of(server);
    assert!(log.contains("adapter adopt"), "{log}");
    // It is never said to be of whatever student was loaded.
    let server = install.start();
    assert_eq!(metric(&server, "unverified").await, "1");
    stop(server);

    let (student, state) = (install.student(), install.state());
    let other = other_student(&install);
    let adopt = |student: &Path, task: &str| {
        let arguments = [
            "adopt",
            task,
            "--student",
            text(student),
            "--state",
            text(&state),
        ];
        kdlora_adapter(&arguments)
    };
    let line = printed(&adopt(&student, "pairs"));
    assert!(line.starts_with("pairs@1: student ("), "{line}");
    let error = refused(&adopt(&other, "pairs@1"));
    assert!(error.contains("has a student already"), "{error}");
    let line = printed(&adopt(&other, "pairs"));
    assert!(line.contains("already"), "{line}");

    let server = install.start();
    assert_eq!(metric(&server, "verified").await, "1");
    assert_eq!(classify(&server, "pairs").await.0, 200);
    stop(server);
    let server = Server::start(&mut install.command_for(&other));
    assert_eq!(classify(&server, "pairs").await.0, 409);
}

#[tokio::test]
async fn a_damaged_version_is_not_served_and_the_one_before_stays() {
    let install = Install::of("bert-pairs");
    install.ship("pairs", "bert-pairs-qv");
    let server = Server::start(install.command().arg("--data-root").arg(golden("adapters")));
    let before = classify(&server, "pairs").await.1;
    let body = json!({"task": "pairs", "path": "bert-pairs-dora"});
    let (status, version) = server.post("/admin/adapters", &body).await;
    assert_eq!(status, 201, "{version}");
    let artifacts = install.state().join("artifacts/pairs");
    flip(&artifacts.join("2/adapter_model.safetensors"));
    let path = "/admin/tasks/pairs/promote";
    let (status, problem) = server.post(path, &json!({"version": 2})).await;
    assert_eq!(status, 422, "{problem}");
    let detail = problem["detail"].as_str().expect("a sentence");
    assert!(
        detail.contains("adapter_model.safetensors is damaged"),
        "{detail}"
    );
    assert!(!detail.contains(text(&artifacts)), "{detail}");
    assert_eq!(classify(&server, "pairs").await.1, before);
    stop(server);

    for file in ["adapter_model.safetensors", "config.json"] {
        let path = artifacts.join("1").join(file);
        let whole = fs::read(&path).expect("the file");
        match file {
            "config.json" => {
                let text = String::from_utf8(whole.clone()).expect("text");
                fs::write(&path, text.replace("label 1", "label 7")).expect("write");
            }
            _ => flip(&path),
        }
        let server = start_logged(&mut install.command());
        let (status, problem) = classify(&server, "pairs").await;
        assert_eq!(status, 500, "{problem}");
        let (_, task) = server.get("/v1/tasks/pairs").await;
        assert_eq!(task["ready"], false, "{task}");
        assert_ne!(server.get("/v2/models/pairs/ready").await.0, 200);
        let log = log_of(server);
        assert!(log.contains(&format!("{file} is damaged")), "{log}");
        fs::write(&path, whole).expect("write");
    }
    let server = install.start();
    assert_eq!(classify(&server, "pairs").await.1, before);
}

#[tokio::test]
async fn a_teacher_s_adapter_must_be_its_encoder_s() {
    let install = Install::of("bert-pairs");
    let root = install.student().with_file_name("teachers");
    let adapter = root.join("adapter");
    fs::create_dir_all(&adapter).expect("a folder");
    let from = golden("adapters/bert-pairs-qv");
    for file in [
        "adapter_config.json",
        "adapter_model.safetensors",
        "config.json",
    ] {
        fs::copy(from.join(file), adapter.join(file)).expect("a copy");
    }
    let other = other_student(&install);
    fs::rename(&other, root.join("other")).expect("a move");
    let digest = kdlora::encoder::encoder_digest(&install.student()).expect("a digest");
    let path = adapter.join("config.json");
    let config = fs::read(&path).expect("the file");
    let mut config: Value = serde_json::from_slice(&config).expect("JSON");
    config["kdlora"] = json!({"max_length": 16, "encoder_digest": digest});
    fs::write(&path, config.to_string()).expect("write");

    let server = Server::start(install.command().arg("--data-root").arg(&root));
    let rows: Vec<Value> = letters_or_digits(40)
        .into_iter()
        .map(|row| json!({"text": row["text"]}))
        .collect();
    let spec = json!({"task": "kind", "data": {"train": {"rows": rows}},
        "teacher": {"model": "other", "adapter": "adapter"}});
    let (status, problem) = server.post("/admin/distill", &spec).await;
    assert_eq!(status, 422, "{problem}");
    let detail = problem["detail"].as_str().expect("a sentence");
    assert!(
        detail.contains("trained on the encoder") && detail.contains("other ("),
        "{detail}"
    );

    // By hand there is no server that would look first.
    let spec = json!({"task": "kind", "data": {"train": {"rows": rows}},
        "teacher": {"model": root.join("other"), "adapter": adapter}});
    let file = root.join("spec.json");
    fs::write(&file, spec.to_string()).expect("write");
    let output = Command::new(program())
        .args([
            "distill",
            "--spec",
            text(&file),
            "--out",
            text(&root.join("out")),
        ])
        .args(["--student", text(&install.student()), "--threads", "1"])
        .output()
        .expect("the program starts");
    let error = refused(&output);
    assert!(error.contains("belongs to another encoder"), "{error}");
}

/// Answers of the first release, which made the golden state folder.
fn first_release(install: &Install) -> Value {
    let from = golden("states/0.1.0");
    copy_tree(&from.join("artifacts"), &install.state().join("artifacts"));
    copy_tree(&from.join("jobs"), &install.state().join("jobs"));
    fs::copy(from.join("kdlora.db"), install.state().join("kdlora.db")).expect("a copy");
    let answers = fs::read(from.join("answers.json")).expect("the file");
    serde_json::from_slice(&answers).expect("JSON")
}

fn copy_tree(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("a folder");
    for entry in fs::read_dir(from).expect("the golden files") {
        let entry = entry.expect("a file");
        let to = to.join(entry.file_name());
        match entry.path().is_dir() {
            true => copy_tree(&entry.path(), &to),
            false => drop(fs::copy(entry.path(), to).expect("a copy")),
        }
    }
}

#[tokio::test]
async fn a_state_folder_of_the_first_release_is_served_as_it_was() {
    let install = Install::of("bert-pairs");
    let answers = first_release(&install);
    for _ in 0..2 {
        let server = install.start();
        for (task, expected) in answers["tasks"].as_object().expect("tasks") {
            let body = json!({"inputs": answers["texts"], "raw_scores": true});
            let (status, answer) = server.post(&format!("/v1/classify/{task}"), &body).await;
            assert_eq!(status, 200, "{answer}");
            assert_eq!(answer["version"], expected["version"], "{task}");
            let scores = expected["scores"].as_array().expect("a list");
            for (row, scores) in scores.iter().enumerate() {
                for (label, score) in scores.as_object().expect("scores") {
                    let found = &answer["predictions"][row]["scores"][label];
                    let (found, score) = (found.as_f64(), score.as_f64().expect("a number"));
                    assert!(
                        found.is_some_and(|found| (found - score).abs() < 1e-4),
                        "{task}, {label}: {found:?}, it was {score}"
                    );
                }
            }
        }
        let (_, jobs) = server.get("/admin/jobs").await;
        assert_eq!(jobs["jobs"][0]["state"], "succeeded", "{jobs}");
        let (_, pairs) = server.get("/admin/tasks/pairs/versions").await;
        assert_eq!(
            (&pairs["live"], pairs["versions"].as_array().map(Vec::len)),
            (&json!(2), Some(2))
        );
        let (_, letters) = server.get("/admin/tasks/letters/versions").await;
        assert_eq!(
            letters["versions"][0]["student_name"], "student",
            "{letters}"
        );
        assert_eq!(metric(&server, "unverified").await, "3");
        stop(server);
    }
    let (state, out) = (install.state(), install.state().with_file_name("out"));
    let arguments = [
        "export",
        "letters@1",
        "--state",
        text(&state),
        "--out",
        text(&out),
    ];
    printed(&kdlora_adapter(&arguments));
    // Its files are watched from now on.
    flip(
        &install
            .state()
            .join("artifacts/letters/1/adapter_model.safetensors"),
    );
    let server = start_logged(&mut install.command());
    assert_eq!(classify(&server, "letters").await.0, 500);
    assert_eq!(classify(&server, "pairs").await.0, 200);
    let log = log_of(server);
    assert!(
        log.contains("adapter_model.safetensors is damaged"),
        "{log}"
    );
}

#[tokio::test]
async fn a_first_release_that_was_damaged_before_the_update_is_not_taken_for_good() {
    let install = Install::of("bert-pairs");
    first_release(&install);
    flip(
        &install
            .state()
            .join("artifacts/letters/1/adapter_model.safetensors"),
    );
    for _ in 0..2 {
        let server = install.start();
        assert_eq!(classify(&server, "letters").await.0, 500);
        assert_eq!(classify(&server, "pairs").await.0, 200);
        stop(server);
    }
}
