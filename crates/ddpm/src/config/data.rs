//! Opens the data set that the settings describe.

use super::{Config, Size};
use crate::data::digits::Digits;
use crate::data::{self, Check, Dataset};
use crate::error::{Error, Result};
use std::path::Path;

/// The value of `data.path` that selects the built-in digits.
pub(super) const DIGITS: &str = "digits";
/// The value of `data.path` in runs whose training data is unknown.
pub const UNKNOWN_DATA: &str = "unknown";

impl Config {
    /// Makes the paths of the data absolute, so that a run can be resumed from another folder.
    pub fn make_paths_absolute(&mut self) {
        let absolute = |path: &mut String| {
            // Reserved names; folders so named are given as ./digits and ./unknown.
            if path != DIGITS && path != UNKNOWN_DATA {
                let full = std::path::absolute(&*path).unwrap_or_else(|_| Path::new(&*path).to_owned());
                *path = full.to_string_lossy().into_owned();
            }
        };
        absolute(&mut self.data.path);
        self.data.csv.iter_mut().for_each(absolute);
    }

    /// The side of the built-in digits, if they are selected.
    fn digits_side(&self) -> Result<Option<usize>> {
        if self.data.path != DIGITS {
            return Ok(None);
        }
        if self.image_channels().is_some_and(|c| c != 1) {
            let reason = "the built-in digits are grey; give 1, or leave it unset".to_owned();
            return Err(Error::Config { key: "data.channels".to_owned(), reason });
        }
        let size = self.image_size().unwrap_or(Size { height: 28, width: 28 });
        if size.height != size.width {
            let reason = format!("the built-in digits are square, not {size}");
            return Err(Error::Config { key: "data.size".to_owned(), reason });
        }
        Ok(Some(size.height))
    }
}

/// Opens the data set that the settings name.
///
/// # Errors
/// As [`data::open`].
pub fn open_data(config: &Config) -> Result<Box<dyn Dataset>> {
    let (d, options) = (&config.data, config.data_options());
    if d.path == UNKNOWN_DATA {
        let reason = "is unknown, because the run was imported; give the images to train on: --data FOLDER";
        return Err(Error::Config { key: "data.path".to_owned(), reason: reason.to_owned() });
    }
    match config.digits_side()? {
        Some(side) => Ok(Box::new(Digits::with_options(config.train.seed, side, d.digits_count, &options)?)),
        None => Ok(data::open_within(Path::new(&d.path), &options, d.memory_mib << 20)?),
    }
}

/// Checks all images of the data set that the settings name.
///
/// # Errors
/// As [`data::check()`].
pub fn check_data(config: &Config) -> Result<Check> {
    let (d, options) = (&config.data, config.data_options());
    match config.digits_side()? {
        Some(side) => Ok(Check::digits(config.train.seed, side, d.digits_count, &options)?),
        None => Ok(data::check(Path::new(&d.path), &options, d.memory_mib << 20)?),
    }
}
