//! A model whose weights, some or all, are variables.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor, Var};

use crate::adapter::{AdapterConfig, AdapterError, AdapterFolder, TaskConfig};
use crate::distill::rng::CounterRng;
use crate::distill::spec::LoraSpec;
use crate::encoder::{
    Encoder, EncoderConfig, EncoderError, Family, HeadNames, LinearSpec, LoraModule, TaskWeights,
    Weights,
};
use crate::ops::Linear;

/// Standard deviation of a fresh head's weights, as in BERT's initialisation.
const HEAD_DEVIATION: f32 = 0.02;

/// Streams of random numbers for initialisation begin here, one for each variable.
const STREAM: u64 = 1 << 32;

/// The stream of the projection of hidden states, apart from those, so that a model begins the
/// same with and without it.
const PROJECTION_STREAM: u64 = 1 << 40;

/// What DoRA's magnitudes are called behind their linear.
const MAGNITUDE: &str = ".lora_magnitude_vector";

/// What trains, by name; and how a network is made of it.
pub struct Trainee {
    /// LoRA matrices (`{linear}.lora_A.weight`), DoRA's magnitudes, head tensors, the projection
    /// of hidden states and, in full fine-tuning, the encoder's weights. Names have no family
    /// prefix.
    variables: BTreeMap<String, Var>,
    /// Of the adapter, but frozen: LoRA-FA's A.
    constants: BTreeMap<String, Tensor>,
    base: Base,
}

/// The variable that takes hidden states to a teacher's size, `[teacher's hidden, hidden]`. No part
/// of the model: it serves the loss.
const PROJECTION: &str = "hidden_projection.weight";

enum Base {
    /// The encoder is frozen; these linears have LoRA.
    Frozen {
        encoder: Arc<Encoder>,
        linears: Vec<String>,
        config: AdapterConfig,
    },
    /// Everything trains.
    Full(EncoderConfig),
}

impl Trainee {
    /// LoRA on the linears that `lora` targets, and a head for `labels` outputs. A BERT encoder's
    /// pooler trains as a part of the head.
    ///
    /// # Errors
    /// No linear has a targeted name.
    pub fn lora(
        encoder: Arc<Encoder>,
        lora: &LoraSpec,
        labels: usize,
        seed: u64,
    ) -> Result<Self, EncoderError> {
        let mut config = AdapterConfig::new(
            lora.r,
            lora.alpha,
            lora.dropout,
            encoder.native_targets(&lora.targets),
            None,
        );
        config.use_rslora = lora.use_rslora;
        config.use_dora = lora.use_dora;
        // Beside `classifier`, which every head has.
        let head = HeadNames::of(encoder.config().family);
        if head.stands_alone {
            let module = head.dense.trim_end_matches(".dense");
            config.modules_to_save.push(module.into());
        }
        let targeted = config.target_linears(&encoder);
        if targeted.is_empty() {
            return Err(EncoderError::Unsupported(format!(
                "no linear of the encoder is named {}; it has {}",
                lora.targets.join(" or "),
                names_of(encoder.linears())
            )));
        }
        let mut init = Initialiser::new(seed, encoder.device());
        let mut variables = BTreeMap::new();
        let mut constants = BTreeMap::new();
        for linear in &targeted {
            let (input, out) = (linear.in_features, linear.out_features);
            // Kaiming uniform with a = √5, PyTorch's and PEFT's default.
            let a = init.uniform(&[lora.r, input], 1.0 / (input as f32).sqrt())?;
            let b = init.zeros(&[out, lora.r])?;
            let name = format!("{}.lora_A.weight", linear.name);
            if lora.freeze_a {
                constants.insert(name, a.as_detached_tensor());
            } else {
                variables.insert(name, a);
            }
            variables.insert(format!("{}.lora_B.weight", linear.name), b);
            if lora.use_dora {
                // The norms of the weight's rows: the first answer is the encoder's own.
                let weight = encoder.linear(linear)?.weight.to_dtype(DType::F32)?;
                let norms = weight.sqr()?.sum(1)?.sqrt()?;
                let name = format!("{}{MAGNITUDE}", linear.name);
                variables.insert(name, Var::from_tensor(&norms)?);
            }
        }
        let linears = targeted.iter().map(|linear| linear.name.clone()).collect();
        variables.extend(init.head(encoder.config(), encoder.head_dense(), labels)?);
        Ok(Self {
            variables,
            constants,
            base: Base::Frozen {
                encoder,
                linears,
                config,
            },
        })
    }

    /// Every weight of the encoder and a head for `labels` outputs.
    pub fn full(
        config: EncoderConfig,
        weights: &Weights,
        labels: usize,
        seed: u64,
    ) -> Result<Self, EncoderError> {
        let encoder = Encoder::new(config.clone(), weights)?;
        let mut variables = BTreeMap::new();
        for (name, tensor) in weights.encoder(config.family) {
            variables.insert(name.clone(), Var::from_tensor(tensor)?);
        }
        let mut init = Initialiser::new(seed, encoder.device());
        variables.extend(init.head(&config, encoder.head_dense(), labels)?);
        Ok(Self {
            variables,
            constants: BTreeMap::new(),
            base: Base::Full(config),
        })
    }

    /// Adds the projection of hidden states to a teacher's size, if that is another one.
    pub fn with_projection(
        mut self,
        teacher_hidden: usize,
        seed: u64,
    ) -> Result<Self, EncoderError> {
        let hidden = match &self.base {
            Base::Frozen { encoder, .. } => encoder.config().hidden_size,
            Base::Full(config) => config.hidden_size,
        };
        if hidden != teacher_hidden {
            let mut init = Initialiser {
                seed,
                stream: PROJECTION_STREAM,
                device: self.device(),
            };
            let bound = 1.0 / (hidden as f32).sqrt();
            let projection = init.uniform(&[teacher_hidden, hidden], bound)?;
            self.variables.insert(PROJECTION.into(), projection);
        }
        Ok(self)
    }

    /// Where the variables are.
    pub fn device(&self) -> &Device {
        let first = self.variables.values().next();
        first.map_or(&Device::Cpu, |variable| variable.device())
    }

    /// Whether the encoder's own weights train.
    pub fn is_full(&self) -> bool {
        matches!(self.base, Base::Full(_))
    }

    /// Whether what is frozen is multiplied in bf16 on a CPU.
    pub(super) fn trains_in_bf16(&self) -> bool {
        match &self.base {
            Base::Frozen { encoder, .. } => encoder.bf16_bytes() > 0,
            Base::Full(_) => false,
        }
    }

    /// Whether a layer trains as [one op](crate::ops::trained_layer), which keeps less.
    pub(super) fn layers_are_one_op(&self) -> bool {
        match &self.base {
            Base::Frozen {
                encoder, config, ..
            } => !config.use_dora && encoder.config().family != Family::DebertaV2,
            Base::Full(_) => false,
        }
    }

    /// Numbers a token that all adapters together keep for the backward pass: each site's input,
    /// which is the layer's own for Q, K and V; of single ops the input under dropout, and each
    /// update's copy of the whole output of the linear that it is in.
    pub(super) fn floats_of_adapters(&self) -> u64 {
        let Base::Frozen {
            encoder,
            linears,
            config,
        } = &self.base
        else {
            return 0;
        };
        let copies = match (self.layers_are_one_op(), config.use_dora) {
            (true, _) => 0,
            (false, true) => 2,
            (false, false) => 1,
        };
        let specs = encoder.linears().iter();
        let adapted = specs.filter(|spec| linears.contains(&spec.name));
        let floats = adapted.map(|spec| {
            let fused = encoder.fused_width(spec);
            let input = match copies == 0 && fused > spec.out_features {
                true => 0,
                false => spec.in_features,
            };
            input + copies * fused + config.r
        });
        floats.sum::<usize>() as u64
    }

    /// The projection of hidden states.
    pub fn projection(&self) -> Option<&Tensor> {
        self.variables.get(PROJECTION).map(Var::as_tensor)
    }

    pub fn variables(&self) -> &BTreeMap<String, Var> {
        &self.variables
    }

    /// Number of the model's weights that train.
    pub fn trainable(&self) -> usize {
        let of_model = self
            .variables
            .iter()
            .filter(|(name, _)| *name != PROJECTION);
        of_model.map(|(_, v)| v.elem_count()).sum()
    }

    /// Number of weights that the optimizer has moments of.
    pub fn optimized(&self) -> usize {
        self.variables.values().map(|v| v.elem_count()).sum()
    }

    /// The network over the variables as they are at this moment.
    pub fn network(&self) -> Result<(Arc<Encoder>, TaskWeights), EncoderError> {
        let tensors = self
            .variables
            .iter()
            .map(|(n, v)| (n.clone(), v.as_tensor().clone()));
        let constants = self.constants.iter().map(|(n, t)| (n.clone(), t.clone()));
        self.network_of(tensors.chain(constants).collect())
    }

    /// The network over detached tensors, such as a [snapshot](Self::snapshot).
    pub fn network_of(
        &self,
        mut tensors: BTreeMap<String, Tensor>,
    ) -> Result<(Arc<Encoder>, TaskWeights), EncoderError> {
        tensors.remove(PROJECTION);
        match &self.base {
            Base::Frozen {
                encoder,
                linears,
                config,
            } => {
                let (modules, head) = adapted(encoder, linears, config, tensors)?;
                let task = TaskWeights::new(encoder, modules, head)?;
                Ok((encoder.clone(), task))
            }
            Base::Full(config) => {
                let weights: Weights = tensors.into_iter().collect();
                let encoder = Encoder::new(config.clone(), &weights)?;
                let task = TaskWeights::new(&encoder, Vec::new(), weights.head(config.family))?;
                Ok((Arc::new(encoder), task))
            }
        }
    }

    /// Trained weights as a PEFT folder; `None` after full fine-tuning, which has no adapter.
    pub fn adapter(
        &self,
        tensors: &BTreeMap<String, Tensor>,
        task: TaskConfig,
    ) -> Result<Option<AdapterFolder>, AdapterError> {
        let Base::Frozen {
            encoder,
            linears,
            config,
        } = &self.base
        else {
            return Ok(None);
        };
        let mut tensors = tensors.clone();
        tensors.remove(PROJECTION);
        let (modules, head) = adapted(encoder, linears, config, tensors)?;
        let mut config = config.clone();
        config.base_model_name_or_path.clone_from(&task.base_model);
        AdapterFolder::from_weights(encoder, config, task, &modules, &head).map(Some)
    }

    /// A copy of the variables' values, and what is frozen of the adapter.
    pub fn snapshot(&self) -> candle_core::Result<BTreeMap<String, Tensor>> {
        let copy = |(name, variable): (&String, &Var)| {
            Ok((name.clone(), variable.as_tensor().copy()?.detach()))
        };
        let constants = self
            .constants
            .iter()
            .map(|(n, t)| Ok((n.clone(), t.clone())));
        self.variables.iter().map(copy).chain(constants).collect()
    }
}

/// Parts tensors into the LoRA of the linears and the head.
fn adapted(
    encoder: &Encoder,
    linears: &[String],
    config: &AdapterConfig,
    mut tensors: BTreeMap<String, Tensor>,
) -> Result<(Vec<LoraModule>, BTreeMap<String, Tensor>), EncoderError> {
    let family = encoder.config().family;
    let mut take = |name: String| match tensors.remove(&name) {
        Some(tensor) => Ok(tensor),
        None => Err(EncoderError::MissingWeight { name }),
    };
    let mut modules = Vec::with_capacity(linears.len());
    for name in linears {
        modules.push(LoraModule {
            a: take(format!("{name}.lora_A.weight"))?,
            b: take(format!("{name}.lora_B.weight"))?,
            scale: config.scale(&family.full_name(name)),
            name: name.clone(),
            magnitude: match config.use_dora {
                true => Some(take(format!("{name}{MAGNITUDE}"))?),
                false => None,
            },
            bias: None,
        });
    }
    Ok((modules, tensors))
}

/// The last components of the linears' names, each once.
fn names_of(linears: &[LinearSpec]) -> String {
    let mut names: Vec<&str> = Vec::new();
    for linear in linears {
        let last = linear.name.rsplit('.').next().unwrap_or(&linear.name);
        if !names.contains(&last) {
            names.push(last);
        }
    }
    names.join(", ")
}

/// Fresh variables; each draws from a stream of its own.
struct Initialiser<'a> {
    seed: u64,
    stream: u64,
    device: &'a Device,
}

impl<'a> Initialiser<'a> {
    fn new(seed: u64, device: &'a Device) -> Self {
        Self {
            seed,
            stream: STREAM,
            device,
        }
    }

    fn draw(
        &mut self,
        shape: &[usize],
        f: impl Fn(&CounterRng, u64) -> f32,
    ) -> candle_core::Result<Var> {
        let rng = CounterRng::new(self.seed, self.stream);
        self.stream += 1;
        let count = shape.iter().product::<usize>() as u64;
        let values: Vec<f32> = (0..count).map(|i| f(&rng, i)).collect();
        Var::from_tensor(&Tensor::from_vec(values, shape, self.device)?)
    }

    fn uniform(&mut self, shape: &[usize], bound: f32) -> candle_core::Result<Var> {
        self.draw(shape, |rng, i| bound * (2.0 * rng.f32_at(i) - 1.0))
    }

    fn normal(&mut self, shape: &[usize]) -> candle_core::Result<Var> {
        self.draw(shape, |rng, i| HEAD_DEVIATION * rng.normal_at(i))
    }

    fn zeros(&mut self, shape: &[usize]) -> candle_core::Result<Var> {
        self.draw(shape, |_, _| 0.0)
    }

    /// A fresh head. A dense linear that came with the encoder (BERT's pooler) is where it starts.
    fn head(
        &mut self,
        config: &EncoderConfig,
        pretrained: Option<&Linear>,
        labels: usize,
    ) -> candle_core::Result<Vec<(String, Var)>> {
        let hidden = config.hidden_size;
        let HeadNames {
            dense, projection, ..
        } = HeadNames::of(config.family);
        let pretrained = pretrained.and_then(|p| Some((&p.weight, p.bias.as_ref()?)));
        let (weight, bias) = match pretrained {
            Some((w, b)) => (
                Var::from_tensor(&w.to_dtype(DType::F32)?)?,
                Var::from_tensor(b)?,
            ),
            None => (self.normal(&[hidden, hidden])?, self.zeros(&[hidden])?),
        };
        Ok(vec![
            (format!("{dense}.weight"), weight),
            (format!("{dense}.bias"), bias),
            (
                format!("{projection}.weight"),
                self.normal(&[labels, hidden])?,
            ),
            (format!("{projection}.bias"), self.zeros(&[labels])?),
        ])
    }
}
