//! Distillation: data set, teacher, training, evaluation, gate, report, and the job that runs them.

pub mod progress;
pub mod rng;
pub mod spec;
