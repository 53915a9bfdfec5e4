//! Data sets: pictures in, [-1, 1] channels-last numbers out.
//!
//! [`open`] looks at a path and finds out what it holds: a folder of pictures, a folder with one folder per class,
//! or IDX files (the form MNIST comes in). [`digits::Digits`] is a data set that the program draws itself. Either
//! way the pictures have one [`PictureShape`], values in [-1, 1] and, where there are classes, a label.

mod decode;
pub mod digits;
mod folder;
mod idx;
mod resize;

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};

/// Decoded pictures are kept in memory up to this many bytes in all (2 GiB); see [`open_within`].
pub const DEFAULT_MEMORY: u64 = 2 << 30;

/// The largest height or width that pictures may be resized to.
const MAX_SIDE: usize = 8192;

/// Height, width and channels of every picture of a data set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PictureShape {
    /// Rows.
    pub height: usize,
    /// Columns.
    pub width: usize,
    /// 1 grey, 2 grey and alpha, 3 RGB, 4 RGBA.
    pub channels: usize,
}

impl PictureShape {
    /// How many numbers a picture has.
    pub fn values(&self) -> usize {
        self.height * self.width * self.channels
    }
}

impl fmt::Display for PictureShape {
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

/// What to do about a file that looks like a picture by its name and cannot be decoded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnBadFile {
    /// Refuse the data set and list every such file.
    #[default]
    Fail,
    /// Leave them out and list them in [`Summary::skipped`].
    Skip,
}

impl FromStr for OnBadFile {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "fail" => Ok(Self::Fail),
            "skip" => Ok(Self::Skip),
            _ => Err(Error::Config {
                key: "data.on_bad_file".into(),
                reason: format!("`{text}` is not known; it is `fail` or `skip`"),
            }),
        }
    }
}

impl fmt::Display for OnBadFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Fail => "fail",
            Self::Skip => "skip",
        })
    }
}

/// How pictures are to be brought to one form.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DataOptions {
    /// Height and width. `None`: the pictures' own, which must then be the same for all of them.
    pub size: Option<(usize, usize)>,
    /// 1 to 4. `None`: 1 if every pixel of every picture is grey, else 3; transparency is laid on black.
    pub channels: Option<usize>,
    /// What to do about files that cannot be decoded.
    pub on_bad_file: OnBadFile,
}

impl DataOptions {
    fn check(&self) -> Result<()> {
        let wrong = |key: &str, reason: String| Err(Error::Config { key: key.into(), reason });
        if let Some((h, w)) = self.size
            && !((1..=MAX_SIDE).contains(&h) && (1..=MAX_SIDE).contains(&w))
        {
            return wrong("data.size", format!("{h}x{w} is out of range; each side is from 1 to {MAX_SIDE}"));
        }
        if let Some(c) = self.channels
            && !(1..=4).contains(&c)
        {
            let reason = format!("{c} is out of range; 1 is grey, 2 grey and alpha, 3 RGB, 4 RGBA");
            return wrong("data.channels", reason);
        }
        Ok(())
    }
}

/// Pictures of one shape, read by number.
pub trait Dataset: Send + Sync {
    /// How many pictures there are; at least one for what [`open`] returns.
    fn len(&self) -> usize {
        self.summary().pictures
    }

    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The shape of every picture.
    fn shape(&self) -> PictureShape {
        self.summary().shape
    }

    /// The classes' names, by label; empty when there are no labels.
    fn classes(&self) -> &[String];

    /// The class of picture `index`.
    fn label(&self, index: usize) -> Option<u32>;

    /// Writes picture `index` into `out` (height, width, channels), a sample of `bits` bits as
    /// `v / (2^bits - 1) * 2 - 1`.
    ///
    /// # Errors
    /// When a set that is too large for memory is read from disk and the file has changed or gone.
    ///
    /// # Panics
    /// If `index` is not below [`len`](Self::len) or `out` is not `shape().values()` long.
    fn read(&self, index: usize, out: &mut [f32]) -> Result<()>;

    /// What was found, for a person to read and for a run to record.
    fn summary(&self) -> &Summary;
}

/// What a data set is and what was done to make it one.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Summary {
    /// The path, or what was drawn.
    pub source: String,
    /// How many pictures there are, without the skipped ones.
    pub pictures: usize,
    /// The shape that they are given.
    pub shape: PictureShape,
    /// Bits a sample: 8, or 16 when some picture has 16.
    pub bit_depth: u8,
    /// How many classes there are; 0 when there are no labels.
    pub classes: usize,
    /// The forms that the files have, the most frequent first.
    pub found: Vec<Found>,
    /// The files left out, each with its reason.
    #[serde(serialize_with = "lossy_paths")]
    pub skipped: Vec<(PathBuf, String)>,
    /// Bytes of decoded pictures kept in memory; 0 when they are decoded at each reading.
    pub memory_bytes: u64,
    /// SHA-256 in hex over the names, labels and decoded pixels, in order.
    pub fingerprint: String,
    /// What a person should be told.
    pub notes: Vec<String>,
}

/// One form of picture among the files, and how many have it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Found {
    /// Rows, of the upright picture.
    pub height: usize,
    /// Columns, of the upright picture.
    pub width: usize,
    /// Channels as stored.
    pub channels: usize,
    /// Bits a sample as stored (a palette counts as 8).
    pub bits: u8,
    /// How many pictures have this form.
    pub pictures: usize,
}

/// Names need not be UTF-8, JSON must be.
fn lossy_paths<S: serde::Serializer>(paths: &[(PathBuf, String)], s: S) -> Result<S::Ok, S::Error> {
    s.collect_seq(paths.iter().map(|(path, reason)| (path.to_string_lossy(), reason)))
}

/// Opens the data set at `path`: a folder of pictures, a folder with one folder per class, one picture, a folder with
/// IDX files, or one IDX file.
///
/// # Errors
/// [`Error::Data`] when the set as a whole does not do, [`Error::BadFiles`] with every file that cannot be decoded
/// (unless they are to be skipped), [`Error::Config`] for options out of range, [`Error::Io`].
pub fn open(path: &Path, options: &DataOptions) -> Result<Box<dyn Dataset>> {
    open_within(path, options, DEFAULT_MEMORY)
}

/// [`open`] with another limit on the bytes of decoded pictures held in memory. A larger folder is decoded at each
/// reading; a larger IDX file is refused.
pub fn open_within(path: &Path, options: &DataOptions, memory: u64) -> Result<Box<dyn Dataset>> {
    options.check()?;
    let kind = match std::fs::metadata(path) {
        Ok(metadata) => metadata.file_type(),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Err(missing(path)),
        Err(e) => return Err(Error::io(path, "look at the data set")(e)),
    };
    if kind.is_dir() {
        match folder::scan(path)? {
            folder::Scan::Idx { images, notes } => {
                Ok(Box::new(idx::IdxSet::open(&images, path, notes, options, memory)?))
            }
            folder::Scan::Pictures(listing) => {
                Ok(Box::new(folder::FolderSet::open(path, listing, options, memory)?))
            }
        }
    } else if let Some(listing) = folder::single(path) {
        Ok(Box::new(folder::FolderSet::open(path, listing, options, memory)?))
    } else {
        Ok(Box::new(idx::IdxSet::open(path, path, Vec::new(), options, memory)?))
    }
}

/// An [`Error::Data`].
fn unusable(path: &Path, reason: impl Into<String>) -> Error {
    Error::Data { path: path.to_owned(), reason: reason.into() }
}

/// The error for a path that is not there, with the nearest name that is.
fn missing(path: &Path) -> Error {
    // The first part that is missing is the one that is misspelt.
    let mut part = path;
    while let Some(parent) = part.parent().filter(|p| !p.as_os_str().is_empty() && !p.exists()) {
        part = parent;
    }
    let folder = match part.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let mut reason = String::from("there is no such file or folder");
    if part != path {
        reason += &format!(" ({} is missing already)", part.display());
    }
    let wanted = part.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
    let close = std::fs::read_dir(folder).into_iter().flatten().flatten().filter_map(|entry| {
        let name = entry.file_name();
        let distance = strsim::damerau_levenshtein(&wanted, &name.to_string_lossy().to_lowercase());
        (distance <= 1.max(wanted.chars().count() / 3)).then_some((distance, name))
    });
    if let Some((_, name)) = close.min() {
        reason += &format!("; did you mean {}?", part.with_file_name(name).display());
    }
    unusable(path, reason)
}

/// "1 picture", "2 pictures".
fn count(n: usize, what: &str) -> String {
    format!("{n} {what}{}", if n == 1 { "" } else { "s" })
}

/// Builds [`Summary::fingerprint`].
struct Fingerprint(Sha256);

impl Fingerprint {
    fn new() -> Self {
        Self(Sha256::new_with_prefix(b"ddpm pictures 1\n"))
    }

    /// Adds a picture; `digest` is of its samples.
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

/// Which picture is the g-th of a training run: epoch `g / n` goes through all `n` in its own shuffled order, so a
/// batch may span two epochs and none is ever cut short.
#[derive(Clone, Debug)]
pub struct Order {
    seed: u64,
    n: usize,
    epoch: Option<u64>,
    permutation: Vec<u32>,
}

impl Order {
    /// The order of `n` pictures under `seed`.
    ///
    /// # Panics
    /// If `n` is 0 or not below 2^32; [`open`] returns no such set.
    pub fn new(seed: u64, n: usize) -> Self {
        assert!(n > 0 && u32::try_from(n).is_ok(), "{n} pictures cannot be ordered");
        Self { seed, n, epoch: None, permutation: Vec::new() }
    }

    /// The picture at `position`, counted from the start of the run. Going forward is fast: the current epoch's
    /// order is kept.
    pub fn index(&mut self, position: u64) -> usize {
        let (epoch, place) = (position / self.n as u64, position % self.n as u64);
        if self.epoch != Some(epoch) {
            self.permutation = ddpm_engine::rng::permutation(self.seed, epoch as u32, self.n);
            self.epoch = Some(epoch);
        }
        self.permutation[place as usize] as usize
    }

    /// The pictures of `step`'s batch: positions `step * batch_size` and on.
    pub fn batch(&mut self, step: u64, batch_size: usize) -> Vec<usize> {
        let first = step * batch_size as u64;
        (first..first + batch_size as u64).map(|position| self.index(position)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_and_choices_read_as_words() {
        let shown = |channels| PictureShape { height: 28, width: 32, channels }.to_string();
        assert_eq!([1, 2, 3, 4].map(shown), ["28x32 grey", "28x32 grey+alpha", "28x32 RGB", "28x32 RGBA"]);
        for choice in [OnBadFile::Fail, OnBadFile::Skip] {
            assert_eq!(choice.to_string().parse::<OnBadFile>().unwrap(), choice);
            assert_eq!(serde_json::to_string(&choice).unwrap(), format!("\"{choice}\""));
        }
        assert!("Skip it".parse::<OnBadFile>().unwrap_err().to_string().contains("data.on_bad_file"));
    }

    #[test]
    fn options_out_of_range_are_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let options = |size, channels| DataOptions { size, channels, ..DataOptions::default() };
        for (options, key) in [
            (options(Some((0, 4)), None), "data.size"),
            (options(Some((4, 8193)), None), "data.size"),
            (options(None, Some(0)), "data.channels"),
            (options(None, Some(5)), "data.channels"),
        ] {
            match open(folder.path(), &options) {
                Err(Error::Config { key: found, .. }) => assert_eq!(found, key),
                other => panic!("{options:?}: {:?}", other.err()),
            }
        }
    }

    #[test]
    fn a_missing_path_names_the_nearest_that_is_there() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("flowers")).unwrap();
        std::fs::create_dir(folder.path().join("birds")).unwrap();
        let text = |name: &str| {
            open(&folder.path().join(name), &DataOptions::default()).err().expect("it is missing").to_string()
        };
        assert!(
            text("Flower").ends_with(&format!("did you mean {}?", folder.path().join("flowers").display()))
        );
        assert!(text("flwoers/red").contains("flwoers is missing already); did you mean"));
        assert!(!text("xyz").contains("did you mean"));
    }

    #[test]
    fn an_order_goes_through_every_epoch_once_and_batches_run_on_into_the_next() {
        let mut order = Order::new(5, 7);
        let seen: Vec<_> = (0..21).map(|g| order.index(g)).collect();
        for (epoch, part) in seen.chunks(7).enumerate() {
            let expected = ddpm_engine::rng::permutation(5, epoch as u32, 7);
            assert_eq!(part, expected.iter().map(|&i| i as usize).collect::<Vec<_>>());
        }
        let batches: Vec<_> = (0..5).flat_map(|step| order.batch(step, 4)).collect();
        assert_eq!(batches, seen[..20]);
        // A position's picture does not depend on what was asked before.
        assert_eq!(order.index(3), seen[3]);
        assert_eq!(Order::new(5, 7).batch(2, 4), seen[8..12]);
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
