//! `ddpm eval`.

use super::flags::{DataFlags, OpenRun, RunFlags, ThresholdFlag, VarianceFlag, choice, given};
use super::folder::{FlagValue, differences, make_folder, name};
use crate::progress::{Progress, human_time};
use crate::signals::stop_flag;
use anyhow::{Context, bail};
use ddpm::data::Dataset;
use ddpm::output::{self, FileKind};
use ddpm::pipeline::BATCH;
use ddpm::storage::write_file;
use ddpm::text::{counted, thousands};
use ddpm::vlb::{self, Estimate, Vlb, VlbOptions};
use serde_json::{Map, Value, json};
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::Ordering;
use std::time::Instant;

/// Default number of images.
const COUNT: usize = 256;
/// Default number of terms per image.
const TERMS: usize = 64;

/// Measure how well a run models its images, in bits/dim
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  \
    ddpm eval runs/run-001                        variational bound on the NLL: a table and a plot\n  \
    ddpm eval runs/run-001 --checkpoint 1000      an earlier checkpoint, for comparison\n  \
    ddpm eval runs/run-001 --terms all -n 1000    more precise, slower\n  \
    ddpm eval runs/run-001 --data held-out        images that it was not trained on\n  \
    ddpm eval runs/run-001 --data held-out --set data.csv=held-out.csv  only those in a table")]
pub struct Args {
    /// Variational bound on the NLL in bits/dim; the default and only measure
    #[arg(long)]
    nll: bool,
    #[command(flatten)]
    data: DataFlags,
    /// Number of images, evenly spread over the data
    #[arg(short = 'n', long = "count", value_name = "N", default_value_t = COUNT)]
    count: usize,
    /// Terms of the bound per image, or `all`. Fewer than all are sampled at random, more densely at low noise: an unbiased
    /// estimate with its standard error. By default 64, or all if there are at most twice as many
    #[arg(long, value_name = "N")]
    terms: Option<String>,
    /// Random seed of the noise and the sampled terms
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Variance of the steps; the run's by default, learned if it has one
    #[arg(long, value_name = "VARIANCE")]
    variance: Option<VarianceFlag>,
    /// Thresholding of predicted images; the run's (sampling.threshold) by default
    #[arg(long, value_name = "METHOD")]
    threshold: Option<ThresholdFlag>,
    /// Maximum images per batch
    #[arg(long, value_name = "N", default_value_t = BATCH)]
    batch_size: usize,
    /// Output folder; by default in RUN/eval, named after the checkpoint and all flags
    #[arg(short, long, value_name = "FOLDER")]
    out: Option<PathBuf>,
    /// Overwrite existing files not written by this command, or of another measurement
    #[arg(long)]
    overwrite: bool,
    #[command(flatten)]
    run: RunFlags,
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    if args.count == 0 || args.batch_size == 0 {
        bail!("-n and --batch-size must be at least 1");
    }
    let terms = match args.terms.as_deref() {
        None | Some("all") => None,
        Some(n) => Some(n.parse().with_context(|| format!("--terms {n}: give a number, or all"))?),
    };
    let stop = stop_flag();
    let mut run = args.run.open()?;
    run.pipeline.set_stop(stop.clone());
    let pipeline = &run.pipeline;
    let sampling = &pipeline.config().sampling;
    let few = args.terms.is_some() || pipeline.config().diffusion.timesteps <= 2 * TERMS;
    let options = VlbOptions {
        variance: args.variance.map(Into::into).or(sampling.variance),
        threshold: args.threshold.map_or(sampling.threshold, Into::into),
        terms: if few { terms } else { Some(TERMS) },
        seed: args.seed,
    };
    let data = args.data.open(pipeline)?;
    let results = ResultFolder::of(&args, &run, &options, &*data)?;

    let start = Instant::now();
    let mut progress = Progress::new("measuring", 0);
    let mut announced = false;
    let mut on_progress = |done: usize, all: usize| {
        if !announced && done > 0 {
            announced = true;
            let total = start.elapsed().mul_f64(all as f64 / done as f64);
            let images = counted(args.count.min(data.len()), "image");
            progress.line(&format!("the variational bound of {images} takes about {}", human_time(total)));
        }
        progress.set(done as u64, all as u64, String::new);
        if stop.load(Ordering::Relaxed) { Err(ddpm::Error::Interrupted) } else { Ok(()) }
    };
    let measured =
        vlb::evaluate_run(pipeline, &*data, args.count, args.batch_size, options, &mut on_progress);
    progress.finish();
    let bound = match measured {
        Err(ddpm::Error::Interrupted) => {
            status!("stopped; nothing was written");
            return Ok(ExitCode::from(crate::INTERRUPTED));
        }
        other => other?,
    };
    let title =
        format!("Variational bound of {}, {}: {:.3} bits/dim", run.run.name(), run.step, bound.total.mean);
    let written = results.write(&bound, &title)?;

    let mut stdout = std::io::stdout();
    for line in summary(&bound) {
        writeln!(stdout, "{line}")?;
    }
    for path in written {
        writeln!(stdout, "{}", ddpm::text::shown(&path))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The output files.
const FILES: [(&str, FileKind); 3] =
    [("nll.csv", FileKind::Table), ("nll.json", FileKind::Json), ("nll.png", FileKind::Png)];

/// The output folder and the measurement it holds.
struct ResultFolder {
    folder: PathBuf,
    /// Everything that the results depend on.
    measured: Value,
    /// Further information for `nll.json`.
    about: Map<String, Value>,
}

impl ResultFolder {
    /// `--out`, or a generated folder in the run: the first of `NAME`, `NAME-2`, … that is free or holds the same measurement.
    fn of(args: &Args, run: &OpenRun, options: &VlbOptions, data: &dyn Dataset) -> anyhow::Result<Self> {
        let summary = data.summary();
        let mut measured = run.record();
        let entries = [
            ("data_fingerprint", Value::from(summary.fingerprint.clone())),
            ("count", args.count.min(data.len()).into()),
            ("terms", options.terms.map_or("all".into(), Value::from)),
            ("seed", options.seed.into()),
            ("variance", json!(options.variance.map(ddpm::sampler::Variance::name))),
            ("threshold", options.threshold.name().into()),
        ];
        measured.extend(entries.map(|(key, value)| (key.to_owned(), value)));
        let about = [
            ("checkpoint", Value::from(run.checkpoint.display().to_string())),
            ("weights", run.weights.clone().unwrap_or_else(|| "auto".to_owned()).into()),
            ("data", summary.source.clone().into()),
        ];
        let about = about.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
        let results = |folder| Self { folder, measured: measured.clone().into(), about };
        if let Some(out) = &args.out {
            let results = results(out.clone());
            results.check(args.overwrite)?;
            return Ok(results);
        }
        let explicit = args.explicit_flags(run, &summary.fingerprint);
        let name = name(&run.step, &explicit);
        let mut results = results(run.run.path().join("eval").join(&name));
        // The name does not identify the measurement: data can change in results, and a step can be retrained.
        for n in 2.. {
            if results.differences().is_none_or(|differences| differences.is_empty()) {
                break;
            }
            results.folder.set_file_name(format!("{name}-{n}"));
        }
        results.check(args.overwrite)?;
        Ok(results)
    }

    /// How the existing results differ from this measurement; `None` if there are none.
    fn differences(&self) -> Option<Vec<String>> {
        let exists = FILES.iter().any(|(file, _)| self.folder.join(file).exists());
        let read = || output::json(&self.folder.join("nll.json")).unwrap_or_default();
        exists.then(|| differences(&read()["measured"], &self.measured))
    }

    fn check(&self, overwrite: bool) -> anyhow::Result<()> {
        output::check_folder(&self.folder)?;
        for (file, kind) in FILES {
            output::check(&self.folder.join(file), kind, overwrite)?;
        }
        if let Some(first) = self.differences().filter(|_| !overwrite).and_then(|all| all.into_iter().next())
        {
            bail!(
                "{} has the results of another measurement: {first}; give another --out, or --overwrite",
                ddpm::text::shown(&self.folder)
            );
        }
        Ok(())
    }

    fn write(&self, bound: &Vlb, title: &str) -> anyhow::Result<[PathBuf; 3]> {
        make_folder(&self.folder)?;
        let files = FILES.map(|(file, _)| self.folder.join(file));
        let mut about = self.about.clone();
        about.insert(output::PROGRAM.0.to_owned(), output::PROGRAM.1.into());
        about.insert("measured".to_owned(), self.measured.clone());
        about.insert("bound".to_owned(), serde_json::to_value(bound)?);
        let doing = "write the results";
        write_file(&files[0], table(bound).as_bytes(), doing)?;
        write_file(&files[1], format!("{:#}\n", Value::from(about)).as_bytes(), doing)?;
        let parts: Vec<_> =
            bound.terms.iter().map(|t| (t.first as f64 + 1.0, t.last as f64 + 1.0, t.bits.mean)).collect();
        ddpm::plot::bound(title, &parts)?.save(&files[2])?;
        Ok(files)
    }
}

impl Args {
    /// The explicit flags besides the checkpoint; other data by name and the start of its fingerprint.
    fn explicit_flags(&self, run: &OpenRun, fingerprint: &str) -> Vec<FlagValue> {
        let data = self.data.name().map(|name| format!("{name}-{}", &fingerprint[..8]));
        given([
            ("data", data),
            ("weights", run.weights.clone()),
            ("n", (self.count != COUNT).then(|| self.count.to_string())),
            ("terms", self.terms.clone()),
            ("seed", (self.seed != 0).then(|| self.seed.to_string())),
            ("variance", self.variance.and_then(choice)),
            ("threshold", self.threshold.and_then(choice)),
        ])
    }
}

/// CSV of every measured term: timesteps 1 to T as in the paper, then the prior `L_T`.
fn table(bound: &Vlb) -> String {
    let error = |e: &Estimate| e.standard_error.map_or(String::new(), |e| format!("{e:e}"));
    let mut text = format!("{}\n", output::TERMS);
    for t in &bound.terms {
        let name = if t.first == 0 { "decoder" } else { "step" };
        let (first, last) = (t.first + 1, t.last + 1);
        let (bits, error) = (t.bits.mean, error(&t.bits));
        text += &format!("{name},{first},{last},{bits:e},{error},{:e},{:e}\n", t.x_0_error, t.eps_error);
    }
    text + &format!("prior,,,{:e},{},,\n", bound.prior.mean, error(&bound.prior))
}

/// The sums, for the terminal.
fn summary(bound: &Vlb) -> Vec<String> {
    let line = |name: &str, e: &Estimate| match e.standard_error {
        Some(error) => format!("{name:20} {:9.5} +- {error:.5} bits/dim", e.mean),
        None => format!("{name:20} {:9.5} bits/dim", e.mean),
    };
    let images = counted(bound.images, "image");
    let error = if bound.total.standard_error.is_some() { "; +- is the standard error" } else { "" };
    vec![
        line("variational bound", &bound.total),
        line("  prior, L_T", &bound.prior),
        line("  steps, L_1 ..", &bound.steps),
        line("  decoder, L_0", &bound.decoder),
        format!(
            "over {images}, with {} of {} step terms each{error}",
            thousands(bound.terms_measured),
            thousands(bound.timesteps - 1)
        ),
    ]
}
