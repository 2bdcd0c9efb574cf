//! How many files and connections the process may have open.

use rustix::process::{Resource, getrlimit, setrlimit};

use crate::http::server::RESERVE;

/// File descriptors that are kept for everything but connections: the database, logs, models that
/// are being read, and the pipes of a job's process.
const OTHERS: u64 = 128;

/// Raises the soft limit of file descriptors to the hard one, and returns how many of `wanted`
/// connections fit in.
pub(super) fn fit(wanted: usize) -> usize {
    let mut limits = getrlimit(Resource::Nofile);
    let raised = rustix::process::Rlimit {
        current: limits.maximum,
        ..limits
    };
    match setrlimit(Resource::Nofile, raised) {
        Ok(()) => limits = raised,
        Err(error) => tracing::warn!(%error, "the limit of open files can't be raised"),
    }
    let fitting = limits.current.map_or(wanted, |most| fitting(most, wanted));
    if fitting < wanted {
        tracing::warn!(
            open_files = limits.current,
            "--max-connections is lowered from {wanted} to {fitting}: the process may not open \
             more files (ulimit -n)"
        );
    }
    fitting
}

fn fitting(descriptors: u64, wanted: usize) -> usize {
    let reserve = u64::try_from(RESERVE).unwrap_or(u64::MAX);
    let left = descriptors.saturating_sub(OTHERS + 2 * reserve);
    usize::try_from(left).unwrap_or(usize::MAX).clamp(1, wanted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_left_for_others() {
        assert_eq!(fitting(65_536, 1024), 1024);
        assert_eq!(fitting(1024, 1024), 1024 - 128 - 32);
        assert_eq!(fitting(20, 1024), 1);
    }
}
