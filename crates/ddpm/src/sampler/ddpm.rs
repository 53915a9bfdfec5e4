//! Ancestral sampling: Ho, Jain, Abbeel, "Denoising Diffusion Probabilistic Models", NeurIPS 2020, algorithm 2.

use super::{SampleStep, Sampler, Seeds};
use crate::denoiser::Denoiser;
use crate::error::Result;
use crate::process::{posterior_mean, predict_x0};
use crate::schedule::Schedule;
use ddpm_engine::rng::Purpose;

/// All T steps, with the variance `beta_tilde_t` of the posterior.
#[derive(Clone, Debug)]
pub struct Ddpm {
    /// The schedule that the network was trained with.
    pub schedule: Schedule,
    /// Whether the expected picture is held within [-1, 1] at every step.
    pub clip: bool,
}

impl Sampler for Ddpm {
    /// ```text
    /// x_T ~ N(0, I)
    /// for t = T-1, .., 0:
    ///     x_0     = (x_t - sqrt(1 - alpha_bar_t) eps_theta(x_t, t)) / sqrt(alpha_bar_t)        (eq. 15)
    ///     x_{t-1} = mu_tilde_t(x_t, x_0) + sqrt(beta_tilde_t) z,   z ~ N(0, I), z = 0 at t = 0 (eq. 7)
    /// ```
    /// Without clipping this is line 4 of algorithm 2 (eq. 11) with the two equations put into one.
    fn sample(
        &self,
        denoiser: &mut dyn Denoiser,
        seeds: Seeds,
        on_step: &mut dyn FnMut(SampleStep<'_>) -> Result<()>,
    ) -> Result<Vec<f32>> {
        let (picture, steps) = (denoiser.picture_len(), self.schedule.timesteps());
        let mut x = vec![0.0; denoiser.batch() * picture];
        let (mut eps, mut x_0, mut mean, mut z) = (x.clone(), x.clone(), x.clone(), x.clone());
        seeds.fill(Purpose::SampleStart, 0, picture, &mut x);
        for t in (0..steps).rev() {
            denoiser.predict(&x, t, &mut eps)?;
            predict_x0(&self.schedule, t, &x, &eps, self.clip, &mut x_0);
            posterior_mean(&self.schedule, t, &x_0, &x, &mut mean);
            if t > 0 {
                let sigma = self.schedule.posterior(t).variance.sqrt() as f32;
                seeds.fill(Purpose::SampleNoise, t as u32, picture, &mut z);
                for ((x, mean), z) in x.iter_mut().zip(&mean).zip(&z) {
                    *x = mean + sigma * z;
                }
            } else {
                x.copy_from_slice(&mean);
            }
            on_step(SampleStep { t, done: steps - t, steps, x: &x, x_0: &x_0 })?;
        }
        Ok(x)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pictures are one number, drawn from N(mean, 0); then the best prediction of the noise is known exactly.
    struct Point {
        schedule: Schedule,
        mean: f32,
        batch: usize,
    }

    impl Denoiser for Point {
        fn batch(&self) -> usize {
            self.batch
        }

        fn picture_len(&self) -> usize {
            1
        }

        fn predict(&mut self, x_t: &[f32], t: usize, eps: &mut [f32]) -> Result<()> {
            let a = self.schedule.alpha_bar(t);
            for (eps, x) in eps.iter_mut().zip(x_t) {
                *eps = ((f64::from(*x) - a.sqrt() * f64::from(self.mean)) / (1.0 - a).sqrt()) as f32;
            }
            Ok(())
        }
    }

    /// N(0, variance): E[x_0 | x_t] = sqrt(alpha_bar) variance / (alpha_bar variance + 1 - alpha_bar) x_t.
    struct Gaussian {
        schedule: Schedule,
        variance: f64,
        batch: usize,
    }

    impl Denoiser for Gaussian {
        fn batch(&self) -> usize {
            self.batch
        }

        fn picture_len(&self) -> usize {
            1
        }

        fn predict(&mut self, x_t: &[f32], t: usize, eps: &mut [f32]) -> Result<()> {
            let a = self.schedule.alpha_bar(t);
            let shrink = (1.0 - a).sqrt() / (a * self.variance + 1.0 - a);
            for (eps, x) in eps.iter_mut().zip(x_t) {
                *eps = (shrink * f64::from(*x)) as f32;
            }
            Ok(())
        }
    }

    fn schedule() -> Schedule {
        Schedule::linear(1000, 1e-4, 0.02).expect("a schedule")
    }

    #[test]
    fn one_picture_is_found_again() {
        let mut point = Point { schedule: schedule(), mean: 0.37, batch: 5 };
        let sampler = Ddpm { schedule: schedule(), clip: true };
        let x = sampler.sample(&mut point, Seeds { seed: 1, first: 0 }, &mut |_| Ok(())).expect("samples");
        assert!(x.iter().all(|v| (v - 0.37).abs() < 1e-4), "{x:?}");
    }

    #[test]
    fn a_gaussian_comes_out_with_its_variance() {
        let (n, variance) = (20_000, 0.25);
        let mut gaussian = Gaussian { schedule: schedule(), variance, batch: n };
        let sampler = Ddpm { schedule: schedule(), clip: false };
        let x = sampler.sample(&mut gaussian, Seeds { seed: 4, first: 0 }, &mut |_| Ok(())).expect("samples");
        let measured = x.iter().map(|v| f64::from(v * v)).sum::<f64>() / n as f64;
        // Four standard errors of a variance from n samples, and the discretisation: beta_tilde is the right variance
        // for a point, which makes a Gaussian's samples slightly too narrow.
        let error = 4.0 * variance * (2.0 / n as f64).sqrt() + 0.01 * variance;
        assert!((measured - variance).abs() < error, "{measured} for {variance}");
    }

    #[test]
    fn a_picture_does_not_depend_on_its_batch() {
        let sampler = Ddpm { schedule: schedule(), clip: false };
        let draw = |batch, first| {
            let mut g = Gaussian { schedule: schedule(), variance: 0.3, batch };
            sampler.sample(&mut g, Seeds { seed: 9, first }, &mut |_| Ok(())).expect("samples")
        };
        let all = draw(6, 0);
        assert_eq!(all[2..5], draw(3, 2)[..]);
        assert_eq!(all[5..], draw(1, 5)[..]);
    }
}
