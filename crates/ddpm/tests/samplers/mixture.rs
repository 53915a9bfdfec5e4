//! A mixture of normals, whose optimal denoiser is known.

use ddpm::denoiser::Denoiser;
use ddpm::process::Prediction;
use ddpm::schedule::{Level, Schedule};

/// One component of a mixture.
#[derive(Clone, Copy, Debug)]
pub struct Part {
    pub weight: f64,
    pub mean: f64,
    pub deviation: f64,
}

/// Images of independent elements from one mixture.
pub struct Mixture {
    pub schedule: Schedule,
    pub parts: Vec<Part>,
    pub prediction: Prediction,
    pub batch: usize,
    pub len: usize,
    /// Number of evaluations.
    pub evals: usize,
    /// Whether it has a learned variance, sin(3 x).
    pub has_variance: bool,
    variance: Vec<f32>,
}

impl Mixture {
    /// One element per image; predicts noise.
    pub fn new(schedule: &Schedule, parts: &[Part], batch: usize) -> Self {
        let schedule = schedule.clone();
        Self {
            schedule,
            parts: parts.to_vec(),
            prediction: Prediction::Eps,
            batch,
            len: 1,
            evals: 0,
            has_variance: false,
            variance: Vec::new(),
        }
    }

    /// Mean and variance of a noisy component.
    fn noisy(part: Part, level: Level) -> (f64, f64) {
        (level.alpha * part.mean, (level.alpha * part.deviation).powi(2) + level.sigma.powi(2))
    }

    /// `E[x_0 | x]`, as a function of x.
    pub fn expected(&self, level: Level) -> impl Fn(f64) -> f64 + use<> {
        let components = self.parts.iter().map(|&part| {
            let (mean, variance) = Self::noisy(part, level);
            let gain = level.alpha * part.deviation.powi(2) / variance;
            (part.weight.ln() - 0.5 * variance.ln(), mean, 0.5 / variance, part.mean, gain)
        });
        let components: Vec<_> = components.collect();
        move |x| {
            let log = |&(log, mean, rate, ..): &(f64, f64, f64, f64, f64)| log - (x - mean).powi(2) * rate;
            let max = components.iter().map(log).fold(f64::NEG_INFINITY, f64::max);
            let (mut sum, mut total) = (0.0, 0.0);
            for part in &components {
                let &(_, mean, _, clean, gain) = part;
                let share = (log(part) - max).exp();
                total += share;
                sum += share * (clean + gain * (x - mean));
            }
            sum / total
        }
    }

    /// The cumulative distribution function of the noisy data at x.
    pub fn below(&self, x: f64, level: Level) -> f64 {
        let parts = self.parts.iter().map(|&part| {
            let (mean, variance) = Self::noisy(part, level);
            part.weight * 0.5 * libm::erfc((mean - x) / (2.0 * variance).sqrt())
        });
        parts.sum()
    }

    /// Where the probability flow ODE takes x from one level to another: it preserves the cumulative
    /// distribution.
    pub fn flow(&self, x: f64, from: Level, to: Level) -> f64 {
        let wanted = self.below(x, from);
        let (mut low, mut high) = (-20.0, 20.0);
        for _ in 0..200 {
            let middle = 0.5 * (low + high);
            if self.below(middle, to) < wanted { low = middle } else { high = middle }
        }
        0.5 * (low + high)
    }
}

impl Denoiser for Mixture {
    fn batch(&self) -> usize {
        self.batch
    }

    fn image_len(&self) -> usize {
        self.len
    }

    fn prediction(&self) -> Prediction {
        self.prediction
    }

    fn predict(&mut self, x_t: &[f32], t: f64, output: &mut [f32]) -> ddpm::diffusion::Result<()> {
        self.evals += 1;
        let level = self.schedule.level(t);
        let expected = self.expected(level);
        for (output, &x) in output.iter_mut().zip(x_t) {
            let x = f64::from(x);
            let x_0 = expected(x);
            *output = self.prediction.target(level, x_0, (x - level.alpha * x_0) / level.sigma) as f32;
        }
        if self.has_variance {
            self.variance = x_t.iter().map(|&x| (3.0 * f64::from(x)).sin() as f32).collect();
        }
        Ok(())
    }

    fn variance(&self) -> Option<&[f32]> {
        self.has_variance.then_some(&self.variance)
    }
}
