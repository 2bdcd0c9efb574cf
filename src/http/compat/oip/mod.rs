//! The Open Inference Protocol v2, also known as KServe's V2 protocol, over HTTP, with Triton's
//! binary tensor data. A model is a task, its version the live one.
//!
//! Inputs are `text` and, for pairs, `text_pair`, both `BYTES` of shape `[n]` or `[n, 1]`. Outputs
//! are `label` (`BYTES`, `[n]`), `score` (`FP32`, `[n]`), `scores` and `logits` (`FP32`,
//! `[n, labels]`).

mod infer;
mod tensor;

use axum::extract::State;
use serde::Serialize;
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::adapter::{Fit, ProblemType};
use crate::http::AppState;
use crate::http::classify::check_live;
use crate::http::error::{ApiError, Problem, problem_set};
use crate::http::extract::{Json, Path};
use crate::http::health::ReadyErrors;
use crate::http::openapi::{LiveVersionPath, TaskPath};
use crate::http::tasks::Task;
use crate::serving::Entry;

pub(super) fn routes() -> OpenApiRouter<AppState> {
    OpenApiRouter::new()
        .routes(routes!(server))
        .routes(routes!(models))
        .routes(routes!(index))
        .routes(routes!(model))
        .routes(routes!(version))
        .routes(routes!(model_ready))
        .routes(routes!(version_ready))
        .merge(infer::routes())
}

pub(super) fn open_routes() -> OpenApiRouter<AppState> {
    OpenApiRouter::new()
        .routes(routes!(live))
        .routes(routes!(ready))
}

#[derive(Clone, Debug, Serialize, ToSchema)]
struct Server {
    #[schema(example = "kdlora")]
    name: &'static str,
    version: &'static str,
    #[schema(example = json!(["binary_tensor_data"]))]
    extensions: Vec<&'static str>,
}

/// The server and what it understands beyond the protocol.
#[utoipa::path(get, path = "/v2", tag = "open-inference", operation_id = "v2_server",
    responses((status = 200, description = "The server.", body = Server)))]
async fn server() -> Json<Server> {
    Json(Server {
        name: env!("CARGO_PKG_NAME"),
        version: env!("CARGO_PKG_VERSION"),
        extensions: vec!["binary_tensor_data"],
    })
}

#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
struct Live {
    live: bool,
}

#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
struct Ready {
    ready: bool,
}

/// The process is alive.
#[utoipa::path(get, path = "/v2/health/live", tag = "open-inference", operation_id = "v2_live",
    responses((status = 200, description = "The process is alive.", body = Live)))]
async fn live() -> Json<Live> {
    Json(Live { live: true })
}

/// The server takes requests.
#[utoipa::path(get, path = "/v2/health/ready", tag = "open-inference", operation_id = "v2_ready",
    responses((status = 200, description = "The server takes requests.", body = Ready),
        ReadyErrors))]
async fn ready(State(state): State<AppState>) -> Result<Json<Ready>, ApiError> {
    state.readiness.check()?;
    Ok(Json(Ready { ready: true }))
}

#[derive(Clone, Debug, Serialize, ToSchema)]
struct ModelNames {
    #[schema(example = json!(["movie-sentiment"]))]
    models: Vec<String>,
}

/// Names of the models: the tasks.
#[utoipa::path(get, path = "/v2/models", tag = "open-inference", operation_id = "v2_models",
    responses((status = 200, description = "The tasks, by name.", body = ModelNames)))]
async fn models(State(state): State<AppState>) -> Json<ModelNames> {
    Json(ModelNames {
        models: state
            .tasks
            .all()
            .keys()
            .map(|name| name.to_string())
            .collect(),
    })
}

/// A model of the repository.
#[derive(Clone, Debug, Serialize, ToSchema)]
struct Listed {
    #[schema(example = "movie-sentiment")]
    name: String,
    #[schema(example = "1")]
    version: String,
    /// `READY` or `UNAVAILABLE`.
    #[schema(example = "READY")]
    state: &'static str,
    /// Why it is not ready.
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
}

/// The models, as Triton lists those of its repository. A body is not looked at.
#[utoipa::path(post, path = "/v2/repository/index", tag = "open-inference",
    operation_id = "v2_repository_index",
    responses((status = 200, description = "The tasks, by name.", body = Vec<Listed>)))]
async fn index(State(state): State<AppState>) -> Json<Vec<Listed>> {
    let all = state.tasks.all();
    let listed = all.values().map(|task| {
        let reason = task.unready();
        Listed {
            name: task.name.clone(),
            version: task.version.to_string(),
            state: match reason {
                None => "READY",
                Some(_) => "UNAVAILABLE",
            },
            reason,
        }
    });
    Json(listed.collect())
}

/// A tensor that a model takes or gives.
#[derive(Clone, Debug, Serialize, ToSchema)]
struct TensorMetadata {
    #[schema(example = "text")]
    name: &'static str,
    #[schema(example = "BYTES")]
    datatype: &'static str,
    /// -1 is any number.
    #[schema(example = json!([-1]))]
    shape: Vec<i64>,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
struct Model {
    #[schema(example = "movie-sentiment")]
    name: String,
    /// The live version is the only one that answers.
    #[schema(example = json!(["1"]))]
    versions: Vec<String>,
    #[schema(example = "kdlora")]
    platform: &'static str,
    inputs: Vec<TensorMetadata>,
    outputs: Vec<TensorMetadata>,
    #[schema(inline)]
    parameters: ModelParameters,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
struct ModelParameters {
    problem_type: ProblemType,
    /// In the order of the columns of `scores` and `logits`.
    #[schema(example = json!(["negative", "positive"]))]
    labels: Vec<String>,
    /// Tokens of an input, special tokens included.
    max_length: usize,
}

impl From<Task> for Model {
    fn from(task: Task) -> Self {
        let tensor = |name, datatype, shape: &[i64]| TensorMetadata {
            name,
            datatype,
            shape: shape.to_vec(),
        };
        let labels = i64::try_from(task.labels.len()).unwrap_or(i64::MAX);
        Self {
            name: task.task,
            versions: vec![task.version.to_string()],
            platform: env!("CARGO_PKG_NAME"),
            inputs: vec![
                tensor(infer::TEXT, "BYTES", &[-1]),
                tensor(infer::TEXT_PAIR, "BYTES", &[-1]),
            ],
            outputs: vec![
                tensor("label", "BYTES", &[-1]),
                tensor("score", "FP32", &[-1]),
                tensor("scores", "FP32", &[-1, labels]),
                tensor("logits", "FP32", &[-1, labels]),
            ],
            parameters: ModelParameters {
                problem_type: task.problem_type,
                labels: task.labels,
                max_length: task.max_length,
            },
        }
    }
}

problem_set!(ModelErrors: InvalidParameter, UnknownTask, Internal);
problem_set!(ModelReadyErrors: InvalidParameter, UnknownTask, StudentMismatch, Internal);
problem_set!(VersionReadyErrors: InvalidParameter, UnknownTask, VersionNotLive, StudentMismatch,
    Internal);
problem_set!(VersionErrors: InvalidParameter, UnknownTask, VersionNotLive, Internal);

/// A task, described as a model. `text_pair` may be left out.
#[utoipa::path(get, path = "/v2/models/{task}", tag = "open-inference",
    operation_id = "v2_model",
    params(TaskPath),
    responses((status = 200, description = "The model.", body = Model), ModelErrors))]
async fn model(
    State(state): State<AppState>,
    Path(name): Path<String>,
) -> Result<Json<Model>, ApiError> {
    Ok(Json(state.described(state.task(&name)?).await?.into()))
}

/// A version of a task, which must be the live one, described as a model.
#[utoipa::path(get, path = "/v2/models/{task}/versions/{version}", tag = "open-inference",
    operation_id = "v2_version",
    params(LiveVersionPath),
    responses((status = 200, description = "The model.", body = Model), VersionErrors))]
async fn version(
    State(state): State<AppState>,
    Path((name, version)): Path<(String, u64)>,
) -> Result<Json<Model>, ApiError> {
    let entry = state.task(&name)?;
    check_live(&entry, version)?;
    Ok(Json(state.described(entry).await?.into()))
}

#[derive(Clone, Debug, Serialize, ToSchema)]
struct ModelReady {
    #[schema(example = "movie-sentiment")]
    name: String,
    ready: bool,
}

/// The task answers.
#[utoipa::path(get, path = "/v2/models/{task}/ready", tag = "open-inference",
    operation_id = "v2_model_ready",
    params(TaskPath),
    responses((status = 200, description = "The task answers.", body = ModelReady),
        ModelReadyErrors))]
async fn model_ready(
    State(state): State<AppState>,
    Path(name): Path<String>,
) -> Result<Json<ModelReady>, ApiError> {
    ready_model(&*state.task(&name)?)
}

/// The version answers.
#[utoipa::path(get, path = "/v2/models/{task}/versions/{version}/ready", tag = "open-inference",
    operation_id = "v2_version_ready",
    params(LiveVersionPath),
    responses((status = 200, description = "The version answers.", body = ModelReady),
        VersionReadyErrors))]
async fn version_ready(
    State(state): State<AppState>,
    Path((name, version)): Path<(String, u64)>,
) -> Result<Json<ModelReady>, ApiError> {
    let entry = state.task(&name)?;
    check_live(&entry, version)?;
    ready_model(&entry)
}

/// The protocol's clients go by the status: a model that is not ready is an error.
fn ready_model(task: &Entry) -> Result<Json<ModelReady>, ApiError> {
    let problem = match task.fit {
        Fit::Verified | Fit::Unverified => Problem::Internal,
        Fit::Mismatch(_) => Problem::StudentMismatch,
    };
    match task.unready() {
        Some(reason) => Err(problem.with(reason)),
        None => Ok(Json(ModelReady {
            name: task.name.clone(),
            ready: true,
        })),
    }
}
