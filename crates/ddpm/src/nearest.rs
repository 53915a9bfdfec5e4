//! Whether samples are copies: the nearest pictures of the data, and how near the data's own are to one another.
//!
//! Small sets get learnt by heart (Carlini et al., "Extracting Training Data from Diffusion Models", 2023). A network that has
//! learnt what pictures look like draws some that are about as far from the data as the data's pictures are from one
//! another; one that has learnt the pictures draws nearer ones.

use crate::data::{Dataset, Draw};
use crate::error::Result;
use rayon::prelude::*;

/// Pictures of the data that are read at once.
const BLOCK: usize = 256;

/// The nearest of the data's pictures.
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
struct Sought {
    numbers: Vec<f32>,
    /// The number in the data that is not looked at: the picture's own.
    own: Option<usize>,
    mirrored: bool,
}

/// The nearest picture of the data for each sample, given in the network's range, [-1, 1]; with `mirror` the mirrored samples
/// are looked for too. `on_block` sees how many pictures of the data are done, of how many.
///
/// # Errors
/// As [`Dataset::read`], and what `on_block` gives.
///
/// # Panics
/// If a sample has not as many numbers as the data's pictures.
pub fn nearest(
    data: &dyn Dataset,
    samples: &[Vec<f32>],
    mirror: bool,
    on_block: &mut dyn FnMut(usize, usize) -> Result<()>,
) -> Result<Vec<Nearest>> {
    let sought = samples.iter().map(|numbers| (numbers.clone(), None)).collect();
    search(data, sought, mirror, on_block)
}

/// For at most `count` pictures of the data, evenly spread, the nearest other one.
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
            sought.push(Sought { numbers: mirrored, own, mirrored: true });
        }
        sought.push(Sought { numbers, own, mirrored: false });
    }
    let mut best = vec![(usize::MAX, f64::INFINITY); sought.len()];
    let mut block = vec![0.0; BLOCK.min(data.len()) * values];
    for first in (0..data.len()).step_by(BLOCK) {
        let here = BLOCK.min(data.len() - first);
        for (i, out) in block.chunks_mut(values).take(here).enumerate() {
            data.read(first + i, Draw::default(), out)?;
        }
        best.par_iter_mut().zip(&sought).for_each(|(best, sought)| {
            for (i, picture) in block.chunks(values).take(here).enumerate() {
                let far = squares(&sought.numbers, picture);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::digits::Digits;

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
