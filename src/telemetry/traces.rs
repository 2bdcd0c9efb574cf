//! Traces for an OpenTelemetry collector (OTLP over HTTP), where one is named.
//!
//! A request is one span, a child of the caller's if it brought a W3C `traceparent`; below it stand
//! the stages of a classification. Spans are sent in batches from a thread of the SDK: a collector
//! that is slow or gone costs spans, never requests.

use std::sync::OnceLock;
use std::time::{Duration, SystemTime};

use axum::http::{HeaderMap, Uri};
use opentelemetry::propagation::TextMapPropagator as _;
use opentelemetry::trace::{Span as _, TraceContextExt as _, Tracer as _, TracerProvider as _};
use opentelemetry::{Context, KeyValue};
use opentelemetry_http::HeaderExtractor;
use opentelemetry_otlp::{SpanExporter, WithExportConfig as _, WithHttpConfig as _};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{SdkTracer, SdkTracerProvider};
use tracing::{Level, Span, Subscriber};
use tracing_opentelemetry::OpenTelemetrySpanExt as _;
use tracing_subscriber::Layer;
use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::registry::LookupSpan;

use super::otlp::Client;

/// The tracer of the process, where a collector is named.
static TRACER: OnceLock<SdkTracer> = OnceLock::new();

/// A collector that can't be used.
#[derive(Debug, thiserror::Error)]
#[error("--otlp-endpoint: {0:?} can't be used; name a collector as http://HOST:4318")]
pub struct TracesError(String);

/// Sends what is left when it is dropped.
#[derive(Debug)]
#[must_use = "spans are lost if it is dropped at once"]
pub struct Flush(SdkTracerProvider);

impl Drop for Flush {
    fn drop(&mut self) {
        // A collector that is gone by then gets nothing.
        let _ = self.0.shutdown_with_timeout(Duration::from_secs(2));
    }
}

/// The layer that makes OpenTelemetry's spans of ours and sends them to `endpoint`.
pub(super) fn layer<S>(endpoint: &str) -> Result<(impl Layer<S>, Flush), TracesError>
where
    S: Subscriber + for<'span> LookupSpan<'span>,
{
    let exporter = exporter(endpoint).ok_or_else(|| TracesError(endpoint.to_owned()))?;
    let resource = Resource::builder()
        .with_service_name("kdlora")
        .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")));
    let provider = SdkTracerProvider::builder()
        .with_batch_exporter(exporter)
        .with_resource(resource.build())
        .build();
    let tracer = provider.tracer("kdlora");
    let tracer = TRACER.get_or_init(|| tracer).clone();
    let layer = tracing_opentelemetry::layer()
        .with_tracer(tracer)
        .with_location(false)
        .with_threads(false)
        .with_target(false)
        .with_tracked_inactivity(false)
        .with_filter(filter_fn(|metadata| {
            *metadata.level() <= Level::INFO && metadata.target().starts_with("kdlora")
        }));
    Ok((layer, Flush(provider)))
}

/// Whether a collector is named.
pub fn are_sent() -> bool {
    TRACER.get().is_some()
}

/// `endpoint` is a collector's base address.
fn exporter(endpoint: &str) -> Option<SpanExporter> {
    let address: Uri = endpoint.parse().ok()?;
    if !matches!(address.scheme_str(), Some("http" | "https")) {
        return None;
    }
    SpanExporter::builder()
        .with_http()
        .with_http_client(Client::new())
        .with_endpoint(format!("{}/v1/traces", endpoint.trim_end_matches('/')))
        .build()
        .ok()
}

/// Makes `span` a child of the span that `traceparent` (and `tracestate`) name, if they do. Gives
/// the trace's id, for logs.
pub fn continue_from(span: &Span, headers: &HeaderMap) -> Option<String> {
    let caller = TraceContextPropagator::new()
        .extract_with_context(&Context::new(), &HeaderExtractor(headers));
    let id = caller.span().span_context().trace_id();
    let is_traced = caller.span().span_context().is_valid();
    if is_traced {
        // It fails only where nobody makes OpenTelemetry's spans.
        let _ = span.set_parent(caller);
    }
    is_traced.then(|| id.to_string())
}

/// The stages of a classification that has just been computed, as spans below the current one.
pub(super) fn stages(stages: [(&'static str, Duration); 3]) {
    let Some(tracer) = TRACER.get() else { return };
    let parent = Span::current().context();
    let mut at = SystemTime::now() - stages.iter().map(|(_, took)| *took).sum::<Duration>();
    for (name, took) in stages {
        let mut span = tracer
            .span_builder(name)
            .with_start_time(at)
            .start_with_context(tracer, &parent);
        at += took;
        span.end_with_timestamp(at);
    }
}
