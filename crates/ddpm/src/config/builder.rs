//! Settings one by one, in code.

use super::data::DIGITS;
use super::{Config, Loaded, Size};
use crate::Result;
use std::path::{Path, PathBuf};

/// The preset for images of one's own.
const IMAGES: &str = "images";

/// Builds a [`Config`]; see [`Config::builder`].
///
/// Later calls override earlier ones, whatever the order of the preset and the file, which come first.
#[derive(Clone, Debug, Default)]
pub struct ConfigBuilder {
    preset: Option<String>,
    file: Option<PathBuf>,
    overrides: Vec<(String, String)>,
}

impl ConfigBuilder {
    /// Starts from a preset ([`PRESETS`](super::PRESETS)).
    pub fn preset(mut self, name: impl Into<String>) -> Self {
        self.preset = Some(name.into());
        self
    }

    /// Reads a settings file: TOML, or the YAML of the DDPM-Pytorch tutorial.
    pub fn file(mut self, path: impl Into<PathBuf>) -> Self {
        self.file = Some(path.into());
        self
    }

    /// The images to train on: a folder, a zip, IDX files and so on ([`data::open`](crate::data::open)), or `digits`, the built-in
    /// ones.
    pub fn data(self, path: impl AsRef<Path>) -> Self {
        self.set("data.path", path.as_ref().display())
    }

    /// Resizes the images to this size: one side in pixels, or `(height, width)`.
    pub fn size(self, size: impl Into<Size>) -> Self {
        let Size { height, width } = size.into();
        self.set("data.size", format!("[{height}, {width}]"))
    }

    /// Total number of training steps.
    pub fn steps(self, steps: u64) -> Self {
        self.set("train.steps", steps)
    }

    /// Total number of passes over the images, instead of steps.
    pub fn epochs(self, epochs: u64) -> Self {
        self.set("train.epochs", epochs)
    }

    /// Images per batch.
    pub fn batch_size(self, images: usize) -> Self {
        self.set("train.batch_size", images)
    }

    /// The learning rate.
    pub fn lr(self, rate: f64) -> Self {
        self.set("optimizer.lr", format!("{rate:e}"))
    }

    /// The seed of the run's random numbers.
    pub fn seed(self, seed: u64) -> Self {
        self.set("train.seed", seed)
    }

    /// Any setting by its full key, e.g. `ema.decay` ([`SECTIONS`](super::SECTIONS)); the value as text, `none` to unset it.
    pub fn set(mut self, key: impl Into<String>, value: impl ToString) -> Self {
        self.overrides.push((key.into(), value.to_string()));
        self
    }

    /// Any settings by their full keys, as [`set`](Self::set).
    pub fn set_all(mut self, pairs: impl IntoIterator<Item = (String, String)>) -> Self {
        self.overrides.extend(pairs);
        self
    }

    /// The settings, validated.
    ///
    /// # Errors
    /// As [`Config::load`].
    pub fn build(&self) -> Result<Config> {
        self.build_with_notes().map(|loaded| loaded.config)
    }

    /// As [`build`](Self::build), with the file's run name and notes.
    ///
    /// # Errors
    /// As [`Config::load`].
    pub fn build_with_notes(&self) -> Result<Loaded> {
        let own_images = self.overrides.iter().rev().find(|(key, _)| key.trim() == "data.path");
        let own_images = own_images.is_some_and(|(_, path)| path != DIGITS) && self.file.is_none();
        let preset = self.preset.as_deref().or(own_images.then_some(IMAGES));
        Config::load_with_notes(preset, self.file.as_deref(), &self.overrides)
    }
}

impl Config {
    /// Settings one by one. The rest comes from the file or the preset; with neither, from the preset `images` if the data is
    /// given, else from `digits`: as on the command line.
    ///
    /// ```
    /// use ddpm::Config;
    ///
    /// let config = Config::builder().data("photos").size(32).steps(20_000).set("ema.decay", 0.999).build()?;
    /// assert_eq!((config.train.steps, config.ema.decay), (Some(20_000), 0.999));
    /// # Ok::<(), ddpm::Error>(())
    /// ```
    pub fn builder() -> ConfigBuilder {
        ConfigBuilder::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_preset_depends_on_the_data() {
        let preset = |name| Config::builder().preset(name).build().unwrap();
        let digits = Config::builder().build().unwrap();
        assert_eq!(digits, preset("digits"));
        let own = Config::builder().data("photos").build().unwrap();
        assert_eq!(own, Config::builder().preset("images").data("photos").build().unwrap());
        assert_ne!(own.train.steps, digits.train.steps);
        let other = Config::builder().data("photos").data("digits").build().unwrap();
        assert_eq!(other, digits);
    }

    #[test]
    fn later_values_win_and_errors_name_the_setting() {
        let error = Config::builder().set("seed", 1).build().unwrap_err().to_string();
        assert_eq!(error, "seed: unknown setting; did you mean train.seed?");
        let error = Config::builder().steps(3).epochs(2).build().unwrap_err().to_string();
        assert_eq!(error, "train.epochs: train.steps is set too; set only one of them");
        let config =
            Config::builder().size((24, 32)).lr(1e-3).lr(2e-4).batch_size(5).seed(9).build().unwrap();
        assert_eq!(config.data.size, Some(Size { height: 24, width: 32 }));
        assert_eq!((config.optimizer.lr, config.train.batch_size, config.train.seed), (2e-4, 5, 9));
        let error = Config::builder().batch_size(0).build().unwrap_err().to_string();
        assert!(error.starts_with("train.batch_size: "), "{error}");
    }
}
