//! The versions of a task, and which of them answers.

use axum::extract::State;
use axum::http::StatusCode;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::{Admin, to_the_end};
use crate::adapter::{Fit, Mode};
use crate::http::auth::Actor;
use crate::http::error::{ApiError, Problem, problem_set};
use crate::http::extract::{Json, Path, Query};
use crate::store::{Change, Version};
use crate::telemetry::chain;

/// Longest reason that is kept, in characters.
const MAX_REASON: usize = 1_000;

/// Versions of a task, oldest first, and every change of the live one.
#[derive(Debug, Serialize, ToSchema)]
#[schema(example = json!({"task": "film-mood", "live": 1, "versions": [], "history": []}))]
pub(super) struct Versions {
    task: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    live: Option<u64>,
    versions: Vec<Version>,
    history: Vec<Change>,
}

#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"version": 2, "reason": "better on the new test rows"}))]
pub(super) struct Promotion {
    version: u64,
    /// For the history.
    #[serde(default)]
    reason: Option<String>,
}

#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub(super) struct Why {
    /// For the history.
    reason: Option<String>,
}

problem_set!(ListErrors: Unauthorized, Forbidden, UnknownTask, Internal);
problem_set!(
    PromoteErrors: NotJson, InvalidBody, UnsupportedMediaType, Unauthorized, Forbidden,
    UnknownVersion, Conflict, Unusable, Internal
);
problem_set!(
    RollbackErrors: InvalidParameter, Unauthorized, Forbidden, UnknownTask, Conflict, Unusable,
    Internal
);

/// All versions of a task with their reports.
#[utoipa::path(
    get, path = "/admin/tasks/{task}/versions", tag = "admin", operation_id = "list_versions",
    params(("task" = String, Path)),
    responses((status = 200, body = Versions), ListErrors)
)]
pub(super) async fn list(
    State(admin): State<Admin>,
    Path(task): Path<String>,
) -> Result<Json<Versions>, ApiError> {
    let versions = admin.store.versions(&task).await?;
    let live = versions.iter().find(|version| version.live);
    Ok(Json(Versions {
        live: live.map(|version| version.version),
        history: admin.store.history(&task).await?,
        versions,
        task,
    }))
}

/// Make a version live. Requests that have begun end with the version they began with.
#[utoipa::path(
    post, path = "/admin/tasks/{task}/promote", tag = "admin", operation_id = "promote",
    params(("task" = String, Path)),
    request_body = Promotion,
    responses((status = 200, body = Version), PromoteErrors)
)]
pub(super) async fn promote(
    State(admin): State<Admin>,
    Path(task): Path<String>,
    actor: Actor,
    Json(promotion): Json<Promotion>,
) -> Result<Json<Version>, ApiError> {
    let reason = reason(promotion.reason, "promoted by hand", Problem::InvalidBody)?;
    to_the_end(async move {
        let version = promotion.version;
        admin.check_student(&task, version).await?;
        let live = admin
            .store
            .promote(&task, version, actor.name(), &reason)
            .await?;
        admin.apply(live).await
    })
    .await
}

/// Go back to the version that was live before.
#[utoipa::path(
    post, path = "/admin/tasks/{task}/rollback", tag = "admin", operation_id = "rollback",
    params(("task" = String, Path), Why),
    responses((status = 200, body = Version), RollbackErrors)
)]
pub(super) async fn rollback(
    State(admin): State<Admin>,
    Path(task): Path<String>,
    actor: Actor,
    Query(why): Query<Why>,
) -> Result<Json<Version>, ApiError> {
    let reason = reason(why.reason, "rolled back by hand", Problem::InvalidParameter)?;
    to_the_end(async move {
        let live = admin.store.rollback(&task, actor.name(), &reason).await?;
        admin.apply(live).await
    })
    .await
}

problem_set!(
    WithdrawErrors: InvalidParameter, Unauthorized, Forbidden, UnknownTask, Conflict, Internal
);

/// Take a task out of service. Its versions stay and can be promoted again; requests that have
/// begun are answered.
#[utoipa::path(
    delete, path = "/admin/tasks/{task}", tag = "admin", operation_id = "withdraw",
    params(("task" = String, Path), Why),
    responses((status = 204, description = "The task does not answer any more."), WithdrawErrors)
)]
pub(super) async fn withdraw(
    State(admin): State<Admin>,
    Path(task): Path<String>,
    actor: Actor,
    Query(why): Query<Why>,
) -> Result<StatusCode, ApiError> {
    let reason = reason(why.reason, "withdrawn by hand", Problem::InvalidParameter)?;
    to_the_end(async move {
        // For its error.
        admin.store.versions(&task).await?;
        admin.store.withdraw(&task, actor.name(), &reason).await?;
        match admin.live_hook.refresh(&task).await {
            Ok(()) => Ok(StatusCode::NO_CONTENT),
            Err(error) => Err(ApiError::internal(&*error)),
        }
    })
    .await
}

/// How a task is to be served.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[schema(example = json!({"task": "film-mood", "mode": "merged"}))]
pub(super) struct TaskMode {
    task: String,
    mode: Mode,
}

#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"mode": "merged"}))]
pub(super) struct NewMode {
    mode: Mode,
}

problem_set!(
    ModeErrors: NotJson, InvalidBody, UnsupportedMediaType, Unauthorized, Forbidden, UnknownTask,
    Unusable, Internal
);

/// Serve a task hot or merged from now on, also after a restart.
///
/// Both give the same scores. A task whose adapter changes more than linears is served merged all
/// the same.
#[utoipa::path(
    post, path = "/admin/tasks/{task}/mode", tag = "admin", operation_id = "set_mode",
    params(("task" = String, Path)),
    request_body = NewMode,
    responses((status = 200, body = TaskMode), ModeErrors)
)]
pub(super) async fn set_mode(
    State(admin): State<Admin>,
    Path(task): Path<String>,
    Json(NewMode { mode }): Json<NewMode>,
) -> Result<Json<TaskMode>, ApiError> {
    to_the_end(async move {
        let before = admin.store.mode(&task).await?;
        admin.store.set_mode(&task, Some(mode)).await?;
        if let Err(error) = admin.live_hook.refresh(&task).await {
            admin.store.set_mode(&task, before).await?;
            return Err(Problem::Unusable.with(format!(
                "task '{task}' can't be served {}, so nothing has changed: {}",
                mode.name(),
                chain(&*error)
            )));
        }
        Ok(Json(TaskMode { task, mode }))
    })
    .await
}

impl Admin {
    /// Refuses a version of another student before anything is changed for it.
    async fn check_student(&self, task: &str, version: u64) -> Result<(), ApiError> {
        let base = self.store.version(task, version).await?.base;
        match self.student.fit(&base) {
            Fit::Verified | Fit::Unverified => Ok(()),
            Fit::Mismatch(mismatch) => Err(Problem::Unusable.with(format!(
                "version {version} of task '{task}' can't be taken into service: {mismatch}"
            ))),
        }
    }

    pub(super) async fn apply(&self, version: Version) -> Result<Json<Version>, ApiError> {
        match self.live_hook.apply(&self.store, &version.task).await {
            Ok(()) => Ok(Json(version)),
            Err(error) => Err(Problem::Unusable.with(format!(
                "version {} of task '{}' could not be taken into service, so nothing has changed: \
                 {}",
                version.version,
                version.task,
                chain(&*error)
            ))),
        }
    }
}

fn reason(given: Option<String>, default: &str, problem: Problem) -> Result<String, ApiError> {
    match given {
        None => Ok(default.to_owned()),
        Some(reason) if reason.chars().count() <= MAX_REASON => Ok(reason),
        Some(_) => Err(problem.with(format!("reason may have {MAX_REASON} characters at most"))),
    }
}
