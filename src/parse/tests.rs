use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Deserialize;
use serde_json::{Value, json};

use super::*;

#[derive(Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Outer {
    #[serde(default)]
    name: String,
    #[serde(default)]
    inner: Option<Inner>,
    #[serde(default)]
    list: Vec<Inner>,
    #[serde(default)]
    by_name: BTreeMap<String, Inner>,
    #[serde(default)]
    choice: Option<Choice>,
    #[serde(default)]
    pair: Option<(usize, usize)>,
    #[serde(default)]
    path: Option<PathBuf>,
    #[serde(default)]
    anything: Value,
}

#[derive(Debug, PartialEq, Deserialize)]
struct Inner {
    count: u32,
    #[serde(default)]
    share: f64,
    #[serde(default)]
    on: bool,
}

#[derive(Debug, PartialEq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Choice {
    Plain,
    Rows(Vec<Value>),
    Fields { count: u32 },
}

fn problem(document: &str) -> String {
    match json::<Outer>(document.as_bytes()) {
        Err(ParseError::Field(problem)) => problem,
        other => panic!("{document}: {other:?}"),
    }
}

#[test]
fn a_list_is_never_read_as_an_object() {
    for (document, place) in [
        (r#"["a"]"#, ""),
        (r#"{"inner": [5]}"#, "inner: "),
        (r#"{"list": [[5]]}"#, "list[0]: "),
        (r#"{"list": [{"count": 1}, [5, 0.5]]}"#, "list[1]: "),
        (r#"{"by_name": {"x": [5]}}"#, "by_name.x: "),
        (r#"{"by_name": [5]}"#, "by_name: "),
        (r#"{"choice": {"fields": [5]}}"#, "choice.fields: "),
    ] {
        let expected = format!("{place}expected an object, got a list");
        assert_eq!(problem(document), expected, "{document}");
        // The same from a value that has been read already.
        let value: Value = json(document.as_bytes()).unwrap();
        let error = super::value::<Outer>(value).unwrap_err();
        assert_eq!(error.to_string(), expected, "{document}");
    }
}

#[test]
fn an_error_names_the_field_and_no_rust_type() {
    for (document, expected) in [
        (
            r#"{"inner": {"count": 1.5}}"#,
            "inner.count: expected a whole number, got 1.5",
        ),
        (
            r#"{"inner": {"count": "1"}}"#,
            "inner.count: expected a whole number, got \"1\"",
        ),
        (
            r#"{"inner": {"count": -1}}"#,
            "inner.count: expected a whole number from 0 to 4294967295, got -1",
        ),
        (
            r#"{"inner": {"count": 1, "share": null}}"#,
            "inner.share: expected a number, got null",
        ),
        (
            r#"{"inner": {"count": 1, "on": 1}}"#,
            "inner.on: expected true or false, got 1",
        ),
        (r#"{"inner": {}}"#, "inner: missing field `count`"),
        (r#"{"inner": 5}"#, "inner: expected an object, got 5"),
        (r#"{"list": {}}"#, "list: expected a list, got an object"),
        (r#"{"name": ["a"]}"#, "name: expected a string, got a list"),
        (r#"{"path": 5}"#, "path: expected a string, got 5"),
        (
            r#"{"choice": 5}"#,
            "choice: expected one of `plain`, `rows`, `fields`, got 5",
        ),
        (
            r#"{"choice": ["plain"]}"#,
            "choice: expected one of `plain`, `rows`, `fields`, got a list",
        ),
        (
            r#"{"choice": "other"}"#,
            "choice: expected one of `plain`, `rows`, `fields`, got \"other\"",
        ),
        (
            r#"{"choice": "rows"}"#,
            "choice: expected an object, got a name alone",
        ),
        (
            r#"{"choice": {}}"#,
            "choice: expected an object with one field, got an object",
        ),
        (
            r#"{"choice": {"rows": [], "plain": null}}"#,
            "choice: expected an object with one field, got more",
        ),
        (
            r#"{"choice": {"rows": {}}}"#,
            "choice.rows: expected a list, got an object",
        ),
        (
            r#"{"pair": [1]}"#,
            "pair: expected a list of 2, got a list of 1",
        ),
    ] {
        assert_eq!(problem(document), expected, "{document}");
    }
    let unknown = problem(r#"{"names": "a"}"#);
    assert!(
        unknown.starts_with("unknown field `names`, expected one of `name`"),
        "{unknown}"
    );
}

#[test]
fn a_field_stands_once_in_an_object_at_any_depth() {
    for (document, expected) in [
        (r#"{"name": "a", "name": "a"}"#, "duplicate field `name`"),
        (
            r#"{"by_name": {"x": {"count": 1}, "x": {"count": 2}}}"#,
            "by_name: duplicate field `x`",
        ),
        (
            r#"{"anything": [{"a": {"b": 1, "b": 2}}]}"#,
            "anything[0].a: duplicate field `b`",
        ),
        (
            r#"{"inner": {"count": 1, "else": 1, "else": 2}}"#,
            "inner: duplicate field `else`",
        ),
    ] {
        assert_eq!(problem(document), expected, "{document}");
    }
    let error = json::<Value>(br#"{"a": 1, "a": 2}"#).unwrap_err();
    assert!(matches!(error, ParseError::Field(_)), "{error:?}");
}

#[test]
fn what_is_right_is_read() {
    let text = r#"{"name": "a", "inner": {"count": 5, "unknown": 1}, "list": [{"count": 1, "on": true}],
        "by_name": {"x": {"count": 2, "share": 1}}, "choice": {"rows": [1, {"a": [2]}]},
        "pair": [1, 2], "path": "a/b", "anything": {"x": [null, 1.5, {"y": "z"}]}}"#;
    let read: Outer = json(text.as_bytes()).unwrap();
    assert_eq!(
        read.choice,
        Some(Choice::Rows(vec![json!(1), json!({"a": [2]})]))
    );
    assert_eq!(read.anything, json!({"x": [null, 1.5, {"y": "z"}]}));
    assert_eq!(read.by_name["x"].share, 1.0);
    let same: Outer = value(json(text.as_bytes()).unwrap()).unwrap();
    assert_eq!(read, same);
    for (choice, expected) in [
        (r#""plain""#, Choice::Plain),
        (r#"{"fields": {"count": 3}}"#, Choice::Fields { count: 3 }),
    ] {
        assert_eq!(json::<Choice>(choice.as_bytes()).unwrap(), expected);
    }
}

#[test]
fn what_is_not_json_is_told_by_its_place() {
    for text in [
        "",
        "{",
        "nonsense",
        "{} {}",
        r#"{"name": "a",}"#,
        "{\"name\": \"\u{1}\"}",
    ] {
        let error = json::<Outer>(text.as_bytes()).unwrap_err();
        assert!(matches!(error, ParseError::Syntax(_)), "{text}: {error:?}");
        assert!(error.to_string().contains(" at line 1 column "), "{error}");
    }
}

#[test]
fn a_message_is_short_whatever_was_sent() {
    let long = "x".repeat(100_000);
    for document in [
        json!({ "inner": long }),
        json!({ &long: 1 }),
        json!({ "choice": long }),
        json!({ "by_name": { &long: 1 } }),
    ] {
        let error = value::<Outer>(document).unwrap_err().to_string();
        assert!(error.len() < 1_500, "{} bytes", error.len());
    }
}

#[test]
fn toml_has_the_same_rules() {
    let read = |text: &str| super::toml::<Outer>(text);
    assert_eq!(
        read("name = \"a\"\n[inner]\ncount = 5\n")
            .unwrap()
            .inner
            .unwrap()
            .count,
        5
    );
    for (text, expected) in [
        ("inner = [5]", "inner: expected an object, got a list"),
        (
            "[inner]\ncount = 1.5",
            "inner.count: expected a whole number, got 1.5",
        ),
        (
            "choice = 5",
            "choice: expected one of `plain`, `rows`, `fields`, got 5",
        ),
    ] {
        assert_eq!(read(text).unwrap_err().to_string(), expected);
    }
    assert!(matches!(read("name ="), Err(ParseError::Syntax(_))));
}
