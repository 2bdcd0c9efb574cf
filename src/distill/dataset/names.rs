//! What is odd about the names of classes: signs that a label was not meant to be one of its own.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::LazyLock;

use fancy_regex::Regex;
use tokenizers::NormalizedString;

use super::ClassCount;
use super::fields::parse_number;

/// Names that a warning shows.
const SHOWN: usize = 5;

/// What tables and programs write where there is no value, in lower case.
const MISSING: [&str; 13] = [
    "nan",
    "none",
    "null",
    "nil",
    "na",
    "n/a",
    "#n/a",
    "<na>",
    "nat",
    "-",
    "--",
    "?",
    "undefined",
];

/// What stands between several labels in one cell.
const SEPARATORS: [char; 4] = [',', ';', '|', '/'];

/// Whether a label is what programs write for a missing value.
pub(super) fn is_missing(name: &str) -> bool {
    MISSING.contains(&name.to_lowercase().as_str())
}

/// Returns what is odd about the names of the classes, with their rows over all splits. Names that
/// are `given` by the teacher or the request are meant to be there.
pub(super) fn warnings(classes: &[ClassCount], given: bool) -> Vec<String> {
    let names: Vec<&str> = classes.iter().map(|class| class.label.as_str()).collect();
    let mut warnings: Vec<String> = alike(&names);
    if !given {
        warnings.extend(missing(classes));
        warnings.extend(joined(&names));
        warnings.extend(numbers_as_text(&names));
        warnings.extend(in_quotes(&names));
        warnings.extend(single(classes));
    }
    warnings
}

fn missing(classes: &[ClassCount]) -> Option<String> {
    let missing = classes.iter().filter(|class| is_missing(&class.label));
    let named = |class: &ClassCount| format!("\"{}\" ({} rows)", class.label, class.rows);
    let list = list(missing.map(named))?;
    Some(format!(
        "the class {list} reads like a missing value; if it is one, leave the label of these rows \
         out"
    ))
}

/// Classes whose names look alike.
fn alike(names: &[&str]) -> Vec<String> {
    let mut groups: BTreeMap<String, Vec<&str>> = BTreeMap::new();
    for name in names {
        groups.entry(likeness(name)).or_default().push(name);
    }
    let alike = groups.values().filter(|group| group.len() > 1);
    let shown = |group: &Vec<&str>| {
        // Letters that look alike are told apart by their code points.
        let names = group
            .iter()
            .map(|name| format!("\"{}\"", name.escape_default()));
        names.collect::<Vec<_>>().join(" and ")
    };
    list(alike.map(shown))
        .map(|list| {
            format!(
                "the classes {list} differ only in upper and lower case, spaces, Unicode form, \
                 invisible characters or the way a number is written; if they are one class, write \
                 it in one way"
            )
        })
        .into_iter()
        .collect()
}

/// Returns what is equal for two names that a reader takes for the same.
pub(super) fn likeness(name: &str) -> String {
    if let Some(number) = parse_number(name) {
        return number.value.to_string();
    }
    static UNSEEN: LazyLock<Option<Regex>> =
        LazyLock::new(|| Regex::new(r"[\s\p{Cc}\p{Cf}\p{Default_Ignorable_Code_Point}]").ok());
    let mut text = NormalizedString::from(name);
    text.nfkc().lowercase();
    match &*UNSEEN {
        Some(unseen) => unseen.replace_all(text.get(), "").into_owned(),
        None => text.get().to_owned(),
    }
}

/// Classes that are several other ones in one cell.
fn joined(names: &[&str]) -> Option<String> {
    let known: BTreeSet<&str> = names.iter().copied().collect();
    let is_joined = |name: &&str| {
        SEPARATORS.iter().any(|&separator| {
            let mut parts = name.split(separator).map(str::trim);
            name.contains(separator) && parts.all(|part| known.contains(part))
        })
    };
    let joined = names.iter().copied().filter(is_joined);
    let list = list(joined.map(|name| format!("\"{name}\"")))?;
    Some(format!(
        "the class {list} is made of other classes; if a row has several labels, write them as a \
         list"
    ))
}

/// Targets of a regression that were written as text.
fn numbers_as_text(names: &[&str]) -> Option<String> {
    let number = |name: &&str| parse_number(&name.replace(',', "."));
    let numbers: Vec<_> = names.iter().filter_map(number).collect();
    let fractions = numbers.iter().any(|number| number.whole.is_none());
    (numbers.len() == names.len() && fractions).then(|| {
        "every label is a number written as text, so each number is a class; for a regression \
         write numbers, with a decimal point"
            .into()
    })
}

fn in_quotes(names: &[&str]) -> Option<String> {
    let quoted = |name: &&str| {
        ['"', '\'']
            .iter()
            .any(|&quote| name.len() > 1 && name.starts_with(quote) && name.ends_with(quote))
    };
    let quoted = names.iter().copied().filter(quoted);
    let list = list(quoted.map(str::to_owned))?;
    Some(format!(
        "the quotes of the class {list} are part of its name; if they are not meant, write it \
         without"
    ))
}

fn single(classes: &[ClassCount]) -> Option<String> {
    let single = classes.iter().filter(|class| class.rows == 1);
    let list = list(single.map(|class| format!("\"{}\"", class.label)))?;
    Some(format!(
        "only one row has the label {list}; look whether it is spelt right"
    ))
}

/// Joins the first [`SHOWN`] items; `None` if there are none.
fn list(items: impl Iterator<Item = String>) -> Option<String> {
    let items: Vec<String> = items.collect();
    let more = match items.len().checked_sub(SHOWN) {
        Some(more) if more > 0 => format!(" and {more} more"),
        _ => String::new(),
    };
    let shown = items.iter().take(SHOWN).cloned().collect::<Vec<_>>();
    (!items.is_empty()).then(|| shown.join(", ") + &more)
}
