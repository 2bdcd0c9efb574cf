//! `/v2/models/{task}/infer`.

use std::time::Duration;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, header};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::super::Unsupported;
use super::tensor::{ContentType, InputTensor, OutputTensor, Values, join, split};
use crate::http::AppState;
use crate::http::classify::{ClassifyErrors, Question, answered};
use crate::http::error::{ApiError, Problem};
use crate::http::extract::{Json, Path, json_slice};
use crate::http::openapi::{LiveVersionPath, TaskPath};
use crate::http::prediction::{Function, ranked, scores};
use crate::serving::{Answer, LiveTask};
use crate::text::Input;

pub(super) const TEXT: &str = "text";
pub(super) const TEXT_PAIR: &str = "text_pair";

/// Length of the JSON before binary tensors.
const JSON_LENGTH: HeaderName = HeaderName::from_static("inference-header-content-length");

pub(super) fn routes() -> OpenApiRouter<AppState> {
    OpenApiRouter::new()
        .routes(routes!(infer))
        .routes(routes!(infer_version))
}

/// Texts as tensors.
#[derive(Clone, Debug, Deserialize, ToSchema)]
struct InferRequest {
    /// Comes back with the answer.
    #[serde(default)]
    id: Option<String>,
    #[serde(default)]
    #[schema(inline)]
    parameters: Option<RequestParameters>,
    /// `text`, and for pairs `text_pair`. A single tensor may have any name.
    #[schema(min_items = 1, max_items = 2)]
    inputs: Vec<InputTensor>,
    /// Which tensors are wanted; all if the list is absent or empty.
    #[serde(default)]
    outputs: Option<Vec<WantedOutput>>,
}

#[derive(Clone, Copy, Debug, Default, Deserialize, ToSchema)]
struct RequestParameters {
    /// Give all tensors in binary.
    #[serde(default)]
    #[schema(default = false)]
    binary_data_output: Option<bool>,
    /// How texts are written in tensors that don't say it themselves.
    #[serde(default)]
    #[schema(inline)]
    content_type: Option<ContentType>,
    /// Cut inputs that have more tokens than the task takes; if false, they are an error.
    #[serde(default)]
    #[schema(default = true)]
    truncate: Option<bool>,
    /// Give up after this many microseconds.
    #[serde(default)]
    timeout: Option<u64>,
}

#[derive(Clone, Debug, Deserialize, ToSchema)]
struct WantedOutput {
    #[schema(inline)]
    name: OutputName,
    #[serde(default)]
    #[schema(inline)]
    parameters: Option<WantedParameters>,
}

#[derive(Clone, Copy, Debug, Default, Deserialize, ToSchema)]
struct WantedParameters {
    /// Give the tensor in binary.
    #[serde(default)]
    binary_data: Option<bool>,
    /// Triton's classification extension.
    #[serde(default, rename = "classification")]
    _classification: Unsupported,
    /// Numbers are FP32 and labels plain text.
    #[serde(default, rename = "content_type")]
    _content_type: Unsupported,
    /// Triton's shared memory.
    #[serde(default, rename = "shared_memory_region")]
    _shared_memory_region: Unsupported,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
enum OutputName {
    /// The label with the highest score.
    Label,
    /// Its score.
    Score,
    /// Of all labels.
    Scores,
    /// Of all labels.
    Logits,
}

const ALL: [OutputName; 4] = [
    OutputName::Label,
    OutputName::Score,
    OutputName::Scores,
    OutputName::Logits,
];

#[derive(Clone, Debug, Serialize, ToSchema)]
struct InferResponse {
    #[schema(example = "movie-sentiment")]
    model_name: String,
    #[schema(example = "1")]
    model_version: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<String>,
    outputs: Vec<OutputTensor>,
}

/// Classify with a task.
#[utoipa::path(post, path = "/v2/models/{task}/infer", tag = "open-inference",
    operation_id = "v2_infer",
    params(TaskPath,
        ("Inference-Header-Content-Length" = Option<usize>, Header,
            description = "Length of the JSON, where binary tensors follow it.")),
    request_body(description = "JSON, and behind it binary tensors, if there are any.", content(
        (InferRequest = "application/json", example = json!({"inputs": [{"name": "text",
            "shape": [1], "datatype": "BYTES", "data": ["A wonderful film."]}]})),
        (Vec<u8> = "application/octet-stream"))),
    responses(
        (status = 200, description = "The tensors.", content(
            (InferResponse = "application/json", example = json!({"model_name":
                "movie-sentiment", "model_version": "1", "outputs": [{"name": "label",
                "datatype": "BYTES", "shape": [1], "data": ["positive"]}]})),
            (Vec<u8> = "application/octet-stream"))),
        ClassifyErrors))]
async fn infer(
    State(state): State<AppState>,
    Path(name): Path<String>,
    request: Request,
) -> Result<Response, ApiError> {
    classify(&state, &name, None, request).await
}

/// Classify with a version of a task, which must be the live one.
#[utoipa::path(post, path = "/v2/models/{task}/versions/{version}/infer", tag = "open-inference",
    operation_id = "v2_infer_version",
    params(LiveVersionPath,
        ("Inference-Header-Content-Length" = Option<usize>, Header,
            description = "Length of the JSON, where binary tensors follow it.")),
    request_body(description = "JSON, and behind it binary tensors, if there are any.", content(
        (InferRequest = "application/json", example = json!({"inputs": [{"name": "text",
            "shape": [1], "datatype": "BYTES", "data": ["A wonderful film."]}]})),
        (Vec<u8> = "application/octet-stream"))),
    responses(
        (status = 200, description = "The tensors.", content(
            (InferResponse = "application/json", example = json!({"model_name":
                "movie-sentiment", "model_version": "1", "outputs": [{"name": "label",
                "datatype": "BYTES", "shape": [1], "data": ["positive"]}]})),
            (Vec<u8> = "application/octet-stream"))),
        ClassifyErrors))]
async fn infer_version(
    State(state): State<AppState>,
    Path((name, version)): Path<(String, u64)>,
    request: Request,
) -> Result<Response, ApiError> {
    classify(&state, &name, Some(version), request).await
}

/// What of a request its answer needs.
struct Wanted {
    id: Option<String>,
    outputs: Vec<(OutputName, bool)>,
}

async fn classify(
    state: &AppState,
    name: &str,
    version: Option<u64>,
    request: Request,
) -> Result<Response, ApiError> {
    let read = |headers: &HeaderMap, body: &[u8]| {
        let (request, binary) = parse(headers, body)?;
        let parameters = request.parameters.unwrap_or_default();
        let binary_output = parameters.binary_data_output.unwrap_or(false);
        let outputs = request.outputs.unwrap_or_default();
        let wanted = Wanted {
            id: request.id,
            outputs: match outputs.is_empty() {
                true => ALL.map(|name| (name, binary_output)).to_vec(),
                false => outputs
                    .into_iter()
                    .map(|output| {
                        let own = output.parameters.and_then(|own| own.binary_data);
                        (output.name, own.unwrap_or(binary_output))
                    })
                    .collect(),
            },
        };
        let question = Question {
            inputs: inputs(request.inputs, parameters.content_type, binary)?.into(),
            truncate: parameters.truncate.unwrap_or(true),
            truncation_direction: None,
            version,
            timeout: parameters.timeout.map(Duration::from_micros),
        };
        Ok((question, wanted))
    };
    answered(state, name, request, read, write).await
}

/// The JSON and the bytes behind it. The content type is not asked for: Triton's clients send
/// none.
fn parse<'a>(headers: &HeaderMap, body: &'a [u8]) -> Result<(InferRequest, &'a [u8]), ApiError> {
    let length = match headers.get(&JSON_LENGTH) {
        None => None,
        Some(value) => {
            let length = value.to_str().ok().and_then(|value| value.parse().ok());
            Some(length.ok_or_else(|| {
                Problem::InvalidParameter
                    .with("the header Inference-Header-Content-Length is not a number")
            })?)
        }
    };
    let (json, binary) = split(body, length)?;
    Ok((json_slice(json)?, binary))
}

fn inputs(
    mut tensors: Vec<InputTensor>,
    content_type: Option<ContentType>,
    mut binary: &[u8],
) -> Result<Vec<Input>, ApiError> {
    if let [only] = tensors.as_mut_slice() {
        only.name = TEXT.to_owned();
    }
    let (mut texts, mut pairs) = (None, None);
    for tensor in tensors {
        let place = match tensor.name.as_str() {
            TEXT => &mut texts,
            TEXT_PAIR => &mut pairs,
            other => {
                return Err(Problem::InvalidBody.with(format!(
                    "there is no input {other:?}; they are \"text\" and \"text_pair\""
                )));
            }
        };
        let name = tensor.name.clone();
        if place
            .replace(tensor.texts(content_type, &mut binary)?)
            .is_some()
        {
            return Err(Problem::InvalidBody.with(format!("the input {name:?} comes twice")));
        }
    }
    if !binary.is_empty() {
        return Err(Problem::InvalidBody.with(format!(
            "behind the tensors are {} bytes that belong to none",
            binary.len()
        )));
    }
    let Some(texts) = texts else {
        return Err(Problem::InvalidBody.with("there is no input \"text\""));
    };
    if let Some(pairs) = &pairs
        && pairs.len() != texts.len()
    {
        return Err(Problem::InvalidBody.with(format!(
            "\"text\" has {} rows and \"text_pair\" {}",
            texts.len(),
            pairs.len()
        )));
    }
    let mut pairs = pairs.map(Vec::into_iter);
    let inputs = texts.into_iter().map(|text| Input {
        text,
        text_pair: pairs.as_mut().and_then(Iterator::next),
    });
    Ok(inputs.collect())
}

fn write(task: &LiveTask, answer: &Answer, wanted: Wanted) -> Result<Response, ApiError> {
    let mut binary = Vec::new();
    let any_binary = wanted.outputs.iter().any(|(_, binary)| *binary);
    let outputs = wanted.outputs.iter().map(|(name, is_binary)| {
        let (name, columns, values) = tensor(task, answer, *name);
        let mut shape = vec![answer.logits.len()];
        shape.extend(columns);
        OutputTensor::new(name, shape, values, is_binary.then_some(&mut binary))
    });
    let response = InferResponse {
        model_name: task.name.clone(),
        model_version: task.version.to_string(),
        outputs: outputs.collect(),
        id: wanted.id,
    };
    if !any_binary {
        return Ok(Json(response).into_response());
    }
    let json = serde_json::to_vec(&response).map_err(ApiError::internal)?;
    let headers = [
        (
            header::CONTENT_TYPE,
            HeaderValue::from_static("application/octet-stream"),
        ),
        (JSON_LENGTH, HeaderValue::from(json.len())),
    ];
    Ok((headers, join(json, binary)).into_response())
}

/// Name, columns (`None` for a vector) and values.
fn tensor(
    task: &LiveTask,
    answer: &Answer,
    name: OutputName,
) -> (&'static str, Option<usize>, Values) {
    let config = &task.config;
    let rows = || answer.logits.iter();
    let best = || rows().flat_map(|row| ranked(config, row, Function::Own, Some(1)));
    let labels = Some(config.labels.len());
    match name {
        OutputName::Label => {
            let labels = best().map(|best| best.label);
            ("label", None, Values::Bytes(labels.collect()))
        }
        OutputName::Score => {
            let scores = best().map(|best| best.score);
            ("score", None, Values::Fp32(scores.collect()))
        }
        OutputName::Scores => {
            let scores = rows().flat_map(|row| scores(config, row, Function::Own));
            ("scores", labels, Values::Fp32(scores.collect()))
        }
        OutputName::Logits => {
            let logits = rows().flatten().copied();
            ("logits", labels, Values::Fp32(logits.collect()))
        }
    }
}
