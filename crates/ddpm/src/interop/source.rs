//! The files of a checkpoint: a lone file, the folders of diffusers, weights in several files.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::diffusers::{self, Pipeline};
use super::roles::{Role, is_averaged};
use crate::train::checkpoint::MAX_WEIGHTS;
use crate::train::disk;
use crate::train::run::RunFolder;
use crate::{Error, Result};

const INDEX: &str = "model_index.json";
const UNET_CONFIG: &str = "config.json";
const SCHEDULER_CONFIG: &str = "scheduler_config.json";
const CLASSES: &str = "classes.json";
/// What the names of a diffusers model's files of weights begin with.
const MODEL: &str = "diffusion_pytorch_model";
/// The folders of a network, and of its averages, in those that diffusers' training leaves.
const UNET: &str = "unet";
const UNET_EMA: &str = "unet_ema";
/// Most files that one set of weights is in.
const MAX_FILES: usize = 1024;

/// A folder or file with what stands beside it.
#[derive(Debug, Default)]
pub(super) struct Source {
    /// The files of weights, mostly one.
    pub weights: Vec<PathBuf>,
    /// What is said to be the file: that of weights, or the list of several.
    pub file: PathBuf,
    /// `config.json` of its network, where it is diffusers'.
    pub unet: Option<PathBuf>,
    /// `config.json` beside a lone file, which may be anyone's.
    pub neighbour: Option<PathBuf>,
    /// The folder of a checkpoint of a run that a lone file is in.
    pub checkpoint: Option<PathBuf>,
    /// The pipeline that the folder is.
    pub pipeline: Option<Pipeline>,
    /// `scheduler_config.json`.
    pub scheduler: Option<PathBuf>,
    /// The list of the classes' names that `ddpm export` wrote.
    pub classes: Option<PathBuf>,
    /// Which of a folder's networks was taken, and the others, by the names that `--key` takes.
    pub key: Option<(String, Role)>,
    pub others: Vec<(String, Role)>,
    pub notes: Vec<String>,
}

pub(super) fn refuse<T>(path: &Path, reason: impl Into<String>) -> Result<T> {
    Err(Error::Checkpoint { path: path.to_owned(), reason: reason.into() })
}

/// A file of weights, or the list of several, by its name in a diffusers model's folder.
struct Model {
    name: String,
    /// `fp16`, `non_ema`; empty for none.
    variant: String,
    is_list: bool,
    is_pickle: bool,
}

impl Model {
    /// `diffusion_pytorch_model.VARIANT.safetensors`, `diffusion_pytorch_model.safetensors.index.VARIANT.json`.
    fn of(name: &str) -> Option<Self> {
        let rest = name.strip_prefix(MODEL)?.strip_prefix('.')?;
        let mut parts: Vec<&str> = rest.split('.').collect();
        let is_list = parts.contains(&"index") && parts.last() == Some(&"json");
        parts.retain(|part| !(is_list && matches!(*part, "index" | "json")));
        let end = parts.iter().position(|part| matches!(*part, "safetensors" | "bin"))?;
        let is_pickle = parts.remove(end) == "bin";
        // One of several files is found by their list.
        let is_shard = parts.iter().any(|part| shard(part).is_some());
        let variant = parts.join(".");
        (!is_shard).then(|| Self { name: name.to_owned(), variant, is_list, is_pickle })
    }

    /// The smaller, the sooner it is taken: averaged weights, plain ones, rounded ones, those that are not averaged.
    fn rank(&self) -> (u8, bool, bool) {
        let kind = match self.variant.as_str() {
            "" => 1,
            variant if is_averaged(variant) => 0,
            variant if is_raw(variant) => 3,
            _ => 2,
        };
        (kind, self.is_list, self.is_pickle)
    }
}

fn is_raw(variant: &str) -> bool {
    super::roles::role(variant, &[]) == Role::Raw
}

/// How many files there are, of a name as `model-00001-of-00002`.
fn shard(stem: &str) -> Option<&str> {
    let (rest, all) = stem.rsplit_once("-of-")?;
    let (_, one) = rest.rsplit_once('-')?;
    let digits = |s: &str| !s.is_empty() && s.bytes().all(|b| b.is_ascii_digit());
    (digits(one) && digits(all)).then_some(all)
}

/// The names of what is in a folder, sorted.
fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.filter_map(|e| e.file_name().into_string().ok()).collect();
    names.sort();
    names
}

/// The files that a list of several, `NAME.index.json`, has; they are beside it.
fn files_of(list: &Path) -> Result<Vec<PathBuf>> {
    let json = diffusers::read_json(list)?;
    let Some(map) = json.get("weight_map").and_then(Value::as_object) else {
        return refuse(list, "lists no files of weights: it has no weight_map");
    };
    let files: BTreeSet<&str> = map.values().filter_map(Value::as_str).collect();
    if files.is_empty() || files.len() > MAX_FILES {
        return refuse(list, format!("lists {} files of weights; 1 to {MAX_FILES} are read", files.len()));
    }
    let mut size = 0u64;
    let mut paths = Vec::new();
    for name in files {
        let path = list.with_file_name(name);
        // Nothing outside of the folder is opened.
        if Path::new(name).file_name().is_none_or(|n| n != name) {
            return refuse(list, format!("lists a file {name:?}, which is no name of a file beside it"));
        }
        let Ok(about) = fs::metadata(&path) else {
            return refuse(
                &path,
                "is missing: it is one of the files that the weights are in; fetch it as well",
            );
        };
        size = size.saturating_add(about.len());
        paths.push(path);
    }
    if size > MAX_WEIGHTS {
        return refuse(list, format!("lists files of {size} bytes; at most {MAX_WEIGHTS} are read"));
    }
    Ok(paths)
}

impl Source {
    /// What is at `path`; of the networks of a folder the one called `key`.
    pub fn find(path: &Path, key: Option<&str>) -> Result<Self> {
        if path.is_file() {
            return Self::of_file(path);
        }
        if !path.is_dir() {
            let hint = "there is no such file or folder; give a file of PyTorch's (.pth, .pt, .ckpt, .bin), a safetensors \
                        file, or a folder of diffusers";
            return refuse(path, hint);
        }
        let index = path.join(INDEX);
        let mut pipeline = None;
        if index.is_file() {
            pipeline = diffusers::pipeline(&index, &diffusers::read_json(&index)?)?;
        }
        let has = |name: &str| path.join(name).join(UNET_CONFIG).is_file();
        if index.is_file() || has(UNET) || has(UNET_EMA) {
            let (taken, other) = match key {
                Some(UNET) => (UNET, UNET_EMA),
                _ if has(UNET_EMA) => (UNET_EMA, UNET),
                _ => (UNET, UNET_EMA),
            };
            let role = |name| if name == UNET_EMA { Role::Averaged } else { Role::Raw };
            let folder = path.join(taken);
            let config = folder.join(UNET_CONFIG);
            if !config.is_file() {
                return refuse(&config, "is missing: the network's settings are in it");
            }
            let file = |path: PathBuf| Some(path).filter(|p| p.is_file());
            let mut source = Self::of_model(&folder)?;
            (source.unet, source.pipeline) = (Some(config), pipeline);
            source.scheduler = file(path.join("scheduler").join(SCHEDULER_CONFIG));
            source.classes = file(path.join(CLASSES));
            if has(UNET_EMA) {
                source.key = Some((taken.to_owned(), role(taken)));
                source.others =
                    Some((other.to_owned(), role(other))).filter(|_| has(other)).into_iter().collect();
            }
            return Ok(source);
        }
        let config = path.join(UNET_CONFIG);
        let mut lists = names(path).into_iter().filter(|n| n.ends_with(".json") && n.contains(".index."));
        if config.is_file() {
            return Ok(Self { unet: Some(config), ..Self::of_model(path)? });
        }
        if let Some(list) = lists.next() {
            return Self::of_file(&path.join(list));
        }
        Self::no_folder(path)
    }

    fn of_file(path: &Path) -> Result<Self> {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let beside = |name| Some(path.with_file_name(name)).filter(|p| p.is_file());
        let neighbour = beside(UNET_CONFIG);
        let checkpoint = beside("manifest.json").map(|_| folder.to_owned());
        let file = path.to_owned();
        if name.ends_with(".json") && name.contains(".index.") {
            return Ok(Self { weights: files_of(path)?, file, neighbour, ..Self::default() });
        }
        let stem = name.rsplit_once('.').map_or(name.as_str(), |(stem, _)| stem);
        if let Some(all) = shard(stem) {
            let list = names(folder).into_iter().find(|n| n.ends_with(".json") && n.contains(".index."));
            let list = list
                .map_or("their list, NAME.index.json".to_owned(), |n| folder.join(n).display().to_string());
            return refuse(
                path,
                format!("is one of {all} files that the weights are in; give {list}, or the folder"),
            );
        }
        Ok(Self { weights: vec![file.clone()], file, neighbour, checkpoint, ..Self::default() })
    }

    /// The weights in the folder of a diffusers model.
    fn of_model(folder: &Path) -> Result<Self> {
        let there = names(folder);
        let mut models: Vec<Model> = there.iter().filter_map(|n| Model::of(n)).collect();
        models.sort_by_key(Model::rank);
        let Some(model) = models.first() else {
            if there.iter().any(|n| n.starts_with(MODEL) && n.contains("-of-")) {
                let reason = "has weights in several files, and not their list (diffusion_pytorch_model.safetensors.index.json); \
                              fetch it as well";
                return refuse(folder, reason);
            }
            return refuse(
                folder,
                format!("has no weights; looked for {MODEL}.safetensors and .bin, of any variant"),
            );
        };
        let file = folder.join(&model.name);
        let weights = if model.is_list { files_of(&file)? } else { vec![file.clone()] };
        let mut notes = Vec::new();
        let others: BTreeSet<&str> =
            models.iter().map(|m| m.variant.as_str()).filter(|v| *v != model.variant).collect();
        match model.variant.as_str() {
            "" => {}
            variant if is_raw(variant) => notes.push(format!(
                "these weights are not the averaged ones ({variant}), which draw better and are not in the folder"
            )),
            variant => notes.push(format!("the weights are the variant {variant}")),
        }
        if !others.is_empty() {
            let others: Vec<_> =
                others.into_iter().map(|v| if v.is_empty() { "without a variant" } else { v }).collect();
            notes.push(format!("also in the folder, by giving the file itself: {}", others.join(", ")));
        }
        Ok(Self { weights, file, notes, ..Self::default() })
    }

    /// The error of a folder that has nothing to import at its top.
    fn no_folder(path: &Path) -> Result<Self> {
        if RunFolder::open(path, path).is_ok() {
            return refuse(path, "is a run of ddpm already: use it as it is, with sample and train --resume");
        }
        let there = names(path);
        let weights = there.iter().find(|name| {
            let end = Path::new(name).extension().and_then(|e| e.to_str());
            matches!(end, Some("pth" | "pt" | "ckpt" | "bin" | "safetensors"))
        });
        let hint = match weights {
            Some(name) => format!("; give the file itself: {}", path.join(name).display()),
            None => String::new(),
        };
        refuse(path, format!("is no folder of diffusers: it has neither {INDEX} nor {UNET_CONFIG}{hint}"))
    }
}

/// The content of files of weights, in their order.
pub(super) fn read_all(paths: &[PathBuf]) -> Result<Vec<Vec<u8>>> {
    paths.iter().map(|path| disk::read(path, "read the weights", MAX_WEIGHTS)).collect()
}

/// The names of classes in a list that `ddpm export` wrote.
pub(super) fn read_classes(path: &Path) -> Result<String> {
    let bytes = disk::read(path, "read the names of the classes", super::own::MAX_CLASSES)?;
    String::from_utf8(bytes)
        .map_err(|_| Error::ConfigFile { path: path.to_owned(), reason: "is not UTF-8".to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_a_model_are_taken_in_the_order_of_what_they_are() {
        let rank = |name: &str| Model::of(name).map(|m| m.rank());
        let order = [
            "diffusion_pytorch_model.ema.safetensors",
            "diffusion_pytorch_model.safetensors",
            "diffusion_pytorch_model.bin",
            "diffusion_pytorch_model.safetensors.index.json",
            "diffusion_pytorch_model.bin.index.json",
            "diffusion_pytorch_model.fp16.safetensors",
            "diffusion_pytorch_model.safetensors.index.fp16.json",
            "diffusion_pytorch_model.non_ema.bin",
        ];
        assert!(order.is_sorted_by_key(|name| rank(name).expect("a file of weights")));
        for other in [
            "diffusion_pytorch_model-00001-of-00002.safetensors",
            "diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
            "config.json",
            "diffusion_pytorch_model.msgpack",
        ] {
            assert_eq!(rank(other), None, "{other}");
        }
        assert_eq!(
            Model::of("diffusion_pytorch_model.fp16.index.safetensors.json").map(|m| m.is_list),
            Some(true)
        );
    }
}
