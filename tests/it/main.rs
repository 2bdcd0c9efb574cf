//! Black-box tests: the real program over HTTP and on the command line, the library beside golden files.
//!
//! They are one executable, since each one links the whole program. A module is one subject;
//! `cargo test --test it jobs::` runs the tests of one.

mod common;

mod access;
mod adapters;
mod command_line;
mod compare;
mod connections;
mod data;
mod depth;
mod families;
mod full_disk;
#[cfg(feature = "cuda")]
mod gpu;
mod jobs;
mod kills;
mod many_tasks;
mod ready_made;
mod reports;
mod resume;
mod serve;
mod students;
mod teachers;
mod texts;
mod traces;
mod uploads;
mod versions;
mod weights;
