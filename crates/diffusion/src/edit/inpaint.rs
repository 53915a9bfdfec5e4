//! Lugmayr, Danelljan, Romero, Yu, Timofte, Van Gool, "RePaint: Inpainting using Denoising Diffusion Probabilistic Models",
//! CVPR 2022.

use super::invalid;
use crate::buffers::{X, Z, scratch};
use crate::denoiser::Denoiser;
use crate::error::Result;
use crate::sampler::SamplerState;
use crate::sampler::{Levels, NoiseKey, SampleStep, Threshold, Variance, ancestral};
use crate::schedule::Level;
use ddpm_rng::Purpose;

/// Fills a part of an image consistently with the rest. At each step the known part is replaced by the
/// original, noised to that level; going back to more noise and down again ("resampling") harmonizes the two
/// parts.
#[derive(Clone, Debug)]
pub struct RePaint {
    /// Noise levels to visit.
    pub levels: Levels,
    /// The paper's jump length j: the number of steps to go back at once, at every j-th level. 1 in the
    /// published algorithm 1, 10 in the paper's experiments.
    pub jump: usize,
    /// The paper's r or U: how often each stretch of j steps is sampled. 1 never goes back; the paper uses
    /// 10.
    pub resamplings: usize,
    /// The variance of a step, as in [`Ddpm`](crate::sampler::Ddpm).
    pub variance: Option<Variance>,
    /// Treatment of predicted images outside [-1, 1].
    pub threshold: Threshold,
}

impl RePaint {
    /// # Errors
    /// [`Error::Option`](crate::Error::Option) for settings out of range.
    pub fn check(&self) -> Result<()> {
        const MAX_RESAMPLINGS: usize = 1000;
        let steps = self.levels.steps();
        if self.resamplings == 0 || self.resamplings > MAX_RESAMPLINGS {
            let reason = format!(
                "{} is out of range; give 1 (none) to {MAX_RESAMPLINGS}; 5 to 10 is usual",
                self.resamplings
            );
            return Err(invalid("resamplings", reason));
        }
        if self.jump == 0 || (self.resamplings > 1 && self.jump >= steps) {
            let reason = match steps {
                1 => "a single step has nothing to go back to; use more steps, or 1 resampling".to_owned(),
                _ => format!("{} is out of range; with {steps} steps give 1 to {}", self.jump, steps - 1),
            };
            return Err(invalid("jump", reason));
        }
        Ok(())
    }

    /// Number of network evaluations.
    pub fn predictions(&self) -> usize {
        down(&self.walk())
    }

    /// The path, as the number of steps left at each point.
    fn walk(&self) -> Vec<usize> {
        let (steps, jump) = (self.levels.steps(), self.jump.max(1));
        let mut repeats = vec![0; steps + 1];
        for left in (1..=steps.saturating_sub(jump)).step_by(jump) {
            repeats[left] = self.resamplings.saturating_sub(1);
        }
        let (mut left, mut path) = (steps, vec![steps]);
        while left > 0 {
            if repeats[left] > 0 {
                repeats[left] -= 1;
                left += jump;
            } else {
                left -= 1;
            }
            path.push(left);
        }
        path
    }

    /// Fills the image `x_0` once per image of a batch, each with its own noise. `unknown` marks the elements
    /// to fill; all others are returned unchanged.
    ///
    /// ```text
    /// x_T ~ N(0, I)
    /// for each level t, from the noisiest:
    ///     known   = alpha_{t-1} x_0 + sigma_{t-1} z                                                  (eq. 8a)
    ///     unknown ~ N(mu_tilde_t(x_t, predicted x_0), sigma_t^2)                                    (eq. 8b)
    ///     x_{t-1} = m known + (1 - m) unknown                                                        (eq. 8c)
    ///     at every j-th level, r - 1 times, back and down again:
    ///         x_{t-1+j} = alpha_{t-1+j} / alpha_{t-1} x_{t-1} + sqrt(1 - (alpha_{t-1+j} / alpha_{t-1})^2) z
    /// ```
    /// The levels to go back from follow the authors' code (appendix B): from the last noisy level on, and
    /// never from the finished image (t > 1 in algorithm 1).
    ///
    /// # Errors
    /// Those of [`check`](Self::check), the denoiser and `on_step`.
    ///
    /// # Panics
    /// If `x_0` or `unknown` does not have the length of one image of the denoiser.
    pub fn fill(
        &self,
        denoiser: &mut dyn Denoiser,
        key: NoiseKey,
        x_0: &[f32],
        unknown: &[bool],
        on_step: &mut dyn FnMut(SampleStep<'_>) -> Result<()>,
    ) -> Result<Vec<f32>> {
        self.check()?;
        let len = denoiser.image_len();
        assert_eq!((x_0.len(), unknown.len()), (len, len), "image and mask have an image's length");
        let (path, steps) = (self.walk(), self.levels.steps());
        let level = |left: usize| -> Level { self.levels.at(steps - left) };
        let mut d = SamplerState::new(None, denoiser, key, self.threshold, down(&path), on_step)?;
        let fresh = scratch(0);
        for (i, move_) in path.windows(2).enumerate() {
            let (from, to) = (level(move_[0]), level(move_[1]));
            if move_[1] > move_[0] {
                let keep = to.alpha / from.alpha;
                d.fill_normal(fresh, Purpose::Resample, (path.len() - i) as u32)?;
                d.axpby(X, keep, [((1.0 - keep * keep).sqrt(), fresh)])?;
                continue;
            }
            ancestral(&mut d, from, to, self.variance)?;
            let (mut x, z) = (d.values(X)?, d.values(Z)?);
            for (x, z) in x.chunks_mut(len.max(1)).zip(z.chunks(len.max(1))) {
                for i in (0..len).filter(|&i| !unknown[i]) {
                    x[i] = (to.alpha * f64::from(x_0[i]) + to.sigma * f64::from(z[i])) as f32;
                }
            }
            d.set_x(&x)?;
            d.step(from)?;
        }
        d.finish()
    }
}

/// The number of moves in a path that go to less noise.
fn down(path: &[usize]) -> usize {
    path.windows(2).filter(|w| w[1] < w[0]).count()
}

#[cfg(test)]
mod tests {
    use super::super::test_util::{Gaussian, schedule};
    use super::*;
    use crate::process::Prediction;
    use crate::sampler::{Ddpm, Sampler, Spacing};

    fn repaint(steps: usize, jump: usize, resamplings: usize) -> RePaint {
        let levels = Levels::new(&schedule(), Prediction::Eps, Some(steps), Spacing::Linspace).unwrap();
        RePaint { levels, jump, resamplings, variance: None, threshold: Threshold::None }
    }

    #[test]
    fn the_path_goes_back_at_every_jth_level() {
        assert_eq!(repaint(6, 2, 1).walk(), [6, 5, 4, 3, 2, 1, 0]);
        assert_eq!(repaint(6, 2, 2).walk(), [6, 5, 4, 3, 5, 4, 3, 2, 1, 3, 2, 1, 0]);
        assert_eq!(repaint(3, 1, 3).walk(), [3, 2, 3, 2, 3, 2, 1, 2, 1, 2, 1, 0]);
        // The paper's settings: 250 steps, j = r = 10, 24 levels to go back from.
        assert_eq!(repaint(250, 10, 10).predictions(), 250 + 24 * 9 * 10);
        assert_eq!(repaint(250, 10, 10).walk().iter().filter(|&&left| left == 0).count(), 1);
        assert_eq!(repaint(1, 1, 1).walk(), [1, 0]);
    }

    #[test]
    fn settings_out_of_range_are_refused() {
        for (steps, jump, resamplings, part) in [
            (10, 0, 5, "jump: 0 is out of range; with 10 steps give 1 to 9"),
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
    fn the_filled_part_has_the_conditional_distribution_and_the_rest_is_unchanged() {
        // Two values with standard deviation 0.4 and correlation 0.9; given the first, the second is normal
        // with mean 0.2 + 0.9 (0.5 - 0.1) = 0.56 and standard deviation 0.4 sqrt(1 - 0.81) = 0.174.
        const N: usize = 1000;
        let (known, mean, deviation) = (0.5f32, 0.56, 0.4 * (1.0f64 - 0.81).sqrt());
        for prediction in Prediction::ALL {
            let fill = |steps, jump, resamplings| {
                let mut gaussian = Gaussian::correlated(N, prediction);
                let key = NoiseKey { seed: 3, first: 0 };
                let result = repaint(steps, jump, resamplings)
                    .fill(&mut gaussian, key, &[known, f32::NAN], &[false, true], &mut |_| Ok(()))
                    .unwrap();
                assert!(result.chunks(2).all(|p| p[0] == known), "the known value is bit-identical");
                let filled: Vec<f64> = result.chunks(2).map(|p| f64::from(p[1])).collect();
                let m = filled.iter().sum::<f64>() / N as f64;
                let v = filled.iter().map(|x| (x - m).powi(2)).sum::<f64>() / N as f64;
                println!("{prediction} {steps} {jump} {resamplings}: {m:.4} {:.4}", v.sqrt());
                (m, v.sqrt())
            };
            let (plain, _) = fill(250, 10, 1);
            let (m, d) = fill(250, 10, 10);
            // Without going back the parts do not agree: the mean stays near the unconditional one.
            assert!((plain - mean).abs() > 0.08, "{plain}");
            // Four standard errors of 1000 samples are 0.022; 0.016 is the bias of the paper's method, which
            // adds fresh noise to the known value at each step.
            assert!((m - mean).abs() < 0.038, "{prediction}: {m}");
            assert!((d / deviation - 1.0).abs() < 0.1, "{prediction}: {d} for {deviation}");
        }
    }

    /// A denoiser with a learned variance.
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
    fn filling_the_whole_image_is_ancestral_sampling_with_the_same_variance() {
        let mut all: Vec<Vec<f32>> = Vec::new();
        for variance in [None, Some(Variance::Small), Some(Variance::Large), Some(Variance::Learned)] {
            let repaint = RePaint { variance, ..repaint(10, 2, 1) };
            let mut denoiser = Learned(Gaussian::correlated(2, Prediction::Eps), vec![0.25; 4]);
            let key = NoiseKey { seed: 5, first: 0 };
            let filled = repaint.fill(&mut denoiser, key, &[f32::NAN; 2], &[true; 2], &mut |_| Ok(()));
            let sampler = Ddpm { levels: repaint.levels, variance, threshold: Threshold::None };
            let sampled = sampler.sample(&mut denoiser, key, &mut |_| Ok(())).unwrap();
            assert_eq!(filled.unwrap(), sampled, "{variance:?}");
            all.push(sampled);
        }
        assert!(all[0] == all[3] && all[0] != all[1] && all[0] != all[2] && all[1] != all[2]);
        let mut gaussian = Gaussian::correlated(1, Prediction::Eps);
        let repaint = RePaint { variance: Some(Variance::Learned), ..repaint(10, 2, 2) };
        let key = NoiseKey { seed: 5, first: 0 };
        let error = repaint.fill(&mut gaussian, key, &[0.0; 2], &[true; 2], &mut |_| Ok(()));
        assert!(error.unwrap_err().to_string().contains("no learned variance"));
    }

    #[test]
    fn the_known_part_gets_standard_noise_with_any_learned_variance() {
        let repaint = RePaint { variance: Some(Variance::Learned), ..repaint(10, 2, 1) };
        let mut denoiser = Learned(Gaussian::correlated(2, Prediction::Eps), vec![0.25; 4]);
        let key = NoiseKey { seed: 5, first: 0 };
        let mut seen = 0;
        let filled = repaint.fill(&mut denoiser, key, &[0.3, 0.0], &[false, true], &mut |step| {
            let (to, mut z) = (repaint.levels.at(step.done), [0.0; 4]);
            key.fill(Purpose::SampleNoise, (step.steps - step.done) as u32, 2, &mut z);
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
    fn a_filling_depends_only_on_its_index_and_the_seed() {
        let fill = |n, first| {
            let mut gaussian = Gaussian::correlated(n, Prediction::Eps);
            let key = NoiseKey { seed: 5, first };
            repaint(20, 4, 3).fill(&mut gaussian, key, &[0.1, 0.0], &[false, true], &mut |_| Ok(())).unwrap()
        };
        let four = fill(4, 0);
        assert_eq!(four[2..6], fill(2, 1)[..]);
        assert!(four[1] != four[3]);
    }
}
