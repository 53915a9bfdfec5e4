//! Liu, Ren, Lin, Zhao, "Pseudo Numerical Methods for Diffusion Models on Manifolds", ICLR 2022.

use super::registry::SamplerInfo;
use super::state::SamplerState;
use super::{Levels, Sampler, Spacing, Threshold};
use crate::buffers::{BufferId, EPS, X, X_0, scratch};
use crate::error::Result;
use crate::schedule::Level;

/// Adams-Bashforth weights of the last 1, 2, 3 or 4 noise predictions, newest first (eq. 12).
const WEIGHTS: [&[f64]; 4] = [
    &[1.0],
    &[3.0 / 2.0, -1.0 / 2.0],
    &[23.0 / 12.0, -16.0 / 12.0, 5.0 / 12.0],
    &[55.0 / 24.0, -59.0 / 24.0, 37.0 / 24.0, -9.0 / 24.0],
];
/// Runge-Kutta steps before four noise predictions are available.
const WARM_UP: usize = WEIGHTS.len() - 1;

/// Classical ODE methods with the paper's transfer function (DDIM's step) in place of the sum. Timesteps must
/// be evenly spaced and start where some signal is left: the transfer divides by alpha and every step
/// amplifies its rounding errors, so only [`Spacing::Uniform`](Spacing::Uniform) is supported. Order
/// 2.
#[derive(Clone, Debug)]
pub struct Pndm {
    /// Noise levels to visit.
    pub levels: Levels,
    /// Whether the first three steps are Runge-Kutta steps with four evaluations each ("F-PNDM"); otherwise
    /// they use the predictions available so far, and the first step takes two evaluations (PLMS of latent
    /// diffusion, as in diffusers).
    pub warm_up: bool,
    /// Treatment of predicted images outside [-1, 1].
    pub threshold: Threshold,
}

/// The last noise predictions, in any order; a step's mean noise; its start; and its most recent prediction.
const HISTORY: [BufferId; WEIGHTS.len()] = [scratch(0), scratch(1), scratch(2), scratch(3)];
const MEAN: BufferId = scratch(4);
const START: BufferId = scratch(5);
const LAST: BufferId = EPS;

/// The transfer phi(x, eps, t, t') (eq. 11): moves x along the noise to another level.
fn transfer(d: &mut SamplerState<'_>, eps: BufferId, from: Level, to: Level) -> Result<()> {
    let scale = to.alpha / from.alpha;
    d.axpby(X, scale, [(to.sigma - scale * from.sigma, eps)])
}

/// Sets `eps` to the noise predicted for x at a level, recomputed from the thresholded image.
fn noise(d: &mut SamplerState<'_>, eps: BufferId, level: Level) -> Result<()> {
    d.denoise(level)?;
    d.copy(eps, X)?;
    d.axpby(eps, 1.0 / level.sigma, [(-level.alpha / level.sigma, X_0)])
}

impl Pndm {
    /// A step's mean noise by the Runge-Kutta method, given its first prediction (eq. 13); x is at the step's
    /// start.
    fn runge_kutta(&self, d: &mut SamplerState<'_>, first: BufferId, from: Level, to: Level) -> Result<()> {
        let half = self.levels.midway(from, to);
        d.copy(START, X)?;
        d.copy(MEAN, first)?;
        d.copy(LAST, first)?;
        for (level, weight) in [(half, 2.0), (half, 2.0), (to, 1.0)] {
            d.copy(X, START)?;
            transfer(d, LAST, from, level)?;
            noise(d, LAST, level)?;
            d.axpby(MEAN, 1.0, [(weight, LAST)])?;
        }
        d.copy(X, START)?;
        d.axpby(MEAN, 1.0 / 6.0, [])
    }

    /// The mean of the noise at the step's two ends (Heun's method).
    fn heun_mean(&self, d: &mut SamplerState<'_>, first: BufferId, from: Level, to: Level) -> Result<()> {
        d.copy(START, X)?;
        transfer(d, first, from, to)?;
        noise(d, MEAN, to)?;
        d.copy(X, START)?;
        d.axpby(MEAN, 0.5, [(0.5, first)])
    }
}

pub(super) const PNDM: SamplerInfo = SamplerInfo {
    steps: Some(50),
    order: Some(2),
    spacings: &[Spacing::Uniform],
    ..SamplerInfo::new("pndm", "pseudo numerical methods, nine extra evaluations (Liu et al. 2022)", |args| {
        Box::new(Pndm { levels: args.levels, warm_up: true, threshold: args.threshold })
    })
};

pub(super) const PLMS: SamplerInfo = SamplerInfo {
    steps: Some(50),
    order: Some(2),
    spacings: &[Spacing::Uniform],
    ..SamplerInfo::new("plms", "pndm without the Runge-Kutta warm-up (latent diffusion)", |args| {
        Box::new(Pndm { levels: args.levels, warm_up: false, threshold: args.threshold })
    })
};

impl Sampler for Pndm {
    fn levels(&self) -> &Levels {
        &self.levels
    }

    fn threshold(&self) -> Threshold {
        self.threshold
    }

    /// ```text
    /// e  = eps(x_t), and those of the previous steps
    /// e' = (55 e_t - 59 e_(t+1) + 37 e_(t+2) - 9 e_(t+3)) / 24                         (eq. 12)
    /// x  = phi(x_t, e', t, t - 1)                                                      (eq. 11)
    /// ```
    fn run(&self, d: &mut SamplerState<'_>) -> Result<()> {
        let mut history: Vec<BufferId> = Vec::new();
        for (i, (from, to)) in self.levels.pairs().enumerate() {
            let newest = HISTORY[i % HISTORY.len()];
            noise(d, newest, from)?;
            history.insert(0, newest);
            history.truncate(HISTORY.len());
            let has_noise = to.sigma > 0.0;
            if self.warm_up && i < WARM_UP && has_noise {
                self.runge_kutta(d, newest, from, to)?;
            } else if !self.warm_up && i == 0 && has_noise {
                self.heun_mean(d, newest, from, to)?;
            } else {
                d.clear(MEAN)?;
                for (&eps, &weight) in history.iter().zip(WEIGHTS[history.len() - 1]) {
                    d.axpby(MEAN, 1.0, [(weight, eps)])?;
                }
            }
            transfer(d, MEAN, from, to)?;
            d.step(from)?;
        }
        Ok(())
    }
}
