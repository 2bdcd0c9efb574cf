//! Rows in the body of a request, written to files without becoming values.
//!
//! As a value of JSON, a short row takes a hundred times the memory of its text. Here each row goes
//! from the body to a file as text, and only the rest of the request, which is small, becomes a
//! value. Behind this, such rows are the same as uploaded files.

use std::fmt;
use std::fs::{self, File};
use std::io::{BufWriter, Write as _};
use std::path::Path;

use serde::de::{Deserializer as _, MapAccess, SeqAccess, Visitor};
use serde_json::Value;
use serde_json::value::RawValue;
use sha2::{Digest as _, Sha256};

use super::upload::{ReceivedFile, SPLITS, invalid};
use crate::distill::dataset::{DataError, MAX_ROWS, Origin, Split};
use crate::http::error::{ApiError, Problem};
use crate::parse;

/// Greatest size of a request without its rows.
const MAX_REST_BYTES: usize = 1024 * 1024;

/// Writes the rows of the request `body` to files in `folder`, one row a line. Returns the request
/// without these splits, and their files. Blocks.
///
/// A split that is anything but a list of rows stays in the request, where it is checked.
pub(super) fn take(body: &RawValue, folder: &Path) -> Result<(Value, Vec<ReceivedFile>), ApiError> {
    let mut rest = Rest::default();
    let mut files: Vec<ReceivedFile> = Vec::new();
    if is_object(body) {
        let mut seen_data = false;
        rest.text.push('{');
        walk(body, |key, value| {
            if key != "data" || !is_object(value) {
                return rest.add(&key, value.get());
            }
            if std::mem::replace(&mut seen_data, true) {
                return Err(invalid("duplicate field `data`"));
            }
            rest.add(&key, "{")?;
            walk(value, |key, value| {
                let split = SPLITS
                    .iter()
                    .zip(Split::ALL)
                    .find(|(name, _)| **name == key);
                let (Some((name, split)), Some(rows)) = (split, only_rows(value)?) else {
                    return rest.add(&key, value.get());
                };
                if files.iter().any(|file| file.name == *name) {
                    return Err(invalid(format!("data: duplicate field `{name}`")));
                }
                files.push(write(rows, name, split, folder)?);
                Ok(())
            })?;
            rest.text.push('}');
            Ok(())
        })?;
        rest.text.push('}');
    } else {
        rest.push(body.get())?;
    }
    Ok((parse::json(rest.text.as_bytes())?, files))
}

/// What is kept of a request, as text.
#[derive(Default)]
struct Rest {
    text: String,
}

impl Rest {
    /// Adds a member to the object that has been begun last.
    fn add(&mut self, key: &str, value: &str) -> Result<(), ApiError> {
        if !self.text.ends_with('{') {
            self.text.push(',');
        }
        self.push(&Value::from(key).to_string())?;
        self.text.push(':');
        self.push(value)
    }

    fn push(&mut self, text: &str) -> Result<(), ApiError> {
        if self.text.len() + text.len() > MAX_REST_BYTES {
            return Err(Problem::TooLarge.with(format!(
                "a request may have {} MiB beside its rows",
                MAX_REST_BYTES >> 20
            )));
        }
        self.text.push_str(text);
        Ok(())
    }
}

/// Returns the list of a split that has nothing else than some rows.
fn only_rows(split: &RawValue) -> Result<Option<&RawValue>, ApiError> {
    if !is_object(split) {
        return Ok(None);
    }
    let mut rows = None;
    let mut count = 0usize;
    walk(split, |key, value| {
        count += 1;
        if key == "rows" {
            rows = Some(value);
        }
        Ok(())
    })?;
    let is_list = |rows: &&RawValue| {
        let inner = rows.get().strip_prefix('[');
        inner.is_some_and(|inner| inner.trim_start() != "]")
    };
    Ok(rows.filter(|_| count == 1).filter(is_list))
}

/// Writes rows to the file of their split, and flushes it to the disk.
fn write(
    rows: &RawValue,
    name: &'static str,
    split: Split,
    folder: &Path,
) -> Result<ReceivedFile, ApiError> {
    fs::create_dir_all(folder).map_err(ApiError::internal)?;
    let path = folder.join(format!("{name}.jsonl"));
    let mut file = BufWriter::new(File::create(&path).map_err(ApiError::internal)?);
    let mut digest = Sha256::new();
    let mut count = 0usize;
    walk(rows, |_, row| {
        count += 1;
        if count > MAX_ROWS {
            let origin = Origin { split, path: None };
            return Err(Problem::Unusable.with(DataError::TooManyRows { origin }.to_string()));
        }
        // A line break of JSON text is white space: those of strings are escaped.
        let row = row.get().replace(['\n', '\r'], " ") + "\n";
        digest.update(&row);
        file.write_all(row.as_bytes()).map_err(ApiError::internal)
    })?;
    let file = file
        .into_inner()
        .map_err(|error| ApiError::internal(error.into_error()))?;
    file.sync_all().map_err(ApiError::internal)?;
    Ok(ReceivedFile {
        name,
        path,
        digest: format!("{:x}", digest.finalize()),
    })
}

fn is_object(value: &RawValue) -> bool {
    value.get().starts_with('{')
}

/// Calls `each` with each member of an object, or with an empty key and each element of a list,
/// until it fails. The text is known to be JSON.
#[expect(
    clippy::disallowed_methods,
    reason = "only text goes on from here; what is kept of it is parsed later"
)]
fn walk<'a>(
    value: &'a RawValue,
    each: impl FnMut(String, &'a RawValue) -> Result<(), ApiError>,
) -> Result<(), ApiError> {
    let mut error = None;
    let walk = Walk {
        each,
        error: &mut error,
    };
    let walked = serde_json::Deserializer::from_str(value.get()).deserialize_any(walk);
    match (error, walked) {
        (Some(error), _) => Err(error),
        (None, walked) => walked.map_err(|error| Problem::NotJson.with(error.to_string())),
    }
}

struct Walk<'e, F> {
    each: F,
    /// Why `each` has failed.
    error: &'e mut Option<ApiError>,
}

impl<F> Walk<'_, F> {
    fn check<E: serde::de::Error>(&mut self, result: Result<(), ApiError>) -> Result<(), E> {
        result.map_err(|error| {
            *self.error = Some(error);
            E::custom("refused")
        })
    }
}

impl<'de, F> Visitor<'de> for Walk<'_, F>
where
    F: FnMut(String, &'de RawValue) -> Result<(), ApiError>,
{
    type Value = ();

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("an object or a list")
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<(), A::Error> {
        while let Some((key, value)) = map.next_entry::<String, &RawValue>()? {
            let result = (self.each)(key, value);
            self.check(result)?;
        }
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(mut self, mut list: A) -> Result<(), A::Error> {
        while let Some(value) = list.next_element::<&RawValue>()? {
            let result = (self.each)(String::new(), value);
            self.check(result)?;
        }
        Ok(())
    }
}
