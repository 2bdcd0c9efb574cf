//! Why a load could not be offered at all. What single requests meet is not an error but a figure
//! of the report.

use std::error::Error;
use std::io;
use std::path::PathBuf;

#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    #[error("can't start the runtime")]
    Runtime(#[source] io::Error),
    #[error("can't read {path:?}")]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("can't write {path:?}")]
    Write {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{path:?}, line {line}: not a row with a text")]
    Row {
        path: PathBuf,
        line: usize,
        #[source]
        source: serde_json::Error,
    },
    #[error("{path:?} is not a report of this program")]
    Report {
        path: PathBuf,
        #[source]
        source: serde_json::Error,
    },
    #[error("can't write the report as JSON")]
    Json(#[source] serde_json::Error),
    #[error("{url:?} is not a URL that can be asked: {reason}")]
    Url { url: String, reason: &'static str },
    #[error("the server at {authority} can't be reached")]
    Unreachable {
        authority: String,
        #[source]
        source: io::Error,
    },
    #[error("no answer from {path}")]
    NoAnswer {
        path: String,
        #[source]
        source: Box<dyn Error + Send + Sync>,
    },
    #[error("{path} answered {status}: {body}")]
    Status {
        path: String,
        status: u16,
        body: String,
    },
    #[error("the answer of {path} is not what was expected")]
    Answer {
        path: String,
        #[source]
        source: serde_json::Error,
    },
    /// What was asked for can't be done; the sentence says what would.
    #[error("{0}")]
    Usage(String),
}

impl Failure {
    /// The error with its causes, in one line.
    pub(crate) fn chain(&self) -> String {
        let mut text = self.to_string();
        let mut cause = self.source();
        while let Some(error) = cause {
            text = format!("{text}: {error}");
            cause = error.source();
        }
        text
    }
}
