//! What all samplers do: ask the network, hold the expected picture within bounds, add slices.

use super::{SampleStep, Seeds};
use crate::denoiser::Denoiser;
use crate::error::Result;
use crate::process::{Prediction, no_signal};
use crate::schedule::Level;
use ddpm_engine::rng::Purpose;
use serde::{Deserialize, Serialize};

/// Part of a picture's numbers that [`Threshold::Dynamic`] leaves in their range (Saharia et al. 2022 have 0.995).
const DYNAMIC_PART: f64 = 0.995;

/// What is done about an expected picture that leaves [-1, 1], where pictures live.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Threshold {
    /// Nothing.
    None,
    /// Each number is held within, as Ho et al.'s program does.
    #[default]
    Clip,
    /// Dynamic thresholding: numbers are held within [-s, s] and divided by s, where s is such that 99.5 % of the picture's
    /// numbers are within, and at least 1 (Saharia et al., "Photorealistic Text-to-Image Diffusion Models", 2022,
    /// section 2.3).
    Dynamic,
}

impl Threshold {
    /// Its name in the settings.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Clip => "clip",
            Self::Dynamic => "dynamic",
        }
    }

    /// Applies it to one picture.
    pub(crate) fn apply(self, picture: &mut [f32]) {
        let most = match self {
            Self::None => return,
            Self::Clip => 1.0,
            Self::Dynamic => quantile(picture, DYNAMIC_PART).max(1.0),
        };
        picture.iter_mut().for_each(|x| *x = x.clamp(-most, most) / most);
    }
}

/// The size that a part of all numbers do not exceed, between two linearly.
fn quantile(numbers: &[f32], part: f64) -> f32 {
    let mut sizes: Vec<f32> = numbers.iter().map(|x| x.abs()).collect();
    sizes.sort_unstable_by(f32::total_cmp);
    let Some(last) = sizes.len().checked_sub(1) else { return 0.0 };
    let at = part * last as f64;
    let (low, high) = (sizes[at.floor() as usize], sizes[at.ceil() as usize]);
    low + (high - low) * at.fract() as f32
}

/// `x = keep x + sum of c y`, each number in f64 and rounded once.
pub(crate) fn blend<const N: usize>(x: &mut [f32], keep: f64, terms: [(f64, &[f32]); N]) {
    for (i, x) in x.iter_mut().enumerate() {
        let mut sum = keep * f64::from(*x);
        for (c, y) in terms {
            sum += c * f64::from(y[i]);
        }
        *x = sum as f32;
    }
}

/// A batch on its way from noise to pictures.
pub(crate) struct Drawing<'a> {
    denoiser: &'a mut dyn Denoiser,
    on_step: &'a mut dyn FnMut(SampleStep<'_>) -> Result<()>,
    seeds: Seeds,
    threshold: Threshold,
    steps: usize,
    done: usize,
    output: Vec<f32>,
    /// The batch, `alpha x_0 + sigma eps` at the level that the sampler is at.
    pub x: Vec<f32>,
    /// The pictures that the network expects, held within bounds.
    pub x_0: Vec<f32>,
    /// The noise that it expects.
    pub eps: Vec<f32>,
    /// Fresh noise.
    pub z: Vec<f32>,
}

impl<'a> Drawing<'a> {
    /// A batch for so many steps: one that is given, or else pure noise.
    ///
    /// # Panics
    /// If `start` has another length than the denoiser's batches.
    pub fn new(
        start: Option<&[f32]>,
        denoiser: &'a mut dyn Denoiser,
        seeds: Seeds,
        threshold: Threshold,
        steps: usize,
        on_step: &'a mut dyn FnMut(SampleStep<'_>) -> Result<()>,
    ) -> Self {
        let mut x = vec![0.0; denoiser.batch() * denoiser.picture_len()];
        match start {
            Some(start) => x.copy_from_slice(start),
            None => seeds.fill(Purpose::SampleStart, 0, denoiser.picture_len(), &mut x),
        }
        let (output, x_0, eps, z) = (x.clone(), x.clone(), x.clone(), Vec::new());
        Self { denoiser, on_step, seeds, threshold, steps, done: 0, output, x, x_0, eps, z }
    }

    /// Asks the network what it expects of `x` at a level.
    pub fn denoise(&mut self, level: Level) -> Result<()> {
        let prediction = self.denoiser.prediction();
        if prediction == Prediction::Eps && level.alpha == 0.0 {
            return Err(no_signal(level.t));
        }
        self.denoiser.predict(&self.x, level.t, &mut self.output)?;
        let made = self.x_0.iter_mut().zip(&mut self.eps);
        for ((x_0, eps), (&x, &output)) in made.zip(self.x.iter().zip(&self.output)) {
            let (x, output) = (f64::from(x), f64::from(output));
            *x_0 = prediction.x_0(level, x, output) as f32;
            *eps = prediction.eps(level, x, output) as f32;
        }
        let picture = self.denoiser.picture_len();
        self.x_0.chunks_mut(picture.max(1)).for_each(|p| self.threshold.apply(p));
        Ok(())
    }

    /// Makes the expected noise what is left of `x` beside the expected picture, which a threshold may have changed.
    pub fn noise_beside_picture(&mut self, level: Level) {
        for ((eps, &x), &x_0) in self.eps.iter_mut().zip(&self.x).zip(&self.x_0) {
            *eps = ((f64::from(x) - level.alpha * f64::from(x_0)) / level.sigma) as f32;
        }
    }

    /// What the network told of the variance when it was asked last.
    pub fn variance(&self) -> Option<&[f32]> {
        self.denoiser.variance()
    }

    /// Draws `z` for the step that is being made.
    pub fn draw_noise(&mut self) {
        self.z.resize(self.x.len(), 0.0);
        let left = (self.steps - self.done - 1) as u32;
        self.seeds.fill(Purpose::SampleNoise, left, self.denoiser.picture_len(), &mut self.z);
    }

    /// Ends a step that began at a level.
    pub fn step(&mut self, from: Level) -> Result<()> {
        self.done += 1;
        let (done, steps) = (self.done, self.steps);
        (self.on_step)(SampleStep { t: from.t, done, steps, x: &self.x, x_0: &self.x_0 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dynamic_thresholds_follow_the_picture() {
        let picture: Vec<f32> = (0..201).map(|i| (i as f32 - 100.0) / 50.0).collect();
        let with = |threshold: Threshold| {
            let mut p = picture.clone();
            threshold.apply(&mut p);
            p
        };
        assert_eq!(with(Threshold::None), picture);
        assert_eq!(with(Threshold::Clip)[..3], [-1.0; 3]);
        // The sizes are 0, then each of 1/50 .. 100/50 twice; 0.995 of the way from the first to the last of 201 is
        // number 199, and that is 2.
        assert_eq!(with(Threshold::Dynamic)[25], picture[25] / 2.0);
        let mut small = [0.25, -0.5];
        Threshold::Dynamic.apply(&mut small);
        assert_eq!(small, [0.25, -0.5], "nothing is enlarged");
        assert_eq!(quantile(&[4.0, -1.0, 2.0], 0.75), 3.0);
        assert_eq!(quantile(&[], 0.5), 0.0);
    }

    #[test]
    fn blending_keeps_and_adds() {
        let mut x = [1.0, 2.0];
        blend(&mut x, 0.5, [(2.0, &[1.0, 0.0]), (-1.0, &[0.0, 4.0])]);
        assert_eq!(x, [2.5, -3.0]);
    }
}
