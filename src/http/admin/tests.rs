//! The admin routes over a store and a runner whose processes never end.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::http::{Request, StatusCode, header};
use axum::response::Response;
use http_body_util::BodyExt;
use serde_json::{Value, json};
use tempfile::TempDir;
use tower::ServiceExt;

use super::*;
use crate::adapter::KnownEncoders;
use crate::distill::ask;
use crate::distill::runner::{JobLimits, RunnerConfig};
use crate::encoder::EncoderId;
use crate::store::Origin;
use crate::telemetry::Metrics;

struct House {
    folder: TempDir,
    store: Store,
    router: Router,
}

async fn house() -> House {
    house_with(LiveHook::new(|_| async { Ok(()) })).await
}

async fn house_with(live_hook: LiveHook) -> House {
    let folder = tempfile::tempdir().unwrap();
    let data_root = folder.path().join("data");
    fs::create_dir(&data_root).unwrap();
    let store = Store::open(&folder.path().join("state")).await.unwrap();
    let config = RunnerConfig {
        private: Default::default(),
        program: "/bin/sh".into(),
        arguments: ["-c", "exec sleep 600", "job"].map(OsString::from).into(),
        environment: Vec::new(),
        metrics: Arc::new(Metrics::new().unwrap()),
        limits: JobLimits::default(),
        live_hook: live_hook.clone(),
    };
    let router = routes(AdminConfig {
        store: store.clone(),
        runner: Runner::start(store.clone(), config),
        live_hook,
        check_adapter: Arc::new(|_: &Path| Ok(())),
        student: Arc::new(EncoderIdentity {
            id: EncoderId {
                name: "mpnet-base-l3".to_owned(),
                digest: "of the student".to_owned(),
            },
            known: KnownEncoders::default(),
        }),
        data_root: Some(data_root.canonicalize().unwrap()),
        adapters: None,
        cache: data_root.join("cache"),
        teachers: TeacherDesk::start(ask::Settings {
            cache: data_root.join("cache"),
            memory: 1 << 20,
            idle: Duration::from_secs(60),
            known: KnownEncoders::default(),
        })
        .unwrap(),
        limits: Limits::default(),
        max_upload_bytes: 100_000,
        max_event_streams: 2,
    });
    House {
        folder,
        store,
        router: router.into(),
    }
}

impl House {
    async fn send(&self, request: Request<Body>) -> Answer {
        let response = self.router.clone().oneshot(request).await.unwrap();
        Answer::read(response).await
    }

    async fn get(&self, path: &str) -> Answer {
        self.send(Request::get(path).body(Body::empty()).unwrap())
            .await
    }

    async fn post(&self, path: &str, body: &Value) -> Answer {
        self.send(json_request(path).body(text(body)).unwrap())
            .await
    }

    async fn distill(&self, body: &Value) -> Answer {
        self.post("/admin/distill", body).await
    }

    async fn distill_with_key(&self, body: &Value, key: &str) -> Answer {
        let request = json_request("/admin/distill").header("Idempotency-Key", key);
        self.send(request.body(text(body)).unwrap()).await
    }

    /// Sends parts (name, file name, content) as a form.
    async fn upload(&self, parts: &[(&str, Option<&str>, &str)]) -> Answer {
        let mut body = String::new();
        for (name, file, content) in parts {
            let file = file.map_or(String::new(), |file| format!("; filename=\"{file}\""));
            body += &format!(
                "--edge\r\nContent-Disposition: form-data; name=\"{name}\"{file}\r\n\r\n{content}\r\n"
            );
        }
        body += "--edge--\r\n";
        let request = Request::post("/admin/distill")
            .header(header::CONTENT_TYPE, "multipart/form-data; boundary=edge")
            .body(Body::from(body));
        self.send(request.unwrap()).await
    }

    fn job_folders(&self) -> usize {
        fs::read_dir(self.store.root().join("jobs"))
            .unwrap()
            .count()
    }

    async fn add_version(&self, content: &str) {
        let folder = self.folder.path().join(content);
        fs::create_dir(&folder).unwrap();
        fs::write(folder.join("adapter_model.safetensors"), content).unwrap();
        self.store
            .add_version("topic", &folder, Origin::Imported)
            .await
            .unwrap();
    }
}

fn json_request(path: &str) -> axum::http::request::Builder {
    Request::post(path).header(header::CONTENT_TYPE, "application/json")
}

fn text(body: &Value) -> Body {
    Body::from(body.to_string())
}

#[derive(Debug)]
struct Answer {
    status: StatusCode,
    location: Option<String>,
    body: Value,
}

impl Answer {
    async fn read(response: Response) -> Self {
        let location = response.headers().get(header::LOCATION);
        let location = location.map(|location| location.to_str().unwrap().to_owned());
        let status = response.status();
        let body = axum::body::to_bytes(response.into_body(), usize::MAX);
        Self {
            status,
            location,
            body: serde_json::from_slice(&body.await.unwrap()).unwrap(),
        }
    }

    fn id(&self) -> &str {
        self.body["id"]
            .as_str()
            .unwrap_or_else(|| panic!("{self:?}"))
    }

    /// The client's fault, with a sentence that says `part`.
    fn assert_problem(&self, status: u16, part: &str) {
        assert_eq!(self.status.as_u16(), status, "{self:?}");
        let detail = self.body["detail"].as_str().unwrap();
        assert!(detail.contains(part), "{detail}");
    }
}

/// Enough rows of two classes to cut splits from.
fn rows() -> Vec<Value> {
    let row = |index: usize| {
        let label = if index.is_multiple_of(2) {
            "good"
        } else {
            "bad"
        };
        json!({ "text": format!("text {index}"), "label": label })
    };
    (0..40).map(row).collect()
}

fn spec() -> Value {
    json!({ "task": "topic", "data": { "train": { "rows": rows() } } })
}

fn lines() -> String {
    rows().iter().map(|row| format!("{row}\n")).collect()
}

#[tokio::test]
async fn a_good_request_becomes_a_job_that_can_be_watched_and_cancelled() {
    let house = house().await;
    let answer = house.distill(&spec()).await;
    assert_eq!(answer.status, StatusCode::ACCEPTED, "{answer:?}");
    let location = answer.location.clone().unwrap();
    assert_eq!(location, format!("/admin/jobs/{}", answer.id()));

    let job = house.get(&location).await;
    assert_eq!(job.body["task"], "topic");
    let listed = house.get("/admin/jobs").await;
    assert_eq!(listed.body["jobs"][0]["id"], answer.id());

    let delete = || Request::delete(&location).body(Body::empty()).unwrap();
    let cancelled = house.send(delete()).await;
    assert_eq!(cancelled.body["state"], "cancelled", "{cancelled:?}");
    let again = house.send(delete()).await;
    again.assert_problem(409, "over already (cancelled)");
    house
        .get("/admin/jobs/nothing")
        .await
        .assert_problem(404, "no job 'nothing'");
}

#[tokio::test]
async fn inline_rows_are_kept_as_files_and_not_in_the_database() {
    let house = house().await;
    let answer = house.distill(&spec()).await;
    let stored = house.store.job_spec(answer.id()).await.unwrap();
    let path = stored["data"]["train"]["path"].as_str().unwrap();
    assert_eq!(fs::read_to_string(path).unwrap(), lines());
    assert!(PathBuf::from(path).starts_with(house.store.job_folder(answer.id())));
}

#[tokio::test]
async fn uploaded_files_are_taken_in() {
    let house = house().await;
    let answer = house
        .upload(&[
            ("spec", None, r#"{"task":"topic","training":{"epochs":2}}"#),
            ("train", Some("Rows.JSONL"), &lines()),
            ("test", Some("t.csv"), "text,label\nfine,good\npoor,bad\n"),
        ])
        .await;
    assert_eq!(answer.status, StatusCode::ACCEPTED, "{answer:?}");
    let stored = house.store.job_spec(answer.id()).await.unwrap();
    let path = stored["data"]["train"]["path"].as_str().unwrap();
    assert_eq!(fs::read_to_string(path).unwrap(), lines());
    let path = stored["data"]["test"]["path"].as_str().unwrap();
    assert!(path.ends_with("test.csv"), "{path}");
    assert_eq!(stored["training"]["epochs"], 2);
}

#[tokio::test]
async fn a_file_below_the_data_root_is_used_where_it_is() {
    let house = house().await;
    let path = house.folder.path().join("data/rows.jsonl");
    fs::write(&path, lines()).unwrap();
    let mut spec = spec();
    spec["data"]["train"] = json!({ "path": "rows.jsonl" });
    let answer = house.distill(&spec).await;
    assert_eq!(answer.status, StatusCode::ACCEPTED, "{answer:?}");
    let stored = house.store.job_spec(answer.id()).await.unwrap();
    let expected = path.canonicalize().unwrap();
    assert_eq!(stored["data"]["train"]["path"], json!(expected));
}

#[tokio::test]
async fn a_request_that_is_sent_twice_makes_one_job() {
    let house = house().await;
    let first = house.distill_with_key(&spec(), "key").await;
    let again = house.distill_with_key(&spec(), "key").await;
    assert_eq!(first.id(), again.id());
    assert_eq!(again.status, StatusCode::ACCEPTED);
    let mut other = spec();
    other["training"] = json!({ "epochs": 1 });
    let other = house.distill_with_key(&other, "key").await;
    other.assert_problem(409, "different request");
    assert_eq!(house.job_folders(), 1);
}

#[tokio::test]
async fn bad_requests_are_explained_and_leave_nothing_behind() {
    let house = house().await;
    let one_class: Vec<_> = rows().into_iter().step_by(2).collect();
    let unlabelled: Vec<_> = (0..40)
        .map(|i| json!({ "text": format!("t {i}") }))
        .collect();
    for (pointer, value, part) in [
        ("/task", json!("No Name"), "lower-case"),
        ("/task", json!(7), "expected a string"),
        ("/tsk", json!(1), "unknown field `tsk`"),
        ("/training", json!({ "epochs": 0 }), "training.epochs"),
        (
            "/training",
            json!({ "epochs": 1.5 }),
            "training.epochs: expected a whole number, got 1.5",
        ),
        ("/training", json!([2]), "training: expected an object"),
        ("/lora", json!([4, 8]), "lora: expected an object"),
        ("/gate", json!([0.5]), "gate: expected an object"),
        ("/job", json!([1]), "job: expected an object"),
        (
            "/teacher",
            json!(["minilm-l6"]),
            "teacher: expected an object",
        ),
        (
            "/teacher",
            json!({ "http": ["http://h/"] }),
            "teacher.http: expected an object",
        ),
        (
            "/training",
            json!({ "layers": [1] }),
            "training.layers: expected an object",
        ),
        ("/data", json!([{ "rows": [] }]), "data: expected an object"),
        (
            "/data/columns",
            json!(["text", "label"]),
            "data.columns: expected an object, got a list",
        ),
        (
            "/data/columns",
            json!({ "text": "text", "text_pair": "label" }),
            "for both text_pair and label",
        ),
        (
            "/data/class_weights",
            json!([1.0]),
            "data.class_weights: expected \"balanced\", or an object",
        ),
        ("/data/train", json!([[]]), "data.train: expected one of"),
        (
            "/data/train",
            json!({ "rows": { "text": "a" } }),
            "data.train.rows: expected a list",
        ),
        ("/data/train/rows", json!(one_class), "two classes"),
        ("/data/train/rows", json!(unlabelled), "label"),
        (
            "/data/train",
            json!({ "path": "../../etc/passwd" }),
            "below the data root",
        ),
        (
            "/data/train",
            json!({ "path": "none.jsonl" }),
            "no none.jsonl below",
        ),
        (
            "/teacher",
            json!({ "model": "gpt-5" }),
            "minilm-l6, mpnet-base",
        ),
        (
            "/teacher",
            json!({ "model": "mpnet-base" }),
            "without a classifier",
        ),
        (
            "/teacher",
            json!({ "model": "mpnet-base", "adapter": "nothing" }),
            "'nothing' names no shipped adapter",
        ),
    ] {
        let mut spec = spec();
        let (parent, key) = pointer.rsplit_once('/').unwrap();
        spec.pointer_mut(parent).unwrap()[key] = value;
        house.distill(&spec).await.assert_problem(422, part);
    }
    assert_eq!(house.job_folders(), 0);
    assert_eq!(house.get("/admin/jobs").await.body["jobs"], json!([]));
}

#[tokio::test]
async fn bad_forms_are_explained_and_leave_nothing_behind() {
    let house = house().await;
    let spec = r#"{"task":"topic"}"#;
    let inline = spec_text();
    let long = "x".repeat(200_000);
    for (parts, status, part) in [
        (
            vec![("train", Some("a.jsonl"), "{}")],
            422,
            "no part `spec`",
        ),
        (vec![("spec", None, "{")], 400, "the part `spec`"),
        (
            vec![("spec", None, r#"{"task":"a","task":"b"}"#)],
            422,
            "duplicate field `task`",
        ),
        (
            vec![
                ("spec", None, r#"["topic"]"#),
                ("train", Some("a.jsonl"), "{}"),
            ],
            422,
            "must be a JSON object",
        ),
        (
            vec![("spec", None, spec), ("train", None, "{}")],
            422,
            "ends in .jsonl",
        ),
        (
            vec![("spec", None, spec), ("more", None, "{}")],
            422,
            "a part `more`",
        ),
        (
            vec![("spec", None, spec), ("spec", None, spec)],
            422,
            "two parts",
        ),
        (
            vec![
                ("spec", None, &inline),
                ("train", Some("a.csv"), "text,label\n"),
            ],
            422,
            "come twice",
        ),
        (
            vec![
                ("spec", None, spec),
                ("train", Some("a.jsonl"), "no json\n"),
            ],
            422,
            "the train file train.jsonl",
        ),
        (
            vec![("spec", None, spec), ("train", Some("a.jsonl"), &long)],
            413,
            "--max-upload",
        ),
    ] {
        house.upload(&parts).await.assert_problem(status, part);
    }
    assert_eq!(house.job_folders(), 0);
}

fn spec_text() -> String {
    spec().to_string()
}

#[tokio::test]
async fn other_bodies_are_refused() {
    let house = house().await;
    let plain = Request::post("/admin/distill")
        .header(header::CONTENT_TYPE, "text/plain")
        .body(Body::from("{}"));
    let answer = house.send(plain.unwrap()).await;
    answer.assert_problem(415, "multipart/form-data");
    let broken = Request::post("/admin/distill")
        .header(header::CONTENT_TYPE, "application/json")
        .body(Body::from("{"));
    assert_eq!(house.send(broken.unwrap()).await.status.as_u16(), 400);
    for (path, list) in [
        (
            "/admin/distill",
            json!(["topic", { "train": { "rows": rows() } }]),
        ),
        ("/admin/adapters", json!(["topic", "adapter", true])),
        ("/admin/tasks/topic/promote", json!([1])),
        ("/admin/tasks/topic/mode", json!(["merged"])),
        ("/admin/tasks/topic/teacher", json!(["a text"])),
    ] {
        let answer = house.post(path, &list).await;
        answer.assert_problem(422, "expected an object, got a list");
    }
    let twice = spec_text().replacen('{', r#"{"task": "other", "#, 1);
    let twice = Request::post("/admin/distill")
        .header(header::CONTENT_TYPE, "application/json")
        .body(Body::from(twice));
    let answer = house.send(twice.unwrap()).await;
    answer.assert_problem(422, "duplicate field `task`");
    assert_eq!(house.job_folders(), 0);
}

#[tokio::test]
async fn versions_go_live_and_back() {
    let house = house().await;
    house.add_version("one").await;
    house.add_version("two").await;
    for version in [1, 2] {
        let body = json!({ "version": version, "reason": "better" });
        let live = house.post("/admin/tasks/topic/promote", &body).await;
        assert_eq!(live.body["version"], version, "{live:?}");
    }
    let back = "/admin/tasks/topic/rollback?reason=worse";
    let back = house.post(back, &Value::Null).await;
    assert_eq!(back.body["version"], 1, "{back:?}");

    let listed = house.get("/admin/tasks/topic/versions").await.body;
    assert_eq!(listed["live"], 1);
    assert_eq!(listed["versions"].as_array().unwrap().len(), 2);
    assert_eq!(listed["versions"][0]["origin"], "imported");
    let reasons: Vec<_> = (0..3).map(|i| &listed["history"][i]["reason"]).collect();
    assert_eq!(reasons, ["better", "better", "worse"]);

    let again = house
        .post("/admin/tasks/topic/rollback", &Value::Null)
        .await;
    again.assert_problem(409, "no earlier live version");
    let body = json!({ "version": 9 });
    let unknown = house.post("/admin/tasks/topic/promote", &body).await;
    unknown.assert_problem(404, "no version 9");
    let unknown = house.get("/admin/tasks/nothing/versions").await;
    unknown.assert_problem(404, "no task 'nothing'");
}

#[tokio::test]
async fn a_version_that_cannot_be_served_does_not_stay_live() {
    let calls = AtomicUsize::new(0);
    let hook = LiveHook::new(move |_| {
        let second = calls.fetch_add(1, Ordering::SeqCst) == 1;
        async move {
            match second {
                true => Err("a tensor is missing".into()),
                false => Ok(()),
            }
        }
    });
    let house = house_with(hook).await;
    house.add_version("one").await;
    house.add_version("two").await;
    let promote = "/admin/tasks/topic/promote";
    house.post(promote, &json!({ "version": 1 })).await;
    let refused = house.post(promote, &json!({ "version": 2 })).await;
    refused.assert_problem(422, "a tensor is missing");
    assert_eq!(house.store.live("topic").await.unwrap().unwrap().version, 1);
}

impl House {
    /// The stream of a job's events.
    async fn follow(&self, path: &str, last_event_id: Option<&str>) -> (StatusCode, Body) {
        let mut request = Request::get(path);
        if let Some(id) = last_event_id {
            request = request.header("Last-Event-ID", id);
        }
        let request = request.body(Body::empty()).unwrap();
        let response = self.router.clone().oneshot(request).await.unwrap();
        (response.status(), response.into_body())
    }
}

/// Events that were streamed, as the JSON of their data.
fn told(streamed: &[u8]) -> Vec<Value> {
    let text = std::str::from_utf8(streamed).unwrap();
    let events = text.split("\n\n").filter(|event| !event.is_empty());
    let events = events.map(|event| {
        assert!(event.contains("event: job\n"), "{event}");
        let data = event.lines().find_map(|line| line.strip_prefix("data: "));
        serde_json::from_str(data.unwrap()).unwrap()
    });
    events.collect()
}

async fn rest(body: Body) -> Vec<Value> {
    told(&axum::body::to_bytes(body, usize::MAX).await.unwrap())
}

#[tokio::test]
async fn events_tell_of_a_job_until_it_ends() {
    let house = house().await;
    let location = house.distill(&spec()).await.location.unwrap();
    let path = format!("{location}/events");
    let (status, mut body) = house.follow(&path, None).await;
    assert_eq!(status, StatusCode::OK);
    let first = told(&body.frame().await.unwrap().unwrap().into_data().unwrap());
    assert_eq!(first.len(), 1, "{first:?}");
    assert_ne!(first[0]["state"], "cancelled");

    while house.get(&location).await.body["state"] != "running" {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let delete = Request::delete(&location).body(Body::empty()).unwrap();
    let cancelled = house.send(delete).await;
    let events = rest(body).await;
    assert_eq!(events.last(), Some(&cancelled.body), "{events:?}");

    let (_, afterwards) = house.follow(&path, None).await;
    assert_eq!(rest(afterwards).await, [cancelled.body]);
    let (known, nothing) = house.follow(&path, Some("cancelled")).await;
    assert_eq!(known, StatusCode::NO_CONTENT);
    assert_eq!(rest(nothing).await, Vec::<Value>::new());
    let unknown = house.get("/admin/jobs/nothing/events").await;
    unknown.assert_problem(404, "no job 'nothing'");
}

#[tokio::test]
async fn the_end_of_a_log_is_cut_at_a_line() {
    let house = house().await;
    let answer = house.distill(&spec()).await;
    let folder = house.store.job_folder(answer.id());
    let path = format!("{}/log", answer.location.as_ref().unwrap());
    while !folder.join("log.txt").exists() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    fs::write(folder.join("log.txt"), "first\nsecond\nthird\n").unwrap();
    for (query, expected) in [
        ("", "first\nsecond\nthird\n"),
        ("?bytes=9", "third\n"),
        ("?bytes=19", "first\nsecond\nthird\n"),
    ] {
        let request = Request::get(format!("{path}{query}"));
        let request = request.body(Body::empty()).unwrap();
        let response = house.router.clone().oneshot(request).await.unwrap();
        assert_eq!(
            response.headers()[header::CONTENT_TYPE],
            "text/plain; charset=utf-8"
        );
        let body = axum::body::to_bytes(response.into_body(), usize::MAX).await;
        assert_eq!(body.unwrap(), expected, "{query}");
    }
    let bad = house.get(&format!("{path}?bytes=0")).await;
    bad.assert_problem(400, "bytes must be");
    house
        .get("/admin/jobs/nothing/log")
        .await
        .assert_problem(404, "no job 'nothing'");
}

#[tokio::test]
async fn the_priority_of_a_request_is_that_of_its_job() {
    let house = house().await;
    let mut spec = spec();
    spec["job"] = json!({ "priority": 7 });
    let answer = house.distill(&spec).await;
    assert_eq!(answer.body["priority"], 7, "{answer:?}");
    spec["job"] = json!({ "priority": 101, "time_limit_seconds": 0 });
    let refused = house.distill(&spec).await;
    refused.assert_problem(422, "job.priority is 101 but must be -100 to 100");
    refused.assert_problem(422, "job.time_limit_seconds");
}
