//! Samplers, from noise to images: one file each, following its paper. [`SAMPLERS`] lists them.
//!
//! A sampler knows noise levels, scalars, named buffers and the [`Denoiser`] trait, but no graphs, nor where
//! the buffers are: on the host or in device memory ([`DeviceDenoiser`]). [`Levels`] chooses the levels to
//! visit for all of them. The noise of image i depends only on the seed and i, so an image does not depend on
//! its batch.

pub(crate) mod buffers;
mod ddim;
mod ddpm;
mod dpm_solver;
mod euler;
mod heun;
mod pndm;
mod registry;
mod spacing;
pub(crate) mod state;
mod unipc;

pub use buffers::DeviceDenoiser;
pub use ddim::Ddim;
pub(crate) use ddpm::ancestral;
pub use ddpm::{Ddpm, Variance};
pub use dpm_solver::{DpmSolver2M, DpmSolver2S};
pub use euler::Euler;
pub use heun::Heun;
pub use pndm::Pndm;
pub use registry::{SAMPLERS, SamplerInfo, SamplerOptions, find};
pub use spacing::{Levels, Spacing};
pub use state::Threshold;
pub use unipc::UniPc;

use crate::denoiser::Denoiser;
use crate::error::Result;
use ddpm_engine::rng::{Purpose, Stream};
use rayon::prelude::*;
use std::fmt;
use std::ops::Deref;

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

/// What a sampler reports after each step.
#[derive(Clone, Copy, Debug)]
pub struct SampleStep<'a> {
    /// The timestep that the step started at; may be fractional.
    pub t: f64,
    /// Steps done, including this one.
    pub done: usize,
    /// Total number of steps.
    pub steps: usize,
    /// The batch after the step.
    pub x: LazyBatch<'a>,
    /// The clean images that the network predicted at the start of the step.
    pub x_0: LazyBatch<'a>,
}

/// A batch that dereferences to a slice. From device memory it is read on first access, which waits for it;
/// if the read fails, the slice is all zeros and sampling ends with the error after the step.
#[derive(Clone, Copy)]
pub struct LazyBatch<'a>(&'a dyn Deref<Target = Vec<f32>>);

impl Deref for LazyBatch<'_> {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        self.0
    }
}

impl fmt::Debug for LazyBatch<'_> {
    /// Does not read the batch from the device.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LazyBatch(..)")
    }
}

/// Samples images with a denoiser.
pub trait Sampler {
    /// Samples a batch of `batch * image_len` values, nominally in [-1, 1]. `on_step` is called after every
    /// step; an error from it stops sampling.
    fn sample(
        &self,
        denoiser: &mut dyn Denoiser,
        key: NoiseKey,
        on_step: &mut dyn FnMut(SampleStep<'_>) -> Result<()>,
    ) -> Result<Vec<f32>> {
        self.sample_from(None, denoiser, key, on_step)
    }

    /// Like [`sample`](Self::sample), from a batch at the sampler's noisiest level, or from pure noise if
    /// `start` is `None`. To start at less noise, build the sampler for a truncated schedule
    /// ([`Schedule::truncated`](crate::schedule::Schedule::truncated)).
    ///
    /// # Panics
    /// If `start` does not have `batch * image_len` values.
    fn sample_from(
        &self,
        start: Option<&[f32]>,
        denoiser: &mut dyn Denoiser,
        key: NoiseKey,
        on_step: &mut dyn FnMut(SampleStep<'_>) -> Result<()>,
    ) -> Result<Vec<f32>>;
}
