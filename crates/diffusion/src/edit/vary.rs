//! Meng, He, Song, Song, Wu, Zhu, Ermon, "SDEdit: Guided Image Synthesis and Editing with Stochastic Differential
//! Equations", ICLR 2022.

use super::invalid;
use crate::denoiser::Denoiser;
use crate::error::Result;
use crate::process::Prediction;
use crate::sampler::axpby;
use crate::sampler::{NoiseKey, SampleStep, Sampler, SamplerOptions};
use crate::schedule::{Level, Schedule};
use ddpm_rng::Purpose;

/// Varies an image: noises it to a level and samples from there.
pub struct Vary {
    level: Level,
    /// `None` for strength 0.
    sampler: Option<Box<dyn Sampler>>,
}

impl Vary {
    /// A strength of `t_0 / T`, the paper's `t_0` (section 3): 0 returns the image, 1 samples from pure
    /// noise. In between, the sampler runs on the schedule's first `t_0` timesteps with a proportional number
    /// of steps; if its spacing leaves out the last of them, less noise is added.
    ///
    /// # Errors
    /// [`Error::Option`](crate::Error::Option) for a strength outside 0 to 1, and those of
    /// [`SamplerOptions::build`].
    pub fn new(
        options: SamplerOptions,
        schedule: &Schedule,
        prediction: Prediction,
        strength: f64,
    ) -> Result<Self> {
        if !(0.0..=1.0).contains(&strength) {
            let reason =
                format!("{strength} is out of range; give 0 (the image unchanged) to 1 (nothing of it left)");
            return Err(invalid("strength", reason));
        }
        let n = (strength * schedule.timesteps() as f64).round() as usize;
        if n == 0 {
            options.build(schedule, prediction)?;
            return Ok(Self { level: Level::CLEAN, sampler: None });
        }
        if n == schedule.timesteps() {
            let pure_noise = Level { t: (n - 1) as f64, alpha: 0.0, sigma: 1.0 };
            return Ok(Self { level: pure_noise, sampler: Some(options.build(schedule, prediction)?) });
        }
        let (options, part) = (options.truncated(n, schedule), schedule.truncated(n));
        let level = options.levels(&part, prediction)?.at(0);
        Ok(Self { level, sampler: Some(options.build(&part, prediction)?) })
    }

    /// The level that the image is noised to.
    pub fn level(&self) -> Level {
        self.level
    }

    /// Samples a batch of variations of one image.
    ///
    /// ```text
    /// x = alpha x_0 + sigma z,  z ~ N(0, I), and the sampler's steps from there              (algorithm 1 and 3)
    /// ```
    /// The noise is the one that sampling with the same seed starts from.
    ///
    /// # Panics
    /// If `x_0` does not have the length of one image of the denoiser.
    pub fn sample(
        &self,
        denoiser: &mut dyn Denoiser,
        key: NoiseKey,
        x_0: &[f32],
        on_step: &mut dyn FnMut(SampleStep<'_>) -> Result<()>,
    ) -> Result<Vec<f32>> {
        let len = denoiser.image_len();
        assert_eq!(x_0.len(), len, "x_0 has the length of one image");
        let mut x = vec![0.0; denoiser.batch() * len];
        key.fill(Purpose::SampleStart, 0, len, &mut x);
        for image in x.chunks_mut(len.max(1)) {
            axpby(image, self.level.sigma, [(self.level.alpha, x_0)]);
        }
        match &self.sampler {
            Some(sampler) => sampler.sample_from(Some(&x), denoiser, key, on_step),
            None => Ok(x),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::test_util::{Gaussian, schedule};
    use super::*;
    use crate::sampler::{SAMPLERS, Spacing, Threshold, find};

    fn options(name: &str, steps: usize) -> SamplerOptions {
        let (sampler, threshold) = (find(name).unwrap(), Some(Threshold::None));
        SamplerOptions { sampler, steps: Some(steps), threshold, ..SamplerOptions::default() }
    }

    fn vary(options: SamplerOptions, n: usize, x_0: [f32; 2], strength: f64) -> Vec<f32> {
        let mut gaussian = Gaussian::correlated(n, Prediction::Eps);
        let vary = Vary::new(options, &schedule(), Prediction::Eps, strength).unwrap();
        vary.sample(&mut gaussian, NoiseKey { seed: 2, first: 0 }, &x_0, &mut |_| Ok(())).unwrap()
    }

    #[test]
    fn strength_0_returns_the_image_and_1_samples_from_noise() {
        for sampler in SAMPLERS {
            let options = options(sampler.name, 20);
            assert_eq!(vary(options, 3, [0.3, -0.7], 0.0), [0.3, -0.7].repeat(3), "{}", sampler.name);
            let mut gaussian = Gaussian::correlated(3, Prediction::Eps);
            let sampler = options.build(&schedule(), Prediction::Eps).unwrap();
            let sampled =
                sampler.sample(&mut gaussian, NoiseKey { seed: 2, first: 0 }, &mut |_| Ok(())).unwrap();
            assert_eq!(vary(options, 3, [0.3, -0.7], 1.0), sampled, "{}", options.sampler.name);
        }
    }

    #[test]
    fn every_sampler_continues_from_the_level_to_the_posterior() {
        // The sum of the two values is normal with mean m and variance V = 2 v (1 + c), and gets noise of
        // variance n (both over alpha^2). With g = V / (V + n), the posterior of a noisy sum s' is N(m + g
        // (s' - m), (1 - g) V), s' having the mean s and the variance n; the probability flow multiplies s' -
        // m by sqrt(g).
        const N: usize = 4000;
        let x_0 = [0.7f32, 0.9];
        for sampler in SAMPLERS {
            let options = options(sampler.name, 200);
            let level = Vary::new(options, &schedule(), Prediction::Eps, 0.4).unwrap().level();
            let (v, noise) = (2.0 * 0.16 * 1.9, 2.0 * level.karras_sigma().powi(2));
            let g = v / (v + noise);
            let (gain, fresh) = if sampler.order.is_some() { (g.sqrt(), 0.0) } else { (g, (1.0 - g) * v) };
            let mean = 0.3 + gain * (1.6 - 0.3);
            let deviation = (fresh + gain * gain * noise).sqrt();
            let sums: Vec<f64> =
                vary(options, N, x_0, 0.4).chunks(2).map(|p| f64::from(p[0]) + f64::from(p[1])).collect();
            let m = sums.iter().sum::<f64>() / N as f64;
            let d = (sums.iter().map(|s| (s - m).powi(2)).sum::<f64>() / N as f64).sqrt();
            println!(
                "{:16} t = {:3}: {m:.4} for {mean:.4}, {d:.4} for {deviation:.4}",
                sampler.name, level.t
            );
            assert!((380.0..400.0).contains(&level.t), "{}: {}", sampler.name, level.t);
            // Four standard errors of 4000 samples, 0.04 and 0.03 here, plus a margin for 80 steps.
            assert!((m - mean).abs() < 4.0 * deviation / (N as f64).sqrt() + 0.01, "{}", sampler.name);
            assert!((d / deviation - 1.0).abs() < 0.06, "{}", sampler.name);
        }
    }

    #[test]
    fn strengths_out_of_range_are_refused_and_steps_are_proportional() {
        for bad in [-0.1, 1.1, f64::NAN] {
            let error = Vary::new(options("ddim", 50), &schedule(), Prediction::V, bad).err().unwrap();
            assert!(error.to_string().contains("strength: "), "{error}");
        }
        for (strength, max) in [(0.0, 1000), (0.5, 500)] {
            let error = Vary::new(options("ddim", 0), &schedule(), Prediction::V, strength).err().unwrap();
            let expected = format!("0 steps: the schedule allows 1 to {max}");
            assert!(error.to_string().contains(&expected), "{error}");
        }
        // Sigma gaps too wide from pure noise are fine from less noise.
        let sigma = SamplerOptions { spacing: Some(Spacing::Sigma), ..options("euler", 60) };
        assert!(Vary::new(sigma, &schedule(), Prediction::V, 0.3).is_ok());
        let error = Vary::new(sigma, &schedule(), Prediction::V, 1.0).err().unwrap().to_string();
        assert!(error.contains("sigma in 60 steps leaves gaps"), "{error}");
        for sampler in SAMPLERS {
            for (strength, steps) in [(0.0004, 0), (0.001, 1), (0.25, 5), (0.26, 6), (0.999, 20)] {
                let mut seen = 0;
                let vary =
                    Vary::new(options(sampler.name, 20), &schedule(), Prediction::X0, strength).unwrap();
                let mut gaussian = Gaussian::correlated(1, Prediction::X0);
                let key = NoiseKey { seed: 2, first: 0 };
                let on_step = &mut |_: SampleStep<'_>| {
                    seen += 1;
                    Ok(())
                };
                vary.sample(&mut gaussian, key, &[0.0; 2], on_step).unwrap();
                assert_eq!(seen, steps, "{} {strength}", sampler.name);
            }
        }
    }
}
