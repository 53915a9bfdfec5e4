//! Samples a grid of images from a run.
//!
//! ```sh
//! cargo run --release -p ddpm --example sample -- runs/run-001 grid.png
//! ```

use ddpm::sampler::{self, SamplerOptions};
use ddpm::{Pipeline, Result, SampleRequest};

fn main() -> Result<()> {
    let mut arguments = std::env::args_os().skip(1);
    let run = arguments.next().unwrap_or_else(|| "runs/run-001".into());
    let grid = arguments.next().unwrap_or_else(|| "grid.png".into());

    let pipeline = Pipeline::open(run)?;
    // Twenty steps of DDIM; without this line, the run's own sampler.
    let sampling =
        SamplerOptions { sampler: sampler::find("ddim")?, steps: Some(20), ..SamplerOptions::default() };
    let request = SampleRequest { count: 16, seed: 7, sampling, ..SampleRequest::default() };
    let images = pipeline.sample_with(request, &mut |_first, step| {
        println!("step {} of {}", step.done, step.steps);
        Ok(())
    })?;
    images.grid(4).save(&grid)?;
    println!("{}", grid.display());
    Ok(())
}
