//! Lu, Zhou, Bao, Chen, Li, Zhu, "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models", 2022.
//!
//! The expected image changes slowly along `lambda = ln(alpha / sigma)`; everything else of the way from noise to image
//! is solved exactly. With h for the step in lambda:
//! ```text
//! x_t = sigma_t / sigma_s x_s + alpha_t (1 - e^-h) D,   D of the expected images at s and before              (eq. 8, 9)
//! ```
//! The step to no noise, of infinite h, goes to the expected image itself.

use super::drawing::{Drawing, X, X_0, Z, own};
use super::{Levels, SampleStep, Sampler, Seeds, Threshold};
use crate::denoiser::Denoiser;
use crate::error::Result;
use crate::schedule::Level;

/// How much longer in lambda than the step before a step may be that looks back on it.
pub(super) const LONGEST: f64 = 3.5;

/// Algorithm 2, "2M": from two expected images, the last step's and this one's. Of order 2, one prediction a step.
#[derive(Clone, Debug)]
pub struct DpmSolver2M {
    /// The levels that are visited.
    pub levels: Levels,
    /// Whether noise is drawn anew: the solver of the diffusion SDE (appendix B, "SDE-DPM-Solver++(2M)").
    pub stochastic: bool,
    /// What is done about expected images outside [-1, 1].
    pub threshold: Threshold,
}

/// Algorithm 1, "2S": every second level is half-way to the next but one, and only improves the step there. Of order 2, one
/// prediction a level.
#[derive(Clone, Debug)]
pub struct DpmSolver2S {
    /// The levels that are visited.
    pub levels: Levels,
    /// What is done about expected images outside [-1, 1].
    pub threshold: Threshold,
}

/// The coefficients of `x_s` and of D.
fn coefficients(from: Level, to: Level) -> (f64, f64) {
    let h = to.lambda() - from.lambda();
    (to.sigma / from.sigma, to.alpha * -(-h).exp_m1())
}

/// The weight of the step before in D, `1 / (2 r)`; 0 where it is so much shorter than this one that looking back would do harm.
///
/// Lists that end at the first timestep end with such a step, as `linspace` in 20 steps does, from a sigma of 0.15 to one of 0.01
/// after one from 0.28: what the last two expected images differ by would count more than twice.
fn looking_back(before: Level, from: Level, to: Level) -> f64 {
    let [h_before, h] = [(before, from), (from, to)].map(|(from, to)| to.lambda() - from.lambda());
    if h <= LONGEST * h_before { h / (2.0 * h_before) } else { 0.0 }
}

impl Sampler for DpmSolver2M {
    /// ```text
    /// D = (1 + 1 / (2 r)) x_0 - 1 / (2 r) x_0 of the step before,   r = h of the step before / h
    /// x_t = sigma_t / sigma_s       x_s + alpha_t (1 - e^-h)   D                                       (ODE)
    /// x_t = sigma_t / sigma_s e^-h  x_s + alpha_t (1 - e^-2h)  D + sigma_t sqrt(1 - e^-2h) z           (SDE)
    /// ```
    /// The first step, the last, and one that is too long have `D = x_0`.
    fn sample_from(
        &self,
        start: Option<&[f32]>,
        denoiser: &mut dyn Denoiser,
        seeds: Seeds,
        on_step: &mut dyn FnMut(SampleStep<'_>) -> Result<()>,
    ) -> Result<Vec<f32>> {
        let mut d = Drawing::new(start, denoiser, seeds, self.threshold, self.levels.steps(), on_step)?;
        // The expected images of the step before; none before the first.
        let before = own(0);
        d.clear(before)?;
        let mut level_before = None;
        for (from, to) in self.levels.pairs() {
            d.denoise(from)?;
            let h = to.lambda() - from.lambda();
            let extra = match level_before {
                Some(before) if to.sigma > 0.0 => looking_back(before, from, to),
                _ => 0.0,
            };
            let (mut keep, mut gain) = coefficients(from, to);
            if self.stochastic {
                (keep, gain) = (keep * (-h).exp(), to.alpha * -(-2.0 * h).exp_m1());
            }
            d.blend(X, keep, [(gain * (1.0 + extra), X_0), (-gain * extra, before)])?;
            if self.stochastic && to.sigma > 0.0 {
                d.draw_noise()?;
                d.blend(X, 1.0, [(to.sigma * (-(-2.0 * h).exp_m1()).sqrt(), Z)])?;
            }
            d.copy(before, X_0)?;
            level_before = Some(from);
            d.step(from)?;
        }
        d.finish()
    }
}

impl Sampler for DpmSolver2S {
    /// From level s over m to t, with `r = h of (s, m) / h of (s, t)`:
    /// ```text
    /// x_m = sigma_m / sigma_s x_s + alpha_m (1 - e^-rh) x_0(x_s)
    /// D   = (1 - 1 / (2 r)) x_0(x_s) + 1 / (2 r) x_0(x_m)
    /// x_t = sigma_t / sigma_s x_s + alpha_t (1 - e^-h) D
    /// ```
    /// What has no level between it and no noise is done in single steps.
    fn sample_from(
        &self,
        start: Option<&[f32]>,
        denoiser: &mut dyn Denoiser,
        seeds: Seeds,
        on_step: &mut dyn FnMut(SampleStep<'_>) -> Result<()>,
    ) -> Result<Vec<f32>> {
        let steps = self.levels.steps();
        let mut d = Drawing::new(start, denoiser, seeds, self.threshold, steps, on_step)?;
        let (start, expected) = (own(0), own(1));
        let mut i = 0;
        while i < steps {
            let (s, m, t) = (self.levels.at(i), self.levels.at(i + 1), self.levels.at(i + 2));
            d.denoise(s)?;
            d.copy(start, X)?;
            d.copy(expected, X_0)?;
            let (keep, gain) = coefficients(s, m);
            d.blend(X, keep, [(gain, expected)])?;
            d.step(s)?;
            i += 1;
            if i + 1 < steps {
                d.denoise(m)?;
                let r = (m.lambda() - s.lambda()) / (t.lambda() - s.lambda());
                let half = 1.0 / (2.0 * r);
                let (keep, gain) = coefficients(s, t);
                let terms = [(keep, start), (gain * (1.0 - half), expected), (gain * half, X_0)];
                d.blend(X, 0.0, terms)?;
                d.step(m)?;
                i += 1;
            }
        }
        d.finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::Prediction;
    use crate::sampler::Spacing;
    use crate::schedule::Schedule;

    #[test]
    fn a_step_much_longer_than_the_one_before_does_not_look_back() {
        let schedule = Schedule::linear(1000, 1e-4, 0.02).unwrap();
        let alone = |spacing, steps| {
            let levels = Levels::new(&schedule, Prediction::Eps, Some(steps), spacing).unwrap();
            let weight = |i: usize| looking_back(levels.at(i - 1), levels.at(i), levels.at(i + 1));
            (1..steps - 1).filter(|&i| weight(i) == 0.0).collect::<Vec<_>>()
        };
        assert_eq!((alone(Spacing::Linspace, 10), alone(Spacing::Uniform, 20)), (vec![8], vec![18]));
        for steps in [5, 10, 20, 100] {
            for spacing in [Spacing::Karras, Spacing::Exponential, Spacing::Trailing] {
                assert_eq!(alone(spacing, steps), [0; 0], "{spacing}, {steps}");
            }
        }
        // Half of the steps' ratio, where they are alike.
        let levels = Levels::new(&schedule, Prediction::Eps, Some(20), Spacing::Exponential).unwrap();
        assert!((looking_back(levels.at(3), levels.at(4), levels.at(5)) - 0.5).abs() < 1e-9);
        // From where nothing is left, any step is short beside that which led there.
        let nothing = Level { t: 999.0, alpha: 0.0, sigma: 1.0 };
        assert_eq!(looking_back(nothing, levels.at(0), levels.at(1)), 0.0);
    }
}
