//! What a comparison is asked to do.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::distill::spec::{DistillSpec, FinetuneMode, SpecError, TrainingSpec};
use crate::parse::{self, ParseError};

/// The request for a comparison, the file of `kdlora compare`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CompareSpec {
    /// Data, student, teacher, LoRA and training as for one pass. The teacher is an encoder that
    /// is fine-tuned by LoRA (`teacher.finetune`), or has a ready-made adapter
    /// (`teacher.adapter`), which is then the row `lora-teacher` as it is.
    pub pass: DistillSpec,
    /// Each row is trained once with each of them. The splits are cut with the pass's own seed.
    #[serde(default = "default_seeds")]
    pub seeds: Vec<u64>,
    /// The teacher's rows take these instead, usually fewer: teachers cost most. The student of
    /// the n-th seed learns from the teacher of the n-th of these, which go round.
    #[serde(default)]
    pub teacher_seeds: Option<Vec<u64>>,
    #[serde(default = "all_methods")]
    pub rows: Vec<Method>,
    /// Full fine-tuning, which the pass does not speak of.
    #[serde(default)]
    pub full: FullSpec,
    /// `lora-student` takes these instead of the pass's own: it sees only the rows with labels,
    /// and a pass with many without needs fewer epochs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub control: Option<Schedule>,
    /// Further rows, which differ from a student's row in some options.
    #[serde(default)]
    pub variants: Vec<Variant>,
}

/// How a row's models are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// Full fine-tuning of the teacher's encoder on the labels.
    FftTeacher,
    /// LoRA on the teacher's encoder, on the labels.
    LoraTeacher,
    /// Full fine-tuning of the student's encoder on the labels.
    FftStudent,
    /// LoRA on the student's encoder, on the labels: what distillation must beat.
    LoraStudent,
    /// LoRA on the student's encoder, on the labels and on the answers of `lora-teacher`.
    KdLoraStudent,
}

impl Method {
    pub const ALL: [Self; 5] = [
        Self::FftTeacher,
        Self::LoraTeacher,
        Self::FftStudent,
        Self::LoraStudent,
        Self::KdLoraStudent,
    ];

    /// Its spelling in requests, files and reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::FftTeacher => "fft-teacher",
            Self::LoraTeacher => "lora-teacher",
            Self::FftStudent => "fft-student",
            Self::LoraStudent => "lora-student",
            Self::KdLoraStudent => "kd-lora-student",
        }
    }

    /// Whether every weight of the encoder trains.
    pub fn is_full(self) -> bool {
        matches!(self, Self::FftTeacher | Self::FftStudent)
    }

    pub fn is_teacher(self) -> bool {
        matches!(self, Self::FftTeacher | Self::LoraTeacher)
    }
}

/// A row that differs from another one.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Variant {
    /// Name of the row: lower-case letters, digits and hyphens.
    pub name: String,
    /// The row that it differs from, one of the student's.
    #[serde(default = "distilled")]
    pub of: Method,
    /// What differs, as a merge patch (RFC 7396) of the pass:
    /// `{"lora": {"use_dora": true}}`.
    pub patch: Value,
}

fn distilled() -> Method {
    Method::KdLoraStudent
}

/// Full fine-tuning of teacher and student.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FullSpec {
    pub teacher: Schedule,
    pub student: Schedule,
}

impl Default for FullSpec {
    fn default() -> Self {
        Self {
            teacher: Schedule {
                epochs: 2,
                learning_rate: 3e-5,
            },
            student: Schedule {
                epochs: 4,
                learning_rate: 1e-4,
            },
        }
    }
}

/// What a row has of its own instead of the pass's.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Schedule {
    pub epochs: usize,
    pub learning_rate: f64,
}

impl Schedule {
    pub(super) fn apply(self, training: &mut TrainingSpec) {
        training.epochs = self.epochs;
        training.learning_rate = self.learning_rate;
    }
}

fn default_seeds() -> Vec<u64> {
    vec![1, 2, 3]
}

fn all_methods() -> Vec<Method> {
    Method::ALL.to_vec()
}

/// Why a comparison cannot be made as asked.
#[derive(Debug, thiserror::Error)]
pub enum CompareSpecError {
    #[error("the pass cannot be made")]
    Pass(#[from] SpecError),
    #[error("pass.teacher is missing, which a comparison is about")]
    NoTeacher,
    #[error("pass.teacher has neither an adapter nor finetune with the mode \"lora\"")]
    UntunedTeacher,
    #[error("{field} cannot be trained so")]
    Schedule {
        field: &'static str,
        source: SpecError,
    },
    #[error("{0} is empty")]
    Empty(&'static str),
    #[error("{0} stands twice")]
    Twice(String),
    #[error("the variant {0:?} must be named with lower-case letters, digits and hyphens")]
    Name(String),
    #[error("the variant {variant:?} cannot be of {of}: only rows of the student have variants")]
    OfTeacher { variant: String, of: &'static str },
    #[error("the patch of the variant {variant:?} gives no pass")]
    Patch { variant: String, source: ParseError },
    #[error("the variant {variant:?} cannot be made")]
    Variant { variant: String, source: SpecError },
    #[error(
        "the variant {variant:?} has {other} of its own: all rows of a comparison have the same \
         texts and the same teacher"
    )]
    Apart {
        variant: String,
        other: &'static str,
    },
}

impl CompareSpec {
    /// Checks what can be checked without reading a file.
    pub fn validate(&self) -> Result<(), CompareSpecError> {
        self.pass.validate()?;
        let teacher = self.pass.teacher.as_ref();
        let teacher = teacher.ok_or(CompareSpecError::NoTeacher)?;
        let tuned = |mode| mode == FinetuneMode::Lora;
        let is_tuned = teacher.finetune.as_ref().is_some_and(|f| tuned(f.mode));
        if teacher.adapter.is_none() && !is_tuned {
            return Err(CompareSpecError::UntunedTeacher);
        }
        let FullSpec { teacher, student } = self.full;
        let own = [("full.teacher", teacher), ("full.student", student)];
        let own = own.into_iter().chain(self.control.map(|c| ("control", c)));
        for (field, schedule) in own {
            let mut training = self.pass.training.clone();
            schedule.apply(&mut training);
            training
                .validate()
                .map_err(|source| CompareSpecError::Schedule { field, source })?;
        }
        distinct("seeds", &self.seeds)?;
        if let Some(seeds) = &self.teacher_seeds {
            distinct("teacher_seeds", seeds)?;
        }
        let rows: Vec<&str> = self.rows.iter().map(|method| method.name()).collect();
        distinct("rows", &rows)?;
        let mut names: Vec<&str> = Method::ALL.iter().map(|method| method.name()).collect();
        names.extend(self.variants.iter().map(|variant| variant.name.as_str()));
        distinct("variants", &names)?;
        for variant in &self.variants {
            let of_name = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
            if variant.name.is_empty() || !variant.name.chars().all(of_name) {
                return Err(CompareSpecError::Name(variant.name.clone()));
            }
            if variant.of.is_teacher() {
                return Err(CompareSpecError::OfTeacher {
                    variant: variant.name.clone(),
                    of: variant.of.name(),
                });
            }
            let pass = self.varied(variant)?;
            pass.validate()
                .map_err(|source| CompareSpecError::Variant {
                    variant: variant.name.clone(),
                    source,
                })?;
            if let Some(other) = apart(&self.pass, &pass) {
                return Err(CompareSpecError::Apart {
                    variant: variant.name.clone(),
                    other,
                });
            }
        }
        Ok(())
    }

    /// The pass as a row of the student has it.
    pub fn pass_of(&self, row: Method) -> DistillSpec {
        let mut pass = self.pass.clone();
        if let (Method::LoraStudent, Some(control)) = (row, self.control) {
            control.apply(&mut pass.training);
        }
        pass
    }

    /// The pass with a variant's patch.
    pub fn varied(&self, variant: &Variant) -> Result<DistillSpec, CompareSpecError> {
        let mut pass = json!(self.pass_of(variant.of));
        merge(&mut pass, &variant.patch);
        parse::value(pass).map_err(|source| CompareSpecError::Patch {
            variant: variant.name.clone(),
            source,
        })
    }
}

/// What a row would have for itself. The teacher answers the texts once, and its answers go by the
/// rows' ids: other texts would learn from the answers to these.
fn apart(pass: &DistillSpec, varied: &DistillSpec) -> Option<&'static str> {
    let texts = |pass: &DistillSpec| {
        let data = &pass.data;
        json!([
            data.train,
            data.validation,
            data.test,
            data.columns,
            data.preset
        ])
    };
    if texts(pass) != texts(varied) {
        return Some("texts");
    }
    (json!(pass.teacher) != json!(varied.teacher)).then_some("a teacher")
}

/// At least one, each once.
fn distinct<T: PartialEq + ToString>(
    what: &'static str,
    items: &[T],
) -> Result<(), CompareSpecError> {
    if items.is_empty() {
        return Err(CompareSpecError::Empty(what));
    }
    match (1..items.len()).find(|i| items[..*i].contains(&items[*i])) {
        Some(i) => Err(CompareSpecError::Twice(format!(
            "{what}: {}",
            items[i].to_string()
        ))),
        None => Ok(()),
    }
}

/// JSON merge patch, RFC 7396.
fn merge(target: &mut Value, patch: &Value) {
    let Value::Object(patch) = patch else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = Value::Object(serde_json::Map::new());
    }
    if let Value::Object(target) = target {
        for (key, value) in patch {
            match value {
                Value::Null => {
                    target.remove(key);
                }
                value => merge(target.entry(key).or_insert(Value::Null), value),
            }
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::distill::compare) fn spec(patch: Value) -> CompareSpec {
        let mut spec = json!({
            "pass": {
                "task": "mood",
                "data": {"train": {"rows": [{"text": "a", "label": "x"}]}},
                "student": {"model": "small"},
                "teacher": {"model": "large", "finetune": {"mode": "lora", "epochs": 2}},
            },
        });
        merge(&mut spec, &patch);
        serde_json::from_value(spec).unwrap()
    }

    #[test]
    fn defaults_are_the_five_rows_and_three_seeds() {
        let spec = spec(json!({}));
        spec.validate().unwrap();
        assert_eq!((spec.rows.len(), spec.seeds.len()), (5, 3));
    }

    #[test]
    fn what_cannot_be_compared_is_refused_by_name() {
        for (patch, part) in [
            (json!({"pass": {"teacher": null}}), "teacher is missing"),
            (json!({"pass": {"teacher": {"finetune": null}}}), "neither"),
            (
                json!({"pass": {"teacher": {"finetune": {"mode": "full"}}}}),
                "neither",
            ),
            (
                json!({"control": {"epochs": 0, "learning_rate": 1e-3}}),
                "control cannot be trained so",
            ),
            (
                json!({"full": {"student": {"epochs": 2, "learning_rate": 3.0}}}),
                "full.student cannot be trained so",
            ),
            (json!({"seeds": []}), "seeds is empty"),
            (json!({"seeds": [1, 2, 1]}), "seeds: 1 stands twice"),
            (json!({"rows": []}), "rows is empty"),
            (
                json!({"variants": [{"name": "lora-student", "patch": {}}]}),
                "lora-student stands twice",
            ),
            (json!({"variants": [{"name": "A b", "patch": {}}]}), "A b"),
            (
                json!({"variants": [{"name": "a", "of": "fft-teacher", "patch": {}}]}),
                "only rows of the student",
            ),
            (
                json!({"variants": [{"name": "a", "patch": {"lora": {"rank": 2}}}]}),
                "gives no pass",
            ),
            (
                json!({"variants": [{"name": "a", "patch": {"lora": {"r": 0}}}]}),
                "cannot be made",
            ),
            (
                json!({"variants": [{"name": "a", "patch": {"data": {"columns": {"text": "body"}}}}]}),
                "has texts of its own",
            ),
            (
                json!({"variants": [{"name": "a", "patch": {"teacher": {"model": "huge"}}}]}),
                "has a teacher of its own",
            ),
        ] {
            let error = spec(patch).validate().unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
    }

    #[test]
    fn a_variant_changes_what_its_patch_names_and_nothing_else() {
        let spec = spec(json!({"variants": [{"name": "a", "patch": {"lora": {"r": 4}}}]}));
        let varied = spec.varied(&spec.variants[0]).unwrap();
        assert_eq!(varied.lora.r, 4);
        assert_eq!(varied.lora.targets, spec.pass.lora.targets);
        assert_eq!(varied.training, spec.pass.training);
    }

    #[test]
    fn patches_merge_as_in_the_examples_of_rfc_7396() {
        for (target, patch, result) in [
            (json!({"a": "b"}), json!({"a": "c"}), json!({"a": "c"})),
            (json!({"a": "b"}), json!({"a": null}), json!({})),
            (json!({"a": ["b"]}), json!({"a": "c"}), json!({"a": "c"})),
            (
                json!({"a": {"b": "c"}}),
                json!({"a": {"b": "d", "c": null}}),
                json!({"a": {"b": "d"}}),
            ),
            (json!({"a": "foo"}), json!("bar"), json!("bar")),
            (
                json!({}),
                json!({"a": {"bb": {"ccc": null}}}),
                json!({"a": {"bb": {}}}),
            ),
        ] {
            let mut target = target;
            merge(&mut target, &patch);
            assert_eq!(target, result);
        }
    }
}
