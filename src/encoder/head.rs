//! Classification heads, as `AutoModelForSequenceClassification` has them.

use std::collections::BTreeMap;

use candle_core::Tensor;

use super::layer::Adapted;
use super::weights::check_shape;
use super::{EncoderError, Family, Site};
use crate::ops::{self, Activation, Dropout, Linear};

/// From the first token's state to logits.
#[derive(Clone, Debug)]
pub(super) enum Head {
    /// Pooler (dense, tanh) and classifier. Without a pooler of its own the head uses the
    /// encoder's.
    Bert {
        pooler: Option<Linear>,
        classifier: Linear,
    },
    /// Dense, tanh, projection.
    Mpnet { dense: Linear, out_proj: Linear },
}

impl Head {
    /// Takes the tensors it knows; any other is an error.
    pub(super) fn new(
        family: Family,
        hidden: usize,
        mut tensors: BTreeMap<String, Tensor>,
    ) -> Result<Self, EncoderError> {
        let mut projection = |name: &str| {
            let labels = match tensors.get(&format!("{name}.weight")).map(Tensor::dims) {
                Some([labels, _]) => *labels,
                _ => 1,
            };
            take(&mut tensors, name, labels, hidden)
        };
        let head = match family {
            Family::Bert => {
                let classifier = projection("classifier")?;
                let pooler = match tensors.contains_key("pooler.dense.weight") {
                    true => Some(take(&mut tensors, "pooler.dense", hidden, hidden)?),
                    false => None,
                };
                Self::Bert { pooler, classifier }
            }
            Family::Mpnet => Self::Mpnet {
                out_proj: projection("classifier.out_proj")?,
                dense: take(&mut tensors, "classifier.dense", hidden, hidden)?,
            },
        };
        if tensors.is_empty() {
            return Ok(head);
        }
        Err(EncoderError::UnusedHeadWeights {
            family: family.name(),
            names: tensors.into_keys().collect::<Vec<_>>().join(", "),
        })
    }

    pub(super) fn num_labels(&self) -> usize {
        match self {
            Self::Bert { classifier, .. } => classifier.out_features(),
            Self::Mpnet { out_proj, .. } => out_proj.out_features(),
        }
    }

    pub(super) fn linears(&self) -> Vec<&Linear> {
        match self {
            Self::Bert { pooler, classifier } => pooler.iter().chain([classifier]).collect(),
            Self::Mpnet { dense, out_proj } => vec![dense, out_proj],
        }
    }

    /// Logits `[sequences, labels]` of first-token states `[sequences, hidden]`.
    pub(super) fn forward(
        &self,
        encoder_pooler: Option<&Linear>,
        first: &Tensor,
        adapted: &Adapted<'_>,
        dropout: Option<Dropout>,
    ) -> Result<Tensor, EncoderError> {
        let drop = |x: &Tensor, site| match dropout {
            Some(dropout) => ops::dropout(x, dropout.at_site(site)),
            None => Ok(x.clone()),
        };
        match self {
            Self::Bert { pooler, classifier } => {
                let pooler = pooler.as_ref().or(encoder_pooler);
                let pooler = pooler.ok_or(EncoderError::MissingPooler)?;
                let pooled = adapted.linear(first, pooler, Site::Pooler, Activation::Tanh)?;
                Ok(ops::linear(
                    &drop(&pooled, 1)?,
                    classifier,
                    Activation::None,
                )?)
            }
            Self::Mpnet { dense, out_proj } => {
                let x = ops::linear(&drop(first, 2)?, dense, Activation::Tanh)?;
                Ok(ops::linear(&drop(&x, 3)?, out_proj, Activation::None)?)
            }
        }
    }
}

fn take(
    tensors: &mut BTreeMap<String, Tensor>,
    name: &str,
    out_features: usize,
    in_features: usize,
) -> Result<Linear, EncoderError> {
    let mut tensor = |part: &str, shape: &[usize]| {
        let name = format!("{name}.{part}");
        let tensor = tensors
            .remove(&name)
            .ok_or_else(|| EncoderError::MissingWeight { name: name.clone() })?;
        check_shape(&name, &tensor, shape)?;
        Ok::<_, EncoderError>(tensor)
    };
    Ok(Linear {
        weight: tensor("weight", &[out_features, in_features])?,
        bias: Some(tensor("bias", &[out_features])?),
    })
}
