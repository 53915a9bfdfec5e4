//! Settings and class names that `ddpm export` stores with the weights.
//!
//! They are two entries of `__metadata__` in a safetensors file, or two extra members of a PyTorch archive, which
//! `torch.load` ignores: the settings as TOML, the class names as a JSON list. Machine-specific settings, such as the data
//! path, are left out.

use std::collections::HashMap;
use std::path::Path;

use crate::checkpoint::Manifest;
use crate::config::UNKNOWN_DATA;
use crate::config::{Config, DataConfig};
use crate::hardware::ComputeConfig;

/// Keys in a safetensors file's metadata.
const SETTINGS: &str = "ddpm.config";
const CLASSES: &str = "ddpm.classes";
/// Members of a PyTorch archive.
pub(super) const SETTINGS_FILE: &str = "ddpm/config.toml";
pub(super) const CLASSES_FILE: &str = "ddpm/classes.json";
/// Maximum length of the settings in bytes; ours take a few thousand, and parsing takes quadratic time.
pub(super) const MAX_SETTINGS: u64 = 32 << 10;
/// Maximum length of the class list in bytes.
pub(super) const MAX_CLASSES: u64 = 4 << 20;
/// Maximum length of a class name in bytes.
const MAX_NAME: usize = 512;

/// Settings and class names as stored in a file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct EmbeddedTexts {
    pub settings: Option<String>,
    pub classes: Option<String>,
}

/// Parsed settings and class names.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct EmbeddedSettings {
    pub config: Config,
    pub classes: Vec<String>,
}

/// The settings without machine-specific values.
fn portable(config: &Config) -> Config {
    let mut config = config.clone();
    let (data, compute) = (DataConfig::default(), ComputeConfig::default());
    config.data.path = UNKNOWN_DATA.to_owned();
    config.data.csv = data.csv;
    config.data.csv_id_column = data.csv_id_column;
    config.data.csv_extension = data.csv_extension;
    config.data.csv_label_column = data.csv_label_column;
    (config.compute.device, config.compute.threads) = (compute.device, compute.threads);
    config
}

impl EmbeddedTexts {
    /// Serialises a run's settings and classes; the error is the reason without a path.
    pub fn of(config: &Config, classes: &[String]) -> Result<Self, String> {
        let mut table = toml::Table::try_from(portable(config)).map_err(|e| e.to_string())?;
        table.retain(|section, _| config.uses(section));
        let settings = toml::to_string(&table).map_err(|e| e.to_string())?;
        let classes = match classes {
            [] => None,
            names => Some(serde_json::to_string(names).map_err(|e| e.to_string())?),
        };
        Ok(Self { settings: Some(settings), classes: classes.filter(|c| c.len() as u64 <= MAX_CLASSES) })
    }

    pub fn of_metadata(metadata: &HashMap<String, String>) -> Self {
        let get = |key: &str, most| metadata.get(key).filter(|text| text.len() as u64 <= most).cloned();
        Self { settings: get(SETTINGS, MAX_SETTINGS), classes: get(CLASSES, MAX_CLASSES) }
    }

    /// As entries of a safetensors file's metadata.
    pub fn metadata(&self) -> Vec<(&'static str, &str)> {
        let both = [(SETTINGS, &self.settings), (CLASSES, &self.classes)];
        both.into_iter().filter_map(|(key, text)| Some((key, text.as_deref()?))).collect()
    }

    /// As members of a PyTorch archive.
    pub fn files(&self) -> Vec<(&'static str, &str)> {
        let both = [(SETTINGS_FILE, &self.settings), (CLASSES_FILE, &self.classes)];
        both.into_iter().filter_map(|(name, text)| Some((name, text.as_deref()?))).collect()
    }

    /// Parses them if present; what is invalid is reported in `notes`. The path is for messages.
    pub fn read(&self, path: &Path, notes: &mut Vec<String>) -> Option<EmbeddedSettings> {
        let text = self.settings.as_deref()?;
        let config = match Config::from_toml(path, text) {
            Ok(config) => config,
            Err(e) => {
                notes.push(format!(
                    "the ddpm settings in the file are invalid, so the network is detected from its tensors: {e}"
                ));
                return None;
            }
        };
        let names = self.classes.as_deref().map(serde_json::from_str::<Vec<String>>);
        let names = names.transpose().unwrap_or_else(|e| {
            notes.push(format!("the class names in the file are invalid: {e}"));
            None
        });
        let classes = names.unwrap_or_default();
        let invalid =
            classes.iter().find(|n| n.len() > MAX_NAME || n.is_empty() || n.chars().any(char::is_control));
        if let Some(invalid) = invalid {
            let shown: String = invalid.escape_debug().take(60).collect();
            notes.push(format!("the class names in the file are ignored: {shown:?} is not a valid name"));
        }
        let classes = if invalid.is_some() { Vec::new() } else { classes };
        Some(EmbeddedSettings { config, classes })
    }
}

impl EmbeddedSettings {
    /// Reads them from the folder of a run's checkpoint.
    pub fn of_checkpoint(folder: &Path) -> Option<Self> {
        let manifest = Manifest::open(folder).ok()?;
        let config = portable(&manifest.config(folder).ok()?);
        Some(Self { config, classes: manifest.classes })
    }
}
