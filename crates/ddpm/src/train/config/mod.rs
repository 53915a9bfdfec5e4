//! Settings: where they come from, what they may be, how they are written down.
//!
//! A run's settings are made in layers, each going over the one before: the defaults, a preset, a file (TOML, or the
//! DDPM-Pytorch tutorial's YAML), then single overrides as `--set train.lr=1e-3` gives them.

mod changes;
mod keys;
mod layer;
pub mod limits;
mod networks;
mod presets;
mod print;
pub(crate) mod suggest;
mod tutorial;
mod validate;

use std::path::Path;

pub use crate::data::OnBadFile;
pub use changes::Difference;
pub use keys::{
    ActFn, AttentionConfig, BlockType, Change, Config, DataConfig, DiffusionConfig, DoubleConvConfig,
    EmaKind, LossKind, LrScheduleKind, NetworkConfig, NetworkKind, OptimizerKind, Precision, ResampleKind,
    SECTIONS, SamplingConfig, ScheduleKind, Section, Setting, SimpleConfig, Size, TimeScaleShift,
    TrainConfig, Unet2dConfig,
};
pub use presets::{PRESETS, Preset};

use crate::{Error, Result};
use layer::Layer;

/// Largest file of settings that is read, in bytes.
const MAX_FILE: u64 = 1 << 20;

/// Settings together with what their file said beside them.
#[derive(Clone, Debug, PartialEq)]
pub struct Loaded {
    /// The settings.
    pub config: Config,
    /// The name the file gives the run (the tutorial's `task_name`).
    pub run_name: Option<String>,
    /// What in the file has no meaning here, one sentence each.
    pub notes: Vec<String>,
}

/// What the data turned out to be, for the settings that depend on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DataFacts {
    /// Number of images.
    pub count: usize,
    /// Their size as the network sees it.
    pub size: Size,
    /// Their channels as the network sees them.
    pub channels: usize,
}

impl Config {
    /// The settings of `preset`, gone over by `file`, gone over by `overrides` in their order; checked.
    ///
    /// Without a preset a file goes over the [defaults](Config::default); without either the first of [`PRESETS`]
    /// is used. An override is a full key, as `train.lr`, and its value as text; the text `none` unsets a setting
    /// that may be unset. `train.steps` and `train.epochs` replace each other.
    ///
    /// # Errors
    /// An unknown preset, key or section (with the nearest known one), a value of the wrong type, a file that cannot
    /// be read, and whatever [`validate`](Self::validate) refuses.
    pub fn load(preset: Option<&str>, file: Option<&Path>, overrides: &[(String, String)]) -> Result<Self> {
        Self::load_with_notes(preset, file, overrides).map(|loaded| loaded.config)
    }

    /// As [`load`](Self::load), with what the file said beside the settings.
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

    /// These settings, gone over by `overrides` in their order; checked. See [`load`](Self::load).
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn with_overrides(&self, overrides: &[(String, String)]) -> Result<Self> {
        let mut config = self.clone();
        Layer::overrides(overrides).apply(&mut config)?;
        config.validate()?;
        Ok(config)
    }

    /// The settings in the TOML `text`, over the defaults; `path` is where it stands, for messages. Checked.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn from_toml(path: &Path, text: &str) -> Result<Self> {
        let mut config = Self::default();
        Layer::toml(path, text)?.apply(&mut config)?;
        config.validate()?;
        Ok(config)
    }

    /// The settings with everything that depends on the data filled in: its size and channels, the network's, and
    /// `steps = ceil(epochs * count / (batch_size * accumulate))` in the place of `epochs`. Checked again.
    ///
    /// # Errors
    /// A network for images of another size or other channels, and whatever [`validate`](Self::validate) refuses
    /// now that the size is known.
    pub fn resolve(&self, data: &DataFacts) -> Result<Self> {
        let mut config = self.clone();
        config.data.size = Some(data.size);
        config.data.channels = Some(data.channels);
        config.network.im_size.get_or_insert(data.size);
        config.network.im_channels.get_or_insert(data.channels);
        if let Some(epochs) = config.train.epochs.take() {
            let draws = u128::from(epochs) * data.count as u128;
            let steps = draws.div_ceil(config.images_per_step().max(1) as u128);
            config.train.steps = Some(u64::try_from(steps).unwrap_or(u64::MAX));
        }
        config.validate()?;
        Ok(config)
    }

    /// Images of one step: those of all its micro-batches.
    pub fn images_per_step(&self) -> usize {
        self.train.batch_size.saturating_mul(self.train.accumulate)
    }

    /// The size the images are brought to, where a setting says so.
    pub fn image_size(&self) -> Option<Size> {
        self.data.size.or(self.network.im_size)
    }

    /// The channels the images are brought to, where a setting says so.
    pub fn image_channels(&self) -> Option<usize> {
        self.data.channels.or(self.network.im_channels)
    }
}

fn read_text(path: &Path) -> Result<String> {
    let bytes = super::disk::read(path, "read the settings", MAX_FILE)?;
    String::from_utf8(bytes).map_err(|_| Error::ConfigFile {
        path: path.to_owned(),
        reason: "is not text in UTF-8; settings are TOML, or the DDPM-Pytorch tutorial's YAML".into(),
    })
}

#[cfg(test)]
mod tests;
