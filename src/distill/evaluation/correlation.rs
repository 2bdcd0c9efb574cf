//! Pearson's and Spearman's correlation of weighted rows, so that a bootstrap resample is a vector
//! of counts.

/// Values with their order, which no resample changes.
pub(super) struct Ranked {
    pub(super) values: Vec<f64>,
    /// Indexes of `values`, ascending.
    order: Vec<usize>,
}

impl Ranked {
    pub(super) fn new(values: Vec<f64>) -> Self {
        let mut order: Vec<usize> = (0..values.len()).collect();
        order.sort_by(|&a, &b| values[a].total_cmp(&values[b]));
        Self { values, order }
    }

    /// Every row once.
    pub(super) fn unit_weights(rows: usize) -> Vec<u32> {
        vec![1; rows]
    }

    /// The rank of each value where row i occurs `weights[i]` times; ties share the mean of their
    /// ranks.
    fn ranks(&self, weights: &[u32]) -> Vec<f64> {
        let mut ranks = vec![0.0; self.values.len()];
        let mut below = 0.0;
        let mut start = 0;
        while start < self.order.len() {
            let value = self.values[self.order[start]];
            let ties = self.order[start..]
                .iter()
                .take_while(|&&i| self.values[i] == value)
                .count();
            let tied = &self.order[start..start + ties];
            let weight: f64 = tied.iter().map(|&i| f64::from(weights[i])).sum();
            for &i in tied {
                ranks[i] = below + (weight + 1.0) / 2.0;
            }
            below += weight;
            start += ties;
        }
        ranks
    }
}

/// Pearson's correlation; 0 if either side is constant.
pub(super) fn pearson(x: &[f64], y: &[f64], weights: &[u32]) -> f64 {
    let n: f64 = weights.iter().map(|&w| f64::from(w)).sum();
    let mean = |values: &[f64]| {
        let sum: f64 = values
            .iter()
            .zip(weights)
            .map(|(v, &w)| v * f64::from(w))
            .sum();
        sum / n
    };
    let (mean_x, mean_y) = (mean(x), mean(y));
    let (mut xy, mut xx, mut yy) = (0.0, 0.0, 0.0);
    for ((x, y), &w) in x.iter().zip(y).zip(weights) {
        let (dx, dy, w) = (x - mean_x, y - mean_y, f64::from(w));
        xy += w * dx * dy;
        xx += w * dx * dx;
        yy += w * dy * dy;
    }
    // Rounding leaves a constant a variance of about ε² times its square.
    let constant = |square: f64, mean: f64| square <= n * (1e-12 * mean.abs()).powi(2);
    if constant(xx, mean_x) || constant(yy, mean_y) {
        return 0.0;
    }
    (xy / (xx.sqrt() * yy.sqrt())).clamp(-1.0, 1.0)
}

/// Spearman's correlation: Pearson's of the ranks.
pub(super) fn spearman(x: &Ranked, y: &Ranked, weights: &[u32]) -> f64 {
    pearson(&x.ranks(weights), &y.ranks(weights), weights)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ties_share_the_mean_of_their_ranks() {
        let ranked = Ranked::new(vec![3.0, 1.0, 3.0, 2.0]);
        assert_eq!(ranked.ranks(&[1, 1, 1, 1]), [3.5, 1.0, 3.5, 2.0]);
        // The rows 3, 3, 1, 2, 2: ranks 4.5, 4.5, 1, 2.5, 2.5.
        assert_eq!(ranked.ranks(&[2, 1, 0, 2])[..2], [4.5, 1.0]);
        assert_eq!(ranked.ranks(&[2, 1, 0, 2])[3], 2.5);
    }

    #[test]
    fn weights_stand_for_repeated_rows() {
        let (x, y) = (vec![0.1, 2.0, 3.5, 3.5], vec![1.0, 0.0, 2.0, 5.0]);
        let repeat = |v: &[f64]| vec![v[0], v[0], v[0], v[2], v[3], v[3]];
        let (rx, ry) = (repeat(&x), repeat(&y));
        let (weights, ones) = ([3, 0, 1, 2], [1; 6]);
        assert!((pearson(&x, &y, &weights) - pearson(&rx, &ry, &ones)).abs() < 1e-12);
        let weighted = spearman(&Ranked::new(x), &Ranked::new(y), &weights);
        let repeated = spearman(&Ranked::new(rx), &Ranked::new(ry), &ones);
        assert!((weighted - repeated).abs() < 1e-12);
    }

    #[test]
    fn a_constant_correlates_with_nothing() {
        let constant = vec![0.1; 3];
        assert_eq!(pearson(&constant, &[1.0, 2.0, 4.0], &[1, 1, 1]), 0.0);
        assert_eq!(
            spearman(
                &Ranked::new(constant),
                &Ranked::new(vec![1.0, 2.0, 4.0]),
                &[1, 1, 1]
            ),
            0.0
        );
    }
}
