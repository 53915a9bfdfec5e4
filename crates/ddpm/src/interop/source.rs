//! Locates the files of a checkpoint: a single file, a diffusers folder, sharded weights.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::diffusers::{self, PipelineKind};
use super::roles::{Role, is_averaged};
use crate::checkpoint::MAX_WEIGHTS;
use crate::run_folder::RunFolder;
use crate::storage;
use crate::{Error, Result};

const INDEX: &str = "model_index.json";
const UNET_CONFIG: &str = "config.json";
const SCHEDULER_CONFIG: &str = "scheduler_config.json";
const CLASSES: &str = "classes.json";
/// Prefix of a diffusers model's weight files.
const MODEL: &str = "diffusion_pytorch_model";
/// Folders of a network and of its averaged weights in checkpoints of diffusers' training scripts.
const UNET: &str = "unet";
const UNET_EMA: &str = "unet_ema";
/// Maximum number of shards.
const MAX_FILES: usize = 1024;

/// A checkpoint's files.
#[derive(Debug, Default)]
pub(super) struct CheckpointSource {
    /// The weight files, usually one.
    pub weights: Vec<PathBuf>,
    /// The file to name in messages: the weights, or the index of the shards.
    pub file: PathBuf,
    /// `config.json` of a diffusers network.
    pub unet: Option<PathBuf>,
    /// `config.json` next to a single file, which may belong to something else.
    pub sibling_config: Option<PathBuf>,
    /// The ddpm checkpoint folder that contains a single file.
    pub checkpoint: Option<PathBuf>,
    /// The class of the diffusers pipeline.
    pub pipeline: Option<PipelineKind>,
    /// `scheduler_config.json`.
    pub scheduler: Option<PathBuf>,
    /// The list of class names written by `ddpm export`.
    pub classes: Option<PathBuf>,
    /// The network chosen from the folder, and the others, by their names for `--key`.
    pub key: Option<(String, Role)>,
    pub others: Vec<(String, Role)>,
    pub notes: Vec<String>,
}

pub(super) fn refuse<T>(path: &Path, reason: impl Into<String>) -> Result<T> {
    Err(Error::Checkpoint { path: path.to_owned(), reason: reason.into() })
}

/// A weight file or a shard index in a diffusers model folder, described by its name.
struct WeightsFile {
    name: String,
    /// `fp16`, `non_ema`; empty for none.
    variant: String,
    is_index: bool,
    is_pickle: bool,
}

impl WeightsFile {
    /// `diffusion_pytorch_model.VARIANT.safetensors`, `diffusion_pytorch_model.safetensors.index.VARIANT.json`.
    fn of(name: &str) -> Option<Self> {
        let rest = name.strip_prefix(MODEL)?.strip_prefix('.')?;
        let mut parts: Vec<&str> = rest.split('.').collect();
        let is_index = parts.contains(&"index") && parts.last() == Some(&"json");
        parts.retain(|part| !(is_index && matches!(*part, "index" | "json")));
        let end = parts.iter().position(|part| matches!(*part, "safetensors" | "bin"))?;
        let is_pickle = parts.remove(end) == "bin";
        // Shards are found through their index.
        let is_shard = parts.iter().any(|part| shard_count(part).is_some());
        let variant = parts.join(".");
        (!is_shard).then(|| Self { name: name.to_owned(), variant, is_index, is_pickle })
    }

    /// Sort key, most preferred first: averaged, plain, reduced precision, raw.
    fn rank(&self) -> (u8, bool, bool) {
        let kind = match self.variant.as_str() {
            "" => 1,
            variant if is_averaged(variant) => 0,
            variant if is_raw(variant) => 3,
            _ => 2,
        };
        (kind, self.is_index, self.is_pickle)
    }
}

fn is_raw(variant: &str) -> bool {
    super::roles::role(variant, &[]) == Role::Raw
}

/// The number of shards in a name such as `model-00001-of-00002`.
fn shard_count(stem: &str) -> Option<&str> {
    let (rest, all) = stem.rsplit_once("-of-")?;
    let (_, one) = rest.rsplit_once('-')?;
    let digits = |s: &str| !s.is_empty() && s.bytes().all(|b| b.is_ascii_digit());
    (digits(one) && digits(all)).then_some(all)
}

/// The entries of a folder, sorted by name.
fn file_names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut file_names: Vec<String> = entries.filter_map(|e| e.file_name().into_string().ok()).collect();
    file_names.sort();
    file_names
}

/// The shards listed in `NAME.index.json`, in the same folder.
fn shard_files(list: &Path) -> Result<Vec<PathBuf>> {
    let json = diffusers::read_json(list)?;
    let Some(map) = json.get("weight_map").and_then(Value::as_object) else {
        return refuse(list, "is not a shard index: it has no weight_map");
    };
    let files: BTreeSet<&str> = map.values().filter_map(Value::as_str).collect();
    if files.is_empty() || files.len() > MAX_FILES {
        return refuse(list, format!("lists {} weight files; it must list 1 to {MAX_FILES}", files.len()));
    }
    let mut size = 0u64;
    let mut paths = Vec::new();
    for name in files {
        let path = list.with_file_name(name);
        // Never open a file outside the folder.
        if Path::new(name).file_name().is_none_or(|n| n != name) {
            return refuse(list, format!("lists {name:?}, which is not a file name in the same folder"));
        }
        let Ok(about) = fs::metadata(&path) else {
            return refuse(&path, "is missing: it is one of the weight shards; download it too");
        };
        size = size.saturating_add(about.len());
        paths.push(path);
    }
    if size > MAX_WEIGHTS {
        return refuse(list, format!("lists files of {size} bytes in total; the limit is {MAX_WEIGHTS}"));
    }
    Ok(paths)
}

impl CheckpointSource {
    /// Locates the checkpoint at `path`; `key` selects one of the networks in a folder.
    pub fn find(path: &Path, key: Option<&str>) -> Result<Self> {
        if path.is_file() {
            return Self::from_file(path);
        }
        if !path.is_dir() {
            let hint = "does not exist; give a PyTorch file (.pth, .pt, .ckpt, .bin), a safetensors file, or a diffusers \
                        folder";
            return refuse(path, hint);
        }
        let index = path.join(INDEX);
        let mut pipeline = None;
        if index.is_file() {
            pipeline = diffusers::pipeline(&index, &diffusers::read_json(&index)?)?;
        }
        let has = |name: &str| path.join(name).join(UNET_CONFIG).is_file();
        if index.is_file() || has(UNET) || has(UNET_EMA) {
            let (chosen, other) = match key {
                Some(UNET) => (UNET, UNET_EMA),
                _ if has(UNET_EMA) => (UNET_EMA, UNET),
                _ => (UNET, UNET_EMA),
            };
            let role = |name| if name == UNET_EMA { Role::Averaged } else { Role::Raw };
            let folder = path.join(chosen);
            let config = folder.join(UNET_CONFIG);
            if !config.is_file() {
                return refuse(&config, "is missing: it has the network's settings");
            }
            let file = |path: PathBuf| Some(path).filter(|p| p.is_file());
            let mut source = Self::from_model_folder(&folder)?;
            (source.unet, source.pipeline) = (Some(config), pipeline);
            source.scheduler = file(path.join("scheduler").join(SCHEDULER_CONFIG));
            source.classes = file(path.join(CLASSES));
            if has(UNET_EMA) {
                source.key = Some((chosen.to_owned(), role(chosen)));
                source.others =
                    Some((other.to_owned(), role(other))).filter(|_| has(other)).into_iter().collect();
            }
            return Ok(source);
        }
        let config = path.join(UNET_CONFIG);
        let mut lists =
            file_names(path).into_iter().filter(|n| n.ends_with(".json") && n.contains(".index."));
        if config.is_file() {
            return Ok(Self { unet: Some(config), ..Self::from_model_folder(path)? });
        }
        if let Some(list) = lists.next() {
            return Self::from_file(&path.join(list));
        }
        Self::not_importable(path)
    }

    fn from_file(path: &Path) -> Result<Self> {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let sibling = |name| Some(path.with_file_name(name)).filter(|p| p.is_file());
        let sibling_config = sibling(UNET_CONFIG);
        let checkpoint = sibling("manifest.json").map(|_| folder.to_owned());
        let file = path.to_owned();
        if name.ends_with(".json") && name.contains(".index.") {
            return Ok(Self { weights: shard_files(path)?, file, sibling_config, ..Self::default() });
        }
        let stem = name.rsplit_once('.').map_or(name.as_str(), |(stem, _)| stem);
        if let Some(all) = shard_count(stem) {
            let list = file_names(folder).into_iter().find(|n| n.ends_with(".json") && n.contains(".index."));
            let list = list
                .map_or("the index, NAME.index.json".to_owned(), |n| folder.join(n).display().to_string());
            return refuse(path, format!("is one of {all} weight shards; give {list}, or the folder"));
        }
        Ok(Self { weights: vec![file.clone()], file, sibling_config, checkpoint, ..Self::default() })
    }

    /// Locates the weights in a diffusers model folder.
    fn from_model_folder(folder: &Path) -> Result<Self> {
        let present = file_names(folder);
        let mut models: Vec<WeightsFile> = present.iter().filter_map(|n| WeightsFile::of(n)).collect();
        models.sort_by_key(WeightsFile::rank);
        let Some(model) = models.first() else {
            if present.iter().any(|n| n.starts_with(MODEL) && n.contains("-of-")) {
                let reason = "has weight shards without their index (diffusion_pytorch_model.safetensors.index.json); \
                              download it too";
                return refuse(folder, reason);
            }
            return refuse(
                folder,
                format!("has no weights; expected {MODEL}.safetensors or .bin, of any variant"),
            );
        };
        let file = folder.join(&model.name);
        let weights = if model.is_index { shard_files(&file)? } else { vec![file.clone()] };
        let mut notes = Vec::new();
        let others: BTreeSet<&str> =
            models.iter().map(|m| m.variant.as_str()).filter(|v| *v != model.variant).collect();
        match model.variant.as_str() {
            "" => {}
            variant if is_raw(variant) => notes.push(format!(
                "these are raw weights ({variant}); the averaged ones, which sample better, are not in the folder"
            )),
            variant => notes.push(format!("the weights are of variant {variant}")),
        }
        if !others.is_empty() {
            let others: Vec<_> =
                others.into_iter().map(|v| if v.is_empty() { "without a variant" } else { v }).collect();
            notes.push(format!(
                "also in the folder, importable by giving the file itself: {}",
                others.join(", ")
            ));
        }
        Ok(Self { weights, file, notes, ..Self::default() })
    }

    /// The error for a folder without anything to import at its top level.
    fn not_importable(path: &Path) -> Result<Self> {
        if RunFolder::open(path, path).is_ok() {
            return refuse(path, "is already a ddpm run: use it directly, with sample and train --resume");
        }
        let present = file_names(path);
        let weights = present.iter().find(|name| {
            let end = Path::new(name).extension().and_then(|e| e.to_str());
            matches!(end, Some("pth" | "pt" | "ckpt" | "bin" | "safetensors"))
        });
        let hint = match weights {
            Some(name) => format!("; give the file itself: {}", path.join(name).display()),
            None => String::new(),
        };
        refuse(path, format!("is not a diffusers folder: it has neither {INDEX} nor {UNET_CONFIG}{hint}"))
    }
}

/// Reads the weight files, in order.
pub(super) fn read_all(paths: &[PathBuf]) -> Result<Vec<Vec<u8>>> {
    paths.iter().map(|path| storage::read(path, "read the weights", MAX_WEIGHTS)).collect()
}

/// Reads a list of class names written by `ddpm export`.
pub(super) fn read_classes(path: &Path) -> Result<String> {
    let bytes = storage::read(path, "read the class names", super::embedded::MAX_CLASSES)?;
    String::from_utf8(bytes)
        .map_err(|_| Error::ConfigFile { path: path.to_owned(), reason: "is not UTF-8".to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weight_files_are_ranked_by_variant_and_format() {
        let rank = |name: &str| WeightsFile::of(name).map(|m| m.rank());
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
        assert!(order.is_sorted_by_key(|name| rank(name).expect("a weight file")));
        for other in [
            "diffusion_pytorch_model-00001-of-00002.safetensors",
            "diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
            "config.json",
            "diffusion_pytorch_model.msgpack",
        ] {
            assert_eq!(rank(other), None, "{other}");
        }
        assert_eq!(
            WeightsFile::of("diffusion_pytorch_model.fp16.index.safetensors.json").map(|m| m.is_index),
            Some(true)
        );
    }
}
