//! `GET /v1/tasks` and `/v1/tasks/{task}`: what the server can answer.

use std::ops::Bound;
use std::sync::Arc;

use axum::extract::State;
use axum::http::{HeaderMap, header};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use tokio::task::spawn_blocking;
use utoipa::{IntoParams, ToSchema};

use super::AppState;
use super::error::{ApiError, Problem, problem_set};
use super::extract::{Json, Path, Query};
use super::openapi::TaskPath;
use crate::adapter::{AdapterError, Mode, ProblemType, TaskConfig};
use crate::distill::report::{Report, without_texts};
use crate::parse;
use crate::serving::Entry;
use crate::telemetry::chain;

/// Tasks that the error of an unknown one names.
const NAMED: usize = 20;

/// A task that answers.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[schema(example = json!({"task": "movie-sentiment", "version": 1,
    "problem_type": "single_label_classification", "labels": ["negative", "positive"],
    "max_length": 128, "mode": "hot", "ready": true}))]
pub struct Task {
    pub(super) task: String,
    /// The live version.
    pub(super) version: u64,
    pub(super) problem_type: ProblemType,
    /// In the order of the logits.
    pub(super) labels: Vec<String>,
    /// Tokens a text is cut to, special tokens included.
    pub(super) max_length: usize,
    /// Whether the adapter shares the student's batches or is folded into an encoder of its own.
    mode: Mode,
    /// False for a task that can't answer: its live version belongs to another student, or could
    /// not be loaded.
    ready: bool,
    /// Why it is not ready.
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
}

impl Task {
    /// A task that is not in memory is described by its folder; `longest` is the encoder's limit of
    /// tokens.
    fn of(entry: &Entry, longest: usize) -> Result<Self, AdapterError> {
        let (config, mode) = match entry.resident() {
            Some(task) => (task.config.clone(), task.mode()),
            None => (TaskConfig::read(&entry.folder)?, entry.mode),
        };
        let reason = entry.unready();
        Ok(Self {
            task: entry.name.clone(),
            version: entry.version,
            problem_type: config.problem_type,
            labels: config.labels,
            max_length: config.max_length.min(longest),
            mode,
            ready: reason.is_none(),
            reason,
        })
    }
}

#[derive(Clone, Debug, Serialize, ToSchema)]
#[schema(example = json!({"tasks": [{"task": "movie-sentiment", "version": 1,
    "problem_type": "single_label_classification", "labels": ["negative", "positive"],
    "max_length": 128, "mode": "hot", "ready": true}]}))]
pub struct TaskList {
    /// By name.
    tasks: Vec<Task>,
    /// Give this as `after` for the next page; absent on the last one.
    #[serde(skip_serializing_if = "Option::is_none")]
    next: Option<String>,
}

/// Which tasks to list.
#[derive(Clone, Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct ListQuery {
    /// Tasks in one answer.
    #[serde(default = "ListQuery::default_limit")]
    #[param(minimum = 1, maximum = 1000, default = 1000)]
    limit: usize,
    /// Only tasks behind this name.
    after: Option<String>,
}

impl ListQuery {
    fn default_limit() -> usize {
        1000
    }
}

/// A task with the report of its live version.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[schema(example = json!({"task": "movie-sentiment", "version": 1,
    "problem_type": "single_label_classification", "labels": ["negative", "positive"],
    "max_length": 128, "mode": "hot", "ready": true}))]
pub struct TaskDetails {
    #[serde(flatten)]
    task: Task,
    /// How good, how fast and how large the version is beside its teacher; absent for a version
    /// that came without a report.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Report>)]
    report: Option<serde_json::Value>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(super) enum Format {
    #[default]
    Json,
    Markdown,
}

#[derive(Clone, Copy, Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct TaskQuery {
    /// `markdown` gives the report as a table; so does `Accept: text/markdown`.
    #[param(inline)]
    format: Option<Format>,
}

impl TaskQuery {
    /// What is asked for, by the query or by `Accept`.
    pub(super) fn format(self, headers: &HeaderMap) -> Format {
        self.format.unwrap_or_else(|| accepted(headers))
    }
}

problem_set!(ListErrors: InvalidParameter, Internal);

/// The tasks that answer, by name. One whose folder can't be read is left out.
#[utoipa::path(get, path = "/v1/tasks", tag = "tasks", params(ListQuery),
    responses((status = 200, description = "The tasks, by name.", body = TaskList), ListErrors))]
pub(super) async fn tasks(
    State(state): State<AppState>,
    Query(query): Query<ListQuery>,
) -> Result<Json<TaskList>, ApiError> {
    let ListQuery { limit, after } = query;
    if !(1..=1000).contains(&limit) {
        return Err(Problem::InvalidParameter.with("limit must be from 1 to 1000"));
    }
    let all = state.tasks.all();
    let first = match after.as_deref() {
        Some(name) => Bound::Excluded(name),
        None => Bound::Unbounded,
    };
    let mut behind = all.range::<str, _>((first, Bound::Unbounded));
    let page: Vec<_> = behind
        .by_ref()
        .take(limit)
        .map(|(_, entry)| Arc::clone(entry))
        .collect();
    let next = behind
        .next()
        .and(page.last())
        .map(|entry| entry.name.clone());
    let longest = state.serving.max_length();
    let describe = move || {
        page.iter()
            .filter_map(|entry| listed(entry, longest))
            .collect()
    };
    let tasks = spawn_blocking(describe).await.map_err(ApiError::internal)?;
    Ok(Json(TaskList { tasks, next }))
}

fn listed(entry: &Entry, longest: usize) -> Option<Task> {
    Task::of(entry, longest)
        .inspect_err(|error| {
            tracing::warn!(
                task = entry.name,
                error = chain(error),
                "a task can't be described"
            );
        })
        .ok()
}

problem_set!(TaskErrors: InvalidParameter, UnknownTask, Internal);

/// One task, with the report of its live version.
#[utoipa::path(get, path = "/v1/tasks/{task}", tag = "tasks",
    params(TaskPath, TaskQuery),
    responses(
        (status = 200, description = "The task and its report.", content(
            (TaskDetails = "application/json"), (String = "text/markdown"))),
        TaskErrors))]
pub(super) async fn task(
    State(state): State<AppState>,
    Path(name): Path<String>,
    Query(query): Query<TaskQuery>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let entry = state.task(&name)?;
    let longest = state.serving.max_length();
    let details = move || {
        let mut report = entry.report();
        if let Some(report) = &mut report {
            without_texts(report);
        }
        let task = Task::of(&entry, longest).map_err(ApiError::internal)?;
        Ok::<_, ApiError>(TaskDetails { task, report })
    };
    let details = spawn_blocking(details)
        .await
        .map_err(ApiError::internal)??;
    if query.format(&headers) == Format::Markdown {
        return Ok(in_markdown(markdown(&details)));
    }
    Ok(Json(details).into_response())
}

/// An answer in Markdown.
pub(super) fn in_markdown(text: String) -> Response {
    let kind = [(header::CONTENT_TYPE, "text/markdown; charset=utf-8")];
    (kind, text).into_response()
}

fn accepted(headers: &HeaderMap) -> Format {
    let asked = headers
        .get_all(header::ACCEPT)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|range| range.split(';').next())
        .any(|range| range.trim().eq_ignore_ascii_case("text/markdown"));
    if asked {
        Format::Markdown
    } else {
        Format::Json
    }
}

fn markdown(details: &TaskDetails) -> String {
    let task = &details.task;
    let title = format!("# {}, version {}\n\n", task.task, task.version);
    let Some(value) = &details.report else {
        return format!("{title}This version came without a report.\n");
    };
    match parse::value::<Report>(value.clone()) {
        Ok(report) => report.to_markdown(),
        Err(error) => format!(
            "{title}The report of this version is not in the format of this program ({error}); \
             read it as JSON.\n"
        ),
    }
}

impl AppState {
    /// A task, described.
    pub(super) async fn described(&self, entry: Arc<Entry>) -> Result<Task, ApiError> {
        let longest = self.serving.max_length();
        let described = spawn_blocking(move || Task::of(&entry, longest)).await;
        described
            .map_err(ApiError::internal)?
            .map_err(ApiError::internal)
    }

    /// The live version of a task; the error names the tasks there are.
    pub(super) fn task(&self, name: &str) -> Result<Arc<Entry>, ApiError> {
        let unknown = || self.unknown_task(&format!("there is no task {name:?}"));
        self.tasks.get(name).ok_or_else(unknown)
    }

    /// The error for a name that is no task's: `what` is wrong, then the names of the tasks.
    pub(super) fn unknown_task(&self, what: &str) -> ApiError {
        let all = self.tasks.all();
        let names: Vec<&str> = all.keys().take(NAMED).map(|name| &**name).collect();
        Problem::UnknownTask.with(match names.as_slice() {
            [] => format!("{what}, and no other yet"),
            names if all.len() > names.len() => format!(
                "{what}; GET /v1/tasks lists the {} that there are",
                all.len()
            ),
            names => format!("{what}; the tasks are: {}", names.join(", ")),
        })
    }
}
