//! `ddpm average`.

use ddpm::output::{self, FileKind};
use ddpm::run_folder::{RUNS, RunFolder};
use ddpm::text::{quoted, shown};
use ddpm::train::posthoc;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Relative error of the averaging profile above which a note is printed.
const FAR: f64 = 0.05;

/// Compute a weight average of any length after training (post-hoc EMA)
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  \
    ddpm train --set ema.power_widths=0.05,0.1      keep snapshots in RUN/snapshots\n  \
    ddpm average runs/run-001 --sigma-rel 0.08      write weights to RUN/averages\n  \
    ddpm sample runs/run-001 --weights runs/run-001/averages/sigma-rel-0.08-step-0001200.safetensors")]
pub struct Args {
    /// Run folder, or its name in runs/; trained with ema.power_widths
    run: PathBuf,
    /// Width of the average relative to the training length, typically 0.05 to 0.15
    #[arg(long, value_name = "WIDTH", allow_negative_numbers = true)]
    sigma_rel: f64,
    /// Last step of the average, which must have a snapshot; the newest by default
    #[arg(long, value_name = "STEP")]
    step: Option<u64>,
    /// Output file; in RUN/averages by default
    #[arg(short, long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Overwrite an existing file not written by this command
    #[arg(long)]
    overwrite: bool,
    /// Folder that holds the runs
    #[arg(long, value_name = "FOLDER", default_value = RUNS)]
    runs: PathBuf,
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let (run, checkpoint) = RunFolder::open_at(&args.runs, &args.run)?;
    // The step, if a checkpoint was given as the run.
    let named = checkpoint.as_deref().and_then(Path::file_name).and_then(|name| name.to_str());
    let step = args.step.or(named.and_then(|name| name.strip_prefix("step-")?.parse().ok()));
    if let Some(out) = &args.out {
        output::check(out, FileKind::Weights, args.overwrite)?;
    }
    let made = posthoc::average(&run, &run.read_config()?, args.sigma_rel, step)?;
    let name = format!("sigma-rel-{}-step-{:07}.safetensors", args.sigma_rel, made.step);
    let out = args.out.unwrap_or_else(|| run.path().join("averages").join(name));
    output::check(&out, FileKind::Weights, args.overwrite)?;
    posthoc::write(&run, &made.weights, &out)?;
    status!(
        "average   of {} snapshots up to step {}, profile within {:.2} % of the requested one",
        made.snapshots,
        made.step,
        100.0 * made.error
    );
    if made.error > FAR {
        status!(
            "note: the error is large; choose a width between those kept (ema.power_widths), or keep more snapshots (ema.snapshot_every)"
        );
    }
    status!("sample with:  ddpm sample {} --weights {}", quoted(run.path()), quoted(&out));
    writeln!(std::io::stdout(), "{}", shown(&out))?;
    Ok(ExitCode::SUCCESS)
}
