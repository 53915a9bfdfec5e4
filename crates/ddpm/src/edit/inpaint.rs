//! Lugmayr, Danelljan, Romero, Yu, Timofte, Van Gool, "RePaint: Inpainting using Denoising Diffusion Probabilistic Models",
//! CVPR 2022.

use super::refused;
use crate::denoiser::Denoiser;
use crate::error::Result;
use crate::sampler::drawing::{Drawing, X, Z, own};
use crate::sampler::{Levels, SampleStep, Seeds, Threshold, Variance, ancestral};
use crate::schedule::Level;
use ddpm_engine::rng::Purpose;

/// Fills a part of an image with what the network expects beside the rest. The known part is given to each step, noised to
/// its level; going back to more noise and down again ("resampling") lets the two parts agree.
#[derive(Clone, Debug)]
pub struct RePaint {
    /// The levels that are visited.
    pub levels: Levels,
    /// The paper's j: so many steps are taken back at once, at every j-th level. Algorithm 1 as printed has 1, the paper's
    /// experiments 10.
    pub jump: usize,
    /// The paper's r or U: how often each stretch of j steps is walked in all. 1 takes nothing back; the paper has 10.
    pub resamplings: usize,
    /// The variance of a step, as [`Ddpm`](crate::sampler::Ddpm) has it.
    pub variance: Option<Variance>,
    /// What is done about expected images outside [-1, 1].
    pub threshold: Threshold,
}

impl RePaint {
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) for numbers that mean nothing.
    pub fn check(&self) -> Result<()> {
        const MOST: usize = 1000;
        let steps = self.levels.steps();
        if self.resamplings == 0 || self.resamplings > MOST {
            let reason =
                format!("{} is out of range; give 1 (none) to {MOST}, 5 to 10 being usual", self.resamplings);
            return Err(refused("resamplings", reason));
        }
        if self.jump == 0 || (self.resamplings > 1 && self.jump >= steps) {
            let reason = match steps {
                1 => "a single step has nothing to go back to; take more steps, or 1 resampling".to_owned(),
                _ => format!("{} is out of range; of {steps} steps give 1 to {}", self.jump, steps - 1),
            };
            return Err(refused("jump", reason));
        }
        Ok(())
    }

    /// How often the network is asked.
    pub fn predictions(&self) -> usize {
        down(&self.walk())
    }

    /// The way, as the number of steps that are left at each of its places.
    fn walk(&self) -> Vec<usize> {
        let (steps, jump) = (self.levels.steps(), self.jump.max(1));
        let mut again = vec![0; steps + 1];
        for left in (1..=steps.saturating_sub(jump)).step_by(jump) {
            again[left] = self.resamplings.saturating_sub(1);
        }
        let (mut left, mut way) = (steps, vec![steps]);
        while left > 0 {
            if again[left] > 0 {
                again[left] -= 1;
                left += jump;
            } else {
                left -= 1;
            }
            way.push(left);
        }
        way
    }

    /// Fills each image of a batch in its own way. `x_0` is the one image and `unknown` says which of its numbers are to be
    /// filled; all others are in the result as they are in `x_0`.
    ///
    /// ```text
    /// x_T ~ N(0, I)
    /// for each level t, from the noisiest:
    ///     known   = alpha_{t-1} x_0 + sigma_{t-1} z                                                  (eq. 8a)
    ///     unknown ~ N(mu_tilde_t(x_t, x_0 as predicted), sigma_t^2)                                  (eq. 8b)
    ///     x_{t-1} = m known + (1 - m) unknown                                                        (eq. 8c)
    ///     at every j-th level, r - 1 times, back and down again:
    ///         x_{t-1+j} = alpha_{t-1+j} / alpha_{t-1} x_{t-1} + sqrt(1 - (alpha_{t-1+j} / alpha_{t-1})^2) z
    /// ```
    /// Where the steps back are taken is as in the authors' program (appendix B): from the last noisy level on, and never from the
    /// finished image (t > 1 in algorithm 1).
    ///
    /// # Errors
    /// As [`check`](Self::check), and what the denoiser and `on_step` give.
    ///
    /// # Panics
    /// If `x_0` or `unknown` is no image of the denoiser.
    pub fn fill(
        &self,
        denoiser: &mut dyn Denoiser,
        seeds: Seeds,
        x_0: &[f32],
        unknown: &[bool],
        on_step: &mut dyn FnMut(SampleStep<'_>) -> Result<()>,
    ) -> Result<Vec<f32>> {
        self.check()?;
        let len = denoiser.image_len();
        assert_eq!((x_0.len(), unknown.len()), (len, len), "image and mask have an image's length");
        let (way, steps) = (self.walk(), self.levels.steps());
        let level = |left: usize| -> Level { self.levels.at(steps - left) };
        let mut d = Drawing::new(None, denoiser, seeds, self.threshold, down(&way), on_step)?;
        let back = own(0);
        for (i, move_) in way.windows(2).enumerate() {
            let (from, to) = (level(move_[0]), level(move_[1]));
            if move_[1] > move_[0] {
                let keep = to.alpha / from.alpha;
                d.draw(back, Purpose::Resample, (way.len() - i) as u32)?;
                d.blend(X, keep, [((1.0 - keep * keep).sqrt(), back)])?;
                continue;
            }
            ancestral(&mut d, from, to, self.variance)?;
            d.change_x(Z, |x, z| {
                for (x, z) in x.chunks_mut(len.max(1)).zip(z.chunks(len.max(1))) {
                    for i in (0..len).filter(|&i| !unknown[i]) {
                        x[i] = (to.alpha * f64::from(x_0[i]) + to.sigma * f64::from(z[i])) as f32;
                    }
                }
            })?;
            d.step(from)?;
        }
        d.finish()
    }
}

/// The moves of a way that go to less noise.
fn down(way: &[usize]) -> usize {
    way.windows(2).filter(|w| w[1] < w[0]).count()
}

#[cfg(test)]
mod tests {
    use super::super::support::{Gaussian, schedule};
    use super::*;
    use crate::process::Prediction;
    use crate::sampler::{Ddpm, Sampler, Spacing};

    fn repaint(steps: usize, jump: usize, resamplings: usize) -> RePaint {
        let levels = Levels::new(&schedule(), Prediction::Eps, Some(steps), Spacing::Linspace).unwrap();
        RePaint { levels, jump, resamplings, variance: None, threshold: Threshold::None }
    }

    #[test]
    fn the_way_goes_back_at_every_jth_level() {
        assert_eq!(repaint(6, 2, 1).walk(), [6, 5, 4, 3, 2, 1, 0]);
        assert_eq!(repaint(6, 2, 2).walk(), [6, 5, 4, 3, 5, 4, 3, 2, 1, 3, 2, 1, 0]);
        assert_eq!(repaint(3, 1, 3).walk(), [3, 2, 3, 2, 3, 2, 1, 2, 1, 2, 1, 0]);
        // The paper's: 250 steps, j = r = 10, 24 places to go back from.
        assert_eq!(repaint(250, 10, 10).predictions(), 250 + 24 * 9 * 10);
        assert_eq!(repaint(250, 10, 10).walk().iter().filter(|&&left| left == 0).count(), 1);
        assert_eq!(repaint(1, 1, 1).walk(), [1, 0]);
    }

    #[test]
    fn numbers_that_mean_nothing_are_refused() {
        for (steps, jump, resamplings, part) in [
            (10, 0, 5, "jump: 0 is out of range; of 10 steps give 1 to 9"),
            (10, 10, 2, "jump: 10 is out of range"),
            (10, 2, 0, "resamplings: 0 is out of range; give 1 (none)"),
            (1, 1, 2, "jump: a single step has nothing to go back to"),
        ] {
            let error = repaint(steps, jump, resamplings).check().unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
        repaint(10, 10, 1).check().unwrap();
        repaint(10, 9, 2).check().unwrap();
    }

    #[test]
    fn what_is_filled_has_the_conditional_distribution_and_the_rest_stays() {
        // Two numbers of deviation 0.4 and correlation 0.9; the first is known. Then the second is normal with mean
        // 0.2 + 0.9 (0.5 - 0.1) = 0.56 and deviation 0.4 sqrt(1 - 0.81) = 0.174.
        const N: usize = 1000;
        let (known, mean, deviation) = (0.5f32, 0.56, 0.4 * (1.0f64 - 0.81).sqrt());
        for prediction in Prediction::ALL {
            let fill = |steps, jump, resamplings| {
                let mut gaussian = Gaussian::correlated(N, prediction);
                let seeds = Seeds { seed: 3, first: 0 };
                let made = repaint(steps, jump, resamplings)
                    .fill(&mut gaussian, seeds, &[known, f32::NAN], &[false, true], &mut |_| Ok(()))
                    .unwrap();
                assert!(made.chunks(2).all(|p| p[0] == known), "the known number is the same to the bit");
                let filled: Vec<f64> = made.chunks(2).map(|p| f64::from(p[1])).collect();
                let m = filled.iter().sum::<f64>() / N as f64;
                let v = filled.iter().map(|x| (x - m).powi(2)).sum::<f64>() / N as f64;
                println!("{prediction} {steps} {jump} {resamplings}: {m:.4} {:.4}", v.sqrt());
                (m, v.sqrt())
            };
            let (plain, _) = fill(250, 10, 1);
            let (m, d) = fill(250, 10, 10);
            // Without going back the parts do not agree: the mean stays near where it would be without the known one.
            assert!((plain - mean).abs() > 0.08, "{plain}");
            // Four standard errors of 1000 draws are 0.022, and 0.016 is what the paper's way leaves, for it noises the known
            // number anew at each step.
            assert!((m - mean).abs() < 0.038, "{prediction}: {m}");
            assert!((d / deviation - 1.0).abs() < 0.1, "{prediction}: {d} for {deviation}");
        }
    }

    /// Has learnt a variance.
    struct Learned(Gaussian, Vec<f32>);

    impl Denoiser for Learned {
        fn batch(&self) -> usize {
            self.0.batch()
        }

        fn image_len(&self) -> usize {
            self.0.image_len()
        }

        fn prediction(&self) -> Prediction {
            self.0.prediction()
        }

        fn predict(&mut self, x_t: &[f32], t: f64, output: &mut [f32]) -> Result<()> {
            self.0.predict(x_t, t, output)
        }

        fn variance(&self) -> Option<&[f32]> {
            Some(&self.1)
        }
    }

    #[test]
    fn a_filling_of_all_is_an_ancestral_sample_of_the_same_variance() {
        let mut all: Vec<Vec<f32>> = Vec::new();
        for variance in [None, Some(Variance::Small), Some(Variance::Large), Some(Variance::Learned)] {
            let repaint = RePaint { variance, ..repaint(10, 2, 1) };
            let mut denoiser = Learned(Gaussian::correlated(2, Prediction::Eps), vec![0.25; 4]);
            let seeds = Seeds { seed: 5, first: 0 };
            let filled = repaint.fill(&mut denoiser, seeds, &[f32::NAN; 2], &[true; 2], &mut |_| Ok(()));
            let sampler = Ddpm { levels: repaint.levels, variance, threshold: Threshold::None };
            let drawn = sampler.sample(&mut denoiser, seeds, &mut |_| Ok(())).unwrap();
            assert_eq!(filled.unwrap(), drawn, "{variance:?}");
            all.push(drawn);
        }
        assert!(all[0] == all[3] && all[0] != all[1] && all[0] != all[2] && all[1] != all[2]);
        let mut gaussian = Gaussian::correlated(1, Prediction::Eps);
        let repaint = RePaint { variance: Some(Variance::Learned), ..repaint(10, 2, 2) };
        let seeds = Seeds { seed: 5, first: 0 };
        let error = repaint.fill(&mut gaussian, seeds, &[0.0; 2], &[true; 2], &mut |_| Ok(()));
        assert!(error.unwrap_err().to_string().contains("learnt no variance"));
    }

    #[test]
    fn the_known_part_is_noised_with_plain_noise_whatever_variance_is_learnt() {
        let repaint = RePaint { variance: Some(Variance::Learned), ..repaint(10, 2, 1) };
        let mut denoiser = Learned(Gaussian::correlated(2, Prediction::Eps), vec![0.25; 4]);
        let seeds = Seeds { seed: 5, first: 0 };
        let mut seen = 0;
        let filled = repaint.fill(&mut denoiser, seeds, &[0.3, 0.0], &[false, true], &mut |step| {
            let (to, mut z) = (repaint.levels.at(step.done), [0.0; 4]);
            seeds.fill(Purpose::SampleNoise, (step.steps - step.done) as u32, 2, &mut z);
            for i in [0, 2] {
                let known = to.alpha * f64::from(0.3f32) + to.sigma * f64::from(z[i]);
                assert_eq!(step.x[i], known as f32, "step {}", step.done);
            }
            seen += 1;
            Ok(())
        });
        assert_eq!((filled.unwrap().len(), seen), (4, 10));
    }

    #[test]
    fn a_filling_depends_on_its_number_and_the_seed_alone() {
        let fill = |n, first| {
            let mut gaussian = Gaussian::correlated(n, Prediction::Eps);
            let seeds = Seeds { seed: 5, first };
            repaint(20, 4, 3)
                .fill(&mut gaussian, seeds, &[0.1, 0.0], &[false, true], &mut |_| Ok(()))
                .unwrap()
        };
        let four = fill(4, 0);
        assert_eq!(four[2..6], fill(2, 1)[..]);
        assert!(four[1] != four[3]);
    }
}
