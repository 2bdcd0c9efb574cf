//! The HTTP API: routes by group, errors, limits, access, and the OpenAPI document.
//!
//! - [`admin`]: jobs, versions, promotion.
//! - [`error`]: every way a request can fail.
//! - [`extract`]: JSON bodies, paths and queries that fail as [`error::ApiError`].
//! - [`auth`]: who may do what, and how often.
//! - [`classify`], [`tasks`], [`versions`]: the `/v1` routes.
//! - [`count`]: the metric over all routes.
//! - [`compat`]: the routes that clients of other servers use.
//! - [`health`]: liveness, readiness, metrics.
//! - [`normal`]: trailing slashes and compressed bodies.
//! - [`openapi`]: the document, and the pages that show it.
//! - [`pace`]: bodies that come too slowly.
//! - [`page`]: the page at `/`.
//! - [`server`][]: connections.
//! - [`stop`]: bodies that stall while the server stops.
//! - [`trace`]: the span of a request, for logs and traces.

pub mod admin;
pub mod auth;
pub mod classify;
mod compat;
mod count;
pub mod error;
pub mod extract;
pub mod health;
mod inputs;
mod normal;
mod openapi;
mod pace;
mod page;
mod prediction;
pub mod server;
mod stop;
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
use axum::extract::{DefaultBodyLimit, Request, State};
use axum::http::{HeaderName, HeaderValue, Method, Uri, header};
use axum::middleware::{self, Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::cors::{AllowOrigin, CorsLayer};
use tower_http::request_id::{MakeRequestUuid, PropagateRequestIdLayer, SetRequestIdLayer};
use tower_http::set_header::SetResponseHeaderLayer;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::private_folders::PrivateFolders;
use crate::serving::{Options, Serving, TaskTable};
use crate::telemetry::Metrics;
use auth::{Access, Gate, Role, guard};
use error::{ApiError, PROBLEM_DETAILS, Problem};
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
    /// The task of routes whose path names none.
    pub default_task: Option<Arc<str>>,
    /// How the engine is set up.
    pub engine: Options,
    /// In which numbers the student multiplies: `f32`, `bf16`, `f16` or `int8`.
    pub dtype: &'static str,
}

/// What stands between the network and the routes.
#[derive(Clone, Debug)]
pub struct Edge {
    pub access: Access,
    /// Origins whose pages may use the API (`*` for all).
    pub cors_origins: Vec<HeaderValue>,
    /// A body of which nothing comes for so long, or that is slower on the whole than
    /// [`pace::LEAST_RATE`], is given up.
    pub read_timeout: Duration,
    /// Folders that errors do not tell the place of.
    pub private: PrivateFolders,
    /// Cancelled when the server stops.
    pub stop: CancellationToken,
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

/// The whole API.
///
/// `admin` holds the routes of `/admin`, full paths, with their state applied
/// (`OpenApiRouter::with_state`); they are for admins only and keep body limits of their own
/// (`DefaultBodyLimit` on the route). `more` are routes for readers with a state of their own.
pub fn router(state: AppState, edge: &Edge, admin: OpenApiRouter, more: OpenApiRouter) -> Router {
    let health = Health {
        readiness: state.readiness.clone(),
        metrics: Arc::clone(&state.metrics),
    };
    let metrics = Arc::clone(&state.metrics);
    let readers = edge.gate(Role::Reader);
    let public = OpenApiRouter::new()
        .routes(routes!(classify::classify))
        .routes(routes!(tasks::tasks))
        .routes(routes!(tasks::task))
        .merge(compat::routes())
        .layer(from_fn_with_state(readers.clone(), guard))
        .merge(compat::open_routes())
        .layer(DefaultBodyLimit::max(state.limits.body_bytes))
        .with_state(state);
    let admin = admin.layer(from_fn_with_state(edge.gate(Role::Admin), guard));

    let document = openapi::Document::default();
    let router = document
        .router()
        .merge(public)
        .merge(more.layer(from_fn_with_state(readers.clone(), guard)))
        .merge(admin)
        .merge(health::routes(health, readers))
        .merge(page::routes());
    let router = document
        .finish(router, &edge.access)
        .fallback(unknown_route)
        .method_not_allowed_fallback(method_not_allowed);
    layered(router, edge, metrics)
}

/// What answers while the student is being loaded: liveness, readiness and metrics.
pub fn starting(readiness: Readiness, metrics: Arc<Metrics>, edge: &Edge) -> Router {
    let health = Health {
        readiness,
        metrics: Arc::clone(&metrics),
    };
    let routes = health::routes(health, edge.gate(Role::Reader)).merge(page::routes());
    let (router, _) = routes.split_for_parts();
    layered(router.fallback(not_started), edge, metrics)
}

/// What answers on a listener of its own for health and metrics.
pub fn health_only(readiness: Readiness, metrics: Arc<Metrics>, edge: &Edge) -> Router {
    let health = Health {
        readiness,
        metrics: Arc::clone(&metrics),
    };
    let (router, _) = health::routes(health, edge.gate(Role::Reader)).split_for_parts();
    layered(router.fallback(unknown_route), edge, metrics)
}

impl Edge {
    fn gate(&self, role: Role) -> Gate {
        Gate {
            access: self.access.clone(),
            role,
        }
    }

    /// `None` where no page of another origin may use the API.
    fn cors(&self) -> Option<CorsLayer> {
        let origins = match self.cors_origins.as_slice() {
            [] => return None,
            origins if origins.iter().any(|origin| origin == "*") => AllowOrigin::any(),
            origins => AllowOrigin::list(origins.iter().cloned()),
        };
        let cors = CorsLayer::new()
            .allow_origin(origins)
            .allow_methods([Method::GET, Method::POST, Method::DELETE])
            .allow_headers([
                header::AUTHORIZATION,
                header::CONTENT_TYPE,
                HeaderName::from_static("idempotency-key"),
            ])
            .expose_headers([
                header::RETRY_AFTER,
                HeaderName::from_static("server-timing"),
                HeaderName::from_static("x-request-id"),
            ]);
        Some(cors)
    }
}

/// A router that passes each request to the router that is current when it comes.
pub fn switchable(current: Arc<ArcSwap<Router>>) -> Router {
    Router::new().fallback(move |request: Request| {
        let router = Router::clone(&current.load());
        router.oneshot(request)
    })
}

fn layered(router: Router, edge: &Edge, metrics: Arc<Metrics>) -> Router {
    let nosniff = HeaderValue::from_static("nosniff");
    let router = router
        .layer(middleware::from_fn(normal::decompress))
        .layer(pace::layer(edge.read_timeout))
        .layer(stop::layer(edge.stop.clone()))
        .layer(CatchPanicLayer::custom(panicked))
        .layer(from_fn_with_state(edge.private.clone(), hide_folders))
        .layer(middleware::from_fn(server::keep_reserve))
        .layer(middleware::from_fn(compat::reword))
        .layer(SetResponseHeaderLayer::overriding(
            header::X_CONTENT_TYPE_OPTIONS,
            nosniff,
        ));
    let router = match edge.cors() {
        Some(cors) => router.layer(cors),
        None => router,
    };
    let router = router
        .layer(from_fn_with_state(metrics, count::count))
        .layer(trace::layer())
        .layer(PropagateRequestIdLayer::x_request_id())
        .layer(SetRequestIdLayer::x_request_id(MakeRequestUuid))
        .layer(middleware::map_request(trace::short_request_id));
    // A router's own layers run after routing.
    Router::new().fallback_service(router.map_request(normal::without_trailing_slash))
}

/// Middleware that leaves the place of the server's folders out of errors.
async fn hide_folders(
    State(private): State<PrivateFolders>,
    request: Request,
    next: Next,
) -> Response {
    let response = next.run(request).await;
    let error = response.extensions().get::<ApiError>();
    match error.and_then(|error| error.without(&private)) {
        Some(error) => error.respond_again(&PROBLEM_DETAILS, &response),
        None => response,
    }
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
