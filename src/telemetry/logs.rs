//! Logs go to standard error, so that standard output stays for what a command prints.

use std::io::{self, IsTerminal};

use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer as _};

use super::traces::{self, Flush, TracesError};

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

/// Why logging can't be started.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    #[error(
        "the log filter {filter:?} can't be read; write a level (info) or target=level pairs, comma-separated"
    )]
    Filter {
        filter: String,
        #[source]
        source: tracing_subscriber::filter::ParseError,
    },
    #[error(transparent)]
    Traces(#[from] TracesError),
}

/// Starts logging for this process, and traces if a collector is named. `filter` is a level or a
/// list of `target=level`. A second call changes nothing: the first one of a process counts.
///
/// Traces are sent until the value that comes back is dropped.
pub fn init(
    filter: &str,
    format: LogFormat,
    otlp_endpoint: Option<&str>,
) -> Result<Option<Flush>, LogError> {
    let unreadable = |source| LogError::Filter {
        filter: filter.to_owned(),
        source,
    };
    let env_filter = EnvFilter::try_new(filter).map_err(unreadable)?;
    // What administrators do is written down whatever else is.
    let env_filter = match filter.contains(AUDIT) {
        true => env_filter,
        false => env_filter.add_directive(format!("{AUDIT}=info").parse().map_err(unreadable)?),
    };
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal());
    let lines = match format {
        LogFormat::Text => lines.boxed(),
        // Of nested spans the innermost has what a line needs to be found by: the request's id.
        LogFormat::Json => lines
            .json()
            .flatten_event(true)
            .with_span_list(false)
            .boxed(),
    };
    let (traces, flush) = match otlp_endpoint {
        None => (None, None),
        Some(endpoint) => {
            let (layer, flush) = traces::layer(endpoint)?;
            (Some(layer), Some(flush))
        }
    };
    let started = tracing_subscriber::registry()
        .with(traces)
        .with(lines.with_filter(env_filter))
        .try_init();
    if started.is_err() {
        tracing::debug!("logging was started before");
    }
    Ok(flush)
}
