//! Liu, Ren, Lin, Zhao, "Pseudo Numerical Methods for Diffusion Models on Manifolds", ICLR 2022.

use super::drawing::{Drawing, EPS, X, X_0, own};
use super::{Levels, SampleStep, Sampler, Seeds, Threshold};
use crate::denoiser::Denoiser;
use crate::error::Result;
use crate::schedule::Level;
use ddpm_engine::Vector;

/// The weights of the last 1, 2, 3 or 4 noises, the newest first (Adams and Bashforth; eq. 12).
const WEIGHTS: [&[f64]; 4] = [
    &[1.0],
    &[3.0 / 2.0, -1.0 / 2.0],
    &[23.0 / 12.0, -16.0 / 12.0, 5.0 / 12.0],
    &[55.0 / 24.0, -59.0 / 24.0, 37.0 / 24.0, -9.0 / 24.0],
];
/// Steps by Runge and Kutta's method until there are four noises.
const WARM_UP: usize = WEIGHTS.len() - 1;

/// Known methods for differential equations, with the paper's transfer (DDIM's step) in the place of the sum. Timesteps
/// must be evenly spaced, and begin where something is left of the image: the transfer divides by it, and its roundings
/// are multiplied in every step, so that only [`Spacing::Uniform`](super::Spacing::Uniform) is taken. Of order 2.
#[derive(Clone, Debug)]
pub struct Pndm {
    /// The levels that are visited.
    pub levels: Levels,
    /// Whether the first three steps are Runge and Kutta's with four predictions each ("F-PNDM"); else they look back on as
    /// many noises as there are, and the first has two predictions (PLMS of latent diffusion, as in diffusers).
    pub warm_up: bool,
    /// What is done about expected images outside [-1, 1].
    pub threshold: Threshold,
}

/// The last noises, in any order; the mean of a step's; its start; and the last one within it.
const PAST: [Vector; WEIGHTS.len()] = [own(0), own(1), own(2), own(3)];
const MEAN: Vector = own(4);
const START: Vector = own(5);
const LAST: Vector = EPS;

/// The transfer phi(x, eps, t, t') (eq. 11): x along the noise to another level.
fn transfer(d: &mut Drawing<'_>, eps: Vector, from: Level, to: Level) -> Result<()> {
    let scale = to.alpha / from.alpha;
    d.blend(X, scale, [(to.sigma - scale * from.sigma, eps)])
}

/// Makes `eps` the noise that the network expects of x at a level; that of the expected image within bounds.
fn noise(d: &mut Drawing<'_>, eps: Vector, level: Level) -> Result<()> {
    d.denoise(level)?;
    d.copy(eps, X)?;
    d.blend(eps, 1.0 / level.sigma, [(-level.alpha / level.sigma, X_0)])
}

impl Pndm {
    /// The mean noise of a step by Runge and Kutta's method, whose first is known (eq. 13); x is at the step's start.
    fn runge_kutta(&self, d: &mut Drawing<'_>, first: Vector, from: Level, to: Level) -> Result<()> {
        let half = self.levels.midway(from, to);
        d.copy(START, X)?;
        d.copy(MEAN, first)?;
        d.copy(LAST, first)?;
        for (level, weight) in [(half, 2.0), (half, 2.0), (to, 1.0)] {
            d.copy(X, START)?;
            transfer(d, LAST, from, level)?;
            noise(d, LAST, level)?;
            d.blend(MEAN, 1.0, [(weight, LAST)])?;
        }
        d.copy(X, START)?;
        d.blend(MEAN, 1.0 / 6.0, [])
    }

    /// The mean of the noises at the step's two ends (Heun's method).
    fn two_ends(&self, d: &mut Drawing<'_>, first: Vector, from: Level, to: Level) -> Result<()> {
        d.copy(START, X)?;
        transfer(d, first, from, to)?;
        noise(d, MEAN, to)?;
        d.copy(X, START)?;
        d.blend(MEAN, 0.5, [(0.5, first)])
    }
}

impl Sampler for Pndm {
    /// ```text
    /// e  = eps(x_t), and those of the steps before
    /// e' = (55 e_t - 59 e_(t+1) + 37 e_(t+2) - 9 e_(t+3)) / 24                         (eq. 12)
    /// x  = phi(x_t, e', t, t - 1)                                                      (eq. 11)
    /// ```
    fn sample_from(
        &self,
        start: Option<&[f32]>,
        denoiser: &mut dyn Denoiser,
        seeds: Seeds,
        on_step: &mut dyn FnMut(SampleStep<'_>) -> Result<()>,
    ) -> Result<Vec<f32>> {
        let mut d = Drawing::new(start, denoiser, seeds, self.threshold, self.levels.steps(), on_step)?;
        let mut past: Vec<Vector> = Vec::new();
        for (i, (from, to)) in self.levels.pairs().enumerate() {
            let newest = PAST[i % PAST.len()];
            noise(&mut d, newest, from)?;
            past.insert(0, newest);
            past.truncate(PAST.len());
            let inside = to.sigma > 0.0;
            if self.warm_up && i < WARM_UP && inside {
                self.runge_kutta(&mut d, newest, from, to)?;
            } else if !self.warm_up && i == 0 && inside {
                self.two_ends(&mut d, newest, from, to)?;
            } else {
                d.clear(MEAN)?;
                for (&eps, &weight) in past.iter().zip(WEIGHTS[past.len() - 1]) {
                    d.blend(MEAN, 1.0, [(weight, eps)])?;
                }
            }
            transfer(&mut d, MEAN, from, to)?;
            d.step(from)?;
        }
        d.finish()
    }
}
