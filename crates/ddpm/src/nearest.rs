//! Memorization check: the training images nearest to samples, compared with how near training images are to each other.
//!
//! Networks memorize small data sets (Carlini et al., "Extracting Training Data from Diffusion Models", 2023). Samples of a
//! network that generalizes are about as far from the training images as those are from each other; samples of one that
//! memorized them are nearer.

use crate::data::{AugmentKey, Dataset};
use crate::error::Result;
use rayon::prelude::*;

/// Training images read at once.
const BLOCK: usize = 256;

/// The nearest training image.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Nearest {
    /// Its index in the data set.
    pub index: usize,
    /// Whether the left-right mirrored query is nearest.
    pub mirrored: bool,
    /// Root mean square difference of the values, relative to their range: 0 for equal images, 1 for black against white.
    pub distance: f64,
}

/// An image to search for.
struct Query {
    values: Vec<f32>,
    /// Index in the data set to skip: the image itself.
    exclude: Option<usize>,
    mirrored: bool,
}

/// Finds the nearest training image of each sample, given in the network's range [-1, 1]; with `mirror`, the mirrored
/// samples are searched for too. `on_block` receives the number of training images processed, and their total.
///
/// # Errors
/// As [`Dataset::read`], and errors of `on_block`.
///
/// # Panics
/// If a sample does not have the size of the training images.
pub fn nearest(
    data: &dyn Dataset,
    samples: &[Vec<f32>],
    mirror: bool,
    on_block: &mut dyn FnMut(usize, usize) -> Result<()>,
) -> Result<Vec<Nearest>> {
    let images = samples.iter().map(|values| (values.clone(), None)).collect();
    search(data, images, mirror, on_block)
}

/// For at most `count` evenly spaced training images, finds the nearest other one.
///
/// # Errors
/// As [`nearest`].
pub fn within_dataset(
    data: &dyn Dataset,
    count: usize,
    mirror: bool,
    on_block: &mut dyn FnMut(usize, usize) -> Result<()>,
) -> Result<Vec<Nearest>> {
    if data.len() < 2 {
        return Ok(Vec::new());
    }
    let count = count.min(data.len());
    let mut images = Vec::with_capacity(count);
    for i in (0..count).map(|i| i * data.len() / count) {
        let mut values = vec![0.0; data.shape().num_elements()];
        data.read(i, AugmentKey::default(), &mut values)?;
        images.push((values, Some(i)));
    }
    search(data, images, mirror, on_block)
}

fn search(
    data: &dyn Dataset,
    images: Vec<(Vec<f32>, Option<usize>)>,
    mirror: bool,
    on_block: &mut dyn FnMut(usize, usize) -> Result<()>,
) -> Result<Vec<Nearest>> {
    let (shape, len) = (data.shape(), data.shape().num_elements());
    let per_image = if mirror { 2 } else { 1 };
    let mut queries = Vec::with_capacity(per_image * images.len());
    for (values, exclude) in images {
        assert_eq!(values.len(), len, "a sample of another shape");
        if mirror {
            let rows = values.chunks(shape.width * shape.channels);
            let mirrored = rows.flat_map(|row| row.chunks(shape.channels).rev().flatten().copied()).collect();
            queries.push(Query { values: mirrored, exclude, mirrored: true });
        }
        queries.push(Query { values, exclude, mirrored: false });
    }
    let mut best = vec![(usize::MAX, f64::INFINITY); queries.len()];
    let mut block = vec![0.0; BLOCK.min(data.len()) * len];
    for first in (0..data.len()).step_by(BLOCK) {
        let count = BLOCK.min(data.len() - first);
        for (i, out) in block.chunks_mut(len).take(count).enumerate() {
            data.read(first + i, AugmentKey::default(), out)?;
        }
        best.par_iter_mut().zip(&queries).for_each(|(best, query)| {
            for (i, image) in block.chunks(len).take(count).enumerate() {
                let squared = squared_distance(&query.values, image);
                if squared < best.1 && query.exclude != Some(first + i) {
                    *best = (first + i, squared);
                }
            }
        });
        on_block(first + count, data.len())?;
    }
    let found = queries.iter().zip(best).map(|(query, (index, squared))| {
        // Half, because the range has length 2.
        Nearest { index, mirrored: query.mirrored, distance: 0.5 * (squared / len as f64).sqrt() }
    });
    let found: Vec<Nearest> = found.collect();
    let nearer = |both: &[Nearest]| both.iter().copied().min_by(|a, b| a.distance.total_cmp(&b.distance));
    Ok(found.chunks(per_image).filter_map(nearer).collect())
}

/// Sum of squared differences: runs of 64 are summed in f32, and their sums in f64.
fn squared_distance(a: &[f32], b: &[f32]) -> f64 {
    let runs = a.chunks(64).zip(b.chunks(64));
    runs.map(|(a, b)| f64::from(a.iter().zip(b).map(|(a, b)| (a - b) * (a - b)).sum::<f32>())).sum()
}

/// The `q` quantile of the distances.
///
/// # Panics
/// If `all` is empty.
pub fn quantile(all: &[Nearest], q: f64) -> f64 {
    let mut distances: Vec<f64> = all.iter().map(|n| n.distance).collect();
    distances.sort_unstable_by(f64::total_cmp);
    distances[((q * distances.len() as f64) as usize).min(distances.len() - 1)]
}

/// Minimum number of samples, and of reference images, for a verdict.
pub const MIN_SAMPLES: usize = 20;
/// Samples below this quantile of the distances between training images are suspiciously near.
const NEAR_QUANTILE: f64 = 0.01;
/// Significance level: memorization is reported if the p-value is below this.
const SIGNIFICANCE: f64 = 1e-3;
/// Upper confidence bound on the share of near samples below which there is no evidence of memorization.
const MAX_COPIED_SHARE: f64 = 0.1;

/// What the distances imply about memorization.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Verdict {
    /// Fewer than [`MIN_SAMPLES`] samples or reference images.
    TooFew,
    /// Significantly more samples are near than by chance: the network memorized training images.
    Memorized,
    /// No more than by chance; at 95 % confidence, at most this share of all samples is near.
    NoEvidence(f64),
    /// Neither significant nor excluded; at 95 % confidence, the share of near samples is in this interval.
    Inconclusive(f64, f64),
}

/// How many samples are suspiciously near the training images, and the verdict.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Assessment {
    /// Samples nearer to the training images than the first percentile of the reference distances, or than their minimum if
    /// there are fewer than a hundred.
    pub near: usize,
    /// Number of samples.
    pub samples: usize,
    /// Number of reference images: training images without an exact duplicate whose distances were measured.
    pub reference: usize,
    /// The verdict.
    pub verdict: Verdict,
}

/// Compares the distances of samples with `reference`, those between training images. Exact duplicates among the latter are
/// ignored, as nothing can be nearer.
///
/// Without memorization, samples follow the data's distribution, so all orderings of the samples' and the reference
/// distances are equally likely. The number of n samples below the j-th of N reference distances then has a negative
/// hypergeometric distribution. The interval for the share of near samples is that of Clopper and Pearson (1934).
pub fn assess(found: &[Nearest], reference: &[Nearest]) -> Assessment {
    let mut distances: Vec<f64> = reference.iter().map(|n| n.distance).filter(|d| *d > 0.0).collect();
    distances.sort_unstable_by(f64::total_cmp);
    let rank = (NEAR_QUANTILE * distances.len() as f64) as usize;
    let near = distances.get(rank).map_or(0, |limit| found.iter().filter(|n| n.distance < *limit).count());
    let (n, reference) = (found.len(), distances.len());
    let interval = (clopper_pearson_upper(n - near, n), clopper_pearson_upper(near, n));
    let verdict = match () {
        () if n < MIN_SAMPLES || reference < MIN_SAMPLES => Verdict::TooFew,
        () if prob_at_least_before(near, n, rank + 1, reference) < SIGNIFICANCE => Verdict::Memorized,
        () if interval.1 <= MAX_COPIED_SHARE => Verdict::NoEvidence(interval.1),
        () => Verdict::Inconclusive(1.0 - interval.0, interval.1),
    };
    Assessment { near, samples: n, reference, verdict }
}

/// The logarithm of the binomial coefficient n over k.
fn ln_choose(n: usize, k: usize) -> f64 {
    let ln_factorial = |n: usize| libm::lgamma(n as f64 + 1.0);
    ln_factorial(n) - ln_factorial(k) - ln_factorial(n - k)
}

/// The probability that in a random ordering at least `k` of `n` samples precede the `j`-th of `reference` values:
/// that at most j - 1 of the first k + j - 1 are reference values.
fn prob_at_least_before(k: usize, n: usize, j: usize, reference: usize) -> f64 {
    let first = k + j - 1;
    if first > n + reference {
        return 0.0;
    }
    let all = ln_choose(n + reference, first);
    let of = |i: usize| match first.checked_sub(i) {
        Some(rest) if i <= reference && rest <= n => {
            (ln_choose(reference, i) + ln_choose(n, rest) - all).exp()
        }
        _ => 0.0,
    };
    (0..j).map(of).sum()
}

/// Upper end of the 95 % Clopper-Pearson interval of a probability, after `k` successes in `n` trials.
fn clopper_pearson_upper(k: usize, n: usize) -> f64 {
    if k >= n {
        return 1.0;
    }
    let at_most = |p: f64| -> f64 {
        let of = |i: usize| (ln_choose(n, i) + i as f64 * p.ln() + (n - i) as f64 * (-p).ln_1p()).exp();
        (0..=k).map(of).sum()
    };
    let (mut low, mut high) = (0.0, 1.0);
    for _ in 0..60 {
        let middle = 0.5 * (low + high);
        if at_most(middle) > 0.025 { low = middle } else { high = middle }
    }
    0.5 * (low + high)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::digits::Digits;

    #[test]
    fn probabilities_match_known_values() {
        // Three of three before the first of one: 1 of 4 orders. One of two before the first of two: half of the orders.
        assert!((prob_at_least_before(3, 3, 1, 1) - 0.25).abs() < 1e-12);
        assert!((prob_at_least_before(1, 2, 1, 2) - 0.5).abs() < 1e-12);
        assert!((prob_at_least_before(0, 5, 3, 9) - 1.0).abs() < 1e-12);
        assert_eq!(prob_at_least_before(5, 4, 1, 3), 0.0);
        // Clopper and Pearson, computed from exact sums of the binomial distribution.
        for (k, n, end) in
            [(0, 20, 0.168_433_5), (0, 64, 0.056_009_1), (1, 3, 0.905_700_7), (5, 10, 0.812_913_8)]
        {
            assert!(
                (clopper_pearson_upper(k, n) - end).abs() < 1e-6,
                "{k} of {n}: {}",
                clopper_pearson_upper(k, n)
            );
        }
        assert_eq!(clopper_pearson_upper(3, 3), 1.0);
    }

    #[test]
    fn memorization_is_reported_only_with_enough_samples() {
        let at = |distance| Nearest { index: 0, mirrored: false, distance };
        let own = |n: u32| (0..n).map(|i| at(0.1 + f64::from(i) * 1e-4)).collect::<Vec<_>>();
        let copies = |k: u32, n: u32| (0..n).map(|i| at(if i < k { 0.01 } else { 0.3 })).collect::<Vec<_>>();
        let verdict = |k, n, of| assess(&copies(k, n), &own(of)).verdict;
        // Too few samples, or too few training images.
        assert_eq!(verdict(2, 3, 1000), Verdict::TooFew);
        assert_eq!(verdict(64, 64, 3), Verdict::TooFew);
        assert_eq!(verdict(64, 64, 19), Verdict::TooFew);
        assert_eq!(verdict(64, 64, 20), Verdict::Memorized);
        assert_eq!(verdict(20, 20, 1000), Verdict::Memorized);
        assert!(matches!(verdict(0, 64, 1000), Verdict::NoEvidence(most) if (0.05..0.06).contains(&most)));
        assert!(matches!(verdict(1, 64, 1000), Verdict::NoEvidence(_)));
        assert!(matches!(verdict(1, 20, 1000), Verdict::Inconclusive(low, high) if low < 0.01 && high > 0.2));
        assert!(matches!(verdict(3, 64, 1000), Verdict::Inconclusive(..)));
        assert_eq!(verdict(10, 64, 1000), Verdict::Memorized);
        assert_eq!(verdict(0, 0, 0), Verdict::TooFew);
        // Exact duplicates among the training images are ignored.
        let twice: Vec<_> = own(40).into_iter().chain((0..400).map(|_| at(0.0))).collect();
        assert_eq!(
            assess(&copies(30, 64), &twice),
            Assessment { near: 30, samples: 64, reference: 40, verdict: Verdict::Memorized }
        );
    }

    #[test]
    fn copies_are_found_and_new_samples_are_as_far_as_training_images_from_each_other() {
        let data = Digits::new(0, 16, 600).unwrap();
        let read = |data: &Digits, i| {
            let mut values = vec![0.0; data.shape().num_elements()];
            data.read(i, AugmentKey::default(), &mut values).unwrap();
            values
        };
        let mut seen = Vec::new();
        let copies: Vec<Vec<f32>> = [3, 299, 599].into_iter().map(|i| read(&data, i)).collect();
        let found = nearest(&data, &copies, false, &mut |done, all| {
            seen.push((done, all));
            Ok(())
        });
        let found = found.unwrap();
        assert_eq!(seen, [(256, 600), (512, 600), (600, 600)]);
        assert_eq!(
            found.iter().map(|n| (n.index, n.distance)).collect::<Vec<_>>(),
            [(3, 0.0), (299, 0.0), (599, 0.0)]
        );

        // Other digits of the same distribution are as far away as these are from each other: medians of 200 each.
        let others = Digits::new(1, 16, 200).unwrap();
        let samples: Vec<Vec<f32>> = (0..200).map(|i| read(&others, i)).collect();
        let samples = nearest(&data, &samples, false, &mut |_, _| Ok(())).unwrap();
        let own = within_dataset(&data, 200, false, &mut |_, _| Ok(())).unwrap();
        assert_eq!((samples.len(), own.len()), (200, 200));
        let (a, b) = (quantile(&samples, 0.5), quantile(&own, 0.5));
        assert!(a > 0.02 && (a / b - 1.0).abs() < 0.1, "{a}, {b}");
        assert!(nearest(&data, &copies, false, &mut |_, _| Err(crate::Error::Interrupted)).is_err());
    }

    #[test]
    fn mirrored_copies_are_found_and_flagged() {
        let data = Digits::new(0, 16, 50).unwrap();
        let mut values = vec![0.0; 256];
        data.read(7, AugmentKey::default(), &mut values).unwrap();
        let mirrored: Vec<f32> = values.chunks(16).flat_map(|row| row.iter().rev().copied()).collect();
        let search =
            |mirror| nearest(&data, std::slice::from_ref(&mirrored), mirror, &mut |_, _| Ok(())).unwrap()[0];
        assert_eq!(search(true), Nearest { index: 7, mirrored: true, distance: 0.0 });
        assert!(search(false).distance > 0.0);
        assert!(
            within_dataset(&Digits::new(0, 16, 1).unwrap(), 10, false, &mut |_, _| Ok(()))
                .unwrap()
                .is_empty()
        );
    }
}
