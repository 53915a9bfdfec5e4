//! The buffers in which samplers keep their batches, on the host or in device memory.

use crate::error::Result;
use crate::noise::NoiseKey;
use ddpm_rng::Purpose;

/// A buffer, by its index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BufferId(pub usize);

/// The batch, `alpha x_0 + sigma eps` at the sampler's current level.
pub const X: BufferId = BufferId(0);
/// The predicted images, thresholded.
pub const X_0: BufferId = BufferId(1);
/// The predicted noise, set by [`predict_eps`](crate::sampler::SamplerState::predict_eps).
pub const EPS: BufferId = BufferId(2);
/// Fresh noise.
pub const Z: BufferId = BufferId(3);
/// The network's output.
pub(crate) const OUTPUT: BufferId = BufferId(4);
/// The network's learned variance, then [noise of that variance](crate::sampler::SamplerState::learned_noise).
pub const LEARNED: BufferId = BufferId(5);
/// The unconditional prediction, for guidance on a device.
pub const UNCOND: BufferId = BufferId(6);
/// The class labels, for guidance on a device.
pub const LABELS: BufferId = BufferId(7);
/// Number of scratch buffers of a sampler.
const NUM_SCRATCH: usize = 6;
/// Number of buffers in all.
pub const NUM_BUFFERS: usize = 8 + NUM_SCRATCH;
/// Maximum number of terms of [`SamplerBuffers::linear_combination`].
pub const MAX_TERMS: usize = 4;

/// Scratch buffer `i` of the sampler, 0 to 5.
///
/// # Panics
/// If there is no such buffer; in a constant, at compile time.
pub const fn scratch(i: usize) -> BufferId {
    assert!(i < NUM_SCRATCH, "scratch buffer index out of range");
    BufferId(8 + i)
}

/// [`NUM_BUFFERS`] buffers of one length, each a batch of images, and the operations of samplers on them.
///
/// Arithmetic is in f64, each operation rounded separately, and results are rounded once to f32, so that all
/// implementations give the same bits, except for the last bit of logarithms, sines and exponentials. Calls execute
/// in order; on a device all but [`read`](Self::read) may return before they have completed. The caller checks
/// lengths: one out of range panics. All methods return the errors of the device.
pub trait SamplerBuffers {
    /// Writes `data` to the first elements of a buffer.
    fn write(&mut self, to: BufferId, data: &[f32]) -> Result<()>;

    /// Fills `out` with the first elements of a buffer.
    fn read(&mut self, from: BufferId, out: &mut [f32]) -> Result<()>;

    /// `to = from`.
    fn copy(&mut self, to: BufferId, from: BufferId) -> Result<()>;

    /// `to = (sum of c v) / divisor`, in f64, summed from the first of at most [`MAX_TERMS`] terms. `to` may be
    /// the first term's buffer, but no other's.
    fn linear_combination(&mut self, to: BufferId, terms: &[(f64, BufferId)], divisor: f64) -> Result<()>;

    /// Standard normal values, the same as [`NoiseKey::fill`].
    fn normal(&mut self, to: BufferId, key: NoiseKey, purpose: Purpose, step: u32) -> Result<()>;

    /// Clamps each value to [-s, s] and divides it by s, in f32: s is 1 or, given `part`, this quantile of the
    /// image's absolute values, and at least 1.
    fn threshold(&mut self, v: BufferId, part: Option<f64>) -> Result<()>;

    /// `v = exp((p ln large + (1 - p) ln small) / 2) z` with `p = (v + 1) / 2`, given `[ln small, ln large]`:
    /// replaces the network's variance output v by noise of that learned variance.
    fn apply_learned_std(&mut self, v: BufferId, z: BufferId, logarithms: [f64; 2]) -> Result<()>;

    /// `y = u + scale (y - u)`, in f32.
    fn extrapolate(&mut self, y: BufferId, u: BufferId, scale: f32) -> Result<()>;

    /// Called after each step: waits until the previous step has completed, so that at most two are in flight
    /// and timing, previews and cancellation keep up.
    fn throttle(&mut self) -> Result<()> {
        Ok(())
    }
}
