//! More tasks than memory has room for, tasks that leave, and what the metrics say of all that.

use std::collections::HashMap;
use std::sync::Arc;

use crate::common::{Install, Server};
use serde_json::{Value, json};
use tokio::task::JoinSet;

/// Bytes of `bert-pairs-qv`, of which tasks of these tests are copies, as f32.
async fn bytes_of_one_adapter(server: &Server) -> u64 {
    let text = metrics(server).await;
    let (count, bytes) = (
        value(&text, "kdlora_adapters"),
        value(&text, "kdlora_adapter_memory_bytes"),
    );
    assert_eq!(count, 1.0);
    bytes as u64
}

async fn metrics(server: &Server) -> String {
    let (status, text) = server.get("/metrics").await;
    assert_eq!(status, 200);
    text.as_str().expect("text").to_owned()
}

/// The value of a series; 0 if it is not there.
fn value(metrics: &str, series: &str) -> f64 {
    let line = metrics
        .lines()
        .find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
    line.map_or(0.0, |value| value.parse().expect("a number"))
}

async fn classify(server: &Server, task: &str, body: Value) -> (u16, Value) {
    server.post(&format!("/v1/classify/{task}"), &body).await
}

fn score(answer: &Value) -> f64 {
    answer["predictions"][0]["score"].as_f64().expect("a score")
}

#[tokio::test(flavor = "multi_thread")]
async fn adapters_come_and_go_within_their_memory() {
    let install = Install::of("bert-pairs");
    let tasks: Vec<String> = (0..12).map(|i| format!("task-{i:02}")).collect();
    install.ship(&tasks[0], "bert-pairs-qv");
    let one = bytes_of_one_adapter(&install.start()).await;
    for task in &tasks {
        install.ship(task, "bert-pairs-qv");
    }
    let limit = 4 * one + one / 2;
    let mut command = install.command();
    command.args(["--preload-tasks", "0", "--pinned-tasks", &tasks[3]]);
    command.args(["--adapter-memory", &limit.to_string()]);
    let server = Arc::new(Server::start(&mut command));

    // What nobody has used is registered, not loaded, and has no series; what is pinned is there.
    let text = metrics(&server).await;
    assert_eq!(value(&text, "kdlora_adapters"), 1.0);
    assert!(
        !text.contains("task-00") && text.contains("{task=\"task-03\"}"),
        "{text}"
    );
    let (_, list) = server.get("/v1/tasks?limit=5&after=task-03").await;
    let listed = list["tasks"].as_array().expect("a list");
    let names: Vec<_> = listed
        .iter()
        .filter_map(|task| task["task"].as_str())
        .collect();
    assert_eq!(
        names,
        ["task-04", "task-05", "task-06", "task-07", "task-08"]
    );
    assert_eq!(list["next"], "task-08");

    let text = "the cat sat";
    let (_, first) = classify(&server, &tasks[0], json!({"inputs": text})).await;
    let mut clients = JoinSet::new();
    for client in 0..8 {
        let (server, tasks) = (Arc::clone(&server), tasks.clone());
        let expected = score(&first);
        clients.spawn(async move {
            for round in 0..20 {
                let task = &tasks[(client * 5 + round * 7) % tasks.len()];
                let (status, body) = classify(&server, task, json!({"inputs": text})).await;
                assert_eq!((status, &body["task"]), (200, &json!(task)), "{body}");
                assert!((score(&body) - expected).abs() < 1e-5, "{body}");
            }
        });
    }
    while let Some(client) = clients.join_next().await {
        client.expect("every request is answered");
    }
    let text = metrics(&server).await;
    let bytes = value(&text, "kdlora_adapter_memory_bytes");
    assert!(bytes > 0.0 && bytes <= limit as f64, "{bytes} of {limit}");
    let (loads, evictions) = (
        value(&text, "kdlora_adapter_loads_total{outcome=\"ok\"}"),
        value(&text, "kdlora_adapter_evictions_total"),
    );
    assert!(loads >= 12.0, "{loads}");
    assert_eq!(loads - evictions, value(&text, "kdlora_adapters"));
}

#[tokio::test]
async fn a_withdrawn_task_is_gone_until_it_is_promoted_again() {
    let install = Install::new();
    let server = install.start();
    assert_eq!(
        classify(&server, "pairs", json!({"inputs": "a"})).await.0,
        200
    );
    let withdraw = |path: &str| {
        let request = server.client.delete(format!("{}{path}", server.url));
        async move { request.send().await.expect("an answer").status().as_u16() }
    };
    assert_eq!(withdraw("/admin/tasks/pairs?reason=unused").await, 204);
    assert_eq!(withdraw("/admin/tasks/pairs").await, 409);
    assert_eq!(withdraw("/admin/tasks/nothing").await, 404);
    assert_eq!(
        classify(&server, "pairs", json!({"inputs": "a"})).await.0,
        404
    );
    assert!(!metrics(&server).await.contains("task=\"pairs\""));
    let (_, versions) = server.get("/admin/tasks/pairs/versions").await;
    assert_eq!(versions["live"], Value::Null);
    let last = versions["history"]
        .as_array()
        .and_then(|history| history.last());
    let last = last.expect("a history");
    assert_eq!(
        (&last["kind"], &last["reason"]),
        (&json!("withdraw"), &json!("unused"))
    );

    let promotion = json!({"version": 1});
    assert_eq!(
        server
            .post("/admin/tasks/pairs/promote", &promotion)
            .await
            .0,
        200
    );
    assert_eq!(
        classify(&server, "pairs", json!({"inputs": "a"})).await.0,
        200
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_add_up_to_the_traffic_that_was_sent() {
    let install = Install::new();
    let server = install.start();
    let mut tokens: HashMap<&str, u64> = HashMap::new();
    for (task, inputs) in [
        ("pairs", json!("a")),
        ("pairs", json!(["the cat sat", "b"])),
        ("pooler", json!([{"text": "a b", "text_pair": "c"}])),
        ("pairs", json!(["one", "two", "three"])),
    ] {
        let (status, body) = classify(&server, task, json!({ "inputs": inputs })).await;
        assert_eq!(status, 200, "{body}");
        *tokens.entry(task).or_default() += body["usage"]["tokens"].as_u64().expect("tokens");
    }
    for body in [
        json!({"inputs": ""}),
        json!({"inputs": "a", "top_k": 0}),
        json!({"input": "a"}),
    ] {
        assert_eq!(classify(&server, "pairs", body).await.0, 422);
    }
    let hurried = json!({"inputs": "a", "timeout_ms": 0});
    assert_eq!(classify(&server, "pooler", hurried).await.0, 504);
    assert_eq!(
        classify(&server, "unheard-of", json!({"inputs": "a"}))
            .await
            .0,
        404
    );

    let text = metrics(&server).await;
    for (series, expected) in [
        ("kdlora_requests_total{outcome=\"ok\",task=\"pairs\"}", 3.0),
        ("kdlora_requests_total{outcome=\"ok\",task=\"pooler\"}", 1.0),
        (
            "kdlora_requests_total{outcome=\"invalid\",task=\"pairs\"}",
            3.0,
        ),
        (
            "kdlora_requests_total{outcome=\"deadline\",task=\"pooler\"}",
            1.0,
        ),
        (
            "kdlora_requests_total{outcome=\"full\",task=\"pairs\"}",
            0.0,
        ),
        ("kdlora_request_seconds_count{task=\"pairs\"}", 6.0),
        ("kdlora_request_seconds_count{task=\"pooler\"}", 2.0),
        ("kdlora_tokenize_seconds_count{task=\"pairs\"}", 3.0),
        ("kdlora_queue_seconds_count{task=\"pairs\"}", 3.0),
        ("kdlora_compute_seconds_count{task=\"pairs\"}", 3.0),
        ("kdlora_compute_seconds_count{task=\"pooler\"}", 1.0),
        ("kdlora_batch_sequences_sum", 7.0),
        ("kdlora_in_flight_requests", 0.0),
        ("kdlora_queue_sequences", 0.0),
        ("kdlora_adapters", 2.0),
        ("kdlora_live_version{task=\"pairs\"}", 1.0),
        ("kdlora_adapter_loads_total{outcome=\"ok\"}", 2.0),
    ] {
        assert_eq!(value(&text, series), expected, "{series} in {text}");
    }
    let all: u64 = tokens.values().sum();
    assert_eq!(value(&text, "kdlora_batch_tokens_sum"), all as f64);
    assert_eq!(
        value(&text, "kdlora_batch_seconds_count"),
        value(&text, "kdlora_batch_tokens_count")
    );
    assert!(!text.contains("unheard-of"));
    // Parts of a request are within the whole.
    let sum = |series: &str| {
        value(
            &text,
            &format!("kdlora_{series}_seconds_sum{{task=\"pairs\"}}"),
        )
    };
    let parts = sum("tokenize") + sum("queue") + sum("compute");
    assert!(
        parts > 0.0 && parts <= sum("request"),
        "{parts} of {}",
        sum("request")
    );
}
