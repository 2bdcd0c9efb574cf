//! Learning rate over the steps of a training.

/// Rises linearly over the first `warmup_ratio` of the steps, then falls linearly to 0.
///
/// `step` counts from 0; the first step already moves.
pub fn learning_rate(peak: f64, step: usize, steps: usize, warmup_ratio: f64) -> f64 {
    let warmup = (steps as f64 * warmup_ratio).ceil().max(1.0);
    let at = step as f64 + 1.0;
    if at <= warmup {
        return peak * at / warmup;
    }
    let left = steps as f64 - step as f64;
    peak * left / (steps as f64 - warmup + 1.0).max(1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rises_to_the_peak_and_falls_to_nearly_nothing() {
        let rates: Vec<f64> = (0..100).map(|s| learning_rate(1.0, s, 100, 0.1)).collect();
        assert!((rates[0] - 0.1).abs() < 1e-12);
        assert!((rates[9] - 1.0).abs() < 1e-12);
        assert!(rates[..10].windows(2).all(|w| w[0] < w[1]));
        assert!(rates[9..].windows(2).all(|w| w[0] > w[1]));
        assert!(rates[99] > 0.0 && rates[99] < 0.02);
    }

    #[test]
    fn a_single_step_has_the_whole_rate() {
        assert_eq!(learning_rate(0.5, 0, 1, 0.06), 0.5);
    }
}
