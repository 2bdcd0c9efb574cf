//! Real texts, from which requests are made.

use std::borrow::Cow;
use std::fs;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::error::Failure;

/// A row of a data set; its label is of no interest here.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub(crate) struct Row {
    pub(crate) text: String,
    #[serde(default)]
    pub(crate) text_pair: Option<String>,
}

/// One input of a request.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Input<'a> {
    pub(crate) text: Cow<'a, str>,
    pub(crate) text_pair: Option<&'a str>,
}

#[derive(Clone, Debug)]
pub(crate) struct Texts {
    rows: Vec<Row>,
}

/// What a report says of the texts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct TextsSummary {
    pub(crate) rows: usize,
    pub(crate) mean_characters: f64,
    pub(crate) longest_characters: usize,
}

impl Texts {
    /// Rows of all files, in order.
    pub(crate) fn read(paths: &[PathBuf]) -> Result<Self, Failure> {
        let mut rows = Vec::new();
        for path in paths {
            let text = fs::read_to_string(path).map_err(|source| Failure::Read {
                path: path.clone(),
                source,
            })?;
            for (i, line) in text.lines().enumerate() {
                if line.trim().is_empty() {
                    continue;
                }
                let row = serde_json::from_str(line).map_err(|source| Failure::Row {
                    path: path.clone(),
                    line: i + 1,
                    source,
                })?;
                rows.push(row);
            }
        }
        Self::new(rows)
    }

    pub(crate) fn new(rows: Vec<Row>) -> Result<Self, Failure> {
        if rows.is_empty() {
            return Err(Failure::Usage("the files of --texts have no rows".into()));
        }
        Ok(Self { rows })
    }

    pub(crate) fn len(&self) -> usize {
        self.rows.len()
    }

    /// `count` inputs from the row `first` on, each of `texts` rows joined; after the last row
    /// comes the first. The second text of a joined input is that of its first row.
    pub(crate) fn inputs(&self, first: usize, count: usize, texts: usize) -> Vec<Input<'_>> {
        let row = |i: usize| &self.rows[i % self.rows.len()];
        (0..count)
            .map(|i| {
                let start = first + i * texts;
                let text = match texts {
                    1 => Cow::Borrowed(row(start).text.as_str()),
                    _ => {
                        let parts: Vec<&str> =
                            (start..start + texts).map(|i| &*row(i).text).collect();
                        Cow::Owned(parts.join(" "))
                    }
                };
                Input {
                    text,
                    text_pair: row(start).text_pair.as_deref(),
                }
            })
            .collect()
    }

    pub(crate) fn summary(&self) -> TextsSummary {
        let lengths = self.rows.iter().map(|row| {
            let pair = row.text_pair.as_deref().unwrap_or_default();
            row.text.chars().count() + pair.chars().count()
        });
        let longest = lengths.clone().max().unwrap_or(0);
        TextsSummary {
            rows: self.rows.len(),
            mean_characters: lengths.sum::<usize>() as f64 / self.rows.len() as f64,
            longest_characters: longest,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn file(text: &str) -> tempfile::TempPath {
        let mut file = tempfile::NamedTempFile::new().expect("a temporary file");
        file.write_all(text.as_bytes()).expect("write");
        file.into_temp_path()
    }

    #[test]
    fn rows_become_inputs_of_one_or_more_texts() {
        let one =
            file("{\"text\": \"a\", \"label\": 1}\n\n{\"text\": \"b\", \"text_pair\": \"p\"}\n");
        let other = file("{\"text\": \"c\"}\n");
        let texts = Texts::read(&[one.to_path_buf(), other.to_path_buf()]).expect("rows");
        assert_eq!(texts.len(), 3);
        let inputs = |first, count, joined| {
            let inputs = texts.inputs(first, count, joined).into_iter();
            inputs
                .map(|input| (input.text.into_owned(), input.text_pair.map(str::to_owned)))
                .collect::<Vec<_>>()
        };
        let pair = Some("p".to_owned());
        assert_eq!(inputs(2, 2, 1), [("c".into(), None), ("a".into(), None)]);
        assert_eq!(
            inputs(1, 2, 2),
            [("b c".into(), pair), ("a b".into(), None)]
        );
    }

    #[test]
    fn a_bad_row_is_named_by_file_and_line() {
        let bad = file("{\"text\": \"a\"}\n{\"txt\": \"b\"}\n");
        let error = Texts::read(&[bad.to_path_buf()]).expect_err("a row without a text");
        let message = error.chain();
        assert!(message.contains("line 2"), "{message}");
        assert!(message.contains("missing field `text`"), "{message}");
        let empty = file("\n");
        let error = Texts::read(&[empty.to_path_buf()]).expect_err("no rows");
        assert!(error.chain().contains("no rows"));
    }
}
