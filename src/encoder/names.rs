//! Where each family keeps its weights.

use super::layer::Slot;
use super::{EncoderConfig, Family, LinearSpec, RelativeAttention, Site};

/// Module names below a layer.
pub(super) struct Names {
    /// What the layers stand below: `encoder.layer`.
    layers: &'static str,
    pub(super) query: &'static str,
    pub(super) key: &'static str,
    pub(super) value: &'static str,
    pub(super) attention_output: &'static str,
    pub(super) attention_norm: &'static str,
    pub(super) up: &'static str,
    pub(super) down: &'static str,
    pub(super) output_norm: &'static str,
}

impl Names {
    pub(super) fn of(family: Family) -> Self {
        match family {
            Family::Bert | Family::Roberta => Self {
                layers: "encoder.layer",
                query: "attention.self.query",
                key: "attention.self.key",
                value: "attention.self.value",
                attention_output: "attention.output.dense",
                attention_norm: "attention.output.LayerNorm",
                up: "intermediate.dense",
                down: "output.dense",
                output_norm: "output.LayerNorm",
            },
            Family::DebertaV2 => Self {
                query: "attention.self.query_proj",
                key: "attention.self.key_proj",
                value: "attention.self.value_proj",
                ..Self::of(Family::Bert)
            },
            Family::DistilBert => Self {
                layers: "transformer.layer",
                query: "attention.q_lin",
                key: "attention.k_lin",
                value: "attention.v_lin",
                attention_output: "attention.out_lin",
                attention_norm: "sa_layer_norm",
                up: "ffn.lin1",
                down: "ffn.lin2",
                output_norm: "output_layer_norm",
            },
            Family::Mpnet => Self {
                layers: "encoder.layer",
                query: "attention.attn.q",
                key: "attention.attn.k",
                value: "attention.attn.v",
                attention_output: "attention.attn.o",
                attention_norm: "attention.LayerNorm",
                up: "intermediate.dense",
                down: "output.dense",
                output_norm: "output.LayerNorm",
            },
        }
    }

    /// The family's own spelling of BERT's `query`, `key` and `value`; other names as they are.
    pub(super) fn native<'a>(&self, target: &'a str) -> &'a str {
        let last = |path: &'static str| path.rsplit('.').next().unwrap_or(path);
        match target {
            "query" => last(self.query),
            "key" => last(self.key),
            "value" => last(self.value),
            other => other,
        }
    }

    /// The linears of a layer, in the network's order.
    pub(super) fn linears(&self, config: &EncoderConfig, index: usize) -> Vec<LinearSpec> {
        let hidden = config.hidden_size;
        let wide = config.intermediate_size;
        let positions = match config.relative {
            RelativeAttention::Disentangled(relative) => relative.own_projections(),
            _ => Vec::new(),
        };
        let positions = positions.into_iter().enumerate().map(|(i, name)| {
            let column = i * hidden;
            (name, hidden, hidden, Slot::Positions, column)
        });
        [
            (self.query, hidden, hidden, Slot::Qkv, 0),
            (self.key, hidden, hidden, Slot::Qkv, hidden),
            (self.value, hidden, hidden, Slot::Qkv, 2 * hidden),
            (
                self.attention_output,
                hidden,
                hidden,
                Slot::AttentionOutput,
                0,
            ),
            (self.up, hidden, wide, Slot::Up, 0),
            (self.down, wide, hidden, Slot::Down, 0),
        ]
        .into_iter()
        .chain(positions)
        .map(
            |(name, in_features, out_features, slot, column)| LinearSpec {
                name: self.in_layer(index, name),
                in_features,
                out_features,
                site: Site::Layer(index, slot),
                column,
            },
        )
        .collect()
    }

    /// Full name of a layer's module.
    pub(super) fn in_layer(&self, index: usize, name: &str) -> String {
        format!("{}.{index}.{name}", self.layers)
    }
}
