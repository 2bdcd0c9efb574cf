//! Who may do what: tokens, limits of their own, and a line in the log for every admin act.

mod rate;
#[cfg(test)]
mod tests;
mod tokens;

pub use rate::{Rate, RateError};
pub use tokens::{Tokens, TokensError};

use std::convert::Infallible;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{ConnectInfo, FromRequestParts, Request, State};
use axum::http::request::Parts;
use axum::http::{HeaderMap, Method, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use http_body_util::Limited;

use super::error::{ApiError, Problem};
use super::trace::request_id;
use crate::telemetry::logs::AUDIT;
use rate::{Caller, RateLimiter};
use tokens::{Token, TokenLimits};

/// Wrong tokens that one address may try; tokens that are right are not held up by it.
const GUESSES: Rate = Rate::new(30, Duration::from_secs(60));

/// What somebody may do. Who may do more may do less as well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// Ask for tasks and classify.
    Reader,
    /// Everything.
    Admin,
}

impl Role {
    /// Of the security scheme in the OpenAPI document.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Reader => "reader",
            Self::Admin => "admin",
        }
    }
}

/// How access is set up, fixed when the server starts.
#[derive(Debug, Default)]
pub struct AccessOptions {
    /// Who may read and classify; without them everybody may.
    pub readers: Option<Arc<Tokens>>,
    pub admins: Option<Arc<Tokens>>,
    /// The server listens on a loopback address: without tokens for admins, programs of this
    /// machine may use the admin routes, pages in its browsers may not.
    pub loopback: bool,
    /// For each token, and for each address that sends none.
    pub rate_limit: Option<Rate>,
}

/// The rules for all routes.
#[derive(Clone, Debug)]
pub struct Access(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    options: AccessOptions,
    limiter: RateLimiter,
}

/// Who sends a request; an extension of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Actor(Arc<str>);

impl Actor {
    pub(crate) fn name(&self) -> &str {
        &self.0
    }
}

impl<S: Sync> FromRequestParts<S> for Actor {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Infallible> {
        let actor = parts.extensions.get().cloned();
        Ok(actor.unwrap_or_else(|| Self("admin".into())))
    }
}

impl Access {
    pub fn new(options: AccessOptions) -> Self {
        Self(Arc::new(Inner {
            options,
            limiter: RateLimiter::default(),
        }))
    }

    /// Who may use a path; `None` for everybody.
    pub(super) fn role_for(&self, path: &str) -> Option<Role> {
        const OPEN: [&str; 4] = ["/healthz", "/readyz", "/health", "/openapi.json"];
        if OPEN.contains(&path) || path.starts_with("/v2/health/") {
            return None;
        }
        match path.starts_with("/admin/") {
            true => Some(Role::Admin),
            false => Some(Role::Reader),
        }
    }

    /// Whether requests without a token are refused.
    pub(super) fn asks_for_token(&self, role: Role) -> bool {
        let options = &self.0.options;
        match role {
            Role::Reader => options.readers.is_some(),
            Role::Admin => options.admins.is_some() || !options.loopback,
        }
    }

    /// The token of a request, if one was sent that may do what `role` may, or `None` for somebody
    /// who needs none.
    fn admit(
        &self,
        role: Role,
        headers: &HeaderMap,
        peer: Option<IpAddr>,
    ) -> Result<Option<Arc<Token>>, ApiError> {
        let options = &self.0.options;
        let presented = bearer(headers);
        let find = |tokens: &Option<Arc<Tokens>>| tokens.as_ref()?.find(presented?);
        // Both, so that the time does not tell which one it was.
        let (admin, reader) = (find(&options.admins), find(&options.readers));
        if let Some(token) = admin {
            return Ok(Some(token));
        }
        let asked = match role {
            Role::Reader => &options.readers,
            Role::Admin => &options.admins,
        };
        match (role, asked, presented) {
            (Role::Reader, Some(_), _) if reader.is_some() => Ok(reader),
            // Clients of other servers send the token that they have for those.
            (Role::Reader, None, _) => Ok(None),
            (Role::Admin, None, _) if options.loopback => check_local(headers).map(|()| None),
            (Role::Admin, None, _) => Err(Problem::Forbidden.with(
                "admin routes need --admin-token-file when the server listens on an address that \
                 other machines can reach",
            )),
            (Role::Admin, Some(_), Some(_)) if reader.is_some() => {
                Err(Problem::Forbidden.with("this token may read, and not change anything"))
            }
            (_, Some(_), Some(_)) => {
                let guesser = Caller::guesser(peer);
                self.0.limiter.take(guesser, GUESSES).map_err(too_many)?;
                Err(Problem::Unauthorized.with("the token is not a right one"))
            }
            (_, Some(_), None) => Err(Problem::Unauthorized.with(format!(
                "send {} token in the header `Authorization: Bearer TOKEN`",
                match role {
                    Role::Reader => "a",
                    Role::Admin => "an admin",
                }
            ))),
        }
    }

    fn count(&self, token: Option<&Token>, peer: Option<IpAddr>) -> Result<(), ApiError> {
        let own = token.and_then(|token| token.limits.rate);
        let Some(rate) = own.or(self.0.options.rate_limit) else {
            return Ok(());
        };
        let caller = match token {
            Some(token) => Caller::Token(token.name.clone()),
            None => Caller::address(peer),
        };
        self.0.limiter.take(caller, rate).map_err(too_many)
    }
}

fn too_many(wait: Duration) -> ApiError {
    Problem::RateLimited
        .with("that is more requests than are taken in this time; slow down")
        .retry_after(wait)
}

/// What [`guard`] goes by.
#[derive(Clone, Debug)]
pub(super) struct Gate {
    pub(super) access: Access,
    pub(super) role: Role,
}

/// Middleware in front of the routes of a role.
pub(super) async fn guard(State(gate): State<Gate>, request: Request, next: Next) -> Response {
    let peer = request
        .extensions()
        .get::<ConnectInfo<SocketAddr>>()
        .map(|ConnectInfo(address)| address.ip());
    let act = Act::of(&gate, &request, peer);
    let (actor, response) = match gate.access.admit(gate.role, request.headers(), peer) {
        Ok(token) => {
            let actor = match (&token, gate.role) {
                (Some(token), _) => token.name.as_str(),
                (None, Role::Admin) => "admin",
                (None, Role::Reader) => "anonymous",
            };
            let actor = Actor(actor.into());
            let request = gate
                .access
                .count(token.as_deref(), peer)
                .and_then(|()| limited(request, gate.role, token.as_deref()));
            let response = match request {
                Ok(mut request) => {
                    request.extensions_mut().insert(actor.clone());
                    next.run(request).await
                }
                Err(error) => error.into_response(),
            };
            (actor, response)
        }
        Err(error) => (Actor("nobody".into()), error.into_response()),
    };
    if let Some(act) = act {
        act.write_down(&actor, &response);
    }
    response
}

/// Holds the body to the token's own limit; the server's limits hold as well.
fn limited(request: Request, role: Role, token: Option<&Token>) -> Result<Request, ApiError> {
    let limits = token.map_or(TokenLimits::default(), |token| token.limits);
    let most = match role {
        Role::Reader => limits.max_body,
        Role::Admin => limits.max_upload,
    };
    let Some(most) = most else { return Ok(request) };
    let told = request.headers().get(header::CONTENT_LENGTH);
    let told = told.and_then(|length| length.to_str().ok()?.parse::<usize>().ok());
    if told.is_some_and(|told| told > most) {
        return Err(Problem::TooLarge.with(format!("with this token a body may have {most} bytes")));
    }
    Ok(request.map(|body| Body::new(Limited::new(body, most))))
}

/// A change that somebody asks for, for the log: target `audit`.
struct Act {
    method: Method,
    path: String,
    peer: Option<IpAddr>,
    request_id: String,
}

impl Act {
    fn of(gate: &Gate, request: &Request, peer: Option<IpAddr>) -> Option<Self> {
        let changes = ![Method::GET, Method::HEAD].contains(request.method());
        (gate.role == Role::Admin && changes).then(|| Self {
            method: request.method().clone(),
            path: request.uri().path().to_owned(),
            peer,
            request_id: request_id(request.headers()).unwrap_or_default().to_owned(),
        })
    }

    fn write_down(&self, actor: &Actor, response: &Response) {
        let problem = response.extensions().get::<ApiError>();
        let made = response.headers().get(header::LOCATION);
        tracing::info!(
            target: AUDIT,
            actor = actor.name(),
            peer = self.peer.map(tracing::field::display),
            method = %self.method,
            path = self.path,
            status = response.status().as_u16(),
            problem = problem.map(|error| error.problem().slug()),
            location = made.and_then(|made| made.to_str().ok()),
            request_id = self.request_id,
            "admin act"
        );
    }
}

/// The token in `Authorization: Bearer TOKEN`.
fn bearer(headers: &HeaderMap) -> Option<&[u8]> {
    headers
        .get(header::AUTHORIZATION)
        .and_then(|value| value.as_bytes().split_at_checked(7))
        .filter(|(scheme, _)| scheme.eq_ignore_ascii_case(b"Bearer "))
        .map(|(_, token)| token.trim_ascii())
}

/// A page from elsewhere reaches a loopback server either under its own origin, which the browser
/// tells in `Origin`, or by pointing its own host name at 127.0.0.1, which shows in `Host`.
fn check_local(headers: &HeaderMap) -> Result<(), ApiError> {
    let foreign = |name| {
        headers.get(name).is_some_and(|value| {
            let authority = value.to_str().unwrap_or_default();
            let authority = authority
                .split_once("://")
                .map_or(authority, |(_, rest)| rest);
            !is_loopback(authority)
        })
    };
    if foreign(header::HOST) || foreign(header::ORIGIN) {
        return Err(Problem::Forbidden.with(
            "without an admin token, admin routes answer only requests made to a loopback address \
             by a program of this machine; start the server with --admin-token-file",
        ));
    }
    Ok(())
}

/// Whether `host[:port]` names this machine.
fn is_loopback(authority: &str) -> bool {
    let host = match authority.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => authority.split(':').next().unwrap_or_default(),
    };
    host.eq_ignore_ascii_case("localhost")
        || host
            .parse::<IpAddr>()
            .is_ok_and(|address| address.is_loopback())
}
