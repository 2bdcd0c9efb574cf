//! `POST /admin/adapters`: takes an adapter of PEFT in as a version.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use axum::extract::multipart::Field;
use axum::extract::{FromRequest, Multipart, Request, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use utoipa::ToSchema;

use super::archive;
use super::upload::{is_form, receive_form};
use super::work_folder::WorkFolder;
use super::{Admin, to_the_end};
use crate::adapter::{AdapterError, AdapterFolder, EncoderIdentity, read_report};
use crate::distill::dataset::{MAX_LABEL_BYTES, MAX_LABELS};
use crate::http::auth::Actor;
use crate::http::error::{ApiError, Problem, problem_set};
use crate::http::extract::Json;
use crate::parse;
use crate::serving::LoadError;
use crate::store::{NewJob, Origin, Version};
use crate::telemetry::chain;

/// Whether the adapter of a folder can answer with the student that serves. Blocks.
pub type AdapterCheck = Arc<dyn Fn(&Path) -> Result<(), LoadError> + Send + Sync>;

/// The files of an adapter.
const FILES: [&str; 4] = [
    "adapter_config.json",
    "adapter_model.safetensors",
    "config.json",
    "report.json",
];

/// All of them in one .zip.
const ARCHIVE: &str = "archive";

/// Files that are parts of a form.
const PARTS: [&str; 5] = [FILES[0], FILES[1], FILES[2], FILES[3], ARCHIVE];

/// An adapter that is to be a version of a task.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"task": "film-mood", "path": "adapters/film-mood", "promote": true}))]
pub(super) struct NewAdapter {
    /// `[a-z0-9][a-z0-9-]*`; a task that is not there yet is made.
    task: String,
    /// The adapter's folder below the data root; left out of a form, which brings the files.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    path: Option<PathBuf>,
    /// Let the task answer with it at once.
    #[serde(default)]
    promote: bool,
}

/// The form of a request with the adapter's files, one by one or in an archive.
#[derive(ToSchema)]
#[expect(dead_code, reason = "describes a form that is read part by part")]
pub(super) struct AdapterForm {
    /// The request as JSON, without `path`.
    #[schema(value_type = Object)]
    spec: String,
    /// A .zip of the adapter's folder, in the place of the files.
    #[schema(value_type = Option<String>, format = Binary)]
    archive: Vec<u8>,
    /// PEFT's description.
    #[schema(rename = "adapter_config.json", value_type = Option<String>, format = Binary)]
    adapter_config: Vec<u8>,
    /// The weights.
    #[schema(rename = "adapter_model.safetensors", value_type = Option<String>, format = Binary)]
    adapter_model: Vec<u8>,
    /// The labels (`id2label`) and the `problem_type`.
    #[schema(rename = "config.json", value_type = Option<String>, format = Binary)]
    config: Vec<u8>,
    /// What `kdlora distill` has written beside it.
    #[schema(rename = "report.json", value_type = Option<String>, format = Binary)]
    report: Vec<u8>,
}

problem_set!(
    ImportErrors: NotJson, Unauthorized, Forbidden, TooLarge, UnsupportedMediaType, InvalidBody,
    Unusable, Internal
);

/// Add an adapter that PEFT or kdlora has made as a version of a task.
///
/// It is checked first: every tensor must have its place in the student, and the adapter must answer
/// a first text.
#[utoipa::path(
    post, path = "/admin/adapters", tag = "admin", operation_id = "import_adapter",
    request_body(content(
        (NewAdapter = "application/json"),
        (AdapterForm = "multipart/form-data")
    )),
    responses(
        (status = 201, body = Version, headers(
            ("Location" = String, description = "Address of the task's versions")
        )),
        ImportErrors
    )
)]
pub(super) async fn import(
    State(admin): State<Admin>,
    actor: Actor,
    request: Request,
) -> Result<Response, ApiError> {
    let folder = WorkFolder::new(&admin.store, &NewJob::id())?;
    let (new, source) = match is_form(&request) {
        true => receive(request, &folder.data(), admin.max_upload).await?,
        false => {
            let Json(new) = Json::<NewAdapter>::from_request(request, &()).await?;
            let Some(path) = &new.path else {
                return Err(Problem::InvalidBody.with(
                    "name the adapter's folder (below the data root) as `path`, or send its files \
                     as multipart/form-data",
                ));
            };
            let source = admin.places.folder("path", path)?;
            (new, source)
        }
    };
    let version = to_the_end(async move { admin.import(new, source, folder, actor).await }).await?;
    let location = format!("/admin/tasks/{}/versions", version.task);
    let headers = [(header::LOCATION, location)];
    Ok((StatusCode::CREATED, headers, Json(version)).into_response())
}

/// Takes the files of a form into `folder`; an archive may unpack to `most` bytes.
async fn receive(
    request: Request,
    folder: &Path,
    most: usize,
) -> Result<(NewAdapter, PathBuf), ApiError> {
    let form = Multipart::from_request(request, &())
        .await
        .map_err(|error| Problem::InvalidBody.with(error.body_text()))?;
    let (spec, files) = receive_form(form, folder, &PARTS, own_name).await?;
    let new: NewAdapter = parse::json(spec.get().as_bytes())
        .map_err(|error| Problem::InvalidBody.with(format!("the part `spec`: {error}")))?;
    if new.path.is_some() {
        return Err(Problem::InvalidBody.with("a form brings the files; leave out `path`"));
    }
    if files.iter().any(|file| file.name == ARCHIVE) {
        if files.len() > 1 {
            return Err(Problem::InvalidBody.with("send the archive, or the files one by one"));
        }
        let folder = folder.to_owned();
        let most = u64::try_from(most).unwrap_or(u64::MAX - 1);
        let unpacked = tokio::task::spawn_blocking(move || {
            let files = folder.join("unpacked");
            fs::create_dir(&files).map_err(ApiError::internal)?;
            archive::unpack(&folder.join(ARCHIVE), &files, &FILES, most)?;
            Ok::<_, ApiError>(files)
        });
        return Ok((new, unpacked.await.map_err(ApiError::internal)??));
    }
    Ok((new, folder.to_owned()))
}

fn own_name(_: &Field<'_>, name: &str) -> Result<String, ApiError> {
    Ok(name.to_owned())
}

impl Admin {
    async fn import(
        &self,
        new: NewAdapter,
        source: PathBuf,
        folder: WorkFolder,
        actor: Actor,
    ) -> Result<Version, ApiError> {
        let turn = self.turn().await?;
        let check = Arc::clone(&self.check_adapter);
        let student = Arc::clone(&self.student);
        let repacked = folder.path.join("adapter");
        let place = repacked.clone();
        let repack = move || repack(&source, &place, &student, &check);
        let checked = tokio::task::spawn_blocking(repack).await;
        checked.map_err(ApiError::internal)??;
        drop(turn);
        let store = &self.store;
        let version = store
            .add_version(&new.task, &repacked, Origin::Imported)
            .await?;
        drop(folder);
        if !new.promote {
            return Ok(version);
        }
        let number = version.version;
        let live = store
            .promote(&new.task, number, actor.name(), "promoted on import")
            .await?;
        self.apply(live).await.map(|Json(version)| version)
    }
}

/// Writes the adapter's own files into `folder` anew, if it can be used.
fn repack(
    source: &Path,
    folder: &Path,
    student: &EncoderIdentity,
    check: &AdapterCheck,
) -> Result<(), ApiError> {
    let unusable = |error: AdapterError| {
        let shown = format!("{}/", source.display());
        let reason = chain(&error).replace(&shown, "");
        Problem::Unusable.with(format!("the adapter can't be used: {reason}"))
    };
    let mut adapter = AdapterFolder::read(source).map_err(unusable)?;
    check_labels(&adapter.task.labels)?;
    adapter.task.base_digest = student.admit(source).map_err(unusable)?.digest;
    let report = read_report(source).map_err(unusable)?;
    adapter
        .repack(report.as_ref(), folder)
        .map_err(ApiError::internal)?;
    check(folder).map_err(|error| Problem::Unusable.with(chain(&error)))
}

/// Holds an adapter to the limits of a distillation: every answer names the labels.
fn check_labels(labels: &[String]) -> Result<(), ApiError> {
    if labels.len() > MAX_LABELS {
        return Err(Problem::Unusable.with(format!(
            "config.json names {} labels; a task may have {MAX_LABELS}",
            labels.len()
        )));
    }
    match labels.iter().find(|label| label.len() > MAX_LABEL_BYTES) {
        None => Ok(()),
        Some(label) => Err(Problem::Unusable.with(format!(
            "config.json has a label of {} bytes; a label may have {MAX_LABEL_BYTES}",
            label.len()
        ))),
    }
}
