//! Reads `adapter_config.json` field by field, so that an error can name the field.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::{AdapterConfig, Bias};
use crate::adapter::AdapterError;
use crate::adapter::targets::{ALL_LINEAR, Budget, Pattern, PatternError, TargetModules};

/// Fields with a value that neither changes the network nor is needed here.
const IGNORED: [&str; 10] = [
    "auto_mapping",
    "ensure_weight_tying",
    "eva_config",
    // PEFT itself resets it for the linears that these families are made of.
    "fan_in_fan_out",
    "inference_mode",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
];

/// Fields read by [`Reader`].
const READ: [&str; 17] = [
    "alpha_pattern",
    "base_model_name_or_path",
    "bias",
    "exclude_modules",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "modules_to_save",
    "peft_type",
    "r",
    "rank_pattern",
    "target_modules",
    "task_type",
    "use_dora",
    "use_rslora",
];

/// Names or patterns in one list. Every module of the encoder is compared with all of them.
const MAX_NAMES: usize = 1_024;

/// The configuration that the fields describe; `path` is for messages.
pub(super) fn config(
    path: &Path,
    fields: &Map<String, Value>,
) -> Result<AdapterConfig, AdapterError> {
    let budget = Budget::default();
    Reader {
        path,
        fields,
        budget,
    }
    .config()
}

/// A field that says nothing: PEFT writes the options that are off as one of these.
fn is_off(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(on) => !on,
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        Value::Number(_) | Value::String(_) => false,
    }
}

struct Reader<'a> {
    path: &'a Path,
    fields: &'a Map<String, Value>,
    budget: Budget,
}

impl Reader<'_> {
    fn config(&self) -> Result<AdapterConfig, AdapterError> {
        self.refuse_unsupported()?;
        Ok(AdapterConfig {
            r: self.rank("r", self.required("r")?)?,
            lora_alpha: self.alpha("lora_alpha", self.required("lora_alpha")?)?,
            lora_dropout: match self.active("lora_dropout") {
                None => 0.0,
                Some(value) => self.number("lora_dropout", value)?,
            },
            use_rslora: self.active("use_rslora").is_some(),
            use_dora: self.active("use_dora").is_some(),
            bias: match self.active("bias").and_then(Value::as_str) {
                Some("lora_only") => Bias::LoraOnly,
                Some("all") => Bias::All,
                _ => Bias::None,
            },
            target_modules: self.modules("target_modules", self.required("target_modules")?)?,
            exclude_modules: match self.active("exclude_modules") {
                None => None,
                Some(value) => Some(self.modules("exclude_modules", value)?),
            },
            layers_to_transform: self.layers()?,
            layers_pattern: self.layers_pattern()?,
            modules_to_save: match self.active("modules_to_save") {
                None => Vec::new(),
                Some(value) => self.names("modules_to_save", value)?,
            },
            base_model_name_or_path: match self.active("base_model_name_or_path") {
                Some(Value::String(name)) if !name.is_empty() => Some(name.clone()),
                _ => None,
            },
            rank_pattern: self.pattern("rank_pattern", |value| self.rank("rank_pattern", value))?,
            alpha_pattern: self
                .pattern("alpha_pattern", |value| self.alpha("alpha_pattern", value))?,
            budget: self.budget.clone(),
        })
    }

    fn layers_pattern(&self) -> Result<Vec<Pattern>, AdapterError> {
        const OPTION: &str = "layers_pattern";
        let texts = match self.active(OPTION) {
            None => Vec::new(),
            Some(Value::String(pattern)) if pattern.is_empty() => Vec::new(),
            Some(Value::String(pattern)) => vec![pattern.clone()],
            Some(value) => self.names(OPTION, value)?,
        };
        let compile = |text: &String| {
            let pattern = Pattern::layers(text, &self.budget);
            pattern.map_err(|error| self.no_pattern(OPTION, text, error))
        };
        texts.iter().map(compile).collect()
    }

    fn refuse_unsupported(&self) -> Result<(), AdapterError> {
        self.only("peft_type", &["LORA"], "only LoRA adapters are")?;
        self.only(
            "task_type",
            &["SEQ_CLS", "FEATURE_EXTRACTION"],
            "only sequence classification is",
        )?;
        self.only("bias", &["none", "lora_only", "all"], "it is not known")?;
        if let Some(Value::String(_)) = self.active("init_lora_weights") {
            self.only(
                "init_lora_weights",
                &["gaussian", "eva", "orthogonal"],
                "it changes the weights of the encoder, which is shared; convert the adapter with \
                 PEFT's path_initial_model_for_weight_conversion first",
            )?;
        }
        for (option, value) in self.fields {
            let known = IGNORED.contains(&option.as_str()) || READ.contains(&option.as_str());
            if !known && !is_off(value) {
                return Err(self.unsupported(option, value, "it is not implemented"));
            }
        }
        Ok(())
    }

    /// A list of names, `all-linear`, or a regular expression.
    fn modules(&self, option: &str, value: &Value) -> Result<TargetModules, AdapterError> {
        if let Value::String(pattern) = value {
            if pattern.eq_ignore_ascii_case(ALL_LINEAR) {
                return Ok(TargetModules::Named(vec![ALL_LINEAR.to_owned()]));
            }
            let compiled = Pattern::whole(pattern, &self.budget);
            return compiled
                .map(TargetModules::Pattern)
                .map_err(|error| self.no_pattern(option, pattern, error));
        }
        let names = self.names(option, value)?;
        if names.is_empty() {
            return Err(self.problem(format!("{option} is empty")));
        }
        Ok(TargetModules::Named(names))
    }

    fn layers(&self) -> Result<Option<Vec<usize>>, AdapterError> {
        let Some(value) = self.active("layers_to_transform") else {
            return Ok(None);
        };
        let number = |value: &Value| value.as_u64().and_then(|layer| usize::try_from(layer).ok());
        let layers = match value {
            Value::Array(layers) => layers.iter().map(number).collect(),
            one => number(one).map(|layer| vec![layer]),
        };
        match layers {
            Some(layers) => Ok(Some(layers)),
            None => Err(self.problem(format!(
                "layers_to_transform must be numbers of layers, not {value}"
            ))),
        }
    }

    fn no_pattern(&self, option: &str, text: &str, error: PatternError) -> AdapterError {
        match error {
            PatternError::Malformed => self.unsupported(
                option,
                &json!(text),
                "it can't be read as a regular expression",
            ),
            PatternError::OverBudget => AdapterError::SlowPatterns,
        }
    }

    fn few(&self, option: &str, count: usize) -> Result<(), AdapterError> {
        match count > MAX_NAMES {
            true => Err(self.problem(format!(
                "{option} has {count} entries; at most {MAX_NAMES} are supported"
            ))),
            false => Ok(()),
        }
    }

    /// The value of an option that is not off.
    fn active(&self, option: &str) -> Option<&Value> {
        self.fields.get(option).filter(|value| !is_off(value))
    }

    fn required(&self, option: &str) -> Result<&Value, AdapterError> {
        self.active(option)
            .ok_or_else(|| self.problem(format!("{option} is missing")))
    }

    fn only(
        &self,
        option: &str,
        allowed: &[&str],
        reason: &'static str,
    ) -> Result<(), AdapterError> {
        match self.active(option) {
            Some(Value::String(value)) if allowed.contains(&value.as_str()) => Ok(()),
            Some(value) => Err(self.unsupported(option, value, reason)),
            None => Ok(()),
        }
    }

    fn number(&self, option: &str, value: &Value) -> Result<f64, AdapterError> {
        value
            .as_f64()
            .filter(|number| number.is_finite())
            .ok_or_else(|| self.problem(format!("{option} must be a number, not {value}")))
    }

    fn alpha(&self, option: &str, value: &Value) -> Result<f64, AdapterError> {
        let alpha = self.number(option, value)?;
        if alpha <= 0.0 {
            return Err(self.problem(format!("{option} must be above 0, not {value}")));
        }
        Ok(alpha)
    }

    fn rank(&self, option: &str, value: &Value) -> Result<usize, AdapterError> {
        value
            .as_u64()
            .and_then(|rank| usize::try_from(rank).ok())
            .filter(|rank| *rank > 0)
            .ok_or_else(|| {
                self.problem(format!("{option} must be a positive integer, not {value}"))
            })
    }

    fn names(&self, option: &str, value: &Value) -> Result<Vec<String>, AdapterError> {
        self.few(option, value.as_array().map_or(0, Vec::len))?;
        let names = value.as_array().map(|items| {
            items
                .iter()
                .map(|item| item.as_str().map(str::to_owned))
                .collect::<Option<Vec<_>>>()
        });
        names
            .flatten()
            .ok_or_else(|| self.problem(format!("{option} must be a list of names, not {value}")))
    }

    fn pattern<T>(
        &self,
        option: &str,
        value: impl Fn(&Value) -> Result<T, AdapterError>,
    ) -> Result<Vec<(Pattern, T)>, AdapterError> {
        let Some(entries) = self.active(option) else {
            return Ok(Vec::new());
        };
        let Some(entries) = entries.as_object() else {
            return Err(self.problem(format!("{option} must be an object")));
        };
        self.few(option, entries.len())?;
        let compile = |(name, entry): (&String, &Value)| {
            let pattern = Pattern::ending(name, &self.budget);
            let pattern = pattern.map_err(|error| self.no_pattern(option, name, error))?;
            Ok((pattern, value(entry)?))
        };
        entries.iter().map(compile).collect()
    }

    fn unsupported(&self, option: &str, value: &Value, reason: &'static str) -> AdapterError {
        AdapterError::Unsupported {
            path: self.path.to_path_buf(),
            option: option.to_owned(),
            value: value.to_string(),
            reason,
        }
    }

    fn problem(&self, problem: impl Into<String>) -> AdapterError {
        AdapterError::config(self.path, problem)
    }
}
