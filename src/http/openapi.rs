//! The OpenAPI document: made of what the routes say of themselves, and of what holds for all.

use std::sync::{Arc, OnceLock};

use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::{HeaderValue, header};
use axum::response::IntoResponse;
use tower_http::set_header::SetResponseHeaderLayer;
use utoipa::openapi::path::{Operation, PathItem};
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityRequirement, SecurityScheme};
use utoipa::{IntoParams, OpenApi};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use utoipa_swagger_ui::{Config, SwaggerUi};

use super::auth::{Access, Role};
use super::compat::Dialect;
use super::error::{PROBLEM_DETAILS, Problem, document, document_anew, problem_set};

/// Where the document is, and where people read it.
const DOCUMENT: &str = "/openapi.json";
pub(super) const PAGES: &str = "/docs";

/// Pages of the documentation run their own scripts and no others, and in no frame.
const PAGES_POLICY: &str = "default-src 'self'; style-src 'self' 'unsafe-inline'; \
    img-src 'self' data:; frame-ancestors 'none'";

#[derive(OpenApi)]
#[openapi(
    info(
        title = "kdlora",
        description = "Text classification with LoRA adapters of one small encoder, and the \
            distillation of these adapters from large teachers.\n\nErrors are RFC 9457 problem \
            details: `type` names the kind and stays the same across versions, `detail` says what \
            to do. The routes that other servers' clients use give the same members and those \
            clients' own."
    ),
    tags(
        (name = "classify", description = "Scores of texts."),
        (name = "tasks", description = "What can be asked."),
        (name = "hugging-face", description = "The form of Hugging Face's inference API: \
            `InferenceClient(base_url=\"http://HOST/tasks/TASK\").text_classification(..)`."),
        (name = "text-embeddings-inference", description = "The routes of \
            text-embeddings-inference for classifiers, for the default task and below \
            `/tasks/TASK` for each."),
        (name = "open-inference", description = "The Open Inference Protocol v2, as clients of \
            KServe and Triton speak it; a model is a task. Binary tensors are understood."),
        (name = "admin", description = "Distillation, versions, promotion."),
        (name = "page", description = "For people with a browser."),
        (name = "health", description = "For whoever restarts and watches processes."),
    ),
    components(schemas(super::error::ProblemDetails, super::compat::ForeignProblem))
)]
struct ApiDoc;

/// Parameters of a route about a task.
#[derive(IntoParams)]
#[into_params(parameter_in = Path)]
#[expect(dead_code, reason = "describes what the handler reads as a tuple")]
pub(super) struct TaskPath {
    /// Name of the task.
    #[param(example = "movie-sentiment")]
    task: String,
}

/// Parameters of a route about a version, which must be the live one.
#[derive(IntoParams)]
#[into_params(parameter_in = Path)]
#[expect(dead_code, reason = "describes what the handler reads as a tuple")]
pub(super) struct LiveVersionPath {
    /// Name of the task.
    #[param(example = "movie-sentiment")]
    task: String,
    /// The live version.
    #[param(example = 1)]
    version: u64,
}

/// The document, complete once all routes are known.
#[derive(Clone, Default)]
pub(super) struct Document(Arc<OnceLock<Bytes>>);

impl Document {
    /// A router that routes can be merged into.
    pub(super) fn router(&self) -> OpenApiRouter {
        OpenApiRouter::with_openapi(ApiDoc::openapi())
            .routes(routes!(show))
            .with_state(self.clone())
    }

    /// Completes the document, and adds the pages that show it.
    pub(super) fn finish(&self, router: OpenApiRouter, access: &Access) -> Router {
        let (router, mut document) = router.split_for_parts();
        let schemes = &mut document.components.get_or_insert_default().security_schemes;
        for (role, description) in [
            (
                Role::Reader,
                "A token of --api-token-file, or of --admin-token-file.",
            ),
            (Role::Admin, "A token of --admin-token-file."),
        ] {
            let scheme = HttpBuilder::new()
                .scheme(HttpAuthScheme::Bearer)
                .description(Some(description));
            schemes.insert(role.name().to_owned(), SecurityScheme::Http(scheme.build()));
        }
        for (path, item) in &mut document.paths.paths {
            for operation in operations(item) {
                complete(path, operation, access);
            }
        }
        // Plain data always serialises.
        let text = document.to_json().unwrap_or_default();
        let _ = self.0.set(text.into());
        router.merge(pages())
    }
}

/// Swagger UI, which is in the binary.
fn pages() -> Router {
    let config = Config::from(DOCUMENT);
    let pages: Router = SwaggerUi::new(PAGES).config(config).into();
    let policy = HeaderValue::from_static(PAGES_POLICY);
    pages.layer(SetResponseHeaderLayer::if_not_present(
        header::CONTENT_SECURITY_POLICY,
        policy,
    ))
}

problem_set!(ShowErrors: Internal);

/// This document.
#[utoipa::path(get, path = "/openapi.json", tag = "health", operation_id = "openapi",
    responses((status = 200, description = "The API in OpenAPI 3.1.", body = serde_json::Value), ShowErrors))]
async fn show(State(document): State<Document>) -> impl IntoResponse {
    let text = document.0.get().cloned().unwrap_or_default();
    ([(header::CONTENT_TYPE, "application/json")], text)
}

fn operations(item: &mut PathItem) -> impl Iterator<Item = &mut Operation> {
    [
        &mut item.get,
        &mut item.put,
        &mut item.post,
        &mut item.delete,
        &mut item.patch,
        &mut item.head,
        &mut item.options,
        &mut item.trace,
    ]
    .into_iter()
    .filter_map(Option::as_mut)
}

/// Adds who may use the operation, and the problems that come from before its handler.
fn complete(path: &str, operation: &mut Operation, access: &Access) {
    let responses = &mut operation.responses.responses;
    let mut add = |problem| document(responses, problem, &PROBLEM_DETAILS);
    add(Problem::Internal);
    if path != "/healthz" {
        add(Problem::Unavailable);
    }
    if path.contains('{') {
        add(Problem::InvalidParameter);
    }
    if operation.request_body.is_some() {
        add(Problem::RequestTimeout);
        add(Problem::TooLarge);
        add(Problem::UnsupportedMediaType);
    }
    // A route may say itself that it is open to everybody.
    if operation.security.is_none()
        && let Some(role) = access.role_for(path)
    {
        add(Problem::RateLimited);
        add(Problem::Unauthorized);
        if role == Role::Admin {
            add(Problem::Forbidden);
        }
        let token = SecurityRequirement::new(role.name(), Vec::<String>::new());
        operation.security = Some(match access.asks_for_token(role) {
            true => vec![token],
            false => vec![SecurityRequirement::default(), token],
        });
    }
    if let Some(dialect) = Dialect::of(path) {
        document_anew(responses, dialect.form());
    }
}
