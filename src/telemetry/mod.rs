//! Logs, metrics and memory. Lower floors of the house record here; nothing here knows them.

pub mod logs;
pub mod memory;
mod metrics;

pub use metrics::Metrics;
