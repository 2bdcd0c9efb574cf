//! The fields of other servers' APIs do what `docs/clients.md` says of them.

use std::collections::BTreeMap;

use super::*;

const DOCS: &str = include_str!("../../../docs/clients.md");

/// What becomes of a field, in the words of the documentation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Effect {
    Honoured,
    Refused,
    None,
}

impl Effect {
    const ALL: [(Self, &str); 3] = [
        (Self::Honoured, "honoured"),
        (Self::Refused, "refused"),
        (Self::None, "no effect"),
    ];
}

/// A field, what becomes of it, a body without it, and what the body gets to have it.
type Field = (&'static str, Effect, Value, Value);

struct Dialect {
    /// The heading in the documentation.
    heading: &'static str,
    path: &'static str,
    fields: Vec<Field>,
}

/// More tokens than the task takes; the ends differ.
fn long() -> String {
    format!("{}{}", "0 ".repeat(20), "1 ".repeat(20))
}

fn hugging_face() -> Dialect {
    use Effect::{Honoured, None, Refused};
    let plain = json!({"inputs": "3 4"});
    let parameter = |name: &str, value: Value| json!({"parameters": {name: value}});
    Dialect {
        heading: "## Hugging Face",
        path: "/tasks/mood",
        fields: vec![
            ("inputs", Honoured, plain.clone(), json!({"inputs": "3"})),
            (
                "parameters.top_k",
                Honoured,
                plain.clone(),
                parameter("top_k", json!(1)),
            ),
            (
                "parameters.function_to_apply",
                Honoured,
                plain.clone(),
                parameter("function_to_apply", json!("sigmoid")),
            ),
            (
                "parameters.return_all_scores",
                Honoured,
                plain.clone(),
                parameter("return_all_scores", json!(false)),
            ),
            (
                "parameters.truncation",
                Honoured,
                json!({"inputs": long()}),
                parameter("truncation", json!(false)),
            ),
            (
                "parameters.padding",
                None,
                plain.clone(),
                parameter("padding", json!("longest")),
            ),
            (
                "parameters.max_length",
                Refused,
                plain.clone(),
                parameter("max_length", json!(2)),
            ),
            (
                "parameters.candidate_labels",
                Refused,
                plain.clone(),
                parameter("candidate_labels", json!(["a", "b"])),
            ),
            (
                "parameters.hypothesis_template",
                Refused,
                plain.clone(),
                parameter("hypothesis_template", json!("{}")),
            ),
            (
                "parameters.multi_label",
                Refused,
                plain.clone(),
                parameter("multi_label", json!(true)),
            ),
            (
                "candidate_labels",
                Refused,
                plain.clone(),
                json!({"candidate_labels": ["a", "b"]}),
            ),
            (
                "options",
                None,
                plain,
                json!({"options": {"wait_for_model": true}}),
            ),
        ],
    }
}

fn text_embeddings_inference() -> Dialect {
    use Effect::Honoured;
    let plain = json!({"inputs": "3 4"});
    let cut = json!({"inputs": long(), "truncate": true});
    Dialect {
        heading: "## text-embeddings-inference",
        path: "/tasks/mood/predict",
        fields: vec![
            (
                "inputs",
                Honoured,
                plain.clone(),
                json!({"inputs": [["3"]]}),
            ),
            (
                "truncate",
                Honoured,
                json!({"inputs": long()}),
                json!({"truncate": true}),
            ),
            (
                "truncation_direction",
                Honoured,
                cut,
                json!({"truncation_direction": "left"}),
            ),
            ("raw_scores", Honoured, plain, json!({"raw_scores": true})),
        ],
    }
}

fn open_inference() -> Dialect {
    use Effect::{Honoured, None, Refused};
    let with = |field: &str, value: Value| {
        let mut tensor = json!({"name": "text", "shape": [1], "datatype": "BYTES",
            "data": ["Mw=="]});
        tensor[field] = value;
        json!({"inputs": [tensor]})
    };
    let plain = with("name", json!("text"));
    let parameter = |name: &str, value: Value| json!({"parameters": {name: value}});
    let of_input = |name: &str, value: Value| with("parameters", json!({name: value}));
    let of_output = |name: &str, value: Value| json!({"outputs": [{"name": "score", "parameters": {name: value}}]});
    let score = json!({"outputs": [{"name": "score"}]});
    let mut wanted = plain.clone();
    wanted["outputs"] = score["outputs"].clone();
    let two = |name: &str| {
        let other = json!({"name": name, "shape": [1], "datatype": "BYTES", "data": ["4"]});
        json!({"inputs": [plain["inputs"][0], other]})
    };
    let shared = json!("region");
    Dialect {
        heading: "## Open Inference Protocol",
        path: "/v2/models/mood/infer",
        fields: vec![
            ("id", Honoured, plain.clone(), json!({"id": "seven"})),
            (
                "parameters.binary_data_output",
                Honoured,
                plain.clone(),
                parameter("binary_data_output", json!(true)),
            ),
            (
                "parameters.content_type",
                Honoured,
                plain.clone(),
                parameter("content_type", json!("base64")),
            ),
            (
                "parameters.truncate",
                Honoured,
                with("data", json!([long()])),
                parameter("truncate", json!(false)),
            ),
            (
                "parameters.timeout",
                Honoured,
                plain.clone(),
                parameter("timeout", json!(0)),
            ),
            (
                "parameters.priority",
                None,
                plain.clone(),
                parameter("priority", json!(1)),
            ),
            (
                "parameters.sequence_id",
                None,
                plain.clone(),
                parameter("sequence_id", json!(7)),
            ),
            (
                "parameters.sequence_start",
                None,
                plain.clone(),
                parameter("sequence_start", json!(true)),
            ),
            (
                "parameters.sequence_end",
                None,
                plain.clone(),
                parameter("sequence_end", json!(true)),
            ),
            ("inputs[].name", Honoured, two("text_pair"), two("other")),
            (
                "inputs[].shape",
                Honoured,
                plain.clone(),
                with("shape", json!([2])),
            ),
            (
                "inputs[].datatype",
                Honoured,
                plain.clone(),
                with("datatype", json!("FP32")),
            ),
            (
                "inputs[].data",
                Honoured,
                plain.clone(),
                with("data", json!(["3"])),
            ),
            (
                "inputs[].parameters.content_type",
                Honoured,
                plain.clone(),
                of_input("content_type", json!("base64")),
            ),
            (
                "inputs[].parameters.binary_data_size",
                Honoured,
                plain.clone(),
                of_input("binary_data_size", json!(5)),
            ),
            (
                "inputs[].parameters.shared_memory_region",
                Refused,
                plain.clone(),
                of_input("shared_memory_region", shared.clone()),
            ),
            ("outputs", Honoured, plain.clone(), score.clone()),
            (
                "outputs[].name",
                Honoured,
                wanted.clone(),
                json!({"outputs": [{"name": "label"}]}),
            ),
            (
                "outputs[].parameters.binary_data",
                Honoured,
                wanted.clone(),
                of_output("binary_data", json!(true)),
            ),
            (
                "outputs[].parameters.classification",
                Refused,
                wanted.clone(),
                of_output("classification", json!(2)),
            ),
            (
                "outputs[].parameters.content_type",
                Refused,
                wanted.clone(),
                of_output("content_type", json!("base64")),
            ),
            (
                "outputs[].parameters.shared_memory_region",
                Refused,
                wanted,
                of_output("shared_memory_region", shared),
            ),
        ],
    }
}

fn with(mut body: Value, fields: &Value) -> Value {
    for (name, value) in fields.as_object().expect("an object") {
        body[name] = value.clone();
    }
    body
}

#[tokio::test]
async fn each_field_does_what_the_documentation_says() {
    let api = Api::new();
    for Dialect { path, fields, .. } in [
        hugging_face(),
        text_embeddings_inference(),
        open_inference(),
    ] {
        for (field, effect, body, change) in fields {
            let without = api.post(path, body.to_string()).await;
            let with = api.post(path, with(body, &change).to_string()).await;
            match effect {
                Effect::Honoured => assert_ne!(without.body, with.body, "{path}, {field}"),
                Effect::None => assert_eq!(without.body, with.body, "{path}, {field}"),
                Effect::Refused => {
                    assert_eq!(with.status, 422, "{path}, {field}: {}", with.body);
                    let name = field.rsplit('.').next().unwrap_or(field);
                    assert!(with.body.contains(name), "{field}: {}", with.body);
                }
            }
        }
    }
}

#[test]
fn the_documentation_has_each_field() {
    for Dialect {
        heading, fields, ..
    } in [
        hugging_face(),
        text_embeddings_inference(),
        open_inference(),
    ] {
        let (_, section) = DOCS.split_once(heading).expect(heading);
        let section = section.split("\n## ").next().unwrap_or_default();
        let documented: BTreeMap<&str, Effect> = section
            .lines()
            .filter_map(|line| {
                let (field, rest) = line.strip_prefix("| `")?.split_once("` | ")?;
                let effect = Effect::ALL
                    .into_iter()
                    .find(|(_, words)| rest.starts_with(words))?;
                Some((field, effect.0))
            })
            .collect();
        let tested = fields.iter().map(|(field, effect, ..)| (*field, *effect));
        assert_eq!(documented, tested.collect(), "{heading}");
    }
}

#[tokio::test]
async fn null_is_absent_where_those_schemas_allow_it() {
    let api = Api::new();
    let tensor = json!({"name": "text", "shape": [1], "datatype": "BYTES", "data": ["3 4"]});
    let nulls = |fields: &[&str]| -> Value {
        fields
            .iter()
            .map(|field| ((*field).to_owned(), Value::Null))
            .collect()
    };
    let infer = json!({"inputs": [tensor]});
    let of_input = with(tensor.clone(), &json!({"parameters": null}));
    let in_input = nulls(&["binary_data_size", "content_type", "shared_memory_region"]);
    let in_output = nulls(&[
        "binary_data",
        "classification",
        "content_type",
        "shared_memory_region",
    ]);
    let in_parameters = nulls(&["binary_data_output", "content_type", "truncate", "timeout"]);
    let all: Vec<_> = ["label", "score", "scores", "logits"]
        .map(|name| json!({"name": name, "parameters": in_output}))
        .into();
    for (path, body, same) in [
        (
            "/tasks/mood",
            json!({"inputs": "3 4"}),
            nulls(&["parameters", "candidate_labels"]),
        ),
        (
            "/tasks/mood",
            json!({"inputs": "3 4"}),
            json!({"parameters": nulls(&["top_k", "function_to_apply", "return_all_scores",
                "truncation", "padding"])}),
        ),
        (
            "/tasks/mood/predict",
            json!({"inputs": "3 4"}),
            nulls(&["truncate"]),
        ),
        (
            "/v2/models/mood/infer",
            infer.clone(),
            nulls(&["id", "parameters", "outputs"]),
        ),
        (
            "/v2/models/mood/infer",
            infer.clone(),
            json!({"outputs": []}),
        ),
        (
            "/v2/models/mood/infer",
            infer.clone(),
            json!({"parameters": in_parameters}),
        ),
        (
            "/v2/models/mood/infer",
            infer.clone(),
            json!({"inputs": [of_input]}),
        ),
        (
            "/v2/models/mood/infer",
            infer.clone(),
            json!({"inputs": [with(tensor, &json!({"parameters": in_input}))]}),
        ),
        ("/v2/models/mood/infer", infer, json!({"outputs": all})),
    ] {
        let absent = api.post(path, body.to_string()).await;
        assert_eq!(absent.status, 200, "{}", absent.body);
        let null = api.post(path, with(body, &same).to_string()).await;
        assert_eq!(null.body, absent.body, "{path}, {same}");
    }
}

#[tokio::test]
async fn text_embeddings_inference_cuts_the_end_that_it_is_told() {
    let api = Api::new();
    let scores = async |body: Value| {
        let reply = api.post("/tasks/mood/predict", body.to_string()).await;
        assert_eq!(reply.status, 200, "{}", reply.body);
        reply.body
    };
    let ends = [("left", "1 ".repeat(20)), ("right", "0 ".repeat(20))];
    for (direction, kept) in ends {
        let whole = scores(json!({"inputs": kept})).await;
        for direction in [
            direction.to_owned(),
            format!("{}{}", direction[..1].to_uppercase(), &direction[1..]),
        ] {
            let body = json!({"inputs": long(), "truncate": true,
                "truncation_direction": direction});
            assert_eq!(scores(body).await, whole, "{direction}");
        }
    }
    for direction in [json!("middle"), json!("LEFT"), json!(1), json!(["left"])] {
        let body = json!({"inputs": "3", "truncation_direction": direction});
        let reply = api.post("/tasks/mood/predict", body.to_string()).await;
        assert_eq!(reply.status, 422, "{}", reply.body);
        assert!(
            reply.body.contains("truncation_direction: expected one of"),
            "{}",
            reply.body
        );
    }
}

#[tokio::test]
async fn one_label_of_an_open_problem_type_gets_a_sigmoid() {
    let api = Api::new();
    let score = async |path: &str, declared| {
        // The first logit of the fixture is the version.
        let mut task = fixture::task("one", 1);
        task.config.labels = vec!["score".to_owned()];
        task.config.problem_type = crate::adapter::ProblemType::Regression;
        task.config.problem_type_declared = declared;
        api.state.tasks.publish([fixture::resident(task)]);
        let reply = api.post(path, json!({"inputs": "3"}).to_string()).await;
        reply.body
    };
    for (path, probability, value) in [
        (
            "/tasks/one",
            r#"[[{"label":"score","score":0.7310586}]]"#,
            r#"[[{"label":"score","score":1.0}]]"#,
        ),
        (
            "/tasks/one/predict",
            r#"[{"label":"score","score":0.7310586}]"#,
            r#"[{"label":"score","score":1.0}]"#,
        ),
    ] {
        assert_eq!(score(path, false).await, probability);
        assert_eq!(score(path, true).await, value);
    }
    let own = score("/v1/classify/one", false).await;
    assert!(own.contains(r#""predictions":[{"value":1.0}]"#), "{own}");
}

#[tokio::test]
async fn content_types_of_texts_are_understood_or_refused() {
    let api = Api::new();
    let send = async |data: &str, own: Value, request: Value| {
        let tensor = json!({"name": "text", "shape": [1], "datatype": "BYTES", "data": [data],
            "parameters": own});
        let body = json!({"inputs": [tensor], "parameters": request});
        api.post("/v2/models/mood/infer", body.to_string()).await
    };
    let base64 = json!({"content_type": "base64"});
    let plain = json!({"content_type": "str"});
    let expected = send("3 4", json!(null), json!(null)).await.body;
    for (data, own, request) in [
        ("3 4", plain.clone(), json!(null)),
        ("MyA0", base64.clone(), json!(null)),
        ("MyA0", json!(null), base64.clone()),
        ("MyA0", base64.clone(), plain.clone()),
        ("3 4", plain, base64.clone()),
    ] {
        assert_eq!(send(data, own, request).await.body, expected);
    }
    for (data, own, sentence) in [
        ("3 4", base64.clone(), "not base64"),
        ("/w==", base64, "not UTF-8"),
        (
            "3",
            json!({"content_type": "np"}),
            "inputs[0].parameters.content_type: expected `str` or `base64`, got \\\"np\\\"",
        ),
    ] {
        let reply = send(data, own, json!(null)).await;
        assert_eq!(reply.status, 422, "{}", reply.body);
        assert!(reply.body.contains(sentence), "{}", reply.body);
    }
}
