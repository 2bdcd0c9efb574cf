//! Extractors whose rejections are [`ApiError`]s.

use axum::body::Bytes;
use axum::extract::path::ErrorKind;
use axum::extract::rejection::{PathRejection, QueryRejection};
use axum::extract::{FromRequest, FromRequestParts, Request};
use axum::http::request::Parts;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use http_body_util::LengthLimitError;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::time::{Instant, timeout_at};

use super::error::{ApiError, Problem};
use super::pace::SlowBody;
use super::stop::Stopped;
use crate::parse::{self, ParseError};

/// A JSON body, read with `Content-Type: application/json` only: a page of another origin can't
/// send that type without asking first (CORS), which keeps it away from a local server.
#[derive(Clone, Copy, Debug)]
pub struct Json<T>(pub T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Json<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, _: &S) -> Result<Self, ApiError> {
        check_json_content(request.headers())?;
        let body = Bytes::from_request(request, &()).await;
        let body = body.map_err(|error| body_error(error.status(), &error))?;
        json_slice(&body).map(Self)
    }
}

/// A body that has been read, as JSON.
pub(super) fn json<T: DeserializeOwned>(headers: &HeaderMap, body: &[u8]) -> Result<T, ApiError> {
    check_json_content(headers)?;
    json_slice(body)
}

/// `application/json`, or a type built on it, such as `application/merge-patch+json`.
fn check_json_content(headers: &HeaderMap) -> Result<(), ApiError> {
    let kind = headers.get(header::CONTENT_TYPE);
    let kind = kind.and_then(|kind| kind.to_str().ok()).unwrap_or_default();
    let essence = kind.split(';').next().unwrap_or_default().trim();
    match essence.to_ascii_lowercase().strip_prefix("application/") {
        Some(kind) if kind == "json" || kind.ends_with("+json") => Ok(()),
        _ => Err(Problem::UnsupportedMediaType
            .with("send the body as JSON, with the header `Content-Type: application/json`")),
    }
}

/// JSON of whatever content type.
pub(super) fn json_slice<T: DeserializeOwned>(body: &[u8]) -> Result<T, ApiError> {
    Ok(parse::json(body)?)
}

impl From<ParseError> for ApiError {
    fn from(error: ParseError) -> Self {
        match error {
            ParseError::Syntax(problem) => Problem::NotJson.with(problem),
            ParseError::Field(problem) => Problem::InvalidBody.with(problem),
        }
    }
}

/// Reads a body to its end, which must come before `deadline`.
pub(super) async fn body(request: Request, deadline: Instant) -> Result<Bytes, ApiError> {
    timeout_at(deadline, Bytes::from_request(request, &()))
        .await
        .map_err(|_| slow_body())?
        .map_err(|error| body_error(error.status(), &error))
}

impl<T: Serialize> IntoResponse for Json<T> {
    fn into_response(self) -> Response {
        axum::Json(self.0).into_response()
    }
}

/// Why a body did not come whole.
fn body_error(status: StatusCode, error: &(dyn std::error::Error + 'static)) -> ApiError {
    if status == Problem::TooLarge.status() {
        return too_large();
    }
    cut_off(error).unwrap_or_else(|| {
        Problem::InvalidParameter.with(format!("the body can't be read: {error}"))
    })
}

/// The limit that ended a body, if it was one.
pub(super) fn cut_off(error: &(dyn std::error::Error + 'static)) -> Option<ApiError> {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if error.is::<LengthLimitError>() {
            return Some(too_large());
        }
        if error.is::<SlowBody>() {
            return Some(slow_body());
        }
        if error.is::<Stopped>() {
            return Some(Problem::Unavailable.with(Stopped.to_string()));
        }
        cause = error.source();
    }
    None
}

fn too_large() -> ApiError {
    Problem::TooLarge.with("the body is larger than the server takes; send fewer or shorter texts")
}

fn slow_body() -> ApiError {
    Problem::RequestTimeout.with("the body did not come in time")
}

/// Path parameters.
#[derive(Clone, Copy, Debug)]
pub struct Path<T>(pub T);

impl<T: DeserializeOwned + Send, S: Send + Sync> FromRequestParts<S> for Path<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        axum::extract::Path::from_request_parts(parts, state)
            .await
            .map(|axum::extract::Path(value)| Self(value))
            .map_err(|error| Problem::InvalidParameter.with(path_problem(error)))
    }
}

fn path_problem(rejection: PathRejection) -> String {
    let PathRejection::FailedToDeserializePathParams(error) = rejection else {
        return rejection.body_text();
    };
    match error.into_kind() {
        // Numbers are the only parameters that are not plain text.
        ErrorKind::ParseErrorAtIndex { value, .. } | ErrorKind::ParseErrorAtKey { value, .. } => {
            format!("expected a whole number in the path, got {value:?}")
        }
        kind => kind.to_string(),
    }
}

/// The query string.
#[derive(Clone, Copy, Debug)]
pub struct Query<T>(pub T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequestParts<S> for Query<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        axum::extract::Query::from_request_parts(parts, state)
            .await
            .map(|axum::extract::Query(value)| Self(value))
            .map_err(|error: QueryRejection| Problem::InvalidParameter.with(error.body_text()))
    }
}
