//! The interval of a score: percentiles over resamples of the rows.

use crate::distill::rng::CounterRng;

const RESAMPLES: usize = 1_000;
/// Streams of the generator, apart from those of other uses.
const STREAM: u64 = 0xb007_0000;

/// 2.5 % and 97.5 % percentiles of `score` over resamples of `rows` rows, which it gets as how
/// often each row was drawn.
pub(super) fn interval(rows: usize, seed: u64, score: impl Fn(&[u32]) -> f64) -> (f64, f64) {
    let mut scores: Vec<f64> = (0..RESAMPLES as u64)
        .map(|resample| {
            let rng = CounterRng::new(seed, STREAM + resample);
            let mut drawn = vec![0u32; rows];
            (0..rows as u64).for_each(|i| drawn[rng.below_at(i, rows)] += 1);
            score(&drawn)
        })
        .collect();
    scores.sort_by(f64::total_cmp);
    (percentile(&scores, 0.025), percentile(&scores, 0.975))
}

/// Linear between the two nearest of the sorted values.
fn percentile(sorted: &[f64], share: f64) -> f64 {
    let place = share * (sorted.len() - 1) as f64;
    let (low, high) = (
        sorted[place.floor() as usize],
        sorted[place.ceil() as usize],
    );
    low + (high - low) * place.fract()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interval_of_a_share_is_about_that_of_the_normal_approximation() {
        // 80 of 100 rows right: 0.8 ± 1.96 · √(0.8 · 0.2 / 100) = 0.8 ± 0.078.
        let right = |drawn: &[u32]| f64::from(drawn[..80].iter().sum::<u32>()) / 100.0;
        let (low, high) = interval(100, 1, right);
        assert!((low - 0.722).abs() < 0.015, "{low}");
        assert!((high - 0.878).abs() < 0.015, "{high}");
        assert_eq!((low, high), interval(100, 1, right));
        assert_ne!((low, high), interval(100, 2, |drawn| right(drawn) + 1e-9));
    }

    #[test]
    fn every_resample_has_as_many_rows_as_the_whole() {
        let (low, high) = interval(37, 5, |drawn| f64::from(drawn.iter().sum::<u32>()));
        assert_eq!((low, high), (37.0, 37.0));
    }

    #[test]
    fn percentiles_are_linear_between_values() {
        assert_eq!(percentile(&[1.0, 2.0, 4.0], 0.75), 3.0);
        assert_eq!(percentile(&[7.0], 0.975), 7.0);
    }
}
