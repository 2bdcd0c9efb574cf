//! Rows as they stand in a file or a request, before it is known what their labels mean.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read as _, Seek as _, SeekFrom};
use std::path::Path;

use serde_json::Value;

use super::columns::{Columns, FIELDS, LABEL, LOGITS, TEXT, TEXT_PAIR};
use super::error::{DataError, Origin};
use super::fields::{RawLabel, kind, label_of, logits_of, parse_number, shortened, text_of};
use super::parquet::ParquetRows;
use super::{MAX_FILE_BYTES, MAX_REJECTIONS, MAX_ROW_BYTES, MAX_ROWS, Rejection, Split, signature};
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
    /// What a user must know of the file.
    pub(super) warning: Option<String>,
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
        warning: None,
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
pub(super) type Parsed = Result<(Input, Option<RawLabel>, Option<Vec<f32>>), String>;

/// The column of each field.
pub(super) type Places = [Option<usize>; FIELDS.len()];

impl RawSplit {
    pub(super) fn push(&mut self, line: usize, parsed: Parsed) -> Result<(), DataError> {
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
        let mut file = File::open(path).map_err(|e| self.io(e))?;
        let mut head = Vec::new();
        (&file)
            .take(signature::LONGEST)
            .read_to_end(&mut head)
            .map_err(|e| self.io(e))?;
        if let Some((what, remedy)) = signature::foreign(&head, format == Format::Parquet) {
            return Err(DataError::Foreign {
                origin: self.origin.clone(),
                what,
                remedy,
            });
        }
        let begin = match head.strip_prefix(signature::UTF8_MARK) {
            Some(_) => signature::UTF8_MARK.len() as u64,
            None => 0,
        };
        file.seek(SeekFrom::Start(begin)).map_err(|e| self.io(e))?;
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
        let classes = rows.classes.as_ref();
        self.warning = classes.and_then(|classes| classes.warning.clone());
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

    pub(super) fn io(&self, source: io::Error) -> DataError {
        DataError::Read {
            origin: self.origin.clone(),
            source,
        }
    }

    pub(super) fn not_utf8(&self, line: usize) -> DataError {
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
        let mut first = true;
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
            if text.contains('\0') {
                return Err(self.nul(line));
            }
            let text = text.trim();
            if text.is_empty() {
                continue;
            }
            if std::mem::take(&mut first) && text.starts_with('[') {
                return Err(DataError::JsonArray {
                    origin: self.origin.clone(),
                });
            }
            let parsed = match parse::json::<Value>(text.as_bytes()) {
                Ok(row) => self.parse_object(&row, columns),
                Err(ParseError::Syntax(problem)) => Err(not_json(text, &problem)),
                Err(ParseError::Field(problem)) => Err(problem),
            };
            self.push(line, parsed)?;
        }
    }

    pub(super) fn nul(&self, line: usize) -> DataError {
        DataError::Nul {
            origin: self.origin.clone(),
            line,
        }
    }

    /// The place of each field among named columns.
    pub(super) fn places(&self, header: &[&str], columns: &Columns) -> Result<Places, DataError> {
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
                "the first line must name the columns, among them \"{}\"; it reads \"{}\"; name \
                 columns of other names in data.columns",
                missing.join("\" or \""),
                shortened(&found.join(", "))
            ))
        })
    }

    pub(super) fn ignore(&mut self, field: &str) {
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
pub(super) fn labelled(label: Option<RawLabel>, columns: &Columns) -> Option<RawLabel> {
    let Some(none) = columns.no_label else {
        return label;
    };
    label.filter(|label| {
        let number = match label {
            RawLabel::Number(number) => number.whole,
            RawLabel::Cell(cell) => parse_number(cell).and_then(|number| number.whole),
            RawLabel::Text(_) | RawLabel::List(_) => None,
        };
        number != Some(none)
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

/// Why a line is no JSON. Of two mistakes that are often made, it says what to do.
fn not_json(text: &str, problem: &str) -> String {
    let hint = if text.contains("NaN") || text.contains("Infinity") {
        "; JSON has no NaN and no Infinity, write null"
    } else if text.contains('\r') {
        "; its lines end in CR alone, end them in LF"
    } else {
        ""
    };
    format!("not JSON: {problem}{hint}")
}
