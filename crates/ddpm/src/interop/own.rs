//! What `ddpm export` writes beside the weights: the settings and the names of the classes.
//!
//! In safetensors files they are two entries of `__metadata__`, in PyTorch's two files of the archive, which `torch.load` does
//! not look at: the settings as TOML, the names as a list in JSON. Nothing of the machine is in them, as the data's path.

use std::collections::HashMap;
use std::path::Path;

use super::UNKNOWN_DATA;
use crate::train::checkpoint::Manifest;
use crate::train::config::{Config, DataConfig, TrainConfig};

/// The entries of a safetensors file's metadata.
const SETTINGS: &str = "ddpm.config";
const CLASSES: &str = "ddpm.classes";
/// The files in PyTorch's archives.
pub(super) const SETTINGS_FILE: &str = "ddpm/config.toml";
pub(super) const CLASSES_FILE: &str = "ddpm/classes.json";
/// Longest settings, in bytes; ours have some thousand, and reading them takes time in the square of their length.
pub(super) const MAX_SETTINGS: u64 = 32 << 10;
/// Longest list of names, in bytes.
pub(super) const MAX_CLASSES: u64 = 4 << 20;
/// Longest name of a class, in bytes.
const MAX_NAME: usize = 512;

/// Both as they stand in a file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Texts {
    pub settings: Option<String>,
    pub classes: Option<String>,
}

/// Both as they were read.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Own {
    pub config: Config,
    pub classes: Vec<String>,
}

/// The settings without what only their machine knows.
fn portable(config: &Config) -> Config {
    let mut config = config.clone();
    let (data, train) = (DataConfig::default(), TrainConfig::default());
    config.data.path = UNKNOWN_DATA.to_owned();
    config.data.csv = data.csv;
    config.data.csv_id_column = data.csv_id_column;
    config.data.csv_extension = data.csv_extension;
    config.data.csv_label_column = data.csv_label_column;
    (config.train.device, config.train.threads) = (train.device, train.threads);
    config
}

impl Texts {
    /// Of a run's settings and classes; the error is the reason alone.
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

    /// As files of an archive of PyTorch's.
    pub fn files(&self) -> Vec<(&'static str, &str)> {
        let both = [(SETTINGS_FILE, &self.settings), (CLASSES_FILE, &self.classes)];
        both.into_iter().filter_map(|(name, text)| Some((name, text.as_deref()?))).collect()
    }

    /// What they say, if they are there and can be used; what cannot is told in `notes`. The path is the file's.
    pub fn read(&self, path: &Path, notes: &mut Vec<String>) -> Option<Own> {
        let text = self.settings.as_deref()?;
        let config = match Config::from_toml(path, text) {
            Ok(config) => config,
            Err(e) => {
                notes.push(format!(
                    "the settings of ddpm in the file cannot be used, and the network is recognised by its tensors: {e}"
                ));
                return None;
            }
        };
        let names = self.classes.as_deref().map(serde_json::from_str::<Vec<String>>);
        let names = names.transpose().unwrap_or_else(|e| {
            notes.push(format!("the names of the classes in the file cannot be used: {e}"));
            None
        });
        let classes = names.unwrap_or_default();
        let odd =
            classes.iter().find(|n| n.len() > MAX_NAME || n.is_empty() || n.chars().any(char::is_control));
        if let Some(odd) = odd {
            let shown: String = odd.escape_debug().take(60).collect();
            notes.push(format!("the names of the classes in the file are left out: {shown:?} can be none"));
        }
        let classes = if odd.is_some() { Vec::new() } else { classes };
        Some(Own { config, classes })
    }
}

impl Own {
    /// Of a checkpoint of a run; `folder` is the checkpoint's.
    pub fn of_checkpoint(folder: &Path) -> Option<Self> {
        let manifest = Manifest::open(folder).ok()?;
        let config = portable(&manifest.config(folder).ok()?);
        Some(Self { config, classes: manifest.classes })
    }
}
