//! Distillation: data set, teacher, training, evaluation, gate, report, and the job that runs them.

pub mod ask;
pub mod compare;
pub mod courtesy;
pub mod dataset;
pub mod evaluation;
pub mod gate;
pub mod models;
pub mod pass;
mod peak;
pub mod progress;
pub mod report;
pub mod rng;
pub mod runner;
pub mod spec;
pub mod teacher_cache;
pub mod teacher_http;
pub mod training;

pub use pass::PassError;
