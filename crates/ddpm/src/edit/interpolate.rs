//! From one image to another, in the noise that they come from: Song, Meng, Ermon, "Denoising Diffusion Implicit Models",
//! ICLR 2021, section 4.3 and appendix D.5.

use crate::denoiser::Denoiser;
use crate::error::Result;
use crate::sampler::drawing::{Drawing, EPS, X, X_0, blend, own};
use crate::sampler::{Levels, SampleStep, Seeds, Threshold};

/// The noise from which DDIM's steps make an image.
///
/// Each step back is made such that the step forward undoes it: its equation is implicit in the noisier image, and is solved
/// by iteration (Pan, Gherardi, Xie, Huang, "Effective Real Image Editing with Accelerated Iterative Diffusion Inversion",
/// ICCV 2023). Taking the noise that is expected at the step's clean end instead, as the first inversions did, leaves an
/// error of the step's length.
#[derive(Clone, Debug)]
pub struct Inversion {
    /// The levels that DDIM's steps visit, of which the noisiest must have something left of the image.
    pub levels: Levels,
    /// Most iterations of a step.
    pub iterations: usize,
    /// The error of a number, of those in [-1, 1], at which a step is good enough.
    pub tolerance: f32,
}

impl Inversion {
    /// The noise of a batch of images, at the first of the levels. `on_step` sees every step, with what has been reached.
    ///
    /// A step forward from x is `F(x) = alpha_{t-1} x_0(x) + sigma_{t-1} eps(x)`; that with `F(x) = x_{t-1}` is found by
    /// ```text
    /// x = x + alpha_t / alpha_{t-1} (x_{t-1} - F(x))
    /// ```
    /// which is `x = alpha_t / alpha_{t-1} x_{t-1} + (sigma_t - alpha_t / alpha_{t-1} sigma_{t-1}) eps(x)`. Errors shrink by
    /// the last factor times the slope of eps, which is at most `1 / sigma_t` where the network tells the expected noise: the
    /// longer a step is in sigma, the slower, and slowest in the one to no noise. (Anderson's acceleration, as Pan et al. have it,
    /// was tried with the digits' network and gained nothing.)
    ///
    /// # Panics
    /// If `x_0` is no batch of the denoiser.
    pub fn invert(
        &self,
        denoiser: &mut dyn Denoiser,
        x_0: &[f32],
        on_step: &mut dyn FnMut(SampleStep<'_>) -> Result<()>,
    ) -> Result<Vec<f32>> {
        // Nothing is drawn.
        let seeds = Seeds { seed: 0, first: 0 };
        let steps = self.levels.steps();
        let mut d = Drawing::new(Some(x_0), denoiser, seeds, Threshold::None, steps, on_step)?;
        let pairs: Vec<_> = self.levels.pairs().collect();
        let (target, off) = (own(0), own(1));
        for (from, to) in pairs.into_iter().rev() {
            d.copy(target, X)?;
            for _ in 0..self.iterations.max(1) {
                d.denoise(from)?;
                d.predict_eps(from)?;
                d.copy(off, target)?;
                d.blend(off, 1.0, [(-to.alpha, X_0), (-to.sigma, EPS)])?;
                d.blend(X, 1.0, [(from.alpha / to.alpha, off)])?;
                if d.numbers(off)?.iter().all(|off| off.abs() <= self.tolerance) {
                    break;
                }
            }
            d.step(from)?;
        }
        d.finish()
    }
}

/// Spherical interpolation between two noises (Shoemake, "Animating Rotation with Quaternion Curves", 1985): `part` 0 is a, 1
/// is b. The straight way between them would go through noise of too small a size.
/// ```text
/// sin((1 - part) theta) / sin(theta) a + sin(part theta) / sin(theta) b,   theta the angle between them
/// ```
/// Noises in one direction, or opposite ones, between which no way is the shortest, are interpolated straight.
///
/// # Panics
/// If they have several lengths.
pub fn slerp(a: &[f32], b: &[f32], part: f64) -> Vec<f32> {
    assert_eq!(a.len(), b.len(), "two noises of one length");
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>();
    let theta = (dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()).clamp(-1.0, 1.0).acos();
    let straight = theta.is_nan() || theta.sin() < 1e-6;
    let weights = match straight {
        true => (1.0 - part, part),
        false => (((1.0 - part) * theta).sin() / theta.sin(), (part * theta).sin() / theta.sin()),
    };
    let mut x = a.to_vec();
    blend(&mut x, weights.0, [(weights.1, b)]);
    x
}

#[cfg(test)]
mod tests {
    use super::super::support::{Gaussian, schedule};
    use super::*;
    use crate::process::Prediction;
    use crate::sampler::{Ddim, Sampler, Spacing};

    /// How far images are from what DDIM makes of their noise, at most.
    fn off(prediction: Prediction, spacing: Spacing, steps: usize, iterations: usize) -> f32 {
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
        let seeds = Seeds { seed: 0, first: 0 };
        let again = ddim.sample_from(Some(&noise.unwrap()), &mut gaussian, seeds, &mut |_| Ok(())).unwrap();
        again.iter().zip(x_0).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
    }

    #[test]
    fn what_is_inverted_and_drawn_again_is_the_image() {
        for prediction in Prediction::ALL {
            for spacing in [Spacing::Trailing, Spacing::Linspace, Spacing::Karras] {
                for steps in [10, 50] {
                    let (once, often) =
                        (off(prediction, spacing, steps, 1), off(prediction, spacing, steps, 200));
                    println!("{prediction} {spacing} {steps}: {once:.1e} in one iteration, {often:.1e}");
                    // 1e-6 a step, and f32's roundings of noise, of which a step to no noise makes less.
                    assert!(often < 1e-5, "{prediction} {spacing} {steps}: {often}");
                    assert!(once > 5.0 * often, "{prediction} {spacing} {steps}: {once}");
                }
            }
        }
    }

    #[test]
    fn the_way_is_a_piece_of_a_circle_and_meets_its_ends() {
        let (a, b) = ([3.0, 0.0, 0.0], [0.0, 3.0, 0.0]);
        assert_eq!((slerp(&a, &b, 0.0), slerp(&a, &b, 1.0)), (a.to_vec(), b.to_vec()));
        for (part, degrees) in [(0.25, 22.5f64), (0.5, 45.0), (0.9, 81.0)] {
            let x = slerp(&a, &b, part);
            let expected = [degrees.to_radians().cos(), degrees.to_radians().sin()].map(|v| 3.0 * v as f32);
            // f32's roundings of numbers up to 3.
            assert!((x[0] - expected[0]).abs() < 1e-6 && (x[1] - expected[1]).abs() < 1e-6, "{x:?}");
        }
        // No angle, or no one way: straight.
        assert_eq!(slerp(&a, &a, 0.3), a);
        assert_eq!(slerp(&a, &[-3.0, 0.0, 0.0], 0.5), [0.0; 3]);
        assert_eq!(slerp(&a, &[0.0; 3], 0.5), [1.5, 0.0, 0.0]);
    }
}
