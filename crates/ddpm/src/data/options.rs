//! What is asked of a data set: which files belong to it, and the form that its images are brought to.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// The largest height or width that images may be resized to.
const MAX_SIDE: usize = 8192;

/// What to do about a file that looks like an image by its name and cannot be decoded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnBadFile {
    /// Refuse the data set and list every such file.
    #[default]
    Fail,
    /// Leave them out and list them in [`Summary::skipped`](super::Summary::skipped).
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

/// What becomes of transparency.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Alpha {
    /// It stays a channel.
    Keep,
    /// Transparent images are laid on black.
    Black,
    /// Transparent images are laid on white.
    White,
}

/// How images get their size.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Resize {
    /// The short side is resized and the middle cut out: the aspect is kept. torchvision's `Resize(side)`.
    #[default]
    ShortSide,
    /// Both sides are resized: nothing is cut off. torchvision's `Resize((height, width))`.
    Exact,
}

/// A CSV file that names the images by ids.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CsvOptions {
    /// The file.
    pub path: PathBuf,
    /// The column of ids; `None`: the first.
    pub id_column: Option<String>,
    /// What is added to an id to make a file's name, as ".png".
    pub extension: String,
    /// The column of classes; `None`: no classes.
    pub label_column: Option<String>,
}

/// How images are to be found and brought to one form.
///
/// The steps are, as in the tutorials' torchvision pipelines: transparency and channels; resizing; a crop, of the
/// middle or a random one; a random flip; [-1, 1]. What is random is drawn anew each epoch.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct DataOptions {
    /// Height and width. `None`: the images' own, which must then be the same for all of them.
    pub size: Option<(usize, usize)>,
    /// 1 to 4. `None`: 1 if every pixel of every image is grey, else 3; one more where alpha is kept.
    pub channels: Option<usize>,
    /// What to do about files that cannot be decoded.
    pub on_bad_file: OnBadFile,
    /// What becomes of transparency. `None`: kept if `channels` is 2 or 4, else laid on black.
    pub alpha: Option<Alpha>,
    /// How images get their size.
    pub resize: Resize,
    /// The short side, in pixels, that images are resized to before they are cropped. `None`: that of `size`, or
    /// before random crops none at all.
    pub resize_side: Option<usize>,
    /// Random crops are made of this least and greatest part of an image's area, with a width of 3/4 to 4/3 of
    /// the height, and resized to `size`: torchvision's `RandomResizedCrop`. `None`: no random crops.
    pub random_crop_scale: Option<[f64; 2]>,
    /// Whether half of the images, drawn anew each epoch, are mirrored left to right.
    pub horizontal_flip: bool,
    /// The CSV file that names the images of the folder; `None`: all images there are.
    pub csv: Option<CsvOptions>,
}

impl DataOptions {
    /// # Errors
    /// [`Error::Config`] with the first setting that does not do, alone or beside the others.
    pub(crate) fn check(&self) -> Result<()> {
        let wrong = |key: &str, reason: String| Err(Error::Config { key: format!("data.{key}"), reason });
        if let Some((h, w)) = self.size
            && !((1..=MAX_SIDE).contains(&h) && (1..=MAX_SIDE).contains(&w))
        {
            return wrong("size", format!("{h}x{w} is out of range; each side is from 1 to {MAX_SIDE}"));
        }
        if let Some(c) = self.channels
            && !(1..=4).contains(&c)
        {
            let reason = format!("{c} is out of range; 1 is grey, 2 grey and alpha, 3 RGB, 4 RGBA");
            return wrong("channels", reason);
        }
        if let (Some(Alpha::Black | Alpha::White), Some(c @ (2 | 4))) = (self.alpha, self.channels) {
            let reason = format!(
                "transparency cannot be laid on a colour and be kept as well, as data.channels = {c} asks; use \
                 \"keep\", or {} channels",
                c - 1
            );
            return wrong("alpha", reason);
        }
        if let Some(side) = self.resize_side {
            let Some((h, w)) = self.size else {
                let reason = "it is the size before the crop; give the size after it too, data.size";
                return wrong("resize_side", reason.into());
            };
            if self.resize == Resize::Exact {
                let reason =
                    "it keeps the aspect, and data.resize = \"exact\" does not; unset one of the two";
                return wrong("resize_side", reason.into());
            }
            if !(h.max(w)..=MAX_SIDE).contains(&side) {
                let reason = format!(
                    "{side} is out of range; {h}x{w} is cut out of it, so give {} to {MAX_SIDE}",
                    h.max(w)
                );
                return wrong("resize_side", reason);
            }
        }
        if let Some([low, high]) = self.random_crop_scale
            && !(low > 0.0 && low <= high && high <= 1.0)
        {
            let reason = format!(
                "[{low}, {high}] is out of range; give the least and the greatest part of the area, as [0.8, 1.0]"
            );
            return wrong("random_crop_scale", reason);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices_read_as_words() {
        for choice in [OnBadFile::Fail, OnBadFile::Skip] {
            assert_eq!(choice.to_string().parse::<OnBadFile>().unwrap(), choice);
            assert_eq!(serde_json::to_string(&choice).unwrap(), format!("\"{choice}\""));
        }
        assert!("Skip it".parse::<OnBadFile>().unwrap_err().to_string().contains("data.on_bad_file"));
        assert_eq!(serde_json::to_string(&Resize::ShortSide).unwrap(), "\"short-side\"");
    }

    #[test]
    fn options_out_of_range_are_refused_by_name() {
        let plain = || DataOptions { size: Some((8, 12)), ..DataOptions::default() };
        assert!(plain().check().is_ok());
        for (options, key) in [
            (DataOptions { size: Some((0, 4)), ..plain() }, "data.size"),
            (DataOptions { size: Some((4, 8193)), ..plain() }, "data.size"),
            (DataOptions { channels: Some(0), ..plain() }, "data.channels"),
            (DataOptions { channels: Some(5), ..plain() }, "data.channels"),
            (DataOptions { channels: Some(4), alpha: Some(Alpha::White), ..plain() }, "data.alpha"),
            (DataOptions { size: None, resize_side: Some(16), ..plain() }, "data.resize_side"),
            (DataOptions { resize_side: Some(11), ..plain() }, "data.resize_side"),
            (DataOptions { resize_side: Some(12), resize: Resize::Exact, ..plain() }, "data.resize_side"),
            (DataOptions { random_crop_scale: Some([0.0, 1.0]), ..plain() }, "data.random_crop_scale"),
            (DataOptions { random_crop_scale: Some([0.5, 1.1]), ..plain() }, "data.random_crop_scale"),
            (DataOptions { random_crop_scale: Some([0.8, 0.7]), ..plain() }, "data.random_crop_scale"),
            (DataOptions { random_crop_scale: Some([f64::NAN, 1.0]), ..plain() }, "data.random_crop_scale"),
        ] {
            match options.check() {
                Err(Error::Config { key: found, .. }) => assert_eq!(found, key),
                other => panic!("{options:?}: {:?}", other.err()),
            }
        }
        // No transparency is left in three channels, and none need be there to be kept.
        assert!(DataOptions { channels: Some(3), alpha: Some(Alpha::Keep), ..plain() }.check().is_ok());
    }
}
