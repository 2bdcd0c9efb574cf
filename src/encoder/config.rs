//! `config.json` of the supported families.

use std::path::Path;

use serde::Deserialize;

use super::deberta::DebertaFile;
use super::{ConvConfig, DisentangledConfig, EncoderError, Family, RelativeAttention};
use crate::files::{self, MAX_JSON_BYTES};
use crate::lfs::refuse_pointer;
use crate::parse;
use crate::text::PackedBatch;

/// The sizes of an encoder.
#[derive(Clone, Debug, PartialEq)]
pub struct EncoderConfig {
    pub family: Family,
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub intermediate_size: usize,
    /// Rows of the position table; see [`EncoderConfig::max_sequence_length`].
    pub max_position_embeddings: usize,
    /// Segment embeddings; 0 for an encoder without.
    pub type_vocab_size: usize,
    /// Width of the embedding tables; they are projected where it is not `hidden_size` (DeBERTa).
    pub embedding_size: usize,
    /// Whether positions have embeddings that are added to the words'.
    pub position_embeddings: bool,
    /// Where positions count from: the first token's is one more, padding tokens are left out
    /// (fairseq's way). Absent where positions begin at 0.
    pub padding_idx: Option<u32>,
    pub layer_norm_eps: f64,
    pub relative: RelativeAttention,
    /// Terms that a score is made of, by whose number it is scaled down: 1, or 1 and DeBERTa's c2p
    /// and p2c.
    pub score_terms: usize,
    pub conv: Option<ConvConfig>,
}

/// `config.json` as it stands, with DistilBERT's names of fields beside the others'. Further fields
/// do not matter to the forward pass.
#[derive(Deserialize)]
struct File {
    model_type: String,
    vocab_size: usize,
    #[serde(alias = "dim")]
    hidden_size: usize,
    #[serde(alias = "n_layers")]
    num_hidden_layers: usize,
    #[serde(alias = "n_heads")]
    num_attention_heads: usize,
    #[serde(alias = "hidden_dim")]
    intermediate_size: usize,
    max_position_embeddings: usize,
    type_vocab_size: Option<usize>,
    layer_norm_eps: Option<f64>,
    pad_token_id: Option<u32>,
    #[serde(alias = "activation")]
    hidden_act: Option<String>,
    position_embedding_type: Option<String>,
    relative_attention_num_buckets: Option<usize>,
    #[serde(default)]
    is_decoder: bool,
    #[serde(flatten)]
    deberta: DebertaFile,
}

impl EncoderConfig {
    pub fn read(dir: &Path) -> Result<Self, EncoderError> {
        let path = dir.join("config.json");
        let bytes = files::read(&path, MAX_JSON_BYTES).map_err(|source| EncoderError::Read {
            path: path.clone(),
            source,
        })?;
        refuse_pointer(&path, &bytes)?;
        let file: File =
            parse::json(&bytes).map_err(|source| EncoderError::Config { path, source })?;
        Self::from_file(file)
    }

    fn from_file(file: File) -> Result<Self, EncoderError> {
        let unsupported = |what: String| Err(EncoderError::Unsupported(what));
        let of_type = |family: &Family| family.model_type() == file.model_type;
        let Some(family) = Family::ALL.into_iter().find(of_type) else {
            let known = Family::ALL.map(Family::model_type).join(", ");
            return unsupported(format!(
                "the model type {:?} is none of {known}",
                file.model_type
            ));
        };
        if let Some(act) = file.hidden_act.filter(|act| act != "gelu") {
            return unsupported(format!(
                "hidden_act {act:?} is not supported, only \"gelu\""
            ));
        }
        if let Some(kind) = file
            .position_embedding_type
            .filter(|kind| kind != "absolute")
        {
            return unsupported(format!("position_embedding_type {kind:?} is not supported"));
        }
        if file.is_decoder {
            return unsupported("a decoder is not an encoder (is_decoder is true)".into());
        }
        let sizes = [
            file.vocab_size,
            file.hidden_size,
            file.num_hidden_layers,
            file.num_attention_heads,
            file.intermediate_size,
        ];
        if sizes.contains(&0) || !file.hidden_size.is_multiple_of(file.num_attention_heads) {
            return unsupported(
                "sizes in config.json must be positive, and hidden_size a multiple of \
                 num_attention_heads"
                    .into(),
            );
        }
        let padding_idx = match family {
            Family::Bert | Family::DistilBert | Family::DebertaV2 => None,
            Family::Roberta => Some(file.pad_token_id.unwrap_or(1)),
            Family::Mpnet => Some(1),
        };
        let type_vocab_size = match family {
            Family::Bert | Family::Roberta => file.type_vocab_size.unwrap_or(2),
            Family::DebertaV2 => file.type_vocab_size.unwrap_or(0),
            Family::DistilBert | Family::Mpnet => 0,
        };
        let deberta = match family {
            Family::DebertaV2 => Some(&file.deberta),
            _ => None,
        };
        let relative = match (family, deberta) {
            (Family::Mpnet, _) => {
                RelativeAttention::Bias(file.relative_attention_num_buckets.unwrap_or(32))
            }
            (_, Some(deberta)) => deberta.relative(file.max_position_embeddings)?,
            _ => RelativeAttention::None,
        };
        let conv = match deberta {
            Some(deberta) => deberta.conv(file.hidden_size)?,
            None => None,
        };
        if let Some(deberta) = deberta {
            deberta.check(file.hidden_size, file.num_attention_heads)?;
        }
        let config = Self {
            family,
            vocab_size: file.vocab_size,
            hidden_size: file.hidden_size,
            num_hidden_layers: file.num_hidden_layers,
            num_attention_heads: file.num_attention_heads,
            intermediate_size: file.intermediate_size,
            max_position_embeddings: file.max_position_embeddings,
            type_vocab_size,
            embedding_size: deberta
                .and_then(|deberta| deberta.embedding_size)
                .unwrap_or(file.hidden_size),
            position_embeddings: deberta.is_none_or(|deberta| deberta.position_biased_input),
            padding_idx,
            layer_norm_eps: file.layer_norm_eps.unwrap_or(match family {
                Family::DebertaV2 => 1e-7,
                // DistilBERT has no such field and this value.
                _ => 1e-12,
            }),
            relative,
            score_terms: deberta.map_or(1, DebertaFile::score_terms),
            conv,
        };
        if config.max_position_embeddings <= config.position_offset() {
            return unsupported("max_position_embeddings is too small".into());
        }
        Ok(config)
    }

    /// Spells out every field, for the [digest](super::encoder_digest) of the encoder.
    ///
    /// A field that is added later must leave the text as it is for every configuration that could
    /// be read without it: write it only where it has another value.
    pub(super) fn canonical(&self) -> String {
        // Without `..`, so that nobody adds a field and forgets the digest.
        let Self {
            family,
            vocab_size,
            hidden_size,
            num_hidden_layers,
            num_attention_heads,
            intermediate_size,
            max_position_embeddings,
            type_vocab_size,
            embedding_size,
            position_embeddings,
            padding_idx,
            layer_norm_eps,
            relative,
            score_terms,
            conv,
        } = self;
        let relative = match relative {
            RelativeAttention::None => "none".to_owned(),
            RelativeAttention::Bias(buckets) => format!("bias {buckets}"),
            RelativeAttention::Disentangled(DisentangledConfig {
                position_buckets,
                max_relative_positions,
                query,
                key,
                share_att_key,
                normalised,
            }) => format!(
                "disentangled {position_buckets:?} {max_relative_positions} {query} {key} \
                 {share_att_key} {normalised}"
            ),
        };
        let conv = match conv {
            None => "none".to_owned(),
            Some(ConvConfig {
                kernel_size,
                groups,
                activation,
            }) => format!("{kernel_size} {groups} {activation:?}"),
        };
        format!(
            "family {}\nvocab_size {vocab_size}\nhidden_size {hidden_size}\n\
             num_hidden_layers {num_hidden_layers}\nnum_attention_heads {num_attention_heads}\n\
             intermediate_size {intermediate_size}\n\
             max_position_embeddings {max_position_embeddings}\n\
             type_vocab_size {type_vocab_size}\nembedding_size {embedding_size}\n\
             position_embeddings {position_embeddings}\npadding_idx {padding_idx:?}\n\
             layer_norm_eps {layer_norm_eps:e}\nrelative {relative}\nscore_terms {score_terms}\n\
             conv {conv}\n",
            family.model_type()
        )
    }

    /// Most tokens of a sequence, special tokens included.
    pub fn max_sequence_length(&self) -> usize {
        self.max_position_embeddings - self.position_offset()
    }

    pub(super) fn has_projection(&self) -> bool {
        self.embedding_size != self.hidden_size
    }

    /// Factor of the scores of attention.
    pub(super) fn attention_scale(&self) -> f32 {
        let width = self.hidden_size / self.num_attention_heads;
        1.0 / ((width * self.score_terms) as f32).sqrt()
    }

    /// Rows of the position table before the first token's.
    fn position_offset(&self) -> usize {
        self.padding_idx.map_or(0, |padding| padding as usize + 1)
    }

    /// Position of every token in its sequence, as a row of the position table.
    pub(super) fn positions(&self, batch: &PackedBatch) -> Vec<u32> {
        let mut positions = Vec::with_capacity(batch.tokens());
        for i in 0..batch.sequences() {
            match self.padding_idx {
                None => positions.extend(0..batch.span(i).len() as u32),
                Some(padding) => {
                    let mut last = padding;
                    positions.extend(batch.ids[batch.span(i)].iter().map(|id| {
                        if *id == padding {
                            return padding;
                        }
                        last += 1;
                        last
                    }));
                }
            }
        }
        positions
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: serde_json::Value) -> Result<EncoderConfig, EncoderError> {
        EncoderConfig::from_file(serde_json::from_value(json).unwrap())
    }

    fn mpnet() -> serde_json::Value {
        serde_json::json!({
            "model_type": "mpnet", "vocab_size": 40, "hidden_size": 12, "num_hidden_layers": 1,
            "num_attention_heads": 3, "intermediate_size": 24, "max_position_embeddings": 18,
            "layer_norm_eps": 1e-5, "hidden_act": "gelu", "pad_token_id": 1
        })
    }

    #[test]
    fn mpnet_positions_begin_behind_the_padding_row() {
        let config = parse(mpnet()).unwrap();
        assert_eq!(config.max_sequence_length(), 16);
        let batch = PackedBatch {
            ids: vec![0, 9, 2, 0, 1, 2],
            type_ids: vec![0; 6],
            offsets: vec![0, 3, 6],
        };
        assert_eq!(config.positions(&batch), [2, 3, 4, 2, 1, 3]);
    }

    #[test]
    fn what_the_network_does_not_compute_is_refused() {
        for (field, value) in [
            ("model_type", serde_json::json!("llama")),
            ("hidden_act", serde_json::json!("relu")),
            ("position_embedding_type", serde_json::json!("relative_key")),
            ("num_attention_heads", serde_json::json!(5)),
            ("max_position_embeddings", serde_json::json!(2)),
        ] {
            let mut config = mpnet();
            config[field] = value;
            assert!(parse(config).is_err(), "{field}");
        }
    }
}
