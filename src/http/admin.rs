//! The routes of `/admin`: distillation jobs and the versions of tasks.
//!
//! - [`adapters`]: takes in an adapter that was made elsewhere.
//! - [`distill`]: takes a request for a pass, checks it, queues it.
//! - [`jobs`]: how jobs are doing; cancellation.
//! - [`job_events`]: the same as server-sent events; logs.
//! - [`teachers`]: what may teach, and what the teacher of a version says of a text.
//! - [`versions`]: what there is of a task, promotion, rollback.

mod adapters;
mod archive;
mod checks;
mod distill;
mod inline_rows;
mod job_events;
mod jobs;
mod places;
mod teachers;
#[cfg(test)]
mod tests;
mod upload;
mod versions;
mod work_folder;

use std::path::PathBuf;
use std::sync::Arc;

use axum::extract::DefaultBodyLimit;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use utoipa_axum::router::{OpenApiRouter, UtoipaMethodRouterExt};
use utoipa_axum::routes;

use super::Limits;
use super::error::{ApiError, Problem};
use crate::adapter::EncoderIdentity;
use crate::distill::ask::TeacherDesk;
use crate::distill::runner::{LiveHook, Runner};
use crate::store::{Store, StoreError};
pub use adapters::AdapterCheck;
use places::Places;

/// What the admin routes need.
#[derive(Clone)]
pub struct AdminConfig {
    pub store: Store,
    pub runner: Runner,
    /// Called after each promotion and rollback, before the client gets its answer.
    pub live_hook: LiveHook,
    /// Canonical folder below which clients may name data and models.
    pub data_root: Option<PathBuf>,
    /// The encoder that serves.
    pub student: Arc<EncoderIdentity>,
    /// Tries an adapter on the student that serves.
    pub check_adapter: AdapterCheck,
    /// Folder of the ready-made adapters; those of teachers are `{adapters}/{name}/teacher`.
    pub adapters: Option<PathBuf>,
    /// Cache of fetched encoders.
    pub cache: PathBuf,
    pub teachers: TeacherDesk,
    /// Of texts for a teacher.
    pub limits: Limits,
    /// Bytes of a request with uploaded files.
    pub max_upload_bytes: usize,
    /// Clients that follow jobs by server-sent events at a time.
    pub max_event_streams: usize,
}

/// The state of the handlers.
#[derive(Clone)]
struct Admin {
    store: Store,
    runner: Runner,
    live_hook: LiveHook,
    check_adapter: AdapterCheck,
    student: Arc<EncoderIdentity>,
    places: Arc<Places>,
    cache: PathBuf,
    teachers: TeacherDesk,
    limits: Limits,
    /// Bytes that an archive may unpack to.
    max_upload: usize,
    /// Requests are read into memory, many times their size, and checked one at a time.
    turns: Arc<Semaphore>,
    /// Places of streams of events.
    event_streams: Arc<Semaphore>,
}

/// The routes of `/admin`, with their state.
pub fn routes(config: AdminConfig) -> OpenApiRouter {
    let upload = DefaultBodyLimit::max(config.max_upload_bytes);
    let admin = Admin {
        store: config.store,
        runner: config.runner,
        live_hook: config.live_hook,
        check_adapter: config.check_adapter,
        student: Arc::clone(&config.student),
        places: Arc::new(Places {
            student: config.student.id.name.clone(),
            data_root: config.data_root,
            adapters: config.adapters,
        }),
        cache: config.cache,
        teachers: config.teachers,
        limits: config.limits,
        max_upload: config.max_upload_bytes,
        turns: Arc::new(Semaphore::new(1)),
        event_streams: Arc::new(Semaphore::new(config.max_event_streams)),
    };
    OpenApiRouter::new()
        .routes(routes!(distill::distill).layer(upload))
        .routes(routes!(adapters::import).layer(upload))
        .routes(routes!(jobs::list))
        .routes(routes!(jobs::show, jobs::cancel))
        .routes(routes!(job_events::events))
        .routes(routes!(job_events::log))
        .routes(routes!(teachers::list))
        .routes(routes!(teachers::ask))
        .routes(routes!(versions::list))
        .routes(routes!(versions::promote))
        .routes(routes!(versions::rollback))
        .routes(routes!(versions::withdraw))
        .routes(routes!(versions::set_mode))
        .with_state(admin)
}

impl Admin {
    /// Waits until no other request is read into memory and checked.
    async fn turn(&self) -> Result<OwnedSemaphorePermit, ApiError> {
        let turn = Arc::clone(&self.turns).acquire_owned().await;
        turn.map_err(ApiError::internal)
    }
}

impl From<StoreError> for ApiError {
    fn from(error: StoreError) -> Self {
        let problem = match &error {
            StoreError::BadTaskName(_) => Problem::InvalidBody,
            StoreError::UnknownTask(_) => Problem::UnknownTask,
            StoreError::UnknownVersion { .. } => Problem::UnknownVersion,
            StoreError::UnknownJob(_) => Problem::UnknownJob,
            StoreError::MissingArtifact { .. }
            | StoreError::NothingToRollBack(_)
            | StoreError::NotLive(_)
            | StoreError::JobOver { .. }
            | StoreError::KeyReused { .. } => Problem::Conflict,
            StoreError::NotPlainFiles(_) | StoreError::BadReport { .. } => Problem::Unusable,
            _ => return Self::internal(error),
        };
        problem.with(error.to_string())
    }
}

/// Runs `work` to its end even if the client goes away: what has begun to change the state folder
/// must not stop half-way.
async fn to_the_end<T: Send + 'static>(
    work: impl Future<Output = Result<T, ApiError>> + Send + 'static,
) -> Result<T, ApiError> {
    tokio::spawn(work).await.map_err(ApiError::internal)?
}
