//! Raw 8-bit images of one size, contiguous in memory: IDX files, CIFAR's batches and the built-in digits.

use std::path::PathBuf;

use super::super::decode::{DecodeInfo, Pixels, Samples, reduced};
use super::super::options::DataOptions;
use super::ImageSource;

/// 8-bit images in memory.
pub(crate) struct Packed {
    /// Rows.
    pub height: usize,
    /// Columns.
    pub width: usize,
    /// Channels, interleaved.
    pub channels: usize,
    /// The samples of all images.
    pub data: Vec<u8>,
    /// The labels of all images; empty if there are no classes.
    pub labels: Vec<u32>,
    /// The files, each with the index of its first image, in ascending order.
    pub files: Vec<(usize, PathBuf)>,
}

impl Packed {
    fn image_len(&self) -> usize {
        self.height * self.width * self.channels
    }
}

impl ImageSource for Packed {
    fn len(&self) -> usize {
        self.data.len() / self.image_len().max(1)
    }

    fn location(&self, i: usize) -> PathBuf {
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

    fn image(&self, i: usize, options: &DataOptions) -> Result<(Pixels, DecodeInfo), String> {
        let len = self.image_len();
        let samples = Samples::U8(self.data[i * len..][..len].to_vec());
        let (height, width, channels) = (self.height, self.width, self.channels);
        Ok(reduced(Pixels { height, width, channels, samples }, options))
    }

    fn memory(&self) -> u64 {
        self.data.len() as u64
    }
}
