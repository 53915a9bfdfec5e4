//! From other programs' checkpoints to runs.

use std::fs;
use std::path::{Path, PathBuf};

use super::choose::{self, Candidate, candidates};
use super::diffusers;
use super::file::{Content, Parts};
use super::own::Own;
use super::recognise::{self, Assumed, today};
use super::roles::Role;
use super::sets::Listed;
use super::source::{Source, read_all, read_classes, refuse};
use crate::nets::{self, Shapes};
use crate::text::shown;
use crate::train::checkpoint::{
    self, Checkpoint, Manifest, NamedTensor, Which, check_fits, is_counter, list,
};
use crate::train::config::{Config, NetworkKind, Size};
use crate::train::run::{CardFacts, RunFolder, write_card};
use crate::{Error, Result};

/// The data path of runs whose images are not known.
pub const UNKNOWN_DATA: &str = "unknown";
/// What is asked for besides the file.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Which of several sets of weights, by the name that [`WeightSet::key`] gives.
    pub key: Option<String>,
    /// Size of the images.
    pub size: Option<Size>,
    /// Heads of each attention.
    pub heads: Option<usize>,
    /// Settings over those found, as [`Config::with_overrides`] takes them.
    pub overrides: Vec<(String, String)>,
}

/// One of the sets of weights that a file or folder has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WeightSet {
    /// What [`Options::key`] calls it; empty for the file's only one, and for one at its top.
    pub key: String,
    /// What it is by the names that lead to it.
    pub role: Role,
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
    /// The names of the classes, where the file has them.
    pub classes: Vec<String>,
    /// The file the weights are from, or the list of several.
    pub file: PathBuf,
    /// Which of the file's sets they are.
    pub key: String,
    /// What they are, by the names that lead to them.
    pub role: Role,
    /// The other sets of the file.
    pub others: Vec<WeightSet>,
    /// What names and shapes do not tell, and nobody said.
    pub assumed: Vec<Assumed>,
    /// What a person should know, a sentence each.
    pub notes: Vec<String>,
}

/// Reads the checkpoint of another program at `path`: a file of PyTorch's, of either format, a safetensors file, the folder
/// of a diffusers pipeline or of its network alone, the list of weights in several files. Nothing of the file is run, and
/// nothing is written.
///
/// # Errors
/// [`Error::Checkpoint`] for files that are damaged, hold other than weights of our networks, several sets of them of which
/// none is known to be meant, or would act on the machine, by the name of that; [`Error::ConfigFile`] for settings that our
/// networks have not; [`Error::Config`] for options that do not do; [`Error::Io`].
pub fn read(path: &Path, options: &Options) -> Result<Imported> {
    let source = Source::find(path, options.key.as_deref())?;
    let bytes = read_all(&source.weights)?;
    from_bytes(source, &bytes, options)
}

/// [`read`] of a file's content alone.
///
/// # Errors
/// As [`read`].
pub fn read_bytes(path: &Path, bytes: &[u8], options: &Options) -> Result<Imported> {
    let (file, weights) = (path.to_owned(), vec![path.to_owned()]);
    from_bytes(Source { file, weights, ..Source::default() }, &[bytes.to_vec()], options)
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
    diffusers::pipeline(path, &diffusers::parse_json(path, bytes)?).map(drop)
}

/// The content of files of weights, by the source's paths.
fn open<'b>(source: &Source, bytes: &'b [Vec<u8>]) -> Result<Vec<Content<'b>>> {
    let one = |(path, bytes): (&PathBuf, &'b Vec<u8>)| {
        Content::open(bytes).map_err(|reason| Error::Checkpoint { path: path.clone(), reason })
    };
    source.weights.iter().zip(bytes).map(one).collect()
}

/// What tensors they have.
fn parse<'c>(source: &Source, contents: &'c [Content<'_>]) -> Result<Parts<'c>> {
    let at = |path: &Path, reason| Error::Checkpoint { path: path.to_owned(), reason };
    let one =
        |(path, content): (&PathBuf, &'c Content<'_>)| content.parse().map_err(|reason| at(path, reason));
    let files = source.weights.iter().zip(contents).map(one).collect::<Result<Vec<_>>>()?;
    Parts::new(files).map_err(|reason| at(&source.file, reason))
}

fn from_bytes(source: Source, bytes: &[Vec<u8>], options: &Options) -> Result<Imported> {
    let path = source.file.as_path();
    let at = |reason: String| Error::Checkpoint { path: path.to_owned(), reason };
    let contents = open(&source, bytes)?;
    let mut file = parse(&source, &contents)?;
    let all = candidates(&file.found).map_err(at)?;
    // A folder's network was chosen by its key.
    let key = options.key.as_deref().filter(|key| source.key.as_ref().is_none_or(|(taken, _)| taken != key));
    let chosen = choose::choose(&all, &file.found, key).map_err(at)?;
    check_begun(path, &file, chosen, &all, options)?;
    if let Some((name, why)) = chosen.unread.first() {
        return refuse(path, format!("tensor {name} is {why}"));
    }
    let mut notes = source.notes.clone();
    if let Some(classes) = &source.classes {
        file.own.classes = Some(read_classes(classes)?);
    }
    let own = own_settings(&source, &file, chosen.kind, &mut notes);
    let classes = own.as_ref().map(|own| own.classes.clone()).unwrap_or_default();

    let Described { config, channels, assumed } = describe(&source, chosen, own, options, &mut notes)?;
    let (mut expected, states) = nets::tensors_of(&*nets::from_config(&config, channels))?;
    let parameters = expected.iter().map(|(_, shape)| shape.iter().map(|&n| n as u64).product::<u64>()).sum();
    expected.extend(states);
    let (weights, more) = take(path, &file, chosen, &expected)?;
    notes.extend(more);
    if !file.found.left_out.is_empty() {
        notes.push(format!(
            "left out, as ddpm runs no code that could make them: {}",
            choose::told(&file.found.left_out, file.found.more)
        ));
    }
    if !file.found.unread.is_empty() {
        notes.push(format!(
            "left out, being no part of these weights: {}",
            choose::told(&file.found.unread, 0)
        ));
    }
    let known = nets::from_config(&config, channels).classes().unwrap_or(0);
    if !classes.is_empty() && classes.len() != known {
        notes.push(format!(
            "the file names {} classes, and the network has {known}: the names are left out",
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

/// Refuses averages that nothing was averaged into yet, where nobody asked for them.
fn check_begun(
    path: &Path,
    file: &Parts<'_>,
    chosen: &Candidate,
    all: &[Candidate],
    options: &Options,
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
                "has averaged weights, {:?}, into which nothing was averaged yet ({} is 0); say which ones are meant, with ddpm \
                 import FILE --key NAME: {}",
                chosen.key,
                counter.name,
                choose::listed(all)
            ),
        );
    }
    Ok(())
}

/// Our own settings in the file, or in the checkpoint that it is of, if they are of this kind of network.
fn own_settings(
    source: &Source,
    file: &Parts<'_>,
    kind: NetworkKind,
    notes: &mut Vec<String>,
) -> Option<Own> {
    let own = file.own.read(&source.file, notes);
    let own = own.or_else(|| source.checkpoint.as_deref().and_then(Own::of_checkpoint))?;
    if own.config.network.name == kind {
        return Some(own);
    }
    notes.push(
        "the settings of ddpm in the file are of another network than its tensors, and were not looked at"
            .into(),
    );
    None
}

/// The settings of a network, and where they are from.
struct Described {
    config: Config,
    channels: usize,
    assumed: Vec<Assumed>,
}

/// The settings of the chosen weights: those of the files beside them, over our own in the file, else by the tensors.
fn describe(
    source: &Source,
    chosen: &Candidate,
    own: Option<Own>,
    options: &Options,
    notes: &mut Vec<String>,
) -> Result<Described> {
    let kind = chosen.kind;
    let (is_own, mut config) = (own.is_some(), own.map_or_else(Config::default, |own| own.config));
    if let Some(path) = &source.scheduler {
        notes.extend(diffusers::scheduler(path, &diffusers::read_json(path)?, &mut config)?);
        if let Some(pipeline) = source.pipeline {
            pipeline.apply(&mut config);
        }
    }
    let unet = match (kind, &source.unet, &source.neighbour) {
        (NetworkKind::Unet2d, Some(path), _) => Some(diffusers::unet(path, &diffusers::read_json(path)?)?),
        (NetworkKind::Unet2d, None, Some(path)) if !is_own => {
            let json = diffusers::read_json(path)?;
            let is_its = diffusers::is_unet(&json);
            if !is_its {
                notes.push(format!("{} is of no UNet2DModel, and was not looked at", shown(path)));
            }
            is_its.then(|| diffusers::unet(path, &json)).transpose()?
        }
        // Read for what it says of a network that is none of ours.
        (_, Some(path), _) => {
            diffusers::unet(path, &diffusers::read_json(path)?)?;
            None
        }
        _ => None,
    };
    let own_channels = config.image_channels().filter(|_| is_own);
    let (channels, mut assumed, size) = match (unet, own_channels) {
        (Some(unet), _) => {
            config.network.name = kind;
            config.unet2d = unet.config;
            config.diffusion.learned_variance = unet.learned_variance;
            // As its pipelines sample, with a scheduler beside it or not.
            config.sampling.use_clipped_model_output = false;
            let mut assumed = Vec::new();
            if source.scheduler.is_none() && !is_own {
                assumed.extend(recognise::diffusion(&config));
            }
            (unet.channels, assumed, unet.size)
        }
        (None, Some(channels)) => (channels, Vec::new(), config.image_size()),
        (None, None) => {
            let at = |reason: String| Error::Checkpoint { path: source.file.clone(), reason };
            let (channels, assumed) = recognise::settings(chosen, &mut config).map_err(at)?;
            (channels, assumed, None)
        }
    };
    let own_size = config.image_size().filter(|_| is_own);
    let size = options.size.or(size).or(own_size).unwrap_or_else(|| {
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
    // Nobody says that it learnt images without their class, and most have not: what such a network says of them is noise.
    if !is_own && nets::from_config(&config, channels).classes().is_some() {
        config.train.label_dropout = 0.0;
        assumed.push(Assumed::new("train.label_dropout", 0));
    }
    let mut overrides = heads(kind, options.heads)?;
    overrides.extend(options.overrides.iter().cloned());
    assumed.retain(|a| !overrides.iter().any(|(key, _)| key.trim() == a.key));
    let config = config.with_overrides(&overrides)?;
    Ok(Described { config, channels, assumed })
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

/// The numbers of the network's tensors, and what was not as it is today.
fn take(
    path: &Path,
    file: &Parts<'_>,
    chosen: &Candidate,
    expected: &[(String, Vec<usize>)],
) -> Result<(Vec<NamedTensor>, Vec<String>)> {
    let wanted: Vec<Listed> = renamed(chosen);
    let (mut notes, mut listed): (Vec<String>, Vec<NamedTensor>) = (Vec::new(), Vec::new());
    for t in &wanted {
        listed.push(NamedTensor { name: t.name.clone(), shape: t.shape.clone(), data: Vec::new() });
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
    let mut weights =
        file.read(&wanted).map_err(|reason| Error::Checkpoint { path: path.to_owned(), reason })?;
    if let Some((broken, from)) =
        weights.iter().zip(&wanted).find(|(t, _)| t.data.iter().any(|v| !v.is_finite()))
    {
        let count = broken.data.iter().filter(|v| !v.is_finite()).count();
        let infinite = broken.data.iter().all(|v| !v.is_nan());
        let cause = match infinite && from.dtype.name() == "f16" {
            true => {
                "f16 has none past 65504, and becomes infinite where weights are converted that were; convert them to bf16 or \
                 keep f32"
            }
            false => "most often the training diverged before it was saved; take an earlier checkpoint",
        };
        let values = if count == 1 { "value that is" } else { "values that are" };
        return refuse(path, format!("tensor {} has {count} {values} not finite: {cause}", broken.name));
    }
    weights.extend(counters);
    Ok((weights, notes))
}

/// Its tensors, by the names of today.
fn renamed(chosen: &Candidate) -> Vec<Listed> {
    let mut tensors = chosen.tensors.clone();
    tensors.iter_mut().for_each(|t| t.name = today(chosen.kind, &t.name));
    tensors
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
    let source = Source::find(path, None)?;
    let bytes = read_all(&source.weights)?;
    let at = |reason: String| Error::Checkpoint { path: source.file.clone(), reason };
    let contents = open(&source, &bytes)?;
    let file = parse(&source, &contents)?;
    let all = candidates(&file.found).map_err(at)?;
    let chosen = choose::choose(&all, &file.found, None).map_err(at)?;
    check_begun(&source.file, &file, chosen, &all, &Options::default())?;
    if let Some((name, why)) = chosen.unread.first() {
        return refuse(&source.file, format!("tensor {name} is {why}"));
    }
    file.read(&renamed(chosen)).map_err(at)
}
