//! Test data with a known optimal denoiser.

use crate::denoiser::Denoiser;
use crate::error::Result;
use crate::process::Prediction;
use crate::schedule::Schedule;

/// Images of two jointly normal values with equal standard deviations.
pub(super) struct Gaussian {
    pub mean: [f64; 2],
    pub deviation: f64,
    pub correlation: f64,
    pub batch: usize,
    pub prediction: Prediction,
}

pub(super) fn schedule() -> Schedule {
    Schedule::linear(1000, 1e-4, 0.02).unwrap()
}

impl Gaussian {
    /// Means 0.1 and 0.2, standard deviation 0.4, correlation 0.9.
    pub fn correlated(batch: usize, prediction: Prediction) -> Self {
        Self { mean: [0.1, 0.2], deviation: 0.4, correlation: 0.9, batch, prediction }
    }

    /// `E[x_0 | x_t]`: half the sum and half the difference of the values are independent, with variances
    /// proportional to `v (1 + c)` and `v (1 - c)`.
    pub fn expected(&self, x: [f64; 2], alpha: f64, sigma: f64) -> [f64; 2] {
        let v = self.deviation * self.deviation;
        let off = [x[0] - alpha * self.mean[0], x[1] - alpha * self.mean[1]];
        let gain = |v: f64| alpha * v / (alpha * alpha * v + sigma * sigma);
        let sum = 0.5 * (off[0] + off[1]) * gain(v * (1.0 + self.correlation));
        let difference = 0.5 * (off[0] - off[1]) * gain(v * (1.0 - self.correlation));
        [self.mean[0] + sum + difference, self.mean[1] + sum - difference]
    }
}

impl Denoiser for Gaussian {
    fn batch(&self) -> usize {
        self.batch
    }

    fn image_len(&self) -> usize {
        2
    }

    fn prediction(&self) -> Prediction {
        self.prediction
    }

    fn predict(&mut self, x_t: &[f32], t: f64, output: &mut [f32]) -> Result<()> {
        let level = schedule().level(t);
        for (x, out) in x_t.chunks(2).zip(output.chunks_mut(2)) {
            let x = [f64::from(x[0]), f64::from(x[1])];
            let x_0 = self.expected(x, level.alpha, level.sigma);
            for i in 0..2 {
                let eps = (x[i] - level.alpha * x_0[i]) / level.sigma;
                out[i] = self.prediction.target(level, x_0[i], eps) as f32;
            }
        }
        Ok(())
    }
}
