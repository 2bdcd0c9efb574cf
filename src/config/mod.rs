//! What the user typed, checked once and made whole.
//!
//! [`RawServe`] is what was typed: flags, then `KDLORA_…` variables, then a TOML file, the earlier
//! one winning. [`ServeConfig`] is what the program uses; the step between the two fills defaults
//! in and refuses what can't work.

mod compute;
mod edge;
mod raw;
mod serve;
mod units;

pub use compute::{Compute, ComputeError};
pub use edge::EdgeConfig;
pub use raw::RawServe;
pub use serve::{ConfigError, JobGpu, ServeConfig, default_state};
pub use units::{Bytes, DeviceChoice, Dtype, Seconds};
