//! The buffers in which samplers keep their batches, on the host or in device memory.

use super::NoiseKey;
use super::state::{axpby, clamp_rescale};
use crate::denoiser::Denoiser;
use crate::error::Result;
use crate::process::Prediction;
use ddpm_rng::Purpose;

/// A buffer, by its index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BufferId(pub usize);

/// The batch, `alpha x_0 + sigma eps` at the sampler's current level.
pub const X: BufferId = BufferId(0);
/// The predicted images, thresholded.
pub const X_0: BufferId = BufferId(1);
/// The predicted noise, set by [`predict_eps`](super::SamplerState::predict_eps).
pub const EPS: BufferId = BufferId(2);
/// Fresh noise.
pub const Z: BufferId = BufferId(3);
/// The network's output.
pub(super) const OUTPUT: BufferId = BufferId(4);
/// The network's learned variance, then [noise of that variance](super::SamplerState::learned_noise).
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

/// A network that reads and writes [`SamplerBuffers`]; a network on a device keeps them in device memory
/// ([`Denoiser::as_device_denoiser`]).
pub trait DeviceDenoiser {
    /// The buffers, one batch each.
    ///
    /// # Errors
    /// Device errors.
    fn buffers(&mut self) -> Result<&mut dyn SamplerBuffers>;

    /// Like [`Denoiser::predict`], from one buffer to another.
    ///
    /// # Errors
    /// Like [`Denoiser::predict`].
    fn predict_buffer(&mut self, x_t: BufferId, t: f64, output: BufferId) -> Result<()>;

    /// Copies the learned variance of the last prediction to a buffer; returns whether there is one.
    ///
    /// # Errors
    /// Device errors.
    fn copy_variance(&mut self, to: BufferId) -> Result<bool>;
}

impl Prediction {
    /// The coefficients a, b, c of `x_0 = (a x_t + b output) / c`, bit-identical to [`x_0`](Self::x_0).
    pub(super) fn x_0_coefficients(self, alpha: f64, sigma: f64) -> [f64; 3] {
        match self {
            Self::Eps => [1.0, -sigma, alpha],
            Self::X0 => [0.0, 1.0, 1.0],
            Self::V => [alpha, -sigma, 1.0],
        }
    }

    /// The same for [`eps`](Self::eps).
    pub(super) fn eps_coefficients(self, alpha: f64, sigma: f64) -> [f64; 3] {
        match self {
            Self::Eps => [0.0, 1.0, 1.0],
            Self::X0 => [1.0, -alpha, sigma],
            Self::V => [sigma, alpha, 1.0],
        }
    }
}

/// A denoiser of slices, with its buffers in host memory.
pub(super) struct HostDenoiser<'a> {
    pub denoiser: &'a mut dyn Denoiser,
    pub buffers: HostBuffers,
}

impl DeviceDenoiser for HostDenoiser<'_> {
    fn buffers(&mut self) -> Result<&mut dyn SamplerBuffers> {
        Ok(&mut self.buffers)
    }

    fn predict_buffer(&mut self, x_t: BufferId, t: f64, output: BufferId) -> Result<()> {
        let denoiser = &mut self.denoiser;
        self.buffers.update(output, |output, all| denoiser.predict(all.values(x_t), t, output))
    }

    fn copy_variance(&mut self, to: BufferId) -> Result<bool> {
        match self.denoiser.variance() {
            Some(variance) => self.buffers.write(to, variance).map(|()| true),
            None => Ok(false),
        }
    }
}

/// Buffers in host memory, allocated on first write.
pub(super) struct HostBuffers {
    len: usize,
    image: usize,
    all: Vec<Vec<f32>>,
}

impl HostBuffers {
    pub fn new(batch: usize, image: usize) -> Self {
        Self { len: batch * image, image, all: vec![Vec::new(); NUM_BUFFERS] }
    }

    /// The values of a buffer that has been written.
    pub fn values(&self, v: BufferId) -> &Vec<f32> {
        &self.all[v.0]
    }

    /// Updates a buffer in place, with read access to all others.
    pub fn update<R>(&mut self, v: BufferId, update: impl FnOnce(&mut [f32], &Self) -> R) -> R {
        let mut values = std::mem::take(&mut self.all[v.0]);
        values.resize(self.len, 0.0);
        let result = update(&mut values, self);
        self.all[v.0] = values;
        result
    }
}

impl SamplerBuffers for HostBuffers {
    fn write(&mut self, to: BufferId, data: &[f32]) -> Result<()> {
        self.update(to, |to, _| to[..data.len()].copy_from_slice(data));
        Ok(())
    }

    fn read(&mut self, from: BufferId, out: &mut [f32]) -> Result<()> {
        // A buffer that was never written holds zeros.
        let (written, rest) = out.split_at_mut(out.len().min(self.all[from.0].len()));
        written.copy_from_slice(&self.all[from.0][..written.len()]);
        rest.fill(0.0);
        Ok(())
    }

    fn copy(&mut self, to: BufferId, from: BufferId) -> Result<()> {
        let mut values = std::mem::take(&mut self.all[to.0]);
        values.clear();
        values.extend_from_slice(&self.all[from.0]);
        self.all[to.0] = values;
        Ok(())
    }

    fn linear_combination(&mut self, to: BufferId, terms: &[(f64, BufferId)], divisor: f64) -> Result<()> {
        let Some((&(keep, first), others)) = terms.split_first() else {
            self.update(to, |to, _| to.fill(0.0));
            return Ok(());
        };
        if first != to {
            self.copy(to, first)?;
        }
        self.update(to, |to, all| {
            let term = |i: usize| (others[i].0, all.values(others[i].1).as_slice());
            match (others.len(), divisor) {
                (0, 1.0) => axpby(to, keep, []),
                (1, 1.0) => axpby(to, keep, [term(0)]),
                (2, 1.0) => axpby(to, keep, [term(0), term(1)]),
                (3, 1.0) => axpby(to, keep, [term(0), term(1), term(2)]),
                _ => {
                    let others: Vec<_> = (0..others.len()).map(term).collect();
                    for (i, to) in to.iter_mut().enumerate() {
                        let first = keep * f64::from(*to);
                        let sum = others.iter().fold(first, |sum, (c, y)| sum + c * f64::from(y[i]));
                        *to = (sum / divisor) as f32;
                    }
                }
            }
        });
        Ok(())
    }

    fn normal(&mut self, to: BufferId, key: NoiseKey, purpose: Purpose, step: u32) -> Result<()> {
        self.update(to, |to, all| key.fill(purpose, step, all.image, to));
        Ok(())
    }

    fn threshold(&mut self, v: BufferId, part: Option<f64>) -> Result<()> {
        self.update(v, |v, all| v.chunks_mut(all.image.max(1)).for_each(|p| clamp_rescale(p, part)));
        Ok(())
    }

    fn apply_learned_std(&mut self, v: BufferId, z: BufferId, [small, large]: [f64; 2]) -> Result<()> {
        self.update(v, |v, all| {
            for (v, &z) in v.iter_mut().zip(all.values(z)) {
                let part = (f64::from(*v) + 1.0) / 2.0;
                let deviation = (0.5 * (part * large + (1.0 - part) * small)).exp();
                *v = (deviation * f64::from(z)) as f32;
            }
        });
        Ok(())
    }

    fn extrapolate(&mut self, y: BufferId, u: BufferId, scale: f32) -> Result<()> {
        self.update(y, |y, all| {
            y.iter_mut().zip(all.values(u)).for_each(|(y, u)| *y = u + scale * (*y - u));
        });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schedule::Level;

    #[test]
    fn coefficients_match_predictions_bit_for_bit() {
        let level = Level { t: 3.0, alpha: 0.83, sigma: (1.0f64 - 0.83 * 0.83).sqrt() };
        for prediction in Prediction::ALL {
            for i in 0..100 {
                let (x, output) = (f64::from(0.37f32 * i as f32 - 3.0), f64::from((1.7f32 * i as f32).sin()));
                let with = |[a, b, c]: [f64; 3]| (a * x + b * output) / c;
                let terms = prediction.x_0_coefficients(level.alpha, level.sigma);
                assert_eq!(with(terms).to_bits(), prediction.x_0(level, x, output).to_bits());
                let terms = prediction.eps_coefficients(level.alpha, level.sigma);
                assert_eq!(with(terms).to_bits(), prediction.eps(level, x, output).to_bits());
            }
        }
    }

    #[test]
    fn linear_combinations_take_any_number_of_terms() {
        let mut v = HostBuffers::new(1, 2);
        let [a, b, c, to] = [0, 1, 2, 3].map(BufferId);
        for (at, values) in [(a, [1.0, 2.0]), (b, [3.0, 5.0]), (c, [-1.0, 0.5])] {
            v.write(at, &values).unwrap();
        }
        v.linear_combination(to, &[(1.0, a), (-2.0, b)], 4.0).unwrap();
        assert_eq!(v.values(to), &[-1.25, -2.0]);
        v.linear_combination(to, &[(2.0, to), (1.0, a), (1.0, b), (-2.0, c)], 1.0).unwrap();
        assert_eq!(v.values(to), &[3.5, 2.0]);
        v.linear_combination(to, &[], 1.0).unwrap();
        assert_eq!(v.values(to), &[0.0, 0.0]);
    }
}
