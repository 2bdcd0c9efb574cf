//! What the outputs of a head mean: label names and kind of task, as in Hugging Face's
//! `config.json`.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::files::{read_json, write_json};
use super::{AdapterError, ProblemType, Scores};
use crate::text::Truncation;

/// Length of sequences where a folder does not say.
pub const DEFAULT_MAX_LENGTH: usize = 512;

const FILE: &str = "config.json";

/// The task part of a `config.json`.
#[derive(Clone, Debug, PartialEq)]
pub struct TaskConfig {
    /// Label of each output, in order. A regression has one, the name of its value.
    pub labels: Vec<String>,
    pub problem_type: ProblemType,
    /// Whether `config.json` names the problem type; otherwise it follows from the number of labels.
    pub problem_type_declared: bool,
    /// Tokens a sequence is cut to. Hugging Face has no such field (its `max_length` is about
    /// generation), so it stands under `kdlora`.
    pub max_length: usize,
    /// How it is cut; beside `max_length` under `kdlora`.
    pub truncation: Truncation,
    /// What logits are divided by before they become probabilities, so that the model is as sure as
    /// it is right; 1 changes nothing. Beside `max_length` under `kdlora`.
    pub temperature: f32,
    /// Name of the encoder that the weights belong to (`_name_or_path`).
    pub base_model: Option<String>,
    /// Digest of that encoder (`kdlora.encoder_digest`).
    pub base_digest: Option<String>,
}

/// The fields of `config.json` that are read here; the rest belongs to the encoder.
///
/// `label2id` is not read: it follows from `id2label`, and `transformers` writes files in which it
/// is stale or has texts for numbers.
#[derive(Deserialize)]
struct Raw {
    id2label: Option<BTreeMap<String, Value>>,
    num_labels: Option<usize>,
    problem_type: Option<ProblemType>,
    #[serde(rename = "_name_or_path")]
    name_or_path: Option<String>,
    kdlora: Option<Own>,
}

#[derive(Deserialize)]
#[serde(default)]
struct Own {
    max_length: usize,
    truncation: Truncation,
    temperature: f32,
    encoder_digest: Option<String>,
}

impl Default for Own {
    fn default() -> Self {
        Self {
            max_length: DEFAULT_MAX_LENGTH,
            truncation: Truncation::LongestFirst,
            temperature: 1.0,
            encoder_digest: None,
        }
    }
}

impl TaskConfig {
    /// Scores of one row of logits, `[labels]`, at the task's temperature.
    pub fn scores(&self, logits: &[f32]) -> Scores {
        self.scores_as(self.problem_type, logits)
    }

    /// Scores of one row of logits as a task of `problem_type` has them, at this task's
    /// temperature. A regression has none.
    pub fn scores_as(&self, problem_type: ProblemType, logits: &[f32]) -> Scores {
        if self.temperature == 1.0 || problem_type == ProblemType::Regression {
            return problem_type.scores(logits);
        }
        let scaled: Vec<f32> = logits.iter().map(|x| x / self.temperature).collect();
        problem_type.scores(&scaled)
    }

    /// Reads `config.json` of `dir`.
    ///
    /// As in `transformers`, missing names become `LABEL_0`, `LABEL_1`, …, two of them where even
    /// their number is missing. Without a `problem_type` one label means regression and several
    /// mean classes.
    pub fn read(dir: &Path) -> Result<Self, AdapterError> {
        let path = dir.join(FILE);
        let raw: Raw = read_json(
            &path,
            "it names the labels (id2label) and the problem_type; for an adapter saved by \
             PEFT, write it beside adapter_config.json with model.config.save_pretrained",
        )?;
        let labels = raw.labels(&path)?;
        let own = raw.kdlora.unwrap_or_default();
        let config = Self {
            problem_type: raw
                .problem_type
                .unwrap_or_else(|| ProblemType::of_labels(labels.len())),
            problem_type_declared: raw.problem_type.is_some(),
            labels,
            max_length: own.max_length,
            truncation: own.truncation,
            temperature: own.temperature,
            base_model: raw.name_or_path.filter(|name| !name.is_empty()),
            base_digest: own.encoder_digest,
        };
        config
            .check()
            .map_err(|problem| AdapterError::config(&path, problem))?;
        Ok(config)
    }

    /// Writes `config.json` into `dir`; `model_type` is the family's name in `transformers`.
    pub(super) fn write(&self, dir: &Path, model_type: &str) -> Result<(), AdapterError> {
        let path = dir.join(FILE);
        self.check()
            .map_err(|problem| AdapterError::config(&path, problem))?;
        let mut fields = Map::new();
        fields.insert("model_type".to_owned(), json!(model_type));
        self.set(&mut fields);
        write_json(&path, &fields)
    }

    /// Sets the fields of the task in a `config.json`.
    pub(super) fn set(&self, fields: &mut Map<String, Value>) {
        let ids = self.labels.iter().enumerate();
        let id2label: Map<String, Value> = ids
            .clone()
            .map(|(id, label)| (id.to_string(), json!(label)))
            .collect();
        let label2id: Map<String, Value> =
            ids.map(|(id, label)| (label.clone(), json!(id))).collect();
        fields.insert("id2label".to_owned(), Value::Object(id2label));
        fields.insert("label2id".to_owned(), Value::Object(label2id));
        // The length of id2label says it, and transformers warns where both are given.
        fields.remove("num_labels");
        match self.problem_type_declared {
            true => fields.insert("problem_type".to_owned(), json!(self.problem_type)),
            // Not the encoder's own.
            false => fields.remove("problem_type"),
        };
        if let Some(base) = &self.base_model {
            fields.insert("_name_or_path".to_owned(), json!(base));
        }
        let mut own = json!({ "max_length": self.max_length, "truncation": self.truncation });
        if self.temperature != 1.0 {
            own["temperature"] = json!(self.temperature);
        }
        if let Some(digest) = &self.base_digest {
            own["encoder_digest"] = json!(digest);
        }
        fields.insert("kdlora".to_owned(), own);
    }

    fn check(&self) -> Result<(), String> {
        let mut seen = std::collections::HashSet::new();
        for label in &self.labels {
            if label.is_empty() {
                return Err("a label name is empty".to_owned());
            }
            if !seen.insert(label) {
                return Err(format!("the label {label:?} stands twice"));
            }
        }
        let count = self.labels.len();
        match self.problem_type {
            ProblemType::Regression if count != 1 => {
                Err(format!("a regression has one output, not {count}"))
            }
            ProblemType::SingleLabelClassification if count < 2 => {
                Err(format!("classes must be two or more, not {count}"))
            }
            ProblemType::MultiLabelClassification if count == 0 => {
                Err("there is no label".to_owned())
            }
            _ if self.max_length == 0 => Err("max_length is 0".to_owned()),
            _ if !(self.temperature.is_finite() && self.temperature > 0.0) => {
                Err(format!("the temperature is {}", self.temperature))
            }
            _ => Ok(()),
        }
    }
}

impl Raw {
    fn labels(&self, path: &Path) -> Result<Vec<String>, AdapterError> {
        let problem = |problem: String| AdapterError::config(path, problem);
        let Some(id2label) = &self.id2label else {
            let count = self.num_labels.unwrap_or(2);
            return Ok((0..count).map(|id| format!("LABEL_{id}")).collect());
        };
        let labels: Vec<String> = (0..id2label.len())
            .map(|id| match id2label.get(&id.to_string()) {
                Some(Value::String(label)) => Ok(label.clone()),
                Some(label @ Value::Number(_)) => Ok(label.to_string()),
                Some(_) => Err(problem(format!("id2label: the name of {id} is not a text"))),
                None => Err(problem(format!(
                    "id2label has {} entries but none for {id}",
                    id2label.len()
                ))),
            })
            .collect::<Result<_, _>>()?;
        if let Some(count) = self.num_labels.filter(|count| *count != labels.len()) {
            return Err(problem(format!(
                "num_labels is {count} but id2label has {} entries",
                labels.len()
            )));
        }
        Ok(labels)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<TaskConfig, AdapterError> {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(FILE), text).unwrap();
        TaskConfig::read(dir.path())
    }

    fn problem(text: &str) -> String {
        read(text).unwrap_err().to_string()
    }

    #[test]
    fn what_is_written_is_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let config = TaskConfig {
            labels: ["no", "maybe, \"yes\"", "ja 😀"].map(String::from).to_vec(),
            problem_type: ProblemType::MultiLabelClassification,
            problem_type_declared: true,
            max_length: 77,
            truncation: Truncation::OnlySecond,
            temperature: 1.75,
            base_model: Some("minilm-l6".to_owned()),
            base_digest: Some("0af1".to_owned()),
        };
        config.write(dir.path(), "bert").unwrap();
        assert_eq!(TaskConfig::read(dir.path()).unwrap(), config);
        // What the source left open stays open.
        for labels in [r#"{"0":"score"}"#, r#"{"0":"no","1":"yes"}"#] {
            let text = format!(r#"{{"id2label":{labels},"problem_type":null}}"#);
            let config = read(&text).unwrap();
            let mut fields = Map::from_iter([("problem_type".to_owned(), json!("regression"))]);
            config.set(&mut fields);
            assert!(!fields.contains_key("problem_type"), "{labels}");
            config.write(dir.path(), "bert").unwrap();
            assert_eq!(TaskConfig::read(dir.path()).unwrap(), config);
        }
    }

    #[test]
    fn labels_follow_their_ids_not_their_order_in_the_file() {
        let ids: Vec<String> = (0..12)
            .rev()
            .map(|id| format!("\"{id}\":\"l{id}\""))
            .collect();
        let config = read(&format!("{{\"id2label\":{{{}}}}}", ids.join(","))).unwrap();
        assert_eq!(config.labels[2], "l2");
        assert_eq!(config.labels[11], "l11");
    }

    #[test]
    fn defaults_are_those_of_transformers() {
        let config = read("{}").unwrap();
        assert_eq!(config.labels, ["LABEL_0", "LABEL_1"]);
        assert_eq!(config.problem_type, ProblemType::SingleLabelClassification);
        let config = read(r#"{"id2label":{"0":"LABEL_0"},"max_length":20}"#).unwrap();
        assert_eq!(config.problem_type, ProblemType::Regression);
        assert_eq!(config.max_length, DEFAULT_MAX_LENGTH);
        assert_eq!(config.truncation, Truncation::LongestFirst);
        let config = read(r#"{"kdlora":{"max_length":20}}"#).unwrap();
        assert_eq!(config.truncation, Truncation::LongestFirst);
    }

    #[test]
    fn contradictions_are_refused() {
        assert!(problem(r#"{"id2label":{"0":"a","2":"b"}}"#).contains("none for 1"));
        assert!(problem(r#"{"id2label":{"0":"a","1":"a"}}"#).contains("twice"));
        assert!(problem(r#"{"id2label":{"0":"a","1":""}}"#).contains("empty"));
        assert!(
            problem(r#"{"id2label":{"0":"a","1":"b"},"problem_type":"regression"}"#)
                .contains("one output")
        );
        assert!(problem(r#"{"id2label":{"0":"a","1":"b"},"num_labels":3}"#).contains("num_labels"));
        assert!(problem(r#"{"kdlora":{"max_length":0}}"#).contains("max_length"));
        assert!(problem(r#"{"kdlora":{"temperature":0}}"#).contains("temperature"));
    }

    #[test]
    fn label2id_follows_from_id2label_whatever_the_file_says() {
        for label2id in [
            r#"{"LABEL_0":0,"LABEL_1":1,"LABEL_2":2}"#,
            r#"{"neg":"0","pos":"1","neu":"2"}"#,
            r#"{"neg":1,"pos":0,"neu":2}"#,
            r#"{"neg":0}"#,
            r#"{"neg":[0],"pos":-1.5,"neu":null}"#,
            r#"["neg","pos","neu"]"#,
            "null",
        ] {
            let text = format!(
                r#"{{"id2label":{{"0":"neg","1":"pos","2":"neu"}},"label2id":{label2id}}}"#
            );
            assert_eq!(read(&text).unwrap().labels, ["neg", "pos", "neu"], "{text}");
        }
        let config = read(r#"{"id2label":null,"label2id":{"a":0,"b":1,"c":2}}"#).unwrap();
        assert_eq!(
            config.labels,
            ["LABEL_0", "LABEL_1"],
            "as transformers has it"
        );
        let config = read(r#"{"id2label":{"0":"a","1":"b"},"label2id":{"x":7}}"#).unwrap();
        let mut fields = Map::new();
        config.set(&mut fields);
        assert_eq!(fields["label2id"], json!({"a": 0, "b": 1}));
    }

    #[test]
    fn a_temperature_makes_probabilities_less_sure_and_leaves_values_alone() {
        let mut config = read(r#"{"kdlora":{"temperature":2.0}}"#).unwrap();
        let Scores::SingleLabel(scores) = config.scores(&[2.0, 0.0]) else {
            panic!("not classes");
        };
        // softmax([1, 0])
        assert!((scores[0] - 0.731_058_6).abs() < 1e-6, "{scores:?}");
        config.problem_type = ProblemType::Regression;
        assert_eq!(config.scores(&[3.0]), Scores::Value(3.0));
    }

    #[test]
    fn a_missing_file_is_explained() {
        let dir = tempfile::tempdir().unwrap();
        let error = TaskConfig::read(dir.path()).unwrap_err().to_string();
        assert!(error.contains("id2label"), "{error}");
    }
}
