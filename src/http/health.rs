//! Liveness, readiness and metrics. None of them waits for the model.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use axum::extract::State;
use axum::http::header;
use axum::middleware::from_fn_with_state;
use axum::response::IntoResponse;

use utoipa_axum::router::{OpenApiRouter, UtoipaMethodRouterExt};
use utoipa_axum::routes;

use super::auth::{Gate, guard};
use super::error::{ApiError, Problem, problem_set};
use crate::telemetry::Metrics;

/// What these routes need. They answer before the student is loaded.
#[derive(Clone)]
pub(super) struct Health {
    pub(super) readiness: Readiness,
    pub(super) metrics: Arc<Metrics>,
}

/// Whether a path is one that tells how the server is, also in the words of other servers.
pub(super) fn is_probe(path: &str) -> bool {
    ["/healthz", "/readyz", "/health", "/metrics"].contains(&path)
        || path.starts_with("/v2/health/")
}

/// Everybody may ask for health; metrics are for `readers`.
pub(super) fn routes(health: Health, readers: Gate) -> OpenApiRouter {
    OpenApiRouter::new()
        .routes(routes!(healthz))
        .routes(routes!(readyz))
        .routes(routes!(metrics).layer(from_fn_with_state(readers, guard)))
        .with_state(health)
}

/// Whether the server takes requests.
#[derive(Clone, Debug, Default)]
pub struct Readiness(Arc<AtomicU8>);

const STARTING: u8 = 0;
const READY: u8 = 1;
const STOPPING: u8 = 2;

impl Readiness {
    pub fn set_ready(&self) {
        // A stop that came first stays.
        let _ = self
            .0
            .compare_exchange(STARTING, READY, Ordering::AcqRel, Ordering::Acquire);
    }

    pub fn set_stopping(&self) {
        self.0.store(STOPPING, Ordering::Release);
    }

    pub fn check(&self) -> Result<(), ApiError> {
        match self.0.load(Ordering::Acquire) {
            READY => Ok(()),
            STARTING => Err(Problem::Unavailable.with("the server is starting")),
            _ => Err(Problem::Unavailable.with("the server is stopping")),
        }
    }
}

/// The process is alive.
#[utoipa::path(get, path = "/healthz", tag = "health",
    responses((status = 200, description = "The process is alive.", body = String,
        content_type = "text/plain", example = "ok\n")))]
pub(super) async fn healthz() -> &'static str {
    "ok\n"
}

problem_set!(ReadyErrors: Unavailable);

/// The server takes requests.
#[utoipa::path(get, path = "/readyz", tag = "health",
    responses((status = 200, description = "The server takes requests.", body = String,
        content_type = "text/plain", example = "ready\n"), ReadyErrors))]
pub(super) async fn readyz(State(health): State<Health>) -> Result<&'static str, ApiError> {
    health.readiness.check()?;
    Ok("ready\n")
}

problem_set!(MetricsErrors: Internal);

/// Metrics in the text format of Prometheus.
#[utoipa::path(get, path = "/metrics", tag = "health",
    responses((status = 200, description = "Metrics in the text format of Prometheus.",
        body = String, content_type = "text/plain"), MetricsErrors))]
pub(super) async fn metrics(State(health): State<Health>) -> Result<impl IntoResponse, ApiError> {
    let text = health.metrics.render().map_err(ApiError::internal)?;
    Ok(([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text))
}
