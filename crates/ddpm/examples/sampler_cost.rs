//! Measures the overhead of each sampler per step, by sampling with a trivial network.
//!
//! ```sh
//! cargo run --release -p ddpm --example sampler_cost
//! ```
//!
//! Compare with the time of a denoising step in `ddpm bench --only sample`.

use ddpm::denoiser::Denoiser;
use ddpm::process::Prediction;
use ddpm::sampler::{NoiseKey, SAMPLERS, SamplerOptions};
use ddpm::schedule::Schedule;
use std::time::Instant;

const STEPS: usize = 50;

/// Predicts a constant.
struct Nothing;

impl Denoiser for Nothing {
    fn batch(&self) -> usize {
        64
    }

    fn image_len(&self) -> usize {
        28 * 28
    }

    fn predict(&mut self, _: &[f32], _: f64, output: &mut [f32]) -> ddpm::diffusion::Result<()> {
        output.fill(0.1);
        Ok(())
    }
}

fn main() -> ddpm::Result<()> {
    let schedule = Schedule::linear(1000, 1e-4, 0.02)?;
    for sampler in SAMPLERS {
        let options = SamplerOptions { sampler, steps: Some(STEPS), ..SamplerOptions::default() };
        let built = options.build(&schedule, Prediction::Eps)?;
        let start = Instant::now();
        built.sample(&mut Nothing, NoiseKey { seed: 1, first: 0 }, &mut |_| Ok(()))?;
        let step = start.elapsed().as_secs_f64() * 1e3 / STEPS as f64;
        println!("{:16} {step:.3} ms per step of 64 images of 28x28", sampler.name);
    }
    Ok(())
}
