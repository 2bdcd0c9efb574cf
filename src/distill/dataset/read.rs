//! Rows as they stand in a file or a request, before it is known what their labels mean.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read as _};
use std::path::Path;

use serde_json::Value;

use super::error::{DataError, Origin};
use super::fields::{
    RawLabel, kind, label_name, label_of, logits_of, not_blank, shortened, text_of,
};
use super::{MAX_FILE_BYTES, MAX_REJECTIONS, MAX_ROW_BYTES, MAX_ROWS, Rejection, Split};
use crate::distill::spec::SplitSpec;
use crate::text::Input;

/// The fields of a row, and the names of the columns of a table.
const FIELDS: [&str; 4] = ["text", "text_pair", "label", "teacher_logits"];
/// Unread fields that are named; a wide table would fill the report.
const MAX_IGNORED: usize = 20;

/// The rows of one split, in order.
pub(super) struct RawSplit {
    pub(super) origin: Origin,
    pub(super) rows: Vec<RawRow>,
    pub(super) rejected: Rejected,
    pub(super) ignored_fields: BTreeSet<String>,
}

pub(super) struct RawRow {
    /// Counted from 1.
    pub(super) line: usize,
    pub(super) input: Input,
    pub(super) label: Option<RawLabel>,
    pub(super) teacher_logits: Option<Vec<f32>>,
}

/// Rows left out: all are counted, the first are kept.
#[derive(Default)]
pub(super) struct Rejected {
    pub(super) count: usize,
    pub(super) first: Vec<Rejection>,
}

impl Rejected {
    pub(super) fn add(&mut self, split: Split, line: usize, reason: String) {
        self.count += 1;
        if self.first.len() < MAX_REJECTIONS {
            self.first.push(Rejection {
                split,
                line,
                reason,
            });
        }
    }
}

/// Reads one split. Rows that cannot be used are rejected, each with its reason.
pub(super) fn read(split: Split, spec: &SplitSpec) -> Result<RawSplit, DataError> {
    let path = match spec {
        SplitSpec::Rows(_) => None,
        SplitSpec::Path(path) => Some(path.clone()),
    };
    let mut raw = RawSplit {
        origin: Origin { split, path },
        rows: Vec::new(),
        rejected: Rejected::default(),
        ignored_fields: BTreeSet::new(),
    };
    match spec {
        SplitSpec::Rows(rows) => {
            for (i, row) in rows.iter().enumerate() {
                let parsed = raw.parse_object(row);
                raw.push(i + 1, parsed)?;
            }
        }
        SplitSpec::Path(path) => raw.read_file(path)?,
    }
    if raw.rows.is_empty() && raw.rejected.count == 0 {
        return Err(DataError::Empty { origin: raw.origin });
    }
    Ok(raw)
}

/// A row but for its line.
type Parsed = Result<(Input, Option<RawLabel>, Option<Vec<f32>>), String>;

impl RawSplit {
    fn push(&mut self, line: usize, parsed: Parsed) -> Result<(), DataError> {
        match parsed {
            Ok((input, label, teacher_logits)) => self.rows.push(RawRow {
                line,
                input,
                label,
                teacher_logits,
            }),
            Err(reason) => self.rejected.add(self.origin.split, line, reason),
        }
        if self.rows.len() + self.rejected.count > MAX_ROWS {
            return Err(DataError::TooManyRows {
                origin: self.origin.clone(),
            });
        }
        Ok(())
    }

    fn read_file(&mut self, path: &Path) -> Result<(), DataError> {
        let extension = path
            .extension()
            .and_then(|extension| extension.to_str())
            .map(str::to_ascii_lowercase);
        let delimiter = match extension.as_deref() {
            Some("jsonl" | "ndjson" | "json") => None,
            Some("csv") => Some(b','),
            Some("tsv") => Some(b'\t'),
            _ => {
                return Err(DataError::UnknownFormat {
                    origin: self.origin.clone(),
                });
            }
        };
        // A pipe or a device would block at opening or never end.
        let metadata = std::fs::metadata(path).map_err(|e| self.io(e))?;
        if !metadata.is_file() {
            return Err(DataError::NotAFile {
                origin: self.origin.clone(),
            });
        }
        if metadata.len() > MAX_FILE_BYTES {
            return Err(DataError::TooLarge {
                origin: self.origin.clone(),
                bytes: metadata.len(),
            });
        }
        let file = File::open(path).map_err(|e| self.io(e))?;
        let file = BufReader::with_capacity(1 << 16, file.take(MAX_FILE_BYTES));
        match delimiter {
            None => self.read_json_lines(file),
            Some(delimiter) => self.read_table(file, delimiter),
        }
    }

    fn io(&self, source: io::Error) -> DataError {
        DataError::Read {
            origin: self.origin.clone(),
            source,
        }
    }

    fn not_utf8(&self, line: usize) -> DataError {
        DataError::NotUtf8 {
            origin: self.origin.clone(),
            line,
        }
    }

    fn read_json_lines(&mut self, mut file: impl BufRead) -> Result<(), DataError> {
        let mut bytes = Vec::new();
        let mut line = 0;
        loop {
            line += 1;
            match read_line(&mut file, &mut bytes).map_err(|e| self.io(e))? {
                Line::End => return Ok(()),
                Line::TooLong => {
                    let reason = format!("longer than {MAX_ROW_BYTES} bytes");
                    self.push(line, Err(reason))?;
                    continue;
                }
                Line::Complete => {}
            }
            let text = std::str::from_utf8(&bytes).map_err(|_| self.not_utf8(line))?;
            let text = match line {
                1 => text.trim_start_matches('\u{feff}').trim(),
                _ => text.trim(),
            };
            if text.is_empty() {
                continue;
            }
            let parsed = match serde_json::from_str::<Value>(text) {
                Ok(row) => self.parse_object(&row),
                Err(_) if line == 1 && text.starts_with('[') => {
                    return Err(DataError::JsonArray {
                        origin: self.origin.clone(),
                    });
                }
                Err(error) => Err(format!("not JSON: {error}")),
            };
            self.push(line, parsed)?;
        }
    }

    /// CSV as in RFC 4180, or TSV, in which quotes are ordinary characters.
    fn read_table(&mut self, file: impl BufRead, delimiter: u8) -> Result<(), DataError> {
        let mut table = csv::ReaderBuilder::new()
            .delimiter(delimiter)
            .quoting(delimiter == b',')
            .flexible(true)
            .from_reader(file);
        let header = match table.headers() {
            Ok(header) => header.clone(),
            Err(error) => return Err(self.csv(error)),
        };
        let columns = self.columns(&header)?;
        let mut record = csv::StringRecord::new();
        while table
            .read_record(&mut record)
            .map_err(|error| self.csv(error))?
        {
            let line = record.position().map_or(0, |p| p.line() as usize);
            self.push(line, parse_record(&record, header.len(), columns))?;
        }
        Ok(())
    }

    fn csv(&self, error: csv::Error) -> DataError {
        match error.kind() {
            csv::ErrorKind::Utf8 { pos, .. } => {
                self.not_utf8(pos.as_ref().map_or(1, |p| p.line() as usize))
            }
            _ => DataError::Csv {
                origin: self.origin.clone(),
                source: error,
            },
        }
    }

    /// The place of each of [`FIELDS`] in the table.
    fn columns(
        &mut self,
        header: &csv::StringRecord,
    ) -> Result<[Option<usize>; FIELDS.len()], DataError> {
        let mut columns = [None; FIELDS.len()];
        for (i, name) in header.iter().enumerate() {
            let name = name.trim();
            match FIELDS.iter().position(|field| *field == name) {
                Some(field) if columns[field].is_some() => {
                    return Err(DataError::Header {
                        origin: self.origin.clone(),
                        reason: format!("it names \"{name}\" twice"),
                    });
                }
                Some(field) => columns[field] = Some(i),
                None => self.ignore(name),
            }
        }
        if header.is_empty() {
            return Err(DataError::Empty {
                origin: self.origin.clone(),
            });
        }
        if columns[0].is_none() {
            let found: Vec<&str> = header.iter().take(MAX_IGNORED).collect();
            return Err(DataError::Header {
                origin: self.origin.clone(),
                reason: format!(
                    "the first line must name the columns, among them \"text\"; it reads \"{}\"",
                    shortened(&found.join(", "))
                ),
            });
        }
        Ok(columns)
    }

    fn ignore(&mut self, field: &str) {
        if self.ignored_fields.len() < MAX_IGNORED && !self.ignored_fields.contains(field) {
            self.ignored_fields.insert(shortened(field));
        }
    }

    fn parse_object(&mut self, row: &Value) -> Parsed {
        let Value::Object(fields) = row else {
            return Err(format!("{} instead of an object", kind(row)));
        };
        for field in fields.keys() {
            if !FIELDS.contains(&field.as_str()) {
                self.ignore(field);
            }
        }
        let Some(text) = fields.get("text") else {
            let found: Vec<&str> = fields.keys().take(8).map(String::as_str).collect();
            return Err(format!(
                "no \"text\" (its fields: {})",
                shortened(&found.join(", "))
            ));
        };
        let input = Input {
            text: text_of("text", text)?,
            text_pair: match fields.get("text_pair") {
                None | Some(Value::Null) => None,
                Some(value) => Some(text_of("text_pair", value)?),
            },
        };
        let label = match fields.get("label") {
            None => None,
            Some(value) => label_of(value)?,
        };
        let teacher_logits = match fields.get("teacher_logits") {
            None => None,
            Some(value) => logits_of(value)?,
        };
        Ok((input, label, teacher_logits))
    }
}

enum Line {
    Complete,
    TooLong,
    End,
}

/// Reads one line into `bytes`, without its line break. Of a line longer than [`MAX_ROW_BYTES`]
/// the rest is passed over, not kept.
fn read_line(file: &mut impl BufRead, bytes: &mut Vec<u8>) -> io::Result<Line> {
    bytes.clear();
    let mut any = false;
    let mut too_long = false;
    loop {
        let available = match file.fill_buf() {
            Ok(available) => available,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        if available.is_empty() {
            break;
        }
        any = true;
        let newline = available.iter().position(|&byte| byte == b'\n');
        let part = &available[..newline.unwrap_or(available.len())];
        too_long |= bytes.len() + part.len() > MAX_ROW_BYTES;
        if !too_long {
            bytes.extend_from_slice(part);
        }
        let used = part.len() + usize::from(newline.is_some());
        file.consume(used);
        if newline.is_some() {
            break;
        }
    }
    Ok(match (any, too_long) {
        (false, _) => Line::End,
        (true, true) => Line::TooLong,
        (true, false) => Line::Complete,
    })
}

fn parse_record(
    record: &csv::StringRecord,
    width: usize,
    columns: [Option<usize>; FIELDS.len()],
) -> Parsed {
    if record.as_slice().len() > MAX_ROW_BYTES {
        return Err(format!(
            "longer than {MAX_ROW_BYTES} bytes; is a closing quote missing?"
        ));
    }
    if record.len() != width {
        return Err(format!(
            "{} cells where the header names {width} columns",
            record.len()
        ));
    }
    let [text, text_pair, label, logits] =
        columns.map(|column| column.and_then(|i| record.get(i)).unwrap_or_default());
    let input = Input {
        text: not_blank("text", text)?,
        text_pair: match text_pair.trim() {
            "" => None,
            _ => Some(text_pair.to_owned()),
        },
    };
    let label = match label.trim() {
        "" => None,
        cell if cell.starts_with('[') => match serde_json::from_str::<Value>(cell) {
            Ok(list) => label_of(&list)?,
            Err(_) => Some(RawLabel::Cell(label_name(cell)?)),
        },
        cell => Some(RawLabel::Cell(label_name(cell)?)),
    };
    let teacher_logits = match logits.trim() {
        "" => None,
        cell => {
            let list = serde_json::from_str(cell)
                .map_err(|_| format!("teacher_logits is not a list: \"{}\"", shortened(cell)))?;
            logits_of(&list)?
        }
    };
    Ok((input, label, teacher_logits))
}
