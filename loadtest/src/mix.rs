//! Choices with odds.

use rand::Rng;

/// Things of which one is chosen with a probability proportional to its weight.
#[derive(Clone, Debug)]
pub(crate) struct Mix {
    /// Sum of the weights up to and including each.
    bounds: Vec<f64>,
}

impl Mix {
    /// Weights above 0, at least one.
    pub(crate) fn new(weights: impl IntoIterator<Item = f64>) -> Self {
        let mut sum = 0.0;
        let bounds: Vec<f64> = weights
            .into_iter()
            .map(|weight| {
                sum += weight;
                sum
            })
            .collect();
        assert!(!bounds.is_empty(), "a mix of nothing");
        Self { bounds }
    }

    /// Index of the chosen one.
    pub(crate) fn choose(&self, random: &mut impl Rng) -> usize {
        let last = self.bounds.len() - 1;
        let point = random.random::<f64>() * self.bounds[last];
        self.bounds
            .partition_point(|bound| *bound <= point)
            .min(last)
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    use super::*;

    #[test]
    fn choices_follow_the_weights() {
        let mix = Mix::new([1.0, 6.0, 3.0]);
        let mut random = ChaCha8Rng::seed_from_u64(5);
        let mut counts = [0_u32; 3];
        for _ in 0..100_000 {
            counts[mix.choose(&mut random)] += 1;
        }
        // Four standard deviations of a binomial are 620 at most.
        for (count, expected) in counts.into_iter().zip([10_000, 60_000, 30_000]) {
            assert!(count.abs_diff(expected) < 620, "{counts:?}");
        }
    }
}
