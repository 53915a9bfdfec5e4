//! Sampling images from a given checkpoint folder, or from a network trained for a few steps.
//!
//! ```sh
//! cargo run --release -p ddpm --example sample_from_checkpoint -- runs/run-001/checkpoints/step-0002000 grid.png
//! cargo run --release -p ddpm --example sample_from_checkpoint
//! ```

use ddpm::Result;
use ddpm::config::Config;
use ddpm::data::digits::Digits;
use ddpm::generate::{Pipeline, SampleRequest};
use ddpm::image::{grid, save_png};
use ddpm::sampler::{self, SamplerOptions};
use ddpm::train::Trainer;
use ddpm::train::checkpoint::{self, WeightsChoice};
use std::path::{Path, PathBuf};

fn main() -> Result<()> {
    let mut arguments = std::env::args_os().skip(1).map(PathBuf::from);
    let temporary = std::env::temp_dir().join("ddpm-example");
    let checkpoint = match arguments.next() {
        Some(path) => path,
        None => make_checkpoint(&temporary)?,
    };
    let sheet = arguments.next().unwrap_or_else(|| temporary.with_extension("png"));

    // Averaged weights if present; 0 threads means all cores.
    let pipeline = Pipeline::open(&checkpoint, WeightsChoice::Auto, 0)?;
    let sampling =
        SamplerOptions { sampler: sampler::find("ddim")?, steps: Some(20), ..SamplerOptions::default() };
    let request = SampleRequest { count: 16, seed: 7, sampling, ..SampleRequest::default() };
    let images = pipeline.sample(request, &mut |_first, step| {
        if step.done == step.steps {
            println!("{} steps done, {} values", step.steps, step.x.len());
        }
        Ok(())
    })?;
    save_png(&grid(&images, 4, 2), &sheet)?;
    println!("{}", sheet.display());
    Ok(())
}

/// Trains a tiny network for a few steps; its samples are still noise.
fn make_checkpoint(folder: &Path) -> Result<PathBuf> {
    let set = |key: &str, value: &str| (key.to_owned(), value.to_owned());
    let config = Config::load(
        Some("digits"),
        None,
        &[
            set("attention.down_channels", "16, 32"),
            set("attention.mid_channels", "32, 16"),
            set("attention.down_sample", "true"),
            set("train.batch_size", "8"),
        ],
    )?;
    let mut trainer = Trainer::new(&config, Box::new(Digits::new(0, 16, 200)?))?;
    for _ in 0..5 {
        trainer.step()?;
    }
    checkpoint::save(folder, &trainer.checkpoint(None)?)
}
