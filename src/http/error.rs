//! Every way a request can fail: one declaration each, sent as RFC 9457 `application/problem+json`.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::private_folders::PrivateFolders;
use crate::telemetry::chain;
use utoipa::openapi::example::ExampleBuilder;
use utoipa::openapi::header::HeaderBuilder;
use utoipa::openapi::response::Response as OpenApiResponse;
use utoipa::openapi::schema::{ObjectBuilder, Type};
use utoipa::openapi::{Content, Ref, RefOr, ResponseBuilder};

macro_rules! problems {
    ($( $(#[doc = $doc:literal])+ $name:ident = $status:ident, $slug:literal, $title:literal; )+) => {
        /// The kinds of problem a client can meet.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Problem {
            $( $(#[doc = $doc])+ $name, )+
        }

        impl Problem {
            pub const ALL: &[Self] = &[$( Self::$name, )+];

            pub fn status(self) -> StatusCode {
                match self { $( Self::$name => StatusCode::$status, )+ }
            }

            /// Last part of the problem's `type`.
            pub fn slug(self) -> &'static str {
                match self { $( Self::$name => $slug, )+ }
            }

            pub fn title(self) -> &'static str {
                match self { $( Self::$name => $title, )+ }
            }

            /// What the OpenAPI document says of it.
            pub fn description(self) -> &'static str {
                match self { $( Self::$name => concat!($( $doc, )+).trim_ascii(), )+ }
            }
        }
    };
}

problems! {
    /// The body is not well-formed JSON in UTF-8.
    NotJson = BAD_REQUEST, "not-json", "Body is not JSON";
    /// A path or query parameter can't be read.
    InvalidParameter = BAD_REQUEST, "invalid-parameter", "Invalid parameter";
    /// The token is missing or not a right one.
    Unauthorized = UNAUTHORIZED, "unauthorized", "Token required";
    /// The token may not do this, or admin routes are closed: no token is configured and the
    /// request isn't a local one.
    Forbidden = FORBIDDEN, "forbidden", "Forbidden";
    /// No route has this path.
    UnknownRoute = NOT_FOUND, "unknown-route", "Unknown route";
    /// No task has this name.
    UnknownTask = NOT_FOUND, "unknown-task", "Unknown task";
    /// The task has no such version.
    UnknownVersion = NOT_FOUND, "unknown-version", "Unknown version";
    /// No job has this id.
    UnknownJob = NOT_FOUND, "unknown-job", "Unknown job";
    /// The route exists but does not take this method.
    MethodNotAllowed = METHOD_NOT_ALLOWED, "method-not-allowed", "Method not allowed";
    /// The body came too slowly.
    RequestTimeout = REQUEST_TIMEOUT, "request-timeout", "Request timeout";
    /// The request can't be carried out in the present state of the task or job.
    Conflict = CONFLICT, "conflict", "Conflicting state";
    /// The asked-for version is not the live one.
    VersionNotLive = CONFLICT, "version-not-live", "Version is not live";
    /// The live version was trained on another encoder than the one that serves.
    StudentMismatch = CONFLICT, "student-mismatch", "Version of another student";
    /// The body, the number of inputs or a text is over the limit.
    TooLarge = PAYLOAD_TOO_LARGE, "too-large", "Request too large";
    /// The body's content type is not the expected one.
    UnsupportedMediaType = UNSUPPORTED_MEDIA_TYPE, "unsupported-media-type", "Unsupported media type";
    /// The body is JSON, but not of the form that this route takes.
    InvalidBody = UNPROCESSABLE_ENTITY, "invalid-body", "Invalid body";
    /// There is no input, or a text has nothing but whitespace.
    EmptyInput = UNPROCESSABLE_ENTITY, "empty-input", "Empty input";
    /// A text has more tokens than the task takes, and `truncate` is false.
    SequenceTooLong = UNPROCESSABLE_ENTITY, "sequence-too-long", "Sequence too long";
    /// What the request refers to (data, teacher, adapter) can't be used.
    Unusable = UNPROCESSABLE_ENTITY, "unusable", "Unusable input";
    /// The queue is full; try again after the time in `Retry-After`.
    QueueFull = TOO_MANY_REQUESTS, "queue-full", "Queue full";
    /// The token, or the address without one, has sent more requests than it may; try again after
    /// the time in `Retry-After`.
    RateLimited = TOO_MANY_REQUESTS, "rate-limited", "Too many requests";
    /// The server has met a fault of its own; its log says more.
    Internal = INTERNAL_SERVER_ERROR, "internal", "Internal error";
    /// The server is starting or stopping.
    Unavailable = SERVICE_UNAVAILABLE, "unavailable", "Unavailable";
    /// The answer was not ready within the request's deadline.
    DeadlineExceeded = GATEWAY_TIMEOUT, "deadline-exceeded", "Deadline exceeded";
}

impl Problem {
    /// An error of this kind with a sentence that helps the client.
    pub fn with(self, detail: impl Into<String>) -> ApiError {
        ApiError {
            problem: self,
            detail: detail.into(),
            retry_after: None,
        }
    }
}

/// A failed request. Handlers return it as their `Err`.
#[derive(Clone, Debug)]
pub struct ApiError {
    problem: Problem,
    detail: String,
    retry_after: Option<Duration>,
}

impl ApiError {
    /// A fault of the server: the cause goes to the log, not to the client.
    pub fn internal(error: impl std::error::Error) -> Self {
        tracing::error!(error = %chain(&error), "request failed");
        Problem::Internal.with("the server could not carry out the request; its log has the reason")
    }

    /// Tells the client when to try again.
    pub fn retry_after(mut self, wait: Duration) -> Self {
        self.retry_after = Some(wait);
        self
    }

    pub fn problem(&self) -> Problem {
        self.problem
    }

    /// What the client reads.
    pub fn details(&self) -> ProblemDetails {
        ProblemDetails {
            kind: format!("urn:kdlora:problem:{}", self.problem.slug()),
            title: self.problem.title().to_owned(),
            status: self.problem.status().as_u16(),
            detail: self.detail.clone(),
        }
    }

    /// The sentence for the client.
    pub fn detail(&self) -> &str {
        &self.detail
    }
}

impl fmt::Display for ApiError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.problem.title(), self.detail)
    }
}

impl std::error::Error for ApiError {}

/// The body of every failed request (RFC 9457, section 3).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ProblemDetails {
    /// Names the kind of problem, and stays the same across versions of the server.
    #[serde(rename = "type")]
    #[schema(example = "urn:kdlora:problem:unknown-task")]
    pub kind: String,
    #[schema(example = "Unknown task")]
    pub title: String,
    #[schema(example = 404)]
    pub status: u16,
    /// What went wrong this time, and what to do.
    #[schema(example = "there is no task \"sentimnt\"; the tasks are: movie-sentiment")]
    pub detail: String,
}

/// How problems are told: RFC 9457's form, or one that clients of another server read.
pub(super) struct Form {
    pub(super) content_type: &'static str,
    /// Name of the body's schema in the OpenAPI document.
    pub(super) schema: &'static str,
    pub(super) status: fn(Problem) -> StatusCode,
    pub(super) body: fn(&ApiError) -> serde_json::Value,
}

/// RFC 9457, `application/problem+json`.
pub(super) const PROBLEM_DETAILS: Form = Form {
    content_type: "application/problem+json",
    schema: "ProblemDetails",
    status: Problem::status,
    // A struct of texts and a number always serialises.
    body: |error| serde_json::to_value(error.details()).unwrap_or_default(),
};

impl ApiError {
    /// The same error without the place of some folders in its sentence; `None` if they are not
    /// in it.
    pub(super) fn without(&self, folders: &PrivateFolders) -> Option<Self> {
        let detail = folders.hide(&self.detail);
        (detail != self.detail).then(|| Self {
            detail,
            ..self.clone()
        })
    }

    /// The answer in a form, in the place of an answer that told the error otherwise.
    pub(super) fn respond_again(self, form: &Form, before: &Response) -> Response {
        let mut response = self.respond(form);
        for (name, value) in before.headers() {
            // The body has another length.
            if name != header::CONTENT_LENGTH {
                response.headers_mut().entry(name).or_insert(value.clone());
            }
        }
        response
    }

    /// The answer in a form. It keeps the error as an extension, for layers that tell it in
    /// another form, or write it down.
    pub(super) fn respond(self, form: &Form) -> Response {
        let body = axum::Json((form.body)(&self));
        let mut response = ((form.status)(self.problem), body).into_response();
        let headers = response.headers_mut();
        let content_type = HeaderValue::from_static(form.content_type);
        headers.insert(header::CONTENT_TYPE, content_type);
        if self.problem == Problem::Unauthorized {
            headers.insert(
                header::WWW_AUTHENTICATE,
                HeaderValue::from_static("Bearer realm=\"kdlora\""),
            );
        }
        if let Some(wait) = self.retry_after {
            // Whole seconds, rounded up: a client that waits them out is not too early.
            let seconds = (wait.as_millis().div_ceil(1000) as u64).max(1);
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        response.extensions_mut().insert(self);
        response
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        self.respond(&PROBLEM_DETAILS)
    }
}

/// Responses of a route by their status.
pub(super) type Responses = BTreeMap<String, RefOr<OpenApiResponse>>;

/// The OpenAPI responses for a set of problems, one for each status.
pub fn documented(problems: &[Problem]) -> Responses {
    let mut responses = BTreeMap::new();
    for problem in problems {
        document(&mut responses, *problem, &PROBLEM_DETAILS);
    }
    responses
}

/// Adds a problem to the responses of a route, unless it is there.
pub(super) fn document(responses: &mut Responses, problem: Problem, form: &Form) {
    let status = (form.status)(problem);
    let response = responses
        .entry(status.as_str().to_owned())
        .or_insert_with(|| {
            let content = Content::new(Some(Ref::from_schema_name(form.schema)));
            let response = ResponseBuilder::new().content(form.content_type, content);
            RefOr::T(response.build())
        });
    let RefOr::T(response) = response else { return };
    let Some(content) = response.content.get_mut(form.content_type) else {
        return;
    };
    if content.examples.contains_key(problem.slug()) {
        return;
    }
    let example = ExampleBuilder::new()
        .summary(problem.title())
        .value(Some((form.body)(&problem.with(problem.description()))));
    content
        .examples
        .insert(problem.slug().to_owned(), RefOr::T(example.build()));
    if !response.description.is_empty() {
        response.description.push(' ');
    }
    response.description.push_str(problem.description());
    if status == StatusCode::TOO_MANY_REQUESTS {
        let seconds = ObjectBuilder::new()
            .schema_type(Type::Integer)
            .minimum(Some(1));
        let header = HeaderBuilder::new()
            .schema(seconds)
            .description(Some("Seconds to wait before another try."));
        response
            .headers
            .insert("Retry-After".to_owned(), header.build());
    }
}

/// Takes the problems of [`PROBLEM_DETAILS`] out of the responses of a route, and adds them in
/// another form.
pub(super) fn document_anew(responses: &mut Responses, form: &Form) {
    let mut slugs = Vec::new();
    responses.retain(|_, response| match response {
        RefOr::T(response) => match response.content.get(PROBLEM_DETAILS.content_type) {
            Some(content) => {
                slugs.extend(content.examples.keys().cloned());
                false
            }
            None => true,
        },
        RefOr::Ref(_) => true,
    });
    for problem in Problem::ALL {
        if slugs.iter().any(|slug| slug == problem.slug()) {
            document(responses, *problem, form);
        }
    }
}

/// Declares the set of problems a route can answer with, for `responses(..)` of `utoipa::path`:
/// `problem_set!(CancelErrors: UnknownJob, Conflict);`
macro_rules! problem_set {
    ($name:ident: $($problem:ident),+ $(,)?) => {
        pub(crate) struct $name;

        impl utoipa::IntoResponses for $name {
            fn responses() -> std::collections::BTreeMap<
                String,
                utoipa::openapi::RefOr<utoipa::openapi::response::Response>,
            > {
                $crate::http::error::documented(&[$( $crate::http::error::Problem::$problem, )+])
            }
        }
    };
}
pub(crate) use problem_set;

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn every_problem_has_its_own_type_and_an_error_status() {
        let slugs: HashSet<_> = Problem::ALL.iter().map(|p| p.slug()).collect();
        assert_eq!(slugs.len(), Problem::ALL.len());
        for problem in Problem::ALL {
            assert!(problem.status().as_u16() >= 400, "{problem:?}");
            assert!(problem.description().ends_with('.'), "{problem:?}");
        }
    }

    #[test]
    fn retry_after_is_rounded_up_to_whole_seconds() {
        for (millis, expected) in [(0, "1"), (999, "1"), (1000, "1"), (1001, "2")] {
            let response = Problem::QueueFull
                .with("full")
                .retry_after(Duration::from_millis(millis))
                .into_response();
            assert_eq!(response.headers()[header::RETRY_AFTER], expected);
        }
    }
}
