//! Numbers drawn from a mixture of normals, whose best denoiser is known.

use ddpm::Result;
use ddpm::denoiser::Denoiser;
use ddpm::process::Prediction;
use ddpm::schedule::{Level, Schedule};

/// One normal of a mixture.
#[derive(Clone, Copy, Debug)]
pub struct Part {
    pub weight: f64,
    pub mean: f64,
    pub deviation: f64,
}

/// Images of independent numbers from one mixture.
pub struct Mixture {
    pub schedule: Schedule,
    pub parts: Vec<Part>,
    pub prediction: Prediction,
    pub batch: usize,
    pub numbers: usize,
    /// How often it was asked.
    pub asked: usize,
    /// Whether it tells a variance, the sine of three times a number.
    pub tells_variance: bool,
    variance: Vec<f32>,
}

impl Mixture {
    /// One number an image; noise is predicted.
    pub fn new(schedule: &Schedule, parts: &[Part], batch: usize) -> Self {
        let schedule = schedule.clone();
        Self {
            schedule,
            parts: parts.to_vec(),
            prediction: Prediction::Eps,
            batch,
            numbers: 1,
            asked: 0,
            tells_variance: false,
            variance: Vec::new(),
        }
    }

    /// Mean and variance of a part with noise.
    fn noisy(part: Part, level: Level) -> (f64, f64) {
        (level.alpha * part.mean, (level.alpha * part.deviation).powi(2) + level.sigma.powi(2))
    }

    /// `E[x_0 | x]`, as a function of x.
    pub fn expected(&self, level: Level) -> impl Fn(f64) -> f64 + use<> {
        let known = self.parts.iter().map(|&part| {
            let (mean, variance) = Self::noisy(part, level);
            let gain = level.alpha * part.deviation.powi(2) / variance;
            (part.weight.ln() - 0.5 * variance.ln(), mean, 0.5 / variance, part.mean, gain)
        });
        let known: Vec<_> = known.collect();
        move |x| {
            let log = |&(log, mean, rate, ..): &(f64, f64, f64, f64, f64)| log - (x - mean).powi(2) * rate;
            let most = known.iter().map(log).fold(f64::NEG_INFINITY, f64::max);
            let (mut sum, mut total) = (0.0, 0.0);
            for part in &known {
                let &(_, mean, _, clean, gain) = part;
                let share = (log(part) - most).exp();
                total += share;
                sum += share * (clean + gain * (x - mean));
            }
            sum / total
        }
    }

    /// The part of all numbers with noise that are below x.
    pub fn below(&self, x: f64, level: Level) -> f64 {
        let parts = self.parts.iter().map(|&part| {
            let (mean, variance) = Self::noisy(part, level);
            part.weight * 0.5 * libm::erfc((mean - x) / (2.0 * variance).sqrt())
        });
        parts.sum()
    }

    /// Where the probability flow takes x from one level to another: it keeps the part of the numbers that are below.
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
        self.numbers
    }

    fn prediction(&self) -> Prediction {
        self.prediction
    }

    fn predict(&mut self, x_t: &[f32], t: f64, output: &mut [f32]) -> Result<()> {
        self.asked += 1;
        let level = self.schedule.level(t);
        let expected = self.expected(level);
        for (output, &x) in output.iter_mut().zip(x_t) {
            let x = f64::from(x);
            let x_0 = expected(x);
            *output = self.prediction.target(level, x_0, (x - level.alpha * x_0) / level.sigma) as f32;
        }
        if self.tells_variance {
            self.variance = x_t.iter().map(|&x| (3.0 * f64::from(x)).sin() as f32).collect();
        }
        Ok(())
    }

    fn variance(&self) -> Option<&[f32]> {
        self.tells_variance.then_some(&self.variance)
    }
}
