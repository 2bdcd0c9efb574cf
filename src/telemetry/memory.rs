//! Memory of this process, as the kernel counts it.

use std::fs;

/// The greatest resident set of this process so far, in bytes (`VmHWM` of `/proc/self/status`);
/// `None` where the kernel does not say.
pub fn peak_resident_bytes() -> Option<u64> {
    status_bytes("VmHWM:")
}

/// Lets the peak begin anew at what is resident at this moment (`/proc/self/clear_refs`, see
/// proc_pid_clear_refs(5)). Where the kernel refuses, the peak goes on as it was.
pub fn reset_peak() {
    let _ = fs::write("/proc/self/clear_refs", "5");
}

/// The resident set of this process, in bytes (`VmRSS` of `/proc/self/status`); `None` where the
/// kernel does not say.
pub fn resident_bytes() -> Option<u64> {
    status_bytes("VmRSS:")
}

/// Memory that the process `id` has for itself, in bytes: its anonymous and shared memory, in RAM
/// or swapped out. Pages of mapped files, which the kernel can drop, are not among it. `None` if
/// the process is gone, or where the kernel does not say.
pub fn own_bytes_of(id: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{id}/status")).ok()?;
    let parts = ["RssAnon:", "RssShmem:", "VmSwap:"];
    parts
        .into_iter()
        .map(|part| parse_kibibytes(&status, part))
        .sum()
}

fn status_bytes(field: &str) -> Option<u64> {
    parse_kibibytes(&fs::read_to_string("/proc/self/status").ok()?, field)
}

/// `VmHWM:     1234 kB` → 1263616.
fn parse_kibibytes(status: &str, field: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix(field))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kibibytes.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_a_field_in_kibibytes() {
        let status = "Name:\tx\nVmHWM:\t    1234 kB\nVmRSS:\t      10 kB\n";
        assert_eq!(parse_kibibytes(status, "VmHWM:"), Some(1234 * 1024));
        assert_eq!(parse_kibibytes(status, "VmRSS:"), Some(10 * 1024));
        assert_eq!(parse_kibibytes(status, "VmSwap:"), None);
        assert_eq!(parse_kibibytes("VmHWM: many kB", "VmHWM:"), None);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn the_peak_covers_what_was_touched() {
        let touched = std::hint::black_box(vec![1u8; 32 << 20]);
        assert!(peak_resident_bytes().unwrap() >= touched.len() as u64);
        assert!(resident_bytes().unwrap() > 0);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn what_was_touched_is_the_own_memory_of_a_process() {
        let id = std::process::id();
        let touched = std::hint::black_box(vec![1u8; 48 << 20]);
        assert!(own_bytes_of(id).unwrap() >= touched.len() as u64);
        // Greater than any process id.
        assert_eq!(own_bytes_of(u32::MAX), None);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_reset_never_raises_the_peak() {
        drop(std::hint::black_box(vec![1u8; 64 << 20]));
        let before = peak_resident_bytes().unwrap();
        reset_peak();
        assert!(peak_resident_bytes().unwrap() <= before.max(resident_bytes().unwrap()));
    }
}
