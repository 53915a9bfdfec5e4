//! Ancestral sampling: Ho, Jain, Abbeel, "Denoising Diffusion Probabilistic Models", NeurIPS 2020, algorithm 2.

use super::{SampleStep, Sampler, Seeds};
use crate::denoiser::Denoiser;
use crate::error::{Error, Result};
use crate::process::{posterior_mean, predict_x0};
use crate::schedule::Schedule;
use ddpm_engine::rng::Purpose;

/// Ancestral sampling with the posterior's variance, `sigma_t^2 = beta_tilde_t`, one of the two choices of section 3.2;
/// in all T steps, or in fewer.
///
/// Fewer steps are a schedule of their own: at the chosen timesteps it has the `alpha_bar` of the full one, and from
/// these its variances follow (Nichol, Dhariwal, "Improved Denoising Diffusion Probabilistic Models", 2021, eq. 19).
#[derive(Clone, Debug)]
pub struct Ddpm {
    /// The timesteps of the full schedule that are visited, rising.
    timesteps: Vec<usize>,
    /// The schedule of the visited timesteps.
    schedule: Schedule,
    clip: bool,
}

impl Ddpm {
    /// Sampling in `steps` steps (at most T; `None`: T), evenly spaced from the first timestep to the last. With
    /// `clip` the expected picture is held within [-1, 1], where pictures live, at every step.
    ///
    /// A last timestep that leaves nothing of the picture ([`Schedule::zero_terminal_snr`]) is not visited: the noise
    /// that it would be rid of says nothing about the picture. There is one step fewer then.
    ///
    /// # Errors
    /// [`Error::Config`] for no steps, or more than the schedule has.
    pub fn new(schedule: &Schedule, steps: Option<usize>, clip: bool) -> Result<Self> {
        let all = schedule.timesteps_with_signal();
        let steps = steps.unwrap_or(all);
        if steps == 0 || steps > all {
            let reason = format!("{steps} steps: the schedule allows 1 to {all}");
            return Err(Error::Config { key: "steps".to_owned(), reason });
        }
        let timesteps: Vec<usize> = match steps {
            1 => vec![all - 1],
            _ => (0..steps).map(|i| (i * (all - 1) + (steps - 1) / 2) / (steps - 1)).collect(),
        };
        let mut before = 1.0;
        let beta = timesteps.iter().map(|&t| {
            let beta = 1.0 - schedule.alpha_bar(t) / before;
            before = schedule.alpha_bar(t);
            beta
        });
        let whole = steps == schedule.timesteps();
        let schedule = if whole { schedule.clone() } else { Schedule::from_betas(beta.collect())? };
        Ok(Self { timesteps, schedule, clip })
    }

    /// Number of steps.
    pub fn steps(&self) -> usize {
        self.timesteps.len()
    }
}

impl Sampler for Ddpm {
    /// ```text
    /// x_T ~ N(0, I)
    /// for t = T-1, .., 0:
    ///     x_0     = (x_t - sqrt(1 - alpha_bar_t) eps_theta(x_t, t)) / sqrt(alpha_bar_t)        (eq. 15)
    ///     x_{t-1} = mu_tilde_t(x_t, x_0) + sqrt(beta_tilde_t) z,   z ~ N(0, I), z = 0 at t = 0 (eq. 7)
    /// ```
    /// Without clipping, the two equations put into one are line 4 of algorithm 2 (eq. 11). The algorithm as printed
    /// does not clip; the authors' program does.
    fn sample(
        &self,
        denoiser: &mut dyn Denoiser,
        seeds: Seeds,
        on_step: &mut dyn FnMut(SampleStep<'_>) -> Result<()>,
    ) -> Result<Vec<f32>> {
        let (picture, steps) = (denoiser.picture_len(), self.steps());
        let mut x = vec![0.0; denoiser.batch() * picture];
        let (mut eps, mut x_0, mut mean, mut z) = (x.clone(), x.clone(), x.clone(), x.clone());
        seeds.fill(Purpose::SampleStart, 0, picture, &mut x);
        for i in (0..steps).rev() {
            let t = self.timesteps[i];
            denoiser.predict(&x, t, &mut eps)?;
            predict_x0(&self.schedule, i, &x, &eps, self.clip, &mut x_0)?;
            posterior_mean(&self.schedule, i, &x_0, &x, &mut mean);
            if i > 0 {
                let sigma = self.schedule.posterior(i).variance.sqrt() as f32;
                seeds.fill(Purpose::SampleNoise, t as u32, picture, &mut z);
                for ((x, mean), z) in x.iter_mut().zip(&mean).zip(&z) {
                    *x = mean + sigma * z;
                }
            } else {
                x.copy_from_slice(&mean);
            }
            on_step(SampleStep { t, done: steps - i, steps, x: &x, x_0: &x_0 })?;
        }
        Ok(x)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::config::{DiffusionConfig, ScheduleKind};

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
        for steps in [None, Some(1), Some(2), Some(37)] {
            let sampler = Ddpm::new(&schedule(), steps, true).expect("a sampler");
            let x =
                sampler.sample(&mut point, Seeds { seed: 1, first: 0 }, &mut |_| Ok(())).expect("samples");
            assert!(x.iter().all(|v| (v - 0.37).abs() < 1e-4), "{steps:?}: {x:?}");
        }
    }

    #[test]
    fn every_schedule_finds_the_picture_in_any_number_of_steps() {
        for kind in ScheduleKind::ALL {
            for zero_terminal_snr in [false, true] {
                let config = DiffusionConfig { schedule: kind, zero_terminal_snr, ..Default::default() };
                let schedule = Schedule::from_config(&config).expect("a schedule");
                let most = schedule.timesteps_with_signal();
                assert_eq!(most, 1000 - usize::from(zero_terminal_snr));
                let mut point = Point { schedule: schedule.clone(), mean: 0.37, batch: 5 };
                for steps in [2, 37, 500, most] {
                    let sampler = Ddpm::new(&schedule, Some(steps), true).expect("a sampler");
                    assert_eq!((sampler.steps(), sampler.timesteps.last()), (steps, Some(&(most - 1))));
                    let x = sampler
                        .sample(&mut point, Seeds { seed: 1, first: 0 }, &mut |_| Ok(()))
                        .expect("samples");
                    assert!(x.iter().all(|v| (v - 0.37).abs() < 1e-4), "{kind}, {steps} steps: {x:?}");
                }
                assert!(Ddpm::new(&schedule, Some(most + 1), true).is_err(), "{kind}");
                assert_eq!(Ddpm::new(&schedule, None, true).expect("a sampler").steps(), most);
            }
        }
    }

    #[test]
    fn a_gaussian_comes_out_with_its_variance() {
        let (n, variance) = (20_000, 0.25);
        let mut gaussian = Gaussian { schedule: schedule(), variance, batch: n };
        let sampler = Ddpm::new(&schedule(), None, false).expect("a sampler");
        let x = sampler.sample(&mut gaussian, Seeds { seed: 4, first: 0 }, &mut |_| Ok(())).expect("samples");
        let measured = x.iter().map(|v| f64::from(v * v)).sum::<f64>() / n as f64;
        // Four standard errors of a variance from n samples, and the discretisation: beta_tilde is the right variance
        // for a point, which makes a Gaussian's samples slightly too narrow.
        let error = 4.0 * variance * (2.0 / n as f64).sqrt() + 0.01 * variance;
        assert!((measured - variance).abs() < error, "{measured} for {variance}");
    }

    #[test]
    fn fewer_steps_keep_the_schedules_ends_and_signal() {
        let full = schedule();
        for steps in [1, 2, 3, 50, 999, 1000] {
            let sampler = Ddpm::new(&full, Some(steps), true).expect("a sampler");
            assert_eq!(sampler.steps(), steps);
            assert!(sampler.timesteps.windows(2).all(|w| w[0] < w[1]));
            assert_eq!(sampler.timesteps.last(), Some(&999));
            for (i, &t) in sampler.timesteps.iter().enumerate() {
                // 1 - beta is rounded to f64::EPSILON, which counts against what is left of the signal.
                let tolerance = 2.0 * f64::EPSILON * steps as f64 / full.alpha_bar(t);
                assert!((sampler.schedule.alpha_bar(i) / full.alpha_bar(t) - 1.0).abs() <= tolerance);
            }
        }
        assert!(Ddpm::new(&full, Some(0), true).is_err() && Ddpm::new(&full, Some(1001), true).is_err());
    }

    #[test]
    fn a_picture_does_not_depend_on_its_batch() {
        let sampler = Ddpm::new(&schedule(), None, false).expect("a sampler");
        let draw = |batch, first| {
            let mut g = Gaussian { schedule: schedule(), variance: 0.3, batch };
            sampler.sample(&mut g, Seeds { seed: 9, first }, &mut |_| Ok(())).expect("samples")
        };
        let all = draw(6, 0);
        assert_eq!(all[2..5], draw(3, 2)[..]);
        assert_eq!(all[5..], draw(1, 5)[..]);
    }
}
