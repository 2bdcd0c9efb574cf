//! Classification heads, as `AutoModelForSequenceClassification` has them: dropout, dense,
//! activation, dropout, projection.

use std::collections::BTreeMap;

use candle_core::Tensor;

use super::dense::Dense;
use super::layer::Adapted;
use super::weights::check_shape;
use super::{EncoderError, Family, Site};
use crate::ops::{self, Activation, Dropout, Linear};

/// Places of the dropouts.
const BEFORE_DENSE: u64 = 2;
const BEFORE_PROJECTION: u64 = 3;

/// From the first token's state to logits.
#[derive(Clone, Debug)]
pub(super) struct Head {
    /// Absent where the encoder's own is used.
    dense: Option<Linear>,
    projection: Linear,
    family: Family,
}

/// The modules of a family's head.
#[derive(Clone, Copy, Debug)]
pub struct HeadNames {
    /// The linear with as many outputs as the encoder.
    pub dense: &'static str,
    pub activation: Activation,
    /// Whether dropout comes before it too.
    drops_input: bool,
    /// Whether it is a module of its own, which an encoder's folder may bring and which may carry
    /// LoRA; if not it is a part of `classifier`, which every adapter brings whole.
    pub stands_alone: bool,
    /// The last linear, with an output a label.
    pub projection: &'static str,
}

impl HeadNames {
    pub fn of(family: Family) -> Self {
        match family {
            Family::Bert => Self::alone("pooler.dense", Activation::Tanh),
            Family::DebertaV2 => Self::alone("pooler.dense", Activation::Gelu),
            Family::DistilBert => Self::alone("pre_classifier", Activation::Relu),
            Family::Roberta | Family::Mpnet => Self {
                dense: "classifier.dense",
                activation: Activation::Tanh,
                drops_input: true,
                stands_alone: false,
                projection: "classifier.out_proj",
            },
        }
    }

    fn alone(dense: &'static str, activation: Activation) -> Self {
        Self {
            dense,
            activation,
            drops_input: false,
            stands_alone: true,
            projection: "classifier",
        }
    }
}

impl Head {
    /// Takes the tensors it knows; any other is an error. `encoder_dense` tells whether the encoder
    /// has a dense linear for heads without.
    pub(super) fn new(
        family: Family,
        hidden: usize,
        encoder_dense: bool,
        mut tensors: BTreeMap<String, Tensor>,
    ) -> Result<Self, EncoderError> {
        let names = HeadNames::of(family);
        let parts = ["weight", "bias"].map(|part| format!("{}.{part}", names.projection));
        if !parts.iter().any(|part| tensors.contains_key(part)) {
            let name = names.projection;
            return Err(EncoderError::MissingHead { name });
        }
        let labels = match tensors.get(&format!("{}.weight", names.projection)) {
            Some(weight) if weight.dims().len() == 2 => weight.dims()[0],
            _ => 1,
        };
        let projection = take(&mut tensors, names.projection, labels, hidden)?;
        let has_dense = tensors.contains_key(&format!("{}.weight", names.dense));
        let dense = if has_dense || !names.stands_alone {
            Some(take(&mut tensors, names.dense, hidden, hidden)?)
        } else if encoder_dense {
            None
        } else {
            return Err(EncoderError::MissingHeadDense { name: names.dense });
        };
        if !tensors.is_empty() {
            return Err(EncoderError::UnusedHeadWeights {
                family: family.model_type(),
                names: tensors.into_keys().collect::<Vec<_>>().join(", "),
            });
        }
        Ok(Self {
            dense,
            projection,
            family,
        })
    }

    pub(super) fn num_labels(&self) -> usize {
        self.projection.out_features()
    }

    pub(super) fn linears(&self) -> impl Iterator<Item = &Linear> {
        self.dense.iter().chain([&self.projection])
    }

    /// Its linears, the first of them the encoder's where it has none.
    pub(super) fn both<'a>(
        &'a self,
        encoder_dense: Option<&'a Linear>,
    ) -> Result<(&'a Linear, &'a Linear), EncoderError> {
        let name = HeadNames::of(self.family).dense;
        let dense = self.dense.as_ref().or(encoder_dense);
        let dense = dense.ok_or(EncoderError::MissingHeadDense { name })?;
        Ok((dense, &self.projection))
    }

    /// Logits `[sequences, labels]` of first-token states `[sequences, hidden]`.
    pub(super) fn forward(
        &self,
        encoder_dense: Option<&Linear>,
        first: &Tensor,
        adapted: &Adapted<'_>,
        dropout: Option<Dropout>,
    ) -> Result<Tensor, EncoderError> {
        let drop = |x: &Tensor, site| match dropout {
            Some(dropout) => ops::dropout(x, dropout.at_site(site)),
            None => Ok(x.clone()),
        };
        let names = HeadNames::of(self.family);
        let (dense, projection) = self.both(encoder_dense)?;
        // A head that trains is in f32, whatever the encoder is in.
        let first = first.to_dtype(dense.weight.dtype())?;
        let first = match names.drops_input {
            true => drop(&first, BEFORE_DENSE)?,
            false => first,
        };
        let x = adapted.linear(
            &first,
            &Dense::Plain(dense.clone()),
            Site::HeadDense,
            names.activation,
        )?;
        let x = drop(&x.to_dtype(projection.weight.dtype())?, BEFORE_PROJECTION)?;
        Ok(ops::linear(&x, projection, Activation::None)?)
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
