//! The Prometheus registry and everything in it.

use prometheus::{IntGauge, Registry, TextEncoder};

use super::memory;

/// All metrics of a server. Each has a registry of its own, so that tests can run several servers
/// in one process.
pub struct Metrics {
    registry: Registry,
    process_resident: IntGauge,
    process_peak: IntGauge,
}

impl Metrics {
    pub fn new() -> Result<Self, prometheus::Error> {
        let registry = Registry::new();
        let gauge = |name: &str, help: &str| -> Result<IntGauge, prometheus::Error> {
            let gauge = IntGauge::new(name, help)?;
            registry.register(Box::new(gauge.clone()))?;
            Ok(gauge)
        };
        Ok(Self {
            process_resident: gauge(
                "kdlora_process_resident_memory_bytes",
                "Resident memory of the server process.",
            )?,
            process_peak: gauge(
                "kdlora_process_peak_resident_memory_bytes",
                "Highest resident memory of the server process so far.",
            )?,
            registry,
        })
    }

    /// All metrics in the text format of Prometheus.
    pub fn render(&self) -> Result<String, prometheus::Error> {
        if let Some(bytes) = memory::resident_bytes() {
            self.process_resident.set(bytes as i64);
        }
        if let Some(bytes) = memory::peak_resident_bytes() {
            self.process_peak.set(bytes as i64);
        }
        TextEncoder::new().encode_to_string(&self.registry.gather())
    }
}
