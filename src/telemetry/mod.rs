//! Logs, metrics and memory.

pub mod memory;
