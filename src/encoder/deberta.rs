//! The fields of DeBERTa's `config.json` that the other families don't have.

use serde::Deserialize;
use serde_json::Value;

use super::{ConvConfig, DisentangledConfig, EncoderError, RelativeAttention};
use crate::ops::Activation;

/// As they stand; defaults are those of `transformers`.
#[derive(Deserialize)]
pub(super) struct DebertaFile {
    #[serde(default)]
    relative_attention: bool,
    /// Below 1: as many as there are positions.
    #[serde(default)]
    max_relative_positions: i64,
    /// Below 1: none.
    #[serde(default)]
    position_buckets: i64,
    /// A list, or names joined by `|`.
    #[serde(default)]
    pos_att_type: Value,
    #[serde(default)]
    share_att_key: bool,
    norm_rel_ebd: Option<String>,
    #[serde(default = "yes")]
    pub(super) position_biased_input: bool,
    pub(super) embedding_size: Option<usize>,
    #[serde(default)]
    conv_kernel_size: usize,
    conv_groups: Option<usize>,
    conv_act: Option<String>,
    pooler_hidden_act: Option<String>,
    pooler_hidden_size: Option<usize>,
    attention_head_size: Option<usize>,
}

fn yes() -> bool {
    true
}

fn unsupported<T>(what: impl Into<String>) -> Result<T, EncoderError> {
    Err(EncoderError::Unsupported(what.into()))
}

impl DebertaFile {
    fn attends_by(&self, term: &str) -> bool {
        let is_term = |name: &str| name.trim().eq_ignore_ascii_case(term);
        match &self.pos_att_type {
            Value::String(names) => names.split('|').any(is_term),
            Value::Array(names) => names.iter().filter_map(Value::as_str).any(is_term),
            _ => false,
        }
    }

    pub(super) fn score_terms(&self) -> usize {
        1 + usize::from(self.attends_by("c2p")) + usize::from(self.attends_by("p2c"))
    }

    pub(super) fn relative(&self, max_positions: usize) -> Result<RelativeAttention, EncoderError> {
        let (query, key) = (self.attends_by("p2c"), self.attends_by("c2p"));
        if !self.relative_attention || !(query || key) {
            return Ok(RelativeAttention::None);
        }
        let positive = |number: i64| usize::try_from(number).ok().filter(|number| *number > 0);
        let position_buckets = positive(self.position_buckets);
        let max_relative_positions = positive(self.max_relative_positions).unwrap_or(max_positions);
        if let Some(buckets) = position_buckets
            && (buckets < 2 || max_relative_positions <= buckets / 2 + 1)
        {
            return unsupported(format!(
                "position_buckets {buckets} and max_relative_positions {max_relative_positions} \
                 leave nothing to share out"
            ));
        }
        Ok(RelativeAttention::Disentangled(DisentangledConfig {
            position_buckets,
            max_relative_positions,
            query,
            key,
            share_att_key: self.share_att_key,
            normalised: self.norm_rel_ebd.as_deref().is_some_and(|kinds| {
                let mut kinds = kinds.split('|');
                kinds.any(|kind| kind.trim().eq_ignore_ascii_case("layer_norm"))
            }),
        }))
    }

    pub(super) fn conv(&self, hidden: usize) -> Result<Option<ConvConfig>, EncoderError> {
        let (kernel_size, groups) = (self.conv_kernel_size, self.conv_groups.unwrap_or(1));
        if kernel_size == 0 {
            return Ok(None);
        }
        if kernel_size.is_multiple_of(2) || groups == 0 || !hidden.is_multiple_of(groups) {
            return unsupported(format!(
                "a convolution of kernel size {kernel_size} in {groups} groups is not supported"
            ));
        }
        let activation = match self.conv_act.as_deref() {
            None | Some("tanh") => Activation::Tanh,
            Some("gelu") => Activation::Gelu,
            Some("relu") => Activation::Relu,
            Some(other) => return unsupported(format!("conv_act {other:?} is not supported")),
        };
        Ok(Some(ConvConfig {
            kernel_size,
            groups,
            activation,
        }))
    }

    /// Refuses what the head and the attention don't compute.
    pub(super) fn check(&self, hidden: usize, heads: usize) -> Result<(), EncoderError> {
        if let Some(act) = self.pooler_hidden_act.as_ref().filter(|act| *act != "gelu") {
            return unsupported(format!(
                "pooler_hidden_act {act:?} is not supported, only \"gelu\""
            ));
        }
        if self.pooler_hidden_size.is_some_and(|size| size != hidden) {
            return unsupported("a pooler_hidden_size that is not hidden_size is not supported");
        }
        if self
            .attention_head_size
            .is_some_and(|size| size * heads != hidden)
        {
            return unsupported(
                "an attention_head_size that is not hidden_size / num_attention_heads is not \
                 supported",
            );
        }
        Ok(())
    }
}
