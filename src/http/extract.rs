//! Extractors whose rejections are [`ApiError`]s.

use axum::body::Bytes;
use axum::extract::rejection::{JsonRejection, PathRejection, QueryRejection};
use axum::extract::{FromRequest, FromRequestParts, Request};
use axum::http::request::Parts;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use http_body_util::LengthLimitError;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::time::{Instant, timeout_at};
use tower_http::timeout::TimeoutError;

use super::error::{ApiError, Problem};

/// A JSON body, read with `Content-Type: application/json` only: a page of another origin can't
/// send that type without asking first (CORS), which keeps it away from a local server.
#[derive(Clone, Copy, Debug)]
pub struct Json<T>(pub T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Json<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        let axum::Json(value) = axum::Json::from_request(request, state)
            .await
            .map_err(json_error)?;
        Ok(Self(value))
    }
}

/// A body that has been read, as JSON.
pub(super) fn json<T: DeserializeOwned>(headers: &HeaderMap, body: &[u8]) -> Result<T, ApiError> {
    let kind = headers.get(header::CONTENT_TYPE);
    let kind = kind.and_then(|kind| kind.to_str().ok()).unwrap_or_default();
    let essence = kind.split(';').next().unwrap_or_default().trim();
    if !essence.eq_ignore_ascii_case("application/json") {
        return Err(not_json_content());
    }
    json_slice(body)
}

/// JSON of whatever content type.
pub(super) fn json_slice<T: DeserializeOwned>(body: &[u8]) -> Result<T, ApiError> {
    let axum::Json(value) = axum::Json::from_bytes(body).map_err(json_error)?;
    Ok(value)
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

fn json_error(rejection: JsonRejection) -> ApiError {
    match rejection {
        JsonRejection::JsonSyntaxError(error) => Problem::NotJson.with(cause(&error)),
        JsonRejection::JsonDataError(error) => Problem::InvalidBody.with(cause(&error)),
        JsonRejection::MissingJsonContentType(_) => not_json_content(),
        other => body_error(other.status(), &other),
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
        if error.is::<TimeoutError>() {
            return Some(slow_body());
        }
        cause = error.source();
    }
    None
}

fn not_json_content() -> ApiError {
    Problem::UnsupportedMediaType
        .with("send the body as JSON, with the header `Content-Type: application/json`")
}

fn too_large() -> ApiError {
    Problem::TooLarge.with("the body is larger than the server takes; send fewer or shorter texts")
}

fn slow_body() -> ApiError {
    Problem::RequestTimeout.with("the body did not come in time")
}

/// What serde says, without axum's preamble.
fn cause(error: &dyn std::error::Error) -> String {
    error
        .source()
        .map_or_else(|| error.to_string(), ToString::to_string)
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
            .map_err(|error: PathRejection| Problem::InvalidParameter.with(error.body_text()))
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
