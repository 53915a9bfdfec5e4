//! Heun's method on the time axis of Karras, Aittala, Aila, Laine, "Elucidating the Design Space of Diffusion-Based
//! Generative Models", NeurIPS 2022, algorithm 1.

use super::registry::{KARRAS_FIRST, SamplerInfo};
use super::state::SamplerState;
use super::{Levels, Sampler, Threshold};
use crate::buffers::{X, X_0, scratch};
use crate::error::Result;

/// Standard deviation of the data assumed by the stability test, for values in [-1, 1]: Karras et al.'s
/// `sigma_data`.
const SIGMA_DATA: f64 = 0.5;
/// Largest factor by which a second-order step may overestimate the spread of such data.
const MAX_SPREAD: f64 = 1.2;

/// Each step uses the mean of the slopes at its two ends. Order 2, two evaluations per step, one in the last
/// and in steps too long for the correction.
#[derive(Clone, Debug)]
pub struct Heun {
    /// Noise levels to visit.
    pub levels: Levels,
    /// Treatment of predicted images outside [-1, 1].
    pub threshold: Threshold,
}

/// Whether a step from sigma `s` to `next` is short enough for the second-order correction.
///
/// The slope at the far end counts for half of the step, however small the noise is there: in a step from
/// sigma 6e4, where cosine schedules begin, to 30, half the difference of the two predicted images is
/// multiplied by 2000, and the result is noise. The test uses normal data with [`SIGMA_DATA`], for which the
/// exact solution is known:
/// ```text
/// d(s) = s / (s^2 + sigma_data^2) y,   y(s') = sqrt((s'^2 + sigma_data^2) / (s^2 + sigma_data^2)) y(s)
/// ```
/// With 10 or more steps on the linear schedule, no step is too long with any spacing.
fn is_stable(s: f64, next: f64) -> bool {
    let variance = |s: f64| s * s + SIGMA_DATA * SIGMA_DATA;
    let slope = |s: f64| s / variance(s);
    let first = 1.0 + (next - s) * slope(s);
    let second = 1.0 + 0.5 * (next - s) * (slope(s) + slope(next) * first);
    second <= MAX_SPREAD * (variance(next) / variance(s)).sqrt()
}

pub(super) const HEUN: SamplerInfo = SamplerInfo {
    steps: Some(20),
    order: Some(2),
    spacings: &KARRAS_FIRST,
    ..SamplerInfo::new("heun", "Heun's method, two evaluations per step (Karras et al. 2022)", |args| {
        Box::new(Heun { levels: args.levels, threshold: args.threshold })
    })
};

impl Sampler for Heun {
    fn levels(&self) -> &Levels {
        &self.levels
    }

    fn threshold(&self) -> Threshold {
        self.threshold
    }

    /// With `y = x / alpha`, `s = sigma / alpha`:
    /// ```text
    /// d  = (y - x_0(y, s)) / s,      y' = y + (s' - s) d
    /// d' = (y' - x_0(y', s')) / s',  y' = y + (s' - s) (d + d') / 2      if s' is not 0 and not too far from s
    /// ```
    fn run(&self, d: &mut SamplerState<'_>) -> Result<()> {
        let (start, start_x_0) = (scratch(0), scratch(1));
        for (from, to) in self.levels.pairs() {
            d.denoise(from)?;
            d.copy(start, X)?;
            d.copy(start_x_0, X_0)?;
            let (s, next, alpha) = (from.karras_sigma(), to.karras_sigma(), to.alpha);
            // The coefficients of y' hold for x' too, since y = x / alpha.
            let step = (next - s) / s;
            d.axpby(X, alpha / from.alpha * (1.0 + step), [(-alpha * step, start_x_0)])?;
            if next > 0.0 && is_stable(s, next) {
                d.denoise(to)?;
                let (half, end) = (0.5 * step, 0.5 * (next - s) / next);
                let slope = [(-alpha * half, start_x_0), (-alpha * end, X_0)];
                d.axpby(X, end, slope)?;
                d.axpby(X, 1.0, [(alpha / from.alpha * (1.0 + half), start)])?;
            }
            d.step(from)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::Prediction;
    use crate::sampler::Spacing;
    use crate::schedule::Schedule;

    #[test]
    fn the_correction_is_skipped_only_where_it_is_unstable() {
        let linear = Schedule::linear(1000, 1e-4, 0.02).unwrap();
        let cosine = Schedule::cosine(1000, 0.9999).unwrap();
        let long = |schedule: &Schedule, spacing, steps| {
            let levels = Levels::new(schedule, Prediction::Eps, Some(steps), spacing).unwrap();
            let pairs = levels.pairs().filter(|(_, to)| to.sigma > 0.0).enumerate();
            let long = pairs.filter(|(_, (from, to))| !is_stable(from.karras_sigma(), to.karras_sigma()));
            long.map(|(i, _)| i).collect::<Vec<_>>()
        };
        for spacing in
            [Spacing::Linspace, Spacing::Uniform, Spacing::Trailing, Spacing::Karras, Spacing::Exponential]
        {
            for steps in [10, 20, 50, 333] {
                assert_eq!(long(&linear, spacing, steps), [0; 0], "{spacing}, {steps}");
            }
        }
        for steps in [20, 50] {
            for spacing in [Spacing::Linspace, Spacing::Trailing] {
                assert_eq!(long(&cosine, spacing, steps), [0], "{spacing}, {steps}");
            }
        }
        // Two levels: from nearly pure noise to almost none.
        assert_eq!(long(&linear, Spacing::Karras, 2), [0]);
        assert!(is_stable(0.5, 0.01), "noise of the data's own magnitude");
    }
}
