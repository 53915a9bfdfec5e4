//! Denoising images with known noise.

use super::invalid;
use crate::buffers::{X, X_0};
use crate::denoiser::Denoiser;
use crate::error::{Error, Result};
use crate::process::Prediction;
use crate::sampler::{NoiseKey, SampleStep, Sampler, SamplerOptions, Spacing, Threshold};
use crate::sampler::{SamplerState, axpby};
use crate::schedule::{Level, Schedule};
use ddpm_rng::Purpose;

/// Removes normal noise of known standard deviation from images `y = x_0 + s n`: `alpha y` is a noisy image
/// at the level with `sigma / alpha = s` (Ho et al. 2020, eq. 4).
///
/// Standard deviations are fractions of the range from black to white: 0.1 is 25.5 of 255, and s = 0.2 for
/// values in [-1, 1].
pub struct Denoise {
    /// The noise in `y`.
    noise: f64,
    level: Level,
    method: Method,
}

enum Method {
    Expected(Threshold),
    Sampled(Box<dyn Sampler>),
}

impl Denoise {
    /// A single evaluation: the posterior mean `E[x_0 | y]`, which minimizes the expected squared error.
    ///
    /// # Errors
    /// [`Error::Option`] for a standard deviation below 0 or beyond the schedule's.
    pub fn expected(schedule: &Schedule, sigma: f64, threshold: Threshold) -> Result<Self> {
        let noise = noise(schedule, sigma)?;
        Ok(Self { noise, level: schedule.level_for_sigma(noise), method: Method::Expected(threshold) })
    }

    /// Many steps: a sample from the posterior. The sampler starts at its lowest level with at least this
    /// much noise, and the difference is added to the image.
    ///
    /// # Errors
    /// Those of [`expected`](Self::expected) and [`SamplerOptions::build`].
    pub fn sampled(
        options: SamplerOptions,
        schedule: &Schedule,
        prediction: Prediction,
        sigma: f64,
    ) -> Result<Self> {
        // Check everything but sigma gaps, which depend on the truncated schedule.
        let spacing = options.spacing.filter(|&spacing| spacing != Spacing::Sigma);
        SamplerOptions { spacing, ..options }.build(schedule, prediction)?;
        let noise = noise(schedule, sigma)?;
        for n in 1..=schedule.timesteps_with_signal() {
            if schedule.level((n - 1) as f64).karras_sigma() < noise {
                continue;
            }
            let steps = options.steps.or(options.sampler.steps).map(|steps| steps.min(n));
            let (options, part) = (SamplerOptions { steps, ..options }, schedule.truncated(n));
            let level = options.levels(&part, prediction)?.at(0);
            if level.karras_sigma() >= noise {
                return Ok(Self { noise, level, method: Method::Sampled(options.build(&part, prediction)?) });
            }
        }
        let reason = format!(
            "this spacing of {} starts with less noise than {sigma} of the image's range; use another spacing",
            options.sampler.name
        );
        Err(invalid("spacing", reason))
    }

    /// The level that the image is scaled and noised to.
    pub fn level(&self) -> Level {
        self.level
    }

    /// Denoises a batch of images.
    ///
    /// ```text
    /// x = alpha (y + sqrt(sigma^2 / alpha^2 - s^2) z)
    /// ```
    /// followed by one prediction of `x_0`, or by the sampler's steps; z is added only for a sampler.
    ///
    /// # Panics
    /// If `y` does not have the length of the denoiser's batches.
    pub fn apply(
        &self,
        denoiser: &mut dyn Denoiser,
        key: NoiseKey,
        y: &[f32],
        on_step: &mut dyn FnMut(SampleStep<'_>) -> Result<()>,
    ) -> Result<Vec<f32>> {
        if self.noise == 0.0 {
            return Ok(y.to_vec());
        }
        let mut x = y.to_vec();
        axpby(&mut x, self.level.alpha, []);
        match &self.method {
            Method::Expected(threshold) => {
                let mut d = SamplerState::new(Some(&x), denoiser, key, *threshold, 1, on_step)?;
                d.denoise(self.level)?;
                d.copy(X, X_0)?;
                d.step(self.level)?;
                d.finish()
            }
            Method::Sampled(sampler) => {
                let missing = (self.level.karras_sigma().powi(2) - self.noise * self.noise).max(0.0).sqrt();
                let mut z = vec![0.0; x.len()];
                key.fill(Purpose::SampleStart, 0, denoiser.image_len(), &mut z);
                axpby(&mut x, 1.0, [(self.level.alpha * missing, &z)]);
                sampler.sample_from(Some(&x), denoiser, key, on_step)
            }
        }
    }
}

/// The largest supported standard deviation, as a fraction of the range from black to white: the whole range,
/// beyond which a clipped image shows nothing, or the schedule's maximum if that is less.
pub fn max_noise(schedule: &Schedule) -> f64 {
    let sigma = schedule.level((schedule.timesteps_with_signal() - 1) as f64).karras_sigma();
    (sigma / 2.0).min(1.0)
}

/// Converts a standard deviation to values in [-1, 1] and checks its range.
fn noise(schedule: &Schedule, sigma: f64) -> Result<f64> {
    let max = max_noise(schedule);
    if !(0.0..=max).contains(&sigma) {
        let hint = match sigma {
            s if s > max && s / 255.0 <= max => format!(" (for 255 levels, give {s}/255)"),
            _ => String::new(),
        };
        let reason = format!(
            "{sigma} is out of range{hint}; give the noise's standard deviation as a fraction of the range from black to \
             white, such as 0.1 or 25/255, up to {} for this run",
            (max * 1e3).floor() / 1e3
        );
        return Err(Error::option("sigma", reason));
    }
    Ok(2.0 * sigma)
}

#[cfg(test)]
mod tests {
    use super::super::test_util::{Gaussian, schedule};
    use super::*;
    use crate::sampler::SAMPLERS;
    use ddpm_rng::Stream;

    fn normal(n: usize, index: u32) -> Vec<f32> {
        let mut z = vec![0.0; n];
        Stream::new(6, Purpose::Test, 0, index).fill_normal(&mut z);
        z
    }

    #[test]
    fn one_prediction_is_the_posteriors_mean() {
        let y = normal(2 * 50, 9);
        for prediction in Prediction::ALL {
            for sigma in [0.01, 0.1, 1.0] {
                let mut gaussian = Gaussian::correlated(50, prediction);
                let denoise = Denoise::expected(&schedule(), sigma, Threshold::None).unwrap();
                let key = NoiseKey { seed: 0, first: 0 };
                let mut seen = 0;
                let mut on_step = |step: SampleStep<'_>| {
                    seen += step.done;
                    Ok(())
                };
                let x_0 = denoise.apply(&mut gaussian, key, &y, &mut on_step).unwrap();
                assert_eq!(seen, 1);
                for (y, x_0) in y.chunks(2).zip(x_0.chunks(2)) {
                    let mean = gaussian.expected([0, 1].map(|i| f64::from(y[i])), 1.0, 2.0 * sigma);
                    for i in 0..2 {
                        // f32 rounding errors, divided by the schedule's smallest noise, 0.01.
                        assert!((f64::from(x_0[i]) - mean[i]).abs() < 1e-4, "{prediction} {sigma}");
                    }
                }
            }
        }
    }

    #[test]
    fn steps_sample_the_posterior_with_any_sampler_and_spacing() {
        // The mean of many samples from one noisy image is its posterior mean at the noise of the sampler's
        // first level, since the denoiser is linear here. Deterministic samplers have another mean.
        const N: usize = 2000;
        let (sigma, y) = (0.15, [0.9f32, 0.2]);
        for sampler in SAMPLERS {
            for &spacing in sampler.spacings {
                let options = SamplerOptions {
                    sampler,
                    steps: Some(60),
                    spacing: Some(spacing),
                    threshold: Some(Threshold::None),
                    eta: sampler.eta.map(|_| 1.0),
                    ..SamplerOptions::default()
                };
                let denoise = match Denoise::sampled(options, &schedule(), Prediction::Eps, sigma) {
                    Ok(denoise) => denoise,
                    Err(error) => {
                        // Too few steps for sigma spacing.
                        assert!(spacing == Spacing::Sigma, "{} {spacing}: {error}", sampler.name);
                        continue;
                    }
                };
                let ratio = denoise.level().karras_sigma();
                assert!((0.3..0.6).contains(&ratio), "{} {spacing}: {ratio}", sampler.name);
                if sampler.order.is_some() && sampler.name != "ddim" {
                    continue;
                }
                let mut gaussian = Gaussian::correlated(N, Prediction::Eps);
                let key = NoiseKey { seed: 4, first: 0 };
                let x_0 = denoise.apply(&mut gaussian, key, &y.repeat(N), &mut |_| Ok(())).unwrap();
                let mean = gaussian.expected(y.map(f64::from), 1.0, ratio);
                for i in 0..2 {
                    let m = x_0.iter().skip(i).step_by(2).map(|&x| f64::from(x)).sum::<f64>() / N as f64;
                    // The posterior's standard deviation is at most 0.24, so four standard errors are 0.021;
                    // the rest is for 60 steps.
                    assert!((m - mean[i]).abs() < 0.03, "{} {spacing}: {m} for {}", sampler.name, mean[i]);
                }
            }
        }
    }

    #[test]
    fn no_noise_changes_nothing_and_too_much_is_refused() {
        let y = [0.25, -0.5];
        for denoise in [
            Denoise::expected(&schedule(), 0.0, Threshold::Clip).unwrap(),
            Denoise::sampled(SamplerOptions::default(), &schedule(), Prediction::V, 0.0).unwrap(),
        ] {
            let mut gaussian = Gaussian::correlated(1, Prediction::V);
            let key = NoiseKey { seed: 4, first: 0 };
            assert_eq!(denoise.apply(&mut gaussian, key, &y, &mut |_| Ok(())).unwrap(), y);
        }
        for bad in [-0.1, f64::NAN, 1e3, 25.0, 1.001] {
            let error = Denoise::expected(&schedule(), bad, Threshold::Clip).err().unwrap().to_string();
            assert!(error.contains("sigma: ") && error.contains("up to 1 for this run"), "{error}");
            assert_eq!(error.contains("give 25/255"), bad == 25.0, "{error}");
        }
        // A truncated schedule has less noise.
        let short = schedule().truncated(200);
        let error = Denoise::expected(&short, 0.9, Threshold::Clip).err().unwrap().to_string();
        assert!(max_noise(&short) < 0.5 && error.contains("up to 0."), "{error}");
        let late = schedule().truncated(400);
        let quadratic = SamplerOptions {
            spacing: Some(Spacing::Quadratic),
            steps: Some(50),
            ..SamplerOptions::default()
        };
        let error = Denoise::sampled(quadratic, &late, Prediction::Eps, max_noise(&late)).err().unwrap();
        assert!(error.to_string().contains("use another spacing"), "{error}");
    }
}
