//! What is said of data that can be read in two ways, and what reading costs.

use std::fs;

use crate::common::{Install, Server, golden, is_over, job, letters_or_digits};
use reqwest::multipart::{Form, Part};
use serde_json::{Value, json};

/// The greatest JSON body.
const BODY: usize = 32 << 20;

async fn upload(server: &Server, name: &'static str, content: Vec<u8>) -> (u16, Value) {
    let spec = json!({"task": "kind", "lora": {"r": 4}, "training": {"epochs": 1}});
    let part = Part::bytes(content).file_name(name);
    let form = Form::new()
        .text("spec", spec.to_string())
        .part("train", part);
    let request = server.client.post(format!("{}/admin/distill", server.url));
    let response = request.multipart(form).send().await.expect("an answer");
    let status = response.status().as_u16();
    (status, response.json().await.expect("JSON"))
}

fn told(warnings: &Value) -> String {
    let warnings = warnings.as_array().expect("a list").iter();
    warnings
        .map(|one| one.as_str().expect("a text").to_owned() + "\n")
        .collect()
}

#[tokio::test]
async fn a_finding_is_in_the_answer_in_the_job_and_in_the_report() {
    let install = Install::new();
    let server = install.start();
    let mut rows = letters_or_digits(300);
    for row in &mut rows {
        row["review"] = "another text".into();
    }
    rows[7]["label"] = "Letters".into();
    let spec =
        json!({"task": "kind", "data": {"train": {"rows": rows}}, "training": {"epochs": 1}});
    let (status, answer) = server.post("/admin/distill", &spec).await;
    assert_eq!(status, 202, "{answer}");
    let path = format!("/admin/jobs/{}", answer["id"].as_str().expect("an id"));
    let job = job(&server, &path, is_over).await;
    assert_eq!(job["state"], "succeeded", "{job}");
    let (_, versions) = server.get("/admin/tasks/kind/versions").await;
    let report = &versions["versions"][0]["report"]["data"]["checks"]["warnings"];
    for warnings in [&answer["warnings"], &job["warnings"], report] {
        let told = told(warnings);
        assert!(
            told.contains("\"review\"") && told.contains("data.columns"),
            "{told}"
        );
        assert!(told.contains("\"Letters\" and \"letters\""), "{told}");
    }
}

#[tokio::test]
async fn classes_of_a_parquet_file_are_learnt_by_name_and_its_findings_are_in_the_job() {
    let install = Install::new();
    let server = install.start();
    let content = fs::read(golden("parquet/classes.parquet")).expect("a file");
    let (status, answer) = upload(&server, "classes.parquet", content).await;
    assert_eq!(status, 202, "{answer}");
    let path = format!("/admin/jobs/{}", answer["id"].as_str().expect("an id"));
    let job = job(&server, &path, is_over).await;
    assert_eq!(job["state"], "succeeded", "{job}");
    assert!(
        told(&job["warnings"]).contains("the test split has only"),
        "{job}"
    );
    let (_, versions) = server.get("/admin/tasks/kind/versions").await;
    let labels = &versions["versions"][0]["report"]["data"]["labels"];
    assert_eq!(*labels, json!(["negative", "positive"]));
}

#[tokio::test]
async fn files_that_can_be_read_in_two_ways_are_refused_before_a_job_is_made() {
    let install = Install::new();
    let server = install.start();
    let lines = |line: &dyn Fn(usize) -> String| (0..60).map(line).collect::<String>();
    let label = |i: usize| ["pos", "neg"][i % 2];
    for (name, content, part) in [
        (
            "a.jsonl",
            lines(&|i| format!("{{\"text\": \"t {i}\", \"label\": {}.0}}\n", i % 2)),
            "\"problem_type\" in \"data\"",
        ),
        (
            "a.csv",
            "text,label\n".to_owned()
                + &lines(&|i| {
                    let quote = if i == 10 { "\"" } else { "" };
                    format!("{quote}t {i},{}\n", label(i))
                }),
            "line 12 of the train file train.csv",
        ),
        (
            "a.csv",
            "text,label\n".to_owned() + &lines(&|i| format!("t {i},['{}']\n", label(i))),
            "a list written as text: ['pos']",
        ),
        (
            "a.tsv",
            "text\tlabel\n".to_owned() + &lines(&|i| format!("\"so \"\"{i}\"\"\"\t{}\n", label(i))),
            "quoting=csv.QUOTE_NONE",
        ),
        (
            "a.csv",
            "text;label\n".to_owned() + &lines(&|i| format!("t {i};{}\n", label(i))),
            "separated by ';'",
        ),
    ] {
        let (status, answer) = upload(&server, name, content.into_bytes()).await;
        let detail = answer["detail"].as_str().unwrap_or_default();
        assert_eq!(status, 422, "{answer}");
        assert!(detail.contains(part), "{detail}");
    }
    let (_, jobs) = server.get("/admin/jobs").await;
    assert_eq!(jobs["jobs"], json!([]));
}

#[tokio::test]
async fn rows_take_no_more_than_a_few_times_their_size() {
    let install = Install::new();
    let server = install.start();
    for (begin, element, end) in [
        (
            r#"{"task": "x", "data": {"train": {"rows": ["#,
            "0,",
            "0]}}}",
        ),
        (
            r#"{"task": "x", "data": {"train": {"rows": ["#,
            "[],",
            "0]}}}",
        ),
        (
            r#"{"task": "x", "data": {"train": {"rows": ["#,
            r#"{"":0},"#,
            "0]}}}",
        ),
        (
            r#"{"task": "x", "data": {"train": {"rows": [["#,
            "0,",
            "0]]}}}",
        ),
        (
            r#"{"task": "x", "data": {"labels": ["#,
            r#""","#,
            r#"""]}}"#,
        ),
        (r#"{"task": "x", "more": ["#, "[],", "0]}"),
        ("[", "0,", "0]"),
    ] {
        let body = begin.to_owned() + &element.repeat((BODY - 100) / element.len()) + end;
        let before = server.peak_from_now();
        let request = server.client.post(format!("{}/admin/distill", server.url));
        let request = request.header("content-type", "application/json");
        let response = request.body(body).send().await.expect("an answer");
        let status = response.status().as_u16();
        assert!([413, 422].contains(&status), "{begin}: {status}");
        let more = server.peak() - before;
        assert!(more <= 5 * BODY as u64, "{begin}: {} MiB", more >> 20);
    }
    let before = server.peak_from_now();
    let (status, answer) = upload(&server, "a.csv", ",".repeat(60 << 20).into_bytes()).await;
    assert_eq!(status, 422, "{answer}");
    let more = server.peak() - before;
    assert!(more <= 64 << 20, "{} MiB", more >> 20);
}

#[tokio::test]
async fn rows_in_the_request_make_one_job_for_one_key() {
    let install = Install::new();
    let server = install.start();
    let queue = async |spec: &Value| {
        let request = server.client.post(format!("{}/admin/distill", server.url));
        let request = request.header("idempotency-key", "k").json(spec);
        let response = request.send().await.expect("an answer");
        let status = response.status().as_u16();
        let job: Value = response.json().await.expect("JSON");
        (status, job["id"].clone())
    };
    let spec = |rows| json!({"task": "kind", "data": {"train": {"rows": letters_or_digits(rows)}}});
    let (status, first) = queue(&spec(300)).await;
    assert_eq!(status, 202);
    assert_eq!(queue(&spec(300)).await, (202, first));
    assert_eq!(queue(&spec(301)).await.0, 409);
}
