//! The `inputs` of a request: a text, a pair, or a list of these.

use std::fmt;

use serde::Deserialize;
use serde::de::value::MapAccessDeserializer;
use serde::de::{Deserializer, Error, MapAccess, SeqAccess, Visitor};
use utoipa::openapi::schema::{ArrayBuilder, ObjectBuilder, OneOf, OneOfBuilder, Schema, Type};
use utoipa::openapi::{Ref, RefOr};
use utoipa::{PartialSchema, ToSchema};

use super::Limits;
use super::error::{ApiError, Problem};
use crate::text::Input;

/// Read by hand rather than as an untagged enum, whose errors don't say what is wrong where.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Inputs(Vec<Input>);

impl From<Vec<Input>> for Inputs {
    fn from(inputs: Vec<Input>) -> Self {
        Self(inputs)
    }
}

impl Inputs {
    /// The inputs, if they are there and within the limits.
    pub(super) fn checked(self, limits: Limits) -> Result<Vec<Input>, ApiError> {
        let count = self.0.len();
        if count == 0 {
            return Err(Problem::EmptyInput.with("the list of inputs is empty"));
        }
        if count > limits.inputs {
            return Err(Problem::TooLarge.with(format!(
                "the request has {count} inputs, but at most {} are taken; split it",
                limits.inputs
            )));
        }
        for (i, input) in self.0.iter().enumerate() {
            check(&input.text, "text", i, limits)?;
            if let Some(pair) = &input.text_pair {
                check(pair, "text_pair", i, limits)?;
            }
        }
        Ok(self.0)
    }
}

fn check(text: &str, field: &str, index: usize, limits: Limits) -> Result<(), ApiError> {
    if text.trim().is_empty() {
        return Err(Problem::EmptyInput.with(format!(
            "inputs[{index}]: the {field} is empty or has nothing but whitespace"
        )));
    }
    // A character has at most 4 bytes: most texts need no counting.
    if text.len() > limits.text_chars && text.chars().count() > limits.text_chars {
        return Err(Problem::TooLarge.with(format!(
            "inputs[{index}]: the {field} has more than {} characters; shorten it",
            limits.text_chars
        )));
    }
    Ok(())
}

const EXPECTED: &str = "a text, or an object with \"text\" and optionally \"text_pair\"";

/// An element of the list.
struct One(Input);

impl<'de> Deserialize<'de> for One {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(OneVisitor).map(Self)
    }
}

struct OneVisitor;

impl<'de> Visitor<'de> for OneVisitor {
    type Value = Input;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(EXPECTED)
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Input, E> {
        self.visit_string(text.to_owned())
    }

    fn visit_string<E: Error>(self, text: String) -> Result<Input, E> {
        Ok(Input {
            text,
            text_pair: None,
        })
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Input, A::Error> {
        Input::deserialize(MapAccessDeserializer::new(map))
    }
}

impl<'de> Deserialize<'de> for Inputs {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(InputsVisitor)
    }
}

struct InputsVisitor;

impl<'de> Visitor<'de> for InputsVisitor {
    type Value = Inputs;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{EXPECTED}, or a list of these")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Inputs, E> {
        Ok(Inputs(vec![OneVisitor.visit_str(text)?]))
    }

    fn visit_string<E: Error>(self, text: String) -> Result<Inputs, E> {
        Ok(Inputs(vec![OneVisitor.visit_string(text)?]))
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Inputs, A::Error> {
        Ok(Inputs(vec![OneVisitor.visit_map(map)?]))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Inputs, A::Error> {
        let mut inputs = Vec::new();
        while let Some(One(input)) = list.next_element()? {
            inputs.push(input);
        }
        Ok(Inputs(inputs))
    }
}

/// A text or an [`Input`].
fn one() -> OneOfBuilder {
    OneOfBuilder::new()
        .item(ObjectBuilder::new().schema_type(Type::String))
        .item(Ref::from_schema_name(Input::name()))
}

impl PartialSchema for Inputs {
    fn schema() -> RefOr<Schema> {
        let inputs: OneOf = one()
            .item(ArrayBuilder::new().items(one()))
            .description(Some("A text, a pair of texts, or a list of these."))
            .examples(["a joy from start to end"])
            .build();
        RefOr::T(Schema::OneOf(inputs))
    }
}

impl ToSchema for Inputs {
    fn schemas(schemas: &mut Vec<(String, RefOr<Schema>)>) {
        schemas.push((Input::name().into_owned(), Input::schema()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str) -> Result<Vec<Input>, String> {
        serde_json::from_str(json)
            .map(|Inputs(inputs)| inputs)
            .map_err(|error| error.to_string())
    }

    fn input(text: &str, pair: Option<&str>) -> Input {
        Input {
            text: text.to_owned(),
            text_pair: pair.map(str::to_owned),
        }
    }

    #[test]
    fn takes_a_text_a_pair_or_a_list_of_both() {
        assert_eq!(parse(r#""a""#), Ok(vec![input("a", None)]));
        let pair = r#"{"text": "a", "text_pair": "b"}"#;
        assert_eq!(parse(pair), Ok(vec![input("a", Some("b"))]));
        let list = format!(r#"["x", {pair}]"#);
        assert_eq!(
            parse(&list),
            Ok(vec![input("x", None), input("a", Some("b"))])
        );
    }

    #[test]
    fn errors_say_what_was_expected() {
        for (json, sentence) in [
            (
                "5",
                "invalid type: integer `5`, expected a text, or an object",
            ),
            ("[\"a\", null]", "expected a text"),
            ("[[\"a\", \"b\"]]", "invalid type: sequence"),
            (
                r#"{"txt": "a"}"#,
                "unknown field `txt`, expected `text` or `text_pair`",
            ),
            (r#"{"text_pair": "a"}"#, "missing field `text`"),
            (
                r#"{"text": 5}"#,
                "invalid type: integer `5`, expected a string",
            ),
        ] {
            let error = parse(json).expect_err(json);
            assert!(error.contains(sentence), "{json}: {error}");
        }
    }

    #[test]
    fn limits_name_the_input_that_breaks_them() {
        let limits = Limits {
            inputs: 2,
            text_chars: 3,
            ..Limits::default()
        };
        let refused = |json: &str| {
            let inputs: Inputs = serde_json::from_str(json).expect(json);
            let error = inputs.checked(limits).expect_err(json);
            (error.problem(), error.to_string())
        };
        assert_eq!(refused("[]").0, Problem::EmptyInput);
        let (problem, text) = refused(r#"["a", " \t\u3000"]"#);
        assert_eq!(problem, Problem::EmptyInput);
        assert!(text.contains("inputs[1]: the text is empty"), "{text}");
        let (_, text) = refused(r#"{"text": "a", "text_pair": ""}"#);
        assert!(text.contains("text_pair"), "{text}");
        assert_eq!(refused(r#"["a", "a", "a"]"#).0, Problem::TooLarge);
        assert_eq!(refused(r#""aaaa""#).0, Problem::TooLarge);
        let wide: Inputs = serde_json::from_str(r#""ééé""#).expect("three characters");
        assert!(wide.checked(limits).is_ok());
    }
}
