//! From one picture to another, in the noise that they come from: Song, Meng, Ermon, "Denoising Diffusion Implicit Models",
//! ICLR 2021, section 4.3 and appendix D.5.

use crate::denoiser::Denoiser;
use crate::error::Result;
use crate::sampler::drawing::{Drawing, blend};
use crate::sampler::{Levels, SampleStep, Seeds, Threshold};

/// The noise from which DDIM's steps make a picture.
///
/// Each step back is made such that the step forward undoes it: its equation is implicit in the noisier picture, and is solved
/// by iteration (Pan, Gherardi, Xie, Huang, "Effective Real Image Editing with Accelerated Iterative Diffusion Inversion",
/// ICCV 2023). Taking the noise that is expected at the step's clean end instead, as the first inversions did, leaves an
/// error of the step's length.
#[derive(Clone, Debug)]
pub struct Inversion {
    /// The levels that DDIM's steps visit, of which the noisiest must have something left of the picture.
    pub levels: Levels,
    /// Most iterations of a step.
    pub iterations: usize,
    /// The error of a number, of those in [-1, 1], at which a step is good enough.
    pub tolerance: f32,
}

impl Inversion {
    /// The noise of a batch of pictures, at the first of the levels. `on_step` sees every step, with what has been reached.
    ///
    /// A step forward from x is `F(x) = alpha_{t-1} x_0(x) + sigma_{t-1} eps(x)`; that with `F(x) = x_{t-1}` is found by
    /// ```text
    /// x = x + alpha_t / alpha_{t-1} (x_{t-1} - F(x))
    /// ```
    /// which is `x = alpha_t / alpha_{t-1} x_{t-1} + (sigma_t - alpha_t / alpha_{t-1} sigma_{t-1}) eps(x)`. Errors shrink by
    /// the last factor times the slope of eps, which is at most `1 / sigma_t` where the network tells the expected noise.
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
        let mut d = Drawing::new(Some(x_0), denoiser, seeds, Threshold::None, steps, on_step);
        let pairs: Vec<_> = self.levels.pairs().collect();
        let (mut target, mut off) = (x_0.to_vec(), vec![0.0; x_0.len()]);
        for (from, to) in pairs.into_iter().rev() {
            target.copy_from_slice(&d.x);
            let scale = from.alpha / to.alpha;
            for _ in 0..self.iterations.max(1) {
                d.denoise(from)?;
                off.copy_from_slice(&target);
                blend(&mut off, 1.0, [(-to.alpha, &d.x_0), (-to.sigma, &d.eps)]);
                blend(&mut d.x, 1.0, [(scale, &off)]);
                if off.iter().all(|off| off.abs() <= self.tolerance) {
                    break;
                }
            }
            d.step(from)?;
        }
        Ok(d.x)
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
    let straight = !(theta.sin() > 1e-6);
    let weights = match straight {
        true => (1.0 - part, part),
        false => (((1.0 - part) * theta).sin() / theta.sin(), (part * theta).sin() / theta.sin()),
    };
    let mut x = a.to_vec();
    blend(&mut x, weights.0, [(weights.1, b)]);
    x
}
