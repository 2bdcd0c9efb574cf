//! What a task adds to the encoder: LoRA on its linears, and a head.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use candle_core::{DType, Tensor};

use super::head::Head;
use super::layer::Adapted;
use super::weights::{bytes, check_shape};
use super::{Encoder, EncoderError, LinearSpec, Site};
use crate::ops::{ColumnMap, Dropout, Linear, LoraUpdate};

/// LoRA of one linear: y += scale · (x Aᵀ) Bᵀ.
#[derive(Clone, Debug)]
pub struct LoraModule {
    /// Name of an encoder's [linear](super::LinearSpec).
    pub name: String,
    /// A, `[r, in]`.
    pub a: Tensor,
    /// B, `[out, r]`.
    pub b: Tensor,
    pub scale: f64,
    /// DoRA's magnitude of each output, `[out]`.
    pub magnitude: Option<Tensor>,
    /// The bias in place of the encoder's, `[out]`.
    pub bias: Option<Tensor>,
}

impl LoraModule {
    /// The update of a linear whose weight and bias are the encoder's.
    fn update(self, encoder: &Encoder, spec: &LinearSpec) -> Result<LoraUpdate, EncoderError> {
        let rank = self.a.dims().first().copied().unwrap_or(0).max(1);
        let out = spec.out_features;
        let check = |part: &str, tensor: &Tensor, shape: &[usize]| {
            check_shape(&format!("{}.{part}", self.name), tensor, shape)
        };
        check("lora_A", &self.a, &[rank, spec.in_features])?;
        check("lora_B", &self.b, &[out, rank])?;
        if let Some(magnitude) = &self.magnitude {
            check("lora_magnitude_vector", magnitude, &[out])?;
        }
        if let Some(bias) = &self.bias {
            check("bias", bias, &[out])?;
        }
        let dtype = encoder.dtype();
        let a = self.a.to_dtype(dtype)?;
        if self.magnitude.is_none() && self.bias.is_none() {
            return Ok(spec.lora_update(a, self.b.to_dtype(dtype)?, self.scale, None));
        }
        let base = encoder.linear(spec)?;
        let gain = match &self.magnitude {
            Some(magnitude) => dora_gain(&base.weight, &self.a, &self.b, self.scale, magnitude)?,
            None => Tensor::ones(out, DType::F32, base.weight.device())?,
        };
        // (y − b) ∘ gain + b', with y the output of the encoder's linear and b its bias.
        let shift = match (&self.bias, &base.bias) {
            (Some(new), Some(old)) => (new - (old * &gain)?)?,
            (None, Some(old)) => (old - (old * &gain)?)?,
            (new, None) => new.clone().map_or_else(|| gain.zeros_like(), Ok)?,
        };
        let b = self.b.broadcast_mul(&gain.unsqueeze(1)?)?;
        let map = ColumnMap { gain, shift };
        Ok(spec.lora_update(a, b.to_dtype(dtype)?, self.scale, Some(map)))
    }
}

/// What DoRA multiplies each output of W + s·B A by, `[out]`: magnitude / ‖W + s·B A‖, the norm of
/// each row, which training takes for a constant (section 4.3 of the paper). In f32, whatever the
/// weight is in.
pub fn dora_gain(
    weight: &Tensor,
    a: &Tensor,
    b: &Tensor,
    scale: f64,
    magnitude: &Tensor,
) -> candle_core::Result<Tensor> {
    let weight = weight.to_dtype(DType::F32)?;
    let adapted = (weight + (b.detach().matmul(&a.detach())? * scale)?)?;
    magnitude.div(&adapted.sqr()?.sum(1)?.sqrt()?)
}

/// LoRA resolved to the places of one encoder, and the task's head.
#[derive(Clone, Debug)]
pub struct TaskWeights {
    updates: HashMap<Site, Arc<[LoraUpdate]>>,
    head: Head,
}

impl TaskWeights {
    /// `modules` may be empty: a fully fine-tuned classifier has a head only.
    ///
    /// `head` holds tensors named as in `AutoModelForSequenceClassification`, without the family's
    /// prefix, see [`HeadNames`](super::HeadNames). A dense linear that stands alone (BERT's
    /// `pooler.dense`) may be left out where the encoder's folder has one.
    ///
    /// # Errors
    /// A module that the encoder does not have, a shape that does not fit, a head tensor that is
    /// missing or has no use.
    pub fn new(
        encoder: &Encoder,
        modules: Vec<LoraModule>,
        head: BTreeMap<String, Tensor>,
    ) -> Result<Self, EncoderError> {
        let mut updates: HashMap<Site, Vec<LoraUpdate>> = HashMap::new();
        for module in modules {
            let spec = encoder
                .linears()
                .iter()
                .find(|spec| spec.name == module.name);
            let spec = spec.ok_or_else(|| EncoderError::UnknownLinear {
                name: module.name.clone(),
            })?;
            let update = module.update(encoder, spec)?;
            updates.entry(spec.site).or_default().push(update);
        }
        let config = encoder.config();
        let has_dense = encoder.head_dense.is_some();
        // What trains stays as it is, in f32.
        let head = head.into_iter().map(|(name, tensor)| {
            let tensor = match tensor.track_op() {
                true => tensor,
                false => encoder.place(&tensor)?,
            };
            Ok((name, tensor))
        });
        let head = head.collect::<candle_core::Result<_>>()?;
        let head = Head::new(config.family, config.hidden_size, has_dense, head)?;
        Ok(Self {
            updates: updates
                .into_iter()
                .map(|(site, u)| (site, u.into()))
                .collect(),
            head,
        })
    }

    pub fn num_labels(&self) -> usize {
        self.head.num_labels()
    }

    /// Number of LoRA and head weights.
    pub fn parameters(&self) -> usize {
        let lora = self.updates.values().flat_map(|updates| updates.iter());
        let lora: usize = lora
            .map(|update| {
                // DoRA's magnitudes, or the biases of an adapter's own.
                let map = update.map.as_ref().map_or(0, |map| map.gain.elem_count());
                update.a.elem_count() + update.b.elem_count() + map
            })
            .sum();
        let count = |linear: &Linear| {
            linear.weight.elem_count() + linear.bias.as_ref().map_or(0, Tensor::elem_count)
        };
        lora + self.head.linears().map(count).sum::<usize>()
    }

    /// Memory of the LoRA and head weights, as they are on the device.
    pub fn bytes(&self) -> usize {
        let lora = self.updates.values().flat_map(|updates| updates.iter());
        let lora = lora.flat_map(|LoraUpdate { a, b, map, .. }| {
            let map = map.iter().flat_map(|map| [&map.gain, &map.shift]);
            [a, b].into_iter().chain(map)
        });
        let head = self.head.linears();
        let head = head.flat_map(|linear| [Some(&linear.weight), linear.bias.as_ref()]);
        lora.chain(head.flatten()).map(bytes).sum()
    }

    pub(super) fn updates(&self, site: Site) -> Option<&Arc<[LoraUpdate]>> {
        self.updates.get(&site)
    }

    /// The head's two linears; `None` if the first carries LoRA.
    pub(super) fn plain_head<'a>(
        &'a self,
        encoder_dense: Option<&'a Linear>,
    ) -> Result<Option<(&'a Linear, &'a Linear)>, EncoderError> {
        match self.updates(Site::HeadDense) {
            Some(_) => Ok(None),
            None => self.head.both(encoder_dense).map(Some),
        }
    }

    /// Logits `[sequences, labels]` of first-token states `[sequences, hidden]`.
    pub(super) fn head_logits(
        &self,
        encoder_dense: Option<&Linear>,
        first: &Tensor,
        dropout: Option<Dropout>,
    ) -> Result<Tensor, EncoderError> {
        let adapted = Adapted::whole(self, first.dims()[0], dropout);
        self.head.forward(encoder_dense, first, &adapted, dropout)
    }
}
