//! Compressed bodies, paths that end in a slash, and lists where objects belong.

use std::io::Write as _;

use axum::http::HeaderValue;
use flate2::Compression;
use flate2::write::GzEncoder;
use futures_util::{StreamExt as _, stream};

use super::*;
use crate::http::extract::Json;
use crate::text::Input;

fn gzip(text: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(text).expect("memory");
    encoder.finish().expect("memory")
}

fn zstd(text: &[u8]) -> Vec<u8> {
    ::zstd::encode_all(text, 0).expect("memory")
}

fn sent(path: &str, encodings: &[&'static str], body: Vec<u8>) -> Request<Body> {
    let mut request = Request::post(path)
        .header(header::CONTENT_TYPE, "application/json")
        .header(header::AUTHORIZATION, "Bearer s3cret-s3cret-s3cret")
        .body(Body::from(body))
        .expect("a request");
    for encoding in encodings {
        let encoding = HeaderValue::from_static(encoding);
        let headers = request.headers_mut();
        headers.append(header::CONTENT_ENCODING, encoding);
    }
    request
}

/// The routes that read a body, with a body that each takes.
fn routes_with_a_body() -> [(&'static str, Value); 5] {
    let tensor = json!({"name": "text", "shape": [1], "datatype": "BYTES", "data": ["3 4"]});
    [
        ("/v1/classify/mood", json!({"inputs": "3 4"})),
        ("/tasks/mood", json!({"inputs": "3 4"})),
        ("/tasks/mood/predict", json!({"inputs": "3 4"})),
        ("/v2/models/mood/infer", json!({"inputs": [tensor]})),
        ("/admin/echo", json!({"text": "3 4"})),
    ]
}

#[utoipa::path(post, path = "/admin/echo", request_body = Input, responses((status = 200)))]
pub(super) async fn echo(Json(input): Json<Input>) -> Json<Input> {
    Json(input)
}

#[tokio::test]
async fn compressed_bodies_are_read_on_every_route() {
    let api = Api::new();
    for (path, body) in routes_with_a_body() {
        let body = body.to_string().into_bytes();
        let plain = api.send(sent(path, &[], body.clone())).await;
        assert_eq!(plain.status, 200, "{path}: {}", plain.body);
        for (encoding, body) in [
            ("identity", body.clone()),
            ("gzip", gzip(&body)),
            ("X-GZip", gzip(&body)),
            ("zstd", zstd(&body)),
        ] {
            let reply = api.send(sent(path, &[encoding], body)).await;
            assert_eq!(reply.body, plain.body, "{path}, {encoding}");
        }
    }
}

#[tokio::test]
async fn other_encodings_are_refused_in_the_words_of_the_route() {
    let api = Api::new();
    for (path, body) in routes_with_a_body() {
        let body = body.to_string().into_bytes();
        for encodings in [
            &["br"][..],
            &["deflate"],
            &["gzip, gzip"],
            &["gzip", "gzip"],
            &["identity", "zstd"],
        ] {
            let reply = api.send(sent(path, encodings, body.clone())).await;
            assert_eq!(reply.status, 415, "{path}, {encodings:?}: {}", reply.body);
            assert_eq!(
                reply.header(header::ACCEPT_ENCODING),
                "gzip, zstd, identity"
            );
            let problem = reply.json();
            assert_eq!(problem["type"], "urn:kdlora:problem:unsupported-media-type");
            let foreign = !path.starts_with("/v1/") && !path.starts_with("/admin/");
            assert_eq!(problem["error"].is_string(), foreign, "{path}: {problem}");
        }
    }
}

#[tokio::test]
async fn the_limit_holds_for_what_a_body_unpacks_to() {
    let api = Api::new();
    // The limit of these routes is 2000 bytes, of admin routes axum's 2 MiB.
    for (path, _) in routes_with_a_body() {
        let spaces = vec![b' '; 64 << 20];
        for (encoding, bomb) in [("gzip", gzip(&spaces)), ("zstd", zstd(&spaces))] {
            let reply = api.send(sent(path, &[encoding], bomb)).await;
            assert_eq!(reply.status, 413, "{path}, {encoding}: {}", reply.body);
        }
    }
    let body = json!({"inputs": "3 4"}).to_string();
    for (encoding, broken) in [
        ("gzip", gzip(body.as_bytes())[..20].to_vec()),
        ("gzip", body.clone().into_bytes()),
        ("zstd", zstd(body.as_bytes())[..8].to_vec()),
        ("zstd", body.clone().into_bytes()),
    ] {
        let reply = api
            .send(sent("/v1/classify/mood", &[encoding], broken))
            .await;
        assert_eq!(reply.status, 400, "{encoding}: {}", reply.body);
    }
    assert_eq!(api.classify(json!({"inputs": "1"})).await.status, 200);
}

#[tokio::test(start_paused = true)]
async fn a_compressed_body_that_stops_is_given_up() {
    let body = gzip(json!({"inputs": "3 4"}).to_string().as_bytes());
    let beginning = Ok::<_, std::io::Error>(body[..20].to_vec());
    let stream = stream::iter([beginning]).chain(stream::pending());
    let request = Request::post("/v1/classify/mood")
        .header(header::CONTENT_TYPE, "application/json")
        .header(header::CONTENT_ENCODING, "gzip")
        .body(Body::from_stream(stream));
    let reply = Api::new().send(request.expect("a request")).await;
    reply.problem(408, "request-timeout");
}

#[tokio::test]
async fn a_slash_at_the_end_changes_neither_the_answer_nor_who_may_have_it() {
    let api = Api::new();
    for path in [
        "/v1/tasks",
        "/v1/tasks/mood",
        "/v2",
        "/v2/models/mood",
        "/info",
        "/tasks/mood/info",
        "/healthz",
        "/openapi.json",
    ] {
        let reply = api.get(&format!("{path}/")).await;
        assert_eq!(reply.status, 200, "{path}");
        assert_eq!(reply.body, api.get(path).await.body, "{path}");
    }
    let page = api.get("/v1/tasks/?limit=1&after=mood").await;
    assert_eq!(page.json(), json!({"tasks": []}));
    for (path, body) in routes_with_a_body() {
        let body = body.to_string().into_bytes();
        let reply = api.send(sent(&format!("{path}/"), &[], body.clone())).await;
        assert_eq!(reply.status, 200, "{path}");
    }
    api.get("/admin/greeting/")
        .await
        .problem(401, "unauthorized");
    for path in [
        "//v1/tasks",
        "/v1/tasks//",
        "/v1//tasks",
        "/v1/tasks%2f",
        "/V1/tasks",
        "//admin/greeting",
        "/admin/greeting//",
        "/admin//greeting",
        "/admin%2fgreeting",
        "/Admin/greeting",
    ] {
        let reply = api.get(path).await;
        assert_eq!(reply.status, 404, "{path}: {}", reply.body);
    }
    assert_eq!(api.get("/docs/").await.status, 200);
}

#[tokio::test]
async fn a_list_is_refused_wherever_an_object_is_meant() {
    let api = Api::new();
    let tensor = json!({"name": "text", "shape": [1], "datatype": "BYTES", "data": ["3"]});
    let infer = "/v2/models/mood/infer";
    for (path, body, place) in [
        ("/v1/classify/mood", json!(["Fine film.", 1, true]), ""),
        (
            "/v1/classify/mood",
            json!({"inputs": [["a", "b"]]}),
            "inputs[0]",
        ),
        ("/tasks/mood", json!(["3"]), ""),
        (
            "/tasks/mood",
            json!({"inputs": "3", "parameters": [1]}),
            "parameters",
        ),
        ("/tasks/mood/predict", json!(["3", true]), ""),
        (infer, json!(["id", {}, [tensor]]), ""),
        (
            infer,
            json!({"inputs": [["text", [1], "BYTES", {}, ["3"]]]}),
            "inputs[0]",
        ),
        (
            infer,
            json!({"inputs": [tensor], "parameters": [true]}),
            "parameters",
        ),
        (
            infer,
            json!({"inputs": [tensor], "outputs": [["label"]]}),
            "outputs[0]",
        ),
        (
            infer,
            json!({"inputs": [tensor], "outputs": [{"name": "label", "parameters": [true]}]}),
            "outputs[0].parameters",
        ),
        ("/admin/echo", json!(["a", "b"]), ""),
    ] {
        let reply = api
            .send(sent(path, &[], body.to_string().into_bytes()))
            .await;
        assert_eq!(reply.status, 422, "{path}, {body}: {}", reply.body);
        let detail = reply.json()["detail"].as_str().expect("a text").to_owned();
        let expected = match place {
            "" => "expected an object, got a list".to_owned(),
            "inputs[0]" if path.starts_with("/v1/") => "inputs[0]: expected a text".to_owned(),
            place => format!("{place}: expected an object, got a list"),
        };
        assert!(detail.starts_with(&expected), "{path}, {body}: {detail}");
    }
}
