//! PEFT's `adapter_config.json`, as far as LoRA for classification goes.

mod reader;

use std::path::Path;

use serde_json::{Map, Value, json};

use super::AdapterError;
use super::files::{read_json, write_json};
use super::targets::{ALL_LINEAR, Budget, Pattern, TargetModules};

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
    /// Weight-decomposed LoRA (DoRA, arXiv 2402.09353): each output has a trained magnitude.
    pub use_dora: bool,
    /// Which biases were trained and stand in the file.
    pub bias: Bias,
    pub target_modules: TargetModules,
    /// Linears that `target_modules` fits and that are left out all the same.
    pub exclude_modules: Option<TargetModules>,
    /// Layers by number, where only some are adapted. Plays no part with a pattern.
    pub layers_to_transform: Option<Vec<usize>>,
    /// Names of the list that holds the layers, as regular expressions; any if there is none.
    pub layers_pattern: Vec<Pattern>,
    /// Modules that are trained whole and stored beside the LoRA weights: `classifier`, and
    /// `pooler` where it trains.
    pub modules_to_save: Vec<String>,
    pub base_model_name_or_path: Option<String>,
    /// Ranks of single modules: names, endings of names from a dot on, or regular expressions of
    /// them. The first that fits counts.
    pub rank_pattern: Vec<(Pattern, usize)>,
    /// Alphas of single modules.
    pub alpha_pattern: Vec<(Pattern, f64)>,
    /// The time that the patterns may take.
    budget: Budget,
}

/// PEFT's `bias`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bias {
    None,
    /// Those of the adapted linears.
    LoraOnly,
    /// Every parameter of the encoder with `bias` in its name.
    All,
}

impl Bias {
    /// Its spelling in `adapter_config.json`.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::LoraOnly => "lora_only",
            Self::All => "all",
        }
    }
}

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
            use_dora: false,
            bias: Bias::None,
            target_modules: TargetModules::Named(target_modules),
            exclude_modules: None,
            layers_to_transform: None,
            layers_pattern: Vec::new(),
            modules_to_save: vec!["classifier".to_owned()],
            base_model_name_or_path: base_model,
            rank_pattern: Vec::new(),
            alpha_pattern: Vec::new(),
            budget: Budget::default(),
        }
    }

    /// Fails when the patterns have taken too long, so that what was said of modules is not right.
    pub(super) fn check_budget(&self) -> Result<(), AdapterError> {
        match self.budget.is_kept() {
            true => Ok(()),
            false => Err(AdapterError::SlowPatterns),
        }
    }

    pub(super) fn read(dir: &Path) -> Result<Self, AdapterError> {
        let path = dir.join(FILE);
        let fields: Map<String, Value> = read_json(
            &path,
            "a PEFT adapter folder has one; is this the right folder?",
        )?;
        reader::config(&path, &fields)
    }

    /// Writes the file; `stored` names the modules with LoRA weights.
    pub(super) fn write(&self, dir: &Path, stored: &[String]) -> Result<(), AdapterError> {
        let targets = match &self.target_modules {
            // To PEFT it is more than the encoder's linears: the head's would be among them.
            TargetModules::Named(names) if names.iter().any(|name| name == ALL_LINEAR) => {
                json!(stored)
            }
            targets => targets.json(),
        };
        let config = json!({
            "peft_type": "LORA",
            "task_type": "SEQ_CLS",
            "base_model_name_or_path": self.base_model_name_or_path,
            "r": self.r,
            "lora_alpha": self.lora_alpha,
            "lora_dropout": self.lora_dropout,
            "use_rslora": self.use_rslora,
            "use_dora": self.use_dora,
            "bias": self.bias.name(),
            "target_modules": targets,
            "exclude_modules": self.exclude_modules.as_ref().map(TargetModules::json),
            "layers_to_transform": self.layers_to_transform,
            "layers_pattern": match self.layers_pattern.as_slice() {
                [] => Value::Null,
                patterns => patterns.iter().map(Pattern::text).collect(),
            },
            "modules_to_save": self.modules_to_save,
            "rank_pattern": pattern_json(&self.rank_pattern),
            "alpha_pattern": pattern_json(&self.alpha_pattern),
            "fan_in_fan_out": false,
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

    /// Whether the module of that name must have LoRA weights.
    pub(super) fn targets(&self, module: &str) -> bool {
        let excluded = self.exclude_modules.as_ref();
        if excluded.is_some_and(|excluded| excluded.fits(module)) || self.saves_part(module) {
            return false;
        }
        match &self.target_modules {
            TargetModules::Named(names) if names.iter().any(|name| name == module) => true,
            TargetModules::Named(names) if names.iter().any(|name| name == ALL_LINEAR) => {
                !self.saves(module) && self.transforms_layer_of(module)
            }
            TargetModules::Named(_) => {
                self.target_modules.fits(module) && self.transforms_layer_of(module)
            }
            TargetModules::Pattern(_) => self.target_modules.fits(module),
        }
    }

    /// Whether the module is one of `modules_to_save`, or a part of one, by whole names.
    fn saves_part(&self, module: &str) -> bool {
        let module = format!(".{module}.");
        let is_part = |saved: &String| module.contains(&format!(".{saved}."));
        self.modules_to_save.iter().any(is_part)
    }

    fn transforms_layer_of(&self, module: &str) -> bool {
        match &self.layers_to_transform {
            None => true,
            Some(layers) => self
                .layer_of(module)
                .is_some_and(|layer| layers.contains(&layer)),
        }
    }

    /// The number of the layer that a module belongs to: the first number behind a name that one of
    /// `layers_pattern` fits, behind any name where there is none.
    fn layer_of(&self, module: &str) -> Option<usize> {
        if self.layers_pattern.is_empty() {
            // A name that something stands before, and something behind the number.
            let mut parts = module.split('.').skip(2).peekable();
            while let Some(part) = parts.next() {
                let is_number = !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
                if is_number && parts.peek().is_some() {
                    return part.parse().ok();
                }
            }
            return None;
        }
        let mut patterns = self.layers_pattern.iter();
        patterns.find_map(|pattern| pattern.layer_of(module))
    }
}

fn find<T: Copy>(pattern: &[(Pattern, T)], module: &str) -> Option<T> {
    pattern
        .iter()
        .find(|(name, _)| name.fits(module))
        .map(|(_, value)| *value)
}

fn pattern_json<T: Copy + Into<Value>>(pattern: &[(Pattern, T)]) -> Value {
    pattern
        .iter()
        .map(|(name, value)| (name.text().to_owned(), (*value).into()))
        .collect::<Map<String, Value>>()
        .into()
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
        reader::config(Path::new("adapter_config.json"), all)
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
            ("bias", json!("vera_only")),
            ("target_modules", json!("(query")),
            ("lora_bias", json!(true)),
            ("layer_replication", json!([[0, 2]])),
            ("target_parameters", json!(["w"])),
            ("trainable_token_indices", json!([1])),
            ("peft_type", json!("IA3")),
            ("task_type", json!("CAUSAL_LM")),
            ("init_lora_weights", json!("pissa")),
            ("rank_pattern", json!({"layer.[01.query": 3})),
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

    const QUERY: &str = "bert.encoder.layer.1.attention.self.query";

    fn targets(change: Value, module: &str) -> bool {
        parse(change).unwrap().targets(module)
    }

    #[test]
    fn targets_are_narrowed_by_what_is_saved_whole() {
        let config = parse(json!({
            "target_modules": "all-linear", "modules_to_save": ["classifier", "pooler"],
        }))
        .unwrap();
        assert!(config.targets("bert.encoder.layer.0.output.dense"));
        assert!(!config.targets("bert.pooler.dense"));
        assert!(config.saves("classifier") && config.saves("classifier.dense"));
        assert!(config.saves("pre_classifier") && !config.saves("classifiers"));
    }

    #[test]
    fn targets_are_names_endings_or_a_pattern_of_the_whole_name() {
        for (modules, fits) in [
            (json!(["query"]), true),
            (json!(["self.query"]), true),
            (json!([QUERY]), true),
            (json!(["uery"]), false),
            (json!(r".*\.(query|value)"), true),
            (json!(r".*\.layer\.0\..*query"), false),
            (json!("query"), false),
            (json!(r"^(?!.*layer\.1).*query$"), false),
        ] {
            let change = json!({"target_modules": modules});
            assert_eq!(targets(change.clone(), QUERY), fits, "{change}");
        }
    }

    #[test]
    fn targets_are_narrowed_by_layers_and_exclusions() {
        for (change, fits) in [
            (json!({"layers_to_transform": [0]}), false),
            (json!({"layers_to_transform": 1}), true),
            (
                json!({"layers_to_transform": [1], "layers_pattern": "layer"}),
                true,
            ),
            (
                json!({"layers_to_transform": [1], "layers_pattern": ["h"]}),
                false,
            ),
            (
                json!({"layers_to_transform": [0], "target_modules": [QUERY]}),
                true,
            ),
            (
                json!({"layers_to_transform": [0], "target_modules": ".*query"}),
                true,
            ),
            (json!({"exclude_modules": ["query"]}), false),
            (json!({"exclude_modules": r".*\.1\..*"}), false),
            (json!({"exclude_modules": r".*\.0\..*"}), true),
        ] {
            assert_eq!(targets(change.clone(), QUERY), fits, "{change}");
        }
    }

    #[test]
    fn patterns_may_be_regular_expressions() {
        let config = parse(json!({
            "rank_pattern": {r"layer\.[01]\..*query": 3},
            "alpha_pattern": {r"self\.(key|query)": 6},
        }))
        .unwrap();
        assert_eq!(config.rank(QUERY), 3);
        assert_eq!(config.scale(QUERY), 2.0);
        assert_eq!(config.rank("bert.encoder.layer.2.attention.self.query"), 8);
    }

    #[test]
    fn without_a_pattern_the_first_number_behind_two_names_is_the_layer() {
        let config = parse(json!({})).unwrap();
        for (module, layer) in [
            ("bert.encoder.layer.3.experts.5.dense", Some(3)),
            ("bert.layer.12a.4.query", Some(4)),
            ("layer.3.query", None),
            ("bert.encoder.layer.3", None),
            ("bert.pooler.dense", None),
        ] {
            assert_eq!(config.layer_of(module), layer, "{module}");
        }
    }

    #[test]
    fn lists_without_end_are_refused() {
        let many: Vec<String> = (0..100_000).map(|n| format!("module{n}")).collect();
        let ranks: Map<String, Value> = many.iter().map(|n| (n.clone(), json!(1))).collect();
        for change in [
            json!({ "target_modules": many }),
            json!({ "exclude_modules": many }),
            json!({ "modules_to_save": many }),
            json!({ "layers_to_transform": [0], "layers_pattern": many }),
            json!({ "rank_pattern": ranks }),
            json!({ "alpha_pattern": ranks }),
        ] {
            let error = parse(change).unwrap_err().to_string();
            assert!(error.contains("100000"), "{error}");
            assert!(error.len() < 500, "{error}");
        }
    }

    #[test]
    fn what_is_written_is_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let mut config = AdapterConfig::new(4, 8.0, 0.1, vec!["query".into()], Some("m".into()));
        config.use_rslora = true;
        config.use_dora = true;
        config.bias = Bias::LoraOnly;
        let budget = Budget::default();
        let ending = |text| Pattern::ending(text, &budget).unwrap();
        let excluded = Pattern::whole("x.*", &budget).unwrap();
        config.exclude_modules = Some(TargetModules::Pattern(excluded));
        config.layers_to_transform = Some(vec![0, 2]);
        config.layers_pattern = vec![Pattern::layers("layer", &budget).unwrap()];
        config.rank_pattern = vec![(ending("layer.1.query"), 2), (ending("query"), 3)];
        config.alpha_pattern = vec![(ending("layer.1.query"), 1.5)];
        config.write(dir.path(), &[]).unwrap();
        assert_eq!(AdapterConfig::read(dir.path()).unwrap(), config);
    }
}
