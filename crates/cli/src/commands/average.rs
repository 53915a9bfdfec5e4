//! `ddpm average`.

use ddpm::output::{self, Kind};
use ddpm::text::{quoted, shown};
use ddpm::train::posthoc;
use ddpm::train::run::{RUNS, RunFolder};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Part of the profile that may be missed before it is said.
const FAR: f64 = 0.05;

/// Average a run's weights over another length than was kept, after training
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  \
    ddpm train --set train.power_ema=0.05,0.1       keep what is needed: snapshots in RUN/snapshots\n  \
    ddpm average runs/run-001 --sigma-rel 0.08      a file of weights in RUN/averages\n  \
    ddpm sample runs/run-001 --weights runs/run-001/averages/sigma-rel-0.08-step-0001200.safetensors")]
pub struct Args {
    /// The run (its folder, or its name under runs/), trained with train.power_ema
    run: PathBuf,
    /// Width of the average, as a part of the training: 0.05 to 0.15 are usual
    #[arg(long, value_name = "WIDTH", allow_negative_numbers = true)]
    sigma_rel: f64,
    /// The step that it ends with, which has a snapshot; the last if not given
    #[arg(long, value_name = "STEP")]
    step: Option<u64>,
    /// The new file; in RUN/averages if not given
    #[arg(short, long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Replace a file that this command did not make
    #[arg(long)]
    overwrite: bool,
    /// The folder that holds the runs
    #[arg(long, value_name = "FOLDER", default_value = RUNS)]
    runs: PathBuf,
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let (run, checkpoint) = RunFolder::open_at(&args.runs, &args.run)?;
    // The step of a checkpoint that was given for the run.
    let named = checkpoint.as_deref().and_then(Path::file_name).and_then(|name| name.to_str());
    let step = args.step.or(named.and_then(|name| name.strip_prefix("step-")?.parse().ok()));
    if let Some(out) = &args.out {
        output::check(out, Kind::Weights, args.overwrite)?;
    }
    let made = posthoc::average(&run, &run.read_config()?, args.sigma_rel, step)?;
    let name = format!("sigma-rel-{}-step-{:07}.safetensors", args.sigma_rel, made.step);
    let out = args.out.unwrap_or_else(|| run.path().join("averages").join(name));
    output::check(&out, Kind::Weights, args.overwrite)?;
    posthoc::write(&run, &made.weights, &out)?;
    tell!(
        "average   of {} snapshots up to step {}, its profile within {:.2} % of the wanted one",
        made.snapshots,
        made.step,
        100.0 * made.error
    );
    if made.error > FAR {
        tell!(
            "note: that is much; widths between those kept (train.power_ema) and more snapshots (train.snapshot_every) come nearer"
        );
    }
    tell!("draw with  ddpm sample {} --weights {}", quoted(run.path()), quoted(&out));
    writeln!(std::io::stdout(), "{}", shown(&out))?;
    Ok(ExitCode::SUCCESS)
}
