//! `GET /v1/tasks/{task}/versions/{first}...{second}`: two versions side by side.

use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::{IntoResponse, Response};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::error::{ApiError, Problem, problem_set};
use super::extract::{Json, Path, Query};
use super::tasks::{Format, TaskQuery, in_markdown};
use crate::distill::report::{Comparison, Report};
use crate::parse;
use crate::store::Store;

/// The route, with its state.
pub fn routes(store: Store) -> OpenApiRouter {
    OpenApiRouter::new()
        .routes(routes!(compare))
        .with_state(store)
}

problem_set!(CompareErrors: InvalidParameter, UnknownVersion, Unusable, Internal);

/// Two versions of a task, from the reports that they came with.
///
/// Scores, calibration, sizes and latency with their differences, F1 by class, what differs in the
/// requests that made them, and both gates.
#[utoipa::path(
    get, path = "/v1/tasks/{task}/versions/{range}", tag = "tasks", operation_id = "compare_versions",
    params(
        ("task" = String, Path, description = "Name of the task."),
        ("range" = String, Path, description = "Numbers of two versions with three dots between them.",
            example = "1...2", pattern = "^[0-9]{1,18}\\.\\.\\.[0-9]{1,18}$"),
        TaskQuery
    ),
    responses(
        (status = 200, description = "The comparison.", content(
            (Comparison = "application/json"), (String = "text/markdown"))),
        CompareErrors
    )
)]
async fn compare(
    State(store): State<Store>,
    Path((task, range)): Path<(String, String)>,
    Query(query): Query<TaskQuery>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let versions = parse(&range)?;
    let mut reports = Vec::with_capacity(versions.len());
    for version in versions {
        reports.push(report(&store, &task, version).await?);
    }
    let comparison = Comparison::of(&task, versions, &reports[0], &reports[1]);
    if query.format(&headers) == Format::Markdown {
        return Ok(in_markdown(comparison.to_markdown()));
    }
    Ok(Json(comparison).into_response())
}

fn parse(range: &str) -> Result<[u64; 2], ApiError> {
    let numbers = range.split_once("...").and_then(|(first, second)| {
        // i64 is what the database can hold.
        let number = |text: &str| {
            text.parse::<u64>()
                .ok()
                .filter(|n| i64::try_from(*n).is_ok())
        };
        Some([number(first)?, number(second)?])
    });
    numbers.ok_or_else(|| {
        Problem::InvalidParameter.with(format!(
            "{range:?} is not two versions; write their numbers with three dots between them, as \
             in 1...2"
        ))
    })
}

async fn report(store: &Store, task: &str, number: u64) -> Result<Report, ApiError> {
    let version = store.version(task, number).await?;
    let unusable =
        |why: String| Problem::Unusable.with(format!("version {number} of task '{task}' {why}"));
    let report = version
        .report
        .ok_or_else(|| unusable("came without a report".into()))?;
    parse::value(report).map_err(|error| {
        unusable(format!(
            "has a report that is not in the format of this program ({error})"
        ))
    })
}
