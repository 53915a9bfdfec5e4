//! Taking the noise from an image, which is what the network has learnt; and how much there is.

use super::refused;
use crate::denoiser::Denoiser;
use crate::error::{Error, Result};
use crate::process::Prediction;
use crate::sampler::drawing::{Drawing, X, X_0, blend};
use crate::sampler::{Options, SampleStep, Sampler, Seeds, Spacing, Threshold};
use crate::schedule::{Level, Schedule};
use ddpm_engine::rng::Purpose;

/// Takes normal noise of a known deviation from images `y = x_0 + s n`: `alpha y` is a noisy image at the level with
/// `sigma / alpha = s` (Ho et al. 2020, eq. 4).
///
/// Deviations are parts of the range from black to white: 0.1 is 25.5 of 255, and s = 0.2 of numbers in [-1, 1].
pub struct Denoise {
    /// The noise of `y`.
    noise: f64,
    level: Level,
    way: Way,
}

enum Way {
    Expected(Threshold),
    Sampled(Box<dyn Sampler>),
}

impl Denoise {
    /// One prediction: the mean of the images that it may have been, `E[x_0 | y]`, which has the least expected square of
    /// the error.
    ///
    /// # Errors
    /// [`Error::Config`] for a deviation below 0, or beyond the schedule's.
    pub fn expected(schedule: &Schedule, sigma: f64, threshold: Threshold) -> Result<Self> {
        let noise = noise(schedule, sigma)?;
        Ok(Self { noise, level: schedule.level_for_sigma(noise), way: Way::Expected(threshold) })
    }

    /// Many steps: one of the images that it may have been. The sampler begins at the first of its levels with as much noise,
    /// and what the image lacks there is added.
    ///
    /// # Errors
    /// As [`expected`](Self::expected) and [`Options::build`].
    pub fn sampled(
        options: Options,
        schedule: &Schedule,
        prediction: Prediction,
        sigma: f64,
    ) -> Result<Self> {
        // All but the gaps between sigmas, which are those of a part of the schedule.
        let spacing = options.spacing.filter(|&spacing| spacing != Spacing::Sigma);
        Options { spacing, ..options }.build(schedule, prediction)?;
        let noise = noise(schedule, sigma)?;
        for n in 1..=schedule.timesteps_with_signal() {
            if schedule.level((n - 1) as f64).ratio() < noise {
                continue;
            }
            let steps = options.steps.or(options.sampler.steps).map(|steps| steps.min(n));
            let (options, part) = (Options { steps, ..options }, schedule.first(n));
            let level = options.levels(&part, prediction)?.at(0);
            if level.ratio() >= noise {
                return Ok(Self { noise, level, way: Way::Sampled(options.build(&part, prediction)?) });
            }
        }
        let reason = format!(
            "this spacing of {}'s begins with less noise than {sigma} of the image's range; take another spacing",
            options.sampler.name
        );
        Err(refused("spacing", reason))
    }

    /// The level that the image is brought to.
    pub fn level(&self) -> Level {
        self.level
    }

    /// Takes the noise from a batch of noisy images.
    ///
    /// ```text
    /// x = alpha (y + sqrt(sigma^2 / alpha^2 - s^2) z)
    /// ```
    /// and one prediction of `x_0` from there, or the sampler's steps; z counts only where there is a sampler.
    ///
    /// # Panics
    /// If `y` is no batch of the denoiser.
    pub fn apply(
        &self,
        denoiser: &mut dyn Denoiser,
        seeds: Seeds,
        y: &[f32],
        on_step: &mut dyn FnMut(SampleStep<'_>) -> Result<()>,
    ) -> Result<Vec<f32>> {
        if self.noise == 0.0 {
            return Ok(y.to_vec());
        }
        let mut x = y.to_vec();
        blend(&mut x, self.level.alpha, []);
        match &self.way {
            Way::Expected(threshold) => {
                let mut d = Drawing::new(Some(&x), denoiser, seeds, *threshold, 1, on_step)?;
                d.denoise(self.level)?;
                d.copy(X, X_0)?;
                d.step(self.level)?;
                d.finish()
            }
            Way::Sampled(sampler) => {
                let lacking = (self.level.ratio().powi(2) - self.noise * self.noise).max(0.0).sqrt();
                let mut z = vec![0.0; x.len()];
                seeds.fill(Purpose::SampleStart, 0, denoiser.image_len(), &mut z);
                blend(&mut x, 1.0, [(self.level.alpha * lacking, &z)]);
                sampler.sample_from(Some(&x), denoiser, seeds, on_step)
            }
        }
    }
}

/// The largest deviation that noise is taken of, as a part of the range from black to white: the range itself, beyond which
/// nothing is left of an image that is held within it, or the most that the schedule has if that is less.
pub fn most_noise(schedule: &Schedule) -> f64 {
    let most = schedule.level((schedule.timesteps_with_signal() - 1) as f64).ratio();
    (most / 2.0).min(1.0)
}

/// The deviation of values in [-1, 1], where the schedule has as much.
fn noise(schedule: &Schedule, sigma: f64) -> Result<f64> {
    let most = most_noise(schedule);
    if !(0.0..=most).contains(&sigma) {
        let meant = match sigma {
            s if s > most && s / 255.0 <= most => format!(" ({s}/255 is meant where it is of 255 levels)"),
            _ => String::new(),
        };
        let reason = format!(
            "{sigma} is out of range{meant}; give the noise's standard deviation as a part of the range from black to white, as \
             0.1 or 25/255, up to {} for this run",
            (most * 1e3).floor() / 1e3
        );
        return Err(Error::Config { key: "sigma".to_owned(), reason });
    }
    Ok(2.0 * sigma)
}

#[cfg(test)]
mod tests {
    use super::super::support::{Gaussian, schedule};
    use super::*;
    use crate::sampler::SAMPLERS;
    use ddpm_engine::rng::Stream;

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
                let seeds = Seeds { seed: 0, first: 0 };
                let mut seen = 0;
                let mut on_step = |step: SampleStep<'_>| {
                    seen += step.done;
                    Ok(())
                };
                let x_0 = denoise.apply(&mut gaussian, seeds, &y, &mut on_step).unwrap();
                assert_eq!(seen, 1);
                for (y, x_0) in y.chunks(2).zip(x_0.chunks(2)) {
                    let mean = gaussian.expected([0, 1].map(|i| f64::from(y[i])), 1.0, 2.0 * sigma);
                    for i in 0..2 {
                        // f32's roundings, over the schedule's least noise, 0.01.
                        assert!((f64::from(x_0[i]) - mean[i]).abs() < 1e-4, "{prediction} {sigma}");
                    }
                }
            }
        }
    }

    #[test]
    fn steps_draw_from_the_posterior_whatever_the_sampler_and_spacing() {
        // The mean of many draws from one noisy image: that of its posterior with the noise of the sampler's first level, for
        // it is linear here. Flows draw nothing anew and have another.
        const N: usize = 2000;
        let (sigma, y) = (0.15, [0.9f32, 0.2]);
        for sampler in SAMPLERS {
            for &spacing in sampler.spacings {
                let options = Options {
                    sampler,
                    steps: Some(60),
                    spacing: Some(spacing),
                    threshold: Some(Threshold::None),
                    eta: sampler.eta.map(|_| 1.0),
                    ..Options::default()
                };
                let denoise = match Denoise::sampled(options, &schedule(), Prediction::Eps, sigma) {
                    Ok(denoise) => denoise,
                    Err(error) => {
                        // Of few steps it leaves gaps, and is refused by name.
                        assert!(spacing == Spacing::Sigma, "{} {spacing}: {error}", sampler.name);
                        continue;
                    }
                };
                let ratio = denoise.level().ratio();
                assert!((0.3..0.6).contains(&ratio), "{} {spacing}: {ratio}", sampler.name);
                if sampler.order.is_some() && sampler.name != "ddim" {
                    continue;
                }
                let mut gaussian = Gaussian::correlated(N, Prediction::Eps);
                let seeds = Seeds { seed: 4, first: 0 };
                let x_0 = denoise.apply(&mut gaussian, seeds, &y.repeat(N), &mut |_| Ok(())).unwrap();
                let mean = gaussian.expected(y.map(f64::from), 1.0, ratio);
                for i in 0..2 {
                    let m = x_0.iter().skip(i).step_by(2).map(|&x| f64::from(x)).sum::<f64>() / N as f64;
                    // The posterior's deviation is at most 0.24: four standard errors are 0.021; and 60 steps.
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
            Denoise::sampled(Options::default(), &schedule(), Prediction::V, 0.0).unwrap(),
        ] {
            let mut gaussian = Gaussian::correlated(1, Prediction::V);
            let seeds = Seeds { seed: 4, first: 0 };
            assert_eq!(denoise.apply(&mut gaussian, seeds, &y, &mut |_| Ok(())).unwrap(), y);
        }
        for bad in [-0.1, f64::NAN, 1e3, 25.0, 1.001] {
            let error = Denoise::expected(&schedule(), bad, Threshold::Clip).err().unwrap().to_string();
            assert!(error.contains("sigma: ") && error.contains("up to 1 for this run"), "{error}");
            assert_eq!(error.contains("(25/255 is meant"), bad == 25.0, "{error}");
        }
        // A schedule that ends early knows less noise.
        let short = schedule().first(200);
        let error = Denoise::expected(&short, 0.9, Threshold::Clip).err().unwrap().to_string();
        assert!(most_noise(&short) < 0.5 && error.contains("up to 0."), "{error}");
        let late = schedule().first(400);
        let quadratic = Options { spacing: Some(Spacing::Quadratic), steps: Some(50), ..Options::default() };
        let error = Denoise::sampled(quadratic, &late, Prediction::Eps, most_noise(&late)).err().unwrap();
        assert!(error.to_string().contains("take another spacing"), "{error}");
    }
}
