//! Counts the answers of all routes, refused requests among them.

use std::sync::Arc;

use axum::extract::{MatchedPath, Request, State};
use axum::http::Method;
use axum::middleware::Next;
use axum::response::Response;

use crate::telemetry::Metrics;

/// The route of a request for which there is none.
const NO_ROUTE: &str = "none";

/// Methods by name; clients may invent others.
const METHODS: [Method; 7] = [
    Method::GET,
    Method::HEAD,
    Method::POST,
    Method::PUT,
    Method::PATCH,
    Method::DELETE,
    Method::OPTIONS,
];

/// Middleware outside of everything that may answer.
pub(super) async fn count(
    State(metrics): State<Arc<Metrics>>,
    request: Request,
    next: Next,
) -> Response {
    let method = METHODS.into_iter().find(|known| known == request.method());
    let route = request.extensions().get::<MatchedPath>().cloned();
    let response = next.run(request).await;
    metrics.http_request(
        method.as_ref().map_or("other", Method::as_str),
        route.as_ref().map_or(NO_ROUTE, MatchedPath::as_str),
        response.status().as_u16(),
    );
    response
}
