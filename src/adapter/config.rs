//! PEFT's `adapter_config.json`, as far as LoRA for classification goes.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::AdapterError;
use super::files::{read_json, write_json};

const FILE: &str = "adapter_config.json";

/// LoRA as PEFT describes it. Options that change the network and are not here are refused when a
/// file is read, never ignored.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterConfig {
    /// Rank of modules that `rank_pattern` does not name.
    pub r: usize,
    /// Numerator of the scale of modules that `alpha_pattern` does not name.
    pub lora_alpha: f64,
    /// Dropout of training; it plays no part in answers.
    pub lora_dropout: f64,
    /// Scale by α/√r instead of α/r (rsLoRA, arXiv 2312.03732).
    pub use_rslora: bool,
    pub target_modules: TargetModules,
    /// Modules that are trained whole and stored beside the LoRA weights: `classifier`, and
    /// `pooler` where it trains.
    pub modules_to_save: Vec<String>,
    pub base_model_name_or_path: Option<String>,
    /// Ranks of single modules: names or endings of names. The first that fits counts.
    pub rank_pattern: Vec<(String, usize)>,
    /// Alphas of single modules.
    pub alpha_pattern: Vec<(String, f64)>,
}

/// Which linears carry LoRA.
#[derive(Clone, Debug, PartialEq)]
pub enum TargetModules {
    /// Names, or endings of names from a dot on. Every linear of the encoder that they fit must
    /// have its weights in the file.
    Named(Vec<String>),
    /// A regular expression, or names narrowed down by layers or exclusions: the weights in the
    /// file say which linears are meant.
    AsStored,
}

/// Every linear of the encoder, in PEFT's spelling.
pub const ALL_LINEAR: &str = "all-linear";

/// Fields with a value that neither changes the network nor is needed here.
const IGNORED: [&str; 9] = [
    "auto_mapping",
    "ensure_weight_tying",
    "eva_config",
    "inference_mode",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
];

/// Fields read by [`Reader`].
const READ: [&str; 16] = [
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
    "use_rslora",
];

impl AdapterConfig {
    /// LoRA with the head `classifier`, as training makes it.
    pub fn new(
        r: usize,
        lora_alpha: f64,
        lora_dropout: f64,
        target_modules: Vec<String>,
        base_model: Option<String>,
    ) -> Self {
        Self {
            r,
            lora_alpha,
            lora_dropout,
            use_rslora: false,
            target_modules: TargetModules::Named(target_modules),
            modules_to_save: vec!["classifier".to_owned()],
            base_model_name_or_path: base_model,
            rank_pattern: Vec::new(),
            alpha_pattern: Vec::new(),
        }
    }

    pub(super) fn read(dir: &Path) -> Result<Self, AdapterError> {
        let path = dir.join(FILE);
        let fields: Map<String, Value> = read_json(
            &path,
            "a PEFT adapter folder has one; is this the right folder?",
        )?;
        Reader {
            path: &path,
            fields: &fields,
        }
        .config()
    }

    /// Writes the file; `stored` names the modules with LoRA weights.
    pub(super) fn write(&self, dir: &Path, stored: &[String]) -> Result<(), AdapterError> {
        let targets = match &self.target_modules {
            TargetModules::Named(names) if !names.iter().any(|name| name == ALL_LINEAR) => names,
            _ => stored,
        };
        let config = json!({
            "peft_type": "LORA",
            "task_type": "SEQ_CLS",
            "base_model_name_or_path": self.base_model_name_or_path,
            "r": self.r,
            "lora_alpha": self.lora_alpha,
            "lora_dropout": self.lora_dropout,
            "use_rslora": self.use_rslora,
            "target_modules": targets,
            "modules_to_save": self.modules_to_save,
            "rank_pattern": pattern_json(&self.rank_pattern),
            "alpha_pattern": pattern_json(&self.alpha_pattern),
            "bias": "none",
            "fan_in_fan_out": false,
            "use_dora": false,
            "inference_mode": true,
            "init_lora_weights": true,
        });
        write_json(&dir.join(FILE), &config)
    }

    /// Rank of the module of that name.
    pub fn rank(&self, module: &str) -> usize {
        find(&self.rank_pattern, module).unwrap_or(self.r)
    }

    /// The factor s in W x + s·B A x.
    pub fn scale(&self, module: &str) -> f64 {
        let alpha = find(&self.alpha_pattern, module).unwrap_or(self.lora_alpha);
        let rank = self.rank(module) as f64;
        if self.use_rslora {
            alpha / rank.sqrt()
        } else {
            alpha / rank
        }
    }

    /// Whether `modules_to_save` covers the module, itself or as a part of one that it names. As in
    /// PEFT the ending of a name counts: `classifier` covers `pre_classifier` too.
    pub(super) fn saves(&self, module: &str) -> bool {
        let module = format!("{module}.");
        self.modules_to_save
            .iter()
            .any(|saved| module.contains(&format!("{saved}.")))
    }

    /// Whether the module of that name must have LoRA weights; `None` where only the file tells.
    pub(super) fn targets(&self, module: &str) -> Option<bool> {
        match &self.target_modules {
            TargetModules::AsStored => None,
            TargetModules::Named(names) => Some(
                !self.saves(module)
                    && names
                        .iter()
                        .any(|name| name == ALL_LINEAR || ends_with_name(module, name)),
            ),
        }
    }
}

fn find<T: Copy>(pattern: &[(String, T)], module: &str) -> Option<T> {
    pattern
        .iter()
        .find(|(name, _)| ends_with_name(module, name))
        .map(|(_, value)| *value)
}

fn ends_with_name(module: &str, name: &str) -> bool {
    module
        .strip_suffix(name)
        .is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

fn pattern_json<T: Copy + Into<Value>>(pattern: &[(String, T)]) -> Value {
    pattern
        .iter()
        .map(|(name, value)| (name.clone(), (*value).into()))
        .collect::<Map<String, Value>>()
        .into()
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

/// Checks field by field, so that an error can name the field.
struct Reader<'a> {
    path: &'a Path,
    fields: &'a Map<String, Value>,
}

impl Reader<'_> {
    fn config(&self) -> Result<AdapterConfig, AdapterError> {
        self.refuse_unsupported()?;
        let config = AdapterConfig {
            r: self.rank("r", self.required("r")?)?,
            lora_alpha: self.alpha("lora_alpha", self.required("lora_alpha")?)?,
            lora_dropout: match self.active("lora_dropout") {
                None => 0.0,
                Some(value) => self.number("lora_dropout", value)?,
            },
            use_rslora: self.active("use_rslora").is_some(),
            target_modules: self.target_modules()?,
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
        };
        Ok(config)
    }

    fn refuse_unsupported(&self) -> Result<(), AdapterError> {
        self.only("peft_type", &["LORA"], "only LoRA adapters are")?;
        self.only(
            "task_type",
            &["SEQ_CLS", "FEATURE_EXTRACTION"],
            "only sequence classification is",
        )?;
        self.only("bias", &["none"], "trained biases are not implemented")?;
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

    fn target_modules(&self) -> Result<TargetModules, AdapterError> {
        let narrowed = ["layers_to_transform", "exclude_modules"]
            .iter()
            .any(|option| self.active(option).is_some());
        match self.required("target_modules")? {
            Value::String(name) if name.eq_ignore_ascii_case(ALL_LINEAR) && !narrowed => {
                Ok(TargetModules::Named(vec![ALL_LINEAR.to_owned()]))
            }
            Value::String(_) => Ok(TargetModules::AsStored),
            value => {
                let names = self.names("target_modules", value)?;
                if names.is_empty() {
                    return Err(self.problem("target_modules is empty"));
                }
                Ok(if narrowed {
                    TargetModules::AsStored
                } else {
                    TargetModules::Named(names)
                })
            }
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

    /// Patterns are regular expressions in PEFT; here they may be names only.
    fn pattern<T>(
        &self,
        option: &str,
        value: impl Fn(&Value) -> Result<T, AdapterError>,
    ) -> Result<Vec<(String, T)>, AdapterError> {
        let Some(entries) = self.active(option) else {
            return Ok(Vec::new());
        };
        let Some(entries) = entries.as_object() else {
            return Err(self.problem(format!("{option} must be an object")));
        };
        let mut pattern = Vec::with_capacity(entries.len());
        for (name, entry) in entries {
            if name.contains(|c: char| !c.is_alphanumeric() && !matches!(c, '_' | '.' | '-')) {
                return Err(self.unsupported(
                    option,
                    &json!(name),
                    "only names are, not regular expressions",
                ));
            }
            pattern.push((name.clone(), value(entry)?));
        }
        Ok(pattern)
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

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(mut change: Value) -> Result<AdapterConfig, AdapterError> {
        let mut fields = json!({
            "peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["query", "value"],
        });
        let all = fields.as_object_mut().unwrap();
        all.append(change.as_object_mut().unwrap());
        Reader {
            path: Path::new("adapter_config.json"),
            fields: all,
        }
        .config()
    }

    #[test]
    fn scale_is_alpha_over_rank_or_its_root() {
        let plain = parse(json!({})).unwrap();
        assert_eq!(plain.scale("layer.0.query"), 2.0);
        let rooted = parse(json!({"use_rslora": true, "r": 4})).unwrap();
        assert_eq!(rooted.scale("layer.0.query"), 8.0);
    }

    #[test]
    fn patterns_fit_whole_names_from_a_dot_on() {
        let config = parse(json!({
            "rank_pattern": {"layer.0.query": 2, "query": 4},
            "alpha_pattern": {"value": 3},
        }))
        .unwrap();
        assert_eq!(config.rank("layer.0.query"), 2);
        assert_eq!(config.rank("layer.10.query"), 4);
        assert_eq!(config.rank("layer.0.subquery"), 8);
        assert_eq!(config.scale("layer.10.query"), 4.0);
        assert_eq!(config.scale("layer.0.value"), 0.375);
    }

    #[test]
    fn active_options_that_are_not_implemented_are_refused_by_name() {
        for (option, value) in [
            ("use_dora", json!(true)),
            ("bias", json!("lora_only")),
            ("fan_in_fan_out", json!(true)),
            ("lora_bias", json!(true)),
            ("layer_replication", json!([[0, 2]])),
            ("target_parameters", json!(["w"])),
            ("trainable_token_indices", json!([1])),
            ("peft_type", json!("IA3")),
            ("task_type", json!("CAUSAL_LM")),
            ("init_lora_weights", json!("pissa")),
            ("rank_pattern", json!({"layer.[01].query": 3})),
            ("an_option_of_tomorrow", json!("on")),
        ] {
            let error = parse(json!({ option: value })).unwrap_err();
            assert!(
                matches!(&error, AdapterError::Unsupported { option: named, .. } if named == option),
                "{error}"
            );
        }
    }

    #[test]
    fn options_that_are_off_are_accepted() {
        parse(json!({
            "use_dora": false, "layer_replication": null, "loftq_config": {}, "bias": "none",
            "an_option_of_tomorrow": null, "init_lora_weights": true, "megatron_core": "megatron.core",
            "task_type": "SEQ_CLS", "peft_version": "0.21.2", "qalora_group_size": 16,
        }))
        .unwrap();
    }

    #[test]
    fn numbers_that_make_no_sense_are_refused() {
        for change in [
            json!({"r": 0}),
            json!({"r": 2.5}),
            json!({"r": "8"}),
            json!({"lora_alpha": 0}),
            json!({"lora_alpha": "x"}),
            json!({"target_modules": []}),
            json!({"target_modules": [1]}),
            json!({"rank_pattern": {"query": 0}}),
        ] {
            let error = parse(change.clone()).unwrap_err();
            assert!(matches!(error, AdapterError::Config { .. }), "{change}");
        }
    }

    #[test]
    fn targets_are_narrowed_by_what_is_saved_whole() {
        let config = parse(json!({
            "target_modules": "all-linear", "modules_to_save": ["classifier", "pooler"],
        }))
        .unwrap();
        assert_eq!(
            config.targets("bert.encoder.layer.0.output.dense"),
            Some(true)
        );
        assert_eq!(config.targets("bert.pooler.dense"), Some(false));
        assert!(config.saves("classifier") && config.saves("classifier.dense"));
        assert!(config.saves("pre_classifier") && !config.saves("classifiers"));
    }

    #[test]
    fn what_is_written_is_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let mut config = AdapterConfig::new(4, 8.0, 0.1, vec!["query".into()], Some("m".into()));
        config.use_rslora = true;
        config.rank_pattern = vec![("layer.1.query".into(), 2), ("query".into(), 3)];
        config.alpha_pattern = vec![("layer.1.query".into(), 1.5)];
        config.write(dir.path(), &[]).unwrap();
        assert_eq!(AdapterConfig::read(dir.path()).unwrap(), config);
    }
}
