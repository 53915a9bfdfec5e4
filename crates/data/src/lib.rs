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

#![forbid(unsafe_code)]

mod check;
mod classes;
mod decode;
pub mod digits;
mod error;
mod format;
mod frames;
mod images;
mod jpeg;
mod loaded;
pub mod loader;
mod mask;
pub mod memory;
mod options;
mod order;
mod resize;
mod source;
#[cfg(test)]
mod test_util;
mod transform;

use std::borrow::Cow;
use std::fmt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

pub use check::{Check, check};
use ddpm_text::{listed, shown};
pub use error::{Error, Result, bad_files};
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

/// Images of one shape, read by index. A data set of one's own implements [`dims`](Self::dims) and [`read`](Self::read); with classes,
/// also [`classes`](Self::classes) and [`label`](Self::label).
///
/// ```
/// use ddpm_data::{AugmentKey, Dataset, Result};
///
/// /// Grey images of one colour each, from black to white.
/// struct Greys;
///
/// impl Dataset for Greys {
///     fn dims(&self) -> [usize; 4] {
///         [256, 8, 8, 1]
///     }
///
///     fn read(&self, index: usize, _: AugmentKey, out: &mut [f32]) -> Result<()> {
///         out.fill(index as f32 / 127.5 - 1.0);
///         Ok(())
///     }
/// }
/// assert_eq!(Greys.shape().to_string(), "8x8 grey");
/// ```
pub trait Dataset: Send + Sync {
    /// The shape of the whole set: images, height, width and channels. At least 1 image for data sets returned by [`open`].
    fn dims(&self) -> [usize; 4];

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

    /// Number of images.
    fn len(&self) -> usize {
        self.dims()[0]
    }

    /// Whether there are no images.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The shape of every image.
    fn shape(&self) -> ImageShape {
        let [_, height, width, channels] = self.dims();
        ImageShape { height, width, channels }
    }

    /// The class names, by label; empty if there are no labels.
    fn classes(&self) -> &[String] {
        &[]
    }

    /// The label of image `index`.
    fn label(&self, _index: usize) -> Option<u32> {
        None
    }

    /// A summary to print and to record with a run. By default, its fingerprint is that of [`dims`](Self::dims), the classes and up to 64
    /// images, evenly spread.
    fn summary(&self) -> Cow<'_, Summary> {
        Cow::Owned(Summary::of(self))
    }
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

impl Summary {
    /// Images whose content counts for the fingerprint of a data set without a summary of its own.
    const SAMPLED: usize = 64;

    /// The summary of a data set that knows only its images.
    fn of(data: &(impl Dataset + ?Sized)) -> Self {
        let (images, shape, classes) = (data.len(), data.shape(), data.classes().len());
        let mut sha = Sha256::new_with_prefix(format!("{:?} {:?}\n", data.dims(), data.classes()));
        let mut values = vec![0.0; shape.num_elements()];
        let sampled = images.min(Self::SAMPLED);
        for i in (0..sampled).map(|k| k * images / sampled) {
            // An error is reported when the image is used.
            if data.read(i, AugmentKey::default(), &mut values).is_ok() {
                values.iter().for_each(|v| sha.update(v.to_le_bytes()));
            }
        }
        Self {
            source: "a data set of this program".to_owned(),
            images,
            shape,
            bit_depth: 8,
            classes,
            found: Vec::new(),
            skipped: Vec::new(),
            memory_bytes: 0,
            fingerprint: hex(&sha.finalize()),
            notes: Vec::new(),
        }
    }
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
/// (unless bad files are skipped), [`Error::Option`] for options out of range, [`Error::Io`].
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

    #[test]
    fn two_methods_make_a_data_set() {
        struct Flat(usize, f32);
        impl Dataset for Flat {
            fn dims(&self) -> [usize; 4] {
                [self.0, 2, 3, 1]
            }
            fn read(&self, index: usize, _: AugmentKey, out: &mut [f32]) -> Result<()> {
                out.fill(self.1 * index as f32);
                Ok(())
            }
        }
        let data = Flat(200, 0.01);
        assert_eq!((data.len(), data.is_empty(), data.shape().num_elements()), (200, false, 6));
        assert_eq!((data.classes().len(), data.label(3)), (0, None));
        let summary = data.summary();
        assert_eq!((summary.images, summary.shape, summary.bit_depth), (200, data.shape(), 8));
        // The fingerprint tells other images and another number apart.
        let fingerprint = |data: Flat| data.summary().fingerprint.clone();
        assert_eq!(summary.fingerprint, fingerprint(Flat(200, 0.01)));
        assert_ne!(summary.fingerprint, fingerprint(Flat(200, 0.02)));
        assert_ne!(summary.fingerprint, fingerprint(Flat(201, 0.01)));
        assert!(Flat(0, 1.0).is_empty() && !fingerprint(Flat(0, 1.0)).is_empty());
    }

    #[cfg(unix)]
    #[test]
    fn a_summary_with_non_utf8_names_serializes_to_json() {
        use std::os::unix::ffi::OsStringExt;
        let digits = digits::Digits::new(0, 12, 1).unwrap();
        let name = std::ffi::OsString::from_vec(b"caf\xe9.png".to_vec());
        let summary =
            Summary { skipped: vec![(name.into(), "is empty".into())], ..digits.summary().into_owned() };
        let json = serde_json::to_value(&summary).unwrap();
        assert_eq!(json["skipped"][0][0], "caf\u{fffd}.png");
        assert_eq!(json["shape"]["height"], 12);
    }
}
