//! Whether samples are copies: the nearest images of the data, and how near the data's own are to one another.
//!
//! Small sets get learnt by heart (Carlini et al., "Extracting Training Data from Diffusion Models", 2023). A network that has
//! learnt what images look like draws some that are about as far from the data as the data's images are from one
//! another; one that has learnt the images draws nearer ones.

use crate::data::{Dataset, Draw};
use crate::error::Result;
use rayon::prelude::*;

/// Images of the data that are read at once.
const BLOCK: usize = 256;

/// The nearest of the data's images.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Nearest {
    /// Its number in the data.
    pub index: usize,
    /// Whether it is nearest when mirrored left to right.
    pub mirrored: bool,
    /// The root of the mean squared difference of the numbers, as a part of their range: 0 is the same, 1 black for white.
    pub distance: f64,
}

/// What is looked for.
struct Query {
    numbers: Vec<f32>,
    /// The number in the data that is not looked at: the image's own.
    own: Option<usize>,
    mirrored: bool,
}

/// The nearest image of the data for each sample, given in the network's range, [-1, 1]; with `mirror` the mirrored samples
/// are looked for too. `on_block` sees how many images of the data are done, of how many.
///
/// # Errors
/// As [`Dataset::read`], and what `on_block` gives.
///
/// # Panics
/// If a sample has not as many numbers as the data's images.
pub fn nearest(
    data: &dyn Dataset,
    samples: &[Vec<f32>],
    mirror: bool,
    on_block: &mut dyn FnMut(usize, usize) -> Result<()>,
) -> Result<Vec<Nearest>> {
    let sought = samples.iter().map(|numbers| (numbers.clone(), None)).collect();
    search(data, sought, mirror, on_block)
}

/// For at most `count` images of the data, evenly spread, the nearest other one.
///
/// # Errors
/// As [`nearest`].
pub fn among(
    data: &dyn Dataset,
    count: usize,
    mirror: bool,
    on_block: &mut dyn FnMut(usize, usize) -> Result<()>,
) -> Result<Vec<Nearest>> {
    if data.len() < 2 {
        return Ok(Vec::new());
    }
    let count = count.min(data.len());
    let mut sought = Vec::with_capacity(count);
    for i in (0..count).map(|i| i * data.len() / count) {
        let mut numbers = vec![0.0; data.shape().values()];
        data.read(i, Draw::default(), &mut numbers)?;
        sought.push((numbers, Some(i)));
    }
    search(data, sought, mirror, on_block)
}

fn search(
    data: &dyn Dataset,
    wanted: Vec<(Vec<f32>, Option<usize>)>,
    mirror: bool,
    on_block: &mut dyn FnMut(usize, usize) -> Result<()>,
) -> Result<Vec<Nearest>> {
    let (shape, values) = (data.shape(), data.shape().values());
    let ways = if mirror { 2 } else { 1 };
    let mut sought = Vec::with_capacity(ways * wanted.len());
    for (numbers, own) in wanted {
        assert_eq!(numbers.len(), values, "a sample of another shape");
        if mirror {
            let rows = numbers.chunks(shape.width * shape.channels);
            let mirrored = rows.flat_map(|row| row.chunks(shape.channels).rev().flatten().copied()).collect();
            sought.push(Query { numbers: mirrored, own, mirrored: true });
        }
        sought.push(Query { numbers, own, mirrored: false });
    }
    let mut best = vec![(usize::MAX, f64::INFINITY); sought.len()];
    let mut block = vec![0.0; BLOCK.min(data.len()) * values];
    for first in (0..data.len()).step_by(BLOCK) {
        let here = BLOCK.min(data.len() - first);
        for (i, out) in block.chunks_mut(values).take(here).enumerate() {
            data.read(first + i, Draw::default(), out)?;
        }
        best.par_iter_mut().zip(&sought).for_each(|(best, sought)| {
            for (i, image) in block.chunks(values).take(here).enumerate() {
                let far = squares(&sought.numbers, image);
                if far < best.1 && sought.own != Some(first + i) {
                    *best = (first + i, far);
                }
            }
        });
        on_block(first + here, data.len())?;
    }
    let found = sought.iter().zip(best).map(|(sought, (index, far))| {
        // Half, because the range is 2.
        Nearest { index, mirrored: sought.mirrored, distance: 0.5 * (far / values as f64).sqrt() }
    });
    let found: Vec<Nearest> = found.collect();
    let nearer = |both: &[Nearest]| both.iter().copied().min_by(|a, b| a.distance.total_cmp(&b.distance));
    Ok(found.chunks(ways).filter_map(nearer).collect())
}

/// The sum of the squared differences, in f64 from runs of 64.
fn squares(a: &[f32], b: &[f32]) -> f64 {
    let runs = a.chunks(64).zip(b.chunks(64));
    runs.map(|(a, b)| f64::from(a.iter().zip(b).map(|(a, b)| (a - b) * (a - b)).sum::<f32>())).sum()
}

/// The distance that a part of all are below.
///
/// # Panics
/// If there are none.
pub fn quantile(all: &[Nearest], part: f64) -> f64 {
    let mut distances: Vec<f64> = all.iter().map(|n| n.distance).collect();
    distances.sort_unstable_by(f64::total_cmp);
    distances[((part * distances.len() as f64) as usize).min(distances.len() - 1)]
}

/// Fewest samples, and fewest images of the data that are measured by, that a verdict is given of.
pub const LEAST: usize = 20;
/// Part of the data's images that is nearer to another than the rest; samples nearer than they are suspicious.
const NEAR: f64 = 0.01;
/// How improbable it must be that as many samples are near by chance.
const IMPROBABLE: f64 = 1e-3;
/// No more than this part of the samples may be copies where it is said that there is no sign of it.
const FEW: f64 = 0.1;

/// What the distances say of copying.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Verdict {
    /// There are fewer than [`LEAST`] samples, or images to measure by.
    TooFew,
    /// More samples are near than chance brings about: the network copies.
    Copies,
    /// No more than by chance, and at most this part of all samples is near, at 95 %.
    Chance(f64),
    /// Too many for chance to be sure, too few to tell: this part of all samples is near, at 95 %.
    Open(f64, f64),
}

/// How many samples are suspiciously near to the data, and what follows.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Judged {
    /// Samples that are nearer to the data than the data's own nearest images to one another: below their hundredth part,
    /// or the least distance of fewer than a hundred.
    pub near: usize,
    /// Samples in all.
    pub samples: usize,
    /// Images of the data that were measured by, which have no exact duplicate.
    pub own: usize,
    /// What follows.
    pub verdict: Verdict,
}

/// Judges the distances of samples by those of the data's own images; exact duplicates among these are left out, as nothing is
/// nearer than they are.
///
/// A network that does not copy draws as the data was drawn: then the samples' distances and the data's own stand in any order with
/// equal probability, and how many of n samples come before the j-th of N own is a negative hypergeometric number. The part of all
/// samples that is near has Clopper and Pearson's interval (1934).
pub fn judge(found: &[Nearest], own: &[Nearest]) -> Judged {
    let mut apart: Vec<f64> = own.iter().map(|n| n.distance).filter(|d| *d > 0.0).collect();
    apart.sort_unstable_by(f64::total_cmp);
    let rank = (NEAR * apart.len() as f64) as usize;
    let near = apart.get(rank).map_or(0, |limit| found.iter().filter(|n| n.distance < *limit).count());
    let (n, own) = (found.len(), apart.len());
    let interval = (binomial_end(n - near, n), binomial_end(near, n));
    let verdict = match () {
        () if n < LEAST || own < LEAST => Verdict::TooFew,
        () if at_least_before(near, n, rank + 1, own) < IMPROBABLE => Verdict::Copies,
        () if interval.1 <= FEW => Verdict::Chance(interval.1),
        () => Verdict::Open(1.0 - interval.0, interval.1),
    };
    Judged { near, samples: n, own, verdict }
}

/// The logarithm of n over k.
fn ln_choose(n: usize, k: usize) -> f64 {
    let ln_factorial = |n: usize| libm::lgamma(n as f64 + 1.0);
    ln_factorial(n) - ln_factorial(k) - ln_factorial(n - k)
}

/// The probability that at least `k` of `n` come before the `j`-th of `own`, all orders being alike: that of the first k + j - 1 at
/// most j - 1 are of `own`.
fn at_least_before(k: usize, n: usize, j: usize, own: usize) -> f64 {
    let first = k + j - 1;
    if first > n + own {
        return 0.0;
    }
    let all = ln_choose(n + own, first);
    let of = |i: usize| match first.checked_sub(i) {
        Some(rest) if i <= own && rest <= n => (ln_choose(own, i) + ln_choose(n, rest) - all).exp(),
        _ => 0.0,
    };
    (0..j).map(of).sum()
}

/// The upper end of the interval of a probability by which `k` of `n` happened, at 97.5 %.
fn binomial_end(k: usize, n: usize) -> f64 {
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
    fn the_probabilities_of_chance_are_the_tables() {
        // Three of three before the first of one: 1 of 4 orders. One of two before the first of two: every other.
        assert!((at_least_before(3, 3, 1, 1) - 0.25).abs() < 1e-12);
        assert!((at_least_before(1, 2, 1, 2) - 0.5).abs() < 1e-12);
        assert!((at_least_before(0, 5, 3, 9) - 1.0).abs() < 1e-12);
        assert_eq!(at_least_before(5, 4, 1, 3), 0.0);
        // Clopper and Pearson, from the sums of the binomial distribution in whole fractions.
        for (k, n, end) in
            [(0, 20, 0.168_433_5), (0, 64, 0.056_009_1), (1, 3, 0.905_700_7), (5, 10, 0.812_913_8)]
        {
            assert!((binomial_end(k, n) - end).abs() < 1e-6, "{k} of {n}: {}", binomial_end(k, n));
        }
        assert_eq!(binomial_end(3, 3), 1.0);
    }

    #[test]
    fn copying_is_said_only_where_there_are_enough_to_say_it() {
        let at = |distance| Nearest { index: 0, mirrored: false, distance };
        let own = |n: u32| (0..n).map(|i| at(0.1 + f64::from(i) * 1e-4)).collect::<Vec<_>>();
        let copies = |k: u32, n: u32| (0..n).map(|i| at(if i < k { 0.01 } else { 0.3 })).collect::<Vec<_>>();
        let verdict = |k, n, of| judge(&copies(k, n), &own(of)).verdict;
        // Three images, two of which are copies and one of which is noise; three images to learn from.
        assert_eq!(verdict(2, 3, 1000), Verdict::TooFew);
        assert_eq!(verdict(64, 64, 3), Verdict::TooFew);
        assert_eq!(verdict(64, 64, 19), Verdict::TooFew);
        assert_eq!(verdict(64, 64, 20), Verdict::Copies);
        assert_eq!(verdict(20, 20, 1000), Verdict::Copies);
        assert!(matches!(verdict(0, 64, 1000), Verdict::Chance(most) if (0.05..0.06).contains(&most)));
        assert!(matches!(verdict(1, 64, 1000), Verdict::Chance(_)));
        assert!(matches!(verdict(1, 20, 1000), Verdict::Open(low, high) if low < 0.01 && high > 0.2));
        assert!(matches!(verdict(3, 64, 1000), Verdict::Open(..)));
        assert_eq!(verdict(10, 64, 1000), Verdict::Copies);
        assert_eq!(verdict(0, 0, 0), Verdict::TooFew);
        // Duplicates in the data are not measured by.
        let twice: Vec<_> = own(40).into_iter().chain((0..400).map(|_| at(0.0))).collect();
        assert_eq!(
            judge(&copies(30, 64), &twice),
            Judged { near: 30, samples: 64, own: 40, verdict: Verdict::Copies }
        );
    }

    #[test]
    fn copies_are_found_and_others_are_as_far_as_the_data_from_itself() {
        let data = Digits::new(0, 16, 600).unwrap();
        let read = |data: &Digits, i| {
            let mut numbers = vec![0.0; data.shape().values()];
            data.read(i, Draw::default(), &mut numbers).unwrap();
            numbers
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

        // Other digits of the same kind are as far from these as these from one another: the medians of 200 each.
        let others = Digits::new(1, 16, 200).unwrap();
        let samples: Vec<Vec<f32>> = (0..200).map(|i| read(&others, i)).collect();
        let samples = nearest(&data, &samples, false, &mut |_, _| Ok(())).unwrap();
        let own = among(&data, 200, false, &mut |_, _| Ok(())).unwrap();
        assert_eq!((samples.len(), own.len()), (200, 200));
        let (a, b) = (quantile(&samples, 0.5), quantile(&own, 0.5));
        assert!(a > 0.02 && (a / b - 1.0).abs() < 0.1, "{a}, {b}");
        assert!(nearest(&data, &copies, false, &mut |_, _| Err(crate::Error::Interrupted)).is_err());
    }

    #[test]
    fn a_mirrored_copy_is_found_and_said() {
        let data = Digits::new(0, 16, 50).unwrap();
        let mut numbers = vec![0.0; 256];
        data.read(7, Draw::default(), &mut numbers).unwrap();
        let mirrored: Vec<f32> = numbers.chunks(16).flat_map(|row| row.iter().rev().copied()).collect();
        let search =
            |mirror| nearest(&data, std::slice::from_ref(&mirrored), mirror, &mut |_, _| Ok(())).unwrap()[0];
        assert_eq!(search(true), Nearest { index: 7, mirrored: true, distance: 0.0 });
        assert!(search(false).distance > 0.0);
        assert!(among(&Digits::new(0, 16, 1).unwrap(), 10, false, &mut |_, _| Ok(())).unwrap().is_empty());
    }
}
