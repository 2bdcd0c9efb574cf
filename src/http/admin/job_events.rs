//! A job's life as server-sent events, and what its process has logged.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use serde::Deserialize;
use tokio::sync::{OwnedSemaphorePermit, watch};
use utoipa::IntoParams;

use super::Admin;
use crate::http::error::{ApiError, Problem, problem_set};
use crate::http::extract::{Path, Query};
use crate::store::{Job, JobState};
use crate::telemetry::chain;

/// When a client that found no place for a stream of events may try again.
const RETRY_AFTER: Duration = Duration::from_secs(5);

/// Of a log, where the request does not say.
const DEFAULT_LOG_BYTES: u64 = 64 * 1024;
const MAX_LOG_BYTES: u64 = 4 * 1024 * 1024;

problem_set!(EventErrors: Unauthorized, Forbidden, UnknownJob, Unavailable, Internal);
problem_set!(LogErrors: InvalidParameter, Unauthorized, Forbidden, UnknownJob, Internal);

/// A job's state, stage, progress and loss as they change.
///
/// Server-sent events of the kind `job`: the first tells the present state, each following one
/// what it has become, at most about two a second; `data` is what `GET /admin/jobs/{id}` answers.
/// After the event of a job that has ended the stream ends. As many clients may follow jobs as a
/// quarter of --max-connections, at most 64; others get 503 and can ask for the job. A client that
/// connects anew gets the present state at once; one whose `Last-Event-ID` says that it knows of
/// the end gets 204, upon which an `EventSource` stays away.
#[utoipa::path(
    get, path = "/admin/jobs/{id}/events", tag = "admin", operation_id = "job_events",
    params(
        ("id" = String, Path),
        ("Last-Event-ID" = Option<String>, Header, description = "Sent by an `EventSource` that connects anew")
    ),
    responses(
        (status = 200, description = "Events until the job ends", content_type = "text/event-stream", body = String),
        (status = 204, description = "The client knows already how the job ended"),
        EventErrors
    )
)]
pub(super) async fn events(
    State(admin): State<Admin>,
    Path(id): Path<String>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    // Before the first look, so that no change falls between the two.
    let changes = admin.runner.changes();
    let job = admin.store.job(&id).await?;
    let known = headers.get("last-event-id").map(|id| id.as_bytes());
    if job.state.is_over() && known == Some(job.state.as_str().as_bytes()) {
        return Ok(StatusCode::NO_CONTENT.into_response());
    }
    let place = Arc::clone(&admin.event_streams).try_acquire_owned();
    let place = place.map_err(|_| {
        Problem::Unavailable
            .with("too many clients follow jobs; ask for GET /admin/jobs/{id} now and then instead")
            .retry_after(RETRY_AFTER)
    })?;
    let watch = Watch {
        _place: place,
        admin,
        id,
        changes,
        told: None,
    };
    let events = stream::unfold(watch, |mut watch| async {
        let job = watch.next().await?;
        Some((Ok::<_, Infallible>(event(&job)), watch))
    });
    let events = Sse::new(events).keep_alive(KeepAlive::default());
    // A proxy that collects an answer before it passes it on would keep events back.
    Ok(([(header::CACHE_CONTROL, "no-store"), BUFFERING], events).into_response())
}

const BUFFERING: (header::HeaderName, &str) =
    (header::HeaderName::from_static("x-accel-buffering"), "no");

/// One client that follows a job.
struct Watch {
    _place: OwnedSemaphorePermit,
    admin: Admin,
    id: String,
    changes: watch::Receiver<()>,
    /// What the client was told last.
    told: Option<Job>,
}

impl Watch {
    /// The job as it is when it differs from what the client knows; `None` after its end.
    async fn next(&mut self) -> Option<Job> {
        if self.told.as_ref().is_some_and(|job| job.state.is_over()) {
            return None;
        }
        loop {
            let job = match self.admin.store.job(&self.id).await {
                Ok(job) => job,
                Err(error) => {
                    tracing::error!(error = %chain(&error), "a job can't be followed any more");
                    return None;
                }
            };
            if self.told.as_ref() != Some(&job) {
                self.admin.runner.settle(&job).await;
                self.told = Some(job.clone());
                return Some(job);
            }
            tokio::select! {
                changed = self.changes.changed() => changed.ok()?,
                // Who follows a job must not keep the server from stopping.
                () = self.admin.runner.stopping() => return None,
            }
        }
    }
}

fn event(job: &Job) -> Event {
    let event = Event::default().event("job");
    let event = match job.state {
        JobState::Queued | JobState::Running => event,
        over => event.id(over.as_str()),
    };
    match event.json_data(job) {
        Ok(event) => event,
        Err(error) => Event::default().comment(error.to_string()),
    }
}

#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub(super) struct LogQuery {
    /// How much of the end of the log.
    #[serde(default = "default_log_bytes")]
    #[param(default = 65_536, minimum = 1, maximum = 4_194_304)]
    bytes: u64,
}

fn default_log_bytes() -> u64 {
    DEFAULT_LOG_BYTES
}

/// The end of what a job's process has logged; empty before it starts. Kept however the job ends.
#[utoipa::path(
    get, path = "/admin/jobs/{id}/log", tag = "admin", operation_id = "job_log",
    params(("id" = String, Path), LogQuery),
    responses(
        (status = 200, description = "Lines of text", content_type = "text/plain", body = String),
        LogErrors
    )
)]
pub(super) async fn log(
    State(admin): State<Admin>,
    Path(id): Path<String>,
    Query(LogQuery { bytes }): Query<LogQuery>,
) -> Result<String, ApiError> {
    if !(1..=MAX_LOG_BYTES).contains(&bytes) {
        return Err(Problem::InvalidParameter.with(format!("bytes must be 1 to {MAX_LOG_BYTES}")));
    }
    Ok(admin.store.job_log(&id, bytes).await?)
}
