//! Black-box tests: the real program over HTTP and on the command line, the library beside golden files.
//!
//! They are one executable, since each one links the whole program. A module is one subject;
//! `cargo test --test it jobs::` runs the tests of one.

mod common;

mod adapters;
mod command_line;
mod compare;
mod depth;
mod families;
#[cfg(feature = "cuda")]
mod gpu;
mod jobs;
mod kills;
mod many_tasks;
mod ready_made;
mod resume;
mod serve;
mod teachers;
mod texts;
mod traces;
mod uploads;
mod versions;
