//! The variational lower bound: an upper bound on the bits that the model needs to encode an image (Ho et al.
//! 2020, sections 2 and 3.3).
//!
//! ```text
//! -log p(x_0) <= L = KL(q(x_T | x_0) || p(x_T))                                        L_T, the prior's
//!                  + sum over t > 1 of KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t))   L_{t-1}, the steps'      (eq. 5)
//!                  - log p(x_0 | x_1)                                                  L_0, the decoder's      (eq. 13)
//! ```
//! Results are in bits per dimension: an image's bits divided by its number of elements. Images have 256
//! levels. All arithmetic except the network's is f64. The first step uses the second's `beta_tilde` as its
//! variance, since its own is 0, as in the code of Ho et al. and of Nichol and Dhariwal 2021. Timesteps count
//! from 0, so the paper's `L_{t-1}` is at t - 1 here.

use crate::denoiser::Denoiser;
use crate::error::{Error, Result};
use crate::process::Prediction;
use crate::sampler::{Threshold, Variance};
use crate::schedule::Schedule;
use ddpm_kernels::bound::{BoundStep, kl};
use ddpm_rng::{Purpose, Stream};
use rayon::prelude::*;
use serde::Serialize;
use std::f64::consts::LN_2;
use std::ops::Range;

/// Exponent of the strata's ends: strata are shorter at low noise, where terms are large and vary most. One
/// timestep is sampled per stratum.
const STRATIFY_POWER: f64 = 3.0;

/// The coefficients of each timestep's term, for a schedule and a prediction type.
pub fn steps(schedule: &Schedule, prediction: Prediction) -> Vec<BoundStep> {
    let last = schedule.timesteps() - 1;
    let step = |t: usize| {
        let beta = schedule.beta(t).ln();
        let low = if last == 0 { beta } else { schedule.posterior(t.max(1)).variance.ln() };
        BoundStep {
            to_x_0: prediction.to_x_0(schedule.level(t as f64)),
            posterior_x_0: schedule.posterior(t).x0,
            log_variance: (low, beta),
            decoder: t == 0,
        }
    };
    (0..=last).map(step).collect()
}

/// Options of the bound.
#[derive(Clone, Copy, Debug, Default)]
pub struct VlbOptions {
    /// The variance of `p(x_{t-1} | x_t)`; `None`: the learned one if the network has it, else the small one.
    /// With either fixed variance, the first step uses the second's.
    pub variance: Option<Variance>,
    /// Treatment of predicted images outside [-1, 1], as in sampling; the code of both papers clips.
    pub threshold: Threshold,
    /// Number of randomly sampled step terms to evaluate per image; `None`: all of them.
    pub terms: Option<usize>,
    /// The seed for the noise and for the choice of terms.
    pub seed: u64,
}

/// A mean with its standard error.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Estimate {
    /// The mean.
    pub mean: f64,
    /// The standard error over images, noise and timesteps; `None` (null in JSON) for a single measurement.
    pub standard_error: Option<f64>,
}

/// The terms of consecutive timesteps.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Term {
    /// The first timestep, from 0; timestep 0 is only the decoder's term.
    pub first: usize,
    /// The last timestep.
    pub last: usize,
    /// The mean of their terms, in bits per dimension.
    pub bits: Estimate,
    /// The mean squared error of the predicted image.
    pub x_0_error: f64,
    /// The mean squared error of the predicted noise.
    pub eps_error: f64,
}

/// The bound, in bits per dimension.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Vlb {
    /// The sum of the three below.
    pub total: Estimate,
    /// `L_T`.
    pub prior: Estimate,
    /// The sum of all `L_{t-1}`.
    pub steps: Estimate,
    /// `L_0`.
    pub decoder: Estimate,
    /// Number of images evaluated.
    pub images: usize,
    /// Number of timesteps in the chain.
    pub timesteps: usize,
    /// Number of step terms evaluated per image.
    pub terms_measured: usize,
    /// The terms of the decoder and the steps, from t = 0 on.
    pub terms: Vec<Term>,
}

/// Online weighted mean and variance (West 1979).
#[derive(Clone, Copy, Debug, Default)]
struct Moments {
    count: usize,
    weight: f64,
    weight_squares: f64,
    mean: f64,
    squares: f64,
}

impl Moments {
    fn add(&mut self, weight: f64, value: f64) {
        self.count += 1;
        self.weight += weight;
        self.weight_squares += weight * weight;
        let before = value - self.mean;
        self.mean += before * weight / self.weight;
        self.squares += weight * before * (value - self.mean);
    }

    fn estimate(&self) -> Estimate {
        let n = self.count as f64;
        let variance = self.squares / self.weight * self.weight_squares / self.weight.powi(2) * n / (n - 1.0);
        Estimate { mean: self.mean, standard_error: (self.count > 1).then(|| variance.sqrt()) }
    }
}

/// Statistics of the terms and errors of consecutive timesteps.
#[derive(Clone, Copy, Debug, Default)]
struct TermMoments {
    bits: Moments,
    x_0_error: Moments,
    eps_error: Moments,
}

/// The term and errors of an image at a timestep.
#[derive(Clone, Copy, Debug)]
struct TermValues {
    bits: f64,
    x_0_error: f64,
    eps_error: f64,
}

/// Estimates the bound batch by batch.
pub struct VlbEstimator {
    schedule: Schedule,
    steps: Vec<BoundStep>,
    prediction: Prediction,
    options: VlbOptions,
    /// The timesteps above 0, in strata; one timestep of each is evaluated.
    strata: Vec<Range<usize>>,
    images: usize,
    batches: usize,
    /// Total, prior, steps and decoder.
    sums: [Moments; 4],
    /// The decoder and each stratum.
    terms: Vec<TermMoments>,
}

/// Splits `1 .. all` into `n` strata, shorter at the beginning.
fn strata(all: usize, n: usize) -> Vec<Range<usize>> {
    let (mut strata, mut first) = (Vec::with_capacity(n), 1);
    for i in 1..=n {
        let end = 1.0 + (all - 1) as f64 * (i as f64 / n as f64).powf(STRATIFY_POWER);
        // Leave at least one timestep for each remaining stratum.
        let end = (end.round() as usize).clamp(first + 1, all - (n - i));
        strata.push(first..end);
        first = end;
    }
    strata
}

impl VlbEstimator {
    /// Creates an estimator for a schedule and a prediction type.
    ///
    /// If the last timesteps have no signal, the chain ends where sampling would start
    /// ([`Levels`](crate::sampler::Levels)).
    ///
    /// # Errors
    /// [`Error::Option`] for 0 terms, or more than there are.
    pub fn new(schedule: &Schedule, prediction: Prediction, options: VlbOptions) -> Result<Self> {
        let with_signal = schedule.timesteps_with_signal();
        let all = match prediction {
            Prediction::Eps => with_signal,
            Prediction::X0 | Prediction::V => (with_signal + 1).min(schedule.timesteps()),
        };
        let n = options.terms.unwrap_or(all - 1);
        if n > all - 1 || (n == 0 && all > 1) {
            let reason =
                format!("{n} is out of range; give 1 to {}, or leave it out to evaluate all", all - 1);
            return Err(Error::option("terms", reason));
        }
        let mut steps = steps(schedule, prediction);
        steps.truncate(all);
        Ok(Self {
            schedule: schedule.clone(),
            steps,
            prediction,
            options,
            strata: if n == 0 { Vec::new() } else { strata(all, n) },
            images: 0,
            batches: 0,
            sums: [Moments::default(); 4],
            terms: vec![TermMoments::default(); n + 1],
        })
    }

    /// Number of network evaluations per batch.
    pub fn num_evals(&self) -> usize {
        self.terms.len()
    }

    /// Whether all terms are evaluated. Then the standard error is estimated across images, otherwise across
    /// batches.
    pub fn uses_all_terms(&self) -> bool {
        self.terms.len() == self.steps.len()
    }

    /// Adds the images `x_0`, at most one batch of the denoiser. `on_eval` is called after each network
    /// evaluation; an error from it stops.
    ///
    /// # Errors
    /// [`Error::Option`] for learned variance if the network has none, and those of the denoiser and
    /// `on_eval`; earlier results are kept.
    ///
    /// # Panics
    /// If `x_0` is not 1 to `batch` complete images.
    pub fn add(
        &mut self,
        denoiser: &mut dyn Denoiser,
        x_0: &[f32],
        on_eval: &mut dyn FnMut() -> Result<()>,
    ) -> Result<()> {
        let (len, batch) = (denoiser.image_len(), denoiser.batch());
        let n = x_0.len() / len;
        assert!(x_0.len() == n * len && (1..=batch).contains(&n), "{} elements", x_0.len());
        let sample =
            |part: &Range<usize>, u: f64| part.start + ((part.len() as f64 * u) as usize).min(part.len() - 1);
        let uniforms =
            Stream::new(self.options.seed, Purpose::BoundTimestep, 0, self.batches as u32).uniforms();
        let at: Vec<usize> =
            [0].into_iter().chain(self.strata.iter().zip(uniforms).map(|(p, u)| sample(p, u))).collect();

        let mut measured = Vec::with_capacity(at.len());
        for &t in &at {
            measured.push(self.at(t, denoiser, x_0)?);
            on_eval()?;
        }
        let prior = self.prior(x_0, len);
        let of = |i: usize| {
            let decoder = measured[0][i].bits;
            let steps: f64 =
                self.strata.iter().zip(&measured[1..]).map(|(p, m)| p.len() as f64 * m[i].bits).sum();
            [prior[i] + steps + decoder, prior[i], steps, decoder]
        };
        let sums: Vec<[f64; 4]> = (0..n).map(of).collect();
        let units = if self.uses_all_terms() { 1 } else { n };
        for sums in sums.chunks(units) {
            for (j, moments) in self.sums.iter_mut().enumerate() {
                moments.add(sums.len() as f64, sums.iter().map(|s| s[j]).sum::<f64>() / sums.len() as f64);
            }
        }
        for (moments, measured) in self.terms.iter_mut().zip(&measured) {
            for m in measured.chunks(units) {
                let (weight, mean) = (m.len() as f64, |f: fn(&TermValues) -> f64| {
                    m.iter().map(f).sum::<f64>() / m.len() as f64
                });
                moments.bits.add(weight, mean(|m| m.bits));
                moments.x_0_error.add(weight, mean(|m| m.x_0_error));
                moments.eps_error.add(weight, mean(|m| m.eps_error));
            }
        }
        self.images += n;
        self.batches += 1;
        Ok(())
    }

    /// `L_T` of each image: KL divergence of its last noise level from a standard normal.
    fn prior(&self, x_0: &[f32], len: usize) -> Vec<f64> {
        let level = self.schedule.level((self.steps.len() - 1) as f64);
        let log_variance = 2.0 * level.sigma.ln();
        let of = |x: &f32| kl(level.alpha * f64::from(*x), log_variance, 0.0).0;
        x_0.par_chunks(len).map(|p| p.iter().map(of).sum::<f64>() / (len as f64 * LN_2)).collect()
    }

    /// The terms and errors of the images at a timestep.
    fn at(&self, t: usize, denoiser: &mut dyn Denoiser, x_0: &[f32]) -> Result<Vec<TermValues>> {
        let (len, step, level) = (denoiser.image_len(), &self.steps[t], self.schedule.level(t as f64));
        let mut x_t = vec![0.0; denoiser.batch() * len];
        let (seed, first) = (self.options.seed, self.images);
        x_t.par_chunks_mut(len).zip(x_0.par_chunks(len)).enumerate().for_each(|(i, (x_t, x_0))| {
            Stream::new(seed, Purpose::Bound, t as u32, (first + i) as u32).fill_normal(x_t);
            for (x, &x_0) in x_t.iter_mut().zip(x_0) {
                *x = (level.alpha * f64::from(x_0) + level.sigma * f64::from(*x)) as f32;
            }
        });
        let mut output = vec![0.0; x_t.len()];
        denoiser.predict(&x_t, t as f64, &mut output)?;
        let learned = denoiser.variance();
        let variance = self.options.variance.unwrap_or(match learned {
            Some(_) => Variance::Learned,
            None => Variance::Small,
        });
        if variance == Variance::Learned && learned.is_none() {
            return Err(Variance::not_learned());
        }
        let log_variance = |i: usize| match (variance, learned) {
            (Variance::Learned, Some(v)) => step.log_variance(f64::from(v[i])),
            (Variance::Large, _) if t > 0 => step.log_variance.1,
            _ => step.log_variance.0,
        };
        let each = (0..x_0.len() / len).into_par_iter().map(|image| {
            let range = image * len..(image + 1) * len;
            let mean = |i: usize| step.to_x_0.0 * f64::from(x_t[i]) + step.to_x_0.1 * f64::from(output[i]);
            let mut means: Vec<f64> = range.clone().map(mean).collect();
            if self.options.threshold != Threshold::None {
                // In f32, like the samplers.
                let mut rounded: Vec<f32> = means.iter().map(|&x| x as f32).collect();
                self.options.threshold.apply(&mut rounded);
                means = rounded.into_iter().map(f64::from).collect();
            }
            let mut sum = TermValues { bits: 0.0, x_0_error: 0.0, eps_error: 0.0 };
            for (i, &mean) in range.zip(&means) {
                let (x, x_t) = (f64::from(x_0[i]), f64::from(x_t[i]));
                sum.bits += step.term(x, mean, log_variance(i)).0;
                sum.x_0_error += (x - mean).powi(2);
                let eps = (x_t - level.alpha * x) / level.sigma;
                sum.eps_error += (eps - self.prediction.eps(level, x_t, f64::from(output[i]))).powi(2);
            }
            let n = len as f64;
            TermValues {
                bits: sum.bits / (n * LN_2),
                x_0_error: sum.x_0_error / n,
                eps_error: sum.eps_error / n,
            }
        });
        Ok(each.collect())
    }

    /// The estimate so far.
    pub fn finish(&self) -> Vlb {
        let [total, prior, steps, decoder] = self.sums.map(|m| m.estimate());
        let strata = std::iter::once(0..1).chain(self.strata.iter().cloned());
        let term = |(stratum, m): (Range<usize>, &TermMoments)| Term {
            first: stratum.start,
            last: stratum.end - 1,
            bits: m.bits.estimate(),
            x_0_error: m.x_0_error.mean,
            eps_error: m.eps_error.mean,
        };
        Vlb {
            total,
            prior,
            steps,
            decoder,
            images: self.images,
            timesteps: self.steps.len(),
            terms_measured: self.strata.len(),
            terms: strata.zip(&self.terms).map(term).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strata_cover_every_timestep_once_and_are_shorter_at_low_noise() {
        for (all, n) in [(2, 1), (10, 9), (10, 4), (1000, 64), (1000, 999), (1000, 1), (1000, 998), (4000, 3)]
        {
            let strata = strata(all, n);
            assert_eq!(strata.len(), n);
            assert!(strata[0].start == 1 && strata[n - 1].end == all, "{all}, {n}: {strata:?}");
            assert!(strata.windows(2).all(|w| w[0].end == w[1].start));
            assert!(strata.iter().all(|p| !p.is_empty()), "{all}, {n}: {strata:?}");
        }
        let lengths: Vec<usize> = strata(1000, 64).iter().map(|p| p.len()).collect();
        assert!(lengths[0] == 1 && lengths[63] > 25, "{lengths:?}");
    }

    #[test]
    fn means_and_standard_errors_match_the_textbook() {
        let (mut equal, mut weighted) = (Moments::default(), Moments::default());
        for x in [1.0, 4.0, 2.0, 5.0] {
            equal.add(2.0, x);
        }
        // The variance is 10 / 3, over 4 values.
        let Estimate { mean, standard_error } = equal.estimate();
        assert!(
            (mean - 3.0).abs() < 1e-15 && (standard_error.unwrap() - (10.0f64 / 12.0).sqrt()).abs() < 1e-15
        );
        weighted.add(3.0, 1.0);
        assert_eq!(weighted.estimate().standard_error, None);
        weighted.add(1.0, 5.0);
        assert_eq!(weighted.estimate().mean, 2.0);
    }
}
