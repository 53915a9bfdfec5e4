//! Heun's method on the time axis of Karras, Aittala, Aila, Laine, "Elucidating the Design Space of Diffusion-Based
//! Generative Models", NeurIPS 2022, algorithm 1.

use super::drawing::{Drawing, X, X_0, own};
use super::{Levels, SampleStep, Sampler, Seeds, Threshold};
use crate::denoiser::Denoiser;
use crate::error::Result;

/// Each step is made with the mean of the slopes at its two ends. Of order 2, two predictions a step and one in the last.
#[derive(Clone, Debug)]
pub struct Heun {
    /// The levels that are visited.
    pub levels: Levels,
    /// What is done about expected pictures outside [-1, 1].
    pub threshold: Threshold,
}

impl Sampler for Heun {
    /// With `y = x / alpha`, `s = sigma / alpha`:
    /// ```text
    /// d  = (y - x_0(y, s)) / s,      y' = y + (s' - s) d
    /// d' = (y' - x_0(y', s')) / s',  y' = y + (s' - s) (d + d') / 2      where s' is not 0
    /// ```
    fn sample_from(
        &self,
        start: Option<&[f32]>,
        denoiser: &mut dyn Denoiser,
        seeds: Seeds,
        on_step: &mut dyn FnMut(SampleStep<'_>) -> Result<()>,
    ) -> Result<Vec<f32>> {
        let mut d = Drawing::new(start, denoiser, seeds, self.threshold, self.levels.steps(), on_step)?;
        let (start, expected) = (own(0), own(1));
        for (from, to) in self.levels.pairs() {
            d.denoise(from)?;
            d.copy(start, X)?;
            d.copy(expected, X_0)?;
            let (s, next, alpha) = (from.ratio(), to.ratio(), to.alpha);
            // The factors of y' are those of x', for y = x / alpha.
            let step = (next - s) / s;
            d.blend(X, alpha / from.alpha * (1.0 + step), [(-alpha * step, expected)])?;
            if next > 0.0 {
                d.denoise(to)?;
                let (half, there) = (0.5 * step, 0.5 * (next - s) / next);
                let slope = [(-alpha * half, expected), (-alpha * there, X_0)];
                d.blend(X, there, slope)?;
                d.blend(X, 1.0, [(alpha / from.alpha * (1.0 + half), start)])?;
            }
            d.step(from)?;
        }
        d.finish()
    }
}
