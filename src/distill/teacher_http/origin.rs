//! Which endpoints get the token of the operator.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use axum::http::Uri;
use serde::Deserialize;

/// The variable with the token.
pub const TOKEN_VARIABLE: &str = "KDLORA_TEACHER_TOKEN";

/// Scheme, host and port of an address that a token may be sent to: https, or http on a loopback
/// address.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct TeacherOrigin {
    is_https: bool,
    /// In lower case; an IPv6 address in brackets.
    host: String,
    port: u16,
}

/// A text that is no such origin.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "invalid origin {0:?}: expected https://HOST[:PORT] without a path, or http:// with localhost or \
     a loopback address, since a token would be sent in the clear"
)]
pub struct OriginError(String);

impl TeacherOrigin {
    /// The origin of an address.
    fn of(uri: &Uri) -> Option<Self> {
        let is_https = match uri.scheme_str()? {
            "https" => true,
            "http" => false,
            _ => return None,
        };
        let authority = uri.authority()?;
        let default = if is_https { 443 } else { 80 };
        Some(Self {
            is_https,
            host: authority.host().to_ascii_lowercase(),
            port: authority.port_u16().unwrap_or(default),
        })
    }

    fn is_loopback(&self) -> bool {
        let address = self.host.trim_matches(['[', ']']).parse::<IpAddr>();
        self.host == "localhost" || address.is_ok_and(|address| address.is_loopback())
    }
}

impl FromStr for TeacherOrigin {
    type Err = OriginError;

    fn from_str(text: &str) -> Result<Self, OriginError> {
        let parse = || {
            let uri: Uri = text.trim().trim_end_matches('/').parse().ok()?;
            let alone = uri.path_and_query().is_none_or(|path| path == "/");
            let origin = Self::of(&uri).filter(|_| alone && !text.contains('@'))?;
            (origin.is_https || origin.is_loopback()).then_some(origin)
        };
        parse().ok_or_else(|| OriginError(text.to_owned()))
    }
}

impl TryFrom<String> for TeacherOrigin {
    type Error = OriginError;

    fn try_from(text: String) -> Result<Self, OriginError> {
        text.parse()
    }
}

impl fmt::Display for TeacherOrigin {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.is_https { "https" } else { "http" };
        write!(formatter, "{scheme}://{}:{}", self.host, self.port)
    }
}

/// A token, and the origins that it is for.
#[derive(Clone)]
pub struct TeacherToken {
    token: String,
    origins: Vec<TeacherOrigin>,
}

/// Does not show the token.
impl fmt::Debug for TeacherToken {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = formatter.debug_struct("TeacherToken");
        shown.field("origins", &self.origins).finish()
    }
}

/// Whether a token goes along with requests to an address.
#[derive(Clone, PartialEq, Eq)]
pub(super) enum Authorization {
    /// There is no token.
    None,
    /// There is one, and the address is of none of its origins.
    Withheld,
    /// The value of the header.
    Sent {
        bearer: String,
        /// In the clear, so that only addresses of this machine may be connected to.
        is_local: bool,
    },
}

impl TeacherToken {
    pub fn new(token: String, origins: Vec<TeacherOrigin>) -> Self {
        Self { token, origins }
    }

    /// The token in [`TOKEN_VARIABLE`], if there is one.
    pub fn from_environment(origins: &[TeacherOrigin]) -> Option<Self> {
        let token = std::env::var(TOKEN_VARIABLE).ok();
        let token = token.filter(|token| !token.is_empty())?;
        Some(Self::new(token, origins.to_vec()))
    }

    pub(super) fn for_address(&self, url: &str) -> Authorization {
        let origin = url.parse().ok().and_then(|uri| TeacherOrigin::of(&uri));
        match origin.filter(|origin| self.origins.contains(origin)) {
            None => Authorization::Withheld,
            Some(origin) => Authorization::Sent {
                bearer: format!("Bearer {}", self.token),
                is_local: !origin.is_https,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_goes_to_its_origins_only() {
        let origins = ["https://teacher.example", "http://localhost:8081/"];
        let origins = origins.map(|origin| origin.parse().expect("an origin"));
        let token = TeacherToken::new("t0ken".to_owned(), origins.to_vec());
        let sent = |url: &str| match token.for_address(url) {
            Authorization::Sent { bearer, is_local } => {
                assert_eq!(bearer, "Bearer t0ken");
                Some(is_local)
            }
            Authorization::Withheld => None,
            Authorization::None => unreachable!("there is a token"),
        };
        assert_eq!(sent("https://teacher.example/predict"), Some(false));
        assert_eq!(sent("https://TEACHER.example:443/"), Some(false));
        assert_eq!(sent("http://localhost:8081/predict?x=1"), Some(true));
        for url in [
            "http://teacher.example/",
            "http://teacher.example:443/",
            "https://teacher.example:8443/",
            "https://teacher.example.evil.example/",
            "https://a.teacher.example/",
            "https://teacher.example@evil.example/",
            "http://localhost:8082/",
            "http://127.0.0.1:8081/",
            "not an address",
        ] {
            assert_eq!(sent(url), None, "{url}");
        }
        assert!(!format!("{token:?}").contains("t0ken"));
    }

    #[test]
    fn an_origin_has_no_path_and_is_not_in_the_clear() {
        for text in [
            "https://a.example",
            "https://a.example:8443/",
            "http://127.0.0.1:8081",
            "http://[::1]:8081",
        ] {
            let origin: TeacherOrigin = text.parse().expect(text);
            assert_eq!(origin.to_string().parse(), Ok(origin), "{text}");
        }
        for text in [
            "",
            "a.example",
            "http://a.example",
            "http://10.0.0.1",
            "ftp://a.example",
            "https://a.example/predict",
            "https://a.example/?x",
            "https://user@a.example",
            "https://",
        ] {
            assert!(text.parse::<TeacherOrigin>().is_err(), "{text}");
        }
    }
}
