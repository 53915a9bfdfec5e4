//! `ddpm bench`.
//!
//! `measure` times steps, `clock` paces them, `report` prints the results, `random` supplies images where there are none.

mod clock;
mod measure;
mod random;
mod report;

use clap::ValueEnum;
use clock::{Clock, Pace};
use ddpm::config::Config;
use ddpm::config::open_data;
use ddpm::data::Dataset;
use ddpm::train::Trainer;
use measure::Peak;
use report::Report;
use std::path::PathBuf;
use std::process::ExitCode;

/// Benchmark training, forward passes and sampling on this machine
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  \
    ddpm bench                              the network for the built-in digits\n  \
    ddpm bench --preset digits28 --profile  the tutorial's network at 28x28, with times per operation\n  \
    ddpm bench --random-data --set network.name=unet2d --set data.size=32 --set data.channels=3\n  \
    ddpm bench --only train --json          JSON for scripts")]
pub struct Args {
    /// Preset (`ddpm config --list`)
    #[arg(long, value_name = "NAME")]
    preset: Option<String>,
    /// Settings file: TOML, or the YAML of the DDPM-Pytorch tutorial
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// CPU threads; 0 uses all cores
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Any setting (`ddpm config`), e.g. compute.precision=bf16; repeatable
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Use random images instead of data.path, of data.size and data.channels (default 28x28 grey)
    #[arg(long)]
    random_data: bool,
    /// Measure only this
    #[arg(long, value_name = "WHAT")]
    only: Option<What>,
    /// Timed steps, after a warm-up step
    #[arg(long, value_name = "N", default_value_t = 5)]
    runs: usize,
    /// Also report time per operation and the slowest nodes of the first measurement
    #[arg(long)]
    profile: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Print a line per step until stopped; `on-line` runs one step per line of standard input and reports at its end, to
    /// alternate with another program. Measures training unless --only is given
    #[arg(long, value_name = "WHEN", num_args = 0..=1, require_equals = true, default_missing_value = "at-once",
          conflicts_with = "runs")]
    r#loop: Option<When>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum What {
    /// Complete training steps
    Train,
    /// Forward passes as in sampling
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
    overrides.extend(args.threads.map(|n| ("compute.threads".to_owned(), n.to_string())));
    let config = Config::load(args.preset.as_deref(), args.config.as_deref(), &overrides)?;
    let pace = match args.r#loop {
        None => Pace::Runs(args.runs.max(1)),
        Some(When::AtOnce) => Pace::Endless,
        Some(When::OnLine) => Pace::Lines,
    };
    let only = args.only.or(args.r#loop.map(|_| What::Train));
    let wanted = |what: What| only.is_none_or(|only| only == what);
    let clock = |part| Clock::new(part, pace, args.json);
    let threads = match config.compute.threads {
        0 => std::thread::available_parallelism()?.get(),
        n => n,
    };

    let data: Box<dyn Dataset> =
        if args.random_data { Box::new(random::RandomImages::new(&config)) } else { open_data(&config)? };
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
        let schedule = config.schedule()?;
        let steps = match (config.output.sample_steps, schedule.timesteps_with_signal()) {
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
    if args.json {
        report.write_json(out, args.profile)?
    } else {
        report.write(out, args.profile)?
    }
    Ok(ExitCode::SUCCESS)
}
