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
    /// BERT: pooler (dense, tanh) and classifier. Without a pooler of its own the head uses the
    /// encoder's.
    Pooled {
        pooler: Option<Linear>,
        classifier: Linear,
    },
    /// The others: dense, activation, projection.
    Dense {
        dense: Linear,
        activation: Activation,
        projection: Linear,
    },
}

/// The modules of a family's head: one of `hidden` outputs, its activation, and the last one.
pub struct HeadNames {
    pub dense: &'static str,
    pub activation: Activation,
    pub projection: &'static str,
}

impl HeadNames {
    pub fn of(family: Family) -> Self {
        let (dense, activation, projection) = match family {
            Family::Bert => ("pooler.dense", Activation::Tanh, "classifier"),
            Family::Roberta | Family::Mpnet => {
                ("classifier.dense", Activation::Tanh, "classifier.out_proj")
            }
            Family::DistilBert => ("pre_classifier", Activation::Relu, "classifier"),
        };
        Self {
            dense,
            activation,
            projection,
        }
    }
}

impl Head {
    /// Takes the tensors it knows; any other is an error.
    pub(super) fn new(
        family: Family,
        hidden: usize,
        mut tensors: BTreeMap<String, Tensor>,
    ) -> Result<Self, EncoderError> {
        let names = HeadNames::of(family);
        let labels = match tensors.get(&format!("{}.weight", names.projection)) {
            Some(weight) if weight.dims().len() == 2 => weight.dims()[0],
            _ => 1,
        };
        let projection = take(&mut tensors, names.projection, labels, hidden)?;
        let has_dense = tensors.contains_key(&format!("{}.weight", names.dense));
        let dense = match has_dense || !family.has_pooler() {
            true => Some(take(&mut tensors, names.dense, hidden, hidden)?),
            false => None,
        };
        if !tensors.is_empty() {
            return Err(EncoderError::UnusedHeadWeights {
                family: family.name(),
                names: tensors.into_keys().collect::<Vec<_>>().join(", "),
            });
        }
        Ok(match dense {
            Some(dense) if !family.has_pooler() => Self::Dense {
                dense,
                activation: names.activation,
                projection,
            },
            pooler => Self::Pooled {
                pooler,
                classifier: projection,
            },
        })
    }

    pub(super) fn num_labels(&self) -> usize {
        match self {
            Self::Pooled { classifier, .. } => classifier.out_features(),
            Self::Dense { projection, .. } => projection.out_features(),
        }
    }

    pub(super) fn linears(&self) -> Vec<&Linear> {
        match self {
            Self::Pooled { pooler, classifier } => pooler.iter().chain([classifier]).collect(),
            Self::Dense {
                dense, projection, ..
            } => vec![dense, projection],
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
            Self::Pooled { pooler, classifier } => {
                let pooler = pooler.as_ref().or(encoder_pooler);
                let pooler = pooler.ok_or(EncoderError::MissingPooler)?;
                let pooled = adapted.linear(first, pooler, Site::Pooler, Activation::Tanh)?;
                Ok(ops::linear(
                    &drop(&pooled, 1)?,
                    classifier,
                    Activation::None,
                )?)
            }
            Self::Dense {
                dense,
                activation,
                projection,
            } => {
                let x = ops::linear(&drop(first, 2)?, dense, *activation)?;
                Ok(ops::linear(&drop(&x, 3)?, projection, Activation::None)?)
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
