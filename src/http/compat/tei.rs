//! The routes of text-embeddings-inference that its clients use with classifiers.

use std::collections::BTreeMap;
use std::fmt;

use axum::extract::{Request, State};
use axum::http::HeaderMap;
use axum::response::{IntoResponse, Response};
use serde::de::value::SeqAccessDeserializer;
use serde::de::{Deserializer, Error, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};
use utoipa::openapi::RefOr;
use utoipa::openapi::schema::{ArrayBuilder, ObjectBuilder, OneOfBuilder, Schema, Type};
use utoipa::{PartialSchema, ToSchema};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::http::AppState;
use crate::http::classify::{ClassifyErrors, Question, answered};
use crate::http::error::{ApiError, problem_set};
use crate::http::extract::{self, Json, Path};
use crate::http::health::ReadyErrors;
use crate::http::openapi::TaskPath;
use crate::http::prediction::{Function, LabelScore, ranked};
use crate::text::{self, Input};

pub(super) fn routes() -> OpenApiRouter<AppState> {
    OpenApiRouter::new()
        .routes(routes!(predict_default))
        .routes(routes!(predict))
        .routes(routes!(info_default))
        .routes(routes!(info))
}

pub(super) fn open_routes() -> OpenApiRouter<AppState> {
    OpenApiRouter::new().routes(routes!(health))
}

#[derive(Clone, Debug, Deserialize, ToSchema)]
struct PredictRequest {
    #[schema(inline)]
    inputs: PredictInputs,
    /// Cut inputs that have more tokens than the task takes; if false, they are an error.
    #[serde(default)]
    #[schema(default = false)]
    truncate: Option<bool>,
    /// Which side of them is cut; by default that of the encoder's tokenizer.
    #[serde(default)]
    #[schema(value_type = String, pattern = "^([Ll]eft|[Rr]ight)$")]
    #[serde(deserialize_with = "given")]
    truncation_direction: Option<TruncationDirection>,
    /// Give logits instead of probabilities.
    #[serde(default)]
    raw_scores: bool,
}

/// Reads a direction, which must not be null.
fn given<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<TruncationDirection>, D::Error> {
    TruncationDirection::deserialize(deserializer).map(Some)
}

#[derive(Clone, Copy, Debug, Deserialize)]
enum TruncationDirection {
    #[serde(alias = "left")]
    Left,
    #[serde(alias = "right")]
    Right,
}

impl From<TruncationDirection> for text::TruncationDirection {
    fn from(direction: TruncationDirection) -> Self {
        match direction {
            TruncationDirection::Left => Self::Left,
            TruncationDirection::Right => Self::Right,
        }
    }
}

/// A text, a pair `[text, text]`, or a batch `[[text], [text, text], ..]`.
#[derive(Clone, Debug, PartialEq)]
enum PredictInputs {
    One(Input),
    Batch(Vec<Input>),
}

/// One text or a pair, as a list.
#[derive(Deserialize)]
struct Texts(Vec<String>);

impl Texts {
    fn input<E: Error>(self) -> Result<Input, E> {
        let mut texts = self.0.into_iter();
        match (texts.next(), texts.next(), texts.next()) {
            (Some(text), text_pair, None) => Ok(Input { text, text_pair }),
            (None, ..) => Err(E::custom(
                "an input is an empty list; give it one text, or two",
            )),
            _ => Err(E::custom(
                "an input has more than two texts; a batch is a list of lists: [[text], [text]]",
            )),
        }
    }
}

impl<'de> Deserialize<'de> for PredictInputs {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(PredictVisitor)
    }
}

struct PredictVisitor;

impl<'de> Visitor<'de> for PredictVisitor {
    type Value = PredictInputs;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a text, a pair [text, text], or a batch [[text], [text, text], ..]")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<PredictInputs, E> {
        Ok(PredictInputs::One(Input {
            text: text.to_owned(),
            text_pair: None,
        }))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<PredictInputs, A::Error> {
        /// What tells a pair from a batch.
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Element {
            Text(String),
            Texts(Texts),
        }
        let elements = Vec::<Element>::deserialize(SeqAccessDeserializer::new(list))
            .map_err(|_| A::Error::custom(format_args!("expected {}", Expected)))?;
        let is_batch = !matches!(elements.first(), Some(Element::Text(_)));
        let mut texts = Vec::new();
        let mut batch = Vec::new();
        for element in elements {
            match element {
                Element::Text(text) if !is_batch => texts.push(text),
                Element::Texts(texts) if is_batch => batch.push(texts.input()?),
                _ => {
                    return Err(A::Error::custom(
                        "the list has texts and lists; in a batch every input is a list: \
                         [[text], [text, text]]",
                    ));
                }
            }
        }
        match is_batch {
            true => Ok(PredictInputs::Batch(batch)),
            false => Texts(texts).input().map(PredictInputs::One),
        }
    }
}

/// The sentence of [`PredictVisitor`].
struct Expected;

impl fmt::Display for Expected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        PredictVisitor.expecting(f)
    }
}

impl PartialSchema for PredictInputs {
    fn schema() -> RefOr<Schema> {
        let text = || ObjectBuilder::new().schema_type(Type::String);
        let texts = |most| {
            let list = ArrayBuilder::new().items(text());
            list.min_items(Some(1)).max_items(Some(most))
        };
        let inputs = OneOfBuilder::new()
            .item(text())
            .item(texts(2))
            .item(ArrayBuilder::new().items(texts(2)).min_items(Some(1)))
            .description(Some(
                "A text, a pair `[text, text]`, or a batch `[[text], [text, text], ..]`.",
            ));
        RefOr::T(Schema::OneOf(inputs.build()))
    }
}

impl ToSchema for PredictInputs {}

/// Labels of one input, the highest score first, or of each input of a batch.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[serde(untagged)]
enum PredictResponse {
    One(Vec<LabelScore>),
    Batch(Vec<Vec<LabelScore>>),
}

/// Classify with the default task.
#[utoipa::path(post, path = "/predict", tag = "text-embeddings-inference",
    operation_id = "predict_default",
    request_body(content = PredictRequest, example = json!({"inputs": "A wonderful film."})),
    responses(
        (status = 200, description = "Labels with their scores.", body = PredictResponse,
            example = json!([{"label": "positive", "score": 0.998}])),
        ClassifyErrors))]
async fn predict_default(
    State(state): State<AppState>,
    request: Request,
) -> Result<Response, ApiError> {
    let name = state.default_task()?;
    classify(&state, &name, request).await
}

/// Classify with a task: the base URL of a client is `/tasks/TASK`.
#[utoipa::path(post, path = "/tasks/{task}/predict", tag = "text-embeddings-inference",
    operation_id = "predict",
    params(TaskPath),
    request_body(content = PredictRequest, example = json!({"inputs": [["A wonderful film."],
        ["Is it good?", "It is."]], "raw_scores": true, "truncate": true})),
    responses(
        (status = 200, description = "Labels with their scores.", body = PredictResponse,
            example = json!([[{"label": "positive", "score": 2.5}],
                [{"label": "positive", "score": 1.5}]])),
        ClassifyErrors))]
async fn predict(
    State(state): State<AppState>,
    Path(name): Path<String>,
    request: Request,
) -> Result<Response, ApiError> {
    classify(&state, &name, request).await
}

async fn classify(state: &AppState, name: &str, request: Request) -> Result<Response, ApiError> {
    let read = |headers: &HeaderMap, body: &[u8]| {
        let body: PredictRequest = extract::json(headers, body)?;
        let (inputs, is_batch) = match body.inputs {
            PredictInputs::One(input) => (vec![input], false),
            PredictInputs::Batch(inputs) => (inputs, true),
        };
        let question = Question {
            inputs: inputs.into(),
            truncate: body.truncate.unwrap_or(false),
            truncation_direction: body.truncation_direction.map(Into::into),
            version: None,
            timeout: None,
        };
        let function = match body.raw_scores {
            true => Function::None,
            false => Function::Pipeline,
        };
        Ok((question, (is_batch, function)))
    };
    answered(
        state,
        name,
        request,
        read,
        |task, answer, (is_batch, function)| {
            let rows = answer.logits.iter();
            let mut ranked = rows.map(|row| ranked(&task.config, row, function, None));
            let response = match is_batch {
                true => PredictResponse::Batch(ranked.collect()),
                false => PredictResponse::One(ranked.next().unwrap_or_default()),
            };
            Ok(Json(response).into_response())
        },
    )
    .await
}

/// A task, as text-embeddings-inference describes its model.
#[derive(Clone, Debug, Serialize, ToSchema)]
struct Info {
    /// Name of the task.
    #[schema(example = "movie-sentiment")]
    model_id: String,
    /// The live version.
    #[schema(example = "1")]
    model_sha: String,
    #[schema(example = "float32")]
    model_dtype: &'static str,
    #[schema(inline)]
    model_type: ModelType,
    /// Inputs in the server at a time.
    max_concurrent_requests: usize,
    /// Tokens of an input, special tokens included.
    max_input_length: usize,
    max_batch_tokens: usize,
    #[schema(value_type = Option<usize>)]
    max_batch_requests: (),
    /// Inputs in a request.
    max_client_batch_size: usize,
    auto_truncate: bool,
    tokenization_workers: usize,
    version: &'static str,
    #[schema(value_type = Option<String>)]
    sha: (),
    #[schema(value_type = Option<String>)]
    docker_label: (),
}

#[derive(Clone, Debug, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
enum ModelType {
    Classifier {
        id2label: BTreeMap<String, String>,
        label2id: BTreeMap<String, usize>,
    },
}

problem_set!(InfoErrors: InvalidParameter, UnknownTask, Internal);

/// The default task, described.
#[utoipa::path(get, path = "/info", tag = "text-embeddings-inference",
    operation_id = "info_default",
    responses((status = 200, description = "The task.", body = Info), InfoErrors))]
async fn info_default(State(state): State<AppState>) -> Result<Json<Info>, ApiError> {
    let name = state.default_task()?;
    describe(&state, &name).await
}

/// A task, described.
#[utoipa::path(get, path = "/tasks/{task}/info", tag = "text-embeddings-inference",
    operation_id = "info",
    params(TaskPath),
    responses((status = 200, description = "The task.", body = Info), InfoErrors))]
async fn info(
    State(state): State<AppState>,
    Path(name): Path<String>,
) -> Result<Json<Info>, ApiError> {
    describe(&state, &name).await
}

async fn describe(state: &AppState, name: &str) -> Result<Json<Info>, ApiError> {
    let task = state.described(state.task(name)?).await?;
    let labels = task.labels.iter().enumerate();
    let id2label = labels
        .clone()
        .map(|(id, label)| (id.to_string(), label.clone()));
    let label2id = labels.map(|(id, label)| (label.clone(), id));
    Ok(Json(Info {
        model_id: task.task.clone(),
        model_sha: task.version.to_string(),
        model_dtype: match state.dtype {
            "f32" => "float32",
            "f16" => "float16",
            "bf16" => "bfloat16",
            other => other,
        },
        model_type: ModelType::Classifier {
            id2label: id2label.collect(),
            label2id: label2id.collect(),
        },
        max_concurrent_requests: state.engine.max_queue,
        max_input_length: task.max_length,
        max_batch_tokens: state.engine.max_batch_tokens,
        max_batch_requests: (),
        max_client_batch_size: state.limits.inputs,
        auto_truncate: false,
        tokenization_workers: state.engine.tokenizer_threads,
        version: env!("CARGO_PKG_VERSION"),
        sha: (),
        docker_label: (),
    }))
}

/// The server takes requests.
#[utoipa::path(get, path = "/health", tag = "text-embeddings-inference", operation_id = "health",
    responses((status = 200, description = "The server takes requests."), ReadyErrors))]
async fn health(State(state): State<AppState>) -> Result<(), ApiError> {
    state.readiness.check()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str) -> Result<PredictInputs, String> {
        serde_json::from_str(json).map_err(|error| error.to_string())
    }

    fn input(text: &str, pair: Option<&str>) -> Input {
        Input {
            text: text.to_owned(),
            text_pair: pair.map(str::to_owned),
        }
    }

    #[test]
    fn a_flat_list_is_a_pair_and_a_list_of_lists_a_batch() {
        let one = |input| Ok(PredictInputs::One(input));
        assert_eq!(parse(r#""a""#), one(input("a", None)));
        assert_eq!(parse(r#"["a"]"#), one(input("a", None)));
        assert_eq!(parse(r#"["a", "b"]"#), one(input("a", Some("b"))));
        assert_eq!(
            parse(r#"[["a"], ["b", "c"]]"#),
            Ok(PredictInputs::Batch(vec![
                input("a", None),
                input("b", Some("c"))
            ]))
        );
        assert_eq!(parse("[]"), Ok(PredictInputs::Batch(Vec::new())));
    }

    #[test]
    fn what_is_neither_is_told_from_what_it_should_be() {
        for (json, sentence) in [
            (r#"["a", "b", "c"]"#, "more than two texts"),
            (r#"[["a"], "b"]"#, "texts and lists"),
            (r#"[[]]"#, "an empty list"),
            ("5", "expected a text, a pair"),
            ("[5]", "expected a text, a pair"),
            (r#"{"text": "a"}"#, "expected a text, a pair"),
        ] {
            let error = parse(json).expect_err(json);
            assert!(error.contains(sentence), "{json}: {error}");
        }
    }
}
