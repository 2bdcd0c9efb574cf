//! The two protocols: how a request is written and what makes an answer right.

use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HOST};
use hyper::{HeaderMap, Method, Request, Uri};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::args::TargetKind;
use crate::error::Failure;
use crate::http::{Body, Broken, Pool, Reply};
use crate::texts::Input;

/// A server and how to talk to it.
#[derive(Clone, Debug)]
pub(crate) struct Target {
    pub(crate) kind: TargetKind,
    /// `host:port`
    pub(crate) authority: String,
    /// Of the URL, without a slash at its end.
    base: String,
}

/// What an answer says.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Answer {
    pub(crate) version: Option<u64>,
    pub(crate) tokens: u64,
    /// One for each input, as they were sent.
    pub(crate) predictions: Vec<String>,
}

/// Where the server says that the time went.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Timings {
    pub(crate) tokenize: Option<Duration>,
    pub(crate) queue: Option<Duration>,
    pub(crate) compute: Option<Duration>,
}

#[derive(Serialize)]
struct KdloraRequest<'a> {
    inputs: Vec<KdloraInput<'a>>,
}

#[derive(Serialize)]
#[serde(untagged)]
enum KdloraInput<'a> {
    Text(&'a str),
    Pair { text: &'a str, text_pair: &'a str },
}

#[derive(Deserialize)]
struct KdloraAnswer<'a> {
    task: String,
    version: u64,
    #[serde(borrow)]
    predictions: Vec<&'a RawValue>,
    usage: Usage,
}

#[derive(Deserialize)]
struct Usage {
    tokens: u64,
}

#[derive(Serialize)]
struct TeiRequest<'a> {
    /// A list of lists: a plain list of two texts would be one pair.
    inputs: Vec<Vec<&'a str>>,
    /// As kdlora does where nothing is said.
    truncate: bool,
}

#[derive(Deserialize)]
struct TeiScore {
    score: f64,
}

impl Target {
    pub(crate) fn new(kind: TargetKind, url: &str) -> Result<Self, Failure> {
        let wrong = |reason| Failure::Url {
            url: url.to_owned(),
            reason,
        };
        let uri: Uri = url.parse().map_err(|_| wrong("it can't be read"))?;
        if uri.scheme_str() != Some("http") {
            return Err(wrong("it must begin with http://"));
        }
        let host = uri.host().ok_or_else(|| wrong("it has no host"))?;
        Ok(Self {
            kind,
            authority: format!("{host}:{}", uri.port_u16().unwrap_or(80)),
            base: uri.path().trim_end_matches('/').to_owned(),
        })
    }

    /// Path that answers for a task.
    pub(crate) fn path(&self, task: &str) -> String {
        match self.kind {
            TargetKind::Kdlora => format!("{}/v1/classify/{task}", self.base),
            TargetKind::Tei if self.base.is_empty() => "/predict".to_owned(),
            TargetKind::Tei => self.base.clone(),
        }
    }

    pub(crate) fn classify(&self, path: &Uri, inputs: &[Input<'_>]) -> Request<Body> {
        let body = match self.kind {
            TargetKind::Kdlora => serde_json::to_vec(&KdloraRequest {
                inputs: inputs.iter().map(kdlora_input).collect(),
            }),
            TargetKind::Tei => serde_json::to_vec(&TeiRequest {
                inputs: inputs.iter().map(tei_input).collect(),
                truncate: true,
            }),
        };
        // Texts and lists of them can always be written as JSON.
        let body = body.unwrap_or_default();
        self.request(Method::POST, path.clone(), body)
    }

    fn request(&self, method: Method, path: Uri, body: Vec<u8>) -> Request<Body> {
        let mut request = Request::new(Full::new(Bytes::from(body)));
        *request.method_mut() = method;
        *request.uri_mut() = path;
        let headers = request.headers_mut();
        if let Ok(host) = self.authority.parse() {
            headers.insert(HOST, host);
        }
        if request.method() == Method::POST {
            let json = hyper::header::HeaderValue::from_static("application/json");
            request.headers_mut().insert(CONTENT_TYPE, json);
        }
        request
    }

    /// The answer to `inputs` inputs for `task`, if it is one.
    pub(crate) fn read(&self, reply: &Reply, task: &str, inputs: usize) -> Option<Answer> {
        let answer = match self.kind {
            TargetKind::Kdlora => {
                let answer: KdloraAnswer<'_> = serde_json::from_slice(&reply.body).ok()?;
                (answer.task == task).then(|| Answer {
                    version: Some(answer.version),
                    tokens: answer.usage.tokens,
                    predictions: strings(&answer.predictions),
                })
            }
            TargetKind::Tei => {
                let rows: Vec<&RawValue> = serde_json::from_slice(&reply.body).ok()?;
                let whole = rows.iter().all(|row| {
                    let scores: Result<Vec<TeiScore>, _> = serde_json::from_str(row.get());
                    scores.is_ok_and(|scores| {
                        !scores.is_empty() && scores.iter().all(|score| score.score.is_finite())
                    })
                });
                whole.then(|| Answer {
                    version: None,
                    tokens: number(&reply.headers, "x-compute-tokens").unwrap_or(0.0) as u64,
                    predictions: strings(&rows),
                })
            }
        }?;
        (answer.predictions.len() == inputs).then_some(answer)
    }

    pub(crate) fn timings(&self, headers: &HeaderMap) -> Timings {
        match self.kind {
            TargetKind::Kdlora => server_timing(headers),
            // Whole milliseconds.
            TargetKind::Tei => {
                let milliseconds = |name| milliseconds(number(headers, name)?);
                Timings {
                    tokenize: milliseconds("x-tokenization-time"),
                    queue: milliseconds("x-queue-time"),
                    compute: milliseconds("x-inference-time"),
                }
            }
        }
    }

    /// One question outside the load; a status other than 200 is an error.
    pub(crate) async fn ask<T: DeserializeOwned>(
        &self,
        pool: &Pool,
        question: Question<'_>,
    ) -> Result<T, Failure> {
        let path = question.path;
        let reply = self.fetch(pool, question).await?;
        serde_json::from_slice(&reply.body).map_err(|source| Failure::Answer {
            path: path.to_owned(),
            source,
        })
    }

    pub(crate) async fn fetch(
        &self,
        pool: &Pool,
        question: Question<'_>,
    ) -> Result<Reply, Failure> {
        let Question { path, body, token } = question;
        let uri = uri(&format!("{}{path}", self.base))?;
        let mut request = match body {
            Some(body) => self.request(Method::POST, uri, body),
            None => self.request(Method::GET, uri, Vec::new()),
        };
        if let Some(token) = token {
            let value = format!("Bearer {token}").parse().map_err(|_| {
                Failure::Usage("the admin token has characters that no header can have".into())
            })?;
            request.headers_mut().insert(AUTHORIZATION, value);
        }
        let reply = pool.fetch(request).await.map_err(|error| match error {
            Broken::Connect(source) => Failure::Unreachable {
                authority: self.authority.clone(),
                source,
            },
            other => Failure::NoAnswer {
                path: path.to_owned(),
                source: other.into(),
            },
        })?;
        if reply.status.is_success() {
            return Ok(reply);
        }
        Err(Failure::Status {
            path: path.to_owned(),
            status: reply.status.as_u16(),
            body: String::from_utf8_lossy(&reply.body).into_owned(),
        })
    }
}

/// A GET, or with a body a POST, of a path below the server's URL.
#[derive(Debug, Default)]
pub(crate) struct Question<'a> {
    pub(crate) path: &'a str,
    pub(crate) body: Option<Vec<u8>>,
    pub(crate) token: Option<&'a str>,
}

impl<'a> Question<'a> {
    pub(crate) fn get(path: &'a str) -> Self {
        Self {
            path,
            ..Self::default()
        }
    }
}

pub(crate) fn uri(path: &str) -> Result<Uri, Failure> {
    path.parse().map_err(|_| Failure::Url {
        url: path.to_owned(),
        reason: "it can't be the path of a request",
    })
}

fn kdlora_input<'a>(input: &'a Input<'_>) -> KdloraInput<'a> {
    match input.text_pair {
        Some(text_pair) => KdloraInput::Pair {
            text: &input.text,
            text_pair,
        },
        None => KdloraInput::Text(&input.text),
    }
}

fn tei_input<'a>(input: &'a Input<'_>) -> Vec<&'a str> {
    let mut texts = vec![&*input.text];
    texts.extend(input.text_pair);
    texts
}

fn strings(values: &[&RawValue]) -> Vec<String> {
    values.iter().map(|value| value.get().to_owned()).collect()
}

fn number(headers: &HeaderMap, name: &str) -> Option<f64> {
    headers.get(name)?.to_str().ok()?.parse().ok()
}

fn milliseconds(number: f64) -> Option<Duration> {
    Duration::try_from_secs_f64(number / 1000.0).ok()
}

/// The header of the W3C's Server Timing: `name;dur=1.5, ..`, in milliseconds.
fn server_timing(headers: &HeaderMap) -> Timings {
    let mut timings = Timings::default();
    let values = headers.get_all("server-timing").iter();
    for metric in values
        .filter_map(|v| v.to_str().ok())
        .flat_map(|v| v.split(','))
    {
        let mut parts = metric.split(';').map(str::trim);
        let name = parts.next();
        let time = parts
            .find_map(|part| part.strip_prefix("dur=")?.parse().ok())
            .and_then(milliseconds);
        match name {
            Some("tokenize") => timings.tokenize = time,
            Some("queue") => timings.queue = time,
            Some("compute") => timings.compute = time,
            _ => {}
        }
    }
    timings
}

#[cfg(test)]
mod tests {
    use std::borrow::Cow;

    use http_body_util::BodyExt;
    use hyper::StatusCode;

    use super::*;

    fn inputs<'a>(texts: &[(&'a str, Option<&'a str>)]) -> Vec<Input<'a>> {
        let input = |(text, text_pair): &(&'a str, _)| Input {
            text: Cow::Borrowed(*text),
            text_pair: *text_pair,
        };
        texts.iter().map(input).collect()
    }

    async fn body(target: &Target, texts: &[(&str, Option<&str>)]) -> String {
        let path = uri("/x").expect("a path");
        let request = target.classify(&path, &inputs(texts));
        let body = request.into_body().collect().await.expect("a body");
        String::from_utf8(body.to_bytes().to_vec()).expect("text")
    }

    fn reply(body: &str, headers: &[(&'static str, &str)]) -> Reply {
        Reply {
            status: StatusCode::OK,
            headers: headers
                .iter()
                .map(|(name, value)| {
                    let name = hyper::header::HeaderName::from_static(name);
                    (name, value.parse().expect("a value"))
                })
                .collect(),
            body: body.to_owned().into(),
        }
    }

    fn target(kind: TargetKind) -> Target {
        Target::new(kind, "http://mock:81").expect("a URL")
    }

    #[test]
    fn urls_may_have_a_path_and_must_be_http() {
        let path = |kind, url| Target::new(kind, url).map(|target| target.path("mood"));
        for (kind, url, expected) in [
            (TargetKind::Kdlora, "http://h", "/v1/classify/mood"),
            (TargetKind::Kdlora, "http://h:1/a/", "/a/v1/classify/mood"),
            (TargetKind::Tei, "http://h/", "/predict"),
            (TargetKind::Tei, "http://h/v2/scores", "/v2/scores"),
        ] {
            assert_eq!(path(kind, url).expect(url), expected);
        }
        for wrong in ["https://h", "h:80", "http://", "\n"] {
            assert!(path(TargetKind::Tei, wrong).is_err(), "{wrong}");
        }
        let authority = |url| Target::new(TargetKind::Tei, url).map(|target| target.authority);
        assert_eq!(authority("http://h").expect("a URL"), "h:80");
    }

    #[tokio::test]
    async fn each_protocol_has_its_own_form_of_pairs_and_lists() {
        let texts = [("a", None), ("b", Some("c"))];
        assert_eq!(
            body(&target(TargetKind::Kdlora), &texts).await,
            r#"{"inputs":["a",{"text":"b","text_pair":"c"}]}"#
        );
        assert_eq!(
            body(&target(TargetKind::Tei), &texts).await,
            r#"{"inputs":[["a"],["b","c"]],"truncate":true}"#
        );
    }

    #[test]
    fn a_kdlora_answer_is_for_the_task_and_for_all_inputs() {
        let target = target(TargetKind::Kdlora);
        let right = r#"{"task":"mood","version":3,"predictions":[{"value":1.5}],
            "usage":{"tokens":8}}"#;
        let answer = target.read(&reply(right, &[]), "mood", 1).expect("right");
        assert_eq!((answer.version, answer.tokens), (Some(3), 8));
        assert_eq!(answer.predictions, [r#"{"value":1.5}"#]);
        assert_eq!(target.read(&reply(right, &[]), "topic", 1), None);
        assert_eq!(target.read(&reply(right, &[]), "mood", 2), None);
        assert_eq!(target.read(&reply("{}", &[]), "mood", 1), None);
    }

    #[test]
    fn a_tei_answer_has_scores_for_all_inputs() {
        let target = target(TargetKind::Tei);
        let right = r#"[[{"score":0.9,"label":"up"},{"score":0.1,"label":"down"}]]"#;
        let tokens = [("x-compute-tokens", "8")];
        let answer = target.read(&reply(right, &tokens), "", 1).expect("right");
        assert_eq!((answer.version, answer.tokens), (None, 8));
        for wrong in [r#"{"error":"x"}"#, "[[]]", r#"[[{"label":"up"}]]"#, "[]"] {
            assert_eq!(target.read(&reply(wrong, &[]), "", 1), None, "{wrong}");
        }
    }

    #[test]
    fn both_say_where_the_time_went() {
        let ms = |ms: f64| Some(Duration::from_secs_f64(ms / 1000.0));
        let headers = reply(
            "",
            &[(
                "server-timing",
                "tokenize;dur=0.25, queue;desc=x;dur=1.5, other;dur=9, compute;dur=10",
            )],
        )
        .headers;
        let expected = Timings {
            tokenize: ms(0.25),
            queue: ms(1.5),
            compute: ms(10.0),
        };
        assert_eq!(target(TargetKind::Kdlora).timings(&headers), expected);
        let headers = reply("", &[("x-queue-time", "2"), ("x-inference-time", "7")]).headers;
        let expected = Timings {
            tokenize: None,
            queue: ms(2.0),
            compute: ms(7.0),
        };
        assert_eq!(target(TargetKind::Tei).timings(&headers), expected);
    }
}
