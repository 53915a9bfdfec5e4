//! What the commands that draw with a run share: flags, progress, files.

use super::classes::tell_class;
use super::folder::{PictureFolder, Said};
use super::pairs;
use crate::progress::Progress;
use crate::signals::stop_flag;
use anyhow::{Context, bail};
use clap::ValueEnum;
use ddpm::data::{Dataset, Single, open_picture};
use ddpm::denoiser::Denoiser;
use ddpm::generate::{BATCH, Classes, Generator, Request};
use ddpm::guidance::Guidance;
use ddpm::hardware::{DeviceChoice, Hardware};
use ddpm::picture::{Picture, grid, save_png};
use ddpm::sampler::{self, Listed, Options, SAMPLERS, SampleStep, Seeds, Spacing, Threshold, Variance};
use ddpm::text::{quoted, shown};
use ddpm::train::checkpoint::{self, Newest, Which};
use ddpm::train::open_data;
use ddpm::train::run::{RUNS, RunFolder};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Pictures in a row of a sheet, and pixels between them.
pub(super) const ROW: usize = 8;
pub(super) const PADDING: usize = 2;

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
    /// The run and its network.
    pub fn open(&self) -> anyhow::Result<(RunFolder, Generator)> {
        self.open_checkpoint().map(|(run, _, generator)| (run, generator))
    }

    /// The run, the checkpoint that is meant, and its network.
    pub fn open_checkpoint(&self) -> anyhow::Result<(RunFolder, PathBuf, Generator)> {
        let run = RunFolder::open(&self.runs, &self.run)?;
        let hardware = Hardware { device: self.device, ..self.threads.into() };
        let (path, generator) = match &self.checkpoint {
            Some(name) => {
                let path = run.find_checkpoint(name)?;
                let generator = Generator::open(&path, self.weights.clone(), hardware)?;
                (path, generator)
            }
            None => {
                let found = Generator::open_newest(&run.checkpoints(), &self.weights, hardware)?;
                let (newest, generator) = found.with_context(|| none_yet(&run))?;
                tell_skipped(&newest);
                (newest.path, generator)
            }
        };
        Ok((run, path, generator))
    }

    /// Which weights were asked for.
    pub fn said(&self) -> Vec<Said> {
        let weights = match &self.weights {
            Which::Auto => None,
            Which::Ema => Some("ema".to_owned()),
            Which::Raw => Some("raw".to_owned()),
            Which::Average(name) => Some(name.clone()),
            Which::File(path) => Some(stem(path)),
        };
        given([("weights", weights), ("checkpoint", self.checkpoint.clone())])
    }
}

/// Those of the flags that have a value.
pub(super) fn given<const N: usize>(flags: [(&'static str, Option<String>); N]) -> Vec<Said> {
    flags.into_iter().filter_map(|(flag, value)| Some((flag, value?))).collect()
}

/// The name of a choice on the command line.
fn choice(value: impl ValueEnum) -> Option<String> {
    value.to_possible_value().map(|value| value.get_name().to_owned())
}

/// Pictures that a run is held against.
#[derive(clap::Args)]
pub(super) struct DataFlags {
    /// The pictures, as `ddpm train --data`; the run's own if not given
    #[arg(long, value_name = "PATH")]
    data: Option<String>,
    /// How they are read, as data.csv=table.csv, where it is not as the run's (see `ddpm config`); may be given more than once
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
}

impl DataFlags {
    /// The data set. A CSV file of the run's names the run's pictures, and has nothing to say of others.
    pub fn open(&self, generator: &Generator) -> anyhow::Result<Box<dyn Dataset>> {
        let said = pairs(&self.set)?;
        if let Some((key, _)) = said.iter().find(|(key, _)| !key.starts_with("data.")) {
            bail!("--set {key}: only settings of the pictures can be given here, as data.csv=table.csv");
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

fn tell_skipped(newest: &Newest) {
    for warning in newest.warnings() {
        tell!("warning: {warning}");
    }
}

/// The sampler and what it can be told.
#[derive(clap::Args)]
pub(super) struct SamplerFlags {
    /// How pictures are drawn, by the sampler's name; ddpm if not given
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
    /// How expected pictures are held within black and white; the run's way (sampling.threshold) if not given
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
    format!("How pictures are drawn, by the sampler's name; {} if not given:{lines}", SAMPLERS[0].name)
}

impl SamplerFlags {
    /// Whether any is given.
    pub fn any(&self) -> bool {
        let (of_sampler, of_noise) = (self.sampler.is_some(), self.eta.is_some() || self.variance.is_some());
        let of_noise = of_noise || self.use_clipped_model_output.is_some();
        of_sampler || of_noise || self.steps.is_some() || self.levels.spacing.is_some()
    }

    pub fn options(&self) -> ddpm::Result<Options> {
        let variance = self.variance.map(Variance::from);
        let sampler = self.sampler.as_deref().map_or(Ok(&SAMPLERS[0]), sampler::find)?;
        let threshold = self.levels.threshold();
        let Self { steps, eta, use_clipped_model_output, .. } = *self;
        let spacing = self.levels.spacing;
        Ok(Options { sampler, steps, spacing, eta, variance, threshold, use_clipped_model_output })
    }

    /// What was asked for.
    pub fn said(&self) -> Vec<Said> {
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
    pub fn said(&self) -> Vec<Said> {
        let spacing = self.spacing.map(|spacing| spacing.to_string());
        given([("spacing", spacing), ("threshold", self.threshold.and_then(choice))])
    }

    pub fn threshold(&self) -> Option<Threshold> {
        self.threshold.map(Threshold::from)
    }
}

/// How far pictures go towards their class.
#[derive(clap::Args)]
pub(super) struct GuidanceFlags {
    /// How far pictures go towards their class: 1 as told, 2 to 5 further and less varied, 0 not told
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
    pub fn said(&self) -> Vec<Said> {
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

/// Seed and batch of many pictures from one.
#[derive(clap::Args)]
pub(super) struct ManyFlags {
    /// Seed; picture i depends on it and on i alone
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
    /// Most pictures at once
    #[arg(long, value_name = "N", default_value_t = BATCH)]
    pub batch_size: usize,
}

/// What the commands share that begin with a picture: the class that the network is told, the run, where the result goes.
#[derive(clap::Args)]
pub(super) struct EditFlags {
    /// The class that the network is conditioned on, by name, or by index as #3, of a run that was trained with classes; none if not
    /// given
    #[arg(long, value_name = "CLASS")]
    class: Option<String>,
    #[command(flatten)]
    guidance: GuidanceFlags,
    /// Where the pictures go; if not given, a folder in RUN/samples with the name of all that is said
    #[arg(short, long, value_name = "FOLDER")]
    out: Option<PathBuf>,
    #[command(flatten)]
    run: RunFlags,
}

/// A run that pictures are edited with.
pub(super) struct Editor<'a> {
    flags: &'a EditFlags,
    run: RunFolder,
    pub generator: Generator,
    pub request: Request,
    stop: Arc<AtomicBool>,
}

impl EditFlags {
    /// Opens the run for a request, with the class that is given. What cannot be done is refused.
    pub fn open(&self, request: Request) -> anyhow::Result<Editor<'_>> {
        if request.count == 0 || request.batch == 0 {
            bail!("-n and --batch-size must be at least 1");
        }
        let stop = stop_flag()?;
        let (run, generator) = self.run.open()?;
        let class = match self.class.as_deref() {
            None => Classes::Untold,
            Some(name) => Classes::One(generator.class(name)?),
        };
        let request = Request { class, guidance: self.guidance.guidance(), ..request };
        generator.check(request)?;
        if self.class.is_some() {
            tell_class(&generator, class);
        }
        let request = Request { sampling: generator.sampling(request), ..request };
        Ok(Editor { flags: self, run, generator, request, stop })
    }
}

/// What is told of each step.
type OnStep<'a> = &'a mut dyn FnMut(SampleStep<'_>) -> ddpm::Result<()>;
/// What makes the numbers of a batch, and tells its steps.
type Edit<'a> = dyn FnMut(&mut dyn Denoiser, Seeds, OnStep<'_>) -> ddpm::Result<Vec<f32>> + 'a;

impl Editor<'_> {
    /// A picture file in the form of the run's; what was done to it is told.
    pub fn picture(&self, path: &Path) -> anyhow::Result<Single> {
        let picture = open_picture(path, &self.generator.config().data_options())?;
        if let Some(changes) = picture.changes() {
            tell!("{}: {changes}, as the run's pictures", shown(path));
        }
        Ok(picture)
    }

    /// Draws the request's pictures in batches; `None` where Ctrl-C stopped it.
    pub fn draw(
        &self,
        request: Request,
        what: &'static str,
        edit: &mut Edit<'_>,
    ) -> anyhow::Result<Option<Vec<f32>>> {
        let mut progress = Progress::new(what, 0);
        let drawn = self.generator.in_batches(request, &mut |denoiser, seeds| {
            edit(denoiser, seeds, &mut |step| {
                tell_step(&mut progress, &request, seeds.first as usize, &step);
                if self.stop.load(Ordering::Relaxed) { Err(ddpm::Error::Interrupted) } else { Ok(()) }
            })
        });
        progress.finish();
        match drawn {
            Err(ddpm::Error::Interrupted) => {
                tell!("stopped; nothing was written");
                Ok(None)
            }
            other => Ok(Some(other?)),
        }
    }

    /// Writes the pictures and the sheet, and says where: unless it is said where, to a folder with the name of `what` was done
    /// and what was `said` beside the flags that are known here.
    pub fn write(
        &self,
        what: &str,
        said: Vec<Said>,
        pictures: &[Picture],
        sheet: &[Picture],
        row: usize,
    ) -> anyhow::Result<()> {
        let class = given([("class", self.flags.class.clone())]);
        let said = [said, class, self.flags.guidance.said(), self.flags.run.said()].concat();
        let out = PictureFolder::make(self.flags.out.as_deref(), &self.run, what, &said)?;
        out.write(pictures)?;
        let path = out.path().join("sheet.png");
        save_png(&grid(sheet, row, PADDING), &path)?;
        writeln!(std::io::stdout(), "{}", shown(path))?;
        Ok(())
    }
}

/// The name of a file without its folder and its ending, for the name of a folder.
pub(super) fn stem(path: &Path) -> String {
    path.file_stem().unwrap_or_default().to_string_lossy().into_owned()
}

/// Shows a step of the batch whose first picture is `first`.
pub(super) fn tell_step(progress: &mut Progress, request: &Request, first: usize, step: &SampleStep<'_>) {
    let (batches, batch) = request.batches();
    let (done, all) = (first / batch * step.steps + step.done, batches * step.steps);
    progress.set(done as u64, all as u64, String::new);
}
