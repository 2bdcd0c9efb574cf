//! Log lines of the real server, as a log reader gets them.

mod common;

use std::io::Read;
use std::process::Stdio;

use common::{Install, Server};
use rustix::process::Signal;
use serde_json::{Value, json};

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
