//! How the allocator gets memory from the system.

#[cfg(target_os = "linux")]
use std::{env, os::unix::process::CommandExt as _, process::Command};

/// Where jemalloc, with the prefix of its crate, looks for options when a process starts.
#[cfg(target_os = "linux")]
const OPTIONS: &str = "_RJEM_MALLOC_CONF";

/// Starts the program again in this process, with pages of 2 MiB, unless the environment has
/// options already.
///
/// A training step makes and drops hundreds of tensors of megabytes: with pages of 4 KiB a quarter
/// of its time goes to the kernel, which maps and clears them one by one. A server keeps its
/// buffers, gains nothing, and would take a fifth more memory.
#[cfg(target_os = "linux")]
pub(super) fn use_huge_pages() {
    if env::var_os(OPTIONS).is_some() {
        return;
    }
    if let Ok(program) = env::current_exe() {
        let mut again = Command::new(program);
        again
            .args(env::args_os().skip(1))
            .env(OPTIONS, "thp:always");
        // It comes back only if it fails: the pass is slower then, and as right.
        let _ = again.exec();
    }
}

#[cfg(not(target_os = "linux"))]
pub(super) fn use_huge_pages() {}
