//! Logs, metrics, traces and memory. Lower floors of the house record here; nothing here knows them.

mod gpu;
pub mod logs;
pub mod memory;
mod metrics;
mod otlp;
mod request;
pub mod traces;

pub use metrics::{MeasuredLatency, Metrics};
pub use request::{Outcome, RequestGuard};

/// An error and its causes in one line: `outer: inner: innermost`.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        // Some errors repeat their cause in their own text.
        if !text.ends_with(&next) {
            text.push_str(": ");
            text.push_str(&next);
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chain_names_each_cause_once() {
        #[derive(Debug, thiserror::Error)]
        #[error("inner")]
        struct Inner;
        #[derive(Debug, thiserror::Error)]
        #[error("outer")]
        struct Outer(#[source] Inner);
        assert_eq!(chain(&Outer(Inner)), "outer: inner");
    }
}
