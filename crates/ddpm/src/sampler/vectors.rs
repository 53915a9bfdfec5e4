//! Where samplers have their batches: in vectors that are known by name, on the host or in the memory of a device.

use super::Seeds;
use super::drawing::{blend, hold};
use crate::error::Result;
use crate::process::Prediction;
use ddpm_engine::rng::Purpose;
use ddpm_engine::{Draws, Vector, Vectors};

/// The batch, `alpha x_0 + sigma eps` at the level that the sampler is at.
pub(crate) const X: Vector = Vector(0);
/// The images that the network expects, held within bounds.
pub(crate) const X_0: Vector = Vector(1);
/// The noise that it expects, once it is [asked for](super::drawing::Drawing::expect_noise).
pub(crate) const EPS: Vector = Vector(2);
/// Fresh noise.
pub(crate) const Z: Vector = Vector(3);
/// What the network said.
pub(super) const OUTPUT: Vector = Vector(4);
/// What it told of the variance, and then [noise of that variance](super::drawing::Drawing::learned_noise).
pub(crate) const LEARNED: Vector = Vector(5);
/// What guidance has on a device besides: the prediction without the class, and the classes.
pub(crate) const WITHOUT: Vector = Vector(6);
pub(crate) const LABELS: Vector = Vector(7);
/// Vectors that a sampler may have for itself.
const OWN: usize = 6;
/// All of them.
pub(crate) const VECTORS: usize = 8 + OWN;

/// One of the sampler's own.
pub(crate) const fn own(i: usize) -> Vector {
    assert!(i < OWN, "a sampler has so many vectors for itself");
    Vector(8 + i)
}

/// A network in a device's memory, to which a sampler's batches need not be brought. A [`Denoiser`](crate::denoiser::Denoiser)
/// that is one says so.
pub trait Resident {
    /// The vectors in that memory, one batch each.
    ///
    /// # Errors
    /// What the device says.
    fn vectors(&mut self) -> Result<&mut dyn Vectors>;

    /// As [`Denoiser::predict`](crate::denoiser::Denoiser::predict), from one vector to another.
    ///
    /// # Errors
    /// As there.
    fn predict_vector(&mut self, x_t: Vector, t: f64, output: Vector) -> Result<()>;

    /// Brings the variance that was told with the last prediction to a vector; whether there is any.
    ///
    /// # Errors
    /// What the device says.
    fn bring_variance(&mut self, to: Vector) -> Result<bool>;
}

impl Prediction {
    /// The numbers a, b, c with `x_0 = (a x_t + b output) / c`, to the bit as [`x_0`](Self::x_0) has it.
    pub(super) fn terms_of_x_0(self, alpha: f64, sigma: f64) -> [f64; 3] {
        match self {
            Self::Eps => [1.0, -sigma, alpha],
            Self::X0 => [0.0, 1.0, 1.0],
            Self::V => [alpha, -sigma, 1.0],
        }
    }

    /// The same for the [noise](Self::eps).
    pub(super) fn terms_of_eps(self, alpha: f64, sigma: f64) -> [f64; 3] {
        match self {
            Self::Eps => [0.0, 1.0, 1.0],
            Self::X0 => [1.0, -alpha, sigma],
            Self::V => [sigma, alpha, 1.0],
        }
    }
}

/// Vectors in the host's memory, which they take when they are first written.
pub(super) struct HostVectors {
    len: usize,
    image: usize,
    all: Vec<Vec<f32>>,
}

impl HostVectors {
    pub fn new(batch: usize, image: usize) -> Self {
        Self { len: batch * image, image, all: vec![Vec::new(); VECTORS] }
    }

    /// The numbers of a vector that was written.
    pub fn numbers(&self, v: Vector) -> &Vec<f32> {
        &self.all[v.0]
    }

    /// Changes the numbers of a vector, with all others at hand.
    pub fn change<R>(&mut self, v: Vector, change: impl FnOnce(&mut [f32], &Self) -> R) -> R {
        let mut numbers = std::mem::take(&mut self.all[v.0]);
        numbers.resize(self.len, 0.0);
        let made = change(&mut numbers, self);
        self.all[v.0] = numbers;
        made
    }

    /// The numbers of a vector, which is left empty.
    pub fn into_numbers(mut self, v: Vector) -> Vec<f32> {
        std::mem::take(&mut self.all[v.0])
    }
}

impl Vectors for HostVectors {
    fn write(&mut self, to: Vector, data: &[f32]) -> ddpm_engine::Result<()> {
        self.change(to, |to, _| to[..data.len()].copy_from_slice(data));
        Ok(())
    }

    fn read(&self, from: Vector, out: &mut [f32]) -> ddpm_engine::Result<()> {
        out.copy_from_slice(&self.all[from.0][..out.len()]);
        Ok(())
    }

    fn copy(&mut self, to: Vector, from: Vector) -> ddpm_engine::Result<()> {
        let mut numbers = std::mem::take(&mut self.all[to.0]);
        numbers.clear();
        numbers.extend_from_slice(&self.all[from.0]);
        self.all[to.0] = numbers;
        Ok(())
    }

    fn mix(&mut self, to: Vector, terms: &[(f64, Vector)], divisor: f64) -> ddpm_engine::Result<()> {
        let Some((&(keep, first), others)) = terms.split_first() else {
            self.change(to, |to, _| to.fill(0.0));
            return Ok(());
        };
        if first != to {
            self.copy(to, first)?;
        }
        self.change(to, |to, all| {
            let term = |i: usize| (others[i].0, all.numbers(others[i].1).as_slice());
            match (others.len(), divisor) {
                (0, 1.0) => blend(to, keep, []),
                (1, 1.0) => blend(to, keep, [term(0)]),
                (2, 1.0) => blend(to, keep, [term(0), term(1)]),
                (3, 1.0) => blend(to, keep, [term(0), term(1), term(2)]),
                _ => {
                    let others: Vec<_> = (0..others.len()).map(term).collect();
                    for (i, to) in to.iter_mut().enumerate() {
                        let first = keep * f64::from(*to);
                        let sum = others.iter().fold(first, |sum, (c, y)| sum + c * f64::from(y[i]));
                        *to = (sum / divisor) as f32;
                    }
                }
            }
        });
        Ok(())
    }

    fn normal(&mut self, to: Vector, draws: Draws, purpose: Purpose) -> ddpm_engine::Result<()> {
        let seeds = Seeds { seed: draws.seed, first: draws.first_index };
        self.change(to, |to, all| seeds.fill(purpose, draws.step, all.image, to));
        Ok(())
    }

    fn threshold(&mut self, v: Vector, part: Option<f64>) -> ddpm_engine::Result<()> {
        self.change(v, |v, all| v.chunks_mut(all.image.max(1)).for_each(|p| hold(p, part)));
        Ok(())
    }

    fn apply_learned_std(
        &mut self,
        v: Vector,
        z: Vector,
        [small, large]: [f64; 2],
    ) -> ddpm_engine::Result<()> {
        self.change(v, |v, all| {
            for (v, &z) in v.iter_mut().zip(all.numbers(z)) {
                let part = (f64::from(*v) + 1.0) / 2.0;
                let deviation = (0.5 * (part * large + (1.0 - part) * small)).exp();
                *v = (deviation * f64::from(z)) as f32;
            }
        });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schedule::Level;

    #[test]
    fn terms_are_what_predictions_mean_to_the_bit() {
        let level = Level { t: 3.0, alpha: 0.83, sigma: (1.0f64 - 0.83 * 0.83).sqrt() };
        for prediction in Prediction::ALL {
            for i in 0..100 {
                let (x, output) = (f64::from(0.37f32 * i as f32 - 3.0), f64::from((1.7f32 * i as f32).sin()));
                let with = |[a, b, c]: [f64; 3]| (a * x + b * output) / c;
                let terms = prediction.terms_of_x_0(level.alpha, level.sigma);
                assert_eq!(with(terms).to_bits(), prediction.x_0(level, x, output).to_bits());
                let terms = prediction.terms_of_eps(level.alpha, level.sigma);
                assert_eq!(with(terms).to_bits(), prediction.eps(level, x, output).to_bits());
            }
        }
    }

    #[test]
    fn mixing_takes_any_number_of_terms() {
        let mut v = HostVectors::new(1, 2);
        let [a, b, c, to] = [0, 1, 2, 3].map(Vector);
        for (at, numbers) in [(a, [1.0, 2.0]), (b, [3.0, 5.0]), (c, [-1.0, 0.5])] {
            v.write(at, &numbers).unwrap();
        }
        v.mix(to, &[(1.0, a), (-2.0, b)], 4.0).unwrap();
        assert_eq!(v.numbers(to), &[-1.25, -2.0]);
        v.mix(to, &[(2.0, to), (1.0, a), (1.0, b), (-2.0, c)], 1.0).unwrap();
        assert_eq!(v.numbers(to), &[3.5, 2.0]);
        v.mix(to, &[], 1.0).unwrap();
        assert_eq!(v.numbers(to), &[0.0, 0.0]);
    }
}
