//! A teacher over HTTP, played by a mock.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use ureq::config::Config;
use ureq::http::Uri;
use ureq::unversioned::resolver::{ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::NextTimeout;
use wiremock::matchers::{body_partial_json, header, method, path};
use wiremock::{Mock, MockServer, Request, Respond, ResponseTemplate};

use super::*;
use crate::distill::spec::{HttpApi, SplitSpec};

const LABELS: [&str; 2] = ["bad", "good"];

fn data() -> DataSpec {
    DataSpec {
        labels: Some(LABELS.map(String::from).to_vec()),
        ..DataSpec::of(SplitSpec::Rows(Vec::new()))
    }
}

fn spec(server: &MockServer, more: Value) -> HttpTeacherSpec {
    let mut spec = json!({"url": format!("{}/predict", server.uri()), "patience_seconds": 5});
    for (field, value) in more.as_object().unwrap() {
        spec[field] = value.clone();
    }
    serde_json::from_value(spec).unwrap()
}

fn inputs(count: usize) -> Vec<Input> {
    let input = |i: usize| Input {
        text: format!("text {i}"),
        text_pair: i.is_multiple_of(2).then(|| format!("pair {i}")),
    };
    (0..count).map(input).collect()
}

/// Answers as text-embeddings-inference does: the number in a text is its logit for `good`, and the
/// greatest score comes first.
struct Tei {
    requests: Arc<AtomicUsize>,
    /// Every so many requests one fails.
    fails_each: usize,
}

impl Respond for Tei {
    fn respond(&self, request: &Request) -> ResponseTemplate {
        let count = self.requests.fetch_add(1, Ordering::SeqCst) + 1;
        if self.fails_each > 0 && count.is_multiple_of(self.fails_each) {
            return ResponseTemplate::new(503);
        }
        let body: Value = request.body_json().unwrap();
        let rows = body["inputs"].as_array().unwrap().iter().map(|texts| {
            let words = texts[0].as_str().unwrap().rsplit(' ');
            let number = words.clone().next().and_then(|n| n.parse::<f64>().ok());
            let pair = texts.as_array().unwrap().len() as f64 - 1.0;
            let good = number.unwrap_or(-9.0) + pair / 2.0;
            let mut row = vec![json!({"label": "good", "score": good})];
            row.insert(
                usize::from(good > 0.0),
                json!({"label": "bad", "score": 0.25}),
            );
            Value::Array(row)
        });
        ResponseTemplate::new(200).set_body_json(rows.collect::<Value>())
    }
}

async fn tei(fails_each: usize) -> (MockServer, Arc<AtomicUsize>) {
    let server = MockServer::start().await;
    let requests = Arc::new(AtomicUsize::new(0));
    let respond = Tei {
        requests: Arc::clone(&requests),
        fails_each,
    };
    Mock::given(method("POST"))
        .and(path("/predict"))
        .and(body_partial_json(json!({"raw_scores": true})))
        .respond_with(respond)
        .mount(&server)
        .await;
    (server, requests)
}

/// Runs what blocks beside the mock.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::task::spawn_blocking(work).await.unwrap()
}

fn ask(
    spec: &HttpTeacherSpec,
    count: usize,
    cache: Option<&Path>,
) -> Result<Vec<Vec<f32>>, HttpTeacherError> {
    let teacher = HttpTeacher::connect(spec, &data(), None)?;
    let inputs = inputs(count);
    let inputs: Vec<&Input> = inputs.iter().collect();
    teacher.logits(&inputs, cache, &mut |_, _| {})
}

fn expected(count: usize) -> Vec<Vec<f32>> {
    let pair = |i: usize| if i.is_multiple_of(2) { 0.5 } else { 0.0 };
    (0..count).map(|i| vec![0.25, i as f32 + pair(i)]).collect()
}

#[tokio::test]
async fn raw_scores_are_logits_in_the_order_of_the_tasks_labels() {
    let (server, _) = tei(0).await;
    let spec = spec(&server, json!({"batch_size": 3}));
    let logits = blocking(move || ask(&spec, 20, None)).await.unwrap();
    assert_eq!(logits, expected(20));
}

#[tokio::test]
async fn a_pass_survives_requests_that_fail_now_and_then() {
    let (server, requests) = tei(3).await;
    let spec = spec(&server, json!({"batch_size": 2, "concurrency": 3}));
    let logits = blocking(move || ask(&spec, 24, None)).await.unwrap();
    assert_eq!(logits, expected(24));
    // 12 batches and the first question, and what was asked again.
    assert!(requests.load(Ordering::SeqCst) > 13);
}

#[tokio::test]
async fn what_was_answered_before_a_teacher_went_away_is_not_asked_again() {
    let folder = tempfile::tempdir().unwrap();
    let cache = folder.path().to_owned();
    let (server, requests) = tei(0).await;
    let spec = spec(&server, json!({"batch_size": 2}));
    let again = spec.clone();
    let first = cache.clone();
    blocking(move || ask(&spec, 10, Some(&first)))
        .await
        .unwrap();
    let before = requests.load(Ordering::SeqCst);
    let logits = blocking(move || ask(&again, 14, Some(&cache)))
        .await
        .unwrap();
    assert_eq!(logits, expected(14));
    // The labels, and the four that are left, two at a time.
    assert_eq!(requests.load(Ordering::SeqCst), before + 3);
}

#[tokio::test]
async fn a_teacher_that_stays_away_is_given_up_with_its_reason() {
    // A port that was free a moment ago.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let unreachable = json!({"url": format!("http://{address}/predict"), "patience_seconds": 1});
    let unreachable: HttpTeacherSpec = serde_json::from_value(unreachable).unwrap();
    let begin = Instant::now();
    let error = blocking(move || ask(&unreachable, 1, None))
        .await
        .unwrap_err();
    assert!(
        matches!(error, HttpTeacherError::Unreachable { .. }),
        "{error}"
    );
    assert!(begin.elapsed() < Duration::from_secs(10));
}

#[tokio::test]
async fn an_answer_that_says_no_is_not_asked_for_again() {
    let server = MockServer::start().await;
    let refusal = ResponseTemplate::new(422).set_body_json(json!({"error": "batch too large"}));
    let mock = Mock::given(method("POST")).respond_with(refusal).expect(1);
    mock.mount(&server).await;
    let refused = spec(&server, json!({}));
    let error = blocking(move || ask(&refused, 1, None)).await.unwrap_err();
    assert!(
        error.to_string().ends_with("status 422: batch too large"),
        "{error}"
    );
}

#[tokio::test]
async fn redirections_are_not_followed_and_other_answers_not_quoted() {
    for template in [
        ResponseTemplate::new(307).insert_header("location", "http://127.0.0.1:1/"),
        ResponseTemplate::new(200).set_body_string("secret of another service"),
        ResponseTemplate::new(200).set_body_json(json!({"secret": 1})),
    ] {
        let server = MockServer::start().await;
        Mock::given(method("POST"))
            .respond_with(template)
            .mount(&server)
            .await;
        let spec = spec(&server, json!({}));
        let error = blocking(move || ask(&spec, 1, None))
            .await
            .unwrap_err()
            .to_string();
        assert!(!error.contains("secret"), "{error}");
    }
}

/// Answers as the text-classification pipeline does.
async fn hugging_face(answer: fn(&str) -> Value) -> MockServer {
    let server = MockServer::start().await;
    let respond = move |request: &Request| {
        let body: Value = request.body_json().unwrap();
        let inputs = body["inputs"].as_array().unwrap().iter();
        let rows = inputs.map(|input| answer(input.as_str().unwrap_or("pair")));
        ResponseTemplate::new(200).set_body_json(rows.collect::<Value>())
    };
    Mock::given(method("POST"))
        .and(header("authorization", "Bearer t0ken"))
        .respond_with(respond)
        .mount(&server)
        .await;
    server
}

fn connect(spec: &HttpTeacherSpec, data: &DataSpec) -> Result<HttpTeacher, HttpTeacherError> {
    let origin = spec.url.rsplit_once('/').unwrap().0.parse().unwrap();
    let token = TeacherToken::new("t0ken".into(), vec![origin]);
    HttpTeacher::connect(spec, data, Some(&token))
}

#[tokio::test]
async fn probabilities_become_logits_that_give_them() {
    let server =
        hugging_face(|_| json!([{"label": "POS", "score": 0.75}, {"label": "NEG", "score": 0.25}]))
            .await;
    let spec = spec(
        &server,
        json!({"api": "hugging_face", "labels": {"POS": "good", "NEG": "bad"}}),
    );
    let logits = blocking(move || {
        let teacher = connect(&spec, &data())?;
        assert_eq!(teacher.known_task().labels, LABELS);
        let inputs = inputs(2);
        let inputs: Vec<&Input> = inputs.iter().collect();
        teacher.logits(&inputs, None, &mut |_, _| {})
    });
    for row in logits.await.unwrap() {
        let (bad, good) = (f64::from(row[0]).exp(), f64::from(row[1]).exp());
        assert!(
            (bad - 0.25).abs() < 1e-6 && (good - 0.75).abs() < 1e-6,
            "{row:?}"
        );
    }
}

#[tokio::test]
async fn labels_without_names_are_matched_by_number_and_others_must_fit() {
    let numbered = hugging_face(
        |_| json!([{"label": "LABEL_1", "score": 0.9}, {"label": "LABEL_0", "score": 0.1}]),
    )
    .await;
    let of_numbered = spec(&numbered, json!({"api": "hugging_face"}));
    let bare = DataSpec::of(SplitSpec::Rows(Vec::new()));
    blocking(move || {
        let teacher = connect(&of_numbered, &data()).unwrap();
        assert_eq!(teacher.names.theirs, ["LABEL_0", "LABEL_1"]);
        assert_eq!(teacher.known_task().labels, LABELS);
        let unnamed = connect(&of_numbered, &bare).unwrap();
        assert_eq!(unnamed.known_task().labels, ["LABEL_0", "LABEL_1"]);
    })
    .await;
    let others =
        hugging_face(|_| json!([{"label": "x", "score": 1.0}, {"label": "y", "score": 0.0}]));
    let of_others = spec(&others.await, json!({"api": "hugging_face"}));
    let error = blocking(move || connect(&of_others, &data()))
        .await
        .unwrap_err();
    assert!(error.to_string().contains("which is which"), "{error}");
}

#[tokio::test]
async fn an_endpoint_that_gives_its_best_label_only_is_told_to_give_all() {
    let best = hugging_face(|_| json!([{"label": "good", "score": 0.9}])).await;
    for labels in [json!({}), json!({"good": "good"})] {
        let of_best = spec(&best, json!({"api": "hugging_face", "labels": labels}));
        let error = blocking(move || connect(&of_best, &data())).await;
        let error = error.unwrap_err().to_string();
        assert!(
            error.contains("one label only (\"good\")") && error.contains("top_k=None"),
            "{error}"
        );
        assert!(!error.contains("which is which"), "{error}");
    }
    // Without names it may be a regression: that shows when the rows are read.
    let of_best = spec(&best, json!({"api": "hugging_face"}));
    let bare = DataSpec::of(SplitSpec::Rows(Vec::new()));
    let teacher = blocking(move || connect(&of_best, &bare)).await.unwrap();
    let error = teacher.only_label().unwrap().to_string();
    assert!(error.contains("one label only"), "{error}");
}

#[tokio::test]
async fn a_token_is_not_sent_to_another_origin() {
    let server = MockServer::start().await;
    let sends_token = |request: &Request| request.headers.contains_key("authorization");
    Mock::given(sends_token)
        .respond_with(ResponseTemplate::new(500))
        .expect(0)
        .mount(&server)
        .await;
    Mock::given(method("POST"))
        .respond_with(ResponseTemplate::new(401))
        .mount(&server)
        .await;
    let spec = spec(&server, json!({}));
    let origins = vec!["http://localhost:1".parse().unwrap()];
    let token = TeacherToken::new("t0ken".into(), origins);
    let connect = move || HttpTeacher::connect(&spec, &data(), Some(&token));
    let error = blocking(connect).await.unwrap_err().to_string();
    assert!(error.contains("--teacher-origin"), "{error}");
}

/// A resolver of names that somebody else has set.
#[derive(Debug)]
struct Hosts(Vec<SocketAddr>);

impl Resolver for Hosts {
    fn resolve(
        &self,
        _: &Uri,
        _: &Config,
        _: NextTimeout,
    ) -> Result<ResolvedSocketAddrs, ureq::Error> {
        let mut addresses = self.empty();
        self.0.iter().for_each(|address| addresses.push(*address));
        Ok(addresses)
    }
}

#[tokio::test]
async fn names_are_checked_by_what_they_stand_for() {
    let (server, requests) = tei(0).await;
    let port = server.address().port();
    let ask = |url: String, addresses: &[IpAddr], token: Option<TeacherToken>| {
        let spec = json!({"url": url, "patience_seconds": 5});
        let spec: HttpTeacherSpec = serde_json::from_value(spec).unwrap();
        let addresses = addresses.iter().map(|ip| SocketAddr::new(*ip, port));
        let hosts = Hosts(addresses.collect());
        blocking(move || {
            let client = Client::with_resolver(&spec, token.as_ref(), hosts);
            client.ask(&[&inputs(1)[0]])
        })
    };
    let url = || format!("http://teacher.example:{port}/predict");
    let local: IpAddr = "127.0.0.1".parse().unwrap();
    ask(url(), &[local], None).await.unwrap();
    let before = requests.load(Ordering::SeqCst);
    for forbidden in [
        "169.254.169.254",
        "0.0.0.0",
        "::ffff:169.254.1.1",
        "fe80::1",
    ] {
        let addresses = [local, forbidden.parse().unwrap()];
        let error = ask(url(), &addresses, None).await.unwrap_err();
        assert!(
            matches!(error, HttpTeacherError::Address { .. }),
            "{forbidden}: {error}"
        );
    }
    // A token in the clear stays on this machine, whatever `localhost` stands for.
    let url = format!("http://localhost:{port}/predict");
    let origins = vec![url.rsplit_once('/').unwrap().0.parse().unwrap()];
    let token = TeacherToken::new("t0ken".into(), origins);
    let elsewhere = ["10.1.2.3".parse().unwrap()];
    let error = ask(url, &elsewhere, Some(token)).await.unwrap_err();
    assert!(
        error.to_string().contains("not an address of this machine"),
        "{error}"
    );
    assert_eq!(requests.load(Ordering::SeqCst), before);
}

#[test]
fn answers_that_cannot_be_meant_are_refused_with_a_way_out() {
    let scored = |label: &str, score: f64| answer::ScoredLabel {
        label: label.into(),
        score,
    };
    let data = data();
    let spec: HttpTeacherSpec =
        serde_json::from_value(json!({"url": "http://h/", "api": "hugging_face"})).unwrap();
    let first = [vec![scored("bad", 0.5), scored("good", 0.5)]];
    let names = Names::of(&first, &spec, data.known_labels()).unwrap();
    let reading = Reading {
        names: &names,
        scores: Scores::of(&spec, ProblemType::SingleLabelClassification),
        problem_type: ProblemType::SingleLabelClassification,
    };
    for (row, part) in [
        (
            vec![scored("bad", 2.5), scored("good", -1.0)],
            "say so with",
        ),
        (
            vec![scored("bad", 0.1), scored("good", 0.1)],
            "sum to 0.200",
        ),
        (vec![scored("bad", 1.0)], "the scores of all labels"),
        (
            vec![scored("bad", 0.5), scored("fair", 0.5)],
            "lacks the label \"good\"",
        ),
    ] {
        let error = reading.logits(&[row]).unwrap_err();
        assert!(error.contains(part), "{error}");
    }
    let certain = reading
        .logits(&[vec![scored("bad", 1.0), scored("good", 0.0)]])
        .unwrap();
    assert!(
        certain[0].iter().all(|logit| logit.is_finite()),
        "{certain:?}"
    );
    let several = Reading {
        problem_type: ProblemType::MultiLabelClassification,
        ..reading
    };
    let logits = several
        .logits(&[vec![scored("bad", 0.5), scored("good", 0.9)]])
        .unwrap();
    assert!(
        logits[0][0].abs() < 1e-6 && (logits[0][1] - 9f32.ln()).abs() < 1e-5,
        "{logits:?}"
    );
    assert_eq!(spec.api, HttpApi::HuggingFace);
}
