//! Ancestral sampling: Ho, Jain, Abbeel, "Denoising Diffusion Probabilistic Models", NeurIPS 2020, algorithm 2.

use super::drawing::{Drawing, blend};
use super::{Levels, SampleStep, Sampler, Seeds, Threshold};
use crate::denoiser::Denoiser;
use crate::error::Result;
use crate::schedule::Posterior;
use serde::{Deserialize, Serialize};

/// The variance of a step's noise, `sigma_t^2`: the two choices of section 3.2, the best ones for the two extremes of data,
/// and the bounds of what is best for any.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Variance {
    /// `beta_tilde_t`, the posterior's: right for a single picture.
    #[default]
    Small,
    /// `beta_t`: right for pictures that are noise themselves.
    Large,
}

/// Ancestral sampling, in all T steps or in fewer.
///
/// Fewer steps are a schedule of their own: at the chosen timesteps it has the `alpha_bar` of the full one, and from
/// these its variances follow (Nichol, Dhariwal, "Improved Denoising Diffusion Probabilistic Models", 2021, eq. 19).
#[derive(Clone, Debug)]
pub struct Ddpm {
    /// The levels that are visited.
    pub levels: Levels,
    /// The variance of a step.
    pub variance: Variance,
    /// What is done about expected pictures outside [-1, 1].
    pub threshold: Threshold,
}

impl Sampler for Ddpm {
    /// ```text
    /// x_T ~ N(0, I)
    /// for t = T-1, .., 0:
    ///     x_0     = (x_t - sqrt(1 - alpha_bar_t) eps_theta(x_t, t)) / sqrt(alpha_bar_t)        (eq. 15)
    ///     x_{t-1} = mu_tilde_t(x_t, x_0) + sigma_t z,   z ~ N(0, I), z = 0 at t = 0            (eq. 7)
    /// ```
    /// Without a threshold, the two equations put into one are line 4 of algorithm 2 (eq. 11). The algorithm as printed
    /// does not clip; the authors' program does.
    fn sample_from(
        &self,
        start: Option<&[f32]>,
        denoiser: &mut dyn Denoiser,
        seeds: Seeds,
        on_step: &mut dyn FnMut(SampleStep<'_>) -> Result<()>,
    ) -> Result<Vec<f32>> {
        let mut d = Drawing::new(start, denoiser, seeds, self.threshold, self.levels.steps(), on_step);
        for (from, to) in self.levels.pairs() {
            d.denoise(from)?;
            let posterior = Posterior::between(from, to);
            blend(&mut d.x, posterior.xt, [(posterior.x0, &d.x_0)]);
            if to.sigma > 0.0 {
                let variance = match self.variance {
                    Variance::Small => posterior.variance,
                    Variance::Large => 1.0 - (from.alpha / to.alpha).powi(2),
                };
                d.draw_noise();
                blend(&mut d.x, 1.0, [(variance.sqrt(), &d.z)]);
            }
            d.step(from)?;
        }
        Ok(d.x)
    }
}
