//! Large uploads go to the disk as they come.

use crate::common::Install;
use futures_util::stream;
use reqwest::Body;
use reqwest::multipart::{Form, Part};
use serde_json::{Value, json};

const MEGABYTES: usize = 100;
/// What the server may need for an upload of any size.
const MOST_MORE: u64 = 32 << 20;

/// A megabyte of rows, each of a thousand bytes.
fn rows(part: usize) -> Vec<u8> {
    let row = |i: usize| {
        let text = format!("{part} {i} {}", "word ".repeat(190));
        let label = ["a", "b"][i % 2];
        let row = json!({"text": text, "label": label}).to_string();
        format!("{row:<999}\n")
    };
    (0..1_000).flat_map(|i| row(i).into_bytes()).collect()
}

#[tokio::test]
async fn a_hundred_megabytes_do_not_stay_in_memory() {
    let install = Install::new();
    let server = install.start();
    let before = server.peak();
    let parts = stream::iter((0..MEGABYTES).map(|part| Ok::<_, std::io::Error>(rows(part))));
    let spec = json!({"task": "large", "job": {"time_limit_seconds": 1}});
    let form = Form::new().text("spec", spec.to_string()).part(
        "train",
        Part::stream(Body::wrap_stream(parts)).file_name("train.jsonl"),
    );
    let request = server.client.post(format!("{}/admin/distill", server.url));
    let response = request.multipart(form).send().await.expect("an answer");
    assert_eq!(response.status().as_u16(), 202);
    let job: Value = response.json().await.expect("a job");
    let after = server.peak();

    let id = job["id"].as_str().expect("an id");
    let url = format!("{}/admin/jobs/{id}", server.url);
    let _ = server.client.delete(url).send().await.expect("an answer");
    assert!(
        after - before <= MOST_MORE,
        "the server grew by {} MiB",
        (after - before) >> 20
    );
}
