//! A PEFT LoRA folder: `adapter_config.json`, `adapter_model.safetensors` and the `config.json` of
//! its task.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::Tensor;

use super::files::{read_tensors, write_folder, write_tensors};
use super::{AdapterConfig, AdapterError, TaskConfig};
use crate::encoder::Family;

const WEIGHTS: &str = "adapter_model.safetensors";
const PICKLE: &str = "adapter_model.bin";

/// What PEFT puts before the names of the wrapped model.
const PEFT_PREFIX: &str = "base_model.model.";
pub(super) const LORA_A: &str = ".lora_A.weight";
pub(super) const LORA_B: &str = ".lora_B.weight";

/// An adapter in memory, checked as far as it can be without its encoder.
#[derive(Clone, Debug)]
pub struct AdapterFolder {
    pub config: AdapterConfig,
    pub task: TaskConfig,
    /// f32 on the CPU; PEFT's names without `base_model.model.`, such as
    /// `bert.encoder.layer.0.attention.self.query.lora_A.weight` and `classifier.weight`.
    pub tensors: BTreeMap<String, Tensor>,
}

/// The two matrices of one adapted linear.
#[derive(Clone, Copy, Debug)]
pub(super) struct LoraPair<'a> {
    /// `[r, in_features]`
    pub(super) a: &'a Tensor,
    /// `[out_features, r]`
    pub(super) b: &'a Tensor,
}

/// All tensors by their part in the network.
#[derive(Debug, Default)]
pub(super) struct Parts<'a> {
    /// By module name, family prefix included.
    pub(super) lora: BTreeMap<&'a str, LoraPair<'a>>,
    /// Tensors of modules that were trained whole, by tensor name.
    pub(super) saved: BTreeMap<&'a str, &'a Tensor>,
}

impl AdapterFolder {
    /// Reads a folder. Every tensor must be used: LoRA matrices come in pairs of the configured
    /// rank, all others belong to `modules_to_save`.
    pub fn read(dir: &Path) -> Result<Self, AdapterError> {
        let config = AdapterConfig::read(dir)?;
        let task = TaskConfig::read(dir)?;
        let path = dir.join(WEIGHTS);
        let pickle = dir.join(PICKLE);
        if !path.exists() && pickle.exists() {
            return Err(AdapterError::Pickle { path: pickle });
        }
        let stored = read_tensors(&path, "it holds the weights of the adapter", |_| true)?;
        let mut tensors = BTreeMap::new();
        for (name, tensor) in stored {
            let Some(short) = name.strip_prefix(PEFT_PREFIX) else {
                return Err(AdapterError::tensor(
                    &name,
                    format!("the names of a PEFT adapter begin with {PEFT_PREFIX}"),
                ));
            };
            tensors.insert(short.to_owned(), tensor);
        }
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
        let tensors = self
            .tensors
            .iter()
            .map(|(name, tensor)| (format!("{PEFT_PREFIX}{name}"), tensor.clone()))
            .collect();
        write_tensors(&dir.join(WEIGHTS), &tensors)
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
                let b_name = format!("{module}{LORA_B}");
                let b = self.tensors.get(&b_name).ok_or_else(|| {
                    AdapterError::tensor(name, format!("its partner {b_name} is missing"))
                })?;
                self.check_pair(module, tensor, b)?;
                parts.lora.insert(module, LoraPair { a: tensor, b });
            } else if let Some(module) = name.strip_suffix(LORA_B) {
                let a_name = format!("{module}{LORA_A}");
                if !self.tensors.contains_key(&a_name) {
                    return Err(AdapterError::tensor(
                        name,
                        format!("its partner {a_name} is missing"),
                    ));
                }
            } else if self.is_saved(name) {
                parts.saved.insert(name, tensor);
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
        Ok(parts)
    }

    /// Whether the tensor is the weight or bias of a module that was trained whole.
    fn is_saved(&self, tensor: &str) -> bool {
        tensor
            .rsplit_once('.')
            .is_some_and(|(module, _)| !tensor.contains(".lora_") && self.config.saves(module))
    }

    fn check_pair(&self, module: &str, a: &Tensor, b: &Tensor) -> Result<(), AdapterError> {
        let rank = self.config.rank(module);
        if a.rank() != 2 || a.dim(0)? != rank {
            return Err(AdapterError::tensor(
                &format!("{module}{LORA_A}"),
                format!("has the shape {:?}, not [r = {rank}, in]", a.dims()),
            ));
        }
        if b.rank() != 2 || b.dim(1)? != rank {
            return Err(AdapterError::tensor(
                &format!("{module}{LORA_B}"),
                format!("has the shape {:?}, not [out, r = {rank}]", b.dims()),
            ));
        }
        if self.config.targets(module) == Some(false) {
            return Err(AdapterError::tensor(
                &format!("{module}{LORA_A}"),
                "target_modules does not name its module",
            ));
        }
        Ok(())
    }
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
                max_length: 64,
                base_model: Some("tiny".into()),
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
            write_tensors(&path, &tensors).unwrap();
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
            "base_model.model.classifier.lora_A.default.weight",
            "bert.encoder.layer.0.output.dense.lora_A.weight",
        ] {
            let error = refused_tensors(|tensors| {
                let extra = Tensor::new(&[1f32], &Device::Cpu).unwrap();
                tensors.insert(name.to_owned(), extra);
            });
            assert!(
                error.contains(name.trim_start_matches(PEFT_PREFIX)),
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
