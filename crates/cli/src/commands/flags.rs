//! Flags shared by the commands that sample from a run.

use super::folder::FlagValue;
use super::pairs;
use anyhow::bail;
use clap::ValueEnum;
use ddpm::checkpoint::{self, Newest, WeightsChoice};
use ddpm::config::SamplingConfig;
use ddpm::config::open_data;
use ddpm::data::Dataset;
use ddpm::guidance::Guidance;
use ddpm::hardware::{DeviceChoice, Hardware};
use ddpm::pipeline::{BATCH, Pipeline};
use ddpm::run_folder::{End, RUNS, RunFolder, RunRecord};
use ddpm::sampler::{self, SAMPLERS, SamplerInfo, SamplerOptions, Spacing, Threshold, Variance};
use ddpm::text::shown;
use std::path::{Path, PathBuf};

/// The run, its weights and where it computes.
#[derive(clap::Args)]
pub(super) struct RunFlags {
    /// Run folder, or its name in runs/
    #[arg(index = 1)]
    run: PathBuf,
    /// Device: auto, cpu, cuda or cuda:N
    #[arg(long, value_name = "DEVICE", default_value_t)]
    device: DeviceChoice,
    /// CPU threads; 0 uses all cores
    #[arg(long, value_name = "N", default_value_t = 0)]
    threads: usize,
    /// Weights: auto (averaged if any), ema (averaged), raw, another average such as ema-0.999 or power-0.05, or a
    /// .safetensors file such as `ddpm average` writes
    #[arg(long, value_name = "WEIGHTS", default_value = "auto")]
    weights: WeightsChoice,
    /// Checkpoint to use, by its step; the newest by default
    #[arg(long, value_name = "STEP")]
    checkpoint: Option<String>,
    /// Folder that holds the runs
    #[arg(long, value_name = "FOLDER", default_value = RUNS)]
    runs: PathBuf,
}

impl RunFlags {
    /// Opens the run, the selected checkpoint and its network.
    pub fn open(&self) -> anyhow::Result<OpenRun> {
        let (run, at) = open_run(&self.runs, &self.run, self.checkpoint.as_deref())?;
        let which = weights_of(&self.run, at.as_deref(), &self.weights)?;
        let hardware = Hardware { device: self.device, ..self.threads.into() };
        let named = at.is_some();
        let (checkpoint, pipeline) = match at {
            Some(path) => {
                let pipeline = Pipeline::open_checkpoint(&path, which.clone(), hardware)?;
                (path, pipeline)
            }
            None => {
                let found = Pipeline::open_newest(&run.checkpoints(), &which, hardware)?;
                let (newest, pipeline) = found.ok_or_else(|| run.without_checkpoint())?;
                warn_skipped(&newest);
                warn_divergence(&run);
                (newest.path, pipeline)
            }
        };
        let weights_sha256 = checkpoint::weights_sha256(&checkpoint, &which)?;
        let step = checkpoint.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let weights = match &which {
            WeightsChoice::Auto => None,
            WeightsChoice::Ema => Some("ema".to_owned()),
            WeightsChoice::Raw => Some("raw".to_owned()),
            WeightsChoice::Average(name) => Some(name.clone()),
            // Files of one name may hold other weights.
            WeightsChoice::File(path) => Some(format!("{}-{}", stem(path), &weights_sha256[..8])),
        };
        Ok(OpenRun { run, checkpoint, pipeline, step, named, weights, weights_sha256 })
    }
}

/// A run opened with its network.
pub(super) struct OpenRun {
    pub run: RunFolder,
    pub pipeline: Pipeline,
    /// The checkpoint's folder.
    pub checkpoint: PathBuf,
    /// The name of the checkpoint's folder, `step-…`.
    pub step: String,
    /// Whether the checkpoint was given explicitly.
    named: bool,
    /// The chosen weights; `None` for `auto`.
    pub weights: Option<String>,
    weights_sha256: String,
}

impl OpenRun {
    /// The weights and checkpoint, if given explicitly.
    pub fn explicit_flags(&self) -> Vec<FlagValue> {
        let index = self.step.strip_prefix("step-").and_then(|n| n.parse::<u64>().ok());
        let step = index.map_or_else(|| self.step.clone(), |n| n.to_string());
        given([("weights", self.weights.clone()), ("checkpoint", self.named.then_some(step))])
    }

    /// What identifies the weights, for `request.json`.
    pub fn record(&self) -> serde_json::Map<String, serde_json::Value> {
        let entries = [("checkpoint", &self.step), ("weights_sha256", &self.weights_sha256)];
        entries.into_iter().map(|(key, value)| (key.to_owned(), value.clone().into())).collect()
    }
}

/// Opens a run given by folder, name or checkpoint folder, and resolves its checkpoint if one is given.
pub(super) fn open_run(
    runs: &Path,
    run: &Path,
    checkpoint: Option<&str>,
) -> anyhow::Result<(RunFolder, Option<PathBuf>)> {
    let (opened, at) = RunFolder::open_at(runs, run)?;
    if let (Some(at), Some(named)) = (&at, checkpoint) {
        bail!("{} is already a checkpoint; omit --checkpoint {named}, or give the run", shown(at));
    }
    let at = at
        .map_or_else(|| checkpoint.map(|name| opened.find_checkpoint(name)).transpose(), |at| Ok(Some(at)))?;
    Ok((opened, at))
}

/// The weights to use: if `run` is a file of the checkpoint `at`, those in the file.
pub(super) fn weights_of(
    run: &Path,
    at: Option<&Path>,
    requested: &WeightsChoice,
) -> anyhow::Result<WeightsChoice> {
    if at.is_none() || !run.is_file() {
        return Ok(requested.clone());
    }
    let name = run.file_name().unwrap_or_default().to_string_lossy();
    let Some(which) = WeightsChoice::of_checkpoint_file(&name) else {
        bail!("{} does not hold model weights; give the checkpoint folder or the run", shown(run));
    };
    if *requested != WeightsChoice::Auto && *requested != which {
        bail!("{} holds other weights than --weights requests; omit one of the two", shown(run));
    }
    Ok(which)
}

/// The flags that have a value.
pub(super) fn given<const N: usize>(flags: [(&'static str, Option<String>); N]) -> Vec<FlagValue> {
    flags.into_iter().filter_map(|(flag, value)| Some((flag, value?))).collect()
}

/// The command-line name of a value.
pub(super) fn choice(value: impl ValueEnum) -> Option<String> {
    value.to_possible_value().map(|value| value.get_name().to_owned())
}

/// Images to compare a run with.
#[derive(clap::Args)]
pub(super) struct DataFlags {
    /// Images, as for `ddpm train --data`; the run's by default
    #[arg(long, value_name = "PATH")]
    data: Option<String>,
    /// Data setting other than the run's, e.g. data.csv=table.csv; repeatable
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
}

impl DataFlags {
    /// A name for the data if it differs from the run's: the path's stem, or "set" for overridden settings.
    pub fn name(&self) -> Option<String> {
        let overridden = || (!self.set.is_empty()).then(|| "set".to_owned());
        self.data.as_deref().map(|path| stem(Path::new(path))).or_else(overridden)
    }

    /// Opens the data set. The run's CSV file describes the run's images only, so it is dropped for others.
    pub fn open(&self, pipeline: &Pipeline) -> anyhow::Result<Box<dyn Dataset>> {
        let overrides = pairs(&self.set)?;
        if let Some((key, _)) = overrides.iter().find(|(key, _)| !key.starts_with("data.")) {
            bail!("--set {key}: only data settings are allowed here, e.g. data.csv=table.csv");
        }
        let mut changes: Vec<(String, String)> = Vec::new();
        if let Some(path) = &self.data {
            changes.push(("data.path".to_owned(), path.clone()));
            let before = pipeline.config().data.csv.as_ref();
            if let Some(before) = before.filter(|_| !overrides.iter().any(|(key, _)| key == "data.csv")) {
                status!(
                    "note: the run's CSV file ({before}) is not used for {path}; set one with --set data.csv=FILE"
                );
                let unset = ["data.csv", "data.csv_id_column", "data.csv_label_column"];
                changes.extend(unset.map(|key| (key.to_owned(), "none".to_owned())));
            }
        }
        changes.extend(overrides);
        Ok(open_data(&pipeline.config().with_overrides(&changes)?)?)
    }
}

/// The run's newest intact checkpoint; warns about damaged ones.
pub(super) fn newest(run: &RunFolder) -> anyhow::Result<PathBuf> {
    let newest = checkpoint::newest(&run.checkpoints())?.ok_or_else(|| run.without_checkpoint())?;
    warn_skipped(&newest);
    Ok(newest.path)
}

/// Warns if the run's training diverged.
fn warn_divergence(run: &RunFolder) {
    let record = RunRecord::read(run.path());
    if record.end == Some(End::Diverged) {
        let why = record.error.map_or(String::new(), |why| format!(" ({why})"));
        status!(
            "warning: training of this run diverged{why}; use an earlier checkpoint with --checkpoint STEP"
        );
    }
}

fn warn_skipped(newest: &Newest) {
    for warning in newest.warnings() {
        status!("warning: {warning}");
    }
}

/// The sampler and its options.
#[derive(clap::Args)]
pub(super) struct SamplerFlags {
    /// Sampler (--help lists them); the run's by default
    #[arg(long, value_name = "NAME", long_help = samplers())]
    sampler: Option<String>,
    /// Denoising steps; the sampler's default if omitted (ddpm: all timesteps)
    #[arg(long, value_name = "N")]
    steps: Option<usize>,
    /// Fraction of fresh noise per step, 0 to 1, for samplers that allow a choice
    #[arg(long, value_name = "FRACTION", allow_negative_numbers = true)]
    eta: Option<f64>,
    /// Variance of ddpm's steps; the run's (sampling.variance) by default, learned if it has one
    #[arg(long, value_name = "VARIANCE")]
    variance: Option<VarianceFlag>,
    /// ddim: recompute the noise from the clipped image (true), or use it as predicted (false, diffusers' default); the
    /// run's (sampling.use_clipped_model_output) by default
    #[arg(long, value_name = "true|false")]
    use_clipped_model_output: Option<bool>,
    #[command(flatten)]
    levels: LevelFlags,
}

/// Options of every sampling method.
#[derive(clap::Args)]
pub(super) struct LevelFlags {
    /// Spacing of the noise levels: linspace, uniform, trailing, quadratic, karras, exponential or sigma
    #[arg(long, value_name = "NAME")]
    pub spacing: Option<Spacing>,
    /// Thresholding of predicted images; the run's (sampling.threshold) by default
    #[arg(long, value_name = "METHOD")]
    threshold: Option<ThresholdFlag>,
}

#[derive(Clone, Copy, ValueEnum)]
pub(super) enum VarianceFlag {
    Small,
    Large,
    Learned,
}

impl From<VarianceFlag> for Variance {
    fn from(variance: VarianceFlag) -> Self {
        match variance {
            VarianceFlag::Small => Self::Small,
            VarianceFlag::Large => Self::Large,
            VarianceFlag::Learned => Self::Learned,
        }
    }
}

#[derive(Clone, Copy, ValueEnum)]
pub(super) enum ThresholdFlag {
    None,
    Clip,
    Dynamic,
}

impl From<ThresholdFlag> for Threshold {
    fn from(bounds: ThresholdFlag) -> Self {
        match bounds {
            ThresholdFlag::None => Self::None,
            ThresholdFlag::Clip => Self::Clip,
            ThresholdFlag::Dynamic => Self::Dynamic,
        }
    }
}

/// Help on `--sampler`: every sampler with its description.
fn samplers() -> String {
    let line = |s: &SamplerInfo| format!("\n  {:16} {}", s.name, s.about);
    let lines: String = SAMPLERS.iter().map(line).collect();
    format!("Sampler; the run's (sampling.sampler) by default:{lines}")
}

impl SamplerFlags {
    /// Whether any flag is given, the threshold aside.
    pub fn any(&self) -> bool {
        self.sampler.is_some()
            || self.steps.is_some()
            || self.eta.is_some()
            || self.variance.is_some()
            || self.use_clipped_model_output.is_some()
            || self.levels.spacing.is_some()
    }

    /// Sampling options for a run with these settings.
    pub fn options(&self, run: &SamplingConfig) -> ddpm::Result<SamplerOptions> {
        let variance = self.variance.map(Variance::from);
        let sampler = sampler::find(self.sampler.as_deref().unwrap_or(&run.sampler))?;
        let threshold = self.levels.threshold();
        let Self { steps, eta, use_clipped_model_output, .. } = *self;
        let spacing = self.levels.spacing;
        Ok(SamplerOptions { sampler, steps, spacing, eta, variance, threshold, use_clipped_model_output })
    }

    /// The flags given explicitly.
    pub fn explicit_flags(&self) -> Vec<FlagValue> {
        let flags = given([
            ("sampler", self.sampler.clone()),
            ("steps", self.steps.map(|n| n.to_string())),
            ("eta", self.eta.map(|eta| eta.to_string())),
            ("variance", self.variance.and_then(choice)),
            ("use-clipped-model-output", self.use_clipped_model_output.map(|clipped| clipped.to_string())),
        ]);
        [flags, self.levels.explicit_flags()].concat()
    }
}

impl LevelFlags {
    /// The flags given explicitly.
    pub fn explicit_flags(&self) -> Vec<FlagValue> {
        let spacing = self.spacing.map(|spacing| spacing.to_string());
        given([("spacing", spacing), ("threshold", self.threshold.and_then(choice))])
    }

    pub fn threshold(&self) -> Option<Threshold> {
        self.threshold.map(Threshold::from)
    }
}

/// The sampling options, for `request.json`.
pub(super) fn sampling_record(options: &SamplerOptions) -> serde_json::Map<String, serde_json::Value> {
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

/// Classifier-free guidance.
#[derive(clap::Args)]
pub(super) struct GuidanceFlags {
    /// Classifier-free guidance: 0 unconditional, 1 conditional, 2 to 5 stronger but less varied
    #[arg(long = "guidance", value_name = "SCALE", default_value_t = 1.0, allow_negative_numbers = true)]
    scale: f64,
    /// Guide only at these sigmas (noise-to-signal ratios), e.g. 0.3,5
    #[arg(long = "guidance-interval", value_name = "LOW,HIGH", value_parser = interval, allow_hyphen_values = true)]
    interval: Option<(f64, f64)>,
}

impl GuidanceFlags {
    pub fn guidance(&self) -> Guidance {
        Guidance { scale: self.scale, interval: self.interval.unwrap_or(Guidance::default().interval) }
    }

    /// The flags given explicitly.
    pub fn explicit_flags(&self) -> Vec<FlagValue> {
        let scale = (self.scale != Guidance::default().scale).then(|| self.scale.to_string());
        let interval = self.interval.map(|(low, high)| format!("{low}-{high}"));
        given([("guidance", scale), ("guidance-interval", interval)])
    }
}

/// Parses `LOW,HIGH`.
fn interval(text: &str) -> Result<(f64, f64), String> {
    let both = text.split_once(',').and_then(|(a, b)| Some((a.trim().parse().ok()?, b.trim().parse().ok()?)));
    both.ok_or_else(|| "give two sigmas, the lower first, e.g. 0.3,5".to_owned())
}

/// Seed and batch size of several results from one image.
#[derive(clap::Args)]
pub(super) struct BatchFlags {
    /// Random seed; image i depends only on the seed and i
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
    /// Maximum images per batch
    #[arg(long, value_name = "N", default_value_t = BATCH)]
    pub batch_size: usize,
}

/// A file name without folder and extension.
pub(super) fn stem(path: &Path) -> String {
    path.file_stem().unwrap_or_default().to_string_lossy().into_owned()
}
