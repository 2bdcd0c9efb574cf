//! A generator without state: each number is a function of seed, stream and index, so that
//! initialisation, shuffling and dropout come out the same on any number of threads and after a
//! restart.

/// The increment and the finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// Random numbers by index. Give each use its own stream, for instance one an epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CounterRng {
    key: u64,
}

impl CounterRng {
    pub fn new(seed: u64, stream: u64) -> Self {
        let seeded = mix(seed.wrapping_add(GOLDEN));
        Self {
            key: mix(seeded ^ mix(stream.wrapping_add(GOLDEN.rotate_left(32)))),
        }
    }

    /// Uniform over all 64-bit numbers.
    pub fn u64_at(&self, index: u64) -> u64 {
        mix(self
            .key
            .wrapping_add(index.wrapping_add(1).wrapping_mul(GOLDEN)))
    }

    /// Uniform in [0, 1), in steps of 2⁻²⁴.
    pub fn f32_at(&self, index: u64) -> f32 {
        (self.u64_at(index) >> 40) as f32 / (1u64 << 24) as f32
    }

    /// Uniform in [0, 1), in steps of 2⁻⁵³.
    pub fn f64_at(&self, index: u64) -> f64 {
        (self.u64_at(index) >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Uniform in `0..bound`; `bound` must not be 0. The bias is below `bound` / 2⁶⁴.
    pub fn below_at(&self, index: u64, bound: usize) -> usize {
        ((u128::from(self.u64_at(index)) * bound as u128) >> 64) as usize
    }

    /// Standard normal (Box and Muller), from the uniform numbers `2 index` and `2 index + 1`.
    pub fn normal_at(&self, index: u64) -> f32 {
        let first = index.wrapping_mul(2);
        let radius = (-2.0 * (1.0 - self.f64_at(first)).ln()).sqrt();
        let angle = std::f64::consts::TAU * self.f64_at(first.wrapping_add(1));
        (radius * angle.cos()) as f32
    }

    /// Puts `items` in random order (Fisher and Yates), from the numbers `1..items.len()`.
    pub fn shuffle<T>(&self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below_at(last as u64, last + 1));
        }
    }
}

fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_numbers_depend_on_seed_stream_and_index_alone() {
        let rng = CounterRng::new(42, 7);
        assert_eq!(rng.u64_at(3), CounterRng::new(42, 7).u64_at(3));
        assert_ne!(rng.u64_at(3), rng.u64_at(4));
        assert_ne!(rng.u64_at(3), CounterRng::new(42, 8).u64_at(3));
        assert_ne!(rng.u64_at(3), CounterRng::new(43, 7).u64_at(3));
        assert_ne!(
            CounterRng::new(1, 2).u64_at(0),
            CounterRng::new(2, 1).u64_at(0)
        );
    }

    #[test]
    fn the_sequence_is_splitmix64_from_the_key() {
        // SplitMix64 seeded with 0 begins with this number (the reference in C by Vigna).
        let rng = CounterRng { key: 0 };
        assert_eq!(rng.u64_at(0), 0xe220_a839_7b1d_cdaf);
    }

    #[test]
    fn uniform_numbers_fill_the_unit_interval_evenly() {
        let rng = CounterRng::new(1, 1);
        let mut bins = [0usize; 10];
        for i in 0..100_000 {
            let x = rng.f32_at(i);
            assert!((0.0..1.0).contains(&x));
            bins[(x * 10.0) as usize] += 1;
        }
        // Six standard deviations of a binomial count with n = 100,000 and p = 0.1 are 570.
        assert!(
            bins.iter().all(|&n| n.abs_diff(10_000) < 570),
            "uneven: {bins:?}"
        );
    }

    #[test]
    fn normal_numbers_have_mean_zero_and_variance_one() {
        let rng = CounterRng::new(5, 0);
        let n = 100_000u64;
        let sample: Vec<f64> = (0..n).map(|i| f64::from(rng.normal_at(i))).collect();
        let mean = sample.iter().sum::<f64>() / n as f64;
        let variance = sample.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n as f64;
        assert!(mean.abs() < 0.02, "mean {mean}");
        assert!((variance - 1.0).abs() < 0.03, "variance {variance}");
    }

    #[test]
    fn a_shuffle_is_a_permutation_and_every_item_reaches_every_place() {
        let mut seen = [[0usize; 4]; 4];
        for stream in 0..4_000 {
            let mut items = [0, 1, 2, 3];
            CounterRng::new(9, stream).shuffle(&mut items);
            let mut sorted = items;
            sorted.sort_unstable();
            assert_eq!(sorted, [0, 1, 2, 3]);
            for (place, &item) in items.iter().enumerate() {
                seen[place][item] += 1;
            }
        }
        // Six standard deviations around 1,000 are 164.
        assert!(
            seen.iter().flatten().all(|&n| n.abs_diff(1_000) < 164),
            "uneven: {seen:?}"
        );
    }
}
