//! Records of a text table: CSV as in RFC 4180, or TSV, where quotes are ordinary characters.
//!
//! The crate `csv` reads any text: a quote that never closes takes in the rest of the file, and
//! text behind a closing quote is added to the cell. Both merge rows unnoticed, so this reader
//! reports them. It also bounds the memory of a record while it reads, not afterwards.

use std::io::{self, BufRead};

use super::{MAX_COLUMNS, MAX_ROW_BYTES};

/// Reads a table record by record.
pub(super) struct Table<R> {
    file: R,
    delimiter: u8,
    /// Whether a cell may stand in quotes.
    quoting: bool,
    /// The line of the next byte, counted from 1.
    line: usize,
    /// Whether the last line ended in `\r`: a `\n` then belongs to the same line end.
    after_return: bool,
    record: Record,
}

/// The cells of one record, without their quotes.
#[derive(Debug, Default)]
pub(super) struct Record {
    /// The line in which it begins, counted from 1.
    pub(super) line: usize,
    /// How many cells it has, including those that are not kept.
    pub(super) cells: usize,
    /// Longer than [`MAX_ROW_BYTES`]; its end is not kept.
    pub(super) too_long: bool,
    /// Whether a quoted cell goes over several lines.
    pub(super) spans_lines: bool,
    /// Whether a cell has spaces before a quote, which is then part of the cell.
    pub(super) spaced_quote: bool,
    /// All cells one after the other.
    text: String,
    /// The end of each cell in `text`.
    ends: Vec<usize>,
}

/// Why a table cannot be read any further.
#[derive(Debug)]
pub(super) enum TableError {
    Io(io::Error),
    NotUtf8 {
        line: usize,
    },
    /// The quotes do not follow RFC 4180.
    Quotes {
        line: usize,
        reason: String,
    },
}

/// Where the reader is within a record.
#[derive(Clone, Copy, PartialEq)]
enum At {
    CellStart,
    Bare,
    Quoted,
    /// Behind a quote within quotes: it closes the cell, or is the first of two.
    Quote,
}

impl<R: BufRead> Table<R> {
    pub(super) fn new(file: R, delimiter: u8, quoting: bool) -> Self {
        Self {
            file,
            delimiter,
            quoting,
            line: 1,
            after_return: false,
            record: Record::default(),
        }
    }

    /// Returns the next record; empty lines are skipped.
    pub(super) fn read(&mut self) -> Result<Option<&Record>, TableError> {
        let mut bytes = std::mem::take(&mut self.record.text).into_bytes();
        loop {
            bytes.clear();
            if !self.read_line(&mut bytes)? {
                return Ok(None);
            }
            if self.record.cells > 0 {
                break;
            }
        }
        if self.record.too_long {
            // The cut may have parted a character.
            bytes.clear();
            self.record.ends.clear();
        }
        let line = self.record.line;
        self.record.text = String::from_utf8(bytes).map_err(|_| TableError::NotUtf8 { line })?;
        Ok(Some(&self.record))
    }

    /// Returns the record that was read last.
    pub(super) fn current(&self) -> &Record {
        &self.record
    }

    /// Reads one record, or an empty line, which has no cells. Returns false at the end of the
    /// file.
    fn read_line(&mut self, bytes: &mut Vec<u8>) -> Result<bool, TableError> {
        self.record.begin(self.line);
        let mut at = At::CellStart;
        let mut opened = self.line;
        let mut read = 0usize;
        loop {
            let available = match self.file.fill_buf() {
                Ok(available) => available,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(TableError::Io(error)),
            };
            if available.is_empty() {
                if at == At::Quoted {
                    return Err(TableError::open_quote(opened));
                }
                self.record.end_line(bytes, at);
                return Ok(read > 0);
            }
            let mut used = 0;
            for &byte in available {
                used += 1;
                if std::mem::take(&mut self.after_return) && byte == b'\n' {
                    continue;
                }
                read += 1;
                self.record.too_long |= read > MAX_ROW_BYTES;
                at = match (at, byte) {
                    (At::Quoted, b'"') => At::Quote,
                    (At::Quoted, _) => {
                        self.line += usize::from(byte == b'\n');
                        self.record.spans_lines |= byte == b'\n';
                        self.record.push(bytes, byte);
                        At::Quoted
                    }
                    (At::Quote, b'"') => {
                        self.record.push(bytes, byte);
                        At::Quoted
                    }
                    (_, b'\n' | b'\r') => {
                        self.after_return = byte == b'\r';
                        self.line += 1;
                        self.record.end_line(bytes, at);
                        self.file.consume(used);
                        return Ok(true);
                    }
                    (_, byte) if byte == self.delimiter => {
                        self.record.end_cell(bytes);
                        At::CellStart
                    }
                    (At::Quote, _) => {
                        return Err(TableError::text_after_quote(opened, self.line));
                    }
                    (At::CellStart, b'"') if self.quoting => {
                        opened = self.line;
                        At::Quoted
                    }
                    (At::CellStart | At::Bare, _) => {
                        if byte == b'"' && self.quoting {
                            self.record.spaced_quote |= self.record.is_spaces(bytes);
                        }
                        self.record.push(bytes, byte);
                        At::Bare
                    }
                };
            }
            self.file.consume(used);
        }
    }
}

impl Record {
    fn begin(&mut self, line: usize) {
        let mut ends = std::mem::take(&mut self.ends);
        ends.clear();
        *self = Self {
            line,
            ends,
            ..Self::default()
        };
    }

    fn push(&self, bytes: &mut Vec<u8>, byte: u8) {
        if !self.too_long {
            bytes.push(byte);
        }
    }

    fn end_line(&mut self, bytes: &[u8], at: At) {
        if at != At::CellStart || self.cells > 0 {
            self.end_cell(bytes);
        }
    }

    fn end_cell(&mut self, bytes: &[u8]) {
        self.cells += 1;
        if self.ends.len() < MAX_COLUMNS {
            self.ends.push(bytes.len());
        }
    }

    /// Whether the cell that is being read has spaces only so far.
    fn is_spaces(&self, bytes: &[u8]) -> bool {
        let begin = self.ends.last().copied().unwrap_or(0);
        bytes[begin..].iter().all(|&byte| byte == b' ')
    }

    /// Returns the cells, at most [`MAX_COLUMNS`]; none if the record is too long.
    pub(super) fn iter(&self) -> impl Iterator<Item = &str> {
        let begins = std::iter::once(0).chain(self.ends.iter().copied());
        let bounds = begins.zip(self.ends.iter().copied());
        bounds.map(|(begin, end)| &self.text[begin..end])
    }

    pub(super) fn has_nul(&self) -> bool {
        self.text.contains('\0')
    }

    /// Returns one cell, if it is there and is kept.
    pub(super) fn get(&self, place: usize) -> Option<&str> {
        let begin = match place.checked_sub(1) {
            Some(before) => *self.ends.get(before)?,
            None => 0,
        };
        self.text.get(begin..*self.ends.get(place)?)
    }
}

impl TableError {
    fn open_quote(opened: usize) -> Self {
        Self::Quotes {
            line: opened,
            reason: "it opens a quote that never closes; is a closing quote missing?".into(),
        }
    }

    fn text_after_quote(opened: usize, closed: usize) -> Self {
        Self::Quotes {
            line: opened,
            reason: format!(
                "the cell goes on behind the quote that closes it in line {closed}; is a closing \
                 quote missing, or one within the cell not doubled?"
            ),
        }
    }

    pub(super) fn swallowed_rows(line: usize) -> Self {
        Self::Quotes {
            line,
            reason: "its cell in quotes holds lines that read like rows; is a closing quote \
                     missing?"
                .into(),
        }
    }
}
