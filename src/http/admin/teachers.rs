//! The teachers that there are, and what the teacher of a version says of a text.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::time::timeout;
use utoipa::ToSchema;

use super::Admin;
use crate::adapter::TaskConfig;
use crate::distill::ask::{AskError, Question};
use crate::distill::spec::{TeacherSpec, TrainingSpec};
use crate::http::Limits;
use crate::http::error::{ApiError, Problem, problem_set};
use crate::http::extract::{Json, Path};
use crate::http::inputs::Inputs;
use crate::http::prediction::{Prediction, predict};
use crate::hub;
use crate::parse;
use crate::store::{Origin, Version};
use crate::telemetry::chain;

/// Texts in one request: a teacher takes them one by one.
const MAX_INPUTS: usize = 16;

/// A large teacher is read from a disk and answers while others have the machine.
const PATIENCE: Duration = Duration::from_secs(120);

/// When to ask again while others are asking.
const BUSY: Duration = Duration::from_secs(5);

/// What can be named in a request for a distillation.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Teachers {
    /// The encoder that serves.
    student: String,
    /// SHA-256 of what the student computes with.
    student_digest: String,
    /// The catalog.
    encoders: Vec<KnownEncoder>,
    /// Ready-made teachers, for `teacher.adapter`.
    adapters: Vec<KnownAdapter>,
}

#[derive(Debug, Serialize, ToSchema)]
pub(super) struct KnownEncoder {
    name: String,
    about: String,
    licence: String,
    /// Whether it is in the cache; a pass fetches it otherwise.
    fetched: bool,
}

#[derive(Debug, Serialize, ToSchema)]
pub(super) struct KnownAdapter {
    name: String,
    /// The encoder that it was made for, for `teacher.model`, as far as the adapter names it.
    #[serde(skip_serializing_if = "Option::is_none")]
    encoder: Option<String>,
}

problem_set!(TeachersErrors: Unauthorized, Forbidden, Internal);
problem_set!(
    AskErrors: NotJson, InvalidParameter, InvalidBody, EmptyInput, TooLarge, UnsupportedMediaType,
    Unauthorized, Forbidden, UnknownTask, UnknownVersion, Unusable, QueueFull, Internal,
    DeadlineExceeded
);

/// The encoders of the catalog and the ready-made teachers.
#[utoipa::path(
    get, path = "/admin/teachers", tag = "admin", operation_id = "list_teachers",
    responses((status = 200, description = "What a request for a distillation may name.",
        body = Teachers), TeachersErrors)
)]
pub(super) async fn list(State(admin): State<Admin>) -> Result<Json<Teachers>, ApiError> {
    let find = move || {
        let adapters = admin.places.shipped_adapters().into_iter();
        let adapters = adapters.map(|(name, folder)| KnownAdapter {
            name,
            encoder: TaskConfig::read(&folder)
                .ok()
                .and_then(|task| task.base_model),
        });
        let encoders = hub::entries().iter().map(|entry| KnownEncoder {
            name: entry.name.clone(),
            about: entry.about.clone(),
            licence: entry.licence.clone(),
            fetched: hub::resolve(&entry.name, &admin.cache).is_ok(),
        });
        Teachers {
            student: admin.places.student.clone(),
            student_digest: admin.student.id.digest.clone(),
            encoders: encoders.collect(),
            adapters: adapters.collect(),
        }
    };
    let found = tokio::task::spawn_blocking(find).await;
    found.map(Json).map_err(ApiError::internal)
}

/// Texts for a teacher.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct AskRequest {
    /// At most 16.
    #[schema(inline)]
    inputs: Inputs,
    /// Ask the teacher of this version instead of the live one's.
    #[serde(default)]
    version: Option<u64>,
}

/// What the teacher says.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct AskResponse {
    task: String,
    /// The version whose teacher it is.
    version: u64,
    /// The teacher's encoder, with its adapter if it has one.
    teacher: String,
    /// One for each input, in order.
    predictions: Vec<Prediction>,
    /// Milliseconds that the teacher took for all inputs.
    compute_ms: f64,
    /// Milliseconds that it took to load the teacher; absent if it was in memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    load_ms: Option<f64>,
}

/// Ask the teacher that a version was distilled from.
///
/// The teacher is loaded when it is asked and leaves memory after a while. It runs at a priority
/// below that of serving, one teacher at a time.
#[utoipa::path(
    post, path = "/admin/tasks/{task}/teacher", tag = "admin", operation_id = "ask_teacher",
    params(("task" = String, Path)),
    request_body = AskRequest,
    responses((status = 200, description = "The teacher's predictions.", body = AskResponse),
        AskErrors)
)]
pub(super) async fn ask(
    State(admin): State<Admin>,
    Path(task): Path<String>,
    Json(request): Json<AskRequest>,
) -> Result<Json<AskResponse>, ApiError> {
    let inputs = request.inputs.checked(Limits {
        inputs: MAX_INPUTS,
        ..admin.limits
    })?;
    let version = admin.asked_version(&task, request.version).await?;
    let shown = Asking::of_report(version.report.as_ref())?;
    let (named, _) = shown.clone().teacher()?;
    let (teacher, training) = admin.resolved(&version, shown).await?.teacher()?;
    let question = Question {
        teacher,
        inputs,
        max_length: training.max_length,
        truncation: training.truncation,
        encoder_digest: teacher_digest(version.report.as_ref()),
    };
    let answer = match timeout(PATIENCE, admin.teachers.ask(question)).await {
        Ok(answer) => answer.map_err(refusal)?,
        Err(_) => {
            return Err(Problem::DeadlineExceeded.with(format!(
                "the teacher did not answer within {} s",
                PATIENCE.as_secs()
            )));
        }
    };
    let ms = |time: Duration| time.as_secs_f64() * 1000.0;
    let rows = answer.logits.iter();
    Ok(Json(AskResponse {
        task,
        version: version.version,
        teacher: name(&named),
        predictions: rows
            .map(|row| predict(&answer.task, row, None, false))
            .collect(),
        compute_ms: ms(answer.compute),
        load_ms: answer.load.map(ms),
    }))
}

/// The part of a request for a distillation that says how to ask its teacher.
#[derive(Clone, Debug, Deserialize)]
struct Asking {
    #[serde(default)]
    teacher: Option<TeacherSpec>,
    #[serde(default)]
    training: TrainingSpec,
}

impl Asking {
    /// Of the request in a report, where absolute paths have been shortened.
    fn of_report(report: Option<&Value>) -> Result<Self, ApiError> {
        let spec = report.and_then(|report| report.get("spec"));
        let spec = spec.ok_or_else(|| {
            Problem::Unusable.with("the version has no report that would name its teacher")
        })?;
        parse::value(spec.clone()).map_err(|error| {
            Problem::Unusable.with(format!(
                "the version's report does not say how to ask its teacher: {error}"
            ))
        })
    }

    fn teacher(self) -> Result<(TeacherSpec, TrainingSpec), ApiError> {
        let teacher = self.teacher.ok_or_else(|| {
            Problem::Unusable.with("the version learnt from labels alone; it has no teacher")
        })?;
        Ok((teacher, self.training))
    }
}

/// The digest of the encoder that taught, as a report has it.
fn teacher_digest(report: Option<&Value>) -> Option<String> {
    let digest = report?.pointer("/teacher_model/encoder_digest")?;
    Some(digest.as_str()?.to_owned())
}

/// As the report names them: `mpnet-base with movie-sentiment`.
fn name(teacher: &TeacherSpec) -> String {
    match (&teacher.http, &teacher.adapter) {
        (Some(http), _) => http.url.clone(),
        (None, None) => teacher.model.clone(),
        (None, Some(adapter)) => format!("{} with {adapter}", teacher.model),
    }
}

impl Admin {
    /// The version that is asked for, or the live one.
    async fn asked_version(&self, task: &str, asked: Option<u64>) -> Result<Version, ApiError> {
        if let Some(number) = asked {
            return Ok(self.store.version(task, number).await?);
        }
        // For its error where there is no such task.
        self.store.versions(task).await?;
        let live = self.store.live(task).await?.ok_or_else(|| {
            Problem::UnknownVersion.with(format!(
                "no version of task '{task}' is live; name one as `version`"
            ))
        })?;
        Ok(self.store.version(task, live.version).await?)
    }

    /// The teacher with paths that can be opened. A pass of this server has checked those of its
    /// request; what another report names is checked as in a request.
    async fn resolved(&self, version: &Version, shown: Asking) -> Result<Asking, ApiError> {
        if let Origin::Distilled { job } = &version.origin
            && let Ok(spec) = self.store.job_spec(job).await
            && let Ok(asking) = parse::value(spec)
        {
            return Ok(asking);
        }
        let places = Arc::clone(&self.places);
        let resolve = move || {
            let mut asking = shown;
            if let Some(teacher) = &mut asking.teacher {
                places.resolve_teacher(teacher)?;
            }
            Ok(asking)
        };
        let resolved = tokio::task::spawn_blocking(resolve).await;
        resolved.map_err(ApiError::internal)?
    }
}

fn refusal(error: AskError) -> ApiError {
    match error {
        AskError::Off
        | AskError::NotKept
        | AskError::Elsewhere
        | AskError::Missing(_)
        | AskError::TooLarge { .. }
        | AskError::OtherTeacher { .. }
        | AskError::Load(_) => Problem::Unusable.with(chain(&error)),
        AskError::Busy => Problem::QueueFull
            .with("others are asking teachers at the moment; try again in a moment")
            .retry_after(BUSY),
        AskError::Unreadable(_) | AskError::Compute(_) | AskError::Panicked | AskError::Gone => {
            ApiError::internal(error)
        }
    }
}
