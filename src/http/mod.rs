//! The HTTP API: routes by group, errors, limits, access, and the OpenAPI document.
//!
//! - [`admin`]: jobs, versions, promotion.
//! - [`error`]: every way a request can fail.
//! - [`extract`]: JSON bodies, paths and queries that fail as [`error::ApiError`].
//! - [`auth`]: who may use the admin routes.
//! - [`classify`], [`tasks`], [`versions`]: the `/v1` routes.
//! - [`trace`]: the span of a request, for logs and traces.
//! - [`health`]: liveness, readiness, metrics.
//! - [`page`]: the page at `/`.

pub mod admin;
pub mod auth;
pub mod classify;
pub mod error;
pub mod extract;
pub mod health;
mod inputs;
mod page;
mod prediction;
pub mod tasks;
#[cfg(test)]
mod tests;
mod trace;
pub mod versions;

use std::any::Any;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use axum::Router;
use axum::extract::{DefaultBodyLimit, Request};
use axum::http::Uri;
use axum::middleware;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use tower::ServiceExt;
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::request_id::{MakeRequestUuid, PropagateRequestIdLayer, SetRequestIdLayer};
use utoipa::OpenApi;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::serving::{Serving, TaskTable};
use crate::telemetry::Metrics;
use auth::AdminAccess;
use error::{ApiError, Problem};
use health::{Health, Readiness};

/// What the public routes share. Admin routes bring a state of their own, see [`router`].
#[derive(Clone)]
pub struct AppState {
    pub tasks: Arc<TaskTable>,
    pub serving: Arc<Serving>,
    pub metrics: Arc<Metrics>,
    pub readiness: Readiness,
    pub limits: Limits,
    /// Longest time for one classification.
    pub request_timeout: Duration,
}

/// How large a request may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of a body of the `/v1` routes.
    pub body_bytes: usize,
    /// Inputs in one request.
    pub inputs: usize,
    /// Characters of one text.
    pub text_chars: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            body_bytes: 2 * 1024 * 1024,
            inputs: 256,
            text_chars: 100_000,
        }
    }
}

#[derive(OpenApi)]
#[openapi(info(title = "kdlora"), components(schemas(error::ProblemDetails)))]
struct ApiDoc;

/// The whole API.
///
/// `admin` holds the routes of `/admin`, full paths, with their state applied
/// (`OpenApiRouter::with_state`); they get the access check of `access` and keep body limits of
/// their own (`DefaultBodyLimit` on the route). `more` are public routes with a state of their own.
pub fn router(
    state: AppState,
    access: AdminAccess,
    admin: OpenApiRouter,
    more: OpenApiRouter,
) -> Router {
    let health = health::routes(Health {
        readiness: state.readiness.clone(),
        metrics: Arc::clone(&state.metrics),
    });
    let public = OpenApiRouter::new()
        .routes(routes!(classify::classify))
        .routes(routes!(tasks::tasks))
        .routes(routes!(tasks::task))
        .layer(DefaultBodyLimit::max(state.limits.body_bytes))
        .with_state(state);
    let admin = admin.layer(middleware::from_fn_with_state(access, auth::guard));

    let (router, openapi) = OpenApiRouter::with_openapi(ApiDoc::openapi())
        .merge(public)
        .merge(more)
        .merge(admin)
        .merge(health)
        .split_for_parts();
    let openapi = axum::Json(openapi);
    let router = router
        .route("/openapi.json", get(move || async move { openapi.clone() }))
        .merge(page::routes())
        .fallback(unknown_route)
        .method_not_allowed_fallback(method_not_allowed);
    layered(router)
}

/// What answers while the student is being loaded: liveness, readiness and metrics.
pub fn starting(readiness: Readiness, metrics: Arc<Metrics>) -> Router {
    let (router, _) = health::routes(Health { readiness, metrics }).split_for_parts();
    layered(router.merge(page::routes()).fallback(not_started))
}

/// A router that passes each request to the router that is current when it comes.
pub fn switchable(current: Arc<ArcSwap<Router>>) -> Router {
    Router::new().fallback(move |request: Request| {
        let router = Router::clone(&current.load());
        router.oneshot(request)
    })
}

fn layered(router: Router) -> Router {
    router
        .layer(CatchPanicLayer::custom(panicked))
        .layer(trace::layer())
        .layer(PropagateRequestIdLayer::x_request_id())
        .layer(SetRequestIdLayer::x_request_id(MakeRequestUuid))
}

async fn not_started() -> ApiError {
    Problem::Unavailable
        .with("the server is starting; /readyz tells when it takes requests")
        .retry_after(Duration::from_secs(1))
}

async fn unknown_route(uri: Uri) -> ApiError {
    Problem::UnknownRoute.with(format!(
        "there is nothing at {}; /openapi.json lists the routes",
        uri.path()
    ))
}

async fn method_not_allowed(uri: Uri) -> ApiError {
    Problem::MethodNotAllowed.with(format!(
        "{} does not take this method; /openapi.json lists the methods",
        uri.path()
    ))
}

fn panicked(payload: Box<dyn Any + Send + 'static>) -> Response {
    let message = payload
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| payload.downcast_ref::<&str>().copied())
        .unwrap_or("no message");
    tracing::error!(panic = message, "a handler panicked");
    Problem::Internal
        .with("the server met a fault of its own; its log has the reason")
        .into_response()
}
