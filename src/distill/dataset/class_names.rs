//! Names of the classes behind the ids of a Parquet column: `ClassLabel` of the library `datasets`
//! of Hugging Face, which keeps the names in the metadata of the file.

use std::collections::HashSet;

use serde_json::Value;

use super::MAX_LABELS;
use super::columns::Columns;
use super::fields::label_name;
use crate::parse;

/// The id of a row without a label.
const UNLABELLED: i64 = -1;

/// A column of class ids.
#[derive(Debug)]
pub(super) struct ClassColumn {
    pub(super) column: String,
    /// The name of each id. `None` leaves ids as they are.
    names: Option<Vec<String>>,
    /// What a user must know of the names.
    pub(super) warning: Option<String>,
}

impl ClassColumn {
    /// Finds the class names of a column in the value of the key `huggingface`.
    ///
    /// # Errors
    /// The names cannot be those of classes, or cannot be told apart from those of the request; a
    /// sentence for the user.
    pub(super) fn find(
        metadata: &str,
        column: &str,
        columns: &Columns,
    ) -> Result<Option<Self>, String> {
        // What is no JSON is not from `datasets`.
        let metadata: Value = parse::json(metadata.as_bytes()).unwrap_or_default();
        let Some(names) = names_of(&metadata["info"]["features"][column]) else {
            return Ok(None);
        };
        let unusable =
            |reason: String| format!("the class names of its column \"{column}\": {reason}");
        let names = checked(names).map_err(unusable)?;
        let mut found = Self {
            column: column.to_owned(),
            names: None,
            warning: None,
        };
        let list = |names: &[String]| format!("\"{}\"", names.join("\", \""));
        match &columns.labels {
            _ if columns.numbers_are_targets => {}
            Some(given) if names.iter().any(|name| !given.contains(name)) => {
                if given.len() != names.len() {
                    return Err(unusable(format!(
                        "they are {}, and the labels of the request are {}",
                        list(&names),
                        list(given)
                    )));
                }
                found.warning = Some(format!(
                    "the class ids of the Parquet file are taken as places in the labels of the \
                     request, {}, and not as its own class names, {}",
                    list(given),
                    list(&names)
                ));
                found.names = Some(given.clone());
            }
            _ => found.names = Some(names),
        }
        Ok(Some(found))
    }

    /// Puts names in the place of ids.
    pub(super) fn named(&self, value: Value) -> Result<Value, String> {
        match value {
            Value::Array(ids) => ids.into_iter().map(|id| self.named(id)).collect(),
            Value::Number(id) => match (id.as_i64(), &self.names) {
                (Some(UNLABELLED), _) => Ok(Value::Null),
                (_, None) => Ok(Value::Number(id)),
                (Some(place), Some(names)) => usize::try_from(place)
                    .ok()
                    .and_then(|place| names.get(place))
                    .map(|name| name.as_str().into())
                    .ok_or_else(|| {
                        format!(
                            "its column \"{}\" has the class {id}, but {} class names",
                            self.column,
                            names.len()
                        )
                    }),
                (None, Some(_)) => Err(format!(
                    "its column \"{}\" has {id} in the place of a class",
                    self.column
                )),
            },
            other => Ok(other),
        }
    }
}

/// The names of a feature that is a class, or a list of classes.
fn names_of(feature: &Value) -> Option<&Vec<Value>> {
    match feature {
        Value::Object(fields) if feature["_type"] == "ClassLabel" => {
            fields.get("names")?.as_array()
        }
        Value::Object(fields) => names_of(fields.get("feature")?),
        Value::Array(features) => names_of(features.first()?),
        _ => None,
    }
}

fn checked(names: &[Value]) -> Result<Vec<String>, String> {
    if names.is_empty() || names.len() > MAX_LABELS {
        return Err(format!("there must be 1 to {MAX_LABELS} of them"));
    }
    let name = |name: &Value| match name {
        Value::String(name) => label_name(name),
        other => Err(format!("{other} is no name")),
    };
    let names = names.iter().map(name).collect::<Result<Vec<_>, _>>()?;
    let mut seen = HashSet::new();
    match names.iter().find(|name| !seen.insert(name.as_str())) {
        Some(name) => Err(format!("\"{name}\" stands twice")),
        None => Ok(names),
    }
}
