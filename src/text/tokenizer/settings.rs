//! The settings beside `tokenizer.json`, with the effect that they have on `AutoTokenizer`: some of
//! them win over what `tokenizer.json` says. Where the two contradict each other and versions of
//! `transformers` differ in which one wins, the folder is refused.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;
use tokenizers::normalizers::bert::BertNormalizer;
use tokenizers::{NormalizerWrapper, PostProcessor, PreTokenizerWrapper, TruncationDirection};

use super::{TokenizerError, read_json};

const FILE: &str = "tokenizer_config.json";
/// A longer `model_max_length` means that there is no limit; `transformers` has the same bound.
const NO_LIMIT: f64 = 1e20;
/// Classes whose normalizer is made of settings, without the `Fast` at the end of old names.
const BERT_CLASSES: [&str; 9] = [
    "BertTokenizer",
    "ConvBertTokenizer",
    "DistilBertTokenizer",
    "ElectraTokenizer",
    "LayoutLMTokenizer",
    "LxmertTokenizer",
    "MobileBertTokenizer",
    "MPNetTokenizer",
    "SqueezeBertTokenizer",
];

/// The settings of a folder.
pub(super) struct Settings {
    path: PathBuf,
    class: Class,
    file: File,
}

/// `tokenizer_config.json`.
#[derive(Default, Deserialize)]
#[serde(default)]
struct File {
    tokenizer_class: Option<String>,
    do_lower_case: Option<bool>,
    strip_accents: Option<bool>,
    tokenize_chinese_chars: Option<bool>,
    split_by_punct: Option<bool>,
    add_prefix_space: Option<bool>,
    truncation_side: Option<String>,
    model_max_length: Option<f64>,
    /// The old name of `model_max_length`.
    max_len: Option<f64>,
}

/// The fields of `config.json` that choose a class where `tokenizer_config.json` names none.
#[derive(Default, Deserialize)]
#[serde(default)]
struct ModelFile {
    tokenizer_class: Option<String>,
    model_type: Option<String>,
}

/// Classes of `transformers` by what they do with the settings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Class {
    /// Takes its normalizer from the settings, not from `tokenizer.json`.
    Bert,
    /// Takes `add_prefix_space` from the settings.
    Roberta,
    /// Up to version 4 it took its steps from `tokenizer.json`, since 5 from the settings.
    DebertaV2,
    /// Takes everything from `tokenizer.json`.
    Plain,
}

impl Class {
    fn of(name: Option<&str>, model_type: Option<&str>) -> Self {
        let Some(name) = name else {
            return match model_type {
                Some("bert" | "distilbert" | "mpnet") => Self::Bert,
                Some("roberta") => Self::Roberta,
                Some("deberta-v2") => Self::DebertaV2,
                _ => Self::Plain,
            };
        };
        match name.strip_suffix("Fast").unwrap_or(name) {
            name if BERT_CLASSES.contains(&name) => Self::Bert,
            "RobertaTokenizer" => Self::Roberta,
            "DebertaV2Tokenizer" => Self::DebertaV2,
            _ => Self::Plain,
        }
    }
}

impl Settings {
    pub(super) fn read(dir: &Path) -> Result<Self, TokenizerError> {
        let path = dir.join(FILE);
        let file: File = read_json(path.clone())?;
        let model: ModelFile = read_json(dir.join("config.json"))?;
        let name = file
            .tokenizer_class
            .as_ref()
            .or(model.tokenizer_class.as_ref());
        let class = Class::of(name.map(String::as_str), model.model_type.as_deref());
        Ok(Self { path, class, file })
    }

    /// Changes the steps of the tokenizer to what the settings say.
    pub(super) fn apply(
        &self,
        tokenizer: &mut tokenizers::Tokenizer,
    ) -> Result<(), TokenizerError> {
        let File {
            do_lower_case,
            strip_accents,
            tokenize_chinese_chars,
            split_by_punct,
            add_prefix_space,
            ..
        } = self.file;
        match self.class {
            Class::Bert => {
                match tokenizer.get_normalizer() {
                    None | Some(NormalizerWrapper::BertNormalizer(_)) => {}
                    Some(_) => return Err(self.problem(
                        "the class of the tokenizer has the normalizer of BERT, but tokenizer.json \
                         has another one; to use tokenizer.json as it is, set tokenizer_class to \
                         \"PreTrainedTokenizerFast\"",
                    )),
                }
                let normalizer = BertNormalizer::new(
                    true,
                    tokenize_chinese_chars.unwrap_or(true),
                    strip_accents,
                    do_lower_case.unwrap_or(true),
                );
                let changed = tokenizer.with_normalizer(Some(normalizer));
                changed.map_err(|error| self.problem(error.to_string()))?;
                Ok(())
            }
            Class::Roberta => {
                if let Some(PreTokenizerWrapper::ByteLevel(step)) = tokenizer.get_pre_tokenizer() {
                    let step = step.add_prefix_space(add_prefix_space.unwrap_or(false));
                    tokenizer.with_pre_tokenizer(Some(step));
                }
                Ok(())
            }
            Class::DebertaV2 => {
                let normalizer = serde_json::json!(tokenizer.get_normalizer());
                let pre_tokenizer = serde_json::json!(tokenizer.get_pre_tokenizer());
                self.agree("do_lower_case", do_lower_case, &normalizer, "Lowercase")?;
                self.agree(
                    "split_by_punct",
                    split_by_punct,
                    &pre_tokenizer,
                    "Punctuation",
                )
            }
            Class::Plain => Ok(()),
        }
    }

    /// Checks that `tokenizer.json` has a step if, and only if, an option (by default off) asks for
    /// it.
    fn agree(
        &self,
        option: &str,
        value: Option<bool>,
        steps: &Value,
        step: &str,
    ) -> Result<(), TokenizerError> {
        let (asked, found) = (value.unwrap_or(false), has_step(steps, step));
        if asked == found {
            return Ok(());
        }
        let has = if found { "has a" } else { "has no" };
        Err(self.problem(format!(
            "{option} is {asked}, but tokenizer.json {has} step {step}; set {option} to what the \
             model was trained with, and save the tokenizer again with save_pretrained"
        )))
    }

    /// Returns the side on which texts are cut. `tokenizer.json` counts where the settings are
    /// silent.
    pub(super) fn direction(
        &self,
        tokenizer: &tokenizers::Tokenizer,
    ) -> Result<TruncationDirection, TokenizerError> {
        match self.file.truncation_side.as_deref() {
            Some("left") => Ok(TruncationDirection::Left),
            Some("right") => Ok(TruncationDirection::Right),
            Some(other) => Err(self.problem(format!(
                "truncation_side is {other:?}: expected \"left\" or \"right\""
            ))),
            None => Ok(tokenizer
                .get_truncation()
                .map_or(TruncationDirection::Right, |file| file.direction)),
        }
    }

    /// Returns the most tokens of a sequence, special tokens included; `None` for no limit.
    pub(super) fn model_max_length(
        &self,
        tokenizer: &tokenizers::Tokenizer,
    ) -> Result<Option<usize>, TokenizerError> {
        let length = self.file.model_max_length.or(self.file.max_len);
        let Some(length) = length.filter(|length| *length <= NO_LIMIT) else {
            return Ok(None);
        };
        let special = tokenizer.get_post_processor();
        let special = special.map_or(0, |processor| processor.added_tokens(false));
        if length.fract() != 0.0 || length <= special as f64 {
            return Err(self.problem(format!(
                "model_max_length is {length}: expected a whole number above the {special} special \
                 tokens of a sequence"
            )));
        }
        Ok(Some(length as usize))
    }

    fn problem(&self, problem: impl Into<String>) -> TokenizerError {
        TokenizerError::Settings {
            path: self.path.clone(),
            problem: problem.into(),
        }
    }
}

/// Whether a (sequence of) steps, as `tokenizer.json` has them, contains one of a type.
fn has_step(steps: &Value, step: &str) -> bool {
    match steps {
        Value::Array(steps) => steps.iter().any(|inner| has_step(inner, step)),
        Value::Object(fields) => {
            fields.get("type").is_some_and(|own| own == step)
                || fields.values().any(|inner| has_step(inner, step))
        }
        _ => false,
    }
}
