//! Bodies that are JSON or a form with files, taken in.

use std::path::{Path, PathBuf};

use axum::extract::multipart::{Field, MultipartError};
use axum::extract::{DefaultBodyLimit, FromRequest, Multipart, Request};
use axum::http::{StatusCode, header};
use serde_json::value::RawValue;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokio::fs::{self, File};
use tokio::io::AsyncWriteExt;

use super::inline_rows;
use crate::http::error::{ApiError, Problem};
use crate::http::extract::{Json, cut_off};
use crate::parse::{self, ParseError};

/// A JSON body is held in memory; larger data come as files.
pub(super) const MAX_JSON_BYTES: usize = 32 * 1024 * 1024;

/// Endings of the data files that can be read.
const ENDINGS: [&str; 6] = ["jsonl", "ndjson", "json", "csv", "tsv", "parquet"];

/// Parts of a form that are data.
pub(super) const SPLITS: [&str; 3] = ["train", "validation", "test"];

/// What a request has brought.
#[derive(Debug)]
pub(super) struct Upload {
    /// The spec as it was sent, with the paths of files in the place of uploads and of rows.
    pub(super) spec: Value,
    /// Splits that were uploaded, as files or as rows.
    pub(super) splits: Vec<&'static str>,
    /// SHA-256 of all that was sent, whatever the names of temporary files.
    pub(super) digest: String,
}

/// Reads the body of `POST /admin/distill`; files and rows go to `folder`, which is made for them.
pub(super) async fn receive(mut request: Request, folder: &Path) -> Result<Upload, ApiError> {
    if is_form(&request) {
        let form = Multipart::from_request(request, &())
            .await
            .map_err(|error| Problem::InvalidBody.with(error.body_text()))?;
        let (spec, files) = receive_form(form, folder, &SPLITS, ending_of).await?;
        return assemble(spec, files, folder).await;
    }
    DefaultBodyLimit::max(MAX_JSON_BYTES).apply(&mut request);
    let body = Json::<Box<RawValue>>::from_request(request, &()).await;
    let Json(spec) = body.map_err(|error| match error.problem() {
        Problem::TooLarge => Problem::TooLarge.with(format!(
            "a JSON body may have {} MiB; upload larger data as files (multipart/form-data), or \
             name files below the data root",
            MAX_JSON_BYTES >> 20
        )),
        Problem::UnsupportedMediaType => Problem::UnsupportedMediaType.with(
            "send the request as application/json, or as multipart/form-data with a part `spec` \
             and files `train`, `validation`, `test`",
        ),
        _ => error,
    })?;
    assemble(spec, Vec::new(), folder).await
}

pub(super) fn is_form(request: &Request) -> bool {
    let kind = request.headers().get(header::CONTENT_TYPE);
    kind.and_then(|kind| kind.to_str().ok())
        .is_some_and(|kind| kind.to_ascii_lowercase().starts_with("multipart/form-data"))
}

#[derive(Debug)]
pub(super) struct ReceivedFile {
    /// Of the part.
    pub(super) name: &'static str,
    pub(super) path: PathBuf,
    pub(super) digest: String,
}

/// Reads a form of a part `spec` and the files `names`, which go to `folder`, each under the name
/// that `file_name` gives for its part.
pub(super) async fn receive_form(
    mut form: Multipart,
    folder: &Path,
    names: &[&'static str],
    file_name: impl Fn(&Field<'_>, &str) -> Result<String, ApiError>,
) -> Result<(Box<RawValue>, Vec<ReceivedFile>), ApiError> {
    let mut spec = None;
    let mut files: Vec<ReceivedFile> = Vec::new();
    while let Some(field) = form.next_field().await.map_err(form_error)? {
        let name = field.name().unwrap_or_default().to_owned();
        let known = names.iter().copied().find(|known| *known == name);
        let twice =
            spec.is_some() && name == "spec" || files.iter().any(|file| Some(file.name) == known);
        if twice {
            return Err(invalid(format!("the form has two parts `{name}`")));
        }
        match known {
            Some(known) => {
                let path = folder.join(file_name(&field, known)?);
                files.push(receive_file(field, known, path).await?);
            }
            None if name == "spec" => spec = Some(receive_spec(field).await?),
            None => {
                return Err(invalid(format!(
                    "the form has a part `{name}`; its parts are `spec` (JSON) and the files `{}`",
                    names.join("`, `")
                )));
            }
        }
    }
    let spec =
        spec.ok_or_else(|| invalid("the form has no part `spec` with the request as JSON"))?;
    Ok((spec, files))
}

async fn receive_spec(mut field: Field<'_>) -> Result<Box<RawValue>, ApiError> {
    let mut bytes = Vec::new();
    while let Some(chunk) = field.chunk().await.map_err(form_error)? {
        bytes.extend_from_slice(&chunk);
        if bytes.len() > MAX_JSON_BYTES {
            let most = MAX_JSON_BYTES >> 20;
            return Err(Problem::TooLarge.with(format!("the part `spec` may have {most} MiB")));
        }
    }
    let (problem, detail) = match parse::json(&bytes) {
        Ok(spec) => return Ok(spec),
        Err(ParseError::Syntax(detail)) => (Problem::NotJson, detail),
        Err(ParseError::Field(detail)) => (Problem::InvalidBody, detail),
    };
    Err(problem.with(format!("the part `spec`: {detail}")))
}

/// Streams a part to `path`, and flushes it to the disk.
async fn receive_file(
    mut field: Field<'_>,
    name: &'static str,
    path: PathBuf,
) -> Result<ReceivedFile, ApiError> {
    let folder = path.parent().unwrap_or(&path);
    fs::create_dir_all(folder)
        .await
        .map_err(ApiError::internal)?;
    let mut file = File::create(&path).await.map_err(ApiError::internal)?;
    let mut digest = Sha256::new();
    while let Some(chunk) = field.chunk().await.map_err(form_error)? {
        digest.update(&chunk);
        file.write_all(&chunk).await.map_err(ApiError::internal)?;
    }
    file.flush().await.map_err(ApiError::internal)?;
    file.sync_all().await.map_err(ApiError::internal)?;
    Ok(ReceivedFile {
        name,
        path,
        digest: format!("{:x}", digest.finalize()),
    })
}

/// The split with the ending of the name that the file has at the client, which tells its format.
fn ending_of(field: &Field<'_>, split: &str) -> Result<String, ApiError> {
    let name = field.file_name().unwrap_or_default().to_lowercase();
    ENDINGS
        .into_iter()
        .find(|ending| name.ends_with(&format!(".{ending}")))
        .map(|ending| format!("{split}.{ending}"))
        .ok_or_else(|| {
            invalid(format!(
                "the part `{split}` must be a file whose name ends in .{}, so that its format is \
                 known (with curl: -F {split}=@rows.jsonl)",
                ENDINGS.join(", .")
            ))
        })
}

/// Writes the rows of the spec to files in `folder`, and puts the paths of all files into it.
async fn assemble(
    spec: Box<RawValue>,
    mut files: Vec<ReceivedFile>,
    folder: &Path,
) -> Result<Upload, ApiError> {
    let folder = folder.to_owned();
    let taken = tokio::task::spawn_blocking(move || inline_rows::take(&spec, &folder)).await;
    let (mut spec, rows) = taken.map_err(ApiError::internal)??;
    files.extend(rows);
    let mut digest = Sha256::new();
    digest.update(spec.to_string());
    for file in &files {
        digest.update(format!("\n{} {}", file.name, file.digest));
    }
    if files.is_empty() {
        return Ok(Upload {
            splits: Vec::new(),
            digest: format!("{:x}", digest.finalize()),
            spec,
        });
    }
    let fields = spec
        .as_object_mut()
        .ok_or_else(|| invalid("the request must be a JSON object"))?;
    let data = fields.entry("data").or_insert_with(|| json!({}));
    let data = data
        .as_object_mut()
        .ok_or_else(|| invalid("`data` must be a JSON object"))?;
    for file in &files {
        let path = json!({ "path": file.path });
        if data.insert(file.name.to_owned(), path).is_some() {
            let split = file.name;
            return Err(invalid(format!(
                "the {split} rows come twice: in the part `spec` and in the part `{split}`"
            )));
        }
    }
    Ok(Upload {
        splits: files.iter().map(|file| file.name).collect(),
        digest: format!("{:x}", digest.finalize()),
        spec,
    })
}

fn form_error(error: MultipartError) -> ApiError {
    if error.status() == StatusCode::PAYLOAD_TOO_LARGE {
        return Problem::TooLarge.with(
            "the files are larger than --max-upload allows; put them below the data root and name \
             their paths instead",
        );
    }
    cut_off(&error).unwrap_or_else(|| {
        Problem::InvalidBody.with(format!("the form cannot be read: {}", error.body_text()))
    })
}

pub(super) fn invalid(detail: impl Into<String>) -> ApiError {
    Problem::InvalidBody.with(detail)
}
