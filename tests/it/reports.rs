//! Reports that clients send with their adapters.

use std::fs;

use crate::common::{Install, Server, golden};
use reqwest::multipart::{Form, Part};
use serde_json::{Value, json};

async fn import(server: &Server, report: Vec<u8>) -> (u16, Value) {
    let mut form = Form::new().text("spec", json!({"task": "pairs"}).to_string());
    for name in [
        "adapter_config.json",
        "adapter_model.safetensors",
        "config.json",
    ] {
        let bytes = fs::read(golden("adapters/bert-pairs-dora").join(name)).expect("a file");
        form = form.part(name, Part::bytes(bytes).file_name(name));
    }
    form = form.part("report.json", Part::bytes(report).file_name("report.json"));
    let request = server.client.post(format!("{}/admin/adapters", server.url));
    let response = request.multipart(form).send().await.expect("an answer");
    let status = response.status().as_u16();
    (status, response.json().await.expect("JSON"))
}

#[tokio::test]
async fn a_report_that_cannot_be_read_back_is_refused_and_the_task_can_be_managed() {
    let install = Install::new();
    let server = install.start();
    let nested = |depth| format!("{}1{}", "[".repeat(depth), "]".repeat(depth)).into_bytes();
    let bad: [(&str, Vec<u8>); 9] = [
        ("a number that no f64 holds", br#"{"x": 1e400}"#.to_vec()),
        ("half of a surrogate pair", br#"{"x": "\ud800"}"#.to_vec()),
        ("nested", nested(200)),
        ("nested too deeply for SQLite", nested(1_500)),
        ("byte order mark", b"\xef\xbb\xbf{}".to_vec()),
        ("not UTF-8", b"{\"x\": \"\xff\"}".to_vec()),
        ("UTF-16", b"\xff\xfe{\0}\0".to_vec()),
        ("empty", Vec::new()),
        ("large", format!("[{}1]", "1,".repeat(600_000)).into_bytes()),
    ];
    for (what, report) in bad {
        let (status, body) = import(&server, report).await;
        assert_eq!(status, 422, "{what}: {body}");
        let detail = body["detail"].as_str().expect("a text");
        assert!(detail.contains("report.json"), "{what}: {detail}");
        let state = install.state();
        let state = state.to_str().expect("UTF-8");
        assert!(!detail.contains(state), "{what}: {detail}");
    }
    let (status, body) = import(
        &server,
        br#"{"x": "\u0000\ud83d\ude00", "y": 1e300}"#.to_vec(),
    )
    .await;
    assert_eq!(status, 201, "{body}");
    assert_eq!(body["report"]["x"], "\0😀");

    let manage = async |server: &Server| {
        let (status, body) = server.get("/admin/tasks/pairs/versions").await;
        assert_eq!(status, 200, "{body}");
        assert_eq!(body["versions"].as_array().expect("a list").len(), 2);
        for version in [2, 1] {
            let promote = json!({"version": version});
            let (status, body) = server.post("/admin/tasks/pairs/promote", &promote).await;
            assert_eq!(status, 200, "{body}");
        }
    };
    manage(&server).await;
    drop(server);
    manage(&install.start()).await;
}
