//! Images of one size as plain bytes in memory, one after the other: what IDX files, CIFAR's batches and the built-in
//! digits are.

use std::path::PathBuf;

use super::super::decode::{Facts, Pixels, Samples, reduced};
use super::super::options::DataOptions;
use super::Source;

/// 8-bit images in memory.
pub(in crate::data) struct Packed {
    /// Rows.
    pub height: usize,
    /// Columns.
    pub width: usize,
    /// Channels, those of a pixel together.
    pub channels: usize,
    /// The samples of all images; a whole number of them.
    pub data: Vec<u8>,
    /// The classes of all images, or nothing.
    pub labels: Vec<u32>,
    /// The files, each with the number of its first image, from 0 up.
    pub files: Vec<(usize, PathBuf)>,
}

impl Packed {
    fn values(&self) -> usize {
        self.height * self.width * self.channels
    }
}

impl Source for Packed {
    fn len(&self) -> usize {
        self.data.len() / self.values().max(1)
    }

    fn place(&self, i: usize) -> PathBuf {
        match self.files.iter().rfind(|(first, _)| *first <= i) {
            Some((first, path)) => format!("{}#{}", path.display(), i - first).into(),
            None => format!("#{i}").into(),
        }
    }

    fn name(&self, _: usize) -> &[u8] {
        &[]
    }

    fn label(&self, i: usize) -> Option<u32> {
        self.labels.get(i).copied()
    }

    fn image(&self, i: usize, options: &DataOptions) -> Result<(Pixels, Facts), String> {
        let values = self.values();
        let samples = Samples::U8(self.data[i * values..][..values].to_vec());
        let (height, width, channels) = (self.height, self.width, self.channels);
        Ok(reduced(Pixels { height, width, channels, samples }, options))
    }

    fn memory(&self) -> u64 {
        self.data.len() as u64
    }
}
