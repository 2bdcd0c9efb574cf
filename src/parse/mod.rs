//! Reads JSON and TOML that somebody else wrote: request bodies, specs, settings and files.
//!
//! Everything is read through the functions of this module, which `clippy.toml` enforces. They add
//! three rules to what serde does:
//!
//! - A type with named fields is read from an object only. What serde derives also takes a list, and
//!   assigns its elements to the fields by position.
//! - An object may not have two fields with one name.
//! - An error names the field by its path, `training.epochs`, and says what was expected in the
//!   words of JSON.

mod strict;
mod words;

use std::io;

use serde::de::{Deserialize, DeserializeOwned, Deserializer};
use serde_json::Value;
use serde_json::error::Category;
use serde_path_to_error::Track;

use strict::Strict;

/// A text that can't be read as the type that was asked for.
#[derive(Debug, thiserror::Error)]
pub enum ParseError {
    /// The text is not well-formed.
    #[error("{0}")]
    Syntax(String),
    /// A field is missing, unknown, or has a value that it can't have.
    #[error("{0}")]
    Field(String),
}

impl From<ParseError> for io::Error {
    fn from(error: ParseError) -> Self {
        Self::new(io::ErrorKind::InvalidData, error)
    }
}

/// Reads a type from the text of a JSON document.
#[expect(
    clippy::disallowed_methods,
    reason = "other code reads JSON through here"
)]
pub fn json<T: DeserializeOwned>(text: &[u8]) -> Result<T, ParseError> {
    let mut deserializer = serde_json::Deserializer::from_slice(text);
    let value = strict(&mut deserializer, json_problem)?;
    deserializer
        .end()
        .map_err(|error| json_problem("", &error))?;
    Ok(value)
}

/// Reads a type from a JSON value.
pub fn value<T: DeserializeOwned>(value: Value) -> Result<T, ParseError> {
    strict(value, json_problem)
}

/// Reads a type from the text of a TOML document.
#[expect(
    clippy::disallowed_methods,
    reason = "other code reads TOML through here"
)]
pub fn toml<T: DeserializeOwned>(text: &str) -> Result<T, ParseError> {
    let deserializer =
        ::toml::Deserializer::parse(text).map_err(|error| ParseError::Syntax(error.to_string()))?;
    strict(deserializer, |path, error: &::toml::de::Error| {
        ParseError::Field(words::sentence(path, error.message()))
    })
}

fn json_problem(path: &str, error: &serde_json::Error) -> ParseError {
    let text = error.to_string();
    if error.classify() != Category::Data {
        return ParseError::Syntax(text);
    }
    let place = format!(" at line {} column {}", error.line(), error.column());
    ParseError::Field(words::sentence(
        path,
        text.strip_suffix(&place).unwrap_or(&text),
    ))
}

/// `problem` words an error of the deserializer; it gets the path of the field as well.
fn strict<'de, T: Deserialize<'de>, D: Deserializer<'de>>(
    deserializer: D,
    problem: impl FnOnce(&str, &D::Error) -> ParseError,
) -> Result<T, ParseError> {
    let mut track = Track::new();
    let tracked = serde_path_to_error::Deserializer::new(deserializer, &mut track);
    T::deserialize(Strict(tracked)).map_err(|error| problem(&track.path().to_string(), &error))
}

#[cfg(test)]
mod tests;
