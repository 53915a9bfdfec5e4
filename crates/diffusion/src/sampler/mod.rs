//! Samplers, from noise to images: one file each, following its paper. [`SAMPLERS`] lists them.
//!
//! A sampler knows noise levels, scalars, named buffers and the [`Denoiser`] trait, but no graphs, nor where
//! the buffers are: on the host or in device memory ([`DeviceDenoiser`]). [`Levels`] chooses the levels to
//! visit for all of them. The noise of image i depends only on the seed and i, so an image does not depend on
//! its batch.

mod ddim;
mod ddpm;
mod dpm_solver;
mod euler;
mod heun;
mod host;
mod pndm;
mod registry;
mod spacing;
mod state;
mod unipc;

pub use crate::buffers::{self, SamplerBuffers};
pub use crate::denoiser::DeviceDenoiser;
pub use crate::noise::NoiseKey;
pub use ddim::Ddim;
pub(crate) use ddpm::ancestral;
pub use ddpm::{Ddpm, Variance};
pub use dpm_solver::{DpmSolver2M, DpmSolver2S};
pub use euler::Euler;
pub use heun::Heun;
pub use pndm::Pndm;
pub use registry::{SAMPLERS, SamplerInfo, SamplerOptions, find};
pub use spacing::{Levels, Spacing};
pub(crate) use state::axpby;
pub use state::{SamplerState, Threshold};
pub use unipc::UniPc;

use crate::denoiser::Denoiser;
use crate::error::Result;
use std::fmt;
use std::ops::Deref;

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

/// A way from noise to images. Implement [`levels`](Self::levels), [`threshold`](Self::threshold) and
/// [`run`](Self::run), and sample with the provided methods.
pub trait Sampler {
    /// The noise levels that it visits.
    fn levels(&self) -> &Levels;

    /// The treatment of predicted images outside [-1, 1].
    fn threshold(&self) -> Threshold;

    /// Moves a batch from the noisiest level to the last: a loop over the levels that evaluates the network
    /// ([`SamplerState::denoise`]), changes the buffer [`X`](buffers::X) and ends each step with [`SamplerState::step`].
    ///
    /// # Errors
    /// Those of the denoiser and of the step callback.
    fn run(&self, state: &mut SamplerState<'_>) -> Result<()>;

    /// Samples a batch of `batch * image_len` values, nominally in [-1, 1]. `on_step` is called after every
    /// step; an error from it stops sampling.
    ///
    /// # Errors
    /// Those of the denoiser and `on_step`.
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
    /// # Errors
    /// Those of the denoiser and `on_step`.
    ///
    /// # Panics
    /// If `start` does not have `batch * image_len` values.
    fn sample_from(
        &self,
        start: Option<&[f32]>,
        denoiser: &mut dyn Denoiser,
        key: NoiseKey,
        on_step: &mut dyn FnMut(SampleStep<'_>) -> Result<()>,
    ) -> Result<Vec<f32>> {
        let steps = self.levels().steps();
        let mut state = SamplerState::new(start, denoiser, key, self.threshold(), steps, on_step)?;
        self.run(&mut state)?;
        state.finish()
    }
}
