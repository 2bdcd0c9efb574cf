//! The span of a request: what log lines and traces name it by.

use axum::extract::{MatchedPath, Request};
use axum::http::HeaderMap;
use std::time::Duration;
use tower_http::classify::{ServerErrorsAsFailures, SharedClassifier};
use tower_http::trace::{MakeSpan, OnResponse, TraceLayer};
use tracing::field::Empty;
use tracing::{Span, info_span};

use crate::telemetry::traces;

const REQUEST_ID: &str = "x-request-id";

/// Longest request id that is taken from a client.
const MAX_ID: usize = 128;

type RequestLayer =
    TraceLayer<SharedClassifier<ServerErrorsAsFailures>, RequestSpan, (), Finished, (), (), ()>;

/// The layer that gives each request its span. It stands inside the layer that sets
/// `x-request-id`. What fails is logged with its reason where it fails.
pub(super) fn layer() -> RequestLayer {
    TraceLayer::new_for_http()
        .make_span_with(RequestSpan)
        .on_request(())
        .on_response(Finished)
        .on_body_chunk(())
        .on_eos(())
        .on_failure(())
}

/// Names are those of OpenTelemetry's semantic conventions for HTTP servers.
#[derive(Clone, Copy, Debug)]
pub(super) struct RequestSpan;

impl<B> MakeSpan<B> for RequestSpan {
    fn make_span(&mut self, request: &axum::http::Request<B>) -> Span {
        let method = request.method().as_str();
        let route = request.extensions().get::<MatchedPath>();
        let route = route.map_or("", MatchedPath::as_str);
        let span = info_span!(
            "request",
            request_id = request_id(request.headers()),
            http.request.method = method,
            http.route = route,
            url.path = request.uri().path(),
            http.response.status_code = Empty,
            trace_id = Empty,
            otel.name = Empty,
            otel.kind = Empty,
            otel.status_code = Empty,
        );
        if let Some(trace) = traces::continue_from(&span, request.headers()) {
            span.record("trace_id", trace);
        }
        // Log lines have no use for these.
        if traces::are_sent() {
            span.record("otel.name", format!("{method} {route}").trim_end());
            span.record("otel.kind", "server");
        }
        span
    }
}

/// A request id stands in every line of the log about the request: one that is longer than any
/// program makes them is replaced by the server's own.
pub(super) async fn short_request_id(mut request: Request) -> Request {
    let id = request.headers().get(REQUEST_ID);
    if id.is_some_and(|id| id.len() > MAX_ID) {
        request.headers_mut().remove(REQUEST_ID);
    }
    request
}

/// The id that a request came with, or was given.
pub(super) fn request_id(headers: &HeaderMap) -> Option<&str> {
    headers.get(REQUEST_ID)?.to_str().ok()
}

/// One line a request, for `--log debug`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Finished;

impl<B> OnResponse<B> for Finished {
    fn on_response(self, response: &axum::http::Response<B>, latency: Duration, span: &Span) {
        let status = response.status();
        // OpenTelemetry's integers have signs; others would become texts.
        span.record("http.response.status_code", i64::from(status.as_u16()));
        if traces::are_sent() && status.is_server_error() {
            span.record("otel.status_code", "ERROR");
        }
        tracing::debug!(
            status = status.as_u16(),
            milliseconds = latency.as_secs_f64() * 1000.0,
            "answered"
        );
    }
}
