//! What a task adds to the encoder: LoRA on its linears, and a head.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use candle_core::Tensor;

use super::head::Head;
use super::layer::Adapted;
use super::weights::check_shape;
use super::{Encoder, EncoderError, Site};
use crate::ops::{Dropout, Linear, LoraUpdate};

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
            let rank = module.a.dims().first().copied().unwrap_or(0);
            check_shape(
                &format!("{}.lora_A", module.name),
                &module.a,
                &[rank.max(1), spec.in_features],
            )?;
            check_shape(
                &format!("{}.lora_B", module.name),
                &module.b,
                &[spec.out_features, rank.max(1)],
            )?;
            let update = spec.lora_update(module.a, module.b, module.scale);
            updates.entry(spec.site).or_default().push(update);
        }
        let config = encoder.config();
        let has_dense = encoder.head_dense.is_some();
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
        let lora: usize = lora.map(|u| u.a.elem_count() + u.b.elem_count()).sum();
        let count = |linear: &Linear| {
            linear.weight.elem_count() + linear.bias.as_ref().map_or(0, Tensor::elem_count)
        };
        lora + self.head.linears().map(count).sum::<usize>()
    }

    pub(super) fn updates(&self, site: Site) -> Option<&Arc<[LoraUpdate]>> {
        self.updates.get(&site)
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
