//! The fields of one row: what they may hold, and why they cannot be used.

use serde_json::Value;

use super::{MAX_LABEL_BYTES, MAX_LABELS};

/// A label as it is written.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum RawLabel {
    /// A JSON string.
    Text(String),
    /// A cell of a table: a number or a class.
    Cell(String),
    Number(Number),
    List(Vec<String>),
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Number {
    pub(super) value: f64,
    /// The value if it is whole, whether it is written as 1 or as 1.0.
    pub(super) whole: Option<i64>,
}

impl Number {
    fn of(value: f64) -> Self {
        let whole = value.fract() == 0.0 && value.abs() <= MAX_EXACT;
        Self {
            value,
            whole: whole.then_some(value as i64),
        }
    }

    fn whole(value: i64) -> Self {
        Self {
            value: value as f64,
            whole: Some(value),
        }
    }
}

/// Up to here, an f64 can tell whole numbers apart.
const MAX_EXACT: f64 = 9_007_199_254_740_992.0;

/// Reads a cell or a name as a finite number. Digits that are too many for a whole number are none:
/// as decimal numbers, ids that differ would be equal.
pub(super) fn parse_number(text: &str) -> Option<Number> {
    if text
        .trim_start_matches(['-', '+'])
        .bytes()
        .all(|byte| byte.is_ascii_digit())
    {
        return text.parse().ok().map(Number::whole);
    }
    let value = text.parse::<f64>().ok();
    value.filter(|value| value.is_finite()).map(Number::of)
}

pub(super) fn text_of(field: &str, value: &Value) -> Result<String, String> {
    match value {
        Value::String(text) => not_blank(field, text),
        other => Err(format!("\"{field}\" is {} instead of a text", kind(other))),
    }
}

pub(super) fn not_blank(field: &str, text: &str) -> Result<String, String> {
    if text.trim().is_empty() {
        return Err(format!("\"{field}\" is empty"));
    }
    Ok(text.to_owned())
}

pub(super) fn label_of(value: &Value) -> Result<Option<RawLabel>, String> {
    Ok(Some(match value {
        Value::Null => return Ok(None),
        Value::String(name) => RawLabel::Text(label_name(name)?),
        Value::Number(number) => RawLabel::Number(match (number.as_i64(), number.as_u64()) {
            (Some(whole), _) => Number::whole(whole),
            (None, Some(large)) => {
                return Err(format!(
                    "\"label\" is {large}, greater than {}; write it as a string",
                    i64::MAX
                ));
            }
            (None, None) => Number::of(number.as_f64().unwrap_or(f64::NAN)),
        }),
        Value::Array(names) => {
            let names = names.iter().map(|name| match name {
                Value::String(name) => label_name(name),
                other => Err(format!(
                    "\"label\" is a list with {} in it; write names",
                    kind(other)
                )),
            });
            RawLabel::List(names.collect::<Result<_, _>>()?)
        }
        other => {
            return Err(format!(
                "\"label\" is {}; write a string, a number or a list of strings",
                kind(other)
            ));
        }
    }))
}

/// White space around a name is no part of it.
pub(super) fn label_name(name: &str) -> Result<String, String> {
    let name = name.trim();
    if name.is_empty() {
        return Err("\"label\" is empty".into());
    }
    if name.len() > MAX_LABEL_BYTES {
        return Err(format!(
            "\"label\" is longer than {MAX_LABEL_BYTES} bytes: \"{}\"",
            shortened(name)
        ));
    }
    if is_written_list(name) {
        return Err(format!(
            "\"label\" is a list written as text: {}; write a list of JSON, [\"a\", \"b\"]",
            shortened(name)
        ));
    }
    Ok(name.to_owned())
}

/// Whether a name is the text of a list: `['a', 'b']`, `("a",)`, `{'a'}`, `['a' 'b']`, `[a, b]`.
fn is_written_list(name: &str) -> bool {
    let inner = [('[', ']'), ('(', ')'), ('{', '}')]
        .iter()
        .find_map(|&(open, close)| name.strip_prefix(open)?.strip_suffix(close));
    let Some(inner) = inner else { return false };
    let inner = inner.trim();
    let quoted = |text: &str| text.starts_with(['\'', '"']);
    inner.is_empty() || quoted(inner) || (name.starts_with('[') && inner.contains(','))
}

pub(super) fn logits_of(value: &Value) -> Result<Option<Vec<f32>>, String> {
    match value {
        Value::Null => Ok(None),
        Value::Array(numbers) if (1..=MAX_LABELS).contains(&numbers.len()) => numbers
            .iter()
            .map(|number| {
                number
                    .as_f64()
                    .map(|number| number as f32)
                    .filter(|number| number.is_finite())
                    .ok_or_else(|| {
                        "\"teacher_logits\" holds something that is not a finite number".into()
                    })
            })
            .collect::<Result<_, _>>()
            .map(Some),
        other => Err(format!(
            "\"teacher_logits\" is {} instead of a list of 1 to {MAX_LABELS} numbers",
            kind(other)
        )),
    }
}

pub(super) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(list) if list.is_empty() => "an empty list",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// At most 80 characters of something that a message quotes.
pub(super) fn shortened(text: &str) -> String {
    match text.char_indices().nth(80) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}
