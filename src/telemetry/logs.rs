//! Logs go to standard error, so that standard output stays for what a command prints.

use std::io::{self, IsTerminal};

use tracing_subscriber::EnvFilter;

/// How a log line looks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// Target of the lines about what administrators do.
pub const AUDIT: &str = "audit";

/// A filter that can't be parsed.
#[derive(Debug, thiserror::Error)]
#[error(
    "the log filter {filter:?} can't be read; write a level (info) or target=level pairs, comma-separated"
)]
pub struct LogFilterError {
    filter: String,
    #[source]
    source: tracing_subscriber::filter::ParseError,
}

/// Starts logging for this process. `filter` is a level or a list of `target=level`.
/// A second call changes nothing: the first one of a process counts.
pub fn init(filter: &str, format: LogFormat) -> Result<(), LogFilterError> {
    let unreadable = |source| LogFilterError {
        filter: filter.to_owned(),
        source,
    };
    let env_filter = EnvFilter::try_new(filter).map_err(unreadable)?;
    // What administrators do is written down whatever else is.
    let env_filter = match filter.contains(AUDIT) {
        true => env_filter,
        false => env_filter.add_directive(format!("{AUDIT}=info").parse().map_err(unreadable)?),
    };
    let builder = tracing_subscriber::fmt()
        .with_env_filter(env_filter)
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal());
    let started = match format {
        LogFormat::Text => builder.try_init(),
        // Of nested spans the innermost has what a line needs to be found by: the request's id.
        LogFormat::Json => builder
            .json()
            .flatten_event(true)
            .with_span_list(false)
            .try_init(),
    };
    if started.is_err() {
        tracing::debug!("logging was started before");
    }
    Ok(())
}
