//! The audit log: a line for every change that is asked for on an admin route, and for every
//! request to one that is refused.

use std::net::IpAddr;

use axum::extract::Request;
use axum::http::{Method, StatusCode, header};
use axum::response::Response;

use super::Actor;
use crate::http::error::ApiError;
use crate::http::trace::request_id;
use crate::telemetry::logs::AUDIT;

/// A request to an admin route. Its line is written when it is answered, or when it is dropped
/// before that: a client that leaves does not undo what it asked for.
pub(super) struct Act {
    method: Method,
    path: String,
    peer: Option<IpAddr>,
    request_id: String,
    actor: Actor,
    is_written: bool,
}

impl Act {
    /// Begins the record of a request by `actor`.
    pub(super) fn new(request: &Request, peer: Option<IpAddr>, actor: Actor) -> Self {
        Self {
            method: request.method().clone(),
            path: request.uri().path().to_owned(),
            peer,
            request_id: request_id(request.headers()).unwrap_or_default().to_owned(),
            actor,
            is_written: false,
        }
    }

    /// Ends the record with the answer.
    pub(super) fn answered(mut self, response: &Response) {
        let refused = [
            StatusCode::UNAUTHORIZED,
            StatusCode::FORBIDDEN,
            StatusCode::TOO_MANY_REQUESTS,
        ];
        if self.method.is_safe() && !refused.contains(&response.status()) {
            self.is_written = true;
        } else {
            self.write(Some(response));
        }
    }

    fn write(&mut self, response: Option<&Response>) {
        let problem = response.and_then(|response| response.extensions().get::<ApiError>());
        let made = response.and_then(|response| response.headers().get(header::LOCATION));
        tracing::info!(
            target: AUDIT,
            actor = self.actor.name(),
            peer = self.peer.map(tracing::field::display),
            method = %self.method,
            path = self.path,
            status = response.map(|response| response.status().as_u16()),
            outcome = response.is_none().then_some("unanswered"),
            problem = problem.map(|error| error.problem().slug()),
            location = made.and_then(|made| made.to_str().ok()),
            request_id = self.request_id,
            "admin act"
        );
        self.is_written = true;
    }
}

impl Drop for Act {
    fn drop(&mut self) {
        if !self.is_written && !self.method.is_safe() {
            self.write(None);
        }
    }
}
