//! Imports other programs' checkpoints as runs.

use std::fs;
use std::path::{Path, PathBuf};

use super::choose::{self, Candidate, candidates};
use super::detect::{self, Assumed, current_name};
use super::diffusers;
use super::embedded::EmbeddedSettings;
use super::file::{Content, Parts};
use super::roles::Role;
use super::source::{CheckpointSource, read_all, read_classes, refuse};
use super::state_dicts::TensorEntry;
use crate::checkpoint::{
    self, Checkpoint, Manifest, NamedTensor, WeightsChoice, check_fits, is_counter, list,
};
use crate::config::{Config, Size};
use crate::nets::NetworkKind;
use crate::nets::{self, Shapes};
use crate::run_folder::{CardFacts, RunFolder, write_card};
use crate::text::shown;
use crate::{Error, Result};

/// Options of an import.
#[derive(Clone, Debug, Default)]
pub struct ImportOptions {
    /// Which of several sets of weights, by its [`WeightSet::key`].
    pub key: Option<String>,
    /// Size of the images.
    pub size: Option<Size>,
    /// Heads of each attention layer.
    pub heads: Option<usize>,
    /// Overrides of the settings, as for [`Config::with_overrides`].
    pub overrides: Vec<(String, String)>,
}

/// A set of weights in a file or folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WeightSet {
    /// Its name for [`ImportOptions::key`]; empty for the only one, and for one at the top level.
    pub key: String,
    /// Its role, from the keys that lead to it.
    pub role: Role,
}

/// An imported checkpoint.
#[derive(Clone, Debug)]
pub struct Imported {
    /// The settings of the new run.
    pub config: Config,
    /// Number of parameters of the network.
    pub parameters: u64,
    /// The weights, with PyTorch names and layouts.
    pub weights: Vec<NamedTensor>,
    /// Class names, if the file has them.
    pub classes: Vec<String>,
    /// The weight file, or the index of the shards.
    pub file: PathBuf,
    /// Key of the imported set of weights.
    pub key: String,
    /// Role of the imported weights, from the keys that lead to them.
    pub role: Role,
    /// The other sets of weights.
    pub others: Vec<WeightSet>,
    /// Settings assumed because neither the file nor the options determine them.
    pub assumed: Vec<Assumed>,
    /// Notes for the user, one sentence each.
    pub notes: Vec<String>,
}

/// Reads another program's checkpoint at `path`: a PyTorch file of either format, a safetensors file, the folder of a
/// diffusers pipeline or network, or the index of sharded weights. Nothing in the file is executed, and nothing is written.
///
/// # Errors
/// [`Error::Checkpoint`] for files that are damaged, hold no weights of our networks, hold several sets with no clear
/// choice, or would run code (naming the function); [`Error::ConfigFile`] for settings that our networks do not
/// support; [`Error::Config`] for invalid options; [`Error::Io`].
pub fn read(path: &Path, options: &ImportOptions) -> Result<Imported> {
    let source = CheckpointSource::find(path, options.key.as_deref())?;
    let bytes = read_all(&source.weights)?;
    from_bytes(source, &bytes, options)
}

/// [`read`] from the content of a single file; `path` is for messages.
///
/// # Errors
/// As [`read`].
pub fn read_bytes(path: &Path, bytes: &[u8], options: &ImportOptions) -> Result<Imported> {
    let (file, weights) = (path.to_owned(), vec![path.to_owned()]);
    from_bytes(CheckpointSource { file, weights, ..CheckpointSource::default() }, &[bytes.to_vec()], options)
}

/// Reads and validates the settings in diffusers' `config.json` and `scheduler_config.json`; returns them with the names and
/// shapes of the network's parameters. The paths are for messages.
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
    let (parameters, _) = nets::tensors_of(&*config.build_network(read.channels))?;
    Ok((config, parameters))
}

/// Checks the `model_index.json` at `path`.
///
/// # Errors
/// [`Error::ConfigFile`] for anything but an unconditional pipeline.
pub fn read_index(path: &Path, bytes: &[u8]) -> Result<()> {
    diffusers::pipeline(path, &diffusers::parse_json(path, bytes)?).map(drop)
}

/// Opens the weight files of `source`, whose contents are `bytes`.
fn open<'b>(source: &CheckpointSource, bytes: &'b [Vec<u8>]) -> Result<Vec<Content<'b>>> {
    let one = |(path, bytes): (&PathBuf, &'b Vec<u8>)| {
        Content::open(bytes).map_err(|reason| Error::Checkpoint { path: path.clone(), reason })
    };
    source.weights.iter().zip(bytes).map(one).collect()
}

/// Lists the tensors in the files.
fn parse<'c>(source: &CheckpointSource, contents: &'c [Content<'_>]) -> Result<Parts<'c>> {
    let at = |path: &Path, reason| Error::Checkpoint { path: path.to_owned(), reason };
    let one =
        |(path, content): (&PathBuf, &'c Content<'_>)| content.parse().map_err(|reason| at(path, reason));
    let files = source.weights.iter().zip(contents).map(one).collect::<Result<Vec<_>>>()?;
    Parts::new(files).map_err(|reason| at(&source.file, reason))
}

fn from_bytes(source: CheckpointSource, bytes: &[Vec<u8>], options: &ImportOptions) -> Result<Imported> {
    let path = source.file.as_path();
    let at = |reason: String| Error::Checkpoint { path: path.to_owned(), reason };
    let contents = open(&source, bytes)?;
    let mut file = parse(&source, &contents)?;
    let all = candidates(&file.found).map_err(at)?;
    // For a folder, the key has already selected the network.
    let key =
        options.key.as_deref().filter(|key| source.key.as_ref().is_none_or(|(chosen, _)| chosen != key));
    let chosen = choose::choose(&all, &file.found, key).map_err(at)?;
    check_averaging_started(path, &file, chosen, &all, options)?;
    if let Some((name, why)) = chosen.unsupported.first() {
        return refuse(path, format!("tensor {name} is {why}"));
    }
    let mut notes = source.notes.clone();
    if let Some(classes) = &source.classes {
        file.embedded.classes = Some(read_classes(classes)?);
    }
    let embedded = embedded_settings(&source, &file, chosen.kind, &mut notes);
    let classes = embedded.as_ref().map(|embedded| embedded.classes.clone()).unwrap_or_default();

    let Resolved { config, channels, assumed } =
        resolve_settings(&source, chosen, embedded, options, &mut notes)?;
    let (mut expected, states) = nets::tensors_of(&*config.build_network(channels))?;
    let parameters = expected.iter().map(|(_, shape)| shape.iter().map(|&n| n as u64).product::<u64>()).sum();
    expected.extend(states);
    let (weights, more) = load_tensors(path, &file, chosen, &expected)?;
    notes.extend(more);
    if !file.found.skipped.is_empty() {
        notes.push(format!(
            "skipped objects that need code outside the file, which ddpm never executes: {}",
            choose::describe_skipped(&file.found.skipped, file.found.more)
        ));
    }
    if !file.found.unsupported.is_empty() {
        notes.push(format!(
            "skipped unsupported tensors that are not part of these weights: {}",
            choose::describe_skipped(&file.found.unsupported, 0)
        ));
    }
    let known = config.build_network(channels).classes().unwrap_or(0);
    if !classes.is_empty() && classes.len() != known {
        notes.push(format!(
            "the file names {} classes but the network has {known}: the names are ignored",
            classes.len()
        ));
    }
    let classes = if classes.len() == known { classes } else { Vec::new() };
    let set = |key: &str, role| WeightSet { key: key.to_owned(), role };
    let mut others: Vec<_> =
        all.iter().filter(|c| c.key != chosen.key).map(|c| set(&c.key, c.role)).collect();
    others.extend(source.others.iter().map(|(key, role)| set(key, *role)));
    let (key, role) = source.key.clone().unwrap_or((chosen.key.clone(), chosen.role));
    let file = source.file.clone();
    Ok(Imported { config, parameters, weights, classes, file, key, role, others, assumed, notes })
}

/// Rejects averages that were never updated, unless selected by key.
fn check_averaging_started(
    path: &Path,
    file: &Parts<'_>,
    chosen: &Candidate,
    all: &[Candidate],
    options: &ImportOptions,
) -> Result<()> {
    let Some(counter) = chosen.counter.clone().filter(|c| options.key.is_none() && c.shape.len() <= 1) else {
        return Ok(());
    };
    let at = |reason: String| Error::Checkpoint { path: path.to_owned(), reason };
    let read = file.read(std::slice::from_ref(&counter)).map_err(at)?;
    if all.len() > 1 && read.iter().any(|t| t.data.first() == Some(&0.0)) {
        return refuse(
            path,
            format!(
                "has averaged weights, {:?}, that were never updated ({} is 0); choose a set with ddpm import FILE --key NAME: \
                 {}",
                chosen.key,
                counter.name,
                choose::list_candidates(all)
            ),
        );
    }
    Ok(())
}

/// The ddpm settings in the file or in the checkpoint it belongs to, if they are for this kind of network.
fn embedded_settings(
    source: &CheckpointSource,
    file: &Parts<'_>,
    kind: NetworkKind,
    notes: &mut Vec<String>,
) -> Option<EmbeddedSettings> {
    let embedded = file.embedded.read(&source.file, notes);
    let embedded =
        embedded.or_else(|| source.checkpoint.as_deref().and_then(EmbeddedSettings::of_checkpoint))?;
    if embedded.config.network.name == kind {
        return Some(embedded);
    }
    notes.push(
        "the ddpm settings in the file are for another network than its tensors, and were ignored".into(),
    );
    None
}

/// The settings of a network, and which of them are assumed.
struct Resolved {
    config: Config,
    channels: usize,
    assumed: Vec<Assumed>,
}

/// The settings for the chosen weights: from diffusers' configuration files, else from settings embedded in the file,
/// else from the tensors.
fn resolve_settings(
    source: &CheckpointSource,
    chosen: &Candidate,
    embedded: Option<EmbeddedSettings>,
    options: &ImportOptions,
    notes: &mut Vec<String>,
) -> Result<Resolved> {
    let kind = chosen.kind;
    let (is_embedded, mut config) =
        (embedded.is_some(), embedded.map_or_else(Config::default, |embedded| embedded.config));
    if let Some(path) = &source.scheduler {
        notes.extend(diffusers::scheduler(path, &diffusers::read_json(path)?, &mut config)?);
        if let Some(pipeline) = source.pipeline {
            pipeline.apply(&mut config);
        }
    }
    let unet = match (kind, &source.unet, &source.sibling_config) {
        (NetworkKind::Unet2d, Some(path), _) => Some(diffusers::unet(path, &diffusers::read_json(path)?)?),
        (NetworkKind::Unet2d, None, Some(path)) if !is_embedded => {
            let json = diffusers::read_json(path)?;
            let is_its = diffusers::is_unet(&json);
            if !is_its {
                notes.push(format!("{} does not describe a UNet2DModel, and was ignored", shown(path)));
            }
            is_its.then(|| diffusers::unet(path, &json)).transpose()?
        }
        // Read only to report an unsupported network.
        (_, Some(path), _) => {
            diffusers::unet(path, &diffusers::read_json(path)?)?;
            None
        }
        _ => None,
    };
    let embedded_channels = config.image_channels().filter(|_| is_embedded);
    let (channels, mut assumed, size) = match (unet, embedded_channels) {
        (Some(unet), _) => {
            config.network.name = kind;
            config.unet2d = unet.config;
            config.diffusion.learned_variance = unet.learned_variance;
            // As diffusers pipelines sample, with or without a scheduler configuration.
            config.sampling.use_clipped_model_output = false;
            let mut assumed = Vec::new();
            if source.scheduler.is_none() && !is_embedded {
                assumed.extend(detect::diffusion(&config));
            }
            (unet.channels, assumed, unet.size)
        }
        (None, Some(channels)) => (channels, Vec::new(), config.image_size()),
        (None, None) => {
            let at = |reason: String| Error::Checkpoint { path: source.file.clone(), reason };
            let (channels, assumed) = detect::settings(chosen, &mut config).map_err(at)?;
            (channels, assumed, None)
        }
    };
    let embedded_size = config.image_size().filter(|_| is_embedded);
    let size = options.size.or(size).or(embedded_size).unwrap_or_else(|| {
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
    config.data.path = crate::config::UNKNOWN_DATA.to_owned();
    // Assume training without label dropout, as is usual: unconditional predictions of such a network are meaningless.
    if !is_embedded && config.build_network(channels).classes().is_some() {
        config.train.label_dropout = 0.0;
        assumed.push(Assumed::new("train.label_dropout", 0));
    }
    let mut overrides = heads(kind, options.heads)?;
    overrides.extend(options.overrides.iter().cloned());
    assumed.retain(|a| !overrides.iter().any(|(key, _)| key.trim() == a.key));
    let config = config.with_overrides(&overrides)?;
    Ok(Resolved { config, channels, assumed })
}

/// The override that sets the number of heads.
fn heads(kind: NetworkKind, heads: Option<usize>) -> Result<Vec<(String, String)>> {
    let key = match kind {
        _ if heads.is_none() => return Ok(Vec::new()),
        NetworkKind::Attention => "attention.num_heads",
        NetworkKind::DoubleConv => "double_conv.num_heads",
        NetworkKind::Simple => {
            let reason = "the network simple has no attention; omit --heads".to_owned();
            return Err(Error::Config { key: "heads".to_owned(), reason });
        }
        NetworkKind::Unet2d => {
            let reason = "unet2d takes the channels per head instead: --set unet2d.attention_head_dim=8 (none: one head)";
            return Err(Error::Config { key: "heads".to_owned(), reason: reason.to_owned() });
        }
    };
    Ok(heads.map(|n| (key.to_owned(), n.to_string())).into_iter().collect())
}

/// Loads the network's tensors, with notes on conversions.
fn load_tensors(
    path: &Path,
    file: &Parts<'_>,
    chosen: &Candidate,
    expected: &[(String, Vec<usize>)],
) -> Result<(Vec<NamedTensor>, Vec<String>)> {
    let wanted: Vec<TensorEntry> = with_current_names(chosen);
    let (mut notes, mut present): (Vec<String>, Vec<NamedTensor>) = (Vec::new(), Vec::new());
    for t in &wanted {
        present.push(NamedTensor { name: t.name.clone(), shape: t.shape.clone(), data: Vec::new() });
    }
    // PyTorch did not store these counters before 2018; they only affect the batch statistics of the first steps.
    let mut counters = Vec::new();
    for (name, shape) in expected.iter().filter(|(name, _)| is_counter(name)) {
        if !present.iter().any(|t| t.name == *name) {
            counters.push(NamedTensor { name: name.clone(), shape: shape.clone(), data: vec![0.0] });
        }
    }
    if !counters.is_empty() {
        notes.push(format!(
            "{} batch counters (num_batches_tracked) are missing and start at 0",
            counters.len()
        ));
    }
    present.extend(counters.iter().cloned());
    check_fits(expected, &present, path)?;
    let converted: Vec<&TensorEntry> =
        chosen.tensors.iter().filter(|t| t.dtype.name() != "f32" && !is_counter(&t.name)).collect();
    if let Some(first) = converted.first() {
        let rounded = if converted.iter().any(|t| t.dtype.name() == "f64") { ", with rounding" } else { "" };
        notes.push(format!(
            "{} tensors are {} in the file; they were converted to f32{rounded}",
            converted.len(),
            first.dtype.name()
        ));
    }
    let mut weights =
        file.read(&wanted).map_err(|reason| Error::Checkpoint { path: path.to_owned(), reason })?;
    if let Some((bad_tensor, from)) =
        weights.iter().zip(&wanted).find(|(t, _)| t.data.iter().any(|v| !v.is_finite()))
    {
        let count = bad_tensor.data.iter().filter(|v| !v.is_finite()).count();
        let infinite = bad_tensor.data.iter().all(|v| !v.is_nan());
        let cause = if infinite && from.dtype.name() == "f16" {
            "f16 overflows above 65504, so converting larger weights to it gives infinity; convert them to bf16, or keep \
             f32"
        } else {
            "training most likely diverged before the file was saved; use an earlier checkpoint"
        };
        let values = if count == 1 { "value" } else { "values" };
        return refuse(path, format!("tensor {} has {count} non-finite {values}: {cause}", bad_tensor.name));
    }
    weights.extend(counters);
    Ok((weights, notes))
}

/// Its tensors, under their current names.
fn with_current_names(chosen: &Candidate) -> Vec<TensorEntry> {
    let mut tensors = chosen.tensors.clone();
    tensors.iter_mut().for_each(|t| t.name = current_name(chosen.kind, &t.name));
    tensors
}

impl Imported {
    /// Creates a run: `root/name`, or a numbered one. Its only checkpoint is at step 0 and has no optimizer state, so
    /// training starts afresh from these weights.
    ///
    /// # Errors
    /// [`Error::Run`] for a name that is taken or invalid; [`Error::Io`]. A partial run is removed.
    pub fn save(self, root: &Path, name: Option<&str>) -> Result<RunFolder> {
        let run = RunFolder::create(root, name)?;
        let parameters = self.parameters;
        let manifest = Manifest { classes: self.classes, ..Manifest::new(0, &self.config, parameters, None) };
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
            data: format!("unknown; imported from {}", shown(&self.file)),
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
            // Best effort: a folder without settings is not a run, and the next import of the same name reuses it.
            let _ = fs::remove_dir_all(run.path());
        }
        made.map(|()| run)
    }
}

/// Reads initial weights for training: from a run folder, a checkpoint folder, or anything that [`read`] accepts, whose
/// settings are ignored.
///
/// # Errors
/// As [`read`] and [`checkpoint::load_weights_only`].
pub fn read_weights(path: &Path) -> Result<Vec<NamedTensor>> {
    if path.join("manifest.json").is_file() {
        return checkpoint::load_weights_only(path, &WeightsChoice::Auto).map(|(_, weights)| weights);
    }
    if let Ok(run) = RunFolder::open(path, path)
        && path.is_dir()
    {
        if list(&run.checkpoints())?.is_empty() {
            return refuse(path, "is a run without a checkpoint; train it longer, or give another run");
        }
        return match checkpoint::newest_weights(&run.checkpoints(), &WeightsChoice::Auto)? {
            Some((_, _, weights)) => Ok(weights),
            None => refuse(path, "is a run without a checkpoint; train it longer, or give another run"),
        };
    }
    let source = CheckpointSource::find(path, None)?;
    let bytes = read_all(&source.weights)?;
    let at = |reason: String| Error::Checkpoint { path: source.file.clone(), reason };
    let contents = open(&source, &bytes)?;
    let file = parse(&source, &contents)?;
    let all = candidates(&file.found).map_err(at)?;
    let chosen = choose::choose(&all, &file.found, None).map_err(at)?;
    check_averaging_started(&source.file, &file, chosen, &all, &ImportOptions::default())?;
    if let Some((name, why)) = chosen.unsupported.first() {
        return refuse(&source.file, format!("tensor {name} is {why}"));
    }
    file.read(&with_current_names(chosen)).map_err(at)
}
