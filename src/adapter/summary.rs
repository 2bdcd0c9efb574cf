//! What an adapter folder is, in a few lines for people.

use std::collections::BTreeSet;
use std::fmt;
use std::path::Path;

use serde::Serialize;

use super::files::stored_types;
use super::folder::WEIGHTS;
use super::{AdapterConfig, AdapterError, AdapterFolder, ProblemType};

/// An adapter as `kdlora adapter inspect` shows it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Summary {
    /// `LoRA`, `rsLoRA`, `DoRA` or `DoRA, rsLoRA`.
    pub kind: String,
    /// The ranks in use, ascending.
    pub ranks: Vec<usize>,
    /// The scales in use, ascending.
    pub scales: Vec<f64>,
    /// The last parts of the adapted modules' names.
    pub targets: BTreeSet<String>,
    /// Number of adapted linears.
    pub linears: usize,
    pub bias: &'static str,
    /// Modules that were trained whole.
    pub modules_to_save: Vec<String>,
    /// Trained numbers, head included.
    pub parameters: usize,
    /// Bytes of the weights' file.
    pub bytes: u64,
    /// Number formats in the file.
    pub types: BTreeSet<String>,
    pub problem_type: ProblemType,
    pub labels: Vec<String>,
    /// Tokens a sequence is cut to.
    pub max_length: usize,
    pub base_model: Option<String>,
    /// Digest of that encoder.
    pub base_digest: Option<String>,
}

impl Summary {
    /// Of the folder `dir`, which `adapter` was read from.
    pub fn of(dir: &Path, adapter: &AdapterFolder) -> Result<Self, AdapterError> {
        let parts = adapter.parts()?;
        let config = &adapter.config;
        let modules: Vec<&str> = parts.lora.keys().copied().collect();
        let last = |module: &&str| module.rsplit('.').next().unwrap_or(module).to_owned();
        let ranks: BTreeSet<usize> = modules.iter().map(|module| config.rank(module)).collect();
        let mut scales: Vec<f64> = modules.iter().map(|module| config.scale(module)).collect();
        scales.sort_by(f64::total_cmp);
        scales.dedup();
        let weights = dir.join(WEIGHTS);
        Ok(Self {
            kind: kind(config),
            ranks: ranks.into_iter().collect(),
            scales,
            targets: modules.iter().map(last).collect(),
            linears: modules.len(),
            bias: config.bias.name(),
            modules_to_save: config.modules_to_save.clone(),
            parameters: adapter.parameters(),
            bytes: std::fs::metadata(&weights).map_or(0, |metadata| metadata.len()),
            types: stored_types(&weights)?,
            problem_type: adapter.task.problem_type,
            labels: adapter.task.labels.clone(),
            max_length: adapter.task.max_length,
            base_model: adapter.task.base_model.clone(),
            base_digest: adapter.task.base_digest.clone(),
        })
    }
}

fn kind(config: &AdapterConfig) -> String {
    let kinds = [
        (config.use_dora, "DoRA"),
        (config.use_rslora, "rsLoRA"),
        (!config.use_dora && !config.use_rslora, "LoRA"),
    ];
    let kinds = kinds.iter().filter(|(on, _)| *on).map(|(_, name)| *name);
    kinds.collect::<Vec<_>>().join(", ")
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = |items: Vec<String>| items.join(", ");
        let numbers = |items: &[usize]| list(items.iter().map(ToString::to_string).collect());
        let scales = self.scales.iter().map(|scale| format!("{scale:.4}"));
        let types: Vec<String> = self.types.iter().cloned().collect();
        let targets: Vec<String> = self.targets.iter().cloned().collect();
        writeln!(f, "kind         {}", self.kind)?;
        writeln!(f, "rank         {}", numbers(&self.ranks))?;
        writeln!(f, "scale        {}", list(scales.collect()))?;
        writeln!(
            f,
            "targets      {} linears: {}",
            self.linears,
            list(targets)
        )?;
        writeln!(f, "bias         {}", self.bias)?;
        writeln!(f, "saved whole  {}", list(self.modules_to_save.clone()))?;
        writeln!(
            f,
            "parameters   {} ({} bytes, {})",
            self.parameters,
            self.bytes,
            list(types)
        )?;
        writeln!(f, "task         {}", self.problem_type)?;
        writeln!(f, "labels       {}", list(self.labels.clone()))?;
        writeln!(f, "max length   {} tokens", self.max_length)?;
        let base = self.base_model.as_deref().unwrap_or("not named");
        writeln!(f, "base model   {base}")?;
        let digest = self.base_digest.as_deref().unwrap_or("none");
        write!(f, "base digest  {digest}")
    }
}
