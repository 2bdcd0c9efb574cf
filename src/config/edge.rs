//! Settings of what stands between the network and the routes.

use std::env;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use axum::http::HeaderValue;

use super::raw::RawServe;
use super::serve::ConfigError;
use super::units::Seconds;
use crate::http::auth::{AccessOptions, Rate, Tokens};
use crate::http::server::ConnectionLimits;

/// Lines of tokens in the environment; not options of the command line, which other users see.
const API_TOKENS: &str = "KDLORA_API_TOKENS";
const ADMIN_TOKENS: &str = "KDLORA_ADMIN_TOKENS";

/// Who may come, from where and how often.
#[derive(Clone, Debug)]
pub struct EdgeConfig {
    pub readers: Option<Arc<Tokens>>,
    pub admins: Option<Arc<Tokens>>,
    pub rate_limit: Option<Rate>,
    pub cors_origins: Vec<HeaderValue>,
    pub connections: ConnectionLimits,
    /// Address of the listener for health and metrics alone.
    pub health_bind: Option<SocketAddr>,
    /// Host names, beside those of this machine, that readers without a token may use on a loopback
    /// address.
    pub allowed_hosts: Vec<String>,
}

impl EdgeConfig {
    pub(super) fn check(raw: &RawServe) -> Result<Self, ConfigError> {
        let defaults = ConnectionLimits::default();
        let connections = ConnectionLimits {
            connections: raw.max_connections.unwrap_or(defaults.connections),
            read_timeout: timeout("read-timeout", raw.read_timeout, defaults.read_timeout)?,
            write_timeout: timeout("write-timeout", raw.write_timeout, defaults.write_timeout)?,
            answer_timeout: timeout(
                "answer-timeout",
                raw.answer_timeout,
                defaults.answer_timeout,
            )?,
        };
        if connections.connections == 0 {
            return Err(ConfigError::Invalid(
                "--max-connections must be at least 1".to_owned(),
            ));
        }
        Ok(Self {
            readers: tokens(raw.api_token_file.as_deref(), API_TOKENS)?,
            admins: tokens(raw.admin_token_file.as_deref(), ADMIN_TOKENS)?,
            rate_limit: raw.rate_limit,
            cors_origins: origins(raw.cors_origin.as_deref().unwrap_or_default())?,
            connections,
            health_bind: raw.health_bind,
            allowed_hosts: raw.allowed_hosts.clone().unwrap_or_default(),
        })
    }

    /// For a listener on a loopback address, or on another one.
    pub fn access(&self, loopback: bool) -> AccessOptions {
        AccessOptions {
            readers: self.readers.clone(),
            admins: self.admins.clone(),
            loopback,
            allowed_hosts: self.allowed_hosts.clone(),
            rate_limit: self.rate_limit,
        }
    }
}

fn timeout(flag: &str, given: Option<Seconds>, default: Duration) -> Result<Duration, ConfigError> {
    let time = given.map_or(default, |time| time.0);
    match time < Duration::from_millis(1) {
        true => Err(ConfigError::Invalid(format!(
            "--{flag} must be at least 1ms"
        ))),
        false => Ok(time),
    }
}

fn tokens(file: Option<&Path>, variable: &str) -> Result<Option<Arc<Tokens>>, ConfigError> {
    let tokens = match (file, env::var(variable)) {
        (Some(_), Ok(_)) => {
            return Err(ConfigError::Invalid(format!(
                "tokens come from a file or from {variable}, not from both"
            )));
        }
        (Some(path), Err(_)) => Tokens::file(path)?,
        (None, Ok(text)) => Tokens::fixed(&text, variable)?,
        (None, Err(_)) => return Ok(None),
    };
    Ok(Some(Arc::new(tokens)))
}

fn origins(origins: &[String]) -> Result<Vec<HeaderValue>, ConfigError> {
    let parse = |origin: &String| {
        let is_origin = origin.split_once("://").is_some_and(|(scheme, host)| {
            !scheme.is_empty() && !host.is_empty() && !host.contains('/')
        });
        let value = HeaderValue::from_str(origin).ok();
        value.filter(|_| is_origin || origin == "*").ok_or_else(|| {
            ConfigError::Invalid(format!(
                "--cors-origin: {origin:?} is not an origin; write it as https://example.org, \
                 without a path"
            ))
        })
    };
    origins.iter().map(parse).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn origins_have_no_path() {
        let check = |text: &str| origins(&[text.to_owned()]).is_ok();
        for good in ["https://a.example", "http://localhost:3000", "*"] {
            assert!(check(good), "{good}");
        }
        for bad in [
            "a.example",
            "https://a.example/",
            "https://",
            "",
            "https://a\n",
        ] {
            assert!(!check(bad), "{bad}");
        }
    }
}
