//! Who may do what: tokens, limits of their own, and a line in the log for every admin act.

mod audit;
mod local;
mod rate;
#[cfg(test)]
mod tests;
mod tokens;

pub use rate::{Rate, RateError};
pub use tokens::{Tokens, TokensError};

use std::convert::Infallible;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{ConnectInfo, FromRequestParts, Request, State};
use axum::http::request::Parts;
use axum::http::{HeaderMap, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use http_body_util::Limited;

use super::error::{ApiError, Problem};
use audit::Act;
use local::Sender;
use rate::RateLimits;
use tokens::{Token, TokenLimits};

/// Wrong tokens that one address may try; tokens that are right are not held up by it.
const GUESSES: Rate = Rate::new(NonZeroU32::new(30).unwrap(), Duration::from_secs(60));

/// What somebody may do. Who may do more may do less as well.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
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
    /// machine may use the admin routes; proxies, and pages in its browsers, may not.
    pub loopback: bool,
    /// Host names, beside those of this machine, that requests to a loopback address may be made
    /// to where readers need no token.
    pub allowed_hosts: Vec<String>,
    /// For each token, and for each address that sends none.
    pub rate_limit: Option<Rate>,
}

/// The rules for all routes.
#[derive(Clone, Debug)]
pub struct Access(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    options: AccessOptions,
    limits: RateLimits,
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
        let limits = RateLimits::new(options.rate_limit, GUESSES);
        Self(Arc::new(Inner { options, limits }))
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

    /// Who sends a request, and whether they may do what `role` may.
    fn admit(&self, role: Role, sender: Sender<'_>) -> (Caller, Result<(), ApiError>) {
        let options = &self.0.options;
        let presented = bearer(sender.headers);
        let find = |role, tokens: &Option<Arc<Tokens>>| {
            let token = tokens.as_ref()?.find(presented?)?;
            Some(Caller::Token { role, token })
        };
        // Both, so that the time does not tell which one it was.
        let (admin, reader) = (
            find(Role::Admin, &options.admins),
            find(Role::Reader, &options.readers),
        );
        if let Some(admin) = admin {
            return (admin, Ok(()));
        }
        let asked = match role {
            Role::Reader => &options.readers,
            Role::Admin => &options.admins,
        };
        let outcome = match (role, asked, &reader, presented) {
            (Role::Reader, Some(_), Some(_), _) => Ok(()),
            // Clients of other servers send the token that they have for those.
            (Role::Reader, None, _, _) => match options.loopback {
                true if !sender.is_for(&options.allowed_hosts) => {
                    Err(Problem::Forbidden.with(FOREIGN_HOST))
                }
                _ => return (Caller::Anybody, Ok(())),
            },
            (Role::Admin, None, _, _) => match options.loopback {
                true if sender.is_local_program() => return (Caller::Anybody, Ok(())),
                true => Err(Problem::Forbidden.with(NOT_LOCAL)),
                false => Err(Problem::Forbidden.with(
                    "admin routes need --admin-token-file when the server listens on an address \
                     that other machines can reach",
                )),
            },
            (Role::Admin, Some(_), Some(_), _) => {
                Err(Problem::Forbidden.with("this token may read, and not change anything"))
            }
            (_, Some(_), None, Some(_)) => match self.0.limits.guess(sender.peer) {
                Ok(()) => Err(Problem::Unauthorized.with("unknown or expired token")),
                Err(wait) => Err(too_many(GUESSES, wait)),
            },
            (_, Some(_), None, None) => Err(Problem::Unauthorized.with(format!(
                "send {} token in the header `Authorization: Bearer TOKEN`",
                match role {
                    Role::Reader => "a",
                    Role::Admin => "an admin",
                }
            ))),
        };
        (reader.unwrap_or(Caller::Nobody), outcome)
    }

    fn count(&self, caller: &Caller, peer: Option<IpAddr>) -> Result<(), ApiError> {
        let limits = &self.0.limits;
        let own = caller.limits().rate;
        let Some(rate) = own.or(self.0.options.rate_limit) else {
            return Ok(());
        };
        let counted = match caller {
            Caller::Token { role, token } => limits.token(*role, &token.name, rate),
            Caller::Anybody | Caller::Nobody => limits.address(peer),
        };
        counted.map_err(|wait| too_many(rate, wait))
    }
}

/// Who sends a request.
#[derive(Clone, Debug)]
enum Caller {
    /// The owner of a token. The role is that of the file that the token is in.
    Token { role: Role, token: Arc<Token> },
    /// Someone who needs no token.
    Anybody,
    /// Someone without a token that is known.
    Nobody,
}

impl Caller {
    /// The name in the audit log and in the history of versions.
    fn actor(&self, role: Role) -> Actor {
        Actor(match (self, role) {
            (Self::Token { token, .. }, _) => token.name.as_str().into(),
            (Self::Anybody, Role::Admin) => "admin".into(),
            (Self::Anybody, Role::Reader) => "anonymous".into(),
            (Self::Nobody, _) => "nobody".into(),
        })
    }

    fn limits(&self) -> TokenLimits {
        match self {
            Self::Token { token, .. } => token.limits,
            Self::Anybody | Self::Nobody => TokenLimits::default(),
        }
    }
}

/// Why a request without a token is refused on an admin route of a loopback address.
const NOT_LOCAL: &str = "without an admin token, admin routes answer only programs of this machine: \
    the request must be made to a loopback address, by its name or number in `Host`, without a proxy \
    (Forwarded, X-Forwarded-*, X-Real-IP, Via) and not by a page of another origin; start the server \
    with --admin-token-file";

/// Why a reader without a token is refused on a loopback address.
const FOREIGN_HOST: &str = "without a token for readers, a server on a loopback address answers \
    only requests whose `Host` names this machine; name other hosts with --allowed-hosts, or start \
    the server with --api-token-file";

fn too_many(rate: Rate, wait: Duration) -> ApiError {
    let seconds = wait.as_secs_f64().ceil().max(1.0);
    Problem::RateLimited
        .with(format!(
            "rate limit exceeded: {rate}; retry after {seconds} s"
        ))
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
    let sender = Sender {
        method: request.method(),
        uri: request.uri(),
        headers: request.headers(),
        peer,
    };
    let (caller, admitted) = gate.access.admit(gate.role, sender);
    let actor = caller.actor(gate.role);
    let act = match gate.role {
        Role::Admin => Some(Act::new(&request, peer, actor.clone())),
        Role::Reader => None,
    };
    let request = admitted
        .and_then(|()| gate.access.count(&caller, peer))
        .and_then(|()| limited(request, gate.role, caller.limits()));
    let response = match request {
        Ok(mut request) => {
            request.extensions_mut().insert(actor);
            next.run(request).await
        }
        Err(error) => error.into_response(),
    };
    if let Some(act) = act {
        act.answered(&response);
    }
    response
}

/// Holds the body to the token's own limit; the server's limits hold as well.
fn limited(request: Request, role: Role, limits: TokenLimits) -> Result<Request, ApiError> {
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

/// The token in `Authorization: Bearer TOKEN`.
fn bearer(headers: &HeaderMap) -> Option<&[u8]> {
    headers
        .get(header::AUTHORIZATION)
        .and_then(|value| value.as_bytes().split_at_checked(7))
        .filter(|(scheme, _)| scheme.eq_ignore_ascii_case(b"Bearer "))
        .map(|(_, token)| token.trim_ascii())
}
