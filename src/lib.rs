//! kdlora: an inference server for distilled text classifiers.
//!
//! One small *student* encoder stays in memory; each *task* brings a LoRA *adapter* and a head.
//! The server batches requests of all tasks together, and makes adapters itself by distilling a
//! larger *teacher* (KD-LoRA, arXiv 2410.20777).
//!
//! The floors of the house, lowest first; a module uses only those above its line here:
//!
//! - [`parse`]: reads JSON and TOML, strictly.
//! - [`files`], [`blocking`]: regular files up to a size; blocking inside async code.
//! - [`telemetry`]: logs, metrics, memory; every floor records there.
//! - [`private_folders`]: paths kept out of what clients read.
//! - [`lfs`]: how Git LFS pointers are told from the files that they stand for.
//! - [`ops`]: the fused operations the network is made of, with their backward passes.
//! - [`text`]: inputs, tokenizer, sequences, packed batches.
//! - [`encoder`]: the transformer families, their heads, and LoRA on any of their linears.
//! - [`adapter`]: PEFT folders in and out, and a classifier that is ready to answer.
//! - [`store`]: the state folder: jobs, versions, history, artifacts.
//! - [`hub`]: encoders by catalog name, fetched and verified.
//! - [`serving`]: admission, queue, batcher, workers, the live task table.
//! - [`distill`]: data sets, teachers, training, evaluation, reports, jobs.
//! - [`http`]: routes, errors, limits.
//! - [`config`]: what the user typed, checked and made whole.
//! - [`cli`]: one file a command.
//!
//! `serving` and `distill` never import each other.

// Tests read what the program itself wrote.
#![cfg_attr(not(test), deny(clippy::disallowed_methods))]

pub mod adapter;
pub mod blocking;
pub mod cli;
pub mod config;
pub mod distill;
pub mod encoder;
pub mod files;
pub mod http;
pub mod hub;
pub mod lfs;
pub mod ops;
pub mod parse;
pub mod private_folders;
pub mod serving;
pub mod store;
pub mod telemetry;
pub mod text;
