//! Which modules PEFT's names and patterns mean.

use fancy_regex::Regex;
use serde_json::{Value, json};

/// Every linear of the encoder, in PEFT's spelling.
pub const ALL_LINEAR: &str = "all-linear";

/// Modules of a model, as `target_modules` names them.
#[derive(Clone, Debug, PartialEq)]
pub enum TargetModules {
    /// Names, or endings of names from a dot on.
    Named(Vec<String>),
    /// A regular expression (Python's) of whole names.
    Pattern(String),
}

impl TargetModules {
    pub(super) fn fits(&self, module: &str) -> bool {
        match self {
            Self::Named(names) => names.iter().any(|name| ends_with_name(module, name)),
            Self::Pattern(pattern) => matches(&format!("^(?:{pattern})$"), module),
        }
    }

    pub(super) fn json(&self) -> Value {
        match self {
            Self::Named(names) => json!(names),
            Self::Pattern(pattern) => json!(pattern),
        }
    }
}

/// Whether a key of `rank_pattern` or `alpha_pattern`, a name or a regular expression, fits the
/// module's name from its beginning or from a dot on.
pub(super) fn is_ending(key: &str, module: &str) -> bool {
    let is_name = key
        .chars()
        .all(|c| c.is_alphanumeric() || "_.-".contains(c));
    match is_name {
        true => ends_with_name(module, key),
        false => matches(&format!(r"^(?:.*\.)?(?:{key})$"), module),
    }
}

/// The number of the layer that a module belongs to: the first number behind a name that one of the
/// patterns fits, behind any name where there is none.
pub(super) fn layer_of(module: &str, patterns: &[String]) -> Option<usize> {
    let numbered = |name: &str| {
        let regex = Regex::new(&format!(r"^{name}\.(\d+)\.")).ok()?;
        let found = regex.captures(module).ok()??;
        found.get(1)?.as_str().parse().ok()
    };
    if patterns.is_empty() {
        return numbered(r".*?\.[^.]*");
    }
    patterns
        .iter()
        .find_map(|pattern| numbered(&format!(r"(?:|.*?\.)(?:{pattern})")))
}

/// Whether a text is a regular expression that can be used here.
pub(super) fn is_regex(text: &str) -> bool {
    Regex::new(text).is_ok()
}

/// A pattern that takes too long fits nothing: the module then counts as not adapted, and weights
/// for it are refused.
fn matches(pattern: &str, text: &str) -> bool {
    Regex::new(pattern).is_ok_and(|regex| regex.is_match(text).unwrap_or(false))
}

fn ends_with_name(module: &str, name: &str) -> bool {
    module
        .strip_suffix(name)
        .is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_number_behind_a_name_is_the_layer() {
        let module = "bert.encoder.layer.3.experts.5.dense";
        assert_eq!(layer_of(module, &[]), Some(3));
        assert_eq!(layer_of(module, &["experts".into()]), Some(5));
        assert_eq!(layer_of(module, &["h".into(), "lay[a-z]*".into()]), Some(3));
        assert_eq!(layer_of(module, &["h".into()]), None);
        assert_eq!(layer_of("bert.pooler.dense", &[]), None);
    }

    #[test]
    fn a_pattern_that_never_ends_fits_nothing() {
        let text = format!("{}!", "a".repeat(60));
        assert!(!TargetModules::Pattern("(?=(a+)+b)a*".into()).fits(&text));
    }
}
