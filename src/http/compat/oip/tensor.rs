//! Tensors of the Open Inference Protocol, in JSON and in Triton's binary form.

use axum::body::Bytes;
use base64::prelude::{BASE64_STANDARD as STANDARD, Engine as _};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

use super::super::Unsupported;
use crate::http::error::{ApiError, Problem};

/// A tensor of a request.
#[derive(Clone, Debug, Deserialize, ToSchema)]
pub(super) struct InputTensor {
    #[schema(example = "text")]
    pub(super) name: String,
    /// `[n]` or `[n, 1]`.
    #[schema(example = json!([1]), min_items = 1, max_items = 2)]
    pub(super) shape: Vec<u64>,
    /// `BYTES`.
    #[schema(example = "BYTES", pattern = "^BYTES$")]
    pub(super) datatype: String,
    #[serde(default)]
    #[schema(inline)]
    pub(super) parameters: Option<InputParameters>,
    /// The texts, nested as the shape or flat; absent where they come in binary.
    #[serde(default)]
    #[schema(value_type = Option<Vec<Value>>,
        example = json!(["A wonderful film."]))]
    pub(super) data: Option<Vec<Value>>,
}

#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
pub(super) struct InputParameters {
    /// Bytes of the tensor behind the JSON.
    #[serde(default)]
    pub(super) binary_data_size: Option<usize>,
    /// How the texts are written: as they are, or in base64.
    #[serde(default)]
    #[schema(inline)]
    content_type: Option<ContentType>,
    /// Triton's shared memory.
    #[serde(default, rename = "shared_memory_region")]
    _shared_memory_region: Unsupported,
}

/// Content types of MLServer that a text can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(super) enum ContentType {
    Str,
    Base64,
}

impl InputTensor {
    /// Number of texts.
    fn rows(&self) -> Result<usize, ApiError> {
        if self.datatype != "BYTES" {
            return Err(self.invalid(format_args!("is {:?}; texts are BYTES", self.datatype)));
        }
        match self.shape.as_slice() {
            [rows] | [rows, 1] => usize::try_from(*rows).map_err(|_| self.too_many()),
            _ => Err(self.invalid(format_args!(
                "has shape {:?}, not [n] or [n, 1]",
                self.shape
            ))),
        }
    }

    /// The texts; those in binary are taken from the beginning of `binary`. `content_type` holds
    /// where the tensor has none of its own.
    pub(super) fn texts(
        self,
        content_type: Option<ContentType>,
        binary: &mut &[u8],
    ) -> Result<Vec<String>, ApiError> {
        let rows = self.rows()?;
        let own = self.parameters.as_ref();
        let content_type = own.and_then(|own| own.content_type).or(content_type);
        let mut texts = match (own.and_then(|own| own.binary_data_size), &self.data) {
            (Some(size), None) => {
                let Some((own, rest)) = binary.split_at_checked(size) else {
                    return Err(self.invalid(format_args!(
                        "has {size} bytes by its parameters, but only {} came",
                        binary.len()
                    )));
                };
                *binary = rest;
                self.read_binary(own)?
            }
            (None, Some(data)) => {
                let mut texts = Vec::new();
                for value in data {
                    self.flatten(value, self.shape.len(), &mut texts)?;
                }
                texts
            }
            _ => {
                return Err(self.invalid(format_args!(
                    "has its texts either in `data` or, with `binary_data_size`, behind the JSON"
                )));
            }
        };
        if texts.len() != rows {
            return Err(self.invalid(format_args!(
                "has {} texts, but by its shape {rows}",
                texts.len()
            )));
        }
        if content_type == Some(ContentType::Base64) {
            for text in &mut texts {
                let bytes = STANDARD.decode(&text).map_err(|error| {
                    self.invalid(format_args!("has a text that is not base64: {error}"))
                })?;
                *text = String::from_utf8(bytes).map_err(|_| self.not_utf8())?;
            }
        }
        Ok(texts)
    }

    /// Each text with its length before it: 4 bytes, little-endian.
    fn read_binary(&self, mut bytes: &[u8]) -> Result<Vec<String>, ApiError> {
        let mut texts = Vec::new();
        while !bytes.is_empty() {
            let text = bytes.split_first_chunk().and_then(|(length, rest)| {
                let length = usize::try_from(u32::from_le_bytes(*length)).ok()?;
                rest.split_at_checked(length)
            });
            let Some((text, rest)) = text else {
                return Err(self.invalid(format_args!("ends in the middle of a text")));
            };
            bytes = rest;
            let text = std::str::from_utf8(text);
            let text = text.map_err(|_| self.not_utf8())?;
            texts.push(text.to_owned());
        }
        Ok(texts)
    }

    fn flatten(
        &self,
        value: &Value,
        depth: usize,
        texts: &mut Vec<String>,
    ) -> Result<(), ApiError> {
        match value {
            Value::String(text) => texts.push(text.clone()),
            Value::Array(values) if depth > 1 => {
                for value in values {
                    self.flatten(value, depth - 1, texts)?;
                }
            }
            _ => return Err(self.invalid(format_args!("has `data` that is not a list of texts"))),
        }
        Ok(())
    }

    fn not_utf8(&self) -> ApiError {
        self.invalid(format_args!("has a text that is not UTF-8"))
    }

    fn too_many(&self) -> ApiError {
        self.invalid(format_args!("has too many rows"))
    }

    fn invalid(&self, what: std::fmt::Arguments<'_>) -> ApiError {
        Problem::InvalidBody.with(format!("the input {:?} {what}", self.name))
    }
}

/// What is in a tensor of an answer.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Values {
    Bytes(Vec<String>),
    Fp32(Vec<f32>),
}

impl Values {
    pub(super) fn datatype(&self) -> &'static str {
        match self {
            Self::Bytes(_) => "BYTES",
            Self::Fp32(_) => "FP32",
        }
    }

    /// Row by row: numbers little-endian, each text with its length before it.
    pub(super) fn to_binary(&self) -> Vec<u8> {
        match self {
            Self::Bytes(texts) => {
                let mut bytes = Vec::new();
                for text in texts {
                    // A label is never near 4 GiB.
                    let length = u32::try_from(text.len()).unwrap_or(u32::MAX);
                    bytes.extend_from_slice(&length.to_le_bytes());
                    bytes.extend_from_slice(text.as_bytes());
                }
                bytes
            }
            Self::Fp32(numbers) => numbers
                .iter()
                .flat_map(|number| number.to_le_bytes())
                .collect(),
        }
    }
}

/// A tensor of an answer.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(super) struct OutputTensor {
    #[schema(example = "label")]
    pub(super) name: &'static str,
    #[schema(example = "BYTES")]
    pub(super) datatype: &'static str,
    #[schema(example = json!([1]))]
    pub(super) shape: Vec<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(inline)]
    pub(super) parameters: Option<OutputParameters>,
    /// Row by row; absent where the tensor is behind the JSON.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Vec<Value>>, example = json!(["positive"]))]
    pub(super) data: Option<Data>,
}

#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
pub(super) struct OutputParameters {
    /// Bytes of the tensor behind the JSON.
    binary_data_size: usize,
}

#[derive(Clone, Debug, Serialize)]
#[serde(untagged)]
pub(super) enum Data {
    Texts(Vec<String>),
    Numbers(Vec<f32>),
}

impl OutputTensor {
    /// With `binary` the values go behind what is there, else into the JSON.
    pub(super) fn new(
        name: &'static str,
        shape: Vec<usize>,
        values: Values,
        binary: Option<&mut Vec<u8>>,
    ) -> Self {
        let datatype = values.datatype();
        let (parameters, data) = match binary {
            Some(binary) => {
                let bytes = values.to_binary();
                binary.extend_from_slice(&bytes);
                let binary_data_size = bytes.len();
                (Some(OutputParameters { binary_data_size }), None)
            }
            None => (
                None,
                Some(match values {
                    Values::Bytes(texts) => Data::Texts(texts),
                    Values::Fp32(numbers) => Data::Numbers(numbers),
                }),
            ),
        };
        Self {
            name,
            datatype,
            shape,
            parameters,
            data,
        }
    }
}

/// A body of JSON and the binary tensors behind it.
pub(super) fn split(body: &[u8], json_length: Option<usize>) -> Result<(&[u8], &[u8]), ApiError> {
    match json_length {
        None => Ok((body, &[])),
        Some(length) => body.split_at_checked(length).ok_or_else(|| {
            Problem::InvalidParameter.with(format!(
                "the header Inference-Header-Content-Length says {length} bytes of JSON, but the \
                 body has {}",
                body.len()
            ))
        }),
    }
}

/// The two parts of an answer in one.
pub(super) fn join(json: Vec<u8>, binary: Vec<u8>) -> Bytes {
    let mut body = json;
    body.extend_from_slice(&binary);
    body.into()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn texts(tensor: Value, mut binary: &[u8]) -> Result<Vec<String>, String> {
        let tensor: InputTensor = serde_json::from_value(tensor).expect("a tensor");
        let texts = tensor
            .texts(None, &mut binary)
            .map_err(|error| error.detail().to_owned())?;
        assert!(binary.is_empty());
        Ok(texts)
    }

    fn bytes(shape: &[u64], data: Value) -> Value {
        json!({"name": "text", "datatype": "BYTES", "shape": shape, "data": data})
    }

    #[test]
    fn texts_come_flat_nested_or_in_binary() {
        let expected = Ok(vec!["a".to_owned(), "é".to_owned()]);
        assert_eq!(texts(bytes(&[2], json!(["a", "é"])), &[]), expected);
        assert_eq!(texts(bytes(&[2, 1], json!(["a", "é"])), &[]), expected);
        assert_eq!(texts(bytes(&[2, 1], json!([["a"], ["é"]])), &[]), expected);
        let values = Values::Bytes(vec!["a".to_owned(), "é".to_owned()]).to_binary();
        assert_eq!(values, b"\x01\0\0\0a\x02\0\0\0\xc3\xa9");
        let tensor = json!({"name": "text", "datatype": "BYTES", "shape": [2],
            "parameters": {"binary_data_size": values.len()}});
        assert_eq!(texts(tensor, &values), expected);
    }

    #[test]
    fn tensors_that_contradict_themselves_are_refused() {
        let binary = |size: usize| {
            json!({"name": "text", "datatype": "BYTES", "shape": [1],
                "parameters": {"binary_data_size": size}})
        };
        for (tensor, bytes, sentence) in [
            (bytes(&[3], json!(["a"])), &b""[..], "by its shape 3"),
            (bytes(&[1, 2], json!(["a", "b"])), b"", "not [n] or [n, 1]"),
            (bytes(&[1], json!([["a"]])), b"", "not a list of texts"),
            (bytes(&[1], json!([5])), b"", "not a list of texts"),
            (bytes(&[u64::MAX], json!(["a"])), b"", "by its shape"),
            (binary(9), b"\x01\0\0\0a", "only 5 came"),
            (binary(5), b"\xff\xff\xff\xffa", "in the middle"),
            (binary(3), b"\x01\0\0", "in the middle"),
            (binary(5), b"\x01\0\0\0\xff", "not UTF-8"),
            (
                json!({"name": "text", "datatype": "BYTES", "shape": [1]}),
                b"",
                "either in `data`",
            ),
            (
                json!({"name": "text", "datatype": "FP32", "shape": [1], "data": [1.0]}),
                b"",
                "texts are BYTES",
            ),
        ] {
            let error = texts(tensor, bytes).expect_err(sentence);
            assert!(error.contains(sentence), "{error}");
        }
    }
}
