//! Interpolation between images in noise space: Song, Meng, Ermon, "Denoising Diffusion Implicit Models",
//! ICLR 2021, section 4.3 and appendix D.5.

use crate::buffers::{EPS, X, X_0, scratch};
use crate::denoiser::Denoiser;
use crate::error::Result;
use crate::sampler::{Levels, NoiseKey, SampleStep, Threshold};
use crate::sampler::{SamplerState, axpby};

/// DDIM inversion: the noise from which DDIM sampling produces an image.
///
/// Each backward step exactly inverts the sampling step: its equation is implicit in the noisier image and
/// solved by fixed-point iteration (Pan, Gherardi, Xie, Huang, "Effective Real Image Editing with Accelerated
/// Iterative Diffusion Inversion", ICCV 2023). Using the noise predicted at the step's clean end instead, as
/// the first inversions did, leaves an error proportional to the step's length.
#[derive(Clone, Debug)]
pub struct Inversion {
    /// The noise levels of DDIM's steps; the noisiest must have some signal left.
    pub levels: Levels,
    /// Maximum number of iterations per step.
    pub iterations: usize,
    /// Maximum absolute error, for values in [-1, 1], at which a step has converged.
    pub tolerance: f32,
}

impl Inversion {
    /// The noise of a batch of images, at the noisiest level. `on_step` is called after every step.
    ///
    /// A sampling step from x is `F(x) = alpha_{t-1} x_0(x) + sigma_{t-1} eps(x)`. `F(x) = x_{t-1}` is solved
    /// by
    /// ```text
    /// x = x + alpha_t / alpha_{t-1} (x_{t-1} - F(x))
    /// ```
    /// which is `x = alpha_t / alpha_{t-1} x_{t-1} + (sigma_t - alpha_t / alpha_{t-1} sigma_{t-1}) eps(x)`.
    /// Errors shrink by the last coefficient times the slope of eps, which is at most `1 / sigma_t` for an
    /// ideal network: the longer a step is in sigma, the slower, and slowest for the step next to the image.
    /// (Anderson acceleration as in Pan et al. gained nothing on the digits network.)
    ///
    /// # Panics
    /// If `x_0` does not have the length of the denoiser's batches.
    pub fn invert(
        &self,
        denoiser: &mut dyn Denoiser,
        x_0: &[f32],
        on_step: &mut dyn FnMut(SampleStep<'_>) -> Result<()>,
    ) -> Result<Vec<f32>> {
        // No noise is sampled.
        let key = NoiseKey { seed: 0, first: 0 };
        let steps = self.levels.steps();
        let mut d = SamplerState::new(Some(x_0), denoiser, key, Threshold::None, steps, on_step)?;
        let pairs: Vec<_> = self.levels.pairs().collect();
        let (target, residual) = (scratch(0), scratch(1));
        for (from, to) in pairs.into_iter().rev() {
            d.copy(target, X)?;
            for _ in 0..self.iterations.max(1) {
                d.denoise(from)?;
                d.predict_eps(from)?;
                d.copy(residual, target)?;
                d.axpby(residual, 1.0, [(-to.alpha, X_0), (-to.sigma, EPS)])?;
                d.axpby(X, 1.0, [(from.alpha / to.alpha, residual)])?;
                if d.values(residual)?.iter().all(|r| r.abs() <= self.tolerance) {
                    break;
                }
            }
            d.step(from)?;
        }
        d.finish()
    }
}

/// Spherical interpolation between two noise vectors (Shoemake, "Animating Rotation with Quaternion Curves",
/// 1985): `part` 0 is a, 1 is b. Linear interpolation would pass through noise of too small a norm.
/// ```text
/// sin((1 - part) theta) / sin(theta) a + sin(part theta) / sin(theta) b,   theta the angle between them
/// ```
/// Parallel vectors, and opposite ones, which have no unique shortest path, are interpolated linearly.
///
/// # Panics
/// If the lengths differ.
pub fn slerp(a: &[f32], b: &[f32], part: f64) -> Vec<f32> {
    assert_eq!(a.len(), b.len(), "noise vectors of the same length");
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>();
    let theta = (dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()).clamp(-1.0, 1.0).acos();
    let linear = theta.is_nan() || theta.sin() < 1e-6;
    let weights = if linear {
        (1.0 - part, part)
    } else {
        (((1.0 - part) * theta).sin() / theta.sin(), (part * theta).sin() / theta.sin())
    };
    let mut x = a.to_vec();
    axpby(&mut x, weights.0, [(weights.1, b)]);
    x
}

#[cfg(test)]
mod tests {
    use super::super::test_util::{Gaussian, schedule};
    use super::*;
    use crate::process::Prediction;
    use crate::sampler::{Ddim, Sampler, Spacing};

    /// Largest difference between images and their reconstruction by DDIM from the inverted noise.
    fn reconstruction_error(
        prediction: Prediction,
        spacing: Spacing,
        steps: usize,
        iterations: usize,
    ) -> f32 {
        let levels = Levels::new(&schedule(), Prediction::Eps, Some(steps), spacing).unwrap();
        let mut gaussian = Gaussian::correlated(4, prediction);
        let x_0 = [0.3, 0.1, -0.5, -0.2, 0.9, 0.8, 0.0, 0.4];
        let inversion = Inversion { levels: levels.clone(), iterations, tolerance: 1e-6 };
        let mut seen = 0;
        let noise = inversion.invert(&mut gaussian, &x_0, &mut |step| {
            seen += 1;
            assert_eq!((step.done, step.steps), (seen, steps));
            Ok(())
        });
        let ddim = Ddim { levels, eta: 0.0, threshold: Threshold::None, use_clipped_model_output: false };
        let key = NoiseKey { seed: 0, first: 0 };
        let reconstructed =
            ddim.sample_from(Some(&noise.unwrap()), &mut gaussian, key, &mut |_| Ok(())).unwrap();
        reconstructed.iter().zip(x_0).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
    }

    #[test]
    fn sampling_from_inverted_noise_reconstructs_the_image() {
        for prediction in Prediction::ALL {
            for spacing in [Spacing::Trailing, Spacing::Linspace, Spacing::Karras] {
                for steps in [10, 50] {
                    let (once, often) = (
                        reconstruction_error(prediction, spacing, steps, 1),
                        reconstruction_error(prediction, spacing, steps, 200),
                    );
                    println!("{prediction} {spacing} {steps}: {once:.1e} in one iteration, {often:.1e}");
                    // 1e-6 per step, plus f32 rounding errors, which the last step reduces.
                    assert!(often < 1e-5, "{prediction} {spacing} {steps}: {often}");
                    assert!(once > 5.0 * often, "{prediction} {spacing} {steps}: {once}");
                }
            }
        }
    }

    #[test]
    fn slerp_is_a_circular_arc_with_exact_ends() {
        let (a, b) = ([3.0, 0.0, 0.0], [0.0, 3.0, 0.0]);
        assert_eq!((slerp(&a, &b, 0.0), slerp(&a, &b, 1.0)), (a.to_vec(), b.to_vec()));
        for (part, degrees) in [(0.25, 22.5f64), (0.5, 45.0), (0.9, 81.0)] {
            let x = slerp(&a, &b, part);
            let expected = [degrees.to_radians().cos(), degrees.to_radians().sin()].map(|v| 3.0 * v as f32);
            // f32 rounding errors at magnitudes up to 3.
            assert!((x[0] - expected[0]).abs() < 1e-6 && (x[1] - expected[1]).abs() < 1e-6, "{x:?}");
        }
        // No angle, or no unique path: linear.
        assert_eq!(slerp(&a, &a, 0.3), a);
        assert_eq!(slerp(&a, &[-3.0, 0.0, 0.0], 0.5), [0.0; 3]);
        assert_eq!(slerp(&a, &[0.0; 3], 0.5), [1.5, 0.0, 0.0]);
    }
}
