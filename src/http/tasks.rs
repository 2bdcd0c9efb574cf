//! `GET /v1/tasks` and `/v1/tasks/{task}`: what the server can answer.

use axum::extract::State;
use axum::http::{HeaderMap, header};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::AppState;
use super::error::{ApiError, Problem, problem_set};
use super::extract::{Json, Path, Query};
use crate::adapter::{Mode, ProblemType};
use crate::distill::report::Report;
use crate::serving::LiveTask;

/// A task that answers.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Task {
    task: String,
    /// The live version.
    version: u64,
    problem_type: ProblemType,
    /// In the order of the logits.
    labels: Vec<String>,
    /// Tokens a text is cut to, special tokens included.
    max_length: usize,
    /// Whether the adapter shares the student's batches or is folded into an encoder of its own.
    mode: Mode,
}

impl From<&LiveTask> for Task {
    fn from(task: &LiveTask) -> Self {
        Self {
            task: task.name.clone(),
            version: task.version,
            problem_type: task.config.problem_type,
            labels: task.config.labels.clone(),
            max_length: task.max_length,
            mode: task.mode(),
        }
    }
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct TaskList {
    /// By name.
    tasks: Vec<Task>,
}

/// A task with the report of its live version.
#[derive(Clone, Debug, Serialize, ToSchema)]
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
enum Format {
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

/// All tasks that answer.
#[utoipa::path(get, path = "/v1/tasks", tag = "tasks",
    responses((status = 200, description = "The tasks, by name.", body = TaskList)))]
pub(super) async fn tasks(State(state): State<AppState>) -> Json<TaskList> {
    let all = state.tasks.all();
    Json(TaskList {
        tasks: all.values().map(|task| Task::from(&**task)).collect(),
    })
}

problem_set!(TaskErrors: InvalidParameter, UnknownTask);

/// One task, with the report of its live version.
#[utoipa::path(get, path = "/v1/tasks/{task}", tag = "tasks",
    params(("task" = String, Path, description = "Name of the task."), TaskQuery),
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
    let task = state.task(&name)?;
    let format = query.format.unwrap_or_else(|| accepted(&headers));
    if format == Format::Markdown {
        let text = markdown(&task);
        return Ok((
            [(header::CONTENT_TYPE, "text/markdown; charset=utf-8")],
            text,
        )
            .into_response());
    }
    let details = TaskDetails {
        task: Task::from(&*task),
        report: task.report.clone(),
    };
    Ok(Json(details).into_response())
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

fn markdown(task: &LiveTask) -> String {
    let title = format!("# {}, version {}\n\n", task.name, task.version);
    let Some(value) = &task.report else {
        return format!("{title}This version came without a report.\n");
    };
    match serde_json::from_value::<Report>(value.clone()) {
        Ok(report) => report.to_markdown(),
        Err(error) => format!(
            "{title}The report of this version is not in the format of this program ({error}); \
             read it as JSON.\n"
        ),
    }
}

impl AppState {
    /// The live version of a task; the error names the tasks there are.
    pub(super) fn task(&self, name: &str) -> Result<std::sync::Arc<LiveTask>, ApiError> {
        self.tasks.get(name).ok_or_else(|| {
            let all = self.tasks.all();
            let names: Vec<&str> = all.keys().map(String::as_str).collect();
            Problem::UnknownTask.with(match names.as_slice() {
                [] => format!("there is no task {name:?}, and no other yet"),
                names => format!(
                    "there is no task {name:?}; the tasks are: {}",
                    names.join(", ")
                ),
            })
        })
    }
}
