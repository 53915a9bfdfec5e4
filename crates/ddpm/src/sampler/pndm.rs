//! Liu, Ren, Lin, Zhao, "Pseudo Numerical Methods for Diffusion Models on Manifolds", ICLR 2022.

use super::drawing::{Drawing, blend};
use super::{Levels, SampleStep, Sampler, Seeds, Threshold};
use crate::denoiser::Denoiser;
use crate::error::Result;
use crate::schedule::Level;

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
/// must be evenly spaced, and begin where something is left of the picture: the transfer divides by it, and its roundings
/// are multiplied in every step, so that only [`Spacing::Uniform`](super::Spacing::Uniform) is taken. Of order 2.
#[derive(Clone, Debug)]
pub struct Pndm {
    /// The levels that are visited.
    pub levels: Levels,
    /// Whether the first three steps are Runge and Kutta's with four predictions each ("F-PNDM"); else they look back on as
    /// many noises as there are, and the first has two predictions (PLMS of latent diffusion, as in diffusers).
    pub warm_up: bool,
    /// What is done about expected pictures outside [-1, 1].
    pub threshold: Threshold,
}

/// The transfer phi(x, eps, t, t') (eq. 11): along the noise to another level.
fn transfer(x: &mut [f32], eps: &[f32], from: Level, to: Level) {
    let scale = to.alpha / from.alpha;
    blend(x, scale, [(to.sigma - scale * from.sigma, eps)]);
}

/// The noise that the network expects of a batch at a level; that of the expected picture within bounds.
fn noise(d: &mut Drawing<'_>, level: Level) -> Result<Vec<f32>> {
    d.denoise(level)?;
    let mut eps = d.x.clone();
    blend(&mut eps, 1.0 / level.sigma, [(-level.alpha / level.sigma, &d.x_0)]);
    Ok(eps)
}

impl Pndm {
    /// The mean noise of a step by Runge and Kutta's method, whose first is known (eq. 13); x is at the step's start.
    fn runge_kutta(&self, d: &mut Drawing<'_>, first: &[f32], from: Level, to: Level) -> Result<Vec<f32>> {
        let (start, half) = (d.x.clone(), self.levels.midway(from, to));
        let mut sum = first.to_vec();
        let mut last = first.to_vec();
        for (level, weight) in [(half, 2.0), (half, 2.0), (to, 1.0)] {
            d.x.copy_from_slice(&start);
            transfer(&mut d.x, &last, from, level);
            last = noise(d, level)?;
            blend(&mut sum, 1.0, [(weight, &last)]);
        }
        d.x.copy_from_slice(&start);
        blend(&mut sum, 1.0 / 6.0, []);
        Ok(sum)
    }

    /// The mean of the noises at the step's two ends (Heun's method).
    fn two_ends(&self, d: &mut Drawing<'_>, first: &[f32], from: Level, to: Level) -> Result<Vec<f32>> {
        let start = d.x.clone();
        transfer(&mut d.x, first, from, to);
        let mut mean = noise(d, to)?;
        d.x.copy_from_slice(&start);
        blend(&mut mean, 0.5, [(0.5, first)]);
        Ok(mean)
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
        let mut d = Drawing::new(start, denoiser, seeds, self.threshold, self.levels.steps(), on_step);
        let mut past: Vec<Vec<f32>> = Vec::new();
        for (i, (from, to)) in self.levels.pairs().enumerate() {
            let eps = noise(&mut d, from)?;
            past.insert(0, eps);
            past.truncate(WEIGHTS.len());
            let inside = to.sigma > 0.0;
            let mean = if self.warm_up && i < WARM_UP && inside {
                self.runge_kutta(&mut d, &past[0], from, to)?
            } else if !self.warm_up && i == 0 && inside {
                self.two_ends(&mut d, &past[0], from, to)?
            } else {
                let mut mean = vec![0.0; d.x.len()];
                for (eps, &weight) in past.iter().zip(WEIGHTS[past.len() - 1]) {
                    blend(&mut mean, 1.0, [(weight, eps)]);
                }
                mean
            };
            transfer(&mut d.x, &mean, from, to);
            d.step(from)?;
        }
        Ok(d.x)
    }
}
