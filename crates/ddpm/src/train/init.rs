//! Weights from elsewhere as the beginning of a training, and whether its settings are those they were learnt with.

use super::checkpoint::{self, Manifest};
use super::classes;
use super::config::{Change, Config, Difference};
use super::resume::{Remark, check_learnt};
use super::run::RunFolder;
use super::trainer::Trainer;
use crate::data::Dataset;
use crate::error::Result;
use crate::interop::{self, Options, read_weights};
use std::path::{Path, PathBuf};

/// Weights to begin with.
#[derive(Clone, Copy, Debug)]
pub struct Init<'a> {
    /// Of a run, or of another program ([`interop::read_weights`]).
    pub path: &'a Path,
    /// Whether settings may be others than those that the weights were learnt with ([`Change::Learnt`]).
    pub force: bool,
}

/// The settings that weights were learnt with, and the keys of those that nobody told.
struct Known {
    config: Config,
    assumed: Vec<String>,
}

/// What is known of the weights at `path`: of a run or one of its checkpoints, or of a file in one, all; else what [`interop::read`]
/// finds.
fn known(path: &Path) -> Option<Known> {
    if let Some(folder) = checkpoint_of(path) {
        let config = Manifest::read(&folder).ok()?.config(&folder).ok()?;
        return Some(Known { config, assumed: Vec::new() });
    }
    let read = interop::read(path, &Options::default()).ok()?;
    let assumed = read.assumed.iter().map(|a| a.key.to_owned()).collect();
    Some(Known { config: read.config, assumed })
}

/// The checkpoint that the weights at `path` are of, where they are a run's, a checkpoint's, or a file in one.
fn checkpoint_of(path: &Path) -> Option<PathBuf> {
    let whole = |folder: &Path| Manifest::read(folder).is_ok();
    match path.is_dir() {
        true if whole(path) => Some(path.to_owned()),
        true => {
            let run = RunFolder::open(path, path).ok()?;
            checkpoint::newest_manifest(&run.checkpoints()).ok()?.map(|(folder, _)| folder)
        }
        false => path.parent().filter(|folder| whole(folder)).map(Path::to_owned),
    }
}

/// The data; if its classes are those that the weights at `path` were trained on, with the numbers that these have there. Other
/// classes are for the training to learn.
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
    classes::as_learnt(data, &known).0
}

/// The differences that matter to weights: neither the data nor the images' size is learnt by them alone.
fn matters(difference: &Difference, assumed: &[String]) -> bool {
    // Who does not tell the number of timesteps tells nothing of the diffusion.
    let unknown = assumed.contains(&difference.key())
        || (difference.section == "diffusion" && assumed.iter().any(|key| key == "diffusion.timesteps"));
    let of_images = difference.section == "data" || ["im_size", "im_channels"].contains(&difference.name);
    difference.change == Change::Learnt && !unknown && !of_images
}

/// `--set KEY=VALUE` with the value as it was.
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

/// Gives the trainer the weights, and what a person should know.
pub(super) fn begin_with(trainer: &mut Trainer, init: Init<'_>) -> Result<Vec<Remark>> {
    trainer.set_weights(&read_weights(init.path)?, init.path)?;
    let Some(Known { config, assumed }) = known(init.path) else { return Ok(Vec::new()) };
    let config = config.filled_from(trainer.config());
    let all = config.differences(trainer.config());
    let learnt: Vec<&Difference> = all.iter().filter(|d| matters(d, &assumed)).collect();
    let flags: Vec<String> = learnt.iter().map(|d| flag(d)).collect();
    check_learnt(init.path, &learnt, init.force, &format!("Give {}", flags.join(" ")))?;
    let said = |d: &&Difference| {
        let text =
            format!("{} is {}, as forced; the weights were learnt with {}", d.key(), d.now(), d.before());
        Remark::Warning(text)
    };
    Ok(learnt.iter().map(said).collect())
}
