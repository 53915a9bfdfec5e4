//! Options of a data set: which files belong to it, and how its images are transformed.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// The largest height or width that images may be resized to.
const MAX_SIDE: usize = 8192;

/// What to do about a file that has an image's name but cannot be decoded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnBadFile {
    /// Reject the data set and list every such file.
    #[default]
    Fail,
    /// Skip such files and list them in [`Summary::skipped`](super::Summary::skipped).
    Skip,
}

impl FromStr for OnBadFile {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "fail" => Ok(Self::Fail),
            "skip" => Ok(Self::Skip),
            _ => Err(Error::Option {
                option: "data.on_bad_file".into(),
                reason: format!("unknown value `{text}`; use `fail` or `skip`"),
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

/// How transparency is handled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Alpha {
    /// Keep alpha as a channel.
    Keep,
    /// Composite on black.
    Black,
    /// Composite on white.
    White,
}

/// How images are resized.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Resize {
    /// Resize the short side, keeping the aspect ratio, then center crop: torchvision's `Resize(side)`, `CenterCrop`.
    #[default]
    ShortSide,
    /// Resize both sides, without cropping: torchvision's `Resize((height, width))`.
    Exact,
}

/// A CSV file that lists the images by id.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CsvOptions {
    /// The file.
    pub path: PathBuf,
    /// The id column; `None`: the first.
    pub id_column: Option<String>,
    /// Appended to an id to form the file name, such as ".png".
    pub extension: String,
    /// The class column; `None`: no classes.
    pub label_column: Option<String>,
}

/// How images are found and transformed.
///
/// The steps are those of typical torchvision pipelines: convert transparency and channels, resize, center or random crop,
/// random flip, scale to [-1, 1]. Random transforms are resampled every epoch.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct DataOptions {
    /// Height and width. `None`: the size of the images, which must then be the same for all.
    pub size: Option<(usize, usize)>,
    /// 1 to 4. `None`: 1 if every pixel of every image is grey, else 3; one more if alpha is kept.
    pub channels: Option<usize>,
    /// What to do about files that cannot be decoded.
    pub on_bad_file: OnBadFile,
    /// How transparency is handled. `None`: kept if `channels` is 2 or 4, else composited on black.
    pub alpha: Option<Alpha>,
    /// How images are resized.
    pub resize: Resize,
    /// Short side in pixels after resizing, before the crop. `None`: just large enough to cover `size`, or no resizing
    /// before random crops.
    pub resize_side: Option<usize>,
    /// Minimum and maximum area of random crops as a fraction of the image, with an aspect ratio of 3/4 to 4/3, resized to
    /// `size`: torchvision's `RandomResizedCrop`. `None`: no random crops.
    pub random_crop_scale: Option<[f64; 2]>,
    /// Whether to mirror images left to right with probability 1/2, resampled every epoch.
    pub horizontal_flip: bool,
    /// The CSV file that lists the images of the folder; `None`: use all images.
    pub csv: Option<CsvOptions>,
}

impl DataOptions {
    /// # Errors
    /// [`Error::Option`] for the first setting that is out of range or conflicts with another.
    pub fn check(&self) -> Result<()> {
        let wrong = |key: &str, reason: String| Err(Error::Option { option: format!("data.{key}"), reason });
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
                "transparency cannot be composited on a colour and also kept, as data.channels = {c} requires; use \
                 \"keep\", or {} channels",
                c - 1
            );
            return wrong("alpha", reason);
        }
        if let Some(side) = self.resize_side {
            let Some((h, w)) = self.size else {
                let reason = "it is the size before the crop; also set data.size, the size after it";
                return wrong("resize_side", reason.into());
            };
            if self.resize == Resize::Exact {
                let reason =
                    "it keeps the aspect ratio, but data.resize = \"exact\" does not; unset one of the two";
                return wrong("resize_side", reason.into());
            }
            if !(h.max(w)..=MAX_SIDE).contains(&side) {
                let reason = format!(
                    "{side} is out of range; {h}x{w} is cropped from it, so give {} to {MAX_SIDE}",
                    h.max(w)
                );
                return wrong("resize_side", reason);
            }
        }
        if let Some([low, high]) = self.random_crop_scale
            && !(low > 0.0 && low <= high && high <= 1.0)
        {
            let reason = format!(
                "[{low}, {high}] is out of range; give the minimum and maximum fraction of the area, such as [0.8, 1.0]"
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
    fn choices_round_trip_as_strings() {
        for choice in [OnBadFile::Fail, OnBadFile::Skip] {
            assert_eq!(choice.to_string().parse::<OnBadFile>().unwrap(), choice);
            assert_eq!(serde_json::to_string(&choice).unwrap(), format!("\"{choice}\""));
        }
        assert!("Skip it".parse::<OnBadFile>().unwrap_err().to_string().contains("data.on_bad_file"));
        assert_eq!(serde_json::to_string(&Resize::ShortSide).unwrap(), "\"short-side\"");
    }

    #[test]
    fn options_out_of_range_are_rejected_by_key() {
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
                Err(Error::Option { option: found, .. }) => assert_eq!(found, key),
                other => panic!("{options:?}: {:?}", other.err()),
            }
        }
        // "keep" with three channels is valid as long as no image is transparent.
        assert!(DataOptions { channels: Some(3), alpha: Some(Alpha::Keep), ..plain() }.check().is_ok());
    }
}
