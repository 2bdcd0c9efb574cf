//! Logs, metrics and memory.
