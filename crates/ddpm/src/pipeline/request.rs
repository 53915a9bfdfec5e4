//! What to sample: how many images, of which classes, how.

use crate::guidance::Guidance;
use crate::sampler::SamplerOptions;

/// Default number of images per batch.
pub const BATCH: usize = 64;

/// The class of each image, for class-conditional networks; indices wrap around after the last class.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Labels {
    /// Image i has class i.
    Cycle,
    /// Unconditional.
    Unlabelled,
    /// All images have this class.
    Fixed(u32),
    /// This many images of each class in turn.
    Grouped(usize),
}

impl Labels {
    /// The class of image `i`, out of `classes`.
    pub fn of(self, i: usize, classes: u32) -> Option<u32> {
        let classes = classes.max(1) as usize;
        match self {
            Self::Fixed(class) => Some(class),
            Self::Cycle => Some((i % classes) as u32),
            Self::Grouped(row) => Some((i / row.max(1) % classes) as u32),
            Self::Unlabelled => None,
        }
    }
}

/// What to sample, and how.
#[derive(Clone, Copy, Debug)]
pub struct SampleRequest {
    /// Number of images.
    pub count: usize,
    /// The seed; image i depends only on it and i.
    pub seed: u64,
    /// Largest number of images per batch.
    pub batch: usize,
    /// The classes, for class-conditional networks.
    pub class: Labels,
    /// Guidance towards the class.
    pub guidance: Guidance,
    /// The sampler and its settings.
    pub sampling: SamplerOptions,
}

impl Default for SampleRequest {
    fn default() -> Self {
        Self {
            count: 1,
            seed: 0,
            batch: BATCH,
            class: Labels::Cycle,
            guidance: Guidance::default(),
            sampling: SamplerOptions::default(),
        }
    }
}

impl SampleRequest {
    /// Number of batches and images in each. All have the same size, so that one plan serves them all; the
    /// last may sample a few surplus images.
    pub fn batches(&self) -> (usize, usize) {
        let batches = self.count.div_ceil(self.batch.max(1)).max(1);
        (batches, self.count.div_ceil(batches).max(1))
    }
}
