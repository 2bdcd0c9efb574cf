//! Texts that programs trip over, sent to a running server.

use crate::common::{Install, Server, golden};
use serde_json::{Value, json};

const ROUTE: &str = "/v1/classify/pairs";

/// The inputs that the golden tokenizers were asked for, and some that Python can't hold.
fn inputs() -> Vec<Value> {
    let text = std::fs::read(golden("tokens.json")).expect("the golden file");
    let file: Value = serde_json::from_slice(&text).expect("JSON");
    let golden = file["inputs"].as_array().expect("inputs").iter();
    golden
        .map(|input| {
            let repeat = input["repeat"].as_u64().unwrap_or(1);
            let text = input["text"].as_str().expect("a text");
            let text = text.repeat(usize::try_from(repeat).expect("a length"));
            match &input["text_pair"] {
                Value::Null => json!(text),
                pair => json!({ "text": text, "text_pair": pair }),
            }
        })
        .collect()
}

fn beginning(input: &Value) -> String {
    input.to_string().chars().take(80).collect()
}

/// The `detail` of a problem, which has to be a sentence.
fn detail(body: &Value, what: &str) -> String {
    let detail = body["detail"].as_str().unwrap_or_default();
    assert!(detail.contains(' '), "{what}: {body}");
    detail.to_owned()
}

#[tokio::test]
async fn the_limit_and_the_side_of_the_tokenizer_count() {
    let long = format!("{} 1 2 3 4", "a b c d ".repeat(20));
    let mut answers = Vec::new();
    for (settings, tokens, shown) in [
        (json!({}), 72, 72),
        (json!({"model_max_length": 6}), 6, 6),
        (
            json!({"model_max_length": 6, "truncation_side": "left"}),
            6,
            6,
        ),
        (json!({"model_max_length": 1e30}), 72, 72),
    ] {
        let install = Install::new();
        let path = install.student().join("tokenizer_config.json");
        std::fs::write(path, settings.to_string()).expect("write");
        let server = install.start();
        let (status, task) = server.get("/v1/tasks/pairs").await;
        assert_eq!(
            (status, &task["max_length"]),
            (200, &json!(shown)),
            "{task}"
        );
        let body = json!({"inputs": long, "raw_scores": true});
        let (status, answer) = server.post(ROUTE, &body).await;
        assert_eq!(status, 200, "{answer}");
        assert_eq!(answer["usage"]["tokens"], tokens, "{settings}: {answer}");
        let (_, short) = server
            .post(
                ROUTE,
                &json!({"inputs": ["a b c d", "1 2 3 4"], "raw_scores": true}),
            )
            .await;
        answers.push((
            answer["predictions"][0].clone(),
            short["predictions"].clone(),
        ));
    }
    let [_, (right, ends), (left, _), _] = answers.as_slice() else {
        panic!("four answers");
    };
    assert_eq!((right, left), (&ends[0], &ends[1]));
}

#[tokio::test]
async fn every_text_is_classified_or_refused_with_the_reason() {
    let install = Install::new();
    let server = install.start();
    let (mut classified, mut refused) = (0, 0);
    for input in inputs() {
        let what = beginning(&input);
        let (status, body) = server.post(ROUTE, &json!({ "inputs": input })).await;
        match status {
            200 => {
                let scores = body["predictions"][0]["scores"].as_object();
                let total: f64 = scores
                    .expect("scores")
                    .values()
                    .filter_map(Value::as_f64)
                    .sum();
                assert!((total - 1.0).abs() < 1e-5, "{what}: {body}");
                classified += 1;
            }
            _ => {
                assert_eq!(status, 422, "{what}: {body}");
                let detail = detail(&body, &what);
                assert!(detail.contains("nothing but whitespace"), "{what}: {body}");
                refused += 1;
            }
        }
    }
    assert!(classified > 40 && refused > 4, "{classified}, {refused}");
    let longer = "a".repeat(100_001);
    let (status, body) = server.post(ROUTE, &json!({ "inputs": longer })).await;
    assert_eq!(status, 413, "{body}");
    assert!(detail(&body, "a longer text").contains("100000 characters"));
}

#[tokio::test]
async fn a_text_that_is_no_text_is_refused() {
    let install = Install::new();
    let server = install.start();
    let nested = format!("{{\"inputs\": {}1{}}}", "[".repeat(500), "]".repeat(500));
    let bodies: [&[u8]; 11] = [
        br#"{"inputs": "\ud800"}"#,
        br#"{"inputs": "film \udc00"}"#,
        br#"{"inputs": ["film", "\ud83d film"]}"#,
        br#"{"inputs": "\ude00\ud83d"}"#,
        br#"{"inputs": {"text": "film", "text_pair": "\ud800\ud800"}}"#,
        br#"{"inputs": {"\ud800": "film"}}"#,
        br#"{"inputs": "\u00"}"#,
        b"{\"inputs\": \"film \xff\"}",
        b"{\"inputs\": \"\xed\xa0\x80\"}",
        b"{\"inputs\": \"a\nb\"}",
        nested.as_bytes(),
    ];
    for body in bodies {
        let what = String::from_utf8_lossy(body).into_owned();
        let (status, answer) = send(&server, body).await;
        assert!(status == 400 || status == 422, "{what}: {status} {answer}");
        detail(&answer, &what);
    }
    for body in [
        &br#"{"inputs": "\ud83d\ude00 film"}"#[..],
        br#"{"inputs": "film\u0000film"}"#,
        br#"{"inputs": "\uffff \u202e film"}"#,
    ] {
        let (status, answer) = send(&server, body).await;
        assert_eq!(status, 200, "{answer}");
    }
}

async fn send(server: &Server, body: &[u8]) -> (u16, Value) {
    let request = server
        .client
        .post(format!("{}{ROUTE}", server.url))
        .header("content-type", "application/json")
        .body(body.to_vec());
    let response = request.send().await.expect("an answer");
    let status = response.status().as_u16();
    (status, response.json().await.expect("JSON"))
}

#[tokio::test]
async fn a_task_that_cuts_the_second_text_only_refuses_a_first_text_that_is_too_long() {
    let install = Install::new();
    let path = install.adapter("pairs").join("config.json");
    let text = std::fs::read(&path).expect("the adapter's task");
    let mut task: Value = serde_json::from_slice(&text).expect("JSON");
    task["kdlora"] = json!({ "max_length": 16, "truncation": "only_second" });
    std::fs::write(&path, task.to_string()).expect("write");
    let server = install.start();
    let ask = async |text: &str, pair: &str| {
        let input = json!({ "text": text, "text_pair": pair });
        server.post(ROUTE, &json!({ "inputs": input })).await
    };
    let long = "a b c ".repeat(20);
    let (status, body) = ask("a b c", &long).await;
    assert_eq!(status, 200, "{body}");
    assert_eq!(body["usage"]["tokens"], 16);
    let (status, body) = ask(&long, "a b c").await;
    assert_eq!(status, 422, "{body}");
    let detail = detail(&body, "a long first text");
    assert!(detail.contains("only the text_pair may be cut"), "{detail}");
}
