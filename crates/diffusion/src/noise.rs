//! The noise of samples: a function of a seed and the image's index.

use ddpm_rng::{Purpose, Stream};
use rayon::prelude::*;

/// Identifies the noise of a batch of samples.
#[derive(Clone, Copy, Debug)]
pub struct NoiseKey {
    /// The seed.
    pub seed: u64,
    /// Index of the batch's first image.
    pub first: u32,
}

impl NoiseKey {
    /// Fills a batch with the standard normal noise of a purpose and step.
    pub fn fill(&self, purpose: Purpose, step: u32, image_len: usize, out: &mut [f32]) {
        out.par_chunks_mut(image_len.max(1)).enumerate().for_each(|(i, image)| {
            Stream::new(self.seed, purpose, step, self.first + i as u32).fill_normal(image);
        });
    }
}
