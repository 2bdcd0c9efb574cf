//! Rows as they stand in a file or a request, before it is known what their labels mean.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read as _};
use std::path::Path;

use serde_json::Value;

use super::columns::{Columns, FIELDS, LABEL, LOGITS, TEXT, TEXT_PAIR};
use super::error::{DataError, Origin};
use super::fields::{
    Number, RawLabel, kind, label_name, label_of, logits_of, not_blank, shortened, text_of,
};
use super::parquet::ParquetRows;
use super::{MAX_FILE_BYTES, MAX_REJECTIONS, MAX_ROW_BYTES, MAX_ROWS, Rejection, Split};
use crate::distill::spec::SplitSpec;
use crate::parse::{self, ParseError};
use crate::text::Input;

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
pub(super) fn read(
    split: Split,
    spec: &SplitSpec,
    columns: &Columns,
) -> Result<RawSplit, DataError> {
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
                let parsed = raw.parse_object(row, columns);
                raw.push(i + 1, parsed)?;
            }
        }
        SplitSpec::Path(path) => raw.read_file(path, columns)?,
    }
    if raw.rows.is_empty() && raw.rejected.count == 0 {
        return Err(DataError::Empty { origin: raw.origin });
    }
    Ok(raw)
}

/// A row but for its line.
type Parsed = Result<(Input, Option<RawLabel>, Option<Vec<f32>>), String>;

/// The column of each field.
type Places = [Option<usize>; FIELDS.len()];

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

    fn read_file(&mut self, path: &Path, columns: &Columns) -> Result<(), DataError> {
        let Some(format) = Format::of(path) else {
            return Err(DataError::UnknownFormat {
                origin: self.origin.clone(),
            });
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
        let buffered = |file: File| BufReader::with_capacity(1 << 16, file.take(MAX_FILE_BYTES));
        match format {
            Format::JsonLines => self.read_json_lines(buffered(file), columns),
            Format::Table(delimiter) => self.read_table(buffered(file), delimiter, columns),
            Format::Parquet => self.read_parquet(file, columns),
        }
    }

    fn read_parquet(&mut self, file: File, columns: &Columns) -> Result<(), DataError> {
        let origin = self.origin.clone();
        let failed = |reason: String| DataError::Parquet {
            origin: origin.clone(),
            reason,
        };
        let rows = ParquetRows::open(file, columns, MAX_FILE_BYTES).map_err(failed)?;
        for name in &rows.ignored {
            self.ignore(name);
        }
        self.places(&rows.header(), columns)?;
        for (i, row) in rows.rows().map_err(failed)?.enumerate() {
            let parsed = self.parse_object(&row.map_err(failed)?, columns);
            self.push(i + 1, parsed)?;
        }
        Ok(())
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

    fn read_json_lines(
        &mut self,
        mut file: impl BufRead,
        columns: &Columns,
    ) -> Result<(), DataError> {
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
            let parsed = match parse::json::<Value>(text.as_bytes()) {
                Ok(row) => self.parse_object(&row, columns),
                Err(_) if line == 1 && text.starts_with('[') => {
                    return Err(DataError::JsonArray {
                        origin: self.origin.clone(),
                    });
                }
                Err(ParseError::Syntax(problem)) => Err(format!("not JSON: {problem}")),
                Err(ParseError::Field(problem)) => Err(problem),
            };
            self.push(line, parsed)?;
        }
    }

    /// CSV as in RFC 4180, or TSV, in which quotes are ordinary characters.
    fn read_table(
        &mut self,
        file: impl BufRead,
        delimiter: u8,
        columns: &Columns,
    ) -> Result<(), DataError> {
        let mut table = csv::ReaderBuilder::new()
            .delimiter(delimiter)
            .quoting(delimiter == b',')
            .has_headers(false)
            .flexible(true)
            .from_reader(file);
        let mut record = csv::StringRecord::new();
        let mut more = table.read_record(&mut record).map_err(|e| self.csv(e))?;
        if !more {
            return Err(DataError::Empty {
                origin: self.origin.clone(),
            });
        }
        let first = record.clone();
        let mut header: Vec<&str> = first.iter().map(str::trim).collect();
        let has_names = |name: &String| header.contains(&name.as_str());
        if columns.headerless.is_empty() || columns.names(TEXT).iter().any(has_names) {
            more = table.read_record(&mut record).map_err(|e| self.csv(e))?;
        } else {
            header = columns.headerless.to_vec();
        }
        for name in &header {
            if columns.field_of(name).is_none() {
                self.ignore(name);
            }
        }
        let places = self.places(&header, columns)?;
        while more {
            let line = record.position().map_or(0, |p| p.line() as usize);
            let parsed = parse_record(&record, header.len(), places, columns);
            self.push(line, parsed)?;
            more = table.read_record(&mut record).map_err(|e| self.csv(e))?;
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

    /// The place of each field among named columns.
    fn places(&self, header: &[&str], columns: &Columns) -> Result<Places, DataError> {
        let unusable = |reason: String| DataError::Header {
            origin: self.origin.clone(),
            reason,
        };
        for (i, name) in header.iter().enumerate() {
            if columns.field_of(name).is_some() && header[..i].contains(name) {
                return Err(unusable(format!("it names \"{name}\" twice")));
            }
        }
        let train = self.origin.split == Split::Train;
        columns.places(header, train).map_err(|missing| {
            let found: Vec<&str> = header.iter().copied().take(MAX_IGNORED).collect();
            unusable(format!(
                "the first line must name the columns, among them \"{}\"; it reads \"{}\"",
                missing.join("\" or \""),
                shortened(&found.join(", "))
            ))
        })
    }

    fn ignore(&mut self, field: &str) {
        if self.ignored_fields.len() < MAX_IGNORED && !self.ignored_fields.contains(field) {
            self.ignored_fields.insert(shortened(field));
        }
    }

    fn parse_object(&mut self, row: &Value, columns: &Columns) -> Parsed {
        let Value::Object(fields) = row else {
            return Err(format!("{} instead of an object", kind(row)));
        };
        for field in fields.keys() {
            if columns.field_of(field).is_none() {
                self.ignore(field);
            }
        }
        // The field, and the name that it has here.
        let get = |field: usize| {
            let names = columns.names(field).iter();
            names
                .filter_map(|name| Some((name.as_str(), fields.get(name)?)))
                .next()
        };
        let Some((name, text)) = get(TEXT) else {
            let found: Vec<&str> = fields.keys().take(8).map(String::as_str).collect();
            return Err(format!(
                "no \"{}\" (its fields: {})",
                columns.names(TEXT).join("\" or \""),
                shortened(&found.join(", "))
            ));
        };
        let input = Input {
            text: text_of(name, text)?,
            text_pair: match get(TEXT_PAIR) {
                None | Some((_, Value::Null)) => None,
                Some((name, value)) => Some(text_of(name, value)?),
            },
        };
        // Other formats are bounded by the length of a line.
        if text_bytes(&input) > MAX_ROW_BYTES {
            return Err(format!("longer than {MAX_ROW_BYTES} bytes"));
        }
        let label = match get(LABEL) {
            None => None,
            Some((_, value)) => labelled(label_of(value)?, columns),
        };
        let teacher_logits = match get(LOGITS) {
            None => None,
            Some((_, value)) => logits_of(value)?,
        };
        Ok((input, label, teacher_logits))
    }
}

/// How a file is read, by the ending of its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    JsonLines,
    /// With the byte between cells.
    Table(u8),
    Parquet,
}

impl Format {
    pub(super) fn of(path: &Path) -> Option<Self> {
        let extension = path.extension()?.to_str()?.to_ascii_lowercase();
        Some(match extension.as_str() {
            "jsonl" | "ndjson" | "json" => Self::JsonLines,
            "csv" => Self::Table(b','),
            "tsv" => Self::Table(b'\t'),
            "parquet" => Self::Parquet,
            _ => return None,
        })
    }
}

fn text_bytes(input: &Input) -> usize {
    input.text.len() + input.text_pair.as_ref().map_or(0, String::len)
}

/// The label, unless it is the number that stands for none.
fn labelled(label: Option<RawLabel>, columns: &Columns) -> Option<RawLabel> {
    let none = columns.no_label;
    label.filter(|label| match label {
        RawLabel::Number(Number { value, whole: true }) => {
            none.is_none_or(|none| *value != none as f64)
        }
        RawLabel::Cell(cell) => none.is_none_or(|none| *cell != none.to_string()),
        _ => true,
    })
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
    places: Places,
    columns: &Columns,
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
        places.map(|place| place.and_then(|i| record.get(i)).unwrap_or_default());
    let input = Input {
        text: not_blank("text", text)?,
        text_pair: match text_pair.trim() {
            "" => None,
            _ => Some(text_pair.to_owned()),
        },
    };
    let label = match label.trim() {
        "" => None,
        cell if cell.starts_with('[') => match parse::json::<Value>(cell.as_bytes()) {
            Ok(list) => label_of(&list)?,
            Err(_) => Some(RawLabel::Cell(label_name(cell)?)),
        },
        cell => labelled(Some(RawLabel::Cell(label_name(cell)?)), columns),
    };
    let teacher_logits = match logits.trim() {
        "" => None,
        cell => {
            let list = parse::json(cell.as_bytes())
                .map_err(|_| format!("teacher_logits is not a list: \"{}\"", shortened(cell)))?;
            logits_of(&list)?
        }
    };
    Ok((input, label, teacher_logits))
}
