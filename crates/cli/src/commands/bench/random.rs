//! Random images of any shape, for benchmarks without files.

use ddpm::config::{Config, Size};
use ddpm::data::{AugmentKey, Dataset, ImageShape};
use ddpm_rng::{Purpose, Stream};

/// Number of images.
const IMAGES: usize = 4096;
/// Default size, that of the built-in digits.
const SIDE: usize = 28;

/// Each image is a window into one random sequence, so that reading takes little time and memory.
pub struct RandomImages {
    values: Vec<f32>,
    classes: Vec<String>,
    shape: ImageShape,
}

impl RandomImages {
    /// Images with the size and channels of the settings (default 28x28 grey) and the network's number of classes.
    pub fn new(config: &Config) -> Self {
        let Size { height, width } = config.image_size().unwrap_or(Size { height: SIDE, width: SIDE });
        let shape = ImageShape { height, width, channels: config.image_channels().unwrap_or(1) };
        let classes = config.build_network(shape.channels).classes().unwrap_or(0);
        let uniforms = Stream::new(0, Purpose::Test, 0, 0).uniforms();
        let values: Vec<f32> =
            uniforms.take(shape.num_elements() + IMAGES).map(|u| (2.0 * u - 1.0) as f32).collect();
        Self { values, shape, classes: (0..classes).map(|c| c.to_string()).collect() }
    }
}

impl Dataset for RandomImages {
    fn dims(&self) -> [usize; 4] {
        [IMAGES, self.shape.height, self.shape.width, self.shape.channels]
    }

    fn classes(&self) -> &[String] {
        &self.classes
    }

    fn label(&self, index: usize) -> Option<u32> {
        (!self.classes.is_empty()).then(|| (index % self.classes.len()) as u32)
    }

    fn read(&self, index: usize, _: AugmentKey, out: &mut [f32]) -> ddpm::data::Result<()> {
        out.copy_from_slice(&self.values[index..index + out.len()]);
        Ok(())
    }
}
