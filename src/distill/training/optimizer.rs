//! AdamW (Loshchilov & Hutter, arXiv 1711.05101) with clipping by the global norm.

use std::collections::BTreeMap;

use candle_core::{Result, Tensor, Var};

use crate::ops::{self, AdamWStep};

const BETA_1: f64 = 0.9;
const BETA_2: f64 = 0.999;
const EPSILON: f64 = 1e-8;

/// First and second moments of one variable, of its shape and where it is.
struct Moments {
    first: Tensor,
    second: Tensor,
}

/// The optimizer's state; moments are f32 and belong to variables by name.
pub struct AdamW {
    weight_decay: f64,
    step: i32,
    moments: BTreeMap<String, Moments>,
}

impl AdamW {
    /// Decay applies to matrices, not to biases and norms.
    pub fn new(weight_decay: f64) -> Self {
        Self {
            weight_decay,
            step: 0,
            moments: BTreeMap::new(),
        }
    }

    /// First and second moments of each variable that has moved.
    pub(super) fn moments(&self) -> impl Iterator<Item = (&str, &Tensor, &Tensor)> {
        self.moments
            .iter()
            .map(|(name, moments)| (name.as_str(), &moments.first, &moments.second))
    }

    /// Goes on after `step` steps with the [moments](Self::moments) of then.
    pub(super) fn resume(
        &mut self,
        step: usize,
        variables: &BTreeMap<String, Var>,
        mut first: BTreeMap<String, Tensor>,
        second: BTreeMap<String, Tensor>,
    ) -> Result<()> {
        self.step = i32::try_from(step).unwrap_or(i32::MAX);
        for (name, second) in second {
            if let (Some(first), Some(variable)) = (first.remove(&name), variables.get(&name)) {
                let here = |moment: Tensor| moment.to_device(variable.device());
                let (first, second) = (here(first)?, here(second)?);
                self.moments.insert(name, Moments { first, second });
            }
        }
        Ok(())
    }

    /// Moves every variable against `scale` times its gradient. A variable without a gradient is
    /// left as it is.
    pub fn step(
        &mut self,
        variables: &BTreeMap<String, Var>,
        gradients: &BTreeMap<String, Tensor>,
        scale: f64,
        learning_rate: f64,
    ) -> Result<()> {
        self.step += 1;
        for (name, variable) in variables {
            let Some(gradient) = gradients.get(name) else {
                continue;
            };
            if !self.moments.contains_key(name) {
                let moments = Moments {
                    first: variable.zeros_like()?,
                    second: variable.zeros_like()?,
                };
                self.moments.insert(name.clone(), moments);
            }
            let Moments { first, second } = &self.moments[name];
            let decay = match variable.rank() {
                0 | 1 => 1.0,
                _ => 1.0 - learning_rate * self.weight_decay,
            };
            let step = AdamWStep {
                scale,
                learning_rate,
                decay,
                beta_1: BETA_1,
                beta_2: BETA_2,
                epsilon: EPSILON,
                bias_1: 1.0 - BETA_1.powi(self.step),
                bias_2: 1.0 - BETA_2.powi(self.step),
            };
            ops::adamw(variable.as_tensor(), gradient, first, second, step)?;
        }
        Ok(())
    }
}

/// What gradients must be multiplied with so that their global norm is at most `max_norm`.
pub fn clip_scale(gradients: &BTreeMap<String, Tensor>, max_norm: f64) -> Result<f64> {
    let norm = ops::sum_squares(gradients.values())?.sqrt();
    Ok(if norm > max_norm {
        max_norm / norm
    } else {
        1.0
    })
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    fn variables(values: &[f32]) -> BTreeMap<String, Var> {
        let tensor = Tensor::new(values, &Device::Cpu).unwrap();
        BTreeMap::from([("w".to_owned(), Var::from_tensor(&tensor).unwrap())])
    }

    fn gradients(values: &[f32]) -> BTreeMap<String, Tensor> {
        let tensor = Tensor::new(values, &Device::Cpu).unwrap();
        BTreeMap::from([("w".to_owned(), tensor)])
    }

    #[test]
    fn three_steps_agree_with_torch() {
        // torch.optim.AdamW([tensor([[1., -2.]])], lr=0.1, weight_decay=0.01), gradients
        // (0.5, -1), (0.25, 0), (-1, 2).
        let tensor = Tensor::new(&[[1f32, -2.0]], &Device::Cpu).unwrap();
        let variables = BTreeMap::from([("w".to_owned(), Var::from_tensor(&tensor).unwrap())]);
        let mut optimizer = AdamW::new(0.01);
        for g in [[0.5, -1.0], [0.25, 0.0], [-1.0, 2.0]] {
            optimizer
                .step(&variables, &gradients(&g), 1.0, 0.1)
                .unwrap();
        }
        let values = variables["w"]
            .flatten_all()
            .unwrap()
            .to_vec1::<f32>()
            .unwrap();
        for (value, expected) in values.iter().zip(TORCH) {
            assert!((value - expected).abs() < 1e-6, "{values:?}");
        }
    }

    /// What torch 2.x gives for the test above.
    const TORCH: [f32; 2] = [0.8247139, -1.8612707];

    #[test]
    fn biases_do_not_decay() {
        let variables = variables(&[1.0]);
        AdamW::new(0.5)
            .step(&variables, &gradients(&[0.0]), 1.0, 0.1)
            .unwrap();
        assert_eq!(variables["w"].to_vec1::<f32>().unwrap(), [1.0]);
    }

    #[test]
    fn clipping_bounds_the_global_norm() {
        let g = gradients(&[3.0, 4.0]);
        assert!((clip_scale(&g, 1.0).unwrap() - 0.2).abs() < 1e-12);
        assert_eq!(clip_scale(&g, 5.0).unwrap(), 1.0);
    }
}
