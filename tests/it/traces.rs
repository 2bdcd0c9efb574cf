//! Traces and log lines of the real server, as a collector and a log reader get them.

use std::io::Read;
use std::process::Stdio;
use std::time::Instant;

use crate::common::{Install, PATIENCE, Server};
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::{KeyValue, any_value};
use opentelemetry_proto::tonic::trace::v1::Span;
use opentelemetry_proto::tonic::trace::v1::span::SpanKind;
use prost::Message as _;
use rustix::process::Signal;
use serde_json::{Value, json};
use wiremock::matchers::{method, path};
use wiremock::{Mock, MockServer, ResponseTemplate};

const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const CALLER: &str = "b7ad6b7169203331";

async fn classify(server: &Server, id: &str) -> u16 {
    let request = server
        .client
        .post(format!("{}/v1/classify/pairs", server.url))
        .header("traceparent", format!("00-{TRACE}-{CALLER}-01"))
        .header("x-request-id", id)
        .json(&json!({"inputs": "a b c"}));
    request.send().await.expect("an answer").status().as_u16()
}

/// The spans that the collector has got.
async fn spans(collector: &MockServer) -> Vec<Span> {
    let requests = collector.received_requests().await.expect("they are kept");
    let mut spans = Vec::new();
    for request in requests {
        let body = ExportTraceServiceRequest::decode(&*request.body).expect("OTLP");
        for resource in body.resource_spans {
            let attributes = resource.resource.expect("a resource").attributes;
            assert_eq!(attribute(&attributes, "service.name"), text("kdlora"));
            spans.extend(
                resource
                    .scope_spans
                    .into_iter()
                    .flat_map(|scope| scope.spans),
            );
        }
    }
    spans
}

fn attribute(attributes: &[KeyValue], key: &str) -> any_value::Value {
    let found = attributes.iter().find(|attribute| attribute.key == key);
    let value = found.and_then(|attribute| attribute.value.clone()?.value);
    value.unwrap_or_else(|| panic!("{key} in {attributes:?}"))
}

fn text(value: &str) -> any_value::Value {
    any_value::Value::StringValue(value.to_owned())
}

fn hex(id: &[u8]) -> String {
    id.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[tokio::test]
async fn a_request_is_a_span_below_the_callers_with_its_stages_below_it() {
    let collector = MockServer::start().await;
    Mock::given(method("POST"))
        .and(path("/v1/traces"))
        .respond_with(ResponseTemplate::new(200))
        .mount(&collector)
        .await;
    let install = Install::new();
    let mut command = install.command();
    command.arg("--otlp-endpoint").arg(collector.uri());
    let server = Server::start(&mut command);
    assert_eq!(classify(&server, "request-of-the-test").await, 200);
    // What is left is sent when the server ends.
    server.signal(Signal::TERM);
    assert!(server.ended().success());

    let spans = spans(&collector).await;
    let ours: Vec<_> = spans
        .iter()
        .filter(|span| hex(&span.trace_id) == TRACE)
        .collect();
    let request = ours
        .iter()
        .find(|span| hex(&span.parent_span_id) == CALLER)
        .unwrap_or_else(|| panic!("no span of the request in {spans:?}"));
    assert_eq!(request.name, "POST /v1/classify/{task}");
    assert_eq!(request.kind(), SpanKind::Server);
    assert_eq!(
        attribute(&request.attributes, "request_id"),
        text("request-of-the-test")
    );
    assert_eq!(
        attribute(&request.attributes, "http.response.status_code"),
        any_value::Value::IntValue(200)
    );
    let mut stages: Vec<_> = ours
        .iter()
        .filter(|span| span.parent_span_id == request.span_id)
        .map(|span| span.name.as_str())
        .collect();
    stages.sort_unstable();
    assert_eq!(stages, ["compute", "queue", "tokenize"]);
}

#[tokio::test]
async fn a_collector_that_is_gone_costs_no_request() {
    let install = Install::new();
    let mut command = install.command();
    // Nothing listens on port 9 (discard).
    command.args(["--otlp-endpoint", "http://127.0.0.1:9"]);
    let server = Server::start(&mut command);
    assert_eq!(classify(&server, "a").await, 200);
    let started = Instant::now();
    server.signal(Signal::TERM);
    assert!(server.ended().success());
    assert!(started.elapsed() < PATIENCE / 2);
}

#[tokio::test]
async fn json_log_lines_name_the_request_and_the_trace() {
    let install = Install::new();
    let mut command = install.command();
    command
        .args(["--log", "kdlora=debug", "--log-format", "json"])
        .stderr(Stdio::piped());
    let mut server = Server::start(&mut command);
    let mut log = server.take_stderr();
    assert_eq!(classify(&server, "request-of-the-test").await, 200);
    server.signal(Signal::TERM);
    assert!(server.ended().success());
    let mut text = String::new();
    log.read_to_string(&mut text).expect("UTF-8");
    let lines: Vec<Value> = text
        .lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|_| panic!("not JSON: {line}")))
        .collect();
    let answered = lines
        .iter()
        .find(|line| line["message"] == "answered" && line["span"]["http.route"] != "/readyz")
        .unwrap_or_else(|| panic!("{text}"));
    assert_eq!(answered["status"], 200);
    assert_eq!(answered["span"]["request_id"], "request-of-the-test");
    assert_eq!(answered["span"]["trace_id"], TRACE);
}

#[test]
fn an_endpoint_that_is_none_is_refused_at_the_start() {
    let install = Install::new();
    let mut command = install.command();
    let outcome = command
        .args(["--otlp-endpoint", "localhost:4318"])
        .output()
        .expect("the program starts");
    assert_eq!(outcome.status.code(), Some(2));
    let error = String::from_utf8_lossy(&outcome.stderr);
    assert!(error.contains("http://HOST:4318"), "{error}");
}
