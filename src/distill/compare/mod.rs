//! `kdlora compare`: the ways to make a classifier side by side, on the user's own data.
//!
//! A comparison is a table of rows (ways) and seeds. Each of its cells is trained in a process of
//! its own and scored in another, and its result is kept, so that a comparison that was stopped, or
//! asked for more, does only what is missing.

mod cell;
mod files;
mod latency;
mod markdown;
mod picture;
mod plan;
mod run;
mod spec;
mod table;

pub use cell::{Order, Work, carry_out};
pub use latency::RowLatency;
pub use plan::{Cell, cells};
pub use run::{Announcement, run};
pub use spec::{CompareSpec, CompareSpecError, FullSpec, Method, Schedule, Variant};
pub use table::{Comparison, Difference, Machine, RowSummary, SeedScore};

use super::PassError;
use super::dataset::DataError;
use super::evaluation::EvaluationError;
use super::training::TrainError;
use crate::adapter::AdapterError;
use crate::encoder::EncoderError;

/// Why a comparison ended without its table.
#[derive(Debug, thiserror::Error)]
pub enum CompareError {
    #[error(transparent)]
    Spec(#[from] CompareSpecError),
    #[error(transparent)]
    Pass(#[from] PassError),
    #[error(transparent)]
    Data(#[from] DataError),
    #[error(transparent)]
    Encoder(#[from] EncoderError),
    #[error(transparent)]
    Adapter(#[from] AdapterError),
    #[error(transparent)]
    Train(#[from] TrainError),
    #[error(transparent)]
    Evaluation(#[from] EvaluationError),
    #[error(transparent)]
    Compute(#[from] candle_core::Error),
    #[error("the files of the comparison cannot be used")]
    Files(#[from] std::io::Error),
    #[error("the process of {cell} ended with {status}; what it said stands above")]
    Process {
        cell: String,
        status: std::process::ExitStatus,
    },
}
