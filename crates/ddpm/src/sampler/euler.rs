//! Euler's method on the time axis of Karras, Aittala, Aila, Laine, "Elucidating the Design Space of Diffusion-Based
//! Generative Models", NeurIPS 2022, where time is the noise s of an image y that keeps its size; and its ancestral
//! variant, which is k-diffusion's.

use super::drawing::{Drawing, X, X_0, Z};
use super::{Levels, SampleStep, Sampler, Seeds, Threshold};
use crate::denoiser::Denoiser;
use crate::error::Result;

/// Straight steps towards the expected image; with eta above 0 they go further, to less noise, and noise is drawn anew.
/// Of order 1. With eta = 0 it is [`Ddim`](super::Ddim), but that a threshold bends its way too.
#[derive(Clone, Debug)]
pub struct Euler {
    /// The levels that are visited.
    pub levels: Levels,
    /// Share of the noise that ancestral steps draw anew, 0 to 1.
    pub eta: f64,
    /// What is done about expected images outside [-1, 1].
    pub threshold: Threshold,
}

impl Sampler for Euler {
    /// With `y = x / alpha`, `s = sigma / alpha`:
    /// ```text
    /// s_up   = eta s' sqrt(1 - s'^2 / s^2),   s_down = sqrt(s'^2 - s_up^2)
    /// y'     = y + (s_down - s) (y - x_0) / s + s_up z                                  (algorithm 1, lines 4 and 5)
    /// ```
    fn sample_from(
        &self,
        start: Option<&[f32]>,
        denoiser: &mut dyn Denoiser,
        seeds: Seeds,
        on_step: &mut dyn FnMut(SampleStep<'_>) -> Result<()>,
    ) -> Result<Vec<f32>> {
        let mut d = Drawing::new(start, denoiser, seeds, self.threshold, self.levels.steps(), on_step)?;
        for (from, to) in self.levels.pairs() {
            d.denoise(from)?;
            let (s, next) = (from.ratio(), to.ratio());
            let up = self.eta * next * (1.0 - (next / s).powi(2)).sqrt();
            let down = (next * next - up * up).max(0.0).sqrt();
            // The factors of y' are those of x', for y = x / alpha.
            let towards = 1.0 - down / s;
            d.blend(X, to.alpha / from.alpha * (1.0 - towards), [(to.alpha * towards, X_0)])?;
            if up > 0.0 {
                d.draw_noise()?;
                d.blend(X, 1.0, [(to.alpha * up, Z)])?;
            }
            d.step(from)?;
        }
        d.finish()
    }
}
