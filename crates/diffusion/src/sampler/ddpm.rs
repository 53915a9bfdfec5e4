//! Ancestral sampling: Ho, Jain, Abbeel, "Denoising Diffusion Probabilistic Models", NeurIPS 2020, algorithm 2.

use super::registry::SamplerInfo;
use super::state::SamplerState;
use super::{Levels, Sampler, Threshold};
use crate::buffers::{LEARNED, X, X_0, Z};
use crate::error::{Error, Result};
use crate::schedule::{Level, Posterior};
use serde::{Deserialize, Serialize};

/// The variance of a step's noise, `sigma_t^2`: the two choices of section 3.2, which are optimal for two
/// extreme kinds of data and bound the optimum for any other, or the learned variance between them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Variance {
    /// `beta_tilde_t`, the posterior's: optimal for data that is a single image.
    Small,
    /// `beta_t`: optimal for data that is standard normal noise.
    Large,
    /// The network's, per element, interpolated between the two in log space (Nichol, Dhariwal 2021, eq. 15).
    Learned,
}

impl Variance {
    /// Its name in the settings.
    pub fn name(self) -> &'static str {
        match self {
            Self::Small => "small",
            Self::Large => "large",
            Self::Learned => "learned",
        }
    }

    /// The error for requesting a learned variance from a network without one.
    pub fn not_learned() -> Error {
        let reason =
            "the network has no learned variance (diffusion.learned_variance = false); give small or large";
        Error::option("variance", reason)
    }
}

/// Ancestral sampling, in all T steps or fewer.
///
/// With fewer steps, the variances are recomputed from the full schedule's `alpha_bar` at the chosen
/// timesteps (Nichol, Dhariwal, "Improved Denoising Diffusion Probabilistic Models", 2021, eq. 19).
#[derive(Clone, Debug)]
pub struct Ddpm {
    /// Noise levels to visit.
    pub levels: Levels,
    /// The variance of a step; `None`: the learned one if the network has it, else the small one.
    pub variance: Option<Variance>,
    /// Treatment of predicted images outside [-1, 1].
    pub threshold: Threshold,
}

pub(super) const DDPM: SamplerInfo = SamplerInfo {
    variances: true,
    handles_zero_snr: true,
    ..SamplerInfo::new("ddpm", "ancestral sampling in all steps, as in the paper (Ho et al. 2020)", |args| {
        Box::new(Ddpm { levels: args.levels, variance: args.variance, threshold: args.threshold })
    })
};

impl Sampler for Ddpm {
    fn levels(&self) -> &Levels {
        &self.levels
    }

    fn threshold(&self) -> Threshold {
        self.threshold
    }

    /// ```text
    /// x_T ~ N(0, I)
    /// for t = T-1, .., 0:
    ///     x_0     = (x_t - sqrt(1 - alpha_bar_t) eps_theta(x_t, t)) / sqrt(alpha_bar_t)        (eq. 15)
    ///     x_{t-1} = mu_tilde_t(x_t, x_0) + sigma_t z,   z ~ N(0, I), z = 0 at t = 0            (eq. 7)
    /// ```
    /// Without a threshold the two equations combine to line 4 of algorithm 2 (eq. 11). The published
    /// algorithm does not clip; the authors' code does.
    fn run(&self, d: &mut SamplerState<'_>) -> Result<()> {
        for (from, to) in self.levels.pairs() {
            ancestral(d, from, to, self.variance)?;
            d.step(from)?;
        }
        Ok(())
    }
}

/// One iteration of [`Ddpm::sample_from`] without the step callback: evaluates the network, samples z and
/// moves to the lower noise level.
pub(crate) fn ancestral(
    d: &mut SamplerState<'_>,
    from: Level,
    to: Level,
    variance: Option<Variance>,
) -> Result<()> {
    d.denoise(from)?;
    d.sample_noise()?;
    let posterior = Posterior::between(from, to);
    d.axpby(X, posterior.xt, [(posterior.x0, X_0)])?;
    if to.sigma == 0.0 {
        return Ok(());
    }
    let (small, large) = (posterior.variance, 1.0 - (from.alpha / to.alpha).powi(2));
    let noise = match variance {
        None | Some(Variance::Learned) if d.learned_noise(small, large)? => (1.0, LEARNED),
        Some(Variance::Learned) => return Err(Variance::not_learned()),
        Some(Variance::Large) => (large.sqrt(), Z),
        Some(Variance::Small) | None => (small.sqrt(), Z),
    };
    d.axpby(X, 1.0, [noise])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::denoiser::Denoiser;
    use crate::process::Prediction;
    use crate::sampler::NoiseKey;
    use crate::sampler::Spacing;
    use crate::schedule::Schedule;

    /// Always predicts a grey image, with this learned variance.
    struct Grey(Option<Vec<f32>>);

    impl Denoiser for Grey {
        fn batch(&self) -> usize {
            1
        }

        fn image_len(&self) -> usize {
            64
        }

        fn prediction(&self) -> Prediction {
            Prediction::X0
        }

        fn predict(&mut self, _: &[f32], _: f64, output: &mut [f32]) -> Result<()> {
            output.fill(0.25);
            Ok(())
        }

        fn variance(&self) -> Option<&[f32]> {
            self.0.as_deref()
        }
    }

    fn trajectory(steps: usize, variance: Option<Variance>, learned: Option<f32>) -> Result<Vec<Vec<f32>>> {
        let schedule = Schedule::linear(40, 1e-3, 0.2)?;
        let levels = Levels::new(&schedule, Prediction::X0, Some(steps), Spacing::Linspace)?;
        let mut all = Vec::new();
        let sampler = Ddpm { levels, variance, threshold: Threshold::None };
        let mut denoiser = Grey(learned.map(|v| vec![v; 64]));
        sampler.sample(&mut denoiser, NoiseKey { seed: 1, first: 0 }, &mut |step| {
            all.push(step.x.to_vec());
            Ok(())
        })?;
        Ok(all)
    }

    #[test]
    fn learned_variances_interpolate_between_the_fixed_ones_of_each_step() {
        for steps in [2, 7, 40] {
            let of = |variance, learned| trajectory(steps, variance, learned).unwrap();
            let (small, large) = (of(Some(Variance::Small), Some(0.0)), of(Some(Variance::Large), None));
            let near = |a: &[Vec<f32>], b: &[Vec<f32>]| {
                a.iter().flatten().zip(b.iter().flatten()).all(|(a, b)| (a - b).abs() < 1e-5)
            };
            assert!(!near(&small, &large) && near(&small, &of(None, None)));
            assert!(near(&of(None, Some(-1.0)), &small) && near(&of(None, Some(1.0)), &large));
            assert!(near(&of(Some(Variance::Learned), Some(1.0)), &large));
            // In the first step, where mean and noise agree: the geometric mean.
            let middle = of(None, Some(0.0));
            let mean = |i: usize| {
                // small = mean + s z, large = mean + l z, middle = mean + sqrt(s l) z.
                let (a, b, c) = (small[0][i], large[0][i], middle[0][i]);
                (f64::from(c) - f64::from(a)) / (f64::from(b) - f64::from(a))
            };
            let levels = Levels::new(
                &Schedule::linear(40, 1e-3, 0.2).unwrap(),
                Prediction::X0,
                Some(steps),
                Spacing::Linspace,
            );
            let (from, to) = levels.unwrap().pairs().next().unwrap();
            let s = Posterior::between(from, to).variance.sqrt();
            let l = (1.0 - (from.alpha / to.alpha).powi(2)).sqrt();
            let want = ((s * l).sqrt() - s) / (l - s);
            let i = (0..64).max_by(|&a, &b| {
                let far = |i: usize| (large[0][i] - small[0][i]).abs();
                far(a).total_cmp(&far(b))
            });
            // Differences of f32 values; the largest ones are compared.
            assert!((mean(i.unwrap()) - want).abs() < 0.02, "{steps}: {} not {want}", mean(i.unwrap()));
        }
        let error = trajectory(3, Some(Variance::Learned), None).unwrap_err().to_string();
        assert!(error.contains("no learned variance"), "{error}");
    }
}
