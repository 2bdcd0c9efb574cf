//! Relative positions: MPNet's bias, and DeBERTa's queries and keys of positions.

use candle_core::{Device, Tensor};

use super::layer::{Adapted, Slot, fuse, with_updates};
use super::names::Names;
use super::weights::RELATIVE_BIAS;
use super::{EncoderConfig, EncoderError, Segment, Site, Weights};
use crate::ops::{
    self, Activation, Disentangled, Linear, LoraUpdate, PositionTable, Positions, RelativeRows,
};

/// How relative positions take part in attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RelativeAttention {
    None,
    /// MPNet: one bias by bucket and head for all layers. Number of buckets.
    Bias(usize),
    Disentangled(DisentangledConfig),
}

/// DeBERTa's disentangled attention (arXiv 2006.03654).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DisentangledConfig {
    /// Buckets on each side that distances fall into, the far ones by their logarithm; `None`
    /// where each distance stands for itself.
    pub position_buckets: Option<usize>,
    pub max_relative_positions: usize,
    /// Position to content (p2c): positions have queries.
    pub query: bool,
    /// Content to position (c2p): positions have keys.
    pub key: bool,
    /// Positions go through the content's projections, not through ones of their own.
    pub share_att_key: bool,
    /// The embeddings of positions are normalised (`norm_rel_ebd`).
    pub normalised: bool,
}

impl DisentangledConfig {
    /// Embeddings of positions on each side.
    fn span(&self) -> usize {
        self.position_buckets.unwrap_or(self.max_relative_positions)
    }

    /// The projections of positions that are not the content's.
    pub(super) fn own_projections(&self) -> Vec<&'static str> {
        let own = [
            (self.query, "attention.self.pos_query_proj"),
            (self.key, "attention.self.pos_key_proj"),
        ];
        let wanted = own.into_iter().filter(|(wanted, _)| *wanted);
        match self.share_att_key {
            true => Vec::new(),
            false => wanted.map(|(_, name)| name).collect(),
        }
    }

    /// `transformers` makes the row of query i and key j from i − j.
    fn rows(&self, limit: usize) -> RelativeRows {
        let span = self.span() as i64;
        relative_rows(limit, |offset| {
            let bucket = match self.position_buckets {
                Some(buckets) => log_bucket(-offset, buckets, self.max_relative_positions),
                None => -offset,
            };
            (bucket + span).clamp(0, 2 * span - 1) as u32
        })
    }
}

/// What all layers share.
#[derive(Clone)]
pub(super) enum Relative {
    None,
    Bias {
        /// `[buckets, heads]`
        table: Tensor,
        rows: RelativeRows,
    },
    Disentangled {
        /// `[2 · span, hidden]`
        embeddings: Tensor,
        rows: RelativeRows,
        config: DisentangledConfig,
    },
}

/// The positions in use in one batch.
pub(super) struct BatchPositions {
    pub(super) positions: Positions,
    /// MPNet's table.
    bias: Option<Tensor>,
    /// DeBERTa's embeddings of the rows in use, and the first of them.
    embeddings: Option<(Tensor, usize)>,
}

impl Relative {
    pub(super) fn new(config: &EncoderConfig, weights: &Weights) -> Result<Self, EncoderError> {
        let limit = config.max_sequence_length();
        match config.relative {
            RelativeAttention::None => Ok(Self::None),
            RelativeAttention::Bias(buckets) => {
                let heads = config.num_attention_heads;
                let table = weights.get(RELATIVE_BIAS, &[buckets, heads])?;
                Ok(Self::Bias {
                    rows: on_device(mpnet_rows(buckets, limit), table.device())?,
                    table,
                })
            }
            RelativeAttention::Disentangled(relative) => {
                let hidden = config.hidden_size;
                let shape = [2 * relative.span(), hidden];
                let mut embeddings = weights.get("encoder.rel_embeddings.weight", &shape)?;
                if relative.normalised {
                    let norm = weights.norm("encoder.LayerNorm", hidden, config.layer_norm_eps)?;
                    embeddings = ops::norm(&embeddings, &norm)?;
                }
                Ok(Self::Disentangled {
                    rows: on_device(relative.rows(limit), embeddings.device())?,
                    embeddings,
                    config: relative,
                })
            }
        }
    }

    /// What sequences of up to `longest` tokens use.
    pub(super) fn of_batch(&self, longest: usize) -> Result<BatchPositions, EncoderError> {
        Ok(match self {
            Self::None => BatchPositions {
                positions: Positions::None,
                bias: None,
                embeddings: None,
            },
            Self::Bias { table, rows } => BatchPositions {
                positions: Positions::Bias(rows.clone()),
                bias: Some(table.clone()),
                embeddings: None,
            },
            Self::Disentangled {
                embeddings,
                rows,
                config,
            } => {
                let (first, last) = rows.used(longest)?;
                BatchPositions {
                    positions: Positions::Disentangled(Disentangled {
                        rows: rows.clone(),
                        query: config.query,
                        key: config.key,
                        first_row: first,
                    }),
                    bias: None,
                    embeddings: Some((embeddings.narrow(0, first, last + 1 - first)?, first)),
                }
            }
        })
    }
}

/// How a layer makes queries and keys of positions (DeBERTa).
#[derive(Clone)]
pub(super) struct PositionProjection {
    site: Site,
    /// The columns of the site's linear that positions go through.
    first_column: usize,
    columns: usize,
    projected: Projected,
}

#[derive(Clone)]
enum Projected {
    /// By this, in each batch anew, while something trains.
    By(Linear),
    /// Every position, where nothing trains: it is the same in each batch.
    Frozen(Tensor),
}

impl PositionProjection {
    /// For the layer `index`, whose Q, K and V are `qkv`; `None` where positions have no vectors.
    pub(super) fn new(
        config: &EncoderConfig,
        weights: &Weights,
        names: &Names,
        relative: &Relative,
        index: usize,
        qkv: &Linear,
    ) -> Result<Option<Self>, EncoderError> {
        let Relative::Disentangled {
            embeddings,
            config: relative,
            ..
        } = relative
        else {
            return Ok(None);
        };
        let hidden = config.hidden_size;
        let (slot, first_column, linear) = if relative.share_att_key {
            let first = if relative.query { 0 } else { hidden };
            let end = if relative.key { 2 * hidden } else { hidden };
            (Slot::Qkv, first, columns(qkv, first, end - first)?)
        } else {
            let own = relative.own_projections().into_iter();
            let parts = own
                .map(|name| weights.linear(&names.in_layer(index, name), hidden, hidden))
                .collect::<Result<Vec<_>, _>>()?;
            (Slot::Positions, 0, fuse(&parts)?)
        };
        let trains = embeddings.track_op() || linear.weight.track_op();
        Ok(Some(Self {
            site: Site::Layer(index, slot),
            first_column,
            columns: linear.out_features(),
            projected: match trains {
                true => Projected::By(linear),
                false => Projected::Frozen(ops::linear(embeddings, &linear, Activation::None)?),
            },
        }))
    }

    /// The table of each segment, `[rows, terms · hidden]`.
    fn tables(
        &self,
        embeddings: &Tensor,
        first_row: usize,
        segments: &[Segment<'_>],
        adapted: &Adapted<'_>,
    ) -> Result<Vec<PositionTable>, EncoderError> {
        let base = match &self.projected {
            Projected::Frozen(all) => all.narrow(0, first_row, embeddings.dims()[0])?,
            Projected::By(linear) => ops::linear(embeddings, linear, Activation::None)?,
        };
        let end = self.first_column + self.columns;
        let table = |segment: &Segment<'_>| {
            let all = segment.weights.updates(self.site);
            let updates: Vec<LoraUpdate> = all
                .into_iter()
                .flat_map(|updates| updates.iter())
                .filter(|update| (self.first_column..end).contains(&update.column))
                .map(|update| LoraUpdate {
                    column: update.column - self.first_column,
                    ..update.clone()
                })
                .collect();
            let dropout = adapted.position_dropout(self.site, first_row);
            Ok(PositionTable {
                sequences: segment.sequences.len(),
                values: with_updates(base.clone(), embeddings, &updates, dropout)?,
            })
        };
        segments.iter().map(table).collect()
    }
}

impl BatchPositions {
    /// The tables of a layer's attention.
    pub(super) fn tables(
        &self,
        projection: Option<&PositionProjection>,
        segments: &[Segment<'_>],
        adapted: &Adapted<'_>,
    ) -> Result<Vec<PositionTable>, EncoderError> {
        if let (Some(projection), Some((embeddings, first_row))) = (projection, &self.embeddings) {
            return projection.tables(embeddings, *first_row, segments, adapted);
        }
        let whole = |values: &Tensor| PositionTable {
            sequences: segments.iter().map(|segment| segment.sequences.len()).sum(),
            values: values.clone(),
        };
        Ok(self.bias.iter().map(whole).collect())
    }
}

/// Some outputs of a linear.
fn columns(linear: &Linear, first: usize, count: usize) -> Result<Linear, EncoderError> {
    Ok(Linear {
        weight: linear.weight.narrow(0, first, count)?,
        bias: match &linear.bias {
            Some(bias) => Some(bias.narrow(0, first, count)?),
            None => None,
        },
    })
}

/// The row of every offset j − i.
fn relative_rows(limit: usize, row: impl Fn(i64) -> u32) -> RelativeRows {
    let reach = limit as i64 - 1;
    RelativeRows {
        row_of: (-reach..=reach).map(row).collect::<Vec<_>>().into(),
        limit,
        on_device: None,
    }
}

/// With the rows beside the batches too, where these are not in host memory.
fn on_device(rows: RelativeRows, device: &Device) -> candle_core::Result<RelativeRows> {
    let on_device = match device.is_cpu() {
        true => None,
        false => Some(Tensor::from_slice(&rows.row_of, rows.row_of.len(), device)?),
    };
    Ok(RelativeRows { on_device, ..rows })
}

/// MPNet's buckets (T5's, bidirectional, up to distance 128): half for each direction; of these
/// half exact, the others logarithmic.
fn mpnet_rows(buckets: usize, limit: usize) -> RelativeRows {
    const MAX_DISTANCE: f64 = 128.0;
    let half = (buckets / 2) as u32;
    let exact = half / 2;
    relative_rows(limit, |offset| {
        let distance = offset.unsigned_abs() as u32;
        let direction = if offset > 0 { half } else { 0 };
        let within = if distance < exact {
            distance
        } else {
            // In f32, as the reference computes it: the borders between buckets depend on it.
            let log = (distance as f32 / exact as f32).ln();
            let scale = (MAX_DISTANCE / f64::from(exact)).ln() as f32;
            (exact + (log / scale * (half - exact) as f32) as u32).min(half - 1)
        };
        direction + within
    })
}

/// DeBERTa's buckets: the inner half of the distances exact, the others logarithmic up to
/// `max_position`, with the offset's sign.
fn log_bucket(offset: i64, buckets: usize, max_position: usize) -> i64 {
    let mid = (buckets / 2) as i64;
    let distance = offset.abs();
    if distance <= mid {
        return offset;
    }
    // In f32, as the reference computes it: the borders between buckets depend on it.
    let log = (distance as f32 / mid as f32).ln();
    let scale = (((max_position - 1) as f64 / mid as f64) as f32).ln();
    let beyond = (log / scale * (mid - 1) as f32).ceil() as i64;
    (beyond + mid) * offset.signum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mpnet_buckets_follow_the_reference() {
        // transformers' MPNetEncoder.relative_position_bucket for j - i.
        let buckets = mpnet_rows(32, 200);
        let of = |offset: i64| buckets.row_of[(offset + 199) as usize];
        let expected = [
            (0, 0),
            (1, 17),
            (-1, 1),
            (7, 23),
            (-7, 7),
            (8, 24),
            (-11, 8),
            (-12, 9),
            (16, 26),
            (-64, 14),
            (127, 31),
            (199, 31),
            (-199, 15),
        ];
        for (offset, bucket) in expected {
            assert_eq!(of(offset), bucket, "offset {offset}");
        }
    }

    #[test]
    fn deberta_buckets_follow_the_reference() {
        // Where transformers' make_log_bucket_position(_, 256, 512) begins a bucket of its own,
        // beyond distance 128; at 511 the last of them, 255, goes on.
        let starts = [
            129, 130, 131, 133, 134, 136, 137, 139, 140, 142, 143, 145, 146, 148, 150, 151, 153,
            155, 156, 158, 160, 161, 163, 165, 167, 169, 170, 172, 174, 176, 178, 180, 182, 184,
            186, 188, 190, 192, 194, 196, 198, 201, 203, 205, 207, 210, 212, 214, 216, 219, 221,
            224, 226, 229, 231, 234, 236, 239, 241, 244, 247, 249, 252, 255, 258, 260, 263, 266,
            269, 272, 275, 278, 281, 284, 287, 290, 294, 297, 300, 303, 307, 310, 313, 317, 320,
            324, 327, 331, 335, 338, 342, 346, 349, 353, 357, 361, 365, 369, 373, 377, 381, 385,
            390, 394, 398, 403, 407, 411, 416, 420, 425, 430, 434, 439, 444, 449, 454, 459, 464,
            469, 474, 479, 484, 490, 495, 500, 506,
        ];
        for distance in 0..512 {
            let beyond = starts.iter().filter(|start| **start <= distance).count() as i64;
            let expected = distance.min(128) + beyond;
            assert_eq!(log_bucket(distance, 256, 512), expected, "{distance}");
            assert_eq!(log_bucket(-distance, 256, 512), -expected, "{distance}");
        }
    }

    #[test]
    fn far_deberta_positions_share_the_outermost_rows() {
        let config = DisentangledConfig {
            position_buckets: Some(6),
            max_relative_positions: 20,
            query: true,
            key: true,
            share_att_key: true,
            normalised: false,
        };
        let rows = config.rows(31);
        let of = |offset: i64| rows.row_of[(offset + 30) as usize];
        // Query behind key, at the key, before it.
        assert_eq!([of(-30), of(-8), of(-7)], [11, 11, 10]);
        assert_eq!([of(-1), of(0), of(1)], [7, 6, 5]);
        assert_eq!([of(7), of(8), of(30)], [2, 1, 0]);
        assert_eq!(rows.used(2).unwrap(), (5, 7));
    }
}
