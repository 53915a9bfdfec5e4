//! Samplers on the host: a denoiser of slices, and buffers in host memory.

use super::state::{axpby, clamp_rescale};
use crate::buffers::{BufferId, NUM_BUFFERS, SamplerBuffers};
use crate::denoiser::{Denoiser, DeviceDenoiser};
use crate::error::Result;
use crate::noise::NoiseKey;
use crate::process::Prediction;
use ddpm_rng::Purpose;

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
