//! The text classification of Hugging Face's inference API.

use axum::extract::{Request, State};
use axum::http::HeaderMap;
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde::de::IgnoredAny;
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::Unsupported;
use crate::http::AppState;
use crate::http::classify::{ClassifyErrors, Question, answered};
use crate::http::error::{ApiError, Problem};
use crate::http::extract::{self, Json, Path};
use crate::http::inputs::Inputs;
use crate::http::openapi::TaskPath;
use crate::http::prediction::{Function, LabelScore, ranked};

pub(super) fn routes() -> OpenApiRouter<AppState> {
    OpenApiRouter::new()
        .routes(routes!(default_task))
        .routes(routes!(task))
}

/// A text to classify. Fields beside `inputs` and `parameters` are passed over: in Hugging Face's API
/// they tell the server how to work.
#[derive(Clone, Debug, Deserialize, ToSchema)]
struct PipelineRequest {
    #[schema(inline)]
    inputs: Inputs,
    #[serde(default)]
    #[schema(inline)]
    parameters: Option<Parameters>,
    /// Zero-shot classification is another task.
    #[serde(default, rename = "candidate_labels")]
    _candidate_labels: Unsupported,
}

/// All other parameters of a pipeline change the answer, so they are refused.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct Parameters {
    /// Give the scores of this many labels, the highest ones, instead of all.
    #[serde(default)]
    #[schema(minimum = 1)]
    top_k: Option<usize>,
    /// What makes scores of the logits; by default what fits the task.
    #[serde(default)]
    #[schema(inline)]
    function_to_apply: Option<FunctionName>,
    /// `false` gives the best label only, unless `top_k` says how many.
    #[serde(default)]
    return_all_scores: Option<bool>,
    /// Cut inputs that have more tokens than the task takes; if false, they are an error.
    #[serde(default)]
    #[schema(default = true)]
    truncation: Option<bool>,
    /// Sequences are never padded, which changes no answer.
    #[serde(default, rename = "padding")]
    #[schema(value_type = Option<serde_json::Value>)]
    _padding: IgnoredAny,
}

#[derive(Clone, Copy, Debug, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
enum FunctionName {
    Softmax,
    Sigmoid,
    None,
}

impl From<FunctionName> for Function {
    fn from(name: FunctionName) -> Self {
        match name {
            FunctionName::Softmax => Self::Softmax,
            FunctionName::Sigmoid => Self::Sigmoid,
            FunctionName::None => Self::None,
        }
    }
}

/// Classify with the default task.
#[utoipa::path(post, path = "/", tag = "hugging-face", operation_id = "hugging_face_default",
    request_body(content = PipelineRequest, example = json!({"inputs": "A wonderful film."})),
    responses(
        (status = 200, description = "For each input its labels, the highest score first.",
            body = Vec<Vec<LabelScore>>,
            example = json!([[{"label": "positive", "score": 0.998}]])),
        ClassifyErrors))]
async fn default_task(
    State(state): State<AppState>,
    request: Request,
) -> Result<Response, ApiError> {
    let name = state.default_task()?;
    classify(&state, &name, request).await
}

/// Classify with a task: the base URL of a client is this address.
#[utoipa::path(post, path = "/tasks/{task}", tag = "hugging-face", operation_id = "hugging_face",
    params(TaskPath),
    request_body(content = PipelineRequest, example = json!({"inputs": "A wonderful film.",
        "parameters": {"top_k": 1, "function_to_apply": "softmax"}})),
    responses(
        (status = 200, description = "For each input its labels, the highest score first.",
            body = Vec<Vec<LabelScore>>,
            example = json!([[{"label": "positive", "score": 0.998}]])),
        ClassifyErrors))]
async fn task(
    State(state): State<AppState>,
    Path(name): Path<String>,
    request: Request,
) -> Result<Response, ApiError> {
    classify(&state, &name, request).await
}

async fn classify(state: &AppState, name: &str, request: Request) -> Result<Response, ApiError> {
    let read = |headers: &HeaderMap, body: &[u8]| {
        let PipelineRequest {
            inputs, parameters, ..
        } = extract::json(headers, body)?;
        let parameters = parameters.unwrap_or_default();
        if parameters.top_k == Some(0) {
            return Err(Problem::InvalidBody.with("top_k must be at least 1"));
        }
        let question = Question {
            inputs,
            truncate: parameters.truncation.unwrap_or(true),
            truncation_direction: None,
            version: None,
            timeout: None,
        };
        Ok((question, parameters))
    };
    answered(state, name, request, read, |task, answer, parameters| {
        let function = parameters
            .function_to_apply
            .map_or(Function::Pipeline, Into::into);
        let top_k = match parameters.return_all_scores {
            Some(false) => parameters.top_k.or(Some(1)),
            Some(true) | None => parameters.top_k,
        };
        let rows = answer.logits.iter();
        let ranked = rows.map(|row| ranked(&task.config, row, function, top_k));
        Ok(Json(ranked.collect::<Vec<_>>()).into_response())
    })
    .await
}
