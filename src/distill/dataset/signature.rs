//! Formats that a file is in though its name says another one, told by its first bytes.

/// First bytes, what they are, and what to do about it. The longer of two that begin alike is first.
const SIGNATURES: &[(&[u8], &str, &str)] = &[
    (b"\x1f\x8b", "compressed with gzip", DECOMPRESS),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd", DECOMPRESS),
    (b"\xfd7zXZ\0", "compressed with xz", DECOMPRESS),
    (b"BZh91AY", "compressed with bzip2", DECOMPRESS),
    (
        b"PK\x03\x04",
        "a ZIP archive or an Excel workbook",
        "export it as CSV, or unpack it",
    ),
    (b"\xd0\xcf\x11\xe0", "an Excel workbook", "export it as CSV"),
    (PARQUET, "Parquet", "name it .parquet"),
    (b"ARROW1", "an Arrow file", "write it as Parquet"),
    (b"\xff\xfe\0\0", "UTF-32 text", CONVERT),
    (b"\0\0\xfe\xff", "UTF-32 text", CONVERT),
    (b"\xff\xfe", "UTF-16 text", CONVERT),
    (b"\xfe\xff", "UTF-16 text", CONVERT),
    (
        b"version https://git-lfs",
        "a Git LFS pointer",
        "fetch the file itself with git lfs pull",
    ),
];

/// The magic number, and the first byte of a page header behind it.
const PARQUET: &[u8] = b"PAR1\x15";
const DECOMPRESS: &str = "decompress it first";
const CONVERT: &str = "convert it to UTF-8";

/// The byte order mark that UTF-8 text may begin with.
pub(super) const UTF8_MARK: &[u8] = b"\xef\xbb\xbf";

/// The number of bytes that [`foreign`] looks at.
pub(super) const LONGEST: u64 = 24;

/// Returns what a file is, and what to do about it, if its first bytes show another format than
/// the text or the Parquet that its name promises.
pub(super) fn foreign(head: &[u8], is_parquet: bool) -> Option<(&'static str, &'static str)> {
    SIGNATURES
        .iter()
        .find(|(bytes, _, _)| head.starts_with(bytes))
        .filter(|(bytes, _, _)| !(is_parquet && *bytes == PARQUET))
        .map(|&(_, what, remedy)| (what, remedy))
}
