//! `POST /v1/classify/{task}`, and the way of a classification that all APIs share.

use std::mem;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use utoipa::ToSchema;

use super::AppState;
use super::error::{ApiError, Problem, problem_set};
use super::extract::{self, Json, Path};
use super::inputs::Inputs;
use super::openapi::TaskPath;
use super::prediction::{Prediction, predict};
use crate::serving::{self, Answer, Entry, LiveTask, ServingError, Timings};
use crate::telemetry::Outcome;
use crate::text::{TokenizerError, TruncationDirection};

/// Texts to classify.
#[derive(Clone, Debug, PartialEq, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ClassifyRequest {
    #[schema(inline)]
    inputs: Inputs,
    /// Give the scores of this many labels, the highest ones, instead of all.
    #[serde(default)]
    #[schema(minimum = 1)]
    top_k: Option<usize>,
    /// Give logits instead of probabilities.
    #[serde(default)]
    raw_scores: bool,
    /// Cut inputs that have more tokens than the task takes; if false, they are an error.
    #[serde(default = "yes")]
    #[schema(default = true)]
    truncate: bool,
    /// Answer with this version or not at all. Only the live version answers.
    #[serde(default)]
    version: Option<u64>,
    /// Give up after this many milliseconds. The server has a limit of its own, which holds if it
    /// is less.
    #[serde(default)]
    timeout_ms: Option<u64>,
}

fn yes() -> bool {
    true
}

/// One prediction for each input, in order.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ClassifyResponse {
    task: String,
    /// The version that answered, for all inputs of the request.
    version: u64,
    predictions: Vec<Prediction>,
    usage: Usage,
}

#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
pub struct Usage {
    /// Tokens of all inputs, special tokens included.
    tokens: usize,
}

problem_set!(ClassifyErrors: NotJson, InvalidParameter, UnknownTask, VersionNotLive,
    StudentMismatch, TooLarge,
    UnsupportedMediaType, InvalidBody, EmptyInput, SequenceTooLong, QueueFull, Internal,
    Unavailable, DeadlineExceeded);

/// Classify one or more texts.
#[utoipa::path(post, path = "/v1/classify/{task}", tag = "classify",
    params(TaskPath),
    request_body(content = ClassifyRequest, examples(
        ("text" = (value = json!({"inputs": "A quiet, wonderful film."}))),
        ("pairs" = (value = json!({"inputs": [{"text": "Is it good?", "text_pair": "It is."}],
            "top_k": 1, "truncate": false})))
    )),
    responses(
        (status = 200, description = "The predictions. The header `Server-Timing` has the \
            milliseconds spent on `tokenize`, `queue` and `compute`, and on `load` where the \
            version had to be read into memory.", body = ClassifyResponse,
            example = json!({"task": "movie-sentiment", "version": 1, "predictions": [{
                "label": "positive", "score": 0.998, "scores": {"positive": 0.998,
                "negative": 0.002}}], "usage": {"tokens": 8}})),
        ClassifyErrors))]
pub(super) async fn classify(
    State(state): State<AppState>,
    Path(name): Path<String>,
    request: Request,
) -> Result<Response, ApiError> {
    let read = |headers: &HeaderMap, body: &[u8]| {
        let body: ClassifyRequest = extract::json(headers, body)?;
        if body.top_k == Some(0) {
            return Err(Problem::InvalidBody.with("top_k must be at least 1"));
        }
        let question = Question {
            inputs: body.inputs,
            truncate: body.truncate,
            truncation_direction: None,
            version: body.version,
            timeout: body.timeout_ms.map(Duration::from_millis),
        };
        Ok((question, (body.top_k, body.raw_scores)))
    };
    answered(
        &state,
        &name,
        request,
        read,
        |task, answer, (top_k, raw)| {
            let rows = answer.logits.iter();
            let predictions = rows.map(|row| predict(&task.config, row, top_k, raw));
            Ok(Json(ClassifyResponse {
                task: task.name.clone(),
                version: task.version,
                predictions: predictions.collect(),
                usage: Usage {
                    tokens: answer.tokens,
                },
            })
            .into_response())
        },
    )
    .await
}

/// What every API asks, in whatever words.
pub(super) struct Question {
    pub(super) inputs: Inputs,
    pub(super) truncate: bool,
    pub(super) truncation_direction: Option<TruncationDirection>,
    /// Only this version may answer.
    pub(super) version: Option<u64>,
    /// The server's own limit holds if it is less.
    pub(super) timeout: Option<Duration>,
}

/// The way of every classification, counted and timed once: `read` makes a question of the body,
/// the engine answers it, `write` words the answer. `O` is what `read` has to tell `write`.
pub(super) async fn answered<O>(
    state: &AppState,
    name: &str,
    request: Request,
    read: impl FnOnce(&HeaderMap, &[u8]) -> Result<(Question, O), ApiError>,
    write: impl FnOnce(&LiveTask, &Answer, O) -> Result<Response, ApiError>,
) -> Result<Response, ApiError> {
    let task = state.task(name)?;
    let guard = state.metrics.request(name);
    let response: Result<Response, ApiError> = async {
        let arrived = Instant::now();
        let (question, options) = question(request, arrived + state.request_timeout, read).await?;
        let answer = answer(state, &task, question, arrived).await?;
        let Timings {
            tokenize,
            queue,
            compute,
            ..
        } = answer.timings;
        guard.timings(tokenize, queue, compute);
        let timing = server_timing(&answer)?;
        Ok((
            [("server-timing", timing)],
            write(&answer.task, &answer, options)?,
        )
            .into_response())
    }
    .await;
    guard.finish(match &response {
        Ok(_) => Outcome::Ok,
        Err(error) => outcome(error),
    });
    response
}

async fn question<O>(
    mut request: Request,
    deadline: Instant,
    read: impl FnOnce(&HeaderMap, &[u8]) -> Result<(Question, O), ApiError>,
) -> Result<(Question, O), ApiError> {
    let headers = mem::take(request.headers_mut());
    let body = extract::body(request, deadline).await?;
    read(&headers, &body)
}

async fn answer(
    state: &AppState,
    task: &Arc<Entry>,
    question: Question,
    arrived: Instant,
) -> Result<Answer, ApiError> {
    if let Some(wanted) = question.version {
        check_live(task, wanted)?;
    }
    let timeout = question.timeout.map_or(state.request_timeout, |asked| {
        asked.min(state.request_timeout)
    });
    let inputs = question.inputs.checked(state.limits)?;
    let request = serving::Request {
        task: Arc::clone(task),
        inputs,
        truncate: question.truncate,
        truncation_direction: question.truncation_direction,
        deadline: arrived + timeout,
    };
    let answer = state.serving.classify(request).await;
    answer.map_err(|error| serving_error(error, task, timeout))
}

/// Whether the version is the one that answers.
pub(super) fn check_live(task: &Entry, version: u64) -> Result<(), ApiError> {
    if version == task.version {
        return Ok(());
    }
    Err(Problem::VersionNotLive.with(format!(
        "version {version} of task {:?} is not live; version {} answers",
        task.name, task.version
    )))
}

/// The header of the W3C's Server Timing, in milliseconds.
fn server_timing(answer: &Answer) -> Result<HeaderValue, ApiError> {
    let ms = |time: Duration| time.as_secs_f64() * 1000.0;
    let Timings {
        load,
        tokenize,
        queue,
        compute,
    } = answer.timings;
    let load = match load.is_zero() {
        true => String::new(),
        false => format!("load;dur={:.3}, ", ms(load)),
    };
    let text = format!(
        "{load}tokenize;dur={:.3}, queue;dur={:.3}, compute;dur={:.3}",
        ms(tokenize),
        ms(queue),
        ms(compute)
    );
    HeaderValue::try_from(text).map_err(ApiError::internal)
}

fn serving_error(error: ServingError, task: &Entry, timeout: Duration) -> ApiError {
    match error {
        ServingError::Full { retry_after } => Problem::QueueFull
            .with("the server has as much work as it takes; try again in a moment")
            .retry_after(retry_after),
        ServingError::Load(error) => match error.mismatch() {
            Some(mismatch) => Problem::StudentMismatch.with(task.other_student(mismatch)),
            // The log has the reason already.
            None => Problem::Internal.with(
                "the live version of this task can't be loaded; the server's log has the reason",
            ),
        },
        ServingError::Tokenize {
            index,
            error: TokenizerError::TooLong { tokens, max_length },
        } => Problem::SequenceTooLong.with(format!(
            "inputs[{index}] has {tokens} tokens or more, but the task takes {max_length}; shorten it, or \
             leave \"truncate\" true"
        )),
        ServingError::Tokenize {
            index,
            error: TokenizerError::FirstTooLong { tokens, max_length },
        } => Problem::SequenceTooLong.with(format!(
            "inputs[{index}]: the text has {tokens} tokens or more, too many for the task's limit of \
             {max_length}, and only the text_pair may be cut; shorten the text"
        )),
        ServingError::Tokenize { error, .. } => ApiError::internal(error),
        ServingError::Deadline => Problem::DeadlineExceeded.with(format!(
            "there was no answer within {} ms",
            timeout.as_millis()
        )),
        // The worker has logged the reason.
        ServingError::Failed => Problem::Internal
            .with("the model could not compute this request; the server's log has the reason"),
    }
}

fn outcome(error: &ApiError) -> Outcome {
    match error.problem() {
        Problem::QueueFull => Outcome::Full,
        Problem::DeadlineExceeded => Outcome::Deadline,
        problem if problem.status().is_client_error() => Outcome::Invalid,
        _ => Outcome::Failed,
    }
}
