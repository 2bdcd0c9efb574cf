//! Rows of CSV and TSV files, and the signs that a file is not written as its name says.

use std::collections::HashSet;
use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};
use std::io::BufRead;

use serde_json::Value;

use super::columns::{Columns, LABEL, TEXT};
use super::error::DataError;
use super::fields::{RawLabel, label_name, label_of, logits_of, not_blank, shortened};
use super::read::{Parsed, Places, RawSplit, labelled};
use super::table::{Record, Table, TableError};
use super::{MAX_COLUMNS, MAX_ROW_BYTES};
use crate::parse;
use crate::text::Input;

/// What stands between cells in files that are called CSV or TSV.
const DELIMITERS: [u8; 4] = [b',', b'\t', b';', b'|'];

impl RawSplit {
    /// Reads CSV as in RFC 4180, or TSV, where quotes are ordinary characters.
    pub(super) fn read_table(
        &mut self,
        file: impl BufRead,
        delimiter: u8,
        columns: &Columns,
    ) -> Result<(), DataError> {
        let quoting = delimiter == b',';
        let mut table = Table::new(file, delimiter, quoting);
        let Some(first) = table.read().map_err(|e| self.table_error(e))? else {
            return Err(DataError::Empty {
                origin: self.origin.clone(),
            });
        };
        let names = self.column_names(first, delimiter, columns)?;
        let mut header: Vec<&str> = names.iter().map(String::as_str).collect();
        let has_names = |name: &String| header.contains(&name.as_str());
        let first_is_row =
            !columns.headerless.is_empty() && !columns.names(TEXT).iter().any(has_names);
        if first_is_row {
            header = columns.headerless.to_vec();
        }
        for name in &header {
            if columns.field_of(name).is_none() {
                self.ignore(name);
            }
        }
        let layout = Layout {
            delimiter,
            width: header.len(),
            places: self.places(&header, columns)?,
        };
        let mut quotes = QuotesOfTsv::new(quoting || columns.preset);
        let mut swallowed = SwallowedRows::default();
        let mut record = match first_is_row {
            true => Some(table.current()),
            false => table.read().map_err(|e| self.table_error(e))?,
        };
        while let Some(row) = record {
            if row.has_nul() {
                return Err(self.nul(row.line));
            }
            if quotes.are_meant(row, &layout) {
                return Err(self.quoted_tsv(row.line));
            }
            swallowed.look_at(row, &layout);
            let parsed = parse_record(row, &layout, columns);
            self.push(row.line, parsed)?;
            record = table.read().map_err(|e| self.table_error(e))?;
        }
        if quotes.stand_around_every_text() {
            return Err(self.quoted_tsv(1));
        }
        let labels = self.rows.iter().filter_map(|row| match &row.label {
            Some(RawLabel::Cell(cell)) => Some(cell.as_str()),
            _ => None,
        });
        match swallowed.first(labels) {
            Some(line) => Err(self.table_error(TableError::swallowed_rows(line))),
            None => Ok(()),
        }
    }

    /// Returns the cells of the first record.
    fn column_names(
        &self,
        first: &Record,
        delimiter: u8,
        columns: &Columns,
    ) -> Result<Vec<String>, DataError> {
        let unusable = |reason: String| DataError::Header {
            origin: self.origin.clone(),
            reason,
        };
        if first.too_long {
            return Err(unusable(format!("it is longer than {MAX_ROW_BYTES} bytes")));
        }
        if first.cells > MAX_COLUMNS {
            return Err(unusable(format!(
                "it names {} columns; at most {MAX_COLUMNS} are read",
                first.cells
            )));
        }
        if first.has_nul() {
            return Err(self.nul(first.line));
        }
        let names: Vec<String> = first.iter().map(|name| name.trim().to_owned()).collect();
        if delimiter == b'\t' && !columns.preset && names.iter().any(|name| in_quotes(name)) {
            return Err(self.quoted_tsv(first.line));
        }
        if let [name] = names.as_slice()
            && columns.field_of(name) != Some(TEXT)
            && let Some(found) = DELIMITERS
                .iter()
                .find(|found| name.as_bytes().contains(found))
        {
            return Err(unusable(format!(
                "its names are separated by {:?} instead of {:?}; it reads \"{}\"",
                char::from(*found),
                char::from(delimiter),
                shortened(name)
            )));
        }
        Ok(names)
    }

    fn table_error(&self, error: TableError) -> DataError {
        match error {
            TableError::Io(error) => self.io(error),
            TableError::NotUtf8 { line } => self.not_utf8(line),
            TableError::Quotes { line, reason } => DataError::Quotes {
                origin: self.origin.clone(),
                line,
                reason,
            },
        }
    }

    fn quoted_tsv(&self, line: usize) -> DataError {
        DataError::QuotedTsv {
            origin: self.origin.clone(),
            line,
        }
    }
}

/// Where the fields stand in a record.
struct Layout {
    delimiter: u8,
    /// The number of columns.
    width: usize,
    places: Places,
}

fn parse_record(record: &Record, layout: &Layout, columns: &Columns) -> Parsed {
    if record.too_long {
        return Err(format!(
            "longer than {MAX_ROW_BYTES} bytes; is a closing quote missing?"
        ));
    }
    if record.cells != layout.width {
        return Err(format!(
            "{} cells where the header names {} columns",
            record.cells, layout.width
        ));
    }
    if record.spaced_quote {
        return Err("spaces before the quote that opens a cell; remove them".into());
    }
    let [text, text_pair, label, logits] = layout
        .places
        .map(|place| place.and_then(|i| record.get(i)).unwrap_or_default());
    let input = Input {
        text: not_blank("text", text)?,
        text_pair: match text_pair.trim() {
            "" => None,
            _ => Some(text_pair.to_owned()),
        },
    };
    let label = match label.trim() {
        "" => None,
        cell => match parse::json::<Vec<Value>>(cell.as_bytes()) {
            Ok(names) => label_of(&Value::Array(names))?,
            Err(_) => labelled(Some(RawLabel::Cell(label_name(cell)?)), columns),
        },
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

/// Signs that the quotes of a TSV file are meant as those of CSV, as pandas writes them.
struct QuotesOfTsv {
    /// Quotes are known to be what they are.
    known: bool,
    texts: usize,
    texts_in_quotes: usize,
}

impl QuotesOfTsv {
    fn new(known: bool) -> Self {
        Self {
            known,
            texts: 0,
            texts_in_quotes: 0,
        }
    }

    /// Whether a cell has doubled quotes within quotes, or a cell in quotes has been parted at a
    /// tab or a line end.
    fn are_meant(&mut self, record: &Record, layout: &Layout) -> bool {
        if self.known {
            return false;
        }
        if let Some(text) = layout.places[TEXT].and_then(|place| record.get(place)) {
            self.texts += 1;
            self.texts_in_quotes += usize::from(in_quotes(text));
        }
        let parted = |cell: &str| cell.starts_with('"') != cell.ends_with('"');
        record.iter().any(has_doubled_quotes)
            || record.cells != layout.width && record.iter().any(parted)
    }

    fn stand_around_every_text(&self) -> bool {
        self.texts > 0 && self.texts_in_quotes == self.texts
    }
}

fn in_quotes(cell: &str) -> bool {
    cell.len() > 1 && cell.starts_with('"') && cell.ends_with('"')
}

/// Whether all quotes within a cell in quotes are doubled, and there are some.
fn has_doubled_quotes(cell: &str) -> bool {
    if !in_quotes(cell) {
        return false;
    }
    let inner = &cell[1..cell.len() - 1];
    inner.contains("\"\"") && !inner.replace("\"\"", "").contains('"')
}

/// Finds cells over several lines that hold whole rows, because a quote is missing.
///
/// RFC 4180 allows any text within quotes. A line that has as many cells as the header, of which
/// the one at the label's place is a label of other rows, is no accident if most lines of a record
/// are like it: one of them always is, since the record itself ends or begins with its label.
#[derive(Default)]
struct SwallowedRows {
    suspects: Vec<Suspect>,
}

struct Suspect {
    line: usize,
    /// Lines of the record that are not empty.
    lines: usize,
    /// Hashes of what stands in the label's place of each.
    labels: Vec<u64>,
}

impl SwallowedRows {
    fn look_at(&mut self, record: &Record, layout: &Layout) {
        let Some(place) = layout.places[LABEL].filter(|_| record.spans_lines) else {
            return;
        };
        let delimiter = char::from(layout.delimiter);
        let cells: Vec<&str> = record.iter().collect();
        let text = cells.join(delimiter.encode_utf8(&mut [0; 4]));
        let lines = text.lines().filter(|line| !line.trim().is_empty());
        let label = |line: &str| {
            let last = layout.width - 1;
            let mut cells = line.split(delimiter);
            let count = line.split(delimiter).count();
            let label = match place {
                _ if count < layout.width => None,
                place if place == last => cells.next_back(),
                0 => cells.next(),
                place if count == layout.width => cells.nth(place),
                _ => None,
            };
            label.map(hash)
        };
        let labels: Vec<u64> = lines.clone().filter_map(label).collect();
        if labels.len() > 1 {
            self.suspects.push(Suspect {
                line: record.line,
                lines: lines.count(),
                labels,
            });
        }
    }

    /// Returns the line of the first record that holds rows, judged by the labels of all rows.
    fn first<'a>(&self, labels: impl Iterator<Item = &'a str>) -> Option<usize> {
        if self.suspects.is_empty() {
            return None;
        }
        let known: HashSet<u64> = labels.map(hash).collect();
        let holds_rows = |suspect: &&Suspect| {
            let rows = suspect.labels.iter().filter(|label| known.contains(label));
            let rows = rows.count();
            rows > 1 && rows * 2 > suspect.lines
        };
        self.suspects
            .iter()
            .find(holds_rows)
            .map(|found| found.line)
    }
}

fn hash(text: &str) -> u64 {
    BuildHasherDefault::<DefaultHasher>::new().hash_one(text)
}
