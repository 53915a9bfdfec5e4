//! `ddpm train`.

use crate::commands::pairs;
use crate::listing::{first_lines, write_all};
use crate::progress::{Progress, human_bytes, human_time};
use crate::signals::{Hold, hold, set_stop_hint, stop_flag};
use ddpm::config::Config;
use ddpm::data::Summary;
use ddpm::hardware::DeviceChoice;
use ddpm::run_folder::{RUNS, RunFolder};
use ddpm::text::{counted, escaped, quoted, shown};
use ddpm::train::{Event, Init, Outcome, Remark, Resume, Run, TrainPlan, Trainer, outline};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

/// Approximate time budget for timing a step.
const TIMING: Duration = Duration::from_secs(3);
/// A first step expected to take longer is announced.
const LONG_STEP: Duration = Duration::from_secs(5);

/// Train a network on images, or resume a run
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  \
    ddpm train                                     a small network on the built-in digits\n  \
    ddpm train --data photos --size 32             a folder of images, or one subfolder per class\n  \
    ddpm train --preset mnist --data mnist-folder  the network of the DDPM-Pytorch tutorial\n  \
    ddpm train --config default.yaml               the tutorial's own settings file\n  \
    ddpm train --data photos --dry-run             only print time, memory and disk needed\n  \
    ddpm train --resume runs/run-001               continue a run")]
pub struct Args {
    /// Image folder or zip (flat, or one subfolder per class), folder of IDX files or CIFAR batches, or the built-in
    /// `digits`
    #[arg(long, value_name = "PATH")]
    data: Option<String>,
    /// Preset (`ddpm config --list`); `images` with --data, else `digits`
    #[arg(long, value_name = "NAME", conflicts_with = "resume")]
    preset: Option<String>,
    /// Settings file: TOML, or the YAML of the DDPM-Pytorch tutorial
    #[arg(long, value_name = "FILE", conflicts_with = "resume")]
    config: Option<PathBuf>,
    /// Resize images to this size: one side, or HEIGHTxWIDTH
    #[arg(long, value_name = "SIZE")]
    size: Option<String>,
    /// Convert images to this many channels: 1 grey, 3 RGB, 2 or 4 with alpha
    #[arg(long, value_name = "N")]
    channels: Option<usize>,
    /// What to do with unreadable files: fail or skip
    #[arg(long, value_name = "ACTION")]
    on_bad_file: Option<String>,
    /// Total number of training steps
    #[arg(long, value_name = "N", conflicts_with = "epochs")]
    steps: Option<u64>,
    /// Total number of passes over the data
    #[arg(long, value_name = "N")]
    epochs: Option<u64>,
    /// Images per batch
    #[arg(long, value_name = "N")]
    batch_size: Option<usize>,
    /// Learning rate
    #[arg(long, value_name = "RATE")]
    lr: Option<f64>,
    /// Random seed
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Device: auto, cpu, cuda or cuda:N
    #[arg(long, value_name = "DEVICE")]
    device: Option<DeviceChoice>,
    /// CPU threads; 0 uses all cores
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Any other setting (`ddpm config`), e.g. output.keep_checkpoints=3; repeatable
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Name of the run; run-001, run-002, ... by default
    #[arg(long, value_name = "NAME", conflicts_with = "resume")]
    name: Option<String>,
    /// Folder that holds the runs
    #[arg(long, value_name = "FOLDER", default_value = RUNS)]
    runs: PathBuf,
    /// Start from weights of a run, or any checkpoint `ddpm import` reads
    #[arg(long, value_name = "PATH", conflicts_with = "resume", group = "start_weights")]
    init: Option<PathBuf>,
    /// Resume this run. Settings given here or edited in its config.toml may differ, except those that its weights depend
    /// on
    #[arg(long, value_name = "RUN", group = "start_weights")]
    resume: Option<PathBuf>,
    /// With --resume: checkpoint to use, by its step; the newest by default
    #[arg(long, value_name = "STEP", requires = "resume")]
    checkpoint: Option<String>,
    /// With --resume or --init: accept settings that the weights were not trained with, and another run's checkpoint
    #[arg(long, requires = "start_weights")]
    force: bool,
    /// Print what training would take, and exit
    #[arg(long)]
    dry_run: bool,
}

impl Args {
    /// The flags as settings; later ones override earlier ones.
    fn overrides(&self) -> anyhow::Result<Vec<(String, String)>> {
        let mut all = pairs(&self.set)?;
        let mut flag = |key: &str, value: Option<String>| all.extend(value.map(|v| (key.to_owned(), v)));
        flag("data.path", self.data.clone());
        flag("data.size", self.size.clone());
        flag("data.channels", self.channels.map(|v| v.to_string()));
        flag("data.on_bad_file", self.on_bad_file.clone());
        flag("train.steps", self.steps.map(|v| v.to_string()));
        flag("train.epochs", self.epochs.map(|v| v.to_string()));
        flag("train.batch_size", self.batch_size.map(|v| v.to_string()));
        flag("optimizer.lr", self.lr.map(|v| format!("{v:e}")));
        flag("train.seed", self.seed.map(|v| v.to_string()));
        flag("compute.device", self.device.map(|v| v.to_string()));
        flag("compute.threads", self.threads.map(|v| v.to_string()));
        Ok(all)
    }
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let overrides = args.overrides()?;
    match &args.resume {
        Some(run) => {
            let change = |config: &mut Config| {
                *config = config.with_overrides(&overrides)?;
                config.make_paths_absolute();
                Ok(())
            };
            let checkpoint = args.checkpoint.as_deref();
            let resume = Resume { checkpoint, change: &change, force: args.force };
            let early = outline_resumed(&args, run, &change);
            early.iter().for_each(print_plan);
            let reading = Progress::waiting("reading the run and its images");
            if args.dry_run {
                let (mut trainer, remarks) = Run::prepare_resume(&args.runs, run, &resume)?;
                reading.finish();
                print_trainer(&mut trainer, &remarks, early.as_ref())?;
                return Ok(ExitCode::SUCCESS);
            }
            let mut session = Run::resume(&args.runs, run, &resume)?;
            reading.finish();
            let remarks = session.take_remarks();
            let time = print_trainer(session.trainer(), &remarks, early.as_ref())?;
            train(session, time)
        }
        None => {
            let mut settings = Config::builder().set_all(overrides);
            if let Some(preset) = &args.preset {
                settings = settings.preset(preset);
            }
            if let Some(file) = &args.config {
                settings = settings.file(file);
            }
            let mut loaded = settings.build_with_notes()?;
            for note in &loaded.notes {
                status!("note: {note}");
            }
            loaded.config.make_paths_absolute();
            // Before reading the images, which may take long.
            let early = outline(&loaded.config)?;
            early.iter().for_each(print_plan);
            let init = args.init.as_deref().map(|path| Init { path, force: args.force });
            let reading = Progress::waiting("reading the images");
            let (mut trainer, remarks) = Run::prepare(&loaded.config, init)?;
            reading.finish();
            let time = print_trainer(&mut trainer, &remarks, early.as_ref())?;
            if args.dry_run {
                if let Some(line) = write_all(&trainer.data().summary().skipped, None) {
                    status!("skipped   {line}");
                }
                return Ok(ExitCode::SUCCESS);
            }
            let name = args.name.as_deref().or(loaded.run_name.as_deref());
            train(Run::start(&args.runs, name, trainer)?, time)
        }
    }
}

/// Trains until the last step or an interruption.
fn train(mut session: Run, step: Option<Duration>) -> anyhow::Result<ExitCode> {
    let path = session.run_folder().path().to_owned();
    status!("run       {}", shown(&path));
    if let Some(line) = write_all(&session.trainer().data().summary().skipped, Some(&path)) {
        status!("          skipped: {line}");
    }
    let folder = quoted(&path);
    set_stop_hint(format!("; resume with:  ddpm train --resume {folder}"));

    let mut steps = Progress::new("training", session.trainer().steps());
    let (done, all) = (session.trainer().steps_done(), session.trainer().steps());
    if let Some(step) = step.filter(|&step| step > LONG_STEP && done < all) {
        steps.line(&format!("training  the first step takes about {}", human_time(step)));
    }
    steps.set(done, all, || "first step".to_owned());
    let mut sampling: Option<Progress> = None;
    let mut sheet = None;
    // Progress since the last checkpoint.
    let mut unsaved: Option<Hold> = None;
    let outcome = session.train_with(&stop_flag(), &mut |event| match event {
        Event::Step { step, steps: all, loss, images_per_second, left } => {
            unsaved.get_or_insert_with(hold);
            steps.set(step, all, || {
                format!("loss {loss:.4}  {images_per_second:.1} images/s  {} left", human_time(left))
            });
        }
        Event::Sampling { done, steps: all } => sampling
            .get_or_insert_with(|| Progress::new("sampling", all as u64))
            .set(done as u64, all as u64, String::new),
        Event::Samples { step, path } => {
            if let Some(sampling) = sampling.take() {
                sampling.finish();
            }
            steps.line(&format!("step {step}: samples {}", shown(path)));
            sheet = Some(path.to_owned());
        }
        Event::Checkpoint { step, path } => {
            unsaved = None;
            steps.line(&format!("step {step}: checkpoint {}", shown(path)));
        }
        Event::Stopping { step } => steps.line(&format!("stopping: writing the checkpoint of step {step}")),
        Event::Warning(text) => steps.line(&format!("warning: {text}")),
        Event::Note(text) => steps.line(&format!("note: {text}")),
    })?;
    steps.finish();
    match outcome {
        Outcome::Finished => {
            if let Some(sheet) = sheet {
                status!("\nsamples:  {}", shown(sheet));
            }
            status!("sample more:  ddpm sample {folder} -n 64 --seed 7");
            Ok(ExitCode::SUCCESS)
        }
        Outcome::Diverged => {
            anyhow::bail!(
                "all steps are completed, but training diverged: {}",
                session.divergence().unwrap_or_default()
            )
        }
        Outcome::Stopped => {
            status!("\nstopped; resume with:  ddpm train --resume {folder}");
            Ok(ExitCode::from(crate::INTERRUPTED))
        }
    }
}

/// What resuming a run will take, from its settings alone. `None` if they are invalid: resuming reports why.
fn outline_resumed(
    args: &Args,
    run: &Path,
    change: &dyn Fn(&mut Config) -> ddpm::Result<()>,
) -> Option<TrainPlan> {
    let mut config = RunFolder::open(&args.runs, run).ok()?.read_config().ok()?;
    change(&mut config).ok()?;
    outline(&config).ok()?
}

/// Prints what training takes, unless `early` was already printed, the data and the remarks; then measures, prints and returns the
/// time of a step.
fn print_trainer(
    trainer: &mut Trainer,
    remarks: &[Remark],
    early: Option<&TrainPlan>,
) -> anyhow::Result<Option<Duration>> {
    let plan = trainer.plan();
    if early.is_none_or(|e| (e.parameters, e.arena_bytes) != (plan.parameters, plan.arena_bytes)) {
        print_plan(&plan);
    }
    print_data(&trainer.data().summary(), plan.data_bytes);
    for remark in remarks {
        status!("{remark}");
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
            let (total, steps) = (human_time(total), counted(plan.steps, "step"));
            status!("time      about {total} for {steps} of {one} ({gflop:.1} GFLOP each; {device})");
        }
        None => status!(
            "time      {} of {gflop:.1} GFLOP; the first step will show how long one takes ({device})",
            counted(plan.steps, "step")
        ),
    }
    Ok(time)
}

fn print_data(data: &Summary, bytes: u64) {
    let classes = match data.classes as u64 {
        0 => String::new(),
        1 => ", 1 class".to_owned(),
        n => format!(", {n} classes"),
    };
    status!(
        "data      {}: {}, {}, {} bit{classes}, {} in memory",
        escaped(&data.source),
        counted(data.images, "image"),
        data.shape,
        data.bit_depth,
        human_bytes(bytes)
    );
    for note in &data.notes {
        status!("          {}", escaped(note));
    }
    for line in first_lines(&data.skipped) {
        status!("          skipped {line}");
    }
}

/// Prints what is known before the first step.
fn print_plan(plan: &TrainPlan) {
    status!("network   {}", counted(plan.parameters, "parameter"));
    status!(
        "memory    {} (network, optimizer and activations {}, threads {}), plus the data",
        human_bytes(plan.arena_bytes + plan.scratch_bytes),
        human_bytes(plan.arena_bytes),
        human_bytes(plan.scratch_bytes)
    );
    status!("disk      {} per checkpoint", human_bytes(plan.checkpoint_bytes));
}
