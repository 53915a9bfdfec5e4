//! Sampling with a custom denoiser: instead of a network, the optimal prediction for data with a known distribution,
//! to check that the sampler reproduces it.
//!
//! ```sh
//! cargo run --release -p ddpm --example own_denoiser
//! ```

use ddpm::Result;
use ddpm::denoiser::Denoiser;
use ddpm::sampler::{Ddpm, Levels, NoiseKey, Sampler, Threshold, Variance};
use ddpm::schedule::Schedule;

/// "Images" of independent values, value i with the distribution N(mean\[i\], variance\[i\]).
struct Gaussian {
    schedule: Schedule,
    mean: Vec<f64>,
    variance: Vec<f64>,
    batch: usize,
}

impl Denoiser for Gaussian {
    fn batch(&self) -> usize {
        self.batch
    }

    fn image_len(&self) -> usize {
        self.mean.len()
    }

    /// x_t = sqrt(a) x_0 + sqrt(1 - a) eps and eps are jointly normal, so E[eps | x_t] is linear in x_t:
    /// cov(eps, x_t) / var(x_t) (x_t - E[x_t]) = sqrt(1 - a) / (a variance + 1 - a) (x_t - sqrt(a) mean).
    fn predict(&mut self, x_t: &[f32], t: f64, eps: &mut [f32]) -> ddpm::diffusion::Result<()> {
        let a = self.schedule.level(t).alpha.powi(2);
        for (x_t, eps) in x_t.chunks(self.mean.len()).zip(eps.chunks_mut(self.mean.len())) {
            for i in 0..self.mean.len() {
                let slope = (1.0 - a).sqrt() / (a * self.variance[i] + 1.0 - a);
                eps[i] = (slope * (f64::from(x_t[i]) - a.sqrt() * self.mean[i])) as f32;
            }
        }
        Ok(())
    }
}

fn main() -> Result<()> {
    let schedule = Schedule::linear(1000, 1e-4, 0.02)?;
    let (mean, variance) = (vec![-0.5, 0.0, 0.7], vec![0.04, 0.25, 0.01]);
    let mut gaussian = Gaussian { schedule: schedule.clone(), mean, variance, batch: 4000 };

    // Unclipped: these "images" may leave [-1, 1].
    let levels = Levels::all(&schedule)?;
    let sampler = Ddpm { levels, variance: Some(Variance::Small), threshold: Threshold::None };
    let x = sampler.sample(&mut gaussian, NoiseKey { seed: 7, first: 0 }, &mut |_| Ok(()))?;

    println!(" value   mean (true)       deviation (true)");
    for i in 0..gaussian.mean.len() {
        let values: Vec<f64> = x.iter().skip(i).step_by(gaussian.mean.len()).map(|&v| v.into()).collect();
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / values.len() as f64;
        let (true_mean, true_deviation) = (gaussian.mean[i], gaussian.variance[i].sqrt());
        println!("{i:6}   {mean:6.3} ({true_mean:6.3})   {:6.3} ({true_deviation:6.3})", variance.sqrt());
        // Four standard errors of 4000 samples, plus some discretisation error of 1000 steps.
        assert!((mean - true_mean).abs() < 0.08 * true_deviation + 0.005, "the mean is off");
        assert!((variance.sqrt() / true_deviation - 1.0).abs() < 0.06, "the deviation is off");
    }
    Ok(())
}
