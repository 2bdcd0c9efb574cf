//! Two versions of a task side by side, over HTTP.

use crate::common::{Install, Server, is_over, job, letters_or_digits, queue};
use serde_json::json;

/// Distils a version and waits for it.
async fn distil(server: &Server, epochs: usize) {
    let spec = json!({
        "task": "kind",
        "data": {"train": {"rows": letters_or_digits(300)}},
        "lora": {"r": 4, "alpha": 8, "targets": ["all-linear"]},
        "training": {"epochs": epochs, "batch_size": 8, "learning_rate": 0.01, "max_length": 16},
    });
    let path = queue(server, &spec).await;
    let job = job(server, &path, is_over).await;
    assert_eq!(job["state"], "succeeded", "{job}");
}

#[tokio::test]
async fn versions_are_compared_as_json_and_markdown() {
    let install = Install::new();
    let server = install.start();
    distil(&server, 1).await;
    distil(&server, 4).await;
    let (status, body) = server.get("/v1/tasks/kind/versions/1...2").await;
    assert_eq!(status, 200, "{body}");
    assert_eq!(body["versions"], json!([1, 2]));
    assert_eq!(body["comparable"], true, "{body}");
    let epochs = json!({"field": "/training/epochs", "first": 1, "second": 4});
    assert_eq!(body["request"], json!([epochs]));
    assert_eq!(body["classes"][0]["name"], "digits");
    let (status, text) = server
        .get("/v1/tasks/kind/versions/1...2?format=markdown")
        .await;
    assert_eq!(status, 200);
    assert!(
        text.as_str()
            .is_some_and(|t| t.starts_with("# kind, versions 1 and 2"))
    );
    for (range, status) in [
        ("1...3", 404),
        ("1..2", 400),
        ("1...x", 400),
        ("1...99999999999999999999", 400),
    ] {
        let (found, body) = server
            .get(&format!("/v1/tasks/kind/versions/{range}"))
            .await;
        assert_eq!(found, status, "{range}: {body}");
    }
    let (status, _) = server.get("/v1/tasks/nothing/versions/1...2").await;
    assert_eq!(status, 404);
}

#[tokio::test]
async fn the_temperature_of_the_report_is_served() {
    let install = Install::new();
    let server = install.start();
    distil(&server, 1).await;
    let (_, versions) = server.get("/admin/tasks/kind/versions").await;
    let report = &versions["versions"][0]["report"];
    let temperature = report["student"]["calibration"]["temperature"]
        .as_f64()
        .expect("a number");
    let promote = json!({"version": 1});
    server.post("/admin/tasks/kind/promote", &promote).await;
    let ask = |raw: bool| json!({"inputs": "a 1", "raw_scores": raw});
    let (_, raw) = server.post("/v1/classify/kind", &ask(true)).await;
    let (_, scored) = server.post("/v1/classify/kind", &ask(false)).await;
    let score = |body: &serde_json::Value, label: &str| {
        body["predictions"][0]["scores"][label]
            .as_f64()
            .expect("a score")
    };
    let odds = (score(&scored, "letters") / score(&scored, "digits")).ln();
    let logits = score(&raw, "letters") - score(&raw, "digits");
    assert!(
        (odds - logits / temperature).abs() < 1e-3 * logits.abs().max(1.0),
        "{odds} {logits} {temperature}"
    );
}
