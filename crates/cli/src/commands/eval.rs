//! `ddpm eval`.

use super::flags::{Bounds, DataFlags, NoiseVariance, RunFlags};
use super::folder::make_folder;
use crate::progress::{Progress, thousands};
use crate::signals::stop_flag;
use anyhow::{Context, bail};
use ddpm::bound::{self, Bound, Estimate, Options};
use ddpm::generate::BATCH;
use ddpm::picture::save_png;
use ddpm::train::write_file;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::Ordering;

/// Terms that are measured of each picture unless another number is asked for.
const TERMS: usize = 64;

/// Measure how well a run has learnt its pictures
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  \
    ddpm eval runs/run-001 --nll                        bits a number of a picture takes, at most: a table and a plot\n  \
    ddpm eval runs/run-001 --nll --checkpoint 1000      of an earlier checkpoint, to compare\n  \
    ddpm eval runs/run-001 --nll --terms all -n 1000    more exactly, taking longer\n  \
    ddpm eval runs/run-001 --nll --data held-out        of pictures that it has not seen\n  \
    ddpm eval runs/run-001 --nll --data held-out --set data.csv=held-out.csv   of those that a table names")]
pub struct Args {
    /// Measure the variational bound of the negative log-likelihood, in bits per dimension
    #[arg(long)]
    nll: bool,
    #[command(flatten)]
    data: DataFlags,
    /// How many of them, evenly spread
    #[arg(short = 'n', long = "count", value_name = "N", default_value_t = 256)]
    count: usize,
    /// How many of the bound's terms are measured of each picture, drawn at random, more of them at low noise: an estimate
    /// without bias, with its standard error; all: each term; 64 if not given, or all where there are hardly more
    #[arg(long, value_name = "N")]
    terms: Option<String>,
    /// Seed of the noise and of the choice of terms
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// The variance of the steps; the run's (sampling.variance) if not given, learned where it is
    #[arg(long, value_name = "WHICH")]
    variance: Option<NoiseVariance>,
    /// How expected pictures are held within black and white; the run's way (sampling.threshold) if not given
    #[arg(long, value_name = "HOW")]
    threshold: Option<Bounds>,
    /// Most pictures at once
    #[arg(long, value_name = "N", default_value_t = BATCH)]
    batch_size: usize,
    /// Where table and plot go; RUN/eval/CHECKPOINT if not given
    #[arg(short, long, value_name = "FOLDER")]
    out: Option<PathBuf>,
    #[command(flatten)]
    run: RunFlags,
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    if !args.nll {
        bail!("nothing to measure; give --nll, the variational bound in bits per dimension");
    }
    if args.count == 0 || args.batch_size == 0 {
        bail!("-n and --batch-size must be at least 1");
    }
    let terms = match args.terms.as_deref() {
        None | Some("all") => None,
        Some(n) => Some(n.parse().with_context(|| format!("--terms {n}: give a number, or all"))?),
    };
    let stop = stop_flag()?;
    let (run, path, generator) = args.run.open_checkpoint()?;
    let sampling = &generator.config().sampling;
    let few = args.terms.is_some() || generator.config().diffusion.timesteps <= 2 * TERMS;
    let options = Options {
        variance: args.variance.map(Into::into).or(sampling.variance),
        threshold: args.threshold.map_or(sampling.threshold, Into::into),
        terms: if few { terms } else { Some(TERMS) },
        seed: args.seed,
    };
    let data = args.data.open(&generator)?;

    let mut progress = Progress::new("measuring", 0);
    let mut on_asked = |done: usize, all: usize| {
        progress.set(done as u64, all as u64, String::new);
        if stop.load(Ordering::Relaxed) { Err(ddpm::Error::Interrupted) } else { Ok(()) }
    };
    let measured = bound::of_run(&generator, &*data, args.count, args.batch_size, options, &mut on_asked);
    progress.finish();
    let bound = match measured {
        Err(ddpm::Error::Interrupted) => {
            tell!("stopped; nothing was written");
            return Ok(ExitCode::from(crate::INTERRUPTED));
        }
        other => other?,
    };

    let checkpoint = path.file_name().unwrap_or_default();
    let out = args.out.unwrap_or_else(|| run.path().join("eval").join(checkpoint));
    make_folder(&out)?;
    let file = |name: &str, text: String| -> anyhow::Result<PathBuf> {
        let path = out.join(name);
        write_file(&path, text.as_bytes(), "write what was measured")?;
        Ok(path)
    };
    let about = serde_json::json!({
        "checkpoint": path.display().to_string(),
        "data": data.summary().source,
        "seed": args.seed,
        "variance": options.variance.map(ddpm::sampler::Variance::name),
        "threshold": options.threshold.name(),
        "bound": bound,
    });
    let written =
        [file("nll.csv", table(&bound))?, file("nll.json", format!("{about:#}\n"))?, out.join("nll.png")];
    let parts: Vec<_> =
        bound.terms.iter().map(|t| (t.first as f64 + 1.0, t.last as f64 + 1.0, t.bits.mean)).collect();
    let title = format!(
        "Variational bound of {}, {}: {:.3} bits/dim",
        run.name(),
        checkpoint.display(),
        bound.total.mean
    );
    save_png(&ddpm::plot::bound(&title, &parts)?, &written[2])?;

    let mut stdout = std::io::stdout();
    for line in summary(&bound) {
        writeln!(stdout, "{line}")?;
    }
    for path in written {
        writeln!(stdout, "{}", ddpm::text::shown(&path))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Every measured term: timesteps from 1 to T, as the paper counts; `L_T` stands behind them.
fn table(bound: &Bound) -> String {
    let error = |e: &Estimate| e.standard_error.map_or(String::new(), |e| format!("{e:e}"));
    let mut text = "term,first_t,last_t,bits_per_dim,standard_error,x_0_mse,eps_mse\n".to_owned();
    for t in &bound.terms {
        let name = if t.first == 0 { "decoder" } else { "step" };
        let (first, last) = (t.first + 1, t.last + 1);
        let (bits, error) = (t.bits.mean, error(&t.bits));
        text += &format!("{name},{first},{last},{bits:e},{error},{:e},{:e}\n", t.x_0_error, t.eps_error);
    }
    text + &format!("prior,,,{:e},{},,\n", bound.prior.mean, error(&bound.prior))
}

/// The sums, in words.
fn summary(bound: &Bound) -> Vec<String> {
    let line = |name: &str, e: &Estimate| match e.standard_error {
        Some(error) => format!("{name:20} {:9.5} +- {error:.5} bits/dim", e.mean),
        None => format!("{name:20} {:9.5} bits/dim", e.mean),
    };
    vec![
        line("variational bound", &bound.total),
        line("  prior, L_T", &bound.prior),
        line("  steps, L_1 ..", &bound.steps),
        line("  decoder, L_0", &bound.decoder),
        format!(
            "of {} pictures, by {} of {} steps' terms each; +- is the standard error",
            thousands(bound.pictures as u64),
            thousands(bound.terms_measured as u64),
            thousands(bound.timesteps as u64 - 1)
        ),
    ]
}
