//! Takes a request for a distillation pass.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::Value;
use utoipa::ToSchema;

use super::upload::{self, Upload};
use super::work_folder::WorkFolder;
use super::{Admin, checks, to_the_end};
use crate::distill::spec::DistillSpec;
use crate::http::error::{ApiError, Problem, problem_set};
use crate::http::extract::Json;
use crate::parse;
use crate::store::{Created, Job, NewJob};

const IDEMPOTENCY_KEY: &str = "idempotency-key";
const MAX_KEY: usize = 255;

problem_set!(
    DistillErrors: NotJson, InvalidParameter, Unauthorized, Forbidden, Conflict, TooLarge,
    UnsupportedMediaType, InvalidBody, Unusable, Internal
);

/// The form of a request with files.
#[derive(ToSchema)]
#[expect(dead_code, reason = "describes a form that is read part by part")]
pub(super) struct DistillForm {
    /// The request as JSON; splits that come as files are left out of its `data`.
    #[schema(value_type = Object)]
    spec: String,
    /// JSONL, CSV, TSV or Parquet; the name's ending tells which.
    #[schema(value_type = Option<String>, format = Binary)]
    train: Vec<u8>,
    #[schema(value_type = Option<String>, format = Binary)]
    validation: Vec<u8>,
    #[schema(value_type = Option<String>, format = Binary)]
    test: Vec<u8>,
}

/// Teach a student from data and a teacher, in the background.
///
/// The request is checked before it is accepted; watch the job at the address in `Location`.
#[utoipa::path(
    post, path = "/admin/distill", tag = "admin", operation_id = "distill",
    params((
        "Idempotency-Key" = Option<String>, Header,
        min_length = 1, max_length = 255, pattern = "^[!-~]+$",
        description = "The same request with the same key makes one job, however often it is sent"
    )),
    request_body(content(
        (DistillSpec = "application/json"),
        (DistillForm = "multipart/form-data")
    )),
    responses(
        (status = 202, body = Job, headers(
            ("Location" = String, description = "Address of the job")
        )),
        DistillErrors
    )
)]
pub(super) async fn distill(
    State(admin): State<Admin>,
    headers: HeaderMap,
    request: Request,
) -> Result<Response, ApiError> {
    let key = idempotency_key(&headers)?;
    let id = NewJob::id();
    let folder = WorkFolder::new(&admin.store, &id)?;
    let upload = upload::receive(request, &folder.data()).await?;
    let turn = admin.turn().await?;
    if let Some(key) = &key
        && let Some(job) = admin.store.repeated_job(key, &upload.digest).await?
    {
        return Ok(accepted(job));
    }
    let job = to_the_end(async move {
        let job = admin.queue(id, key, upload, folder).await;
        drop(turn);
        job
    });
    Ok(accepted(job.await?))
}

impl Admin {
    /// Checks the request and queues its job.
    async fn queue(
        &self,
        id: String,
        idempotency_key: Option<String>,
        upload: Upload,
        folder: WorkFolder,
    ) -> Result<Job, ApiError> {
        let request_digest = upload.digest.clone();
        let places = self.places.clone();
        let (student, cache) = (Arc::clone(&self.student), self.cache.clone());
        let prepare = move || {
            let mut spec = parse(upload.spec)?;
            places.resolve(&mut spec, &upload.splits)?;
            let warnings = checks::check(&spec, &folder.data(), &student.known, &cache)?;
            folder.sync().map_err(ApiError::internal)?;
            Ok::<_, ApiError>((spec, warnings, folder))
        };
        let prepared = tokio::task::spawn_blocking(prepare).await;
        let (spec, warnings, mut folder) = prepared.map_err(ApiError::internal)??;
        let new = NewJob {
            id,
            task: spec.task.clone(),
            priority: spec.job.priority,
            spec: serde_json::to_value(&spec).map_err(ApiError::internal)?,
            idempotency_key,
            request_digest,
            warnings,
        };
        match self.store.create_job(new).await? {
            Created::New(job) => {
                folder.keep = true;
                self.runner.wake();
                Ok(job)
            }
            Created::Existing(job) => Ok(job),
        }
    }
}

fn parse(spec: Value) -> Result<DistillSpec, ApiError> {
    let spec: DistillSpec = parse::value(spec)?;
    spec.validate()
        .map_err(|error| Problem::InvalidBody.with(error.to_string()))?;
    Ok(spec)
}

fn accepted(job: Job) -> Response {
    let location = format!("/admin/jobs/{}", job.id);
    let headers = [(header::LOCATION, location)];
    (StatusCode::ACCEPTED, headers, Json(job)).into_response()
}

fn idempotency_key(headers: &HeaderMap) -> Result<Option<String>, ApiError> {
    let Some(key) = headers.get(IDEMPOTENCY_KEY) else {
        return Ok(None);
    };
    match key.to_str() {
        Ok(key) if !key.is_empty() && key.len() <= MAX_KEY => Ok(Some(key.to_owned())),
        _ => Err(Problem::InvalidParameter.with(format!(
            "the Idempotency-Key must be 1 to {MAX_KEY} visible ASCII characters"
        ))),
    }
}
