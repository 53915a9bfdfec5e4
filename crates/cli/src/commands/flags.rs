//! What the commands that draw with a run share: flags, progress, files.

use super::folder::FlagValue;
use super::pairs;
use anyhow::{Context, bail};
use clap::ValueEnum;
use ddpm::data::Dataset;
use ddpm::generate::{BATCH, Generator};
use ddpm::guidance::Guidance;
use ddpm::hardware::{DeviceChoice, Hardware};
use ddpm::sampler::{self, Listed, Options, SAMPLERS, Spacing, Threshold, Variance};
use ddpm::text::{quoted, shown};
use ddpm::train::checkpoint::{self, Newest, Which};
use ddpm::train::config::SamplingConfig;
use ddpm::train::open_data;
use ddpm::train::run::{End, RUNS, RunFolder, RunRecord};
use std::path::{Path, PathBuf};

/// The run, its weights, and where it is.
#[derive(clap::Args)]
pub(super) struct RunFlags {
    /// The run (its folder, or its name under runs/)
    #[arg(index = 1)]
    run: PathBuf,
    /// What computes: auto, cpu, cuda or cuda:1
    #[arg(long, value_name = "DEVICE", default_value_t)]
    device: DeviceChoice,
    /// Threads; 0 takes all cores
    #[arg(long, value_name = "N", default_value_t = 0)]
    threads: usize,
    /// The weights: ema (averaged), raw (as trained), auto (averaged if there are any), another average of the run's by its name,
    /// as ema-0.999 or power-0.05, or a .safetensors file, as `ddpm average` makes
    #[arg(long, value_name = "WHICH", default_value = "auto")]
    weights: Which,
    /// From this checkpoint (a step) instead of the newest
    #[arg(long, value_name = "STEP")]
    checkpoint: Option<String>,
    /// The folder that holds the runs
    #[arg(long, value_name = "FOLDER", default_value = RUNS)]
    runs: PathBuf,
}

impl RunFlags {
    /// The run, the checkpoint that is meant, and its network.
    pub fn open(&self) -> anyhow::Result<OpenRun> {
        let (run, at) = open_run(&self.runs, &self.run, self.checkpoint.as_deref())?;
        let which = weights_of(&self.run, at.as_deref(), &self.weights)?;
        let hardware = Hardware { device: self.device, ..self.threads.into() };
        let named = at.is_some();
        let (checkpoint, generator) = match at {
            Some(path) => {
                let generator = Generator::open(&path, which.clone(), hardware)?;
                (path, generator)
            }
            None => {
                let found = Generator::open_newest(&run.checkpoints(), &which, hardware)?;
                let (newest, generator) = found.with_context(|| none_yet(&run))?;
                tell_skipped(&newest);
                tell_divergence(&run);
                (newest.path, generator)
            }
        };
        let weights_sha256 = checkpoint::weights_sha256(&checkpoint, &which)?;
        let step = checkpoint.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let weights = match &which {
            Which::Auto => None,
            Which::Ema => Some("ema".to_owned()),
            Which::Raw => Some("raw".to_owned()),
            Which::Average(name) => Some(name.clone()),
            // Files of one name may hold other weights.
            Which::File(path) => Some(format!("{}-{}", stem(path), &weights_sha256[..8])),
        };
        Ok(OpenRun { run, checkpoint, generator, step, named, weights, weights_sha256 })
    }
}

/// A run with its network.
pub(super) struct OpenRun {
    pub run: RunFolder,
    pub generator: Generator,
    /// The checkpoint's folder, and its name.
    pub checkpoint: PathBuf,
    pub step: String,
    /// Whether this checkpoint was asked for.
    named: bool,
    /// The weights, where they were chosen.
    pub weights: Option<String>,
    weights_sha256: String,
}

impl OpenRun {
    /// Which weights were asked for.
    pub fn said(&self) -> Vec<FlagValue> {
        let number = self.step.strip_prefix("step-").and_then(|n| n.parse::<u64>().ok());
        let step = number.map_or_else(|| self.step.clone(), |n| n.to_string());
        given([("weights", self.weights.clone()), ("checkpoint", self.named.then_some(step))])
    }

    /// The weights themselves, for a record.
    pub fn record(&self) -> serde_json::Map<String, serde_json::Value> {
        let entries = [("checkpoint", &self.step), ("weights_sha256", &self.weights_sha256)];
        entries.into_iter().map(|(key, value)| (key.to_owned(), value.clone().into())).collect()
    }
}

/// The run, by its folder or name or by the folder of one of its checkpoints, and the checkpoint if one is named.
pub(super) fn open_run(
    runs: &Path,
    run: &Path,
    checkpoint: Option<&str>,
) -> anyhow::Result<(RunFolder, Option<PathBuf>)> {
    let (opened, at) = RunFolder::open_at(runs, run)?;
    if let (Some(at), Some(named)) = (&at, checkpoint) {
        bail!("{} is a checkpoint already; leave --checkpoint {named} out, or give the run", shown(at));
    }
    let at = at
        .map_or_else(|| checkpoint.map(|name| opened.find_checkpoint(name)).transpose(), |at| Ok(Some(at)))?;
    Ok((opened, at))
}

/// The weights that are meant where a file of the checkpoint `at` is given as the run: those in the file.
pub(super) fn weights_of(run: &Path, at: Option<&Path>, asked: &Which) -> anyhow::Result<Which> {
    if at.is_none() || !run.is_file() {
        return Ok(asked.clone());
    }
    let name = run.file_name().unwrap_or_default().to_string_lossy();
    let Some(which) = Which::of_checkpoint_file(&name) else {
        bail!("{} holds no weights of its own; give the folder of the checkpoint, or the run", shown(run));
    };
    if *asked != Which::Auto && *asked != which {
        bail!("{} is a file of other weights than --weights asks for; leave one of the two out", shown(run));
    }
    Ok(which)
}

/// Those of the flags that have a value.
pub(super) fn given<const N: usize>(flags: [(&'static str, Option<String>); N]) -> Vec<FlagValue> {
    flags.into_iter().filter_map(|(flag, value)| Some((flag, value?))).collect()
}

/// The name of a choice on the command line.
pub(super) fn choice(value: impl ValueEnum) -> Option<String> {
    value.to_possible_value().map(|value| value.get_name().to_owned())
}

/// Images that a run is held against.
#[derive(clap::Args)]
pub(super) struct DataFlags {
    /// The images, as `ddpm train --data`; the run's own if not given
    #[arg(long, value_name = "PATH")]
    data: Option<String>,
    /// How they are read, as data.csv=table.csv, where it is not as the run's (see `ddpm config`); may be given more than once
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
}

impl DataFlags {
    /// What other images are called, or the run's own where they are read in another way.
    pub fn name(&self) -> Option<String> {
        let own = || (!self.set.is_empty()).then(|| "set".to_owned());
        self.data.as_deref().map(|path| stem(Path::new(path))).or_else(own)
    }

    /// The data set. A CSV file of the run's names the run's images, and has nothing to say of others.
    pub fn open(&self, generator: &Generator) -> anyhow::Result<Box<dyn Dataset>> {
        let said = pairs(&self.set)?;
        if let Some((key, _)) = said.iter().find(|(key, _)| !key.starts_with("data.")) {
            bail!("--set {key}: only settings of the images can be given here, as data.csv=table.csv");
        }
        let mut over: Vec<(String, String)> = Vec::new();
        if let Some(path) = &self.data {
            over.push(("data.path".to_owned(), path.clone()));
            let before = generator.config().data.csv.as_ref();
            if let Some(before) = before.filter(|_| !said.iter().any(|(key, _)| key == "data.csv")) {
                tell!(
                    "note: the run's CSV file ({before}) is left out for {path}; --set data.csv=FILE gives one"
                );
                let unset = ["data.csv", "data.csv_id_column", "data.csv_label_column"];
                over.extend(unset.map(|key| (key.to_owned(), "none".to_owned())));
            }
        }
        over.extend(said);
        Ok(open_data(&generator.config().with_overrides(&over)?)?)
    }
}

/// The run's newest whole checkpoint; damaged ones are told.
pub(super) fn newest(run: &RunFolder) -> anyhow::Result<PathBuf> {
    let newest = checkpoint::newest(&run.checkpoints())?.with_context(|| none_yet(run))?;
    tell_skipped(&newest);
    Ok(newest.path)
}

/// That a run has no checkpoint.
fn none_yet(run: &RunFolder) -> String {
    let path = run.path();
    format!(
        "{} has no checkpoint yet: let it train longer (ddpm train --resume {})",
        shown(path),
        quoted(path)
    )
}

/// That the newest weights are those of a training that has diverged.
fn tell_divergence(run: &RunFolder) {
    let record = RunRecord::read(run.path());
    if record.end == Some(End::Diverged) {
        let why = record.error.map_or(String::new(), |why| format!(" ({why})"));
        tell!("warning: the training of this run diverged{why}; --checkpoint STEP takes an earlier one");
    }
}

fn tell_skipped(newest: &Newest) {
    for warning in newest.warnings() {
        tell!("warning: {warning}");
    }
}

/// The sampler and what it can be told.
#[derive(clap::Args)]
pub(super) struct SamplerFlags {
    /// How images are drawn, by the sampler's name; ddpm if not given
    #[arg(long, value_name = "NAME", long_help = samplers())]
    sampler: Option<String>,
    /// Denoising steps; the sampler's own number if not given, all of the schedule's with ddpm
    #[arg(long, value_name = "N")]
    steps: Option<usize>,
    /// Share of noise that is drawn anew, 0 to 1, of samplers that have a choice
    #[arg(long, value_name = "SHARE", allow_negative_numbers = true)]
    eta: Option<f64>,
    /// ddpm's variance of the noise that is drawn anew; the run's (sampling.variance) if not given, learned where it is
    #[arg(long, value_name = "WHICH")]
    variance: Option<NoiseVariance>,
    /// Whether ddim takes the noise from the clipped image (true) or as it was predicted (false, diffusers' default); the run's
    /// (sampling.use_clipped_model_output) if not given
    #[arg(long, value_name = "true|false")]
    use_clipped_model_output: Option<bool>,
    #[command(flatten)]
    levels: LevelFlags,
}

/// What every way of drawing can be told.
#[derive(clap::Args)]
pub(super) struct LevelFlags {
    /// Which noise levels the steps visit: linspace, uniform, trailing, quadratic, karras, exponential or sigma
    #[arg(long, value_name = "NAME")]
    pub spacing: Option<Spacing>,
    /// How expected images are held within black and white; the run's way (sampling.threshold) if not given
    #[arg(long, value_name = "HOW")]
    threshold: Option<Bounds>,
}

#[derive(Clone, Copy, ValueEnum)]
pub(super) enum NoiseVariance {
    Small,
    Large,
    Learned,
}

impl From<NoiseVariance> for Variance {
    fn from(variance: NoiseVariance) -> Self {
        match variance {
            NoiseVariance::Small => Self::Small,
            NoiseVariance::Large => Self::Large,
            NoiseVariance::Learned => Self::Learned,
        }
    }
}

#[derive(Clone, Copy, ValueEnum)]
pub(super) enum Bounds {
    None,
    Clip,
    Dynamic,
}

impl From<Bounds> for Threshold {
    fn from(bounds: Bounds) -> Self {
        match bounds {
            Bounds::None => Self::None,
            Bounds::Clip => Self::Clip,
            Bounds::Dynamic => Self::Dynamic,
        }
    }
}

/// Every sampler with what it is for.
fn samplers() -> String {
    let line = |s: &Listed| format!("\n  {:16} {}", s.name, s.about);
    let lines: String = SAMPLERS.iter().map(line).collect();
    format!("How images are drawn, by the sampler's name; the run's (sampling.sampler) if not given:{lines}")
}

impl SamplerFlags {
    /// Whether any is given.
    pub fn any(&self) -> bool {
        let (of_sampler, of_noise) = (self.sampler.is_some(), self.eta.is_some() || self.variance.is_some());
        let of_noise = of_noise || self.use_clipped_model_output.is_some();
        of_sampler || of_noise || self.steps.is_some() || self.levels.spacing.is_some()
    }

    /// What is asked of a run with these settings.
    pub fn options(&self, run: &SamplingConfig) -> ddpm::Result<Options> {
        let variance = self.variance.map(Variance::from);
        let sampler = sampler::find(self.sampler.as_deref().unwrap_or(&run.sampler))?;
        let threshold = self.levels.threshold();
        let Self { steps, eta, use_clipped_model_output, .. } = *self;
        let spacing = self.levels.spacing;
        Ok(Options { sampler, steps, spacing, eta, variance, threshold, use_clipped_model_output })
    }

    /// What was asked for.
    pub fn said(&self) -> Vec<FlagValue> {
        let own = given([
            ("sampler", self.sampler.clone()),
            ("steps", self.steps.map(|n| n.to_string())),
            ("eta", self.eta.map(|eta| eta.to_string())),
            ("variance", self.variance.and_then(choice)),
            ("use-clipped-model-output", self.use_clipped_model_output.map(|clipped| clipped.to_string())),
        ]);
        [own, self.levels.said()].concat()
    }
}

impl LevelFlags {
    /// What was asked for.
    pub fn said(&self) -> Vec<FlagValue> {
        let spacing = self.spacing.map(|spacing| spacing.to_string());
        given([("spacing", spacing), ("threshold", self.threshold.and_then(choice))])
    }

    pub fn threshold(&self) -> Option<Threshold> {
        self.threshold.map(Threshold::from)
    }
}

/// How images are sampled, for a record.
pub(super) fn sampling_record(options: &Options) -> serde_json::Map<String, serde_json::Value> {
    let number = |n: Option<f64>| serde_json::json!(n);
    let entries = [
        ("sampler", options.sampler.name.into()),
        ("steps", serde_json::json!(options.steps.or(options.sampler.steps))),
        ("spacing", serde_json::json!(options.spacing.map(|s| s.to_string()))),
        ("eta", number(options.eta)),
        ("variance", serde_json::json!(options.variance.map(Variance::name))),
        ("threshold", serde_json::json!(options.threshold.map(Threshold::name))),
        ("use_clipped_model_output", serde_json::json!(options.use_clipped_model_output)),
    ];
    entries.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()
}

/// How far images go towards their class.
#[derive(clap::Args)]
pub(super) struct GuidanceFlags {
    /// How far images go towards their class: 1 as told, 2 to 5 further and less varied, 0 not told
    #[arg(long = "guidance", value_name = "SCALE", default_value_t = 1.0, allow_negative_numbers = true)]
    scale: f64,
    /// Guide only where the noise is within these sigmas, noise to signal, as 0.3,5
    #[arg(long = "guidance-interval", value_name = "LOW,HIGH", value_parser = interval, allow_hyphen_values = true)]
    interval: Option<(f64, f64)>,
}

impl GuidanceFlags {
    pub fn guidance(&self) -> Guidance {
        Guidance { scale: self.scale, interval: self.interval.unwrap_or(Guidance::default().interval) }
    }

    /// What was asked for.
    pub fn said(&self) -> Vec<FlagValue> {
        let scale = (self.scale != Guidance::default().scale).then(|| self.scale.to_string());
        let interval = self.interval.map(|(low, high)| format!("{low}-{high}"));
        given([("guidance", scale), ("guidance-interval", interval)])
    }
}

/// Two numbers as `0.3,5`.
fn interval(text: &str) -> Result<(f64, f64), String> {
    let both = text.split_once(',').and_then(|(a, b)| Some((a.trim().parse().ok()?, b.trim().parse().ok()?)));
    both.ok_or_else(|| "give two sigmas, the lower first, as 0.3,5".to_owned())
}

/// Seed and batch of many images from one.
#[derive(clap::Args)]
pub(super) struct BatchFlags {
    /// Seed; image i depends on it and on i alone
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
    /// Most images at once
    #[arg(long, value_name = "N", default_value_t = BATCH)]
    pub batch_size: usize,
}

/// The name of a file without its folder and its ending, for the name of a folder.
pub(super) fn stem(path: &Path) -> String {
    path.file_stem().unwrap_or_default().to_string_lossy().into_owned()
}
