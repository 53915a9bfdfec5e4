//! Training on a custom data set: implement [`Dataset`], pass it to a [`Trainer`], train, and sample images.
//!
//! ```sh
//! cargo run --release -p ddpm --example own_data_set
//! ```

use ddpm::data::{AugmentKey, Dataset};
use ddpm::sampler::SamplerOptions;
use ddpm::{Config, Result, SampleRequest, Trainer};

const SIZE: usize = 16;

/// White discs of various sizes on black, generated on the fly.
struct Discs {
    images: usize,
}

impl Dataset for Discs {
    /// Images, height, width, channels.
    fn dims(&self) -> [usize; 4] {
        [self.images, SIZE, SIZE, 1]
    }

    /// Height, width, channels; -1 is black and 1 is white. The unused argument would seed random crops or flips.
    fn read(&self, index: usize, _key: AugmentKey, out: &mut [f32]) -> ddpm::data::Result<()> {
        let radius = 2.0 + 5.0 * index as f32 / self.images as f32;
        let centre = (SIZE as f32 - 1.0) / 2.0;
        for (i, value) in out.iter_mut().enumerate() {
            let (y, x) = ((i / SIZE) as f32 - centre, (i % SIZE) as f32 - centre);
            // The edge is one pixel wide.
            *value = (2.0 * (radius - y.hypot(x))).clamp(-1.0, 1.0);
        }
        Ok(())
    }
}

fn main() -> Result<()> {
    let config = Config::builder()
        .batch_size(16)
        .lr(2e-3)
        .set("attention.down_channels", "16, 32")
        .set("attention.mid_channels", "32, 16")
        .set("attention.down_sample", "true")
        .set("diffusion.timesteps", 200)
        .build()?;
    let mut trainer = Trainer::new(&config, Box::new(Discs { images: 500 }))?;
    println!("{} parameters", trainer.num_parameters());

    let (mut first, mut last) = (0.0, 0.0);
    for step in 0..60 {
        let loss = trainer.step()?.loss;
        match step {
            0..10 => first += loss / 10.0,
            50..60 => last += loss / 10.0,
            _ => {}
        }
    }
    println!("mean loss {first:.3} over the first ten steps, {last:.3} over the last ten");
    assert!(last < first, "the network learns");

    // Sample from the averaged weights as they are now; a `Run` would have saved them in its folder.
    let pipeline = trainer.pipeline()?;
    let sampling = SamplerOptions { steps: Some(20), ..SamplerOptions::default() };
    let images =
        pipeline.sample(SampleRequest { count: 4, seed: 1, sampling, ..SampleRequest::default() })?;
    println!("sampled {} images of {}", images.len(), pipeline.shape());
    Ok(())
}
