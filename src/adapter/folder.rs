//! A PEFT LoRA folder: `adapter_config.json`, `adapter_model.safetensors` and the `config.json` of
//! its task.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Tensor};
use serde_json::Value;

use super::files::{read_tensors, write_folder, write_json, write_tensors};
use super::tensor_names::{self, LORA_A, LORA_B, LORA_EMBEDDING, MAGNITUDE, Stored};
use super::{AdapterConfig, AdapterError, Bias, TaskConfig};
use crate::encoder::Family;

pub(super) const WEIGHTS: &str = "adapter_model.safetensors";
/// How good, fast and large the version is beside its teacher.
pub(super) const REPORT: &str = "report.json";
const PICKLE: &str = "adapter_model.bin";

/// An adapter in memory, checked as far as it can be without its encoder.
#[derive(Clone, Debug)]
pub struct AdapterFolder {
    pub config: AdapterConfig,
    pub task: TaskConfig,
    /// f32 on the CPU; PEFT's names without its prefix and wrappers, such as
    /// `bert.encoder.layer.0.attention.self.query.lora_A.weight`, `classifier.weight` and, of
    /// trained biases, `bert.encoder.layer.0.attention.self.query.bias`.
    pub tensors: BTreeMap<String, Tensor>,
}

/// What the file holds for one adapted linear.
#[derive(Clone, Copy, Debug)]
pub(super) struct Adapted<'a> {
    /// `[r, in_features]`
    pub(super) a: &'a Tensor,
    /// `[out_features, r]`
    pub(super) b: &'a Tensor,
    /// DoRA's, `[out_features]`.
    pub(super) magnitude: Option<&'a Tensor>,
    /// In place of the encoder's, `[out_features]`.
    pub(super) bias: Option<&'a Tensor>,
}

/// All tensors by their part in the network.
#[derive(Debug, Default)]
pub(super) struct Parts<'a> {
    /// By module name, family prefix included.
    pub(super) lora: BTreeMap<&'a str, Adapted<'a>>,
    /// Tensors in place of the model's, by name: of modules that were trained whole, and biases of
    /// what carries no LoRA.
    pub(super) replaced: BTreeMap<&'a str, &'a Tensor>,
}

impl AdapterFolder {
    /// Reads a folder. Every tensor must be used: LoRA matrices come in pairs of the configured
    /// rank, all others belong to `modules_to_save`.
    pub fn read(dir: &Path) -> Result<Self, AdapterError> {
        Self::read_as(dir, TaskConfig::read(dir)?)
    }

    /// Reads a folder for a task that its own `config.json`, if it has one, does not describe.
    pub fn read_as(dir: &Path, task: TaskConfig) -> Result<Self, AdapterError> {
        let config = AdapterConfig::read(dir)?;
        let path = dir.join(WEIGHTS);
        let pickle = dir.join(PICKLE);
        if !path.exists() && pickle.exists() {
            return Err(AdapterError::Pickle { path: pickle });
        }
        let stored = read_tensors(&path, "it holds the weights of the adapter", |_| true)?;
        let tensors = named(stored)?;
        let adapter = Self {
            config,
            task,
            tensors,
        };
        adapter.parts()?;
        Ok(adapter)
    }

    /// Writes the folder, whole or not at all; `dir` must not exist or be empty. PEFT loads it.
    pub fn write(&self, dir: &Path) -> Result<(), AdapterError> {
        write_folder(dir, |temporary| self.write_files(temporary))
    }

    /// Writes the files into a folder that is there, for a caller who has more to put beside them
    /// (see [`write_folder`]).
    pub fn write_files(&self, dir: &Path) -> Result<(), AdapterError> {
        let parts = self.parts()?;
        let modules: Vec<String> = parts.lora.keys().map(|name| (*name).to_owned()).collect();
        self.config.write(dir, &modules)?;
        self.task.write(dir, model_type(&modules))?;
        let adapted = |module: &str| parts.lora.contains_key(module);
        let stored = |(name, tensor): (&String, &Tensor)| {
            (tensor_names::written(name, adapted), tensor.clone())
        };
        let tensors = self.tensors.iter().map(stored).collect();
        write_tensors(&dir.join(WEIGHTS), &tensors, DType::F32)
    }

    /// Writes the folder with its report (see [`read_report`](super::read_report)), and nothing
    /// else of the folder that it was read from: folders of checkpoints hold optimizers and more.
    pub fn repack(&self, report: Option<&Value>, dir: &Path) -> Result<(), AdapterError> {
        write_folder(dir, |temporary| {
            self.write_files(temporary)?;
            match report {
                Some(report) => write_json(&temporary.join(REPORT), report),
                None => Ok(()),
            }
        })
    }

    /// Number of trained numbers, head included.
    pub fn parameters(&self) -> usize {
        self.tensors.values().map(Tensor::elem_count).sum()
    }

    /// Sorts the tensors, and checks what can be checked without the encoder.
    pub(super) fn parts(&self) -> Result<Parts<'_>, AdapterError> {
        let mut parts = Parts::default();
        for (name, tensor) in &self.tensors {
            if let Some(module) = name.strip_suffix(LORA_A) {
                let partner = |end: &str| self.tensors.get(&format!("{module}{end}"));
                let adapted = Adapted {
                    a: tensor,
                    b: partner(LORA_B).ok_or_else(|| lacks(name, module, LORA_B))?,
                    magnitude: partner(MAGNITUDE),
                    bias: partner(".bias").filter(|_| self.has_bias(module)),
                };
                self.check_adapted(module, adapted)?;
                parts.lora.insert(module, adapted);
                continue;
            }
            if name.contains(LORA_EMBEDDING) {
                return Err(AdapterError::tensor(
                    name,
                    "is LoRA on an embedding table, which is not supported: train the adapter with \
                     target_modules that name linear layers only",
                ));
            }
            let part_of = |end| name.strip_suffix(end);
            let of_pair = [LORA_B, MAGNITUDE].into_iter().find_map(part_of);
            if let Some(module) = of_pair {
                self.require_a(name, module)?;
            } else if part_of(".bias").is_some_and(|module| self.has_bias(module)) {
                // It went with the pair.
            } else if self.is_saved(name) || self.is_bias(name) {
                parts.replaced.insert(name, tensor);
            } else {
                return Err(AdapterError::tensor(
                    name,
                    "has no use here: it is neither the weight of a LoRA matrix nor part of \
                     modules_to_save",
                ));
            }
        }
        if parts.lora.is_empty() {
            return Err(AdapterError::NoLora);
        }
        self.config.check_budget()?;
        Ok(parts)
    }

    fn has_lora(&self, module: &str) -> bool {
        self.tensors.contains_key(&format!("{module}{LORA_A}"))
    }

    fn require_a(&self, name: &str, module: &str) -> Result<(), AdapterError> {
        match self.has_lora(module) {
            true => Ok(()),
            false => Err(lacks(name, module, LORA_A)),
        }
    }

    /// Whether the bias of a module was trained with its LoRA.
    fn has_bias(&self, module: &str) -> bool {
        self.config.bias != Bias::None && self.has_lora(module)
    }

    /// Whether the tensor is trained though its module has no LoRA.
    fn is_bias(&self, tensor: &str) -> bool {
        self.config.bias == Bias::All && tensor.contains("bias") && !tensor.contains(".lora_")
    }

    /// Whether the tensor belongs to a module that was trained whole. In files of old versions a
    /// head is there though the configuration names none.
    fn is_saved(&self, tensor: &str) -> bool {
        let Some((module, _)) = tensor.rsplit_once('.') else {
            return false;
        };
        let first = tensor.split('.').next().unwrap_or_default();
        let of_head = |family: &Family| family.head_modules().contains(&first);
        let is_head = Family::ALL.iter().any(of_head);
        !tensor.contains(".lora_") && (is_head || self.config.saves(module))
    }

    fn check_adapted(&self, module: &str, adapted: Adapted<'_>) -> Result<(), AdapterError> {
        let rank = self.config.rank(module);
        let wrong = |end: &str, tensor: &Tensor, expected: &str| {
            let found = tensor.dims();
            let problem = format!("has the shape {found:?}, not {expected}");
            Err(AdapterError::tensor(&format!("{module}{end}"), problem))
        };
        let Adapted {
            a, b, magnitude, ..
        } = adapted;
        if a.rank() != 2 || a.dim(0)? != rank {
            return wrong(LORA_A, a, &format!("[r = {rank}, in]"));
        }
        if b.rank() != 2 || b.dim(1)? != rank {
            return wrong(LORA_B, b, &format!("[out, r = {rank}]"));
        }
        match (magnitude, self.config.use_dora) {
            (None, true) => Err(lacks(&format!("{module}{LORA_A}"), module, MAGNITUDE)),
            (Some(_), false) => Err(AdapterError::tensor(
                &format!("{module}{MAGNITUDE}"),
                "has no use here: use_dora is false",
            )),
            _ if !self.config.targets(module) => Err(AdapterError::tensor(
                &format!("{module}{LORA_A}"),
                "target_modules does not name its module",
            )),
            _ => Ok(()),
        }
    }
}

fn lacks(name: &str, module: &str, end: &str) -> AdapterError {
    AdapterError::tensor(name, format!("its partner {module}{end} is missing"))
}

/// Tensors under the names used here.
fn named(stored: BTreeMap<String, Tensor>) -> Result<BTreeMap<String, Tensor>, AdapterError> {
    let mut tensors: BTreeMap<String, Tensor> = BTreeMap::new();
    for (name, tensor) in stored {
        let short = match tensor_names::read(&name) {
            Stored::As(short) => short,
            Stored::Replaced => continue,
            Stored::Unknown => {
                let problem = format!(
                    "the names of a PEFT adapter begin with {}",
                    tensor_names::PREFIX
                );
                return Err(AdapterError::tensor(&name, problem));
            }
        };
        if let Some(other) = tensors.get(&short)
            && !is_same(other, &tensor)?
        {
            let problem = format!("{short} stands in the file twice, with other values");
            return Err(AdapterError::tensor(&name, problem));
        }
        tensors.insert(short, tensor);
    }
    Ok(tensors)
}

fn is_same(a: &Tensor, b: &Tensor) -> candle_core::Result<bool> {
    let values = |tensor: &Tensor| tensor.flatten_all()?.to_vec1::<f32>();
    Ok(a.dims() == b.dims() && values(a)? == values(b)?)
}

/// `model_type` of the family that adapted modules belong to.
fn model_type(modules: &[String]) -> &'static str {
    let has_its_prefix = |family: &Family| {
        let of_family = |module: &String| module.split('.').next() == Some(family.prefix());
        modules.iter().any(of_family)
    };
    let family = Family::ALL.into_iter().find(has_its_prefix);
    family.map_or("", Family::model_type)
}

#[cfg(test)]
pub(super) mod tests {
    use candle_core::Device;

    use super::*;
    use crate::adapter::ProblemType;

    const PEFT_PREFIX: &str = tensor_names::PREFIX;
    const QUERY: &str = "bert.encoder.layer.0.attention.self.query";

    /// A rank 2 adapter of one linear of 4 × 3, with a head of two classes.
    fn adapter() -> AdapterFolder {
        let tensor = |shape: &[usize]| Tensor::rand(-1f32, 1., shape, &Device::Cpu).unwrap();
        let tensors = [
            (format!("{QUERY}{LORA_A}"), tensor(&[2, 3])),
            (format!("{QUERY}{LORA_B}"), tensor(&[4, 2])),
            ("classifier.weight".to_owned(), tensor(&[2, 3])),
            ("classifier.bias".to_owned(), tensor(&[2])),
        ];
        AdapterFolder {
            config: AdapterConfig::new(2, 4.0, 0.0, vec!["query".into()], Some("tiny".into())),
            task: TaskConfig {
                labels: vec!["no".into(), "yes".into()],
                problem_type: ProblemType::SingleLabelClassification,
                problem_type_declared: true,
                max_length: 64,
                truncation: crate::text::Truncation::LongestFirst,
                temperature: 1.0,
                base_model: Some("tiny".into()),
                base_digest: None,
            },
            tensors: BTreeMap::from(tensors),
        }
    }

    /// The error of reading what `change` left of a good folder.
    fn refused(change: impl FnOnce(&Path)) -> String {
        let place = tempfile::tempdir().unwrap();
        let dir = place.path().join("adapter");
        adapter().write(&dir).unwrap();
        change(&dir);
        AdapterFolder::read(&dir).unwrap_err().to_string()
    }

    fn refused_tensors(change: impl FnOnce(&mut BTreeMap<String, Tensor>)) -> String {
        refused(|dir| {
            let path = dir.join(WEIGHTS);
            let mut tensors = read_tensors(&path, "", |_| true).unwrap();
            change(&mut tensors);
            write_tensors(&path, &tensors, DType::F32).unwrap();
        })
    }

    #[test]
    fn what_is_written_is_read_back() {
        let place = tempfile::tempdir().unwrap();
        let dir = place.path().join("adapter");
        let written = adapter();
        written.write(&dir).unwrap();
        let read = AdapterFolder::read(&dir).unwrap();
        assert_eq!(read.config, written.config);
        assert_eq!(read.task, written.task);
        assert_eq!(read.parameters(), 2 * 3 + 4 * 2 + 2 * 3 + 2);
        for (name, tensor) in &written.tensors {
            let difference = (tensor - &read.tensors[name]).unwrap().abs().unwrap();
            let difference: f32 = difference.sum_all().unwrap().to_scalar().unwrap();
            assert_eq!(difference, 0.0, "{name}");
        }
    }

    #[test]
    fn all_linear_is_written_as_the_list_of_its_modules() {
        let place = tempfile::tempdir().unwrap();
        let dir = place.path().join("adapter");
        let mut all = adapter();
        all.config = AdapterConfig::new(2, 4.0, 0.0, vec!["all-linear".into()], None);
        all.write(&dir).unwrap();
        let text = std::fs::read_to_string(dir.join("adapter_config.json")).unwrap();
        let json: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(json["target_modules"], serde_json::json!([QUERY]));
        AdapterFolder::read(&dir).unwrap();
    }

    #[test]
    fn a_tensor_without_use_is_refused_by_name() {
        for name in [
            "base_model.model.bert.encoder.layer.0.output.dense.weight",
            "base_model.model.bert.encoder.layer.0.attention.self.query.lora_magnitude_vector",
            "base_model.model.bert.encoder.layer.0.attention.self.query.base_layer.weight",
            "base_model.model.classifier.lora_embedding_A",
            "bert.encoder.layer.0.output.dense.lora_A.weight",
        ] {
            let error = refused_tensors(|tensors| {
                let extra = Tensor::new(&[1f32], &Device::Cpu).unwrap();
                tensors.insert(name.to_owned(), extra);
            });
            assert!(
                error.contains(
                    &name
                        .trim_start_matches(PEFT_PREFIX)
                        .replace(".base_layer", "")
                ),
                "{error}"
            );
        }
    }

    #[test]
    fn lora_on_an_embedding_is_refused_as_such() {
        for end in ["A", "B", "A.default", "B.default"] {
            let embeddings = "base_model.model.bert.embeddings.word_embeddings";
            let error = refused_tensors(|tensors| {
                let extra = Tensor::rand(0f32, 1., (2, 3), &Device::Cpu).unwrap();
                tensors.insert(format!("{embeddings}.lora_embedding_{end}"), extra);
            });
            assert!(error.contains("LoRA on an embedding table"), "{error}");
            assert!(error.contains("target_modules"), "{error}");
        }
    }

    #[test]
    fn a_git_lfs_pointer_is_told_from_a_damaged_file() {
        for file in [WEIGHTS, "adapter_config.json", "config.json"] {
            let error = refused(|dir| {
                let pointer =
                    "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n";
                std::fs::write(dir.join(file), pointer).unwrap();
            });
            assert!(
                error.contains(file) && error.contains("git lfs pull"),
                "{error}"
            );
        }
    }

    #[test]
    fn a_matrix_without_its_partner_is_refused() {
        for missing in [LORA_A, LORA_B] {
            let error = refused_tensors(|tensors| {
                tensors.remove(&format!("{PEFT_PREFIX}{QUERY}{missing}"));
            });
            assert!(
                error.contains("is missing") && error.contains(missing),
                "{error}"
            );
        }
    }

    #[test]
    fn a_rank_that_is_not_the_configured_one_is_refused() {
        for (matrix, shape) in [(LORA_A, [3, 3]), (LORA_B, [4, 3])] {
            let error = refused_tensors(|tensors| {
                let other = Tensor::rand(0f32, 1., &shape, &Device::Cpu).unwrap();
                tensors.insert(format!("{PEFT_PREFIX}{QUERY}{matrix}"), other);
            });
            assert!(error.contains("r = 2"), "{error}");
        }
    }

    #[test]
    fn a_module_that_is_not_targeted_is_refused() {
        let error = refused_tensors(|tensors| {
            for matrix in [LORA_A, LORA_B] {
                let tensor = tensors.remove(&format!("{PEFT_PREFIX}{QUERY}{matrix}"));
                let key = QUERY.replace("query", "key");
                tensors.insert(format!("{PEFT_PREFIX}{key}{matrix}"), tensor.unwrap());
            }
        });
        assert!(error.contains("target_modules"), "{error}");
    }

    #[test]
    fn a_head_alone_is_refused() {
        let error = refused_tensors(|tensors| tensors.retain(|name, _| !name.contains("lora")));
        assert!(error.contains("no LoRA"), "{error}");
    }

    #[test]
    fn a_pickle_is_refused_with_the_way_out() {
        let error = refused(|dir| {
            std::fs::rename(dir.join(WEIGHTS), dir.join(PICKLE)).unwrap();
        });
        assert!(
            error.contains("pickle") && error.contains("safetensors"),
            "{error}"
        );
    }

    #[test]
    fn a_missing_file_is_named() {
        for file in [WEIGHTS, "adapter_config.json", "config.json"] {
            let error = refused(|dir| std::fs::remove_file(dir.join(file)).unwrap());
            assert!(error.contains(file) && error.contains("missing"), "{error}");
        }
    }
}
