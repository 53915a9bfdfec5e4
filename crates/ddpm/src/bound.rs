//! The variational bound: at most how many bits an image takes, told by the network (Ho et al. 2020, section 2 and 3.3).
//!
//! ```text
//! -log p(x_0) <= L = KL(q(x_T | x_0) || p(x_T))                                        L_T, the prior's
//!                  + sum over t > 1 of KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t))   L_{t-1}, the steps'      (eq. 5)
//!                  - log p(x_0 | x_1)                                                  L_0, the decoder's      (eq. 13)
//! ```
//! Numbers are bits per dimension: bits of an image over its numbers. Images have 256 levels. All arithmetic but the
//! network's is f64. The first step's variance is the second's `beta_tilde`, its own being 0, as in Ho et al.'s program and in
//! that of Nichol and Dhariwal 2021; timesteps count from 0, so that `L_{t-1}` of the paper stands at t - 1 here.

use crate::data::{Dataset, Draw};
use crate::denoiser::Denoiser;
use crate::error::{Error, Result};
use crate::generate::Generator;
use crate::guidance::{Guidance, Guided};
use crate::process::Prediction;
use crate::sampler::{Threshold, Variance};
use crate::schedule::Schedule;
use ddpm_engine::ops::BoundStep;
use ddpm_engine::rng::{Purpose, Stream};
use rayon::prelude::*;
use serde::Serialize;
use std::f64::consts::LN_2;
use std::ops::Range;

/// Groups of images, at least, that share the timesteps drawn for them: the standard error is told from their differences.
const GROUPS: usize = 16;
/// How much closer together the timesteps that are measured lie at low noise, where terms are large and differ most: the
/// parts of the timesteps of which one is drawn end at the cubes.
const STRATIFY_POWER: f64 = 3.0;

/// What the term of each timestep needs of a schedule, for a network that predicts that.
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

/// What is measured.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// The variance of `p(x_{t-1} | x_t)`; `None`: the network's own, where it has learnt one, else the small one. The first
    /// step's is that of the second with both fixed ones.
    pub variance: Option<Variance>,
    /// What is done about expected images outside [-1, 1], as in sampling; the programs of both papers clip.
    pub threshold: Threshold,
    /// How many of the steps' terms are measured of each image, drawn at random; `None`: all of them.
    pub terms: Option<usize>,
    /// The seed of the noise, and of which terms are measured.
    pub seed: u64,
}

/// A mean over images.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Estimate {
    /// The mean.
    pub mean: f64,
    /// Its standard error over images, noise and timesteps; `None` (in JSON null) where there is a single measurement.
    pub standard_error: Option<f64>,
}

/// The terms of consecutive timesteps.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Term {
    /// The first of the timesteps, from 0; at 0 is the decoder's term alone.
    pub first: usize,
    /// The last.
    pub last: usize,
    /// The mean of their terms, in bits per dimension.
    pub bits: Estimate,
    /// The mean squared error of the image that the network expects.
    pub x_0_error: f64,
    /// That of the noise.
    pub eps_error: f64,
}

/// The bound, in bits per dimension.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Bound {
    /// The sum of the three below.
    pub total: Estimate,
    /// `L_T`.
    pub prior: Estimate,
    /// The sum of all `L_{t-1}`.
    pub steps: Estimate,
    /// `L_0`.
    pub decoder: Estimate,
    /// Images that were measured.
    pub images: usize,
    /// Timesteps of the chain.
    pub timesteps: usize,
    /// Terms of the steps that were measured of each image.
    pub terms_measured: usize,
    /// The decoder's term and the steps', from t = 0 on.
    pub terms: Vec<Term>,
}

/// A weighted mean and what its standard error needs, number by number (West 1979).
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

/// The moments of the bits and of the errors of some timesteps.
#[derive(Clone, Copy, Debug, Default)]
struct TermMoments {
    bits: Moments,
    x_0_error: Moments,
    eps_error: Moments,
}

/// Of an image at a timestep.
#[derive(Clone, Copy, Debug)]
struct Measured {
    bits: f64,
    x_0_error: f64,
    eps_error: f64,
}

/// Measures the bound batch by batch.
pub struct Measure {
    schedule: Schedule,
    steps: Vec<BoundStep>,
    prediction: Prediction,
    options: Options,
    /// The timesteps above 0 in parts, of each of which one is measured.
    parts: Vec<Range<usize>>,
    images: usize,
    batches: usize,
    /// Of the total, the prior, the steps and the decoder.
    sums: [Moments; 4],
    /// Of the decoder and of each part.
    terms: Vec<TermMoments>,
}

/// `1 .. all` in `n` parts, shorter at the beginning.
fn parts(all: usize, n: usize) -> Vec<Range<usize>> {
    let (mut parts, mut first) = (Vec::with_capacity(n), 1);
    for i in 1..=n {
        let end = 1.0 + (all - 1) as f64 * (i as f64 / n as f64).powf(STRATIFY_POWER);
        // Of each of the parts to come there is one left at least.
        let end = (end.round() as usize).clamp(first + 1, all - (n - i));
        parts.push(first..end);
        first = end;
    }
    parts
}

impl Measure {
    /// For a schedule and a network that predicts that.
    ///
    /// Where nothing is left of the image at the last timesteps, the chain ends before them, as sampling begins there
    /// ([`Levels`](crate::sampler::Levels)).
    ///
    /// # Errors
    /// [`Error::Config`] for no terms, or more than there are.
    pub fn new(schedule: &Schedule, prediction: Prediction, options: Options) -> Result<Self> {
        let with_signal = schedule.timesteps_with_signal();
        let all = match prediction {
            Prediction::Eps => with_signal,
            Prediction::X0 | Prediction::V => (with_signal + 1).min(schedule.timesteps()),
        };
        let n = options.terms.unwrap_or(all - 1);
        if n > all - 1 || (n == 0 && all > 1) {
            let reason =
                format!("{n} is out of range; give 1 to {}, or leave it out to measure all", all - 1);
            return Err(Error::Config { key: "terms".to_owned(), reason });
        }
        let mut steps = steps(schedule, prediction);
        steps.truncate(all);
        Ok(Self {
            schedule: schedule.clone(),
            steps,
            prediction,
            options,
            parts: if n == 0 { Vec::new() } else { parts(all, n) },
            images: 0,
            batches: 0,
            sums: [Moments::default(); 4],
            terms: vec![TermMoments::default(); n + 1],
        })
    }

    /// How often the network is asked about each batch.
    pub fn asked(&self) -> usize {
        self.terms.len()
    }

    /// Whether all terms are measured, so that images tell the standard error; else batches do.
    fn is_whole(&self) -> bool {
        self.terms.len() == self.steps.len()
    }

    /// Measures the images `x_0`, at most as many as the denoiser's batch; `on_asked` is called whenever the network was
    /// asked, and its error ends it.
    ///
    /// # Errors
    /// [`Error::Config`] where the learned variance is asked for and the network has none, and what the denoiser and
    /// `on_asked` give; what was measured before stays.
    ///
    /// # Panics
    /// If `x_0` is no whole number of images, none, or more than a batch.
    pub fn add(
        &mut self,
        denoiser: &mut dyn Denoiser,
        x_0: &[f32],
        on_asked: &mut dyn FnMut() -> Result<()>,
    ) -> Result<()> {
        let (len, batch) = (denoiser.image_len(), denoiser.batch());
        let n = x_0.len() / len;
        assert!(x_0.len() == n * len && (1..=batch).contains(&n), "{} numbers", x_0.len());
        let draw =
            |part: &Range<usize>, u: f64| part.start + ((part.len() as f64 * u) as usize).min(part.len() - 1);
        let uniforms =
            Stream::new(self.options.seed, Purpose::BoundTimestep, 0, self.batches as u32).uniforms();
        let at: Vec<usize> =
            [0].into_iter().chain(self.parts.iter().zip(uniforms).map(|(p, u)| draw(p, u))).collect();

        let mut measured = Vec::with_capacity(at.len());
        for &t in &at {
            measured.push(self.at(t, denoiser, x_0)?);
            on_asked()?;
        }
        let prior = self.prior(x_0, len);
        let of = |i: usize| {
            let decoder = measured[0][i].bits;
            let steps: f64 =
                self.parts.iter().zip(&measured[1..]).map(|(p, m)| p.len() as f64 * m[i].bits).sum();
            [prior[i] + steps + decoder, prior[i], steps, decoder]
        };
        let sums: Vec<[f64; 4]> = (0..n).map(of).collect();
        let units = if self.is_whole() { 1 } else { n };
        for sums in sums.chunks(units) {
            for (j, moments) in self.sums.iter_mut().enumerate() {
                moments.add(sums.len() as f64, sums.iter().map(|s| s[j]).sum::<f64>() / sums.len() as f64);
            }
        }
        for (moments, measured) in self.terms.iter_mut().zip(&measured) {
            for m in measured.chunks(units) {
                let (weight, mean) =
                    (m.len() as f64, |f: fn(&Measured) -> f64| m.iter().map(f).sum::<f64>() / m.len() as f64);
                moments.bits.add(weight, mean(|m| m.bits));
                moments.x_0_error.add(weight, mean(|m| m.x_0_error));
                moments.eps_error.add(weight, mean(|m| m.eps_error));
            }
        }
        self.images += n;
        self.batches += 1;
        Ok(())
    }

    /// `L_T` of each image: what is left of it at the last timestep, against a standard normal.
    fn prior(&self, x_0: &[f32], len: usize) -> Vec<f64> {
        let level = self.schedule.level((self.steps.len() - 1) as f64);
        let log_variance = 2.0 * level.sigma.ln();
        let of = |x: &f32| ddpm_engine::ops::kl(level.alpha * f64::from(*x), log_variance, 0.0).0;
        x_0.par_chunks(len).map(|p| p.iter().map(of).sum::<f64>() / (len as f64 * LN_2)).collect()
    }

    /// The terms of the images at a timestep.
    fn at(&self, t: usize, denoiser: &mut dyn Denoiser, x_0: &[f32]) -> Result<Vec<Measured>> {
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
            let places = image * len..(image + 1) * len;
            let mean = |i: usize| step.to_x_0.0 * f64::from(x_t[i]) + step.to_x_0.1 * f64::from(output[i]);
            let mut means: Vec<f64> = places.clone().map(mean).collect();
            if self.options.threshold != Threshold::None {
                // As samplers do it, in f32.
                let mut narrow: Vec<f32> = means.iter().map(|&x| x as f32).collect();
                self.options.threshold.apply(&mut narrow);
                means = narrow.into_iter().map(f64::from).collect();
            }
            let mut sum = Measured { bits: 0.0, x_0_error: 0.0, eps_error: 0.0 };
            for (i, &mean) in places.zip(&means) {
                let (x, x_t) = (f64::from(x_0[i]), f64::from(x_t[i]));
                sum.bits += step.term(x, mean, log_variance(i)).0;
                sum.x_0_error += (x - mean).powi(2);
                let eps = (x_t - level.alpha * x) / level.sigma;
                sum.eps_error += (eps - self.prediction.eps(level, x_t, f64::from(output[i]))).powi(2);
            }
            let n = len as f64;
            Measured {
                bits: sum.bits / (n * LN_2),
                x_0_error: sum.x_0_error / n,
                eps_error: sum.eps_error / n,
            }
        });
        Ok(each.collect())
    }

    /// What was measured.
    pub fn finish(&self) -> Bound {
        let [total, prior, steps, decoder] = self.sums.map(|m| m.estimate());
        let places = std::iter::once(0..1).chain(self.parts.iter().cloned());
        let term = |(place, m): (Range<usize>, &TermMoments)| Term {
            first: place.start,
            last: place.end - 1,
            bits: m.bits.estimate(),
            x_0_error: m.x_0_error.mean,
            eps_error: m.eps_error.mean,
        };
        Bound {
            total,
            prior,
            steps,
            decoder,
            images: self.images,
            timesteps: self.steps.len(),
            terms_measured: self.parts.len(),
            terms: places.zip(&self.terms).map(term).collect(),
        }
    }
}

/// Measures a run's network on `count` images of the data, evenly spread, with their classes where it is told them; `batch`
/// at most at once. `on_asked` sees how often the network was asked, of how often.
///
/// # Errors
/// As [`Measure::new`], [`Measure::add`] and [`Generator::class_numbers`]; [`Error::Data`] for images of another shape, and for
/// those without classes where the network knows none without.
pub fn of_run(
    generator: &Generator,
    data: &dyn Dataset,
    count: usize,
    batch: usize,
    options: Options,
    on_asked: &mut dyn FnMut(usize, usize) -> Result<()>,
) -> Result<Bound> {
    let (config, shape) = (generator.config(), generator.shape());
    if data.shape() != shape {
        let reason = format!("has images of {}, and the run's are of {shape}", data.shape());
        return Err(Error::Data { path: data.summary().source.clone().into(), reason });
    }
    let classes = generator.classes();
    let numbers = generator.class_numbers(data)?;
    if let Some(n) = classes
        && data.classes().is_empty()
        && config.train.label_dropout == 0.0
    {
        let reason = format!(
            "has no classes, and the run was trained with train.label_dropout = 0, or was imported: it knows no image without \
             its class; give images in a folder for each of its {n} classes"
        );
        return Err(Error::Data { path: data.summary().source.clone().into(), reason });
    }
    let count = count.clamp(1, data.len());
    let schedule = Schedule::from_config(&config.diffusion)?;
    let mut measure = Measure::new(&schedule, config.diffusion.prediction, options)?;
    // Small enough that there are groups to tell the standard error from.
    let most = if measure.is_whole() { count } else { count.div_ceil(GROUPS) };
    let batch = batch.min(most).max(1);
    let mut model = generator.model(batch)?;
    let (mut asked, all) = (0, count.div_ceil(batch) * measure.asked());
    let len = shape.values();
    let mut images = vec![0.0; batch * len];
    for first in (0..count).step_by(batch) {
        let here: Vec<usize> = (first..count.min(first + batch)).map(|i| i * data.len() / count).collect();
        for (&i, out) in here.iter().zip(images.chunks_mut(len)) {
            data.read(i, Draw::default(), out)?;
            out.iter_mut().for_each(|x| *x = level(*x));
        }
        let x_0 = &images[..here.len() * len];
        let mut on_asked = || {
            asked += 1;
            on_asked(asked, all)
        };
        match classes {
            None => measure.add(&mut model, x_0, &mut on_asked)?,
            Some(_) => {
                let number = |&i: &usize| data.label(i).and_then(|l| numbers.get(l as usize).copied());
                let mut labels: Vec<_> = here.iter().map(number).collect();
                labels.resize(batch, None);
                let mut told = Guided::new(&mut model, &schedule, labels, Guidance::default());
                measure.add(&mut told, x_0, &mut on_asked)?;
            }
        }
    }
    Ok(measure.finish())
}

/// The nearest of the 256 levels, which resized images and those of 16 bits lie between.
fn level(x: f32) -> f32 {
    ((f64::from(x.clamp(-1.0, 1.0)) + 1.0) * 127.5).round().mul_add(1.0 / 127.5, -1.0) as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_cover_every_timestep_once_and_are_shorter_at_low_noise() {
        for (all, n) in [(2, 1), (10, 9), (10, 4), (1000, 64), (1000, 999), (1000, 1), (1000, 998), (4000, 3)]
        {
            let parts = parts(all, n);
            assert_eq!(parts.len(), n);
            assert!(parts[0].start == 1 && parts[n - 1].end == all, "{all}, {n}: {parts:?}");
            assert!(parts.windows(2).all(|w| w[0].end == w[1].start));
            assert!(parts.iter().all(|p| !p.is_empty()), "{all}, {n}: {parts:?}");
        }
        let lengths: Vec<usize> = parts(1000, 64).iter().map(|p| p.len()).collect();
        assert!(lengths[0] == 1 && lengths[63] > 25, "{lengths:?}");
    }

    #[test]
    fn means_and_standard_errors_are_the_usual_ones() {
        let (mut alike, mut weighted) = (Moments::default(), Moments::default());
        for x in [1.0, 4.0, 2.0, 5.0] {
            alike.add(2.0, x);
        }
        // The variance is 10 / 3, over 4 numbers.
        let Estimate { mean, standard_error } = alike.estimate();
        assert!(
            (mean - 3.0).abs() < 1e-15 && (standard_error.unwrap() - (10.0f64 / 12.0).sqrt()).abs() < 1e-15
        );
        weighted.add(3.0, 1.0);
        assert_eq!(weighted.estimate().standard_error, None);
        weighted.add(1.0, 5.0);
        assert_eq!(weighted.estimate().mean, 2.0);
    }

    #[test]
    fn images_are_brought_to_their_levels() {
        for i in 0..=255u16 {
            let x = f32::from(i) / 255.0 * 2.0 - 1.0;
            assert!((level(x) - x).abs() < 1e-6 && (level(x + 0.003) - x).abs() < 1e-6, "{i}");
        }
        assert_eq!((level(-1.0), level(1.0), level(7.0)), (-1.0, 1.0, 1.0));
    }
}
