//! Song, Meng, Ermon, "Denoising Diffusion Implicit Models", ICLR 2021.

use super::drawing::{Drawing, EPS, X, X_0, Z};
use super::{Levels, SampleStep, Sampler, Seeds, Threshold};
use crate::denoiser::Denoiser;
use crate::error::Result;
use crate::schedule::Posterior;

/// Steps of any length towards the expected image along the expected noise, with part of it drawn anew: none with eta = 0
/// (then the same noise gives the same image in any number of steps, nearly), as much as [`Ddpm`](super::Ddpm) with
/// eta = 1. Of order 1.
#[derive(Clone, Debug)]
pub struct Ddim {
    /// The levels that are visited.
    pub levels: Levels,
    /// Share of [`Ddpm`](super::Ddpm)'s noise, 0 to 1.
    pub eta: f64,
    /// What is done about expected images outside [-1, 1].
    pub threshold: Threshold,
    /// Where the threshold has changed `x_0`: whether the noise is what is left of `x_t` beside the changed one, as
    /// diffusers' argument of that name has it, or stays as it was predicted.
    pub use_clipped_model_output: bool,
}

impl Sampler for Ddim {
    /// With `alpha` for the paper's `sqrt(alpha)`:
    /// ```text
    /// sigma_t = eta sqrt(beta_tilde_t)                                                              (eq. 16)
    /// x_{t-1} = alpha_{t-1} x_0 + sqrt(1 - alpha_{t-1}^2 - sigma_t^2) eps_theta(x_t) + sigma_t z    (eq. 12)
    /// ```
    /// With [`use_clipped_model_output`](Self::use_clipped_model_output) and a threshold, the noise follows from the changed
    /// `x_0`: `(x_t - alpha_t x_0) / sigma_t`. docs/sampling.md has both measured.
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
            if self.use_clipped_model_output && self.threshold != Threshold::None {
                d.noise_beside_image(from)?;
            } else {
                d.predict_eps(from)?;
            }
            let variance = self.eta * self.eta * Posterior::between(from, to).variance;
            let direction = (to.sigma * to.sigma - variance).max(0.0).sqrt();
            d.blend(X, 0.0, [(to.alpha, X_0), (direction, EPS)])?;
            if variance > 0.0 {
                d.draw_noise()?;
                d.blend(X, 1.0, [(variance.sqrt(), Z)])?;
            }
            d.step(from)?;
        }
        d.finish()
    }
}
