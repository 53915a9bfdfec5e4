//! Song, Meng, Ermon, "Denoising Diffusion Implicit Models", ICLR 2021.

use super::registry::{SamplerInfo, TRAILING_FIRST};
use super::state::SamplerState;
use super::{Levels, Sampler, Threshold};
use crate::buffers::{EPS, X, X_0, Z};
use crate::error::Result;
use crate::schedule::Posterior;

/// Steps of any length towards the predicted image along the predicted noise, part of which is resampled:
/// none with eta = 0 (the same starting noise then gives nearly the same image in any number of steps), as
/// much as [`Ddpm`](super::Ddpm) with eta = 1. Order 1.
#[derive(Clone, Debug)]
pub struct Ddim {
    /// Noise levels to visit.
    pub levels: Levels,
    /// Fraction of [`Ddpm`](super::Ddpm)'s noise, 0 to 1.
    pub eta: f64,
    /// Treatment of predicted images outside [-1, 1].
    pub threshold: Threshold,
    /// When the threshold has changed `x_0`: whether eps is recomputed from `x_t` and the changed `x_0`, like
    /// diffusers' argument of that name, or kept as predicted.
    pub use_clipped_model_output: bool,
}

pub(super) const DDIM: SamplerInfo = SamplerInfo {
    steps: Some(50),
    order: Some(1),
    spacings: &TRAILING_FIRST,
    eta: Some(0.0),
    handles_zero_snr: true,
    clipped_output: true,
    ..SamplerInfo::new(
        "ddim",
        "deterministic in any number of steps; eta adds noise (Song et al. 2021)",
        |args| {
            Box::new(Ddim {
                levels: args.levels,
                eta: args.eta,
                threshold: args.threshold,
                use_clipped_model_output: args.use_clipped_model_output,
            })
        },
    )
};

impl Sampler for Ddim {
    fn levels(&self) -> &Levels {
        &self.levels
    }

    fn threshold(&self) -> Threshold {
        self.threshold
    }

    /// With `alpha` for the paper's `sqrt(alpha)`:
    /// ```text
    /// sigma_t = eta sqrt(beta_tilde_t)                                                              (eq. 16)
    /// x_{t-1} = alpha_{t-1} x_0 + sqrt(1 - alpha_{t-1}^2 - sigma_t^2) eps_theta(x_t) + sigma_t z    (eq. 12)
    /// ```
    /// With [`use_clipped_model_output`](Self::use_clipped_model_output) and a threshold, eps is recomputed
    /// from the thresholded `x_0`: `(x_t - alpha_t x_0) / sigma_t`. Measurements of both: docs/sampling.md.
    fn run(&self, d: &mut SamplerState<'_>) -> Result<()> {
        for (from, to) in self.levels.pairs() {
            d.denoise(from)?;
            if self.use_clipped_model_output && self.threshold != Threshold::None {
                d.recompute_eps(from)?;
            } else {
                d.predict_eps(from)?;
            }
            let variance = self.eta * self.eta * Posterior::between(from, to).variance;
            let direction = (to.sigma * to.sigma - variance).max(0.0).sqrt();
            d.axpby(X, 0.0, [(to.alpha, X_0), (direction, EPS)])?;
            if variance > 0.0 {
                d.sample_noise()?;
                d.axpby(X, 1.0, [(variance.sqrt(), Z)])?;
            }
            d.step(from)?;
        }
        Ok(())
    }
}
