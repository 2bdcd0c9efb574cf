//! Requests to the endpoint, tried again where that may help.

use std::error::Error as _;
use std::fmt;
use std::thread;
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde_json::{Value, json};
use ureq::unversioned::resolver::{DefaultResolver, Resolver};
use ureq::unversioned::transport::DefaultConnector;
use ureq::{Agent, RequestBuilder};

use super::answer::{ScoredLabel, parse};
use super::origin::Authorization;
use super::resolver::{AddressError, CheckedResolver};
use super::{HttpTeacherError, TeacherToken};
use crate::distill::dataset::MAX_LABELS;
use crate::distill::spec::{HttpApi, HttpTeacherSpec};
use crate::parse;
use crate::text::Input;

/// Greatest size of an answer: a thousand labels for a batch are a few megabytes.
const MAX_ANSWER_BYTES: u64 = 16 << 20;
/// Between two tries, doubled each time.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
const LONGEST_PAUSE: Duration = Duration::from_secs(15);
/// Of an endpoint's own words in a message.
const MAX_MESSAGE: usize = 300;

pub(super) struct Client {
    agent: Agent,
    url: String,
    api: HttpApi,
    authorization: Authorization,
    patience: Duration,
    /// What the endpoint says of its model, where it does.
    model: Option<Value>,
}

/// Does not show the token.
impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("url", &self.url).finish()
    }
}

/// One try.
enum Outcome {
    Answer(Vec<u8>),
    /// It may go better later, in the time the endpoint asks for.
    Later {
        reason: String,
        wait: Option<Duration>,
    },
    Refused(HttpTeacherError),
}

impl Client {
    pub(super) fn new(spec: &HttpTeacherSpec, token: Option<&TeacherToken>) -> Self {
        Self::with_resolver(spec, token, DefaultResolver::default())
    }

    pub(super) fn with_resolver(
        spec: &HttpTeacherSpec,
        token: Option<&TeacherToken>,
        resolver: impl Resolver,
    ) -> Self {
        let authorization = match token {
            Some(token) => token.for_address(&spec.url),
            None => Authorization::None,
        };
        let config = Agent::config_builder()
            .timeout_global(Some(Duration::from_secs(spec.timeout_seconds)))
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .user_agent(concat!("kdlora/", env!("CARGO_PKG_VERSION")))
            .proxy(None)
            .build();
        let resolver = CheckedResolver {
            inner: resolver,
            is_local: matches!(authorization, Authorization::Sent { is_local: true, .. }),
        };
        let agent = Agent::with_parts(config, DefaultConnector::default(), resolver);
        let mut client = Self {
            agent,
            url: spec.url.clone(),
            api: spec.api,
            authorization,
            patience: Duration::from_secs(spec.patience_seconds),
            model: None,
        };
        client.model = client.ask_for_model();
        client
    }

    pub(super) fn model(&self) -> Option<&Value> {
        self.model.as_ref()
    }

    /// Model and revision from text-embeddings-inference's `/info` beside `/predict`. Not every
    /// server has it, so a failure is no error.
    fn ask_for_model(&self) -> Option<Value> {
        #[derive(Deserialize)]
        struct Info {
            model_id: String,
            model_sha: Option<String>,
        }
        if self.api != HttpApi::TextEmbeddingsInference {
            return None;
        }
        let base = self.url.strip_suffix("/predict")?;
        let request = self.agent.get(format!("{base}/info"));
        let mut answer = self.authorized(request).call().ok()?;
        let limited = answer.body_mut().with_config().limit(MAX_ANSWER_BYTES);
        let info: Info = parse::json(&limited.read_to_vec().ok()?).ok()?;
        Some(json!([info.model_id, info.model_sha]))
    }

    /// The labels with their scores for each input.
    pub(super) fn ask(&self, inputs: &[&Input]) -> Result<Vec<Vec<ScoredLabel>>, HttpTeacherError> {
        let body = self.body(inputs);
        let begin = Instant::now();
        let mut pause = FIRST_PAUSE;
        loop {
            let (reason, wait) = match self.try_once(&body) {
                Outcome::Answer(answer) => {
                    return parse(&answer, inputs.len()).map_err(|reason| self.unusable(reason));
                }
                Outcome::Refused(error) => return Err(error),
                Outcome::Later { reason, wait } => (reason, wait),
            };
            let wait = wait.unwrap_or(pause).min(LONGEST_PAUSE);
            if begin.elapsed() + wait > self.patience {
                return Err(HttpTeacherError::Unreachable {
                    url: self.url.clone(),
                    patience: self.patience,
                    reason,
                });
            }
            tracing::warn!(url = self.url, reason, ?wait, "the teacher is asked again");
            thread::sleep(wait);
            pause = (2 * pause).min(LONGEST_PAUSE);
        }
    }

    fn body(&self, inputs: &[&Input]) -> String {
        let body = match self.api {
            HttpApi::TextEmbeddingsInference => {
                let texts = |input: &&Input| match &input.text_pair {
                    Some(pair) => json!([input.text, pair]),
                    None => json!([input.text]),
                };
                let inputs: Vec<_> = inputs.iter().map(texts).collect();
                json!({"inputs": inputs, "raw_scores": true, "truncate": true})
            }
            HttpApi::HuggingFace => {
                let text = |input: &&Input| match &input.text_pair {
                    Some(pair) => json!({"text": input.text, "text_pair": pair}),
                    None => json!(input.text),
                };
                let inputs: Vec<_> = inputs.iter().map(text).collect();
                // Without top_k the pipeline gives the best label only.
                json!({"inputs": inputs, "parameters": {"top_k": MAX_LABELS}})
            }
        };
        body.to_string()
    }

    fn try_once(&self, body: &str) -> Outcome {
        let request = self
            .agent
            .post(&self.url)
            .header("content-type", "application/json")
            .header("accept", "application/json");
        let later = |error: ureq::Error| Outcome::Later {
            reason: reason_of(&error),
            wait: None,
        };
        let mut response = match self.authorized(request).send(body) {
            Ok(response) => response,
            Err(ureq::Error::Other(error)) if error.is::<AddressError>() => {
                return Outcome::Refused(HttpTeacherError::Address {
                    url: self.url.clone(),
                    reason: error.to_string(),
                });
            }
            Err(error) => return later(error),
        };
        let status = response.status().as_u16();
        let wait = response
            .headers()
            .get("retry-after")
            .and_then(|seconds| seconds.to_str().ok()?.parse().ok())
            .map(Duration::from_secs);
        let limited = response.body_mut().with_config().limit(MAX_ANSWER_BYTES);
        let answer = match limited.read_to_vec() {
            Ok(answer) => answer,
            Err(ureq::Error::BodyExceedsLimit(limit)) => {
                return Outcome::Refused(self.unusable(format!("it is longer than {limit} bytes")));
            }
            Err(error) => return later(error),
        };
        match status {
            200..=299 => Outcome::Answer(answer),
            408 | 425 | 429 | 500..=599 => Outcome::Later {
                reason: format!("it answers with status {status}"),
                wait,
            },
            401 | 403 if self.authorization == Authorization::Withheld => {
                let url = self.url.clone();
                Outcome::Refused(HttpTeacherError::TokenWithheld { url, status })
            }
            _ => Outcome::Refused(HttpTeacherError::Refused {
                url: self.url.clone(),
                status,
                message: message_of(&answer),
            }),
        }
    }

    fn authorized<B>(&self, request: RequestBuilder<B>) -> RequestBuilder<B> {
        match &self.authorization {
            Authorization::Sent { bearer, .. } => request.header("authorization", bearer),
            Authorization::None | Authorization::Withheld => request,
        }
    }

    pub(super) fn unusable(&self, reason: String) -> HttpTeacherError {
        let url = self.url.clone();
        HttpTeacherError::Answer { url, reason }
    }

    pub(super) fn labels_unusable(&self, reason: String) -> HttpTeacherError {
        let url = self.url.clone();
        HttpTeacherError::Labels { url, reason }
    }
}

fn reason_of(error: &ureq::Error) -> String {
    match error.source() {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}

/// The `error` (or `detail`) of a JSON answer. Anything else is not quoted: the address may be that
/// of something that was never meant to be read from here.
fn message_of(answer: &[u8]) -> Option<String> {
    let answer: Value = parse::json(answer).ok()?;
    let message = answer.get("error").or_else(|| answer.get("detail"))?;
    Some(message.as_str()?.chars().take(MAX_MESSAGE).collect())
}
