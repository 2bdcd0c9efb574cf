mod bodies;
mod fields;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, to_bytes};
use axum::http::{HeaderMap, Method, Request, StatusCode, header};
use serde_json::{Value, json};
use tokio::task::yield_now;
use tower::ServiceExt;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::auth::{AccessOptions, Tokens};
use super::health::Readiness;
use super::*;
use crate::serving::fixture::{self, NAN, OPTIONS, PANIC, Scripted};
use crate::serving::{LiveTask, Options};

struct Reply {
    status: StatusCode,
    headers: HeaderMap,
    body: String,
}

impl Reply {
    fn json(&self) -> Value {
        serde_json::from_str(&self.body).expect("a JSON body")
    }

    fn header(&self, name: impl header::AsHeaderName) -> &str {
        let value = self.headers.get(name).expect("the header is there");
        value.to_str().expect("text")
    }

    /// The detail of a problem, after a look at the rest of it.
    fn problem(&self, status: u16, slug: &str) -> String {
        assert_eq!(self.status, status, "{}", self.body);
        assert_eq!(
            self.header(header::CONTENT_TYPE),
            "application/problem+json"
        );
        let body = self.json();
        assert_eq!(body["status"], status);
        assert_eq!(body["type"], format!("urn:kdlora:problem:{slug}"));
        assert!(body["title"].is_string());
        body["detail"].as_str().expect("a detail").to_owned()
    }
}

/// The API over the model of the fixture, with the task `mood`, version 3.
struct Api {
    state: AppState,
    router: Router,
}

impl Api {
    fn new() -> Self {
        Self::with(&Arc::default(), OPTIONS)
    }

    fn with(model: &Arc<Scripted>, options: Options) -> Self {
        let state = AppState {
            tasks: Arc::default(),
            serving: fixture::start(model, options),
            metrics: Arc::new(Metrics::new().expect("metrics")),
            readiness: Readiness::default(),
            limits: Limits {
                body_bytes: 2000,
                inputs: 4,
                text_chars: 500,
            },
            request_timeout: Duration::from_secs(60),
            default_task: None,
            engine: options,
            dtype: "f32",
        };
        state
            .tasks
            .publish([fixture::resident(fixture::task("mood", 3))]);
        state.readiness.set_ready();
        let more = OpenApiRouter::new();
        let router = router(state.clone(), &edge(), admin(), more);
        Self { state, router }
    }

    async fn send(&self, request: Request<Body>) -> Reply {
        let response = self.router.clone().oneshot(request).await;
        let (parts, body) = response.expect("a response").into_parts();
        let body = to_bytes(body, usize::MAX).await.expect("a whole body");
        Reply {
            status: parts.status,
            headers: parts.headers,
            body: String::from_utf8_lossy(&body).into_owned(),
        }
    }

    async fn get(&self, path: &str) -> Reply {
        let request = Request::get(path).body(Body::empty());
        self.send(request.expect("a request")).await
    }

    async fn post(&self, path: &str, body: impl Into<Body>) -> Reply {
        let request = Request::post(path)
            .header(header::CONTENT_TYPE, "application/json")
            .body(body.into());
        self.send(request.expect("a request")).await
    }

    async fn classify(&self, body: Value) -> Reply {
        self.post("/v1/classify/mood", body.to_string()).await
    }
}

fn edge() -> Edge {
    let admins = Tokens::fixed("ada:s3cret-s3cret-s3cret", "a test").expect("a token");
    Edge {
        access: Access::new(AccessOptions {
            admins: Some(Arc::new(admins)),
            ..AccessOptions::default()
        }),
        cors_origins: Vec::new(),
        read_timeout: Duration::from_secs(5),
        private: PrivateFolders::new([Path::new("/srv/state")]),
        stop: CancellationToken::new(),
    }
}

#[utoipa::path(get, path = "/admin/greeting", responses((status = 200)))]
async fn greeting() -> &'static str {
    "hello"
}

#[utoipa::path(get, path = "/admin/failure", responses((status = 422)))]
async fn failure() -> Result<(), ApiError> {
    Err(Problem::Unusable.with("cannot read /srv/state/jobs/7/rows.csv (of /srv/states)"))
}

fn admin() -> OpenApiRouter {
    OpenApiRouter::new()
        .routes(routes!(greeting))
        .routes(routes!(bodies::echo))
        .routes(routes!(failure))
}

fn regression(name: &str) -> LiveTask {
    let mut task = fixture::task(name, 1);
    task.config.problem_type = crate::adapter::ProblemType::Regression;
    task
}

#[tokio::test]
async fn a_text_gets_a_label_and_the_scores_of_all() {
    let reply = Api::new().classify(json!({"inputs": "3 4"})).await;
    assert_eq!(reply.status, 200);
    let body = reply.json();
    assert_eq!(body["task"], "mood");
    assert_eq!(body["version"], 3);
    assert_eq!(body["usage"], json!({"tokens": 2}));
    // Logits 3 and 7.
    assert_eq!(body["predictions"][0]["label"], "yes");
    let score = body["predictions"][0]["score"].as_f64().expect("a number");
    assert!((score - 0.982_013_8).abs() < 1e-6, "{body}");
    let timing = reply.header("server-timing");
    for part in ["tokenize;dur=", "queue;dur=", "compute;dur="] {
        assert!(timing.contains(part), "{timing}");
    }
}

#[tokio::test]
async fn options_shape_the_answer() {
    let body = json!({"inputs": ["1", {"text": "2", "text_pair": "3"}], "top_k": 1,
        "raw_scores": true, "version": 3, "timeout_ms": 5000});
    let reply = Api::new().classify(body).await;
    assert_eq!(
        reply.json()["predictions"],
        json!([
            {"label": "no", "score": 3.0, "scores": {"no": 3.0}},
            {"label": "yes", "score": 5.0, "scores": {"yes": 5.0}},
        ])
    );
}

#[tokio::test]
async fn bad_bodies_are_told_apart() {
    let api = Api::new();
    let long = "é".repeat(501);
    let over = json!({"inputs": "1 ".repeat(1500)}).to_string();
    let cases: [(&[u8], u16, &str, &str); 19] = [
        (b"{", 400, "not-json", "EOF while parsing"),
        (b"", 400, "not-json", "EOF while parsing"),
        (b"{\"inputs\": \"\xff\"}", 400, "not-json", "unicode"),
        (b"{\"inputs\": \"\\ud800\"}", 400, "not-json", "hex escape"),
        (b"{\"inputs\": \"a\"} x", 400, "not-json", "trailing"),
        (b"{\"inputs\": 5}", 422, "invalid-body", "expected a text"),
        (
            b"{\"inputs\": [\"a\", 5]}",
            422,
            "invalid-body",
            "inputs[1]: expected a text, or an object",
        ),
        (
            b"{\"inputs\": {\"text\": 5}}",
            422,
            "invalid-body",
            "inputs.text: expected a string, got 5",
        ),
        (b"[]", 422, "invalid-body", "expected an object, got a list"),
        (b"{}", 422, "invalid-body", "missing field `inputs`"),
        (
            b"{\"inputs\": \"a\", \"topk\": 1}",
            422,
            "invalid-body",
            "unknown field `topk`",
        ),
        (
            b"{\"inputs\": \"a\", \"top_k\": 0}",
            422,
            "invalid-body",
            "at least 1",
        ),
        (
            b"{\"inputs\": \"a\", \"top_k\": -1}",
            422,
            "invalid-body",
            "top_k",
        ),
        (b"{\"inputs\": \"\"}", 422, "empty-input", "inputs[0]"),
        (
            b"{\"inputs\": [\"a\", \" \\n \"]}",
            422,
            "empty-input",
            "inputs[1]",
        ),
        (
            b"{\"inputs\": []}",
            422,
            "empty-input",
            "list of inputs is empty",
        ),
        (
            b"{\"inputs\": [\"a\",\"a\",\"a\",\"a\",\"a\"]}",
            413,
            "too-large",
            "at most 4",
        ),
        (
            b"{\"inputs\": \"a\", \"version\": 2}",
            409,
            "version-not-live",
            "version 3 answers",
        ),
        (over.as_bytes(), 413, "too-large", "the body is larger"),
    ];
    for (body, status, slug, sentence) in cases {
        let reply = api.post("/v1/classify/mood", body.to_vec()).await;
        let detail = reply.problem(status, slug);
        assert!(detail.contains(sentence), "{detail}");
    }
    let reply = api.classify(json!({"inputs": long})).await;
    assert!(reply.problem(413, "too-large").contains("500 characters"));
    let reply = api
        .classify(json!({"inputs": "1 ".repeat(21), "truncate": false}))
        .await;
    let detail = reply.problem(422, "sequence-too-long");
    assert!(
        detail.contains("21 tokens or more, but the task takes 20"),
        "{detail}"
    );
    assert_eq!(api.classify(json!({"inputs": "1"})).await.status, 200);
}

#[tokio::test]
async fn a_body_without_its_content_type_is_refused() {
    let request = Request::post("/v1/classify/mood").body(Body::from("{\"inputs\": \"a\"}"));
    let reply = Api::new().send(request.expect("a request")).await;
    let detail = reply.problem(415, "unsupported-media-type");
    assert!(
        detail.contains("Content-Type: application/json"),
        "{detail}"
    );
}

#[tokio::test]
async fn an_unknown_task_is_answered_with_the_known_ones_and_makes_no_series() {
    let api = Api::new();
    let reply = api.post("/v1/classify/mod", "{}").await;
    assert!(
        reply
            .problem(404, "unknown-task")
            .ends_with("the tasks are: mood")
    );
    assert!(
        api.get("/v1/tasks/mod")
            .await
            .problem(404, "unknown-task")
            .contains("\"mod\"")
    );
    assert!(!api.get("/metrics").await.body.contains("\"mod\""));
    api.state.tasks.remove("mood");
    let reply = api.classify(json!({"inputs": "a"})).await;
    assert!(reply.problem(404, "unknown-task").contains("no other yet"));
    let escaped = api.get("/v1/tasks/%FF").await;
    escaped.problem(400, "invalid-parameter");
}

#[tokio::test]
async fn unknown_routes_and_wrong_methods_are_problems_too() {
    let api = Api::new();
    assert!(
        api.get("/v1/nothing")
            .await
            .problem(404, "unknown-route")
            .contains("/v1/nothing")
    );
    let reply = api.get("/v1/classify/mood").await;
    assert!(
        reply
            .problem(405, "method-not-allowed")
            .contains("/v1/classify/mood")
    );
    assert_eq!(reply.header(header::ALLOW), "POST");
    let request = Request::builder().method(Method::DELETE).uri("/healthz");
    let reply = api
        .send(request.body(Body::empty()).expect("a request"))
        .await;
    reply.problem(405, "method-not-allowed");
}

#[tokio::test]
async fn a_failing_model_is_a_500_and_the_server_lives() {
    let api = Api::new();
    for word in [PANIC, NAN] {
        let reply = api.classify(json!({"inputs": word.to_string()})).await;
        assert!(reply.problem(500, "internal").contains("log"));
    }
    assert_eq!(api.classify(json!({"inputs": "1"})).await.status, 200);
}

#[tokio::test]
async fn a_full_queue_is_a_429_with_a_time_to_come_back() {
    let (model, mut keeper) = Scripted::gated();
    let options = Options {
        max_queue: 2,
        ..OPTIONS
    };
    let api = Arc::new(Api::with(&model, options));
    let first = tokio::spawn({
        let api = Arc::clone(&api);
        async move { api.classify(json!({"inputs": ["1", "2"]})).await }
    });
    keeper.entered().await;
    let refused = api.classify(json!({"inputs": "3"})).await;
    refused.problem(429, "queue-full");
    assert_eq!(refused.header(header::RETRY_AFTER), "1");
    drop(keeper);
    assert_eq!(first.await.expect("no panic").status, 200);
    let metrics = api.get("/metrics").await.body;
    for outcome in ["ok", "full"] {
        let line = format!("kdlora_requests_total{{outcome=\"{outcome}\",task=\"mood\"}} 1");
        assert!(metrics.contains(&line), "{metrics}");
    }
}

#[tokio::test]
async fn a_passed_deadline_is_a_504() {
    let (model, keeper) = Scripted::gated();
    let api = Api::with(&model, OPTIONS);
    let reply = api.classify(json!({"inputs": "1", "timeout_ms": 5})).await;
    assert!(
        reply
            .problem(504, "deadline-exceeded")
            .contains("within 5 ms")
    );
    drop(keeper);
}

#[tokio::test]
async fn a_client_that_goes_away_is_counted_once() {
    let (model, mut keeper) = Scripted::gated();
    let api = Arc::new(Api::with(&model, OPTIONS));
    let request = tokio::spawn({
        let api = Arc::clone(&api);
        async move { api.classify(json!({"inputs": "1"})).await }
    });
    keeper.entered().await;
    request.abort();
    assert!(request.await.is_err());
    let metrics = api.get("/metrics").await.body;
    assert!(metrics.contains("kdlora_requests_total{outcome=\"gone\",task=\"mood\"} 1"));
    assert!(metrics.contains("kdlora_in_flight_requests 0"));
    drop(keeper);
}

#[tokio::test]
async fn a_stopping_server_is_alive_but_not_ready() {
    let api = Api::new();
    assert_eq!(api.get("/readyz").await.status, 200);
    api.state.readiness.set_stopping();
    let reply = api.get("/readyz").await;
    assert!(reply.problem(503, "unavailable").contains("stopping"));
    assert_eq!(api.get("/healthz").await.status, 200);
}

#[tokio::test]
async fn tasks_are_listed_with_their_labels() {
    let api = Api::new();
    api.state
        .tasks
        .publish([fixture::resident(regression("tone"))]);
    let list = api.get("/v1/tasks").await.json();
    assert_eq!(
        list["tasks"][0],
        json!({"task": "mood", "version": 3, "problem_type": "single_label_classification",
            "labels": ["no", "yes"], "max_length": 20, "mode": "hot", "ready": true})
    );
    assert_eq!(list["tasks"][1]["task"], "tone");
    let folder = tempfile::tempdir().expect("a folder");
    std::fs::write(folder.path().join("report.json"), r#"{"anything": 1}"#).expect("a file");
    let mut entry = fixture::resident(fixture::task("mood", 4));
    entry.folder = folder.path().into();
    api.state.tasks.publish([entry]);
    let details = api.get("/v1/tasks/mood").await.json();
    assert_eq!(details["version"], 4);
    assert_eq!(details["report"], json!({"anything": 1}));
}

#[tokio::test]
async fn a_task_comes_as_markdown_when_asked() {
    let api = Api::new();
    let by_query = api.get("/v1/tasks/mood?format=markdown").await;
    assert!(
        by_query
            .header(header::CONTENT_TYPE)
            .starts_with("text/markdown")
    );
    assert!(
        by_query.body.starts_with("# mood, version 3"),
        "{}",
        by_query.body
    );
    let request = Request::get("/v1/tasks/mood")
        .header(header::ACCEPT, "text/html;q=0.9, text/markdown")
        .body(Body::empty());
    let by_header = api.send(request.expect("a request")).await;
    assert_eq!(by_header.body, by_query.body);
    let reply = api.get("/v1/tasks/mood?format=xml").await;
    assert!(reply.problem(400, "invalid-parameter").contains("markdown"));
}

#[tokio::test]
async fn admin_routes_ask_for_the_token() {
    let api = Api::new();
    let reply = api.get("/admin/greeting").await;
    reply.problem(401, "unauthorized");
    assert!(reply.header(header::WWW_AUTHENTICATE).starts_with("Bearer"));
    let request = Request::get("/admin/greeting")
        .header(header::AUTHORIZATION, "Bearer s3cret-s3cret-s3cret")
        .body(Body::empty());
    let reply = api.send(request.expect("a request")).await;
    assert_eq!(
        (reply.status, reply.body.as_str()),
        (StatusCode::OK, "hello")
    );
}

#[tokio::test]
async fn errors_do_not_tell_where_the_servers_folders_are() {
    let request = Request::get("/admin/failure")
        .header(header::AUTHORIZATION, "Bearer s3cret-s3cret-s3cret")
        .body(Body::empty());
    let reply = Api::new().send(request.expect("a request")).await;
    let detail = reply.problem(422, "unusable");
    assert_eq!(detail, "cannot read jobs/7/rows.csv (of /srv/states)");
    assert_eq!(
        reply.header(header::CONTENT_LENGTH),
        reply.body.len().to_string()
    );
}

#[tokio::test]
async fn a_default_task_that_is_none_is_told_apart_from_one_in_the_path() {
    let mut api = Api::new();
    api.state.default_task = Some("moood".into());
    api.router = router(api.state.clone(), &edge(), admin(), OpenApiRouter::new());
    for path in ["/", "/predict"] {
        let reply = api.post(path, json!({"inputs": "1"}).to_string()).await;
        let body = reply.json();
        assert_eq!(
            (reply.status.as_u16(), &body["title"]),
            (404, &json!("Unknown task"))
        );
        let detail = body["detail"].as_str().expect("a sentence");
        assert!(
            detail.contains("--default-task names \"moood\"") && detail.contains("mood"),
            "{detail}"
        );
    }
}

#[tokio::test]
async fn the_openapi_document_has_every_route_and_every_reference() {
    let document = Api::new().get("/openapi.json").await.json();
    let paths = document["paths"].as_object().expect("paths");
    for path in [
        "/v1/classify/{task}",
        "/v1/tasks",
        "/v1/tasks/{task}",
        "/healthz",
        "/readyz",
        "/metrics",
        "/admin/greeting",
    ] {
        assert!(paths.contains_key(path), "{path}");
    }
    let responses = &document["paths"]["/v1/classify/{task}"]["post"]["responses"];
    for status in [
        "200", "400", "404", "409", "413", "415", "422", "429", "500", "503", "504",
    ] {
        assert!(responses[status].is_object(), "{status}");
    }
    let text = document.to_string();
    for reference in text.split("\"$ref\":\"#/components/schemas/").skip(1) {
        let name = reference.split('"').next().expect("a name");
        assert!(
            document["components"]["schemas"][name].is_object(),
            "{name}"
        );
    }
}

#[tokio::test]
async fn while_starting_only_health_answers_and_then_all() {
    let api = Api::new();
    let (readiness, metrics) = (Readiness::default(), Arc::clone(&api.state.metrics));
    let current = Arc::new(ArcSwap::from_pointee(starting(readiness, metrics, &edge())));
    let switching = Api {
        router: switchable(Arc::clone(&current)),
        state: api.state.clone(),
    };
    assert_eq!(switching.get("/healthz").await.status, 200);
    assert!(
        switching
            .get("/readyz")
            .await
            .problem(503, "unavailable")
            .contains("starting")
    );
    let reply = switching.classify(json!({"inputs": "1"})).await;
    reply.problem(503, "unavailable");
    current.store(Arc::new(api.router.clone()));
    yield_now().await;
    assert_eq!(switching.get("/readyz").await.status, 200);
    assert_eq!(switching.classify(json!({"inputs": "1"})).await.status, 200);
}

#[tokio::test]
async fn every_answer_is_counted_by_route_and_status() {
    let api = Api::new();
    api.get("/v1/tasks/mood").await;
    api.get("/v1/tasks/nothing").await;
    api.get("/nowhere").await;
    api.get("/nowhere/else").await;
    api.get("/admin/greeting").await;
    api.post("/v1/tasks/mood", "").await;
    api.classify(json!({"inputs": "good"})).await;
    let odd = Request::builder().method("BREW").uri("/healthz");
    api.send(odd.body(Body::empty()).expect("a request")).await;
    let with_token = Request::get("/admin/greeting")
        .header(header::AUTHORIZATION, "Bearer s3cret-s3cret-s3cret")
        .body(Body::empty());
    api.send(with_token.expect("a request")).await;
    let text = api.get("/metrics").await.body;
    for (method, route, status, count) in [
        ("GET", "/v1/tasks/{task}", 200, 1),
        ("GET", "/v1/tasks/{task}", 404, 1),
        ("GET", "none", 404, 2),
        ("GET", "/admin/greeting", 401, 1),
        ("GET", "/admin/greeting", 200, 1),
        ("POST", "/v1/tasks/{task}", 405, 1),
        ("POST", "/v1/classify/{task}", 200, 1),
        ("other", "/healthz", 405, 1),
    ] {
        let line = format!(
            "kdlora_http_requests_total{{method=\"{method}\",route=\"{route}\",status=\"{status}\"}} {count}\n"
        );
        assert!(text.contains(&line), "{line} in {text}");
    }
}
