//! Samplers: from noise to images, one file each, following their paper; [`SAMPLERS`] lists them.
//!
//! A sampler knows noise levels, scalars, vectors by name and the [`Denoiser`] trait, never a graph, nor where the vectors are:
//! on the host, or beside the network in a device's memory ([`Resident`]). Which levels it visits is said by [`Levels`], alike for
//! all of them.
//! The noise of image i is a function of the seed and i alone, so that an image does not depend on how many are
//! drawn with it.

mod ddim;
mod ddpm;
mod dpm_solver;
pub(crate) mod drawing;
mod euler;
mod heun;
mod list;
mod pndm;
mod spacing;
mod unipc;
pub(crate) mod vectors;

pub use ddim::Ddim;
pub(crate) use ddpm::ancestral;
pub use ddpm::{Ddpm, Variance};
pub use dpm_solver::{DpmSolver2M, DpmSolver2S};
pub use drawing::Threshold;
pub use euler::Euler;
pub use heun::Heun;
pub use list::{Listed, Options, SAMPLERS, find};
pub use pndm::Pndm;
pub use spacing::{Levels, Spacing};
pub use unipc::UniPc;
pub use vectors::Resident;

use crate::denoiser::Denoiser;
use crate::error::Result;
use ddpm_engine::rng::{Purpose, Stream};
use rayon::prelude::*;
use std::fmt;
use std::ops::Deref;

/// The seed and the indices of a batch of samples.
#[derive(Clone, Copy, Debug)]
pub struct Seeds {
    /// The seed.
    pub seed: u64,
    /// Index of the batch's first image.
    pub first: u32,
}

impl Seeds {
    /// Fills a batch with standard normal noise for a purpose and step.
    pub fn fill(&self, purpose: Purpose, step: u32, image_len: usize, out: &mut [f32]) {
        out.par_chunks_mut(image_len.max(1)).enumerate().for_each(|(i, image)| {
            Stream::new(self.seed, purpose, step, self.first + i as u32).fill_normal(image);
        });
    }
}

/// What a sampler shows of each step.
#[derive(Clone, Copy, Debug)]
pub struct SampleStep<'a> {
    /// The timestep whose noise was removed; it may lie between two.
    pub t: f64,
    /// Steps done, this one counted.
    pub done: usize,
    /// All steps.
    pub steps: usize,
    /// The batch behind the step.
    pub x: Shown<'a>,
    /// The images that the network expected at the end, before the step.
    pub x_0: Shown<'a>,
}

/// The numbers of a batch, to be seen as a slice. Where they are in a device's memory they are brought from there when somebody
/// looks, who waits for them then; if that fails, zeros are seen, and the sampling ends with the error behind the step.
#[derive(Clone, Copy)]
pub struct Shown<'a>(&'a dyn Deref<Target = Vec<f32>>);

impl Deref for Shown<'_> {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        self.0
    }
}

impl fmt::Debug for Shown<'_> {
    /// Without a look at the numbers.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Shown(..)")
    }
}

/// Draws images with a denoiser.
pub trait Sampler {
    /// Draws a batch; `on_step` sees every step, and an error of its stops the sampling. The images are
    /// `batch * image_len` numbers, nominally in [-1, 1].
    fn sample(
        &self,
        denoiser: &mut dyn Denoiser,
        seeds: Seeds,
        on_step: &mut dyn FnMut(SampleStep<'_>) -> Result<()>,
    ) -> Result<Vec<f32>> {
        self.sample_from(None, denoiser, seeds, on_step)
    }

    /// The same from a batch that is at the noisiest of the sampler's levels already; from pure noise where none is given.
    /// Fewer levels than all are those of a schedule that ends earlier ([`Schedule::first`](crate::schedule::Schedule::first)).
    ///
    /// # Panics
    /// If `start` has not `batch * image_len` numbers.
    fn sample_from(
        &self,
        start: Option<&[f32]>,
        denoiser: &mut dyn Denoiser,
        seeds: Seeds,
        on_step: &mut dyn FnMut(SampleStep<'_>) -> Result<()>,
    ) -> Result<Vec<f32>>;
}
