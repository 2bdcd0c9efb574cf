//! APIs of other servers, so that their clients work unchanged.
//!
//! - [`hugging_face`]: `InferenceClient` of `huggingface_hub`.
//! - [`tei`][]: text-embeddings-inference.
//! - [`oip`]: the Open Inference Protocol v2 (KServe, Triton).

mod hugging_face;
mod oip;
mod tei;

use std::sync::Arc;

use axum::extract::Request;
use axum::http::StatusCode;
use axum::middleware::Next;
use axum::response::Response;
use serde::Serialize;
use serde::de::{Deserialize, Deserializer, Error, IgnoredAny};
use utoipa::openapi::RefOr;
use utoipa::openapi::schema::{ObjectBuilder, Schema, Type};
use utoipa::{PartialSchema, ToSchema};
use utoipa_axum::router::OpenApiRouter;

use super::AppState;
use super::error::{ApiError, Form, Problem, ProblemDetails};

/// Routes for readers.
pub(super) fn routes() -> OpenApiRouter<AppState> {
    OpenApiRouter::new()
        .merge(hugging_face::routes())
        .merge(tei::routes())
        .merge(oip::routes())
}

/// Routes for everybody: health in the words of other servers.
pub(super) fn open_routes() -> OpenApiRouter<AppState> {
    OpenApiRouter::new()
        .merge(tei::open_routes())
        .merge(oip::open_routes())
}

/// Whose clients a route is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Dialect {
    HuggingFace,
    TextEmbeddingsInference,
    OpenInference,
}

impl Dialect {
    /// By the path of a request, or of a route in the OpenAPI document.
    pub(super) fn of(path: &str) -> Option<Self> {
        let parts: Vec<&str> = path.trim_matches('/').splitn(4, '/').collect();
        match parts.as_slice() {
            [""] | ["tasks", _] => Some(Self::HuggingFace),
            ["predict" | "info" | "health"] | ["tasks", _, "predict" | "info" | "health"] => {
                Some(Self::TextEmbeddingsInference)
            }
            ["v2", ..] => Some(Self::OpenInference),
            _ => None,
        }
    }

    /// How these clients are told of problems.
    pub(super) fn form(self) -> &'static Form {
        const PLAIN: Form = Form {
            content_type: "application/json",
            schema: "ForeignProblem",
            status: Problem::status,
            body: |error| body(error, error.problem().status(), None),
        };
        const TEI: Form = Form {
            status: tei_status,
            body: |error| {
                let problem = error.problem();
                body(error, tei_status(problem), Some(TeiError::of(problem)))
            },
            ..PLAIN
        };
        match self {
            Self::HuggingFace | Self::OpenInference => &PLAIN,
            Self::TextEmbeddingsInference => &TEI,
        }
    }
}

/// A problem for clients of other servers: the members of RFC 9457, and those that these clients
/// read.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(super) struct ForeignProblem {
    #[serde(flatten)]
    problem: ProblemDetails,
    /// The same as `detail`.
    #[schema(example = "there is no task \"sentimnt\"; the tasks are: movie-sentiment")]
    error: String,
    /// As text-embeddings-inference has it; on its routes only.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(inline)]
    error_type: Option<TeiError>,
}

/// A field of another server's API that this server does not have and that would change the answer:
/// it must be absent or null.
#[derive(Clone, Copy, Debug, Default)]
struct Unsupported;

impl<'de> Deserialize<'de> for Unsupported {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match Option::<IgnoredAny>::deserialize(deserializer)? {
            None => Ok(Self),
            Some(_) => Err(D::Error::custom(
                "this server does not support it; leave it out",
            )),
        }
    }
}

impl PartialSchema for Unsupported {
    fn schema() -> RefOr<Schema> {
        let null = ObjectBuilder::new().schema_type(Type::Null);
        RefOr::T(Schema::Object(null.build()))
    }
}

impl ToSchema for Unsupported {}

/// Kinds of errors of text-embeddings-inference.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
enum TeiError {
    Unhealthy,
    Backend,
    Overloaded,
    Validation,
    Empty,
}

impl TeiError {
    fn of(problem: Problem) -> Self {
        match problem {
            Problem::Unavailable => Self::Unhealthy,
            Problem::QueueFull | Problem::RateLimited => Self::Overloaded,
            Problem::EmptyInput => Self::Empty,
            Problem::Internal | Problem::DeadlineExceeded => Self::Backend,
            _ => Self::Validation,
        }
    }
}

/// The status where text-embeddings-inference has another one than this server.
fn tei_status(problem: Problem) -> StatusCode {
    match problem {
        Problem::EmptyInput => StatusCode::BAD_REQUEST,
        Problem::SequenceTooLong => StatusCode::PAYLOAD_TOO_LARGE,
        Problem::Internal => StatusCode::FAILED_DEPENDENCY,
        _ => problem.status(),
    }
}

fn body(error: &ApiError, status: StatusCode, error_type: Option<TeiError>) -> serde_json::Value {
    let problem = ProblemDetails {
        status: status.as_u16(),
        ..error.details()
    };
    let problem = ForeignProblem {
        error: problem.detail.clone(),
        problem,
        error_type,
    };
    // Texts and a number always serialise.
    serde_json::to_value(problem).unwrap_or_default()
}

/// Middleware that tells problems in the form that the route's clients read.
pub(super) async fn reword(request: Request, next: Next) -> Response {
    let dialect = Dialect::of(request.uri().path());
    let response = next.run(request).await;
    let error = response.extensions().get::<ApiError>();
    match (dialect, error) {
        (Some(dialect), Some(error)) => error.clone().respond_again(dialect.form(), &response),
        _ => response,
    }
}

impl AppState {
    /// The name of the task that answers where the path names none.
    fn default_task(&self) -> Result<Arc<str>, ApiError> {
        if let Some(name) = &self.default_task {
            return match self.tasks.get(name) {
                Some(_) => Ok(Arc::clone(name)),
                None => Err(self.unknown_task(&format!(
                    "this route asks the default task, and --default-task names {name:?}, which is \
                     no task"
                ))),
            };
        }
        let all = self.tasks.all();
        let mut names = all.keys();
        match (names.next(), names.next()) {
            (Some(only), None) => Ok(Arc::clone(only)),
            _ => Err(Problem::UnknownTask.with(
                "this route asks the default task, and there is none: start the server with \
                 --default-task, or use the route below /tasks/TASK",
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_tells_whose_clients_come() {
        use Dialect::{HuggingFace, OpenInference, TextEmbeddingsInference};
        for (path, dialect) in [
            ("/", Some(HuggingFace)),
            ("/tasks/mood", Some(HuggingFace)),
            ("/predict", Some(TextEmbeddingsInference)),
            ("/tasks/{task}/info", Some(TextEmbeddingsInference)),
            ("/v2", Some(OpenInference)),
            ("/v2/models/mood/versions/3/infer", Some(OpenInference)),
            ("/v1/tasks", None),
            ("/v1/tasks/mood", None),
            ("/admin/tasks/mood/versions", None),
            ("/healthz", None),
        ] {
            assert_eq!(Dialect::of(path), dialect, "{path}");
        }
    }

    #[test]
    fn foreign_problems_have_the_members_of_both() {
        let error = Problem::EmptyInput.with("nothing there");
        let body = (Dialect::TextEmbeddingsInference.form().body)(&error);
        assert_eq!(
            body,
            serde_json::json!({"type": "urn:kdlora:problem:empty-input", "title": "Empty input",
                "status": 400, "detail": "nothing there", "error": "nothing there",
                "error_type": "empty"})
        );
        let body = (Dialect::OpenInference.form().body)(&error);
        assert_eq!(body["status"], 422);
        assert!(body.get("error_type").is_none());
    }
}
