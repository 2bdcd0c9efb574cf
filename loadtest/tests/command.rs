//! The program itself, against servers that answer as told.

use std::path::Path;
use std::process::{Command, Output};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use axum::extract::State;
use axum::extract::{Json, Path as Part};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Router, serve};
use serde_json::{Value, json};
use tokio::net::TcpListener;

/// A kdlora server with the task `mood`, whose version 2 gives the labels of version 1 the other
/// way round.
#[derive(Clone, Default)]
struct Mood {
    /// 0 stands for version 1, 1 for version 2.
    live: Arc<AtomicU64>,
    promotions: Arc<AtomicU64>,
    /// Version 2 answers as version 1 would.
    mixed_up: bool,
}

impl Mood {
    fn router(self) -> Router {
        Router::new()
            .route("/v1/tasks", get(tasks))
            .route("/v1/classify/{task}", post(classify))
            .route("/admin/tasks/mood/versions", get(versions))
            .route("/admin/tasks/mood/promote", post(promote))
            .with_state(self)
    }

    fn version(&self) -> u64 {
        1 + self.live.load(Ordering::SeqCst)
    }
}

async fn tasks() -> Json<Value> {
    Json(json!({"tasks": [{"task": "mood", "version": 1}]}))
}

async fn versions() -> Json<Value> {
    Json(json!({"task": "mood", "versions": [{"version": 1}, {"version": 2}]}))
}

async fn promote(State(mood): State<Mood>, Json(promotion): Json<Value>) -> Response {
    let Some(version @ 1..=2) = promotion["version"].as_u64() else {
        return StatusCode::NOT_FOUND.into_response();
    };
    mood.live.store(version - 1, Ordering::SeqCst);
    mood.promotions.fetch_add(1, Ordering::SeqCst);
    Json(json!({"version": version})).into_response()
}

async fn classify(
    State(mood): State<Mood>,
    Part(task): Part<String>,
    Json(request): Json<Value>,
) -> Response {
    let version = mood.version();
    let inputs = request["inputs"].as_array().map_or(0, Vec::len);
    // The learning before the load is answered rightly, so that the load shows what is wrong.
    let mixed_up = mood.mixed_up && mood.promotions.load(Ordering::SeqCst) > 2;
    let (best, other) = if version == 1 || mixed_up {
        ("up", "down")
    } else {
        ("down", "up")
    };
    let prediction = json!({"label": best, "score": 0.9, "scores": {best: 0.9, other: 0.1}});
    let body = json!({"task": task, "version": version, "predictions": vec![prediction; inputs],
        "usage": {"tokens": 5 * inputs}});
    (
        [("server-timing", "queue;dur=1.5, compute;dur=2")],
        Json(body),
    )
        .into_response()
}

/// text-embeddings-inference: flat for a single text, a list of lists for a batch.
async fn predict(Json(request): Json<Value>) -> Response {
    let scores = json!([{"label": "up", "score": 0.9}, {"label": "down", "score": 0.1}]);
    match &request["inputs"] {
        Value::String(_) => Json(scores).into_response(),
        Value::Array(batch) if batch.iter().all(Value::is_array) => {
            let tokens = (7 * batch.len()).to_string();
            let rows = vec![scores; batch.len()];
            ([("x-compute-tokens", tokens)], Json(rows)).into_response()
        }
        _ => StatusCode::UNPROCESSABLE_ENTITY.into_response(),
    }
}

/// Runs the program with a server; `{url}` in the arguments is where that is.
async fn loadtest(router: Router, folder: &Path, arguments: &str) -> (Output, Value) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let url = format!("http://{}", listener.local_addr().expect("an address"));
    tokio::spawn(async move { serve(listener, router).await });
    let texts = folder.join("texts.jsonl");
    std::fs::write(&texts, "{\"text\": \"a fine day\"}\n{\"text\": \"rain\"}\n").expect("texts");
    let out = folder.join("report");
    let mut command = Command::new(env!("CARGO_BIN_EXE_loadtest"));
    command
        .args(arguments.split_whitespace())
        .args(["--url", &url])
        .arg("--texts")
        .arg(texts)
        .arg("--out")
        .arg(&out);
    let output = tokio::task::spawn_blocking(move || command.output().expect("it runs"))
        .await
        .expect("it ends");
    let report = std::fs::read(folder.join("report.json"))
        .map(|text| serde_json::from_slice(&text).expect("JSON"))
        .unwrap_or_default();
    (output, report)
}

#[tokio::test]
async fn a_run_counts_what_a_kdlora_server_answers() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (output, report) = loadtest(
        Mood::default().router(),
        folder.path(),
        "run --all-tasks --rate 200,400 --duration 300ms --warm-up 50ms --batch 3",
    )
    .await;
    assert!(output.status.success(), "{output:?}");
    let stages = report["stages"].as_array().expect("stages");
    assert_eq!(stages.len(), 2);
    for stage in stages {
        let requests = stage["requests"].as_u64().expect("a number");
        assert!(requests > 20, "{stage}");
        assert_eq!(stage["outcomes"], json!({"answered": requests}));
        assert_eq!(stage["queue"]["p50_ms"], json!(1.5));
        let rate = |name: &str| stage[name].as_f64().expect("a rate");
        assert!((rate("tokens_per_second") / rate("goodput_per_second") - 15.0).abs() < 1e-6);
    }
    assert_eq!(report["settings"]["seed"], json!(1));
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("| 200.0/s |"), "{text}");
    assert!(folder.path().join("report.svg").exists());
}

#[tokio::test]
async fn a_text_embeddings_inference_server_is_asked_in_its_own_way() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let router = Router::new().route("/predict", post(predict));
    let (output, report) = loadtest(
        router,
        folder.path(),
        "closed --target tei --clients 2 --duration 200ms --warm-up 0s --batch 2",
    )
    .await;
    assert!(output.status.success(), "{output:?}");
    let stage = &report["stages"][0];
    assert_eq!(stage["success_share"], json!(1.0), "{stage}");
    let rate = |name: &str| stage[name].as_f64().expect("a rate");
    assert!(rate("goodput_per_second") > 0.0, "{stage}");
    assert!((rate("tokens_per_second") / rate("goodput_per_second") - 14.0).abs() < 1e-6);
}

const PROMOTE: &str = "promote --tasks mood --rate 300 --duration 500ms --warm-up 0s \
    --promote-rate 100 --promote mood=1,2";

#[tokio::test]
async fn promotions_under_load_are_right_when_each_version_gives_its_own_labels() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (output, report) = loadtest(Mood::default().router(), folder.path(), PROMOTE).await;
    assert!(output.status.success(), "{output:?}");
    let promotions = &report["promotions"];
    assert!(promotions["succeeded"].as_u64() > Some(10), "{promotions}");
    assert_eq!(promotions["succeeded"], promotions["attempted"]);
    assert_eq!(promotions["learnt_answers"], json!(4));
    assert_eq!(report["stages"][0]["success_share"], json!(1.0));
}

#[tokio::test]
async fn labels_of_another_version_are_found_and_end_in_failure() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mood = Mood {
        mixed_up: true,
        ..Mood::default()
    };
    let (output, report) = loadtest(mood.router(), folder.path(), PROMOTE).await;
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let wrong = &report["stages"][0]["outcomes"]["wrong_labels"];
    assert!(wrong.as_u64() > Some(0), "{report}");
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(text.contains("answers were wrong"), "{text}");
}

#[tokio::test]
async fn what_cannot_be_asked_is_said_in_a_sentence() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let router = || Mood::default().router();
    for (arguments, sentence) in [
        ("run --rate 5", "it has mood"),
        ("run --rate 5 --tasks moood", "no task \"moood\""),
        (
            "promote --rate 5 --tasks mood --promote topic",
            "add it to --tasks",
        ),
        ("ramp --tasks mood --factor 1", "--factor must be above 1"),
    ] {
        let (output, _) = loadtest(router(), folder.path(), arguments).await;
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(text.contains(sentence), "{arguments}: {text}");
    }
}
