//! The client that carries spans to a collector: the exporter of `opentelemetry-otlp` over the HTTP
//! client that the program has anyway.

use std::time::Duration;

use async_trait::async_trait;
use opentelemetry_http::{Bytes, HttpClient, HttpError, Request, Response};

/// For one batch of spans.
const SEND_WITHIN: Duration = Duration::from_secs(10);

/// Blocks, which the thread of the SDK's batch processor may.
#[derive(Debug)]
pub(super) struct Client(ureq::Agent);

impl Client {
    pub(super) fn new() -> Self {
        let config = ureq::Agent::config_builder()
            .timeout_global(Some(SEND_WITHIN))
            .http_status_as_error(false);
        Self(config.build().into())
    }
}

#[async_trait]
impl HttpClient for Client {
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let mut response = self.0.run(request.map(Vec::from))?;
        let body = response.body_mut().read_to_vec()?;
        Ok(response.map(|_| body.into()))
    }
}
