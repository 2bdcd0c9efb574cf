//! AdamW (Loshchilov & Hutter, arXiv 1711.05101) with clipping by the global norm.

use std::collections::BTreeMap;

use candle_core::{Result, Tensor, Var};

const BETA_1: f64 = 0.9;
const BETA_2: f64 = 0.999;
const EPSILON: f64 = 1e-8;

/// First and second moments of one variable.
#[derive(Default)]
struct Moments {
    first: Vec<f32>,
    second: Vec<f32>,
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
    pub(super) fn moments(&self) -> impl Iterator<Item = (&str, &[f32], &[f32])> {
        self.moments.iter().map(|(name, moments)| {
            let Moments { first, second } = moments;
            (name.as_str(), first.as_slice(), second.as_slice())
        })
    }

    /// Goes on after `step` steps with the [moments](Self::moments) of then.
    pub(super) fn resume(
        &mut self,
        step: usize,
        mut first: BTreeMap<String, Vec<f32>>,
        second: BTreeMap<String, Vec<f32>>,
    ) {
        self.step = i32::try_from(step).unwrap_or(i32::MAX);
        self.moments = second
            .into_iter()
            .filter_map(|(name, second)| {
                let first = first.remove(&name)?;
                Some((name, Moments { first, second }))
            })
            .collect();
    }

    /// Moves every variable against `scale` times its gradient. A variable without a gradient is
    /// left as it is.
    pub fn step(
        &mut self,
        variables: &BTreeMap<String, Var>,
        gradients: &BTreeMap<String, Vec<f32>>,
        scale: f64,
        learning_rate: f64,
    ) -> Result<()> {
        self.step += 1;
        let bias_1 = 1.0 - BETA_1.powi(self.step);
        let bias_2 = 1.0 - BETA_2.powi(self.step);
        for (name, variable) in variables {
            let Some(gradient) = gradients.get(name) else {
                continue;
            };
            let decay = if variable.dims().len() > 1 {
                1.0 - learning_rate * self.weight_decay
            } else {
                1.0
            };
            let moments = self.moments.entry(name.clone()).or_default();
            moments.first.resize(gradient.len(), 0.0);
            moments.second.resize(gradient.len(), 0.0);
            let mut values = variable.flatten_all()?.to_vec1::<f32>()?;
            let rate = (learning_rate / bias_1) as f32;
            let root = (1.0 / bias_2) as f32;
            for (i, value) in values.iter_mut().enumerate() {
                let g = gradient[i] * scale as f32;
                let first = &mut moments.first[i];
                let second = &mut moments.second[i];
                *first = BETA_1 as f32 * *first + (1.0 - BETA_1) as f32 * g;
                *second = BETA_2 as f32 * *second + (1.0 - BETA_2) as f32 * g * g;
                let step = rate * *first / ((*second * root).sqrt() + EPSILON as f32);
                *value = *value * decay as f32 - step;
            }
            variable.set(&Tensor::from_vec(
                values,
                variable.dims(),
                variable.device(),
            )?)?;
        }
        Ok(())
    }
}

/// What gradients must be multiplied with so that their global norm is at most `max_norm`.
pub fn clip_scale(gradients: &BTreeMap<String, Vec<f32>>, max_norm: f64) -> f64 {
    let squares = gradients.values().flatten().map(|g| f64::from(*g).powi(2));
    let norm = squares.sum::<f64>().sqrt();
    if norm > max_norm {
        max_norm / norm
    } else {
        1.0
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    fn variables(values: &[f32]) -> BTreeMap<String, Var> {
        let tensor = Tensor::new(values, &Device::Cpu).unwrap();
        BTreeMap::from([("w".to_owned(), Var::from_tensor(&tensor).unwrap())])
    }

    fn gradients(values: &[f32]) -> BTreeMap<String, Vec<f32>> {
        BTreeMap::from([("w".to_owned(), values.to_vec())])
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
        let g = BTreeMap::from([("a".to_owned(), vec![3.0]), ("b".to_owned(), vec![4.0])]);
        assert!((clip_scale(&g, 1.0) - 0.2).abs() < 1e-12);
        assert_eq!(clip_scale(&g, 5.0), 1.0);
    }
}
