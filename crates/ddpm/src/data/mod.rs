//! Data sets: images in, [-1, 1] channels-last numbers out.
//!
//! [`open`] looks at a path and finds out what it holds: a folder of images, a folder with one folder per class, a
//! zip of either, IDX files (the form MNIST comes in), CIFAR's binary batches; with [`CsvOptions`], a folder whose
//! images a CSV file names. [`digits::Digits`] is a data set that the program draws itself. Either way the images
//! have one [`ImageShape`], values in [-1, 1] and, where there are classes, a label. [`check()`] tells all about a
//! path, and [`loader::Loader`] reads ahead of a training.
//!
//! `source` knows the formats, `decode`, `transform` and `resize` make one image of a file, `form` and `images` a
//! set of many; [`open_image`] is for a file alone.

mod check;
mod classes;
mod decode;
pub mod digits;
mod form;
mod frames;
mod images;
mod jpeg;
pub mod loader;
mod mask;
mod options;
mod order;
mod resize;
mod single;
mod source;
#[cfg(test)]
mod support;
mod transform;

use std::fmt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};
use crate::text::{listed, shown};
pub use check::{Check, check};
pub use mask::{Mask, open_mask};
pub use options::{Alpha, CsvOptions, DataOptions, OnBadFile, Resize};
pub use order::{Draw, Order, Turn};
pub use single::{Single, open_image};

/// Decoded images are kept in memory up to this many bytes in all (2 GiB); see [`open_within`].
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
    /// How many numbers an image has.
    pub fn values(&self) -> usize {
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

/// Images of one shape, read by number.
pub trait Dataset: Send + Sync {
    /// How many images there are; at least one for what [`open`] returns.
    fn len(&self) -> usize {
        self.summary().images
    }

    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The shape of every image.
    fn shape(&self) -> ImageShape {
        self.summary().shape
    }

    /// The classes' names, by label; empty when there are no labels.
    fn classes(&self) -> &[String];

    /// The class of image `index`.
    fn label(&self, index: usize) -> Option<u32>;

    /// Writes image `index` into `out` (height, width, channels), a sample of `bits` bits as
    /// `v / (2^bits - 1) * 2 - 1`. Random crops and flips, where the set has them, are a function of `draw` and
    /// `index`; other sets take no notice of `draw`.
    ///
    /// # Errors
    /// When a set that is too large for memory is read from disk and the file has changed or gone.
    ///
    /// # Panics
    /// If `index` is not below [`len`](Self::len) or `out` is not `shape().values()` long.
    fn read(&self, index: usize, draw: Draw, out: &mut [f32]) -> Result<()>;

    /// What was found, for a person to read and for a run to record.
    fn summary(&self) -> &Summary;
}

/// What a data set is and what was done to make it one.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Summary {
    /// The path, or what was drawn.
    pub source: String,
    /// How many images there are, without the skipped ones.
    pub images: usize,
    /// The shape that they are given.
    pub shape: ImageShape,
    /// Bits a sample: 8, or 16 when some image has 16.
    pub bit_depth: u8,
    /// How many classes there are; 0 when there are no labels.
    pub classes: usize,
    /// The forms that the files have, the most frequent first.
    pub found: Vec<Found>,
    /// The files left out, each with its reason.
    #[serde(serialize_with = "lossy_paths")]
    pub skipped: Vec<(PathBuf, String)>,
    /// Bytes of images kept in memory; 0 when they are read from disk and decoded at each reading.
    pub memory_bytes: u64,
    /// SHA-256 in hex over the names, labels and decoded pixels, in order.
    pub fingerprint: String,
    /// What a person should be told.
    pub notes: Vec<String>,
}

/// One form of image among the files, and how many have it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Found {
    /// Rows, of the upright image.
    pub height: usize,
    /// Columns, of the upright image.
    pub width: usize,
    /// Channels as stored.
    pub channels: usize,
    /// Bits a sample as stored (a palette counts as 8).
    pub bits: u8,
    /// How many images have this form.
    pub images: usize,
}

/// Names need not be UTF-8, JSON must be.
fn lossy_paths<S: serde::Serializer>(paths: &[(PathBuf, String)], s: S) -> Result<S::Ok, S::Error> {
    s.collect_seq(paths.iter().map(|(path, reason)| (path.to_string_lossy(), reason)))
}

/// Opens the data set at `path`: a folder of images, a folder with one folder per class, a zip of either, one
/// image, a folder
/// with IDX files or CIFAR's binary batches, or one such file.
///
/// # Errors
/// [`Error::Data`] when the set as a whole does not do, [`Error::BadFiles`] with every file that cannot be decoded
/// (unless they are to be skipped), [`Error::Config`] for options out of range, [`Error::Io`].
pub fn open(path: &Path, options: &DataOptions) -> Result<Box<dyn Dataset>> {
    open_within(path, options, DEFAULT_MEMORY)
}

/// [`open`] with another limit on the bytes of decoded images held in memory. More images than that are decoded at
/// each reading; larger IDX files and CIFAR batches, which are read whole, are refused.
pub fn open_within(path: &Path, options: &DataOptions, memory: u64) -> Result<Box<dyn Dataset>> {
    Ok(Box::new(survey(path, options, memory, false)?.into_set(options)?))
}

/// Every image at `path` decoded once.
fn survey(path: &Path, options: &DataOptions, memory: u64, contents: bool) -> Result<images::DatasetScan> {
    options.check()?;
    let content = source::find(path, options, memory)?;
    images::DatasetScan::new(path, shown(path), content, options, memory, contents)
}

/// An [`Error::Data`].
fn unusable(path: &Path, reason: impl Into<String>) -> Error {
    Error::Data { path: path.to_owned(), reason: reason.into() }
}

/// "1 image", "2 images".
fn count(n: usize, what: &str) -> String {
    format!("{n} {what}{}", if n == 1 { "" } else { "s" })
}

/// The first few of `items`, and how many more.
fn shorten(items: &[String]) -> String {
    listed(items, 5)
}

/// Builds [`Summary::fingerprint`].
struct Fingerprint(Sha256);

impl Fingerprint {
    fn new() -> Self {
        Self(Sha256::new_with_prefix(b"ddpm images 1\n"))
    }

    /// Adds an image; `digest` is of its samples.
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
    fn shapes_read_as_words() {
        let shown = |channels| ImageShape { height: 28, width: 32, channels }.to_string();
        assert_eq!([1, 2, 3, 4].map(shown), ["28x32 grey", "28x32 grey+alpha", "28x32 RGB", "28x32 RGBA"]);
    }

    #[cfg(unix)]
    #[test]
    fn a_summary_with_names_that_are_not_utf8_becomes_json() {
        use std::os::unix::ffi::OsStringExt;
        let digits = digits::Digits::new(0, 12, 1).unwrap();
        let name = std::ffi::OsString::from_vec(b"caf\xe9.png".to_vec());
        let summary = Summary { skipped: vec![(name.into(), "is empty".into())], ..digits.summary().clone() };
        let json = serde_json::to_value(&summary).unwrap();
        assert_eq!(json["skipped"][0][0], "caf\u{fffd}.png");
        assert_eq!(json["shape"]["height"], 12);
    }
}
