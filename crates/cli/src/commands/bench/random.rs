//! Random images of any shape, for benchmarks without files.

use ddpm::config::{Config, Size};
use ddpm::data::{AugmentKey, Dataset, ImageShape, Summary};
use ddpm_rng::{Purpose, Stream};

/// Number of images.
const IMAGES: usize = 4096;
/// Default size, that of the built-in digits.
const SIDE: usize = 28;

/// Each image is a window into one random sequence, so that reading takes little time and memory.
pub struct RandomImages {
    values: Vec<f32>,
    classes: Vec<String>,
    summary: Summary,
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
        let summary = Summary {
            source: "random images".to_owned(),
            images: IMAGES,
            shape,
            bit_depth: 8,
            classes,
            found: Vec::new(),
            skipped: Vec::new(),
            memory_bytes: (values.len() * size_of::<f32>()) as u64,
            fingerprint: String::new(),
            notes: Vec::new(),
        };
        Self { values, classes: (0..classes).map(|c| c.to_string()).collect(), summary }
    }
}

impl Dataset for RandomImages {
    fn classes(&self) -> &[String] {
        &self.classes
    }

    fn label(&self, index: usize) -> Option<u32> {
        (!self.classes.is_empty()).then(|| (index % self.classes.len()) as u32)
    }

    fn read(&self, index: usize, _: AugmentKey, out: &mut [f32]) -> ddpm::Result<()> {
        out.copy_from_slice(&self.values[index..index + out.len()]);
        Ok(())
    }

    fn summary(&self) -> &Summary {
        &self.summary
    }
}
