//! Starts a training with existing weights, and checks its settings against those the weights were trained with.

use super::classes;
use super::resume::{Remark, check_breaking};
use super::trainer::Trainer;
use crate::checkpoint::{self, Manifest};
use crate::config::{Change, Config, Difference};
use crate::data::Dataset;
use crate::error::Result;
use crate::interop::{self, ImportOptions, read_weights};
use crate::run_folder::RunFolder;
use std::path::{Path, PathBuf};

/// Weights to start from.
#[derive(Clone, Copy, Debug)]
pub struct Init<'a> {
    /// A run, a checkpoint, or a file of another program ([`interop::read_weights`]).
    pub path: &'a Path,
    /// Whether to accept settings that differ from those the weights were trained with ([`Change::Breaking`]).
    pub force: bool,
}

/// The settings that weights were trained with, and the keys of those that are only assumed.
struct TrainedSettings {
    config: Config,
    assumed: Vec<String>,
}

/// The settings that the weights at `path` were trained with: complete for a run, a checkpoint or a file in one; else what
/// [`interop::read`] can tell.
fn trained_settings(path: &Path) -> Option<TrainedSettings> {
    if let Some(folder) = checkpoint_of(path) {
        let config = Manifest::read(&folder).ok()?.config(&folder).ok()?;
        return Some(TrainedSettings { config, assumed: Vec::new() });
    }
    let read = interop::read(path, &ImportOptions::default()).ok()?;
    let assumed = read.assumed.iter().map(|a| a.key.to_owned()).collect();
    Some(TrainedSettings { config: read.config, assumed })
}

/// The checkpoint that holds the weights at `path`, if that is a run, a checkpoint, or a file in one.
fn checkpoint_of(path: &Path) -> Option<PathBuf> {
    let is_checkpoint = |folder: &Path| Manifest::read(folder).is_ok();
    match path.is_dir() {
        true if is_checkpoint(path) => Some(path.to_owned()),
        true => {
            let run = RunFolder::open(path, path).ok()?;
            checkpoint::newest_manifest(&run.checkpoints()).ok()?.map(|(folder, _)| folder)
        }
        false => path.parent().filter(|folder| is_checkpoint(folder)).map(Path::to_owned),
    }
}

/// The data; if it has the same classes that the weights at `path` were trained on, with the class indices used there.
/// Other classes keep their indices, for the network to learn.
pub(super) fn with_known_classes(data: Box<dyn Dataset>, path: &Path) -> Box<dyn Dataset> {
    let manifest = checkpoint_of(path).and_then(|folder| Manifest::read(&folder).ok());
    let known = manifest.map_or(Vec::new(), |manifest| manifest.classes);
    let sorted = |names: &[String]| {
        let mut names = names.to_vec();
        names.sort();
        names
    };
    if sorted(&known) != sorted(data.classes()) {
        return data;
    }
    classes::with_class_indices(data, &known).0
}

/// Whether a difference makes the weights unsuitable; the data and the image size may differ.
fn breaks_weights(difference: &Difference, assumed: &[String]) -> bool {
    // If the number of timesteps is not recorded, no diffusion setting is.
    let unknown = assumed.contains(&difference.key())
        || (difference.section == "diffusion" && assumed.iter().any(|key| key == "diffusion.timesteps"));
    let of_images = difference.section == "data" || ["im_size", "im_channels"].contains(&difference.name);
    difference.change == Change::Breaking && !unknown && !of_images
}

/// `--set KEY=VALUE` with the old value.
fn flag(difference: &Difference) -> String {
    let value = match &difference.before {
        Some(toml::Value::String(text)) => text.clone(),
        Some(value) => value.to_string(),
        None => "none".to_owned(),
    };
    let plain = value.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c));
    let quote = if plain { "" } else { "'" };
    format!("--set {quote}{}={value}{quote}", difference.key())
}

/// Loads the weights into the trainer; returns notes and warnings for the user.
pub(super) fn load_init(trainer: &mut Trainer, init: Init<'_>) -> Result<Vec<Remark>> {
    trainer.set_weights(&read_weights(init.path)?, init.path)?;
    let Some(TrainedSettings { config, assumed }) = trained_settings(init.path) else {
        return Ok(Vec::new());
    };
    let config = config.filled_from(trainer.config());
    let all = config.differences(trainer.config());
    let breaking: Vec<&Difference> = all.iter().filter(|d| breaks_weights(d, &assumed)).collect();
    let flags: Vec<String> = breaking.iter().map(|d| flag(d)).collect();
    check_breaking(init.path, &breaking, init.force, &format!("Give {}", flags.join(" ")))?;
    let warning = |d: &&Difference| {
        let text =
            format!("{} is {} (forced); the weights were trained with {}", d.key(), d.now(), d.before());
        Remark::Warning(text)
    };
    Ok(breaking.iter().map(warning).collect())
}
