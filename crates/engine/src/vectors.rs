//! Batches of images beside a plan, in the memory that it runs in: what is done between two runs of a network, as a sampler's
//! steps are, without the numbers being brought to the host and back.
//!
//! Arithmetic is in f64, each operation rounded by itself, and results are rounded once to f32, so that all implementations
//! give the same bits, but for the last one of logarithms, sines and exponentials.

use crate::error::Result;
use crate::executor::Draws;
use crate::graph::Tensor;
use crate::rng::Purpose;
use crate::shape::Shape;

/// Most terms of [`Vectors::mix`].
pub const MOST_TERMS: usize = 4;

/// One of some vectors, by its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vector(pub usize);

/// How many vectors there are, numbered from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BufferSpec {
    /// So many.
    pub count: usize,
    /// The shape of each; the first dimension counts images.
    pub shape: Shape,
}

/// Vectors of one length, a batch of images each, and what samplers do with them. Calls are carried out in order; on a device
/// all but [`read`](Self::read) may return before they are done. Number and lengths are the caller's affair: what does not exist is
/// a panic.
pub trait Vectors {
    /// Writes the first numbers of a vector, as many as are given.
    fn write(&mut self, to: Vector, data: &[f32]) -> Result<()>;

    /// Reads the first numbers of a vector, as many as there is room for.
    fn read(&self, from: Vector, out: &mut [f32]) -> Result<()>;

    /// `to = from`.
    fn copy(&mut self, to: Vector, from: Vector) -> Result<()>;

    /// `to = (sum of c v) / divisor`, in f64, added from the first term on, of [`MOST_TERMS`] at most. `to` may be the first
    /// term's vector, and no other's.
    fn mix(&mut self, to: Vector, terms: &[(f64, Vector)], divisor: f64) -> Result<()>;

    /// Standard normal numbers: image i has those of the [`Stream`](crate::rng::Stream) with index `draws.first_index + i`.
    fn normal(&mut self, to: Vector, draws: Draws, purpose: Purpose) -> Result<()>;

    /// Holds each number within [-s, s], and divides it by s, in f32: s is 1, or, with a part, the size that this part of the
    /// image's numbers does not exceed, and at least 1.
    fn threshold(&mut self, v: Vector, part: Option<f64>) -> Result<()>;

    /// `v = exp((p ln large + (1 - p) ln small) / 2) z` with `p = (v + 1) / 2`, given `ln small` and `ln large`: noise of the
    /// variance that a network has learnt between two, in the place of what it said of it.
    fn apply_learned_std(&mut self, v: Vector, z: Vector, logarithms: [f64; 2]) -> Result<()>;

    /// Called behind each step: waits until the step before is done, so that no more than two are under way, and whoever
    /// measures steps, shows them or ends them keeps up.
    fn pace(&mut self) -> Result<()> {
        Ok(())
    }
}

/// Vectors beside the tensors of a plan ([`Executor::vectors`](crate::Executor::vectors)).
pub trait PlanVectors: Vectors {
    /// Fills a tensor with the first numbers of a vector.
    fn give(&mut self, to: Tensor, from: Vector) -> Result<()>;

    /// Makes a tensor's numbers the first ones of a vector.
    fn take(&mut self, to: Vector, from: Tensor) -> Result<()>;

    /// Fills a tensor with one number.
    fn fill(&mut self, to: Tensor, value: f32) -> Result<()>;

    /// `y = u + scale (y - u)`, in f32.
    fn extrapolate(&mut self, y: Vector, u: Vector, scale: f32) -> Result<()>;
}
