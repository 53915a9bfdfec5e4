//! Buffers of image batches in the memory that a plan runs in: what samplers compute between two runs of a network, without copying
//! the data to the host and back.
//!
//! Arithmetic is in f64, each operation rounded separately, and results are rounded once to f32, so that all implementations
//! give the same bits, except for the last bit of logarithms, sines and exponentials.

use crate::error::Result;
use crate::graph::Tensor;
use crate::rng_key::RngKey;
use crate::shape::Shape;
use ddpm_rng::Purpose;

/// Maximum number of terms of [`PlanBuffers::linear_combination`].
pub const MAX_TERMS: usize = 4;

/// A buffer, by its index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BufferId(pub usize);

/// Number and shape of the buffers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BufferSpec {
    /// How many, with indices from 0.
    pub count: usize,
    /// The shape of each; the first dimension is the batch.
    pub shape: Shape,
}

/// Buffers of one length, each a batch of images, next to the tensors of a plan
/// ([`Executor::sampler_buffers`](crate::Executor::sampler_buffers)), and the operations of samplers on them. Calls execute in order; on a device
/// all but [`read`](Self::read) may return before they have completed. The caller checks indices and lengths: one out of range
/// panics.
pub trait PlanBuffers {
    /// Writes `data` to the first elements of a buffer.
    fn write(&mut self, to: BufferId, data: &[f32]) -> Result<()>;

    /// Fills `out` with the first elements of a buffer.
    fn read(&self, from: BufferId, out: &mut [f32]) -> Result<()>;

    /// `to = from`.
    fn copy(&mut self, to: BufferId, from: BufferId) -> Result<()>;

    /// `to = (sum of c v) / divisor`, in f64, summed from the first of at most [`MAX_TERMS`] terms. `to` may be the first
    /// term's buffer, but no other's.
    fn linear_combination(&mut self, to: BufferId, terms: &[(f64, BufferId)], divisor: f64) -> Result<()>;

    /// Standard normal values: image i uses the [`Stream`](ddpm_rng::Stream) with index `rng.first_index + i`.
    fn normal(&mut self, to: BufferId, rng: RngKey, purpose: Purpose) -> Result<()>;

    /// Clamps each value to [-s, s] and divides it by s, in f32: s is 1 or, given `part`, this quantile of the image's absolute
    /// values, and at least 1.
    fn threshold(&mut self, v: BufferId, part: Option<f64>) -> Result<()>;

    /// `v = exp((p ln large + (1 - p) ln small) / 2) z` with `p = (v + 1) / 2`, given `[ln small, ln large]`: replaces the network's
    /// variance output v by noise of that learned variance.
    fn apply_learned_std(&mut self, v: BufferId, z: BufferId, logarithms: [f64; 2]) -> Result<()>;

    /// Fills a tensor from the first elements of a buffer.
    fn copy_to_tensor(&mut self, to: Tensor, from: BufferId) -> Result<()>;

    /// Copies a tensor to the first elements of a buffer.
    fn copy_from_tensor(&mut self, to: BufferId, from: Tensor) -> Result<()>;

    /// Sets all elements of a tensor to one value.
    fn fill(&mut self, to: Tensor, value: f32) -> Result<()>;

    /// `y = u + scale (y - u)`, in f32.
    fn extrapolate(&mut self, y: BufferId, u: BufferId, scale: f32) -> Result<()>;

    /// Called after each step: waits until the previous step has completed, so that at most two are in flight and timing,
    /// previews and cancellation keep up.
    fn throttle(&mut self) -> Result<()> {
        Ok(())
    }
}
