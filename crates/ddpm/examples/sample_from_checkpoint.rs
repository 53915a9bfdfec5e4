//! Drawing images from a checkpoint: of the folder given, or of a network that is trained for a moment first.
//!
//! ```sh
//! cargo run --release -p ddpm --example sample_from_checkpoint -- runs/run-001/checkpoints/step-0002000 grid.png
//! cargo run --release -p ddpm --example sample_from_checkpoint
//! ```

use ddpm::Result;
use ddpm::data::digits::Digits;
use ddpm::generate::{Generator, Request};
use ddpm::image::{grid, save_png};
use ddpm::sampler::{self, Options};
use ddpm::train::Trainer;
use ddpm::train::checkpoint::{self, Which};
use ddpm::train::config::Config;
use std::path::{Path, PathBuf};

fn main() -> Result<()> {
    let mut arguments = std::env::args_os().skip(1).map(PathBuf::from);
    let temporary = std::env::temp_dir().join("ddpm-example");
    let checkpoint = match arguments.next() {
        Some(path) => path,
        None => make_checkpoint(&temporary)?,
    };
    let sheet = arguments.next().unwrap_or_else(|| temporary.with_extension("png"));

    // The averaged weights where there are any; 0: all cores.
    let generator = Generator::open(&checkpoint, Which::Auto, 0)?;
    let sampling = Options { sampler: sampler::find("ddim")?, steps: Some(20), ..Options::default() };
    let request = Request { count: 16, seed: 7, sampling, ..Request::default() };
    let images = generator.draw(request, &mut |_first, step| {
        if step.done == step.steps {
            println!("{} steps done, {} numbers", step.steps, step.x.len());
        }
        Ok(())
    })?;
    save_png(&grid(&images, 4, 2), &sheet)?;
    println!("{}", sheet.display());
    Ok(())
}

/// Trains a tiny network for a few steps: its images are still noise.
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
