//! Heun's method on the time axis of Karras, Aittala, Aila, Laine, "Elucidating the Design Space of Diffusion-Based
//! Generative Models", NeurIPS 2022, algorithm 1.

use super::drawing::{Drawing, X, X_0, own};
use super::{Levels, SampleStep, Sampler, Seeds, Threshold};
use crate::denoiser::Denoiser;
use crate::error::Result;

/// Deviation of the data that a step is judged by, of values in [-1, 1]: Karras et al.'s `sigma_data`.
const SIGMA_DATA: f64 = 0.5;
/// How much wider than they should be a step of order 2 may leave such data.
const WIDEST: f64 = 1.2;

/// Each step is made with the mean of the slopes at its two ends. Of order 2, two predictions a step and one in the last, or
/// wherever a step is too long for its second half.
#[derive(Clone, Debug)]
pub struct Heun {
    /// The levels that are visited.
    pub levels: Levels,
    /// What is done about expected images outside [-1, 1].
    pub threshold: Threshold,
}

/// Whether a step from a ratio to the next is short enough for order 2.
///
/// The slope at the far end counts for half of the step, however small the noise is there: in a step from a ratio of 6e4, where
/// cosine schedules begin, to one of 30, half of what the two expected images differ by is multiplied by 2000, and the
/// result is noise. Judged by data that are normal with [`SIGMA_DATA`], for which all is known:
/// ```text
/// d(s) = s / (s^2 + sigma_data^2) y,   y(s') = sqrt((s'^2 + sigma_data^2) / (s^2 + sigma_data^2)) y(s)
/// ```
/// No step of 10 or more on the linear schedule is too long, whatever the spacing.
fn short_enough(s: f64, next: f64) -> bool {
    let variance = |s: f64| s * s + SIGMA_DATA * SIGMA_DATA;
    let slope = |s: f64| s / variance(s);
    let first = 1.0 + (next - s) * slope(s);
    let second = 1.0 + 0.5 * (next - s) * (slope(s) + slope(next) * first);
    second <= WIDEST * (variance(next) / variance(s)).sqrt()
}

impl Sampler for Heun {
    /// With `y = x / alpha`, `s = sigma / alpha`:
    /// ```text
    /// d  = (y - x_0(y, s)) / s,      y' = y + (s' - s) d
    /// d' = (y' - x_0(y', s')) / s',  y' = y + (s' - s) (d + d') / 2      where s' is not 0 and not too far from s
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
            if next > 0.0 && short_enough(s, next) {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::Prediction;
    use crate::sampler::Spacing;
    use crate::schedule::Schedule;

    #[test]
    fn heuns_second_half_is_left_out_only_where_it_would_make_noise() {
        let linear = Schedule::linear(1000, 1e-4, 0.02).unwrap();
        let cosine = Schedule::cosine(1000, 0.9999).unwrap();
        let long = |schedule: &Schedule, spacing, steps| {
            let levels = Levels::new(schedule, Prediction::Eps, Some(steps), spacing).unwrap();
            let pairs = levels.pairs().filter(|(_, to)| to.sigma > 0.0).enumerate();
            let long = pairs.filter(|(_, (from, to))| !short_enough(from.ratio(), to.ratio()));
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
        // Two levels: from all to next to nothing.
        assert_eq!(long(&linear, Spacing::Karras, 2), [0]);
        assert!(short_enough(0.5, 0.01), "of noise of the data's own size");
    }
}
