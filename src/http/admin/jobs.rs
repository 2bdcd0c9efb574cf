//! How jobs are doing.

use axum::extract::State;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::Admin;
use crate::http::error::{ApiError, Problem, problem_set};
use crate::http::extract::{Json, Path, Query};
use crate::store::Job;

const MAX_LISTED: u32 = 500;

#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub(super) struct Page {
    /// How many of the latest jobs, at most 500.
    #[serde(default = "default_limit")]
    #[param(default = 50, maximum = 500)]
    limit: u32,
}

fn default_limit() -> u32 {
    50
}

/// Jobs, newest first.
#[derive(Debug, Serialize, ToSchema)]
#[schema(example = json!({"jobs": []}))]
pub(super) struct JobList {
    jobs: Vec<Job>,
}

problem_set!(ListErrors: InvalidParameter, Unauthorized, Forbidden, Internal);
problem_set!(ShowErrors: Unauthorized, Forbidden, UnknownJob, Internal);
problem_set!(CancelErrors: Unauthorized, Forbidden, UnknownJob, Conflict, Internal);

/// The latest jobs.
#[utoipa::path(
    get, path = "/admin/jobs", tag = "admin", operation_id = "list_jobs",
    params(Page),
    responses((status = 200, body = JobList), ListErrors)
)]
pub(super) async fn list(
    State(admin): State<Admin>,
    Query(page): Query<Page>,
) -> Result<Json<JobList>, ApiError> {
    if page.limit > MAX_LISTED {
        return Err(Problem::InvalidParameter.with(format!("limit may be at most {MAX_LISTED}")));
    }
    let jobs = admin.store.jobs(page.limit).await?;
    for job in &jobs {
        admin.runner.settle(job).await;
    }
    Ok(Json(JobList { jobs }))
}

/// State and progress of a job.
#[utoipa::path(
    get, path = "/admin/jobs/{id}", tag = "admin", operation_id = "show_job",
    params(("id" = String, Path, description = "From the `Location` of the request's answer")),
    responses((status = 200, body = Job), ShowErrors)
)]
pub(super) async fn show(
    State(admin): State<Admin>,
    Path(id): Path<String>,
) -> Result<Json<Job>, ApiError> {
    let job = admin.store.job(&id).await?;
    admin.runner.settle(&job).await;
    Ok(Json(job))
}

/// Cancel a job, queued or running. Answers when its process is gone.
#[utoipa::path(
    delete, path = "/admin/jobs/{id}", tag = "admin", operation_id = "cancel_job",
    params(("id" = String, Path)),
    responses((status = 200, body = Job), CancelErrors)
)]
pub(super) async fn cancel(
    State(admin): State<Admin>,
    Path(id): Path<String>,
) -> Result<Json<Job>, ApiError> {
    Ok(Json(admin.runner.cancel(&id).await?))
}
