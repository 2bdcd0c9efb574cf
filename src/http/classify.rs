//! `POST /v1/classify/{task}`.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::{FromRequest, Request, State};
use axum::http::HeaderValue;
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use utoipa::ToSchema;

use super::AppState;
use super::error::{ApiError, Problem, problem_set};
use super::extract::{Json, Path};
use super::inputs::Inputs;
use super::prediction::{Prediction, predict};
use crate::serving::{self, Answer, Entry, ServingError, Timings};
use crate::telemetry::{Outcome, RequestGuard};
use crate::text::TokenizerError;

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

problem_set!(ClassifyErrors: NotJson, InvalidParameter, UnknownTask, VersionNotLive, TooLarge,
    UnsupportedMediaType, InvalidBody, EmptyInput, SequenceTooLong, QueueFull, Internal,
    Unavailable, DeadlineExceeded);

/// Classify one or more texts.
#[utoipa::path(post, path = "/v1/classify/{task}", tag = "classify",
    params(("task" = String, Path, description = "Name of the task.")),
    request_body = ClassifyRequest,
    responses(
        (status = 200, description = "The predictions. The header `Server-Timing` has the \
            milliseconds spent on `tokenize`, `queue` and `compute`, and on `load` where the \
            version had to be read into memory.", body = ClassifyResponse),
        ClassifyErrors))]
pub(super) async fn classify(
    State(state): State<AppState>,
    Path(name): Path<String>,
    request: Request,
) -> Result<Response, ApiError> {
    let task = state.task(&name)?;
    let guard = state.metrics.request(&name);
    let response = answer(&state, task, request, &guard).await;
    guard.finish(match &response {
        Ok(_) => Outcome::Ok,
        Err(error) => outcome(error),
    });
    response
}

async fn answer(
    state: &AppState,
    task: Arc<Entry>,
    request: Request,
    guard: &RequestGuard<'_>,
) -> Result<Response, ApiError> {
    let arrived = Instant::now();
    let Json(body) = Json::<ClassifyRequest>::from_request(request, &()).await?;
    if body.top_k == Some(0) {
        return Err(Problem::InvalidBody.with("top_k must be at least 1"));
    }
    if let Some(wanted) = body.version.filter(|wanted| *wanted != task.version) {
        return Err(Problem::VersionNotLive.with(format!(
            "version {wanted} of task {:?} is not live; version {} answers",
            task.name, task.version
        )));
    }
    let timeout = body.timeout_ms.map_or(state.request_timeout, |asked| {
        Duration::from_millis(asked).min(state.request_timeout)
    });
    let inputs = body.inputs.checked(state.limits)?;
    let answer = state
        .serving
        .classify(serving::Request {
            task: Arc::clone(&task),
            inputs,
            truncate: body.truncate,
            deadline: arrived + timeout,
        })
        .await
        .map_err(|error| serving_error(error, timeout))?;
    let Timings {
        tokenize,
        queue,
        compute,
        ..
    } = answer.timings;
    guard.timings(tokenize, queue, compute);

    let predictions = answer
        .logits
        .iter()
        .map(|row| predict(&answer.task.config, row, body.top_k, body.raw_scores))
        .collect();
    let response = Json(ClassifyResponse {
        task: task.name.clone(),
        version: task.version,
        predictions,
        usage: Usage {
            tokens: answer.tokens,
        },
    });
    Ok(([("server-timing", server_timing(&answer)?)], response).into_response())
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

fn serving_error(error: ServingError, timeout: Duration) -> ApiError {
    match error {
        ServingError::Full { retry_after } => Problem::QueueFull
            .with("the server has as much work as it takes; try again in a moment")
            .retry_after(retry_after),
        // The log has the reason already.
        ServingError::Load(_) => Problem::Internal.with(
            "the live version of this task can't be loaded; the server's log has the reason",
        ),
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
