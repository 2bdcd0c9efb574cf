//! `kdlora serve` as a process, over HTTP.

use std::collections::{HashMap, HashSet};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::common::{Install, Server, golden};
use candle_core::Device;
use kdlora::adapter::AdapterFolder;
use kdlora::encoder::{Encoder, Segment};
use kdlora::text::{Input, PackedBatch, Tokenizer};
use rustix::process::Signal;
use serde_json::{Value, json};
use tokio::task::JoinSet;

const TEXTS: [&str; 4] = [
    "a",
    "the cat sat",
    "Zoë's café: 3 €",
    "one two three four five six",
];

/// The label and logits of a text alone, computed by the library.
fn expected(install: &Install, task: &str, text: &str) -> HashMap<String, f64> {
    let encoder = Encoder::load(&install.student(), &Device::Cpu).expect("the student");
    let tokenizer = Tokenizer::load(&install.student()).expect("the tokenizer");
    let adapter = AdapterFolder::read(&install.adapter(task)).expect("the adapter");
    let weights = adapter.bind(&encoder).expect("an adapter of the student");
    let input = Input {
        text: text.to_owned(),
        text_pair: None,
    };
    let most = encoder.config().max_sequence_length();
    let sequence = tokenizer.encode(&input, most, None).expect("tokens");
    let segment = Segment {
        sequences: 0..1,
        weights: &weights,
    };
    let rows = encoder
        .logits(&PackedBatch::new([&sequence]), &[segment])
        .expect("logits");
    let labels = adapter.task.labels.into_iter();
    labels
        .zip(rows[0].iter().map(|logit| f64::from(*logit)))
        .collect()
}

fn assert_close(prediction: &Value, expected: &HashMap<String, f64>) {
    let scores = prediction["scores"].as_object().expect("scores");
    assert_eq!(scores.len(), expected.len());
    for (label, score) in scores {
        let score = score.as_f64().expect("a number");
        assert!(
            (score - expected[label]).abs() < 1e-4,
            "{prediction} is not {expected:?}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn tasks_answer_together_each_with_its_own_adapter() {
    let install = Install::new();
    let server = Arc::new(install.start());
    assert_eq!(server.get("/healthz").await.0, 200);
    assert_eq!(server.get("/readyz").await.0, 200);
    let (_, tasks) = server.get("/v1/tasks").await;
    let names: Vec<&str> = tasks["tasks"]
        .as_array()
        .expect("a list")
        .iter()
        .filter_map(|task| task["task"].as_str())
        .collect();
    assert_eq!(names, ["pairs", "pooler"]);

    let mut clients = JoinSet::new();
    for round in 0..40 {
        let server = Arc::clone(&server);
        clients.spawn(async move {
            let task = ["pairs", "pooler"][round % 2];
            let body = json!({"inputs": TEXTS, "raw_scores": true});
            let (status, body) = server.post(&format!("/v1/classify/{task}"), &body).await;
            assert_eq!(status, 200, "{body}");
            (task, body)
        });
    }
    let mut references = HashMap::new();
    while let Some(client) = clients.join_next().await {
        let (task, body) = client.expect("no panic");
        assert_eq!(body["task"], task);
        assert_eq!(body["version"], 1);
        for (i, text) in TEXTS.iter().enumerate() {
            let reference = references
                .entry((task, text))
                .or_insert_with(|| expected(&install, task, text));
            assert_close(&body["predictions"][i], reference);
        }
    }
    let (_, metrics) = server.get("/metrics").await;
    let metrics = metrics.as_str().expect("text");
    assert!(metrics.contains("kdlora_requests_total{outcome=\"ok\",task=\"pairs\"} 20"));
    assert!(metrics.contains("kdlora_adapters 2"));
}

#[tokio::test]
async fn sigterm_ends_it_and_a_second_start_finds_the_same_versions() {
    let install = Install::new();
    for _ in 0..2 {
        let server = install.start();
        let (_, task) = server.get("/v1/tasks/pairs").await;
        assert_eq!(task["version"], 1, "{task}");
        server.signal(Signal::TERM);
        assert_eq!(server.ended().code(), Some(0));
    }
}

#[test]
fn a_student_that_is_not_there_is_told_in_a_sentence() {
    let install = Install::new();
    let output = install
        .command_for("no-such-encoder")
        .stderr(Stdio::piped())
        .output()
        .expect("the program runs");
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(
        text.starts_with("kdlora: ") && text.contains("no-such-encoder"),
        "{text}"
    );
}

#[test]
fn a_tokenizer_of_another_encoder_is_refused() {
    let install = Install::new();
    let other = golden("tokenizers/bert/tokenizer.json");
    std::fs::copy(other, install.student().join("tokenizer.json")).expect("a copy");
    let output = install.command().stderr(Stdio::piped()).output();
    let output = output.expect("the program runs");
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(text.contains("its encoder knows only 60"), "{text}");
}

#[tokio::test]
async fn a_broken_adapter_leaves_the_other_tasks() {
    let install = Install::new();
    let weights = install.adapter("pooler").join("adapter_model.safetensors");
    std::fs::write(weights, "not tensors").expect("write");
    let server: Server = install.start();
    let body = json!({"inputs": "a"});
    assert_eq!(server.post("/v1/classify/pairs", &body).await.0, 200);
    let (status, problem) = server.post("/v1/classify/pooler", &body).await;
    assert_eq!(status, 500, "{problem}");
    let detail = problem["detail"].as_str().expect("a detail");
    assert!(detail.contains("can't be loaded"), "{detail}");
}

#[tokio::test(flavor = "multi_thread")]
async fn versions_change_under_load_without_an_error_or_a_mix() {
    let install = Install::new();
    let first: Vec<_> = TEXTS.map(|text| expected(&install, "pairs", text)).into();
    let server = install.start();
    server.signal(Signal::TERM);
    assert!(server.ended().success());
    // The next release ships other weights for the task.
    install.ship("pairs", "bert-pairs-pooler");
    let second: Vec<_> = TEXTS.map(|text| expected(&install, "pairs", text)).into();
    let server = Arc::new(install.start());
    assert_eq!(server.get("/v1/tasks/pairs").await.1["version"], 2);

    let stop = Arc::new(AtomicBool::new(false));
    let mut clients = JoinSet::new();
    for _ in 0..4 {
        let (server, stop) = (Arc::clone(&server), Arc::clone(&stop));
        let (first, second) = (first.clone(), second.clone());
        clients.spawn(async move {
            let body = json!({"inputs": TEXTS, "raw_scores": true});
            let mut seen = HashSet::new();
            while !stop.load(Ordering::Relaxed) {
                let (status, answer) = server.post("/v1/classify/pairs", &body).await;
                assert_eq!(status, 200, "{answer}");
                let version = answer["version"].as_u64().expect("a version");
                let expected = if version == 1 { &first } else { &second };
                for (i, expected) in expected.iter().enumerate() {
                    assert_close(&answer["predictions"][i], expected);
                }
                seen.insert(version);
            }
            seen
        });
    }
    for round in 0..10 {
        let version = 1 + round % 2;
        let path = "/admin/tasks/pairs/promote";
        let (status, body) = server.post(path, &json!({"version": version})).await;
        assert_eq!(status, 200, "{body}");
        // Whoever asks after the promotion gets the promoted version.
        let (_, answer) = server
            .post("/v1/classify/pairs", &json!({"inputs": "a"}))
            .await;
        assert_eq!(answer["version"], version);
    }
    stop.store(true, Ordering::Relaxed);
    let mut seen = HashSet::new();
    while let Some(client) = clients.join_next().await {
        seen.extend(client.expect("no wrong answer"));
    }
    assert_eq!(seen, HashSet::from([1, 2]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_in_flight_is_answered_before_the_end() {
    let install = Install::new();
    let server = Arc::new(install.start());
    let request = tokio::spawn({
        let server = Arc::clone(&server);
        let texts = vec!["the cat sat on the mat ".repeat(20); 256];
        async move {
            server
                .post("/v1/classify/pairs", &json!({"inputs": texts}))
                .await
        }
    });
    until_in_flight(&server, || request.is_finished()).await;
    server.signal(Signal::TERM);
    let (status, body) = request.await.expect("no panic");
    assert_eq!(status, 200, "{body}");
    assert_eq!(body["predictions"].as_array().map(Vec::len), Some(256));
    let server = Arc::into_inner(server).expect("the last handle");
    assert_eq!(server.ended().code(), Some(0));
}

async fn until_in_flight(server: &Server, or: impl Fn() -> bool) {
    while !or() {
        let (_, metrics) = server.get("/metrics").await;
        let text = metrics.as_str().unwrap_or_default();
        if text.contains("kdlora_in_flight_requests 1") {
            return;
        }
    }
}

/// A request whose second half does not come.
async fn half_a_request(server: &Server) -> TcpStream {
    let address = server.url.strip_prefix("http://").expect("an address");
    let mut stream = TcpStream::connect(address).expect("a connection");
    let head = "POST /v1/classify/pairs HTTP/1.1\r\nhost: localhost\r\n\
        content-type: application/json\r\ncontent-length: 100\r\n\r\n{\"inputs\":";
    stream.write_all(head.as_bytes()).expect("it is sent");
    until_in_flight(server, || false).await;
    stream
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_signal_ends_it_at_once() {
    let install = Install::new();
    let server = Server::start(install.command().args(["--shutdown-delay", "60s"]));
    server.signal(Signal::TERM);
    // Load balancers are told first, and until they have noticed requests are answered.
    while server.get("/readyz").await.0 != 503 {}
    let body = json!({"inputs": "a"});
    assert_eq!(server.post("/v1/classify/pairs", &body).await.0, 200);
    server.signal(Signal::INT);
    assert_eq!(server.ended().code(), Some(130));
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_that_outlast_the_shutdown_show_in_the_exit_status() {
    let install = Install::new();
    let server = Server::start(install.command().args(["--shutdown-timeout", "50ms"]));
    let _request = half_a_request(&server).await;
    server.signal(Signal::TERM);
    assert_eq!(server.ended().code(), Some(1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_stalls_does_not_hold_up_the_stop() {
    let install = Install::new();
    let server = install.start();
    let mut stalled = half_a_request(&server).await;
    let stopped = Instant::now();
    server.signal(Signal::TERM);
    assert_eq!(server.ended().code(), Some(0));
    // The read timeout is 30 seconds.
    assert!(stopped.elapsed() < Duration::from_secs(15));
    let mut answer = String::new();
    stalled.read_to_string(&mut answer).expect("an answer");
    assert!(answer.starts_with("HTTP/1.1 503"), "{answer}");
}
