//! From other programs' checkpoints to runs.

use std::fs;
use std::path::{Path, PathBuf};

use super::diffusers;
use super::file::{Content, Listed};
use super::recognise::{self, Assumed, Candidate, candidates, preferred, today};
use crate::nets::{self, Shapes};
use crate::text::shown;
use crate::train::checkpoint::{
    self, Checkpoint, MAX_WEIGHTS, Manifest, NamedTensor, Which, check_fits, is_counter, list,
};
use crate::train::config::{Config, NetworkKind, Size};
use crate::train::disk;
use crate::train::run::{CardFacts, RunFolder, write_card};
use crate::{Error, Result};

/// The data path of runs whose pictures are not known.
pub const UNKNOWN_DATA: &str = "unknown";
/// Files of weights in a folder of a diffusers model, the one that is taken first first.
const MODEL_FILES: [&str; 4] = [
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.bin",
    "diffusion_pytorch_model.fp16.safetensors",
    "diffusion_pytorch_model.fp16.bin",
];
const INDEX: &str = "model_index.json";
const UNET_CONFIG: &str = "config.json";
const SCHEDULER_CONFIG: &str = "scheduler_config.json";

/// What is asked for besides the file.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Which of several sets of weights, by the name that [`Imported::others`] gives.
    pub key: Option<String>,
    /// Size of the pictures.
    pub size: Option<Size>,
    /// Heads of each attention.
    pub heads: Option<usize>,
    /// Settings over those found, as [`Config::with_overrides`] takes them.
    pub overrides: Vec<(String, String)>,
}

/// A checkpoint of another program, as ours.
#[derive(Clone, Debug)]
pub struct Imported {
    /// The settings of the run that it becomes.
    pub config: Config,
    /// Number of parameters of the network.
    pub parameters: u64,
    /// The weights, with PyTorch's names and layouts.
    pub weights: Vec<NamedTensor>,
    /// The file the weights are from.
    pub file: PathBuf,
    /// Which of the file's sets they are; empty where it has one only.
    pub key: String,
    /// The other sets of the file.
    pub others: Vec<String>,
    /// What names and shapes do not tell, and nobody said.
    pub assumed: Vec<Assumed>,
    /// What a person should know, a sentence each.
    pub notes: Vec<String>,
}

/// A folder or file with what stands beside it.
struct Source {
    /// The file of weights.
    weights: PathBuf,
    /// `config.json` of its network, where it is diffusers'.
    unet: Option<PathBuf>,
    /// `config.json` beside a lone file, which may be anyone's.
    neighbour: Option<PathBuf>,
    /// `scheduler_config.json`.
    scheduler: Option<PathBuf>,
}

fn refuse<T>(path: &Path, reason: impl Into<String>) -> Result<T> {
    Err(Error::Checkpoint { path: path.to_owned(), reason: reason.into() })
}

/// The file of weights in the folder of a diffusers model.
fn model_file(folder: &Path) -> Result<PathBuf> {
    if let Some(file) = MODEL_FILES.iter().map(|name| folder.join(name)).find(|path| path.is_file()) {
        return Ok(file);
    }
    if folder.join("diffusion_pytorch_model.safetensors.index.json").is_file() {
        let reason = "its weights are in several files, which are not read; save them as one, in diffusers: \
                      model.save_pretrained(FOLDER, max_shard_size=\"100GB\")";
        return refuse(folder, reason);
    }
    refuse(folder, format!("has no weights; looked for {}", MODEL_FILES.join(", ")))
}

impl Source {
    fn find(path: &Path) -> Result<Self> {
        let is_file = |path: &PathBuf| path.is_file();
        if path.is_file() {
            let neighbour = Some(path.with_file_name(UNET_CONFIG)).filter(is_file);
            return Ok(Self { weights: path.to_owned(), unet: None, neighbour, scheduler: None });
        }
        if !path.is_dir() {
            let hint = "there is no such file or folder; give a file of PyTorch's (.pth, .pt, .ckpt, .bin), a safetensors \
                        file, or a folder of diffusers";
            return refuse(path, hint);
        }
        let (index, inside) = (path.join(INDEX), path.join("unet").join(UNET_CONFIG));
        if index.is_file() {
            diffusers::pipeline(&index, &diffusers::read_json(&index)?)?;
        }
        if index.is_file() || inside.is_file() {
            let unet = path.join("unet");
            let config = unet.join(UNET_CONFIG);
            if !config.is_file() {
                return refuse(&config, "is missing: the network's settings are in it");
            }
            let scheduler = Some(path.join("scheduler").join(SCHEDULER_CONFIG)).filter(is_file);
            return Ok(Self { weights: model_file(&unet)?, unet: Some(config), neighbour: None, scheduler });
        }
        let config = path.join(UNET_CONFIG);
        if config.is_file() {
            return Ok(Self {
                weights: model_file(path)?,
                unet: Some(config),
                neighbour: None,
                scheduler: None,
            });
        }
        if RunFolder::open(path, path).is_ok() {
            return refuse(path, "is a run of ddpm already: use it as it is, with sample and train --resume");
        }
        let there: Vec<String> = fs::read_dir(path)
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|e| e.file_name().into_string().ok())
            .collect();
        let weights = there.iter().find(|name| {
            let end = Path::new(name).extension().and_then(|e| e.to_str());
            matches!(end, Some("pth" | "pt" | "ckpt" | "bin" | "safetensors"))
        });
        let hint = match weights {
            Some(name) => format!("; give the file itself: {}", shown(path.join(name))),
            None => String::new(),
        };
        refuse(path, format!("is no folder of diffusers: it has neither {INDEX} nor {UNET_CONFIG}{hint}"))
    }
}

/// What is said of the file beside its weights.
#[derive(Default)]
struct Beside {
    unet: Option<diffusers::Unet>,
    /// See [`Source::neighbour`]; read only for a network of diffusers.
    neighbour: Option<PathBuf>,
    notes: Vec<String>,
    has_scheduler: bool,
}

/// Reads the checkpoint of another program at `path`: a file of PyTorch's, of either format, a safetensors file, the folder
/// of a diffusers pipeline or of its network alone. Nothing of the file is run, and nothing is written.
///
/// # Errors
/// [`Error::Checkpoint`] for files that are damaged, hold other than weights of our networks, or would run code, by the
/// name of that; [`Error::ConfigFile`] for settings that our networks have not; [`Error::Config`] for options that do not
/// do; [`Error::Io`].
pub fn read(path: &Path, options: &Options) -> Result<Imported> {
    let source = Source::find(path)?;
    let mut config = Config::default();
    let mut beside = Beside { neighbour: source.neighbour, ..Beside::default() };
    if let Some(path) = &source.unet {
        beside.unet = Some(diffusers::unet(path, &diffusers::read_json(path)?)?);
    }
    if let Some(path) = &source.scheduler {
        beside.notes = diffusers::scheduler(path, &diffusers::read_json(path)?, &mut config)?;
        beside.has_scheduler = true;
    }
    let bytes = disk::read(&source.weights, "read the weights", MAX_WEIGHTS)?;
    from_bytes(&source.weights, &bytes, config, beside, options)
}

/// [`read`] of a file's content alone.
///
/// # Errors
/// As [`read`].
pub fn read_bytes(path: &Path, bytes: &[u8], options: &Options) -> Result<Imported> {
    from_bytes(path, bytes, Config::default(), Beside::default(), options)
}

/// The settings that a `config.json` and a `scheduler_config.json` of diffusers describe, checked, and the names and shapes
/// of the network's parameters; the paths are for messages.
///
/// # Errors
/// [`Error::ConfigFile`], as [`read`].
pub fn read_settings(unet: (&Path, &[u8]), scheduler: (&Path, &[u8])) -> Result<(Config, Shapes)> {
    let mut config = Config::default();
    diffusers::scheduler(scheduler.0, &diffusers::parse_json(scheduler.0, scheduler.1)?, &mut config)?;
    let read = diffusers::unet(unet.0, &diffusers::parse_json(unet.0, unet.1)?)?;
    config.network.name = NetworkKind::Unet2d;
    (config.unet2d, config.network.im_size) = (read.config, read.size);
    config.diffusion.learned_variance = read.learned_variance;
    config.network.im_channels = Some(read.channels);
    config.validate()?;
    let (parameters, _) = nets::tensors_of(&*nets::from_config(&config, read.channels))?;
    Ok((config, parameters))
}

/// Checks the `model_index.json` at `path`.
///
/// # Errors
/// [`Error::ConfigFile`] for other pipelines than the unconditional ones.
pub fn read_index(path: &Path, bytes: &[u8]) -> Result<()> {
    diffusers::pipeline(path, &diffusers::parse_json(path, bytes)?)
}

fn from_bytes(
    path: &Path,
    bytes: &[u8],
    mut config: Config,
    beside: Beside,
    options: &Options,
) -> Result<Imported> {
    let at = |reason: String| Error::Checkpoint { path: path.to_owned(), reason };
    let content = Content::open(bytes).map_err(at)?;
    let file = content.parse().map_err(at)?;
    let all = candidates(&file.sets);
    let chosen = choose(path, &all, options, &file.sets)?;
    let mut notes = beside.notes;
    let kind = chosen.kind;

    let unet = match (kind, beside.neighbour) {
        (NetworkKind::Unet2d, Some(path)) => {
            let json = diffusers::read_json(&path)?;
            let is_its = diffusers::is_unet(&json);
            if !is_its {
                notes.push(format!("{} is of no UNet2DModel, and was not looked at", shown(&path)));
            }
            is_its.then(|| diffusers::unet(&path, &json)).transpose()?
        }
        _ => beside.unet.filter(|_| kind == NetworkKind::Unet2d),
    };
    let (channels, mut assumed, size) = match unet {
        Some(unet) => {
            config.network.name = kind;
            config.unet2d = unet.config;
            config.diffusion.learned_variance = unet.learned_variance;
            // As its pipelines sample, with a scheduler beside it or not.
            config.sampling.use_clipped_model_output = false;
            let mut assumed = Vec::new();
            if !beside.has_scheduler {
                assumed.extend(recognise::diffusion(&config));
            }
            (unet.channels, assumed, unet.size)
        }
        None => {
            let (channels, assumed) = recognise::settings(chosen, &mut config).map_err(at)?;
            (channels, assumed, None)
        }
    };
    let size = options.size.or(size).unwrap_or_else(|| {
        let side = match kind {
            NetworkKind::Attention => 28,
            NetworkKind::Simple => 64,
            NetworkKind::DoubleConv | NetworkKind::Unet2d => 32,
        };
        assumed.push(Assumed::new("network.im_size", side));
        Size { height: side, width: side }
    });
    (config.network.im_size, config.data.size) = (Some(size), Some(size));
    (config.network.im_channels, config.data.channels) = (Some(channels), Some(channels));
    config.data.path = UNKNOWN_DATA.to_owned();
    // Nobody says that it learnt pictures without their class, and most have not: what such a network says of them is noise.
    if nets::from_config(&config, channels).classes().is_some() {
        config.train.label_dropout = 0.0;
        assumed.push(Assumed::new("train.label_dropout", 0));
    }
    let mut overrides = heads(kind, options.heads)?;
    overrides.extend(options.overrides.iter().cloned());
    assumed.retain(|a| !overrides.iter().any(|(key, _)| key.trim() == a.key));
    let config = config.with_overrides(&overrides)?;

    let (mut expected, states) = nets::tensors_of(&*nets::from_config(&config, channels))?;
    let parameters = expected.iter().map(|(_, shape)| shape.iter().map(|&n| n as u64).product::<u64>()).sum();
    expected.extend(states);
    let (weights, more) = take(path, &file, chosen, &expected)?;
    notes.extend(more);
    let others = all.iter().filter(|c| c.key != chosen.key).map(|c| c.key.clone()).collect();
    let key = chosen.key.clone();
    Ok(Imported { config, parameters, weights, file: path.to_owned(), key, others, assumed, notes })
}

/// The setting that says the number of heads.
fn heads(kind: NetworkKind, heads: Option<usize>) -> Result<Vec<(String, String)>> {
    let key = match kind {
        _ if heads.is_none() => return Ok(Vec::new()),
        NetworkKind::Attention => "attention.num_heads",
        NetworkKind::DoubleConv => "double_conv.num_heads",
        NetworkKind::Simple => {
            let reason = "the network simple has no attention; leave --heads out".to_owned();
            return Err(Error::Config { key: "heads".to_owned(), reason });
        }
        NetworkKind::Unet2d => {
            let reason = "unet2d is told the channels of a head instead: --set unet2d.attention_head_dim=8 (none: one head)";
            return Err(Error::Config { key: "heads".to_owned(), reason: reason.to_owned() });
        }
    };
    Ok(heads.map(|n| (key.to_owned(), n.to_string())).into_iter().collect())
}

/// The set of weights that is asked for, or the one that is likeliest meant.
fn choose<'c>(
    path: &Path,
    all: &'c [Candidate],
    options: &Options,
    sets: &[super::file::Set],
) -> Result<&'c Candidate> {
    let keys = || all.iter().map(|c| format!("{:?}", c.key)).collect::<Vec<_>>().join(", ");
    if let Some(key) = &options.key {
        let exact = all.iter().find(|c| c.key == *key);
        let begins =
            |c: &&Candidate| c.key.strip_prefix(key.as_str()).is_some_and(|rest| rest.starts_with('.'));
        return match exact.or_else(|| all.iter().find(begins)) {
            Some(found) => Ok(found),
            None if all.is_empty() => refuse(path, "has no weights of our networks"),
            None => refuse(path, format!("has no weights called {key:?}; --key can be one of {}", keys())),
        };
    }
    if let Some(found) = preferred(all) {
        return Ok(found);
    }
    let names: Vec<&str> = sets.iter().flat_map(|s| &s.tensors).map(|t| t.name.as_str()).take(3).collect();
    let there = match names[..] {
        [] => "it has no tensors".to_owned(),
        _ => format!("it has tensors as {}", names.join(", ")),
    };
    refuse(
        path,
        format!(
            "is of none of our networks, attention, simple, double-conv, unet2d (diffusers' UNet2DModel): {there}"
        ),
    )
}

/// The numbers of the network's tensors, and what was not as it is today.
fn take(
    path: &Path,
    file: &super::file::TensorFile<'_>,
    chosen: &Candidate,
    expected: &[(String, Vec<usize>)],
) -> Result<(Vec<NamedTensor>, Vec<String>)> {
    let name = |name: &str| today(chosen.kind, &name[chosen.prefix.len()..]);
    let (mut notes, mut listed): (Vec<String>, Vec<NamedTensor>) = (Vec::new(), Vec::new());
    for t in &chosen.tensors {
        listed.push(NamedTensor { name: name(&t.name), shape: t.shape.clone(), data: Vec::new() });
    }
    // PyTorch wrote none of these counters before 2018, and they change nothing but the first steps' statistics.
    let mut counters = Vec::new();
    for (name, shape) in expected.iter().filter(|(name, _)| is_counter(name)) {
        if !listed.iter().any(|t| t.name == *name) {
            counters.push(NamedTensor { name: name.clone(), shape: shape.clone(), data: vec![0.0] });
        }
    }
    if !counters.is_empty() {
        notes.push(format!(
            "{} counters of batches are missing (num_batches_tracked) and begin at 0",
            counters.len()
        ));
    }
    listed.extend(counters.iter().cloned());
    check_fits(expected, &listed, path)?;
    let odd: Vec<&Listed> =
        chosen.tensors.iter().filter(|t| t.dtype.name() != "f32" && !is_counter(&t.name)).collect();
    if let Some(first) = odd.first() {
        let rounded = if odd.iter().any(|t| t.dtype.name() == "f64") { ", rounded" } else { "" };
        notes.push(format!(
            "{} tensors are {} in the file; they become f32{rounded}",
            odd.len(),
            first.dtype.name()
        ));
    }
    let mut weights = file
        .read(&chosen.tensors, name)
        .map_err(|reason| Error::Checkpoint { path: path.to_owned(), reason })?;
    weights.extend(counters);
    if let Some(broken) = weights.iter().find(|t| t.data.iter().any(|v| !v.is_finite())) {
        return refuse(
            path,
            format!("tensor {} has a number that is not finite: the training had gone wrong", broken.name),
        );
    }
    Ok((weights, notes))
}

impl Imported {
    /// Makes the run: `root/name`, or a numbered one. Its only checkpoint is of step 0 and has no optimiser's state, so that
    /// training begins anew from these weights.
    ///
    /// # Errors
    /// [`Error::Run`] for a name that is taken or cannot be one; [`Error::Io`]. What was begun is removed.
    pub fn save(self, root: &Path, name: Option<&str>) -> Result<RunFolder> {
        let run = RunFolder::create(root, name)?;
        let parameters = self.parameters;
        let manifest = Manifest::new(0, &self.config, parameters, None);
        let no_state = Vec::new;
        let checkpoint = Checkpoint {
            manifest,
            weights: self.weights,
            ema: no_state(),
            averages: Vec::new(),
            exp_avg: no_state(),
            exp_avg_sq: no_state(),
        };
        let facts = CardFacts {
            parameters,
            classes: checkpoint.manifest.classes.clone(),
            data: format!("not known; imported from {}", shown(&self.file)),
            steps: 0,
            loss: None,
            seconds: None,
            imported: true,
            has_ema: false,
            checkpoint: Some(PathBuf::from("checkpoints/step-0000000")),
        };
        let made = checkpoint::save(&run.checkpoints(), &checkpoint)
            .and_then(|_| run.write_config(&self.config))
            .and_then(|()| write_card(&run, &self.config, &facts));
        if made.is_err() {
            // Best effort: without its settings it is no run, and the next import of the name takes it over.
            let _ = fs::remove_dir_all(run.path());
        }
        made.map(|()| run)
    }
}

/// Weights to begin a training with: of a run (its folder, or one of its checkpoints' folders), or of anything that
/// [`read`] reads, whose settings are not looked at.
///
/// # Errors
/// As [`read`] and [`checkpoint::load_weights_only`].
pub fn read_weights(path: &Path) -> Result<Vec<NamedTensor>> {
    if path.join("manifest.json").is_file() {
        return checkpoint::load_weights_only(path, &Which::Auto).map(|(_, weights)| weights);
    }
    if let Ok(run) = RunFolder::open(path, path)
        && path.is_dir()
    {
        if list(&run.checkpoints())?.is_empty() {
            return refuse(path, "is a run without a checkpoint; let it train longer, or give another");
        }
        return match checkpoint::newest_weights(&run.checkpoints(), &Which::Auto)? {
            Some((_, _, weights)) => Ok(weights),
            None => refuse(path, "is a run without a checkpoint; let it train longer, or give another"),
        };
    }
    let file = Source::find(path)?.weights;
    let bytes = disk::read(&file, "read the weights", MAX_WEIGHTS)?;
    let at = |reason: String| Error::Checkpoint { path: file.clone(), reason };
    let content = Content::open(&bytes).map_err(at)?;
    let tensors = content.parse().map_err(at)?;
    let all = candidates(&tensors.sets);
    let chosen = choose(&file, &all, &Options::default(), &tensors.sets)?;
    tensors.read(&chosen.tensors, |name| today(chosen.kind, &name[chosen.prefix.len()..])).map_err(at)
}
