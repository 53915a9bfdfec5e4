//! Settings: their sources, validation and serialization.
//!
//! A run's settings are built in layers, each overriding the one before: the defaults, a preset, a file (TOML, or the
//! DDPM-Pytorch tutorial's YAML), then single overrides such as `--set optimizer.lr=1e-3`.

mod builder;
mod changes;
mod data;
mod domain;
mod keys;
mod layer;
pub mod limits;
mod presets;
mod print;
mod sections;
pub(crate) mod suggest;
mod tutorial;
mod types;
mod validate;

use std::path::Path;

pub use crate::data::OnBadFile;
pub use crate::settings::{Change, Section, Setting};
pub use builder::ConfigBuilder;
pub use changes::Difference;
pub use data::{UNKNOWN_DATA, check_data, open_data};
pub use keys::{Key, aliases, find_name};
use presets::RENAMED_PRESETS;
pub use presets::{PRESETS, Preset};
pub use sections::{
    Config, DataConfig, DiffusionConfig, EmaConfig, LossConfig, LrScheduleConfig, NetworkConfig,
    OptimizerConfig, OutputConfig, SECTIONS, SamplingConfig, TrainConfig,
};
pub use types::{EmaKind, LrScheduleKind, OptimizerKind, Size};

use crate::{Error, Result};
use layer::Layer;

/// Maximum size of a settings file, in bytes.
const MAX_FILE: u64 = 1 << 20;

/// Settings, with the rest of what their file contained.
#[derive(Clone, Debug, PartialEq)]
pub struct Loaded {
    /// The settings.
    pub config: Config,
    /// The run name given in the file (the tutorial's `task_name`).
    pub run_name: Option<String>,
    /// One sentence for each key of the file that is ignored.
    pub notes: Vec<String>,
}

/// Properties of the data that settings depend on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DataFacts {
    /// Number of images.
    pub count: usize,
    /// Their size at the network's input.
    pub size: Size,
    /// Their channels at the network's input.
    pub channels: usize,
}

impl Config {
    /// The settings of `preset`, overridden by `file`, then by `overrides` in order; validated.
    ///
    /// Without a preset, a file overrides the [defaults](Config::default); without either, the first of [`PRESETS`]
    /// is used. An override is a full key, e.g. `optimizer.lr`, and its value as text; the text `none` unsets an optional
    /// setting. `train.steps` and `train.epochs` replace each other.
    ///
    /// # Errors
    /// An unknown preset, key or section (with the nearest known one), a value of the wrong type, a file that cannot
    /// be read, and everything that [`validate`](Self::validate) rejects.
    pub fn load(preset: Option<&str>, file: Option<&Path>, overrides: &[(String, String)]) -> Result<Self> {
        Self::load_with_notes(preset, file, overrides).map(|loaded| loaded.config)
    }

    /// As [`load`](Self::load), with the file's run name and notes.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn load_with_notes(
        preset: Option<&str>,
        file: Option<&Path>,
        overrides: &[(String, String)],
    ) -> Result<Loaded> {
        let mut config = Self::default();
        let preset = preset.or(file.is_none().then_some(PRESETS[0].name));
        if let Some(name) = preset {
            Layer::preset(name)?.apply(&mut config)?;
        }
        let (mut run_name, mut notes) = (None, Vec::new());
        if let Some(path) = file {
            let text = read_text(path)?;
            let layer = if tutorial::looks_like(path, &text) {
                let read = tutorial::read(path, &text)?;
                (run_name, notes) = (read.run_name, read.notes);
                read.layer
            } else {
                Layer::toml(path, &text)?
            };
            layer.apply(&mut config)?;
        }
        Layer::overrides(overrides).apply(&mut config)?;
        config.validate()?;
        Ok(Loaded { config, run_name, notes })
    }

    /// These settings, overridden by `overrides` in order; validated. See [`load`](Self::load).
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn with_overrides(&self, overrides: &[(String, String)]) -> Result<Self> {
        let mut config = self.clone();
        Layer::overrides(overrides).apply(&mut config)?;
        config.validate()?;
        Ok(config)
    }

    /// The settings in the TOML `text`, over the defaults; validated. `path` names the text in error messages.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn from_toml(path: &Path, text: &str) -> Result<Self> {
        let mut config = Self::default();
        Layer::toml(path, text)?.apply(&mut config)?;
        config.validate()?;
        Ok(config)
    }

    /// The settings with everything that depends on the data filled in: image size and channels, of the data and of
    /// the network, and `steps = ceil(epochs * count / (batch_size * accumulate))` instead of `epochs`. Validated again.
    ///
    /// # Errors
    /// A network for a different image size or number of channels, and everything that [`validate`](Self::validate)
    /// rejects now that the size is known.
    pub fn resolve(&self, data: &DataFacts) -> Result<Self> {
        let mut config = self.clone();
        config.data.size = Some(data.size);
        config.data.channels = Some(data.channels);
        config.network.im_size.get_or_insert(data.size);
        config.network.im_channels.get_or_insert(data.channels);
        if let Some(epochs) = config.train.epochs.take() {
            let images = u128::from(epochs) * data.count as u128;
            let steps = images.div_ceil(config.images_per_step().max(1) as u128);
            config.train.steps = Some(u64::try_from(steps).unwrap_or(u64::MAX));
        }
        config.validate()?;
        Ok(config)
    }

    /// Images per step, over all its micro-batches.
    pub fn images_per_step(&self) -> usize {
        self.train.batch_size.saturating_mul(self.train.accumulate)
    }

    /// The size of the images after resizing, if the settings specify it.
    pub fn image_size(&self) -> Option<Size> {
        self.data.size.or(self.network.im_size)
    }

    /// The channels of the images after conversion, if the settings specify them.
    pub fn image_channels(&self) -> Option<usize> {
        self.data.channels.or(self.network.im_channels)
    }
}

fn read_text(path: &Path) -> Result<String> {
    let bytes = crate::storage::read(path, "read the settings", MAX_FILE)?;
    String::from_utf8(bytes).map_err(|_| Error::ConfigFile {
        path: path.to_owned(),
        reason: "is not text in UTF-8; settings are TOML, or the DDPM-Pytorch tutorial's YAML".into(),
    })
}

#[cfg(test)]
mod tests;
