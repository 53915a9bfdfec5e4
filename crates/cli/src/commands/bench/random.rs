//! Images of noise of any shape, for measuring without files.

use ddpm::data::{Dataset, Draw, ImageShape, Summary};
use ddpm::nets;
use ddpm::train::config::{Config, Size};
use ddpm_engine::rng::{Purpose, Stream};

/// How many there are.
const IMAGES: usize = 4096;
/// What size they have where no setting says it: that of the built-in digits.
const SIDE: usize = 28;

/// Each image is a window of one row of random numbers, so that reading takes no time and little memory.
pub struct RandomImages {
    numbers: Vec<f32>,
    classes: Vec<String>,
    summary: Summary,
}

impl RandomImages {
    /// Of the size and channels of the settings (28x28 grey if they say none), with as many classes as the network
    /// wants.
    pub fn new(config: &Config) -> Self {
        let Size { height, width } = config.image_size().unwrap_or(Size { height: SIDE, width: SIDE });
        let shape = ImageShape { height, width, channels: config.image_channels().unwrap_or(1) };
        let classes = nets::from_config(config, shape.channels).classes().unwrap_or(0);
        let uniforms = Stream::new(0, Purpose::Test, 0, 0).uniforms();
        let numbers: Vec<f32> =
            uniforms.take(shape.values() + IMAGES).map(|u| (2.0 * u - 1.0) as f32).collect();
        let summary = Summary {
            source: "random images".to_owned(),
            images: IMAGES,
            shape,
            bit_depth: 8,
            classes,
            found: Vec::new(),
            skipped: Vec::new(),
            memory_bytes: (numbers.len() * size_of::<f32>()) as u64,
            fingerprint: String::new(),
            notes: Vec::new(),
        };
        Self { numbers, classes: (0..classes).map(|c| c.to_string()).collect(), summary }
    }
}

impl Dataset for RandomImages {
    fn classes(&self) -> &[String] {
        &self.classes
    }

    fn label(&self, index: usize) -> Option<u32> {
        (!self.classes.is_empty()).then(|| (index % self.classes.len()) as u32)
    }

    fn read(&self, index: usize, _: Draw, out: &mut [f32]) -> ddpm::Result<()> {
        out.copy_from_slice(&self.numbers[index..index + out.len()]);
        Ok(())
    }

    fn summary(&self) -> &Summary {
        &self.summary
    }
}
