//! Data sets: image files in, channels-last `f32` values in [-1, 1] out.
//!
//! [`open`] detects what a path holds: a folder of images, a folder with one subfolder per class, a zip of either, IDX
//! files (MNIST's format), CIFAR's binary batches; or, with [`CsvOptions`], a folder whose images are listed in a CSV
//! file. [`digits::Digits`] is a built-in, procedurally generated data set. All images of a data set have the same
//! [`ImageShape`], values in [-1, 1] and, if there are classes, a label. [`check()`] reports on everything at a path,
//! and [`loader::Loader`] prefetches batches for training.
//!
//! `source` reads the formats; `decode`, `transform` and `resize` turn one file into one image; `format` and `images`
//! bring many images to a common format; [`open_image`] reads a single file.

mod check;
mod classes;
mod decode;
pub mod digits;
mod format;
mod frames;
mod images;
mod jpeg;
mod loaded;
pub mod loader;
mod mask;
mod options;
mod order;
mod resize;
mod source;
#[cfg(test)]
mod test_util;
mod transform;

use std::fmt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};
use crate::text::{listed, shown};
pub use check::{Check, check};
pub use loaded::{LoadedImage, open_image};
pub use mask::{Mask, open_mask};
pub use options::{Alpha, CsvOptions, DataOptions, OnBadFile, Resize};
pub use order::{AugmentKey, SampleIndex, ShuffledSampler};

/// Default limit on the total size of decoded images kept in memory, in bytes (2 GiB); see [`open_within`].
pub const DEFAULT_MEMORY: u64 = 2 << 30;

/// Height, width and channels of every image of a data set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ImageShape {
    /// Rows.
    pub height: usize,
    /// Columns.
    pub width: usize,
    /// 1 grey, 2 grey and alpha, 3 RGB, 4 RGBA.
    pub channels: usize,
}

impl ImageShape {
    /// Elements per image: height x width x channels.
    pub fn num_elements(&self) -> usize {
        self.height * self.width * self.channels
    }
}

impl fmt::Display for ImageShape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}x{} {}", self.height, self.width, channels_name(self.channels))
    }
}

/// "grey", "RGB" and so on.
fn channels_name(channels: usize) -> &'static str {
    match channels {
        1 => "grey",
        2 => "grey+alpha",
        3 => "RGB",
        4 => "RGBA",
        _ => "unknown channels",
    }
}

/// Images of one shape, read by index.
pub trait Dataset: Send + Sync {
    /// Number of images; at least 1 for data sets returned by [`open`].
    fn len(&self) -> usize {
        self.summary().images
    }

    /// Whether there are no images.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The shape of every image.
    fn shape(&self) -> ImageShape {
        self.summary().shape
    }

    /// The class names, by label; empty if there are no labels.
    fn classes(&self) -> &[String];

    /// The label of image `index`.
    fn label(&self, index: usize) -> Option<u32>;

    /// Writes image `index` into `out` (height, width, channels), mapping a sample `v` of `bits` bits to
    /// `v / (2^bits - 1) * 2 - 1`. Random crops and flips, if enabled, are a function of `key` and `index`; data sets
    /// without augmentation ignore `key`.
    ///
    /// # Errors
    /// If the data set is too large for memory and a file has changed or disappeared since it was opened.
    ///
    /// # Panics
    /// If `index` is not below [`len`](Self::len) or `out` is not `shape().num_elements()` long.
    fn read(&self, index: usize, key: AugmentKey, out: &mut [f32]) -> Result<()>;

    /// A summary to print and to record with a run.
    fn summary(&self) -> &Summary;
}

/// What a data set contains and how its files were converted.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Summary {
    /// The path, or a description of the generated data.
    pub source: String,
    /// Number of images, not counting skipped ones.
    pub images: usize,
    /// The shape of every image after the transforms.
    pub shape: ImageShape,
    /// Bits per sample: 16 if any image has 16, else 8.
    pub bit_depth: u8,
    /// Number of classes; 0 if there are no labels.
    pub classes: usize,
    /// The formats of the files, most frequent first.
    pub found: Vec<FormatCount>,
    /// The skipped files, each with the reason.
    #[serde(serialize_with = "lossy_paths")]
    pub skipped: Vec<(PathBuf, String)>,
    /// Bytes of images kept in memory; 0 if every read decodes the file from disk.
    pub memory_bytes: u64,
    /// SHA-256 over the names, labels and decoded pixels, in order, as hex.
    pub fingerprint: String,
    /// Notes for the user.
    pub notes: Vec<String>,
}

/// The size and pixel format of an image file, and how many images of a data set have it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct FormatCount {
    /// Rows, after EXIF rotation.
    pub height: usize,
    /// Columns, after EXIF rotation.
    pub width: usize,
    /// Channels as stored.
    pub channels: usize,
    /// Bits per sample as stored (a palette counts as 8).
    pub bits: u8,
    /// Number of images with this format.
    pub images: usize,
}

/// File names need not be UTF-8, but JSON must be.
fn lossy_paths<S: serde::Serializer>(paths: &[(PathBuf, String)], s: S) -> Result<S::Ok, S::Error> {
    s.collect_seq(paths.iter().map(|(path, reason)| (path.to_string_lossy(), reason)))
}

/// Opens the data set at `path`: a folder of images, a folder with one subfolder per class, a zip of either, a single
/// image, a folder with IDX files or CIFAR's binary batches, or one such file.
///
/// # Errors
/// [`Error::Data`] if the data set as a whole is unusable, [`Error::BadFiles`] listing every file that cannot be decoded
/// (unless bad files are skipped), [`Error::Config`] for options out of range, [`Error::Io`].
pub fn open(path: &Path, options: &DataOptions) -> Result<Box<dyn Dataset>> {
    open_within(path, options, DEFAULT_MEMORY)
}

/// [`open`] with a custom limit on the bytes of decoded images kept in memory. Data sets above the limit are decoded from
/// disk on every read; IDX files and CIFAR batches above it, which are always loaded whole, are rejected.
pub fn open_within(path: &Path, options: &DataOptions, memory: u64) -> Result<Box<dyn Dataset>> {
    Ok(Box::new(scan(path, options, memory, false)?.into_set(options)?))
}

/// Decodes every image at `path` once. `contents` enables content hashes for duplicate detection.
fn scan(path: &Path, options: &DataOptions, memory: u64, contents: bool) -> Result<images::DatasetScan> {
    options.check()?;
    let content = source::find(path, options, memory)?;
    images::DatasetScan::new(path, shown(path), content, options, memory, contents)
}

/// An [`Error::Data`].
fn unusable(path: &Path, reason: impl Into<String>) -> Error {
    Error::Data { path: path.to_owned(), reason: reason.into() }
}

/// The first few of `items`, and the number of the others.
fn shorten(items: &[String]) -> String {
    listed(items, 5)
}

/// Builds [`Summary::fingerprint`].
struct Fingerprint(Sha256);

impl Fingerprint {
    fn new() -> Self {
        // The prefix stays: runs of earlier versions have fingerprints with it.
        Self(Sha256::new_with_prefix(b"ddpm pictures 1\n")) // earlier name
    }

    /// Adds an image; `digest` is the hash of its samples.
    fn add(&mut self, name: &[u8], label: Option<u32>, digest: &[u8]) {
        self.0.update((name.len() as u64).to_le_bytes());
        self.0.update(name);
        self.0.update(label.map_or(u64::MAX, u64::from).to_le_bytes());
        self.0.update(digest);
    }

    fn finish(self) -> String {
        hex(&self.0.finalize())
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_are_formatted_with_channel_names() {
        let shown = |channels| ImageShape { height: 28, width: 32, channels }.to_string();
        assert_eq!([1, 2, 3, 4].map(shown), ["28x32 grey", "28x32 grey+alpha", "28x32 RGB", "28x32 RGBA"]);
    }

    #[cfg(unix)]
    #[test]
    fn a_summary_with_non_utf8_names_serializes_to_json() {
        use std::os::unix::ffi::OsStringExt;
        let digits = digits::Digits::new(0, 12, 1).unwrap();
        let name = std::ffi::OsString::from_vec(b"caf\xe9.png".to_vec());
        let summary = Summary { skipped: vec![(name.into(), "is empty".into())], ..digits.summary().clone() };
        let json = serde_json::to_value(&summary).unwrap();
        assert_eq!(json["skipped"][0][0], "caf\u{fffd}.png");
        assert_eq!(json["shape"]["height"], 12);
    }
}
