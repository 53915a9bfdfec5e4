//! `ddpm bench`.
//!
//! `measure` times steps, `clock` says when they are made, `report` tells what came of it; `random` makes images
//! where none are at hand.

mod clock;
mod measure;
mod random;
mod report;

use clap::ValueEnum;
use clock::{Clock, Pace};
use ddpm::data::Dataset;
use ddpm::schedule::Schedule;
use ddpm::train::config::Config;
use ddpm::train::{Trainer, open_data};
use measure::Peak;
use report::Report;
use std::path::PathBuf;
use std::process::ExitCode;

/// Measure what this machine can do: training, forward passes, sampling, and where the time goes
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  \
    ddpm bench                              the built-in digits' network\n  \
    ddpm bench --preset digits28 --profile  the tutorial's network at 28x28, operation by operation\n  \
    ddpm bench --random-data --set network.name=unet2d --set data.size=32 --set data.channels=3\n  \
    ddpm bench --only train --json          for other programs to read")]
pub struct Args {
    /// A named set of settings
    #[arg(long, value_name = "NAME")]
    preset: Option<String>,
    /// A file of settings
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Threads; 0 takes all cores
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Any setting, as train.batch_size=16 or train.precision=bf16
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Take random images in the place of data.path, of data.size and data.channels (28x28 grey if not given)
    #[arg(long)]
    random_data: bool,
    /// Measure this alone
    #[arg(long, value_name = "WHAT")]
    only: Option<What>,
    /// Steps that are timed, after one that is not
    #[arg(long, value_name = "N", default_value_t = 5)]
    runs: usize,
    /// Tell the time of every kind of operation, and of the slowest nodes, of what is measured first
    #[arg(long)]
    profile: bool,
    /// Write JSON
    #[arg(long)]
    json: bool,
    /// A line for each step until stopped; with "on-line" a step for each line of standard input until that ends, and
    /// then the report: to take turns with another program. Measures training if --only does not say otherwise
    #[arg(long, value_name = "WHEN", num_args = 0..=1, require_equals = true, default_missing_value = "at-once",
          conflicts_with = "runs")]
    r#loop: Option<When>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum What {
    /// Whole training steps
    Train,
    /// The forward pass alone, as sampling runs it
    Forward,
    /// Denoising steps
    Sample,
}

#[derive(Clone, Copy, ValueEnum)]
enum When {
    AtOnce,
    OnLine,
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let mut overrides = crate::commands::pairs(&args.set)?;
    overrides.extend(args.threads.map(|n| ("train.threads".to_owned(), n.to_string())));
    let config = Config::load(args.preset.as_deref(), args.config.as_deref(), &overrides)?;
    let pace = match args.r#loop {
        None => Pace::Runs(args.runs.max(1)),
        Some(When::AtOnce) => Pace::Endless,
        Some(When::OnLine) => Pace::Lines,
    };
    let only = args.only.or(args.r#loop.map(|_| What::Train));
    let wanted = |what: What| only.is_none_or(|only| only == what);
    let clock = |part| Clock::new(part, pace, args.json);
    let threads = match config.train.threads {
        0 => std::thread::available_parallelism()?.get(),
        n => n,
    };

    let data: Box<dyn Dataset> = match args.random_data {
        true => Box::new(random::RandomImages::new(&config)),
        false => open_data(&config)?,
    };
    let (shape, peak) = (data.shape(), Peak::measure(&config, threads)?);
    let mut parts = Vec::new();
    if wanted(What::Train) {
        let mut trainer = Trainer::new(&config, data)?;
        parts.push(measure::train(&mut trainer, clock("train"))?);
    }
    let batch = config.train.batch_size;
    if wanted(What::Forward) {
        parts.push(measure::forward(&mut measure::model(&config, shape, batch)?, clock("forward"))?);
    }
    if wanted(What::Sample) {
        let schedule = Schedule::from_config(&config.diffusion)?;
        let steps = match (config.train.sample_steps, schedule.timesteps_with_signal()) {
            (0, all) => all,
            (some, all) => some.min(all),
        };
        let mut sample = |name, images| {
            let mut model = measure::model(&config, shape, images)?;
            parts.push(measure::sample(name, &mut model, &schedule, steps, clock(name))?);
            anyhow::Ok(())
        };
        sample("sample", batch)?;
        if batch > 1 && args.r#loop.is_none() {
            sample("sample-one", 1)?;
        }
    }
    let report = Report::new(&config, shape, peak, parts);
    let out = &mut std::io::stdout();
    match args.json {
        true => report.write_json(out, args.profile)?,
        false => report.write(out, args.profile)?,
    }
    Ok(ExitCode::SUCCESS)
}
