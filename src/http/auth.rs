//! Who may use the admin routes.

use std::net::IpAddr;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, header};
use axum::middleware::Next;
use axum::response::Response;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use super::error::{ApiError, Problem};

/// The rule for admin routes, fixed when the server starts.
#[derive(Clone, Debug)]
pub enum AdminAccess {
    /// Requests carry `Authorization: Bearer TOKEN`; kept as SHA-256, so that the comparison takes
    /// the same time whatever the length and the content.
    Token([u8; 32]),
    /// The server listens on a loopback address: programs of this machine may, pages in its
    /// browsers may not.
    Loopback,
    /// No token, and the server can be reached from elsewhere.
    Closed,
}

impl AdminAccess {
    pub fn token(token: &str) -> Self {
        Self::Token(Sha256::digest(token).into())
    }

    fn check(&self, headers: &HeaderMap) -> Result<(), ApiError> {
        match self {
            Self::Token(expected) => check_token(expected, headers),
            Self::Loopback => check_local(headers),
            Self::Closed => Err(Problem::Forbidden.with(
                "admin routes need --admin-token-file when the server listens on an address that \
                 other machines can reach",
            )),
        }
    }
}

/// Middleware in front of the admin routes.
pub(super) async fn guard(
    State(access): State<AdminAccess>,
    request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    access.check(request.headers())?;
    Ok(next.run(request).await)
}

fn check_token(expected: &[u8; 32], headers: &HeaderMap) -> Result<(), ApiError> {
    let given = headers
        .get(header::AUTHORIZATION)
        .and_then(|value| value.as_bytes().split_at_checked(7))
        .filter(|(scheme, _)| scheme.eq_ignore_ascii_case(b"Bearer "))
        .map(|(_, token)| Sha256::digest(token.trim_ascii()));
    match given {
        Some(digest) if bool::from(digest.as_slice().ct_eq(expected)) => Ok(()),
        Some(_) => Err(Problem::Unauthorized.with("the admin token is not the right one")),
        None => Err(Problem::Unauthorized
            .with("send the admin token in the header `Authorization: Bearer TOKEN`")),
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(header::HeaderName, &str)]) -> HeaderMap {
        pairs
            .iter()
            .map(|(name, value)| (name.clone(), value.parse().expect("a header value")))
            .collect()
    }

    fn outcome(access: &AdminAccess, pairs: &[(header::HeaderName, &str)]) -> Option<Problem> {
        access
            .check(&headers(pairs))
            .err()
            .map(|error| error.problem())
    }

    #[test]
    fn only_the_right_token_opens() {
        let access = AdminAccess::token("s3cret");
        let with = |value| outcome(&access, &[(header::AUTHORIZATION, value)]);
        assert_eq!(with("Bearer s3cret"), None);
        assert_eq!(with("bearer s3cret"), None);
        for wrong in [
            "Bearer s3cre",
            "Bearer s3cret2",
            "Bearer ",
            "Basic s3cret",
            "s3cret",
            "é",
        ] {
            assert_eq!(with(wrong), Some(Problem::Unauthorized), "{wrong}");
        }
        assert_eq!(outcome(&access, &[]), Some(Problem::Unauthorized));
    }

    #[test]
    fn loopback_refuses_pages_of_other_origins() {
        let check = |pairs: &[_]| outcome(&AdminAccess::Loopback, pairs);
        for host in [
            "127.0.0.1:8080",
            "localhost:8080",
            "[::1]:8080",
            "127.8.0.1",
        ] {
            assert_eq!(check(&[(header::HOST, host)]), None, "{host}");
        }
        assert_eq!(
            check(&[(header::HOST, "evil.example:8080")]),
            Some(Problem::Forbidden)
        );
        let local = (header::HOST, "127.0.0.1:8080");
        let page = |origin| check(&[local.clone(), (header::ORIGIN, origin)]);
        assert_eq!(page("http://localhost:3000"), None);
        assert_eq!(page("https://evil.example"), Some(Problem::Forbidden));
        assert_eq!(page("null"), Some(Problem::Forbidden));
    }

    #[test]
    fn closed_is_closed() {
        assert_eq!(outcome(&AdminAccess::Closed, &[]), Some(Problem::Forbidden));
    }
}
