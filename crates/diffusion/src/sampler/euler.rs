//! Euler's method on the time axis of Karras, Aittala, Aila, Laine, "Elucidating the Design Space of
//! Diffusion-Based Generative Models", NeurIPS 2022, where time is the noise s of an unscaled image y; and
//! k-diffusion's ancestral variant.

use super::registry::{KARRAS_FIRST, SamplerInfo};
use super::state::SamplerState;
use super::{Levels, Sampler, Threshold};
use crate::buffers::{X, X_0, Z};
use crate::error::Result;

/// Straight steps towards the predicted image; with eta above 0 they overshoot to a lower noise level and add
/// fresh noise. Order 1. With eta = 0 it equals [`Ddim`](super::Ddim), except that a threshold changes its
/// direction too.
#[derive(Clone, Debug)]
pub struct Euler {
    /// Noise levels to visit.
    pub levels: Levels,
    /// Fraction of the noise that ancestral steps resample, 0 to 1.
    pub eta: f64,
    /// Treatment of predicted images outside [-1, 1].
    pub threshold: Threshold,
}

pub(super) const EULER: SamplerInfo = SamplerInfo {
    steps: Some(50),
    order: Some(1),
    spacings: &KARRAS_FIRST,
    ..SamplerInfo::new("euler", "Euler's method: DDIM on Karras et al.'s time axis (2022)", |args| {
        Box::new(Euler { levels: args.levels, eta: 0.0, threshold: args.threshold })
    })
};

pub(super) const EULER_ANCESTRAL: SamplerInfo = SamplerInfo {
    steps: Some(50),
    eta: Some(1.0),
    spacings: &KARRAS_FIRST,
    ..SamplerInfo::new(
        "euler-ancestral",
        "Euler's method with fresh noise, scaled by eta (k-diffusion)",
        |args| Box::new(Euler { levels: args.levels, eta: args.eta, threshold: args.threshold }),
    )
};

impl Sampler for Euler {
    fn levels(&self) -> &Levels {
        &self.levels
    }

    fn threshold(&self) -> Threshold {
        self.threshold
    }

    /// With `y = x / alpha`, `s = sigma / alpha`:
    /// ```text
    /// s_up   = eta s' sqrt(1 - s'^2 / s^2),   s_down = sqrt(s'^2 - s_up^2)
    /// y'     = y + (s_down - s) (y - x_0) / s + s_up z                                  (algorithm 1, lines 4 and 5)
    /// ```
    fn run(&self, d: &mut SamplerState<'_>) -> Result<()> {
        for (from, to) in self.levels.pairs() {
            d.denoise(from)?;
            let (s, next) = (from.karras_sigma(), to.karras_sigma());
            let up = self.eta * next * (1.0 - (next / s).powi(2)).sqrt();
            let down = (next * next - up * up).max(0.0).sqrt();
            // The coefficients of y' hold for x' too, since y = x / alpha.
            let fraction = 1.0 - down / s;
            d.axpby(X, to.alpha / from.alpha * (1.0 - fraction), [(to.alpha * fraction, X_0)])?;
            if up > 0.0 {
                d.sample_noise()?;
                d.axpby(X, 1.0, [(to.alpha * up, Z)])?;
            }
            d.step(from)?;
        }
        Ok(())
    }
}
