//! `ddpm train`.

use crate::commands::pairs;
use crate::listing::{first_lines, write_all};
use crate::progress::{Progress, count, human_bytes, human_time};
use crate::signals::{Hold, hold, say_when_stopped, stop_flag};
use ddpm::data::Summary;
use ddpm::hardware::DeviceChoice;
use ddpm::interop::UNKNOWN_DATA;
use ddpm::text::{escaped, quoted, shown};
use ddpm::train::config::Config;
use ddpm::train::run::{RUNS, RunFolder};
use ddpm::train::{Event, Init, Outcome, Remark, Resume, Session, TrainPlan, Trainer, outline};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

/// About how long the time of a step may be measured.
const TIMING: Duration = Duration::from_secs(3);
/// A first step that takes longer than this is announced.
const LONG_STEP: Duration = Duration::from_secs(5);

/// Train a network on images, or take up an earlier run
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  \
    ddpm train                                     the built-in digits and a small network\n  \
    ddpm train --data photos --size 32             a folder of images, or one folder per class\n  \
    ddpm train --preset mnist --data mnist-folder  the DDPM-Pytorch tutorial's system\n  \
    ddpm train --config default.yaml               the tutorial's own file\n  \
    ddpm train --data photos --dry-run             only tell what it would take\n  \
    ddpm train --resume runs/run-001               go on where a run stopped")]
pub struct Args {
    /// A folder or zip of images (flat, or one folder per class), or a folder of IDX files or CIFAR batches; `digits`
    /// are the built-in ones
    #[arg(long, value_name = "PATH")]
    data: Option<String>,
    /// A named set of settings (`ddpm config --list`); `images` if only --data is given, else `digits`
    #[arg(long, value_name = "NAME", conflicts_with = "resume")]
    preset: Option<String>,
    /// A file of settings: our TOML, or the DDPM-Pytorch tutorial's YAML
    #[arg(long, value_name = "FILE", conflicts_with = "resume")]
    config: Option<PathBuf>,
    /// Bring images to this size: one side, or HEIGHTxWIDTH
    #[arg(long, value_name = "SIZE")]
    size: Option<String>,
    /// Bring images to this many channels: 1 grey, 3 RGB, 2 and 4 with alpha
    #[arg(long, value_name = "N")]
    channels: Option<usize>,
    /// What to do about files that cannot be read: fail or skip
    #[arg(long, value_name = "WHAT")]
    on_bad_file: Option<String>,
    /// Steps in all
    #[arg(long, value_name = "N", conflicts_with = "epochs")]
    steps: Option<u64>,
    /// Passes over the data in all
    #[arg(long, value_name = "N")]
    epochs: Option<u64>,
    /// Images a step
    #[arg(long, value_name = "N")]
    batch_size: Option<usize>,
    /// Learning rate
    #[arg(long, value_name = "RATE")]
    lr: Option<f64>,
    /// Seed of all random numbers
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// What computes: auto, cpu, cuda or cuda:1
    #[arg(long, value_name = "DEVICE")]
    device: Option<DeviceChoice>,
    /// Threads; 0 takes all cores
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Any other setting, as train.keep=3 (see `ddpm config`); may be given more than once
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Name of the run; numbered if not given
    #[arg(long, value_name = "NAME", conflicts_with = "resume")]
    name: Option<String>,
    /// The folder that holds the runs
    #[arg(long, value_name = "FOLDER", default_value = RUNS)]
    runs: PathBuf,
    /// Start from these weights: of a run, or of any file or folder that `ddpm import` reads
    #[arg(long, value_name = "PATH", conflicts_with = "resume", group = "taken")]
    init: Option<PathBuf>,
    /// Take up this run with everything as it was, but for what is edited in its config.toml or given here: other settings are told,
    /// and those that are part of what it has learnt refused
    #[arg(long, value_name = "RUN", group = "taken")]
    resume: Option<PathBuf>,
    /// With --resume: from this checkpoint (a step) instead of the newest
    #[arg(long, value_name = "STEP", requires = "resume")]
    checkpoint: Option<String>,
    /// With --resume or --init: go on even with settings that are part of what the weights have learnt, or with a checkpoint of
    /// another run
    #[arg(long, requires = "taken")]
    force: bool,
    /// Tell what it would take, and stop
    #[arg(long)]
    dry_run: bool,
}

impl Args {
    /// The flags as settings, the strongest last.
    fn overrides(&self) -> anyhow::Result<Vec<(String, String)>> {
        let mut all = pairs(&self.set)?;
        let mut flag = |key: &str, value: Option<String>| all.extend(value.map(|v| (key.to_owned(), v)));
        flag("data.path", self.data.clone());
        flag("data.size", self.size.as_deref().map(|s| size(s).unwrap_or_else(|| s.to_owned())));
        flag("data.channels", self.channels.map(|v| v.to_string()));
        flag("data.on_bad_file", self.on_bad_file.clone());
        flag("train.steps", self.steps.map(|v| v.to_string()));
        flag("train.epochs", self.epochs.map(|v| v.to_string()));
        flag("train.batch_size", self.batch_size.map(|v| v.to_string()));
        flag("train.lr", self.lr.map(|v| format!("{v:e}")));
        flag("train.seed", self.seed.map(|v| v.to_string()));
        flag("train.device", self.device.map(|v| v.to_string()));
        flag("train.threads", self.threads.map(|v| v.to_string()));
        Ok(all)
    }
}

/// `28x32` as the settings have it.
pub(super) fn size(text: &str) -> Option<String> {
    let (h, w) = text.split_once(['x', 'X'])?;
    Some(format!("[{h}, {w}]"))
}

/// The data's place must still be right when the run is taken up elsewhere.
pub(super) fn absolute_paths(config: &mut Config) {
    let data = &mut config.data;
    data.path = absolute(&data.path);
    data.csv = data.csv.as_deref().map(absolute);
}

pub(super) fn absolute(path: &str) -> String {
    // Folders of these names are ./digits and ./unknown.
    if path == "digits" || path == UNKNOWN_DATA {
        return path.to_owned();
    }
    let full = std::path::absolute(path).unwrap_or_else(|_| path.into());
    full.to_string_lossy().into_owned()
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let overrides = args.overrides()?;
    match &args.resume {
        Some(run) => {
            let change = |config: &mut Config| {
                *config = config.with_overrides(&overrides)?;
                absolute_paths(config);
                Ok(())
            };
            let checkpoint = args.checkpoint.as_deref();
            let resume = Resume { checkpoint, change: &change, force: args.force };
            let early = early_of_run(&args, run, &change);
            early.iter().for_each(tell_plan);
            let reading = Progress::waiting("reading the run and its images");
            if args.dry_run {
                let (mut trainer, remarks) = Session::prepare_resume(&args.runs, run, &resume)?;
                reading.finish();
                tell_trainer(&mut trainer, &remarks, early.as_ref())?;
                return Ok(ExitCode::SUCCESS);
            }
            let mut session = Session::resume(&args.runs, run, &resume)?;
            reading.finish();
            let remarks = session.take_remarks();
            let time = tell_trainer(session.trainer(), &remarks, early.as_ref())?;
            train(session, time)
        }
        None => {
            let own = args.data.as_deref().is_some_and(|d| d != "digits") && args.config.is_none();
            let preset = args.preset.as_deref().or(own.then_some("images"));
            let mut loaded = Config::load_with_notes(preset, args.config.as_deref(), &overrides)?;
            for note in &loaded.notes {
                tell!("note: {note}");
            }
            absolute_paths(&mut loaded.config);
            // Before the images are read, which may take long.
            let early = outline(&loaded.config)?;
            early.iter().for_each(tell_plan);
            let init = args.init.as_deref().map(|path| Init { path, force: args.force });
            let reading = Progress::waiting("reading the images");
            let (mut trainer, remarks) = Session::prepare(&loaded.config, init)?;
            reading.finish();
            let time = tell_trainer(&mut trainer, &remarks, early.as_ref())?;
            if args.dry_run {
                if let Some(line) = write_all(&trainer.data().summary().skipped, None) {
                    tell!("left out  {line}");
                }
                return Ok(ExitCode::SUCCESS);
            }
            let name = args.name.as_deref().or(loaded.run_name.as_deref());
            train(Session::create(&args.runs, name, trainer)?, time)
        }
    }
}

/// Trains to the end, or until it is stopped.
fn train(mut session: Session, step: Option<Duration>) -> anyhow::Result<ExitCode> {
    let path = session.run_folder().path().to_owned();
    tell!("run       {}", shown(&path));
    if let Some(line) = write_all(&session.trainer().data().summary().skipped, Some(&path)) {
        tell!("          left out: {line}");
    }
    let folder = quoted(&path);
    say_when_stopped(format!("; go on with:  ddpm train --resume {folder}"));

    let mut steps = Progress::new("training", session.trainer().steps());
    let (done, all) = (session.trainer().steps_done(), session.trainer().steps());
    if let Some(step) = step.filter(|&step| step > LONG_STEP && done < all) {
        steps.line(&format!("training  the first step, about {}", human_time(step)));
    }
    steps.set(done, all, || "the first step".to_owned());
    let mut drawing: Option<Progress> = None;
    let mut sheet = None;
    // What was learnt since the last checkpoint.
    let mut unsaved: Option<Hold> = None;
    let outcome = session.train(&stop_flag(), &mut |event| match event {
        Event::Step { step, steps: all, loss, images_per_second, left } => {
            unsaved.get_or_insert_with(hold);
            steps.set(step, all, || {
                format!("loss {loss:.4}  {images_per_second:.1} images/s  {} left", human_time(left))
            });
        }
        Event::Drawing { done, steps: all } => drawing
            .get_or_insert_with(|| Progress::new("drawing samples", all as u64))
            .set(done as u64, all as u64, String::new),
        Event::Samples { step, path } => {
            if let Some(drawing) = drawing.take() {
                drawing.finish();
            }
            steps.line(&format!("step {step}: samples {}", shown(path)));
            sheet = Some(path.to_owned());
        }
        Event::Checkpoint { step, path } => {
            unsaved = None;
            steps.line(&format!("step {step}: checkpoint {}", shown(path)));
        }
        Event::Stopping { step } => {
            steps.line(&format!("stopping: the checkpoint of step {step} is written"))
        }
        Event::Warning(text) => steps.line(&format!("warning: {text}")),
        Event::Note(text) => steps.line(&format!("note: {text}")),
    })?;
    steps.finish();
    match outcome {
        Outcome::Finished => {
            if let Some(sheet) = sheet {
                tell!("\nlook at  {}", shown(sheet));
            }
            tell!("more of these:  ddpm sample {folder} -n 64 --seed 7");
            Ok(ExitCode::SUCCESS)
        }
        Outcome::Diverged => {
            anyhow::bail!(
                "all steps are made, but the training diverged: {}",
                session.divergence().unwrap_or_default()
            )
        }
        Outcome::Stopped => {
            tell!("\nstopped; go on with:  ddpm train --resume {folder}");
            Ok(ExitCode::from(crate::INTERRUPTED))
        }
    }
}

/// What going on with a run will take, as far as its settings say. Whatever is wrong with them is told when it is taken up.
fn early_of_run(
    args: &Args,
    run: &Path,
    change: &dyn Fn(&mut Config) -> ddpm::Result<()>,
) -> Option<TrainPlan> {
    let mut config = RunFolder::open(&args.runs, run).ok()?.read_config().ok()?;
    change(&mut config).ok()?;
    outline(&config).ok()?
}

/// Tells of what training takes, unless that was told `early`, of the data, and of what a person should know; then of the time of a
/// step, which it gives.
fn tell_trainer(
    trainer: &mut Trainer,
    remarks: &[Remark],
    early: Option<&TrainPlan>,
) -> anyhow::Result<Option<Duration>> {
    let plan = trainer.plan();
    if early.is_none_or(|e| (e.parameters, e.arena_bytes) != (plan.parameters, plan.arena_bytes)) {
        tell_plan(&plan);
    }
    tell_data(trainer.data().summary(), plan.data_bytes);
    for remark in remarks {
        tell!("{remark}");
    }
    let timing = Progress::waiting("timing a step");
    let time = trainer.time_step(TIMING)?;
    timing.finish();
    let (gflop, device) = (plan.flops as f64 / 1e9, &plan.device);
    match time {
        Some(step) => {
            let total = step.saturating_mul(u32::try_from(plan.steps).unwrap_or(u32::MAX));
            let one = match step.as_secs() {
                0..10 => format!("{:.0} ms", step.as_secs_f64() * 1e3),
                _ => human_time(step),
            };
            let (total, steps) = (human_time(total), count(plan.steps, "step"));
            tell!("time      about {total} for {steps} of {one} ({gflop:.1} GFLOP each; {device})");
        }
        None => tell!(
            "time      {} of {gflop:.1} GFLOP; how long one takes is known after the first ({device})",
            count(plan.steps, "step")
        ),
    }
    Ok(time)
}

fn tell_data(data: &Summary, bytes: u64) {
    let classes = match data.classes as u64 {
        0 => String::new(),
        1 => ", 1 class".to_owned(),
        n => format!(", {n} classes"),
    };
    tell!(
        "data      {}: {}, {}, {} bit{classes}, {} in memory",
        escaped(&data.source),
        count(data.images as u64, "image"),
        data.shape,
        data.bit_depth,
        human_bytes(bytes)
    );
    for note in &data.notes {
        tell!("          {}", escaped(note));
    }
    for line in first_lines(&data.skipped) {
        tell!("          left out {line}");
    }
}

/// Tells what is known before a step is made.
fn tell_plan(plan: &TrainPlan) {
    tell!("network   {}", count(plan.parameters as u64, "parameter"));
    tell!(
        "memory    {} (network, optimizer and activations {}, threads {}), and the data's",
        human_bytes(plan.arena_bytes + plan.scratch_bytes),
        human_bytes(plan.arena_bytes),
        human_bytes(plan.scratch_bytes)
    );
    tell!("disk      {} a checkpoint", human_bytes(plan.checkpoint_bytes));
}
