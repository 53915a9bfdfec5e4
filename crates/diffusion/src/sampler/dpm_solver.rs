//! Lu, Zhou, Bao, Chen, Li, Zhu, "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models", 2022.
//!
//! The predicted image changes slowly along `lambda = ln(alpha / sigma)`; the rest of the ODE is solved
//! exactly. With h for the step in lambda:
//! ```text
//! x_t = sigma_t / sigma_s x_s + alpha_t (1 - e^-h) D,   D from the predicted images at s and before             (eq. 8, 9)
//! ```
//! The final step, with infinite h, lands on the predicted image itself.

use super::registry::{EXPONENTIAL_FIRST, KARRAS_FIRST, SamplerInfo};
use super::state::SamplerState;
use super::{Levels, Sampler, Threshold};
use crate::buffers::{X, X_0, Z, scratch};
use crate::error::Result;
use crate::schedule::Level;

/// Largest ratio of a step's length in lambda to the previous step's for which the multistep correction is
/// used.
pub(super) const MAX_STEP_RATIO: f64 = 3.5;

/// Algorithm 2, "2M": a multistep solver on the current and the previous predicted image. Order 2, one
/// evaluation per step.
#[derive(Clone, Debug)]
pub struct DpmSolver2M {
    /// Noise levels to visit.
    pub levels: Levels,
    /// Solve the diffusion SDE instead, with fresh noise in each step (appendix B, "SDE-DPM-Solver++(2M)").
    pub stochastic: bool,
    /// Treatment of predicted images outside [-1, 1].
    pub threshold: Threshold,
}

/// Algorithm 1, "2S": every second level is an intermediate point of a two-level step. Order 2, one
/// evaluation per level.
#[derive(Clone, Debug)]
pub struct DpmSolver2S {
    /// Noise levels to visit.
    pub levels: Levels,
    /// Treatment of predicted images outside [-1, 1].
    pub threshold: Threshold,
}

/// The coefficients of `x_s` and of D.
fn coefficients(from: Level, to: Level) -> (f64, f64) {
    let h = to.lambda() - from.lambda();
    (to.sigma / from.sigma, to.alpha * -(-h).exp_m1())
}

/// The weight of the previous step in D, `1 / (2 r)`; 0 if that step is so much shorter than this one that
/// the correction would do harm.
///
/// Level lists that end at timestep 0 end with such a step: `linspace` in 20 steps goes from sigma 0.28 to
/// 0.15 to 0.01, and the difference of the last two predicted images would be weighted by more than 2.
fn history_weight(before: Level, from: Level, to: Level) -> f64 {
    let [h_before, h] = [(before, from), (from, to)].map(|(from, to)| to.lambda() - from.lambda());
    if h <= MAX_STEP_RATIO * h_before { h / (2.0 * h_before) } else { 0.0 }
}

pub(super) const DPM_2M: SamplerInfo = SamplerInfo {
    steps: Some(20),
    order: Some(2),
    spacings: &EXPONENTIAL_FIRST,
    handles_zero_snr: true,
    ..SamplerInfo::new("dpm++2m", "DPM-Solver++(2M), good in 10 to 20 steps (Lu et al. 2022)", |args| {
        Box::new(DpmSolver2M { levels: args.levels, stochastic: false, threshold: args.threshold })
    })
};

pub(super) const DPM_2S: SamplerInfo = SamplerInfo {
    steps: Some(20),
    order: Some(2),
    spacings: &KARRAS_FIRST,
    ..SamplerInfo::new(
        "dpm++2s",
        "DPM-Solver++(2S), more stable with strong guidance (Lu et al. 2022)",
        |args| Box::new(DpmSolver2S { levels: args.levels, threshold: args.threshold }),
    )
};

pub(super) const DPM_2M_SDE: SamplerInfo = SamplerInfo {
    steps: Some(30),
    spacings: &EXPONENTIAL_FIRST,
    handles_zero_snr: true,
    ..SamplerInfo::new(
        "dpm++2m-sde",
        "SDE-DPM-Solver++(2M), good in 30 or more steps (Lu et al. 2022)",
        |args| Box::new(DpmSolver2M { levels: args.levels, stochastic: true, threshold: args.threshold }),
    )
};

impl Sampler for DpmSolver2M {
    fn levels(&self) -> &Levels {
        &self.levels
    }

    fn threshold(&self) -> Threshold {
        self.threshold
    }

    /// ```text
    /// D = (1 + 1 / (2 r)) x_0 - 1 / (2 r) x_0 of the step before,   r = h of the step before / h
    /// x_t = sigma_t / sigma_s       x_s + alpha_t (1 - e^-h)   D                                       (ODE)
    /// x_t = sigma_t / sigma_s e^-h  x_s + alpha_t (1 - e^-2h)  D + sigma_t sqrt(1 - e^-2h) z           (SDE)
    /// ```
    /// The first step, the last, and any that is too long use `D = x_0`.
    fn run(&self, d: &mut SamplerState<'_>) -> Result<()> {
        // The predicted images of the previous step; zero before the first.
        let previous = scratch(0);
        d.clear(previous)?;
        let mut previous_level = None;
        for (from, to) in self.levels.pairs() {
            d.denoise(from)?;
            let h = to.lambda() - from.lambda();
            let extra = match previous_level {
                Some(before) if to.sigma > 0.0 => history_weight(before, from, to),
                _ => 0.0,
            };
            let (mut keep, mut gain) = coefficients(from, to);
            if self.stochastic {
                (keep, gain) = (keep * (-h).exp(), to.alpha * -(-2.0 * h).exp_m1());
            }
            d.axpby(X, keep, [(gain * (1.0 + extra), X_0), (-gain * extra, previous)])?;
            if self.stochastic && to.sigma > 0.0 {
                d.sample_noise()?;
                d.axpby(X, 1.0, [(to.sigma * (-(-2.0 * h).exp_m1()).sqrt(), Z)])?;
            }
            d.copy(previous, X_0)?;
            previous_level = Some(from);
            d.step(from)?;
        }
        Ok(())
    }
}

impl Sampler for DpmSolver2S {
    fn levels(&self) -> &Levels {
        &self.levels
    }

    fn threshold(&self) -> Threshold {
        self.threshold
    }

    /// From level s over m to t, with `r = h of (s, m) / h of (s, t)`:
    /// ```text
    /// x_m = sigma_m / sigma_s x_s + alpha_m (1 - e^-rh) x_0(x_s)
    /// D   = (1 - 1 / (2 r)) x_0(x_s) + 1 / (2 r) x_0(x_m)
    /// x_t = sigma_t / sigma_s x_s + alpha_t (1 - e^-h) D
    /// ```
    /// A level with no intermediate level left before the end takes a single first-order step.
    fn run(&self, d: &mut SamplerState<'_>) -> Result<()> {
        let steps = self.levels.steps();
        let (start, start_x_0) = (scratch(0), scratch(1));
        let mut i = 0;
        while i < steps {
            let (s, m, t) = (self.levels.at(i), self.levels.at(i + 1), self.levels.at(i + 2));
            d.denoise(s)?;
            d.copy(start, X)?;
            d.copy(start_x_0, X_0)?;
            let (keep, gain) = coefficients(s, m);
            d.axpby(X, keep, [(gain, start_x_0)])?;
            d.step(s)?;
            i += 1;
            if i + 1 < steps {
                d.denoise(m)?;
                let r = (m.lambda() - s.lambda()) / (t.lambda() - s.lambda());
                let half = 1.0 / (2.0 * r);
                let (keep, gain) = coefficients(s, t);
                let terms = [(keep, start), (gain * (1.0 - half), start_x_0), (gain * half, X_0)];
                d.axpby(X, 0.0, terms)?;
                d.step(m)?;
                i += 1;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::Prediction;
    use crate::sampler::Spacing;
    use crate::schedule::Schedule;

    #[test]
    fn a_step_much_longer_than_the_previous_one_is_first_order() {
        let schedule = Schedule::linear(1000, 1e-4, 0.02).unwrap();
        let first_order = |spacing, steps| {
            let levels = Levels::new(&schedule, Prediction::Eps, Some(steps), spacing).unwrap();
            let weight = |i: usize| history_weight(levels.at(i - 1), levels.at(i), levels.at(i + 1));
            (1..steps - 1).filter(|&i| weight(i) == 0.0).collect::<Vec<_>>()
        };
        assert_eq!(
            (first_order(Spacing::Linspace, 10), first_order(Spacing::Uniform, 20)),
            (vec![8], vec![18])
        );
        for steps in [5, 10, 20, 100] {
            for spacing in [Spacing::Karras, Spacing::Exponential, Spacing::Trailing] {
                assert_eq!(first_order(spacing, steps), [0; 0], "{spacing}, {steps}");
            }
        }
        // Half the ratio of the steps, which are equally long.
        let levels = Levels::new(&schedule, Prediction::Eps, Some(20), Spacing::Exponential).unwrap();
        assert!((history_weight(levels.at(3), levels.at(4), levels.at(5)) - 0.5).abs() < 1e-9);
        // After a start without signal, the previous step was infinitely long.
        let nothing = Level { t: 999.0, alpha: 0.0, sigma: 1.0 };
        assert_eq!(history_weight(nothing, levels.at(0), levels.at(1)), 0.0);
    }
}
