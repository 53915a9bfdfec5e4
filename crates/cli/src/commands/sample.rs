//! `ddpm sample`.

use crate::progress::Progress;
use crate::signals::stop_flag;
use anyhow::{Context, bail};
use clap::ValueEnum;
use ddpm::generate::{BATCH, Classes, Generator, Request};
use ddpm::guidance::Guidance;
use ddpm::hardware::{DeviceChoice, Hardware};
use ddpm::picture::{Picture, grid, save_gif, save_png};
use ddpm::sampler::{self, Listed, Options, SAMPLERS, Spacing, Threshold, Variance};
use ddpm::train::checkpoint::{self, Which};
use ddpm::train::run::{RUNS, RunFolder};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Moments of a denoising strip, noise to picture.
const MOMENTS: usize = 10;
/// Pictures unless another number is asked for, and in a row of the grid.
const COUNT: usize = 64;
const ROW: usize = 8;
/// Most pictures whose denoising is shown.
const STRIPS: usize = 8;
/// Time of a frame of the GIF, and of its last, in milliseconds.
const FRAME_MS: (u16, u16) = (120, 1500);

/// Draw new pictures from a trained run
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  \
    ddpm sample runs/run-001 -n 64 --seed 7      a grid and 64 PNGs in runs/run-001/samples/seed-7\n  \
    ddpm sample runs/run-001 --steps 100         faster, a little worse\n  \
    ddpm sample runs/run-001 --sampler ddim      in 50 steps, the same picture from the same noise\n  \
    ddpm sample runs/run-001 --class 3 --guidance 3   one class, of a run with classes\n  \
    ddpm sample runs/run-001 -n 8 --progress x0  how the pictures come out of the noise")]
pub struct Args {
    /// The run (its folder, or its name under runs/)
    run: PathBuf,
    /// How many pictures; 64 if not given, and 8 of each with --class all
    #[arg(short = 'n', long = "count", value_name = "N")]
    count: Option<usize>,
    /// Seed; picture i depends on it and on i alone
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// How pictures are drawn, by the sampler's name
    #[arg(long, value_name = "NAME", default_value = SAMPLERS[0].name, long_help = samplers())]
    sampler: String,
    /// Denoising steps; the sampler's own number if not given, all of the schedule's with ddpm
    #[arg(long, value_name = "N")]
    steps: Option<usize>,
    /// Which noise levels the steps visit: linspace, uniform, trailing, quadratic, karras, exponential or sigma
    #[arg(long, value_name = "NAME")]
    spacing: Option<Spacing>,
    /// Share of noise that is drawn anew, 0 to 1, of samplers that have a choice
    #[arg(long, value_name = "SHARE", allow_negative_numbers = true)]
    eta: Option<f64>,
    /// ddpm's variance of the noise that is drawn anew; the run's (sampling.variance) if not given
    #[arg(long, value_name = "WHICH")]
    variance: Option<NoiseVariance>,
    /// How expected pictures are held within black and white; the run's way (sampling.threshold) if not given
    #[arg(long, value_name = "HOW")]
    threshold: Option<Bounds>,
    /// The class of all pictures, by name or number, of a run that was trained with classes; all: a row of each; picture i
    /// gets class i if not given
    #[arg(long, value_name = "CLASS")]
    class: Option<String>,
    /// How far pictures go towards their class: 1 as told, 2 to 5 further and less varied, 0 not told
    #[arg(long, value_name = "SCALE", default_value_t = 1.0, allow_negative_numbers = true)]
    guidance: f64,
    /// Guide only where the noise is within these sigmas, noise to signal, as 0.3,5
    #[arg(long, value_name = "LOW,HIGH", value_parser = interval, allow_hyphen_values = true)]
    guidance_interval: Option<(f64, f64)>,
    /// Most pictures at once
    #[arg(long, value_name = "N", default_value_t = BATCH)]
    batch_size: usize,
    /// What computes: auto, cpu, cuda or cuda:1
    #[arg(long, value_name = "DEVICE", default_value_t)]
    device: DeviceChoice,
    /// Threads; 0 takes all cores
    #[arg(long, value_name = "N", default_value_t = 0)]
    threads: usize,
    /// The weights: averaged, as trained, or averaged if there are any
    #[arg(long, value_name = "WHICH", default_value = "auto")]
    weights: Weights,
    /// From this checkpoint (a step) instead of the newest
    #[arg(long, value_name = "STEP")]
    checkpoint: Option<String>,
    /// Also write the denoising strip and a GIF: of the expected pictures (x0) or of the noisy ones (xt)
    #[arg(long, value_name = "WHAT")]
    progress: Option<Show>,
    /// Where the pictures go; RUN/samples/seed-SEED if not given
    #[arg(short, long, value_name = "FOLDER")]
    out: Option<PathBuf>,
    /// The folder that holds the runs
    #[arg(long, value_name = "FOLDER", default_value = RUNS)]
    runs: PathBuf,
}

/// Which of a checkpoint's weights, on the command line.
#[derive(Clone, Copy, ValueEnum)]
pub(super) enum Weights {
    Auto,
    Ema,
    Raw,
}

impl From<Weights> for Which {
    fn from(weights: Weights) -> Self {
        match weights {
            Weights::Auto => Self::Auto,
            Weights::Ema => Self::Ema,
            Weights::Raw => Self::Raw,
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Show {
    X0,
    Xt,
}

#[derive(Clone, Copy, ValueEnum)]
enum NoiseVariance {
    Small,
    Large,
}

#[derive(Clone, Copy, ValueEnum)]
enum Bounds {
    None,
    Clip,
    Dynamic,
}

/// Every sampler with what it is for.
fn samplers() -> String {
    let line = |s: &Listed| format!("\n  {:16} {}", s.name, s.about);
    let lines: String = SAMPLERS.iter().map(line).collect();
    format!("How pictures are drawn, by the sampler's name:{lines}")
}

impl Args {
    fn sampling(&self) -> ddpm::Result<Options> {
        let variance = self.variance.map(|v| match v {
            NoiseVariance::Small => Variance::Small,
            NoiseVariance::Large => Variance::Large,
        });
        let threshold = self.threshold.map(|t| match t {
            Bounds::None => Threshold::None,
            Bounds::Clip => Threshold::Clip,
            Bounds::Dynamic => Threshold::Dynamic,
        });
        let Self { steps, spacing, eta, .. } = *self;
        Ok(Options { sampler: sampler::find(&self.sampler)?, steps, spacing, eta, variance, threshold })
    }
}

/// Number of the run's classes; 1 without any.
fn classes(generator: &Generator) -> usize {
    generator.classes().map_or(1, |n| n as usize)
}

/// Two numbers as `0.3,5`.
fn interval(text: &str) -> Result<(f64, f64), String> {
    let both = text.split_once(',').and_then(|(a, b)| Some((a.trim().parse().ok()?, b.trim().parse().ok()?)));
    both.ok_or_else(|| "give two sigmas, the lower first, as 0.3,5".to_owned())
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    Ok(draw(&args, |_| Ok(()))?.map_or(ExitCode::from(crate::INTERRUPTED), |_| ExitCode::SUCCESS))
}

/// What was drawn.
pub(super) struct Drawing {
    pub generator: Generator,
    pub pictures: Vec<Picture>,
    /// The folder that the pictures are in.
    pub out: PathBuf,
    /// Set by Ctrl-C.
    pub stop: Arc<AtomicBool>,
}

/// Draws the pictures and writes them; `None` where it was stopped. `before` is done before the first is drawn: what is needed
/// behind them should be there.
pub(super) fn draw<T>(
    args: &Args,
    before: impl FnOnce(&Generator) -> anyhow::Result<T>,
) -> anyhow::Result<Option<(Drawing, T)>> {
    if args.count == Some(0) || args.batch_size == 0 {
        bail!("-n and --batch-size must be at least 1");
    }
    let stop = stop_flag()?;
    let sampling = args.sampling()?;
    let run = RunFolder::open(&args.runs, &args.run)?;
    let path = match &args.checkpoint {
        Some(name) => run.find_checkpoint(name)?,
        None => newest(&run)?,
    };
    let hardware = Hardware { device: args.device, threads: args.threads, tf32: false };
    let generator = Generator::open(&path, args.weights.into(), hardware)?;
    let class = match args.class.as_deref() {
        None => Classes::InTurn,
        Some("all") => Classes::Rows(args.count.unwrap_or(ROW * classes(&generator)) / classes(&generator)),
        Some(name) => Classes::One(generator.class(name)?),
    };
    let count = args.count.unwrap_or(if args.class.as_deref() == Some("all") {
        ROW * classes(&generator)
    } else {
        COUNT
    });
    let interval = args.guidance_interval.unwrap_or(Guidance::default().interval);
    let guidance = Guidance { scale: args.guidance, interval };
    let request = Request { count, seed: args.seed, batch: args.batch_size, class, guidance, sampling };
    generator.check(request)?;
    let made = before(&generator)?;
    let out = args.out.clone().unwrap_or_else(|| run.samples().join(format!("seed-{}", args.seed)));
    std::fs::create_dir_all(&out).with_context(|| format!("cannot make the folder {}", out.display()))?;

    let mut progress = Progress::new("drawing", 0);
    let shape = generator.shape();
    let mut moments: Vec<Vec<Picture>> = Vec::new(); // [moment][picture]
    let pictures = generator.draw(request, &mut |first, step| {
        let (batches, batch) = request.batches();
        progress.set(
            (first / batch * step.steps + step.done) as u64,
            (batches * step.steps) as u64,
            String::new,
        );
        if let Some(show) = args.progress
            && first == 0
            && is_moment(step.done, step.steps)
        {
            let numbers = if show == Show::X0 { step.x_0 } else { step.x };
            let shown = numbers.chunks(shape.values()).take(count.min(STRIPS));
            moments.push(shown.map(|p| Picture::from_unit(p, shape)).collect());
        }
        if stop.load(Ordering::Relaxed) { Err(ddpm::Error::Interrupted) } else { Ok(()) }
    });
    progress.finish();
    let pictures = match pictures {
        Err(ddpm::Error::Interrupted) => {
            tell!("stopped; nothing was written");
            return Ok(None);
        }
        other => other?,
    };

    let digits = (count - 1).to_string().len().max(4);
    for (i, picture) in pictures.iter().enumerate() {
        save_png(picture, &out.join(format!("{i:0digits$}.png")))?;
    }
    let sheet = out.join("grid.png");
    let columns = if let Classes::Rows(row) = class { row.max(1) } else { ROW };
    save_png(&grid(&pictures, columns, 2), &sheet)?;
    let mut written = vec![sheet];
    if args.progress.is_some() {
        written.extend(write_progress(&moments, &out)?);
    }
    for path in written {
        writeln!(std::io::stdout(), "{}", path.display())?;
    }
    Ok(Some((Drawing { generator, pictures, out, stop }, made)))
}

/// The run's newest whole checkpoint; damaged ones are told.
pub(super) fn newest(run: &RunFolder) -> anyhow::Result<PathBuf> {
    let newest = checkpoint::newest(&run.checkpoints())?.with_context(|| {
        format!(
            "{} has no checkpoint yet: let it train longer (ddpm train --resume {})",
            run.path().display(),
            run.path().display()
        )
    })?;
    for (path, reason) in &newest.skipped {
        tell!("warning: {} is damaged and was passed over: {reason}", path.display());
    }
    Ok(newest.path)
}

/// Whether step `done` of `steps` is one of the [`MOMENTS`] evenly spaced ones; the last step is.
fn is_moment(done: usize, steps: usize) -> bool {
    let moments = MOMENTS.min(steps);
    done * moments / steps != (done - 1) * moments / steps
}

/// The strip (a row for each picture, noise to picture) and the GIF (a grid at each moment).
fn write_progress(moments: &[Vec<Picture>], out: &Path) -> anyhow::Result<[PathBuf; 2]> {
    let count = moments.first().map_or(0, Vec::len);
    let rows: Vec<Picture> = (0..count).flat_map(|i| moments.iter().map(move |m| m[i].clone())).collect();
    let strip = out.join("progress.png");
    save_png(&grid(&rows, moments.len(), 2), &strip)?;
    let frames: Vec<Picture> = moments.iter().map(|m| grid(m, 8, 2).enlarge(4)).collect();
    let gif = out.join("progress.gif");
    save_gif(&frames, FRAME_MS.0, FRAME_MS.1, &gif)?;
    Ok([strip, gif])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_strip_has_ten_moments_and_ends_with_the_picture() {
        for steps in [1, 3, 10, 37, 1000] {
            let moments: Vec<usize> = (1..=steps).filter(|&d| is_moment(d, steps)).collect();
            assert_eq!(moments.len(), MOMENTS.min(steps));
            assert_eq!(moments.last(), Some(&steps));
        }
    }
}
