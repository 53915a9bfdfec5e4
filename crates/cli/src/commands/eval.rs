//! `ddpm eval`.

use super::flags::{Bounds, DataFlags, NoiseVariance, OpenRun, RunFlags, choice, given};
use super::folder::{FlagValue, differing, make_folder, name};
use crate::progress::{Progress, human_time, thousands};
use crate::signals::stop_flag;
use anyhow::{Context, bail};
use ddpm::bound::{self, Bound, Estimate, Options};
use ddpm::data::Dataset;
use ddpm::generate::BATCH;
use ddpm::image::save_png;
use ddpm::output::{self, Kind};
use ddpm::text::counted;
use ddpm::train::write_file;
use serde_json::{Map, Value, json};
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::Ordering;
use std::time::Instant;

/// Images that are measured unless another number is asked for.
const COUNT: usize = 256;
/// Terms that are measured of each image unless another number is asked for.
const TERMS: usize = 64;

/// Measure how well a run has learnt its images
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  \
    ddpm eval runs/run-001                        bits that a value of an image takes, at most: a table and a plot\n  \
    ddpm eval runs/run-001 --checkpoint 1000      of an earlier checkpoint, to compare\n  \
    ddpm eval runs/run-001 --terms all -n 1000    more exactly, taking longer\n  \
    ddpm eval runs/run-001 --data held-out        of images that it has not seen\n  \
    ddpm eval runs/run-001 --data held-out --set data.csv=held-out.csv   of those that a table names")]
pub struct Args {
    /// Measure the variational bound of the negative log-likelihood, in bits per dimension; the default, as there is no other
    /// measure
    #[arg(long)]
    nll: bool,
    #[command(flatten)]
    data: DataFlags,
    /// How many of them, evenly spread
    #[arg(short = 'n', long = "count", value_name = "N", default_value_t = COUNT)]
    count: usize,
    /// How many of the bound's terms are measured of each image, drawn at random, more of them at low noise: an estimate
    /// without bias, with its standard error; all: each term; 64 if not given, or all where there are hardly more
    #[arg(long, value_name = "N")]
    terms: Option<String>,
    /// Seed of the noise and of the choice of terms
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// The variance of the steps; the run's (sampling.variance) if not given, learned where it is
    #[arg(long, value_name = "WHICH")]
    variance: Option<NoiseVariance>,
    /// How expected images are held within black and white; the run's way (sampling.threshold) if not given
    #[arg(long, value_name = "HOW")]
    threshold: Option<Bounds>,
    /// Most images at once
    #[arg(long, value_name = "N", default_value_t = BATCH)]
    batch_size: usize,
    /// Where table and plot go; if not given, a folder in RUN/eval with the name of the checkpoint and all that is said
    #[arg(short, long, value_name = "FOLDER")]
    out: Option<PathBuf>,
    /// Replace files that this command did not make, or results of another measurement
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
    run.generator.set_stop(stop.clone());
    let generator = &run.generator;
    let sampling = &generator.config().sampling;
    let few = args.terms.is_some() || generator.config().diffusion.timesteps <= 2 * TERMS;
    let options = Options {
        variance: args.variance.map(Into::into).or(sampling.variance),
        threshold: args.threshold.map_or(sampling.threshold, Into::into),
        terms: if few { terms } else { Some(TERMS) },
        seed: args.seed,
    };
    let data = args.data.open(generator)?;
    let place = Place::of(&args, &run, &options, &*data)?;

    let begun = Instant::now();
    let mut progress = Progress::new("measuring", 0);
    let mut told = false;
    let mut on_asked = |done: usize, all: usize| {
        if !told && done > 0 {
            told = true;
            let whole = begun.elapsed().mul_f64(all as f64 / done as f64);
            let images = counted(args.count.min(data.len()), "image");
            progress.line(&format!("the variational bound of {images} takes about {}", human_time(whole)));
        }
        progress.set(done as u64, all as u64, String::new);
        if stop.load(Ordering::Relaxed) { Err(ddpm::Error::Interrupted) } else { Ok(()) }
    };
    let measured = bound::of_run(generator, &*data, args.count, args.batch_size, options, &mut on_asked);
    progress.finish();
    let bound = match measured {
        Err(ddpm::Error::Interrupted) => {
            tell!("stopped; nothing was written");
            return Ok(ExitCode::from(crate::INTERRUPTED));
        }
        other => other?,
    };
    let title =
        format!("Variational bound of {}, {}: {:.3} bits/dim", run.run.name(), run.step, bound.total.mean);
    let written = place.write(&bound, &title)?;

    let mut stdout = std::io::stdout();
    for line in summary(&bound) {
        writeln!(stdout, "{line}")?;
    }
    for path in written {
        writeln!(stdout, "{}", ddpm::text::shown(&path))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// What is written.
const FILES: [(&str, Kind); 3] = [("nll.csv", Kind::Table), ("nll.json", Kind::Json), ("nll.png", Kind::Png)];

/// Where results go, and what they are of.
struct Place {
    folder: PathBuf,
    /// All that the measured numbers depend on.
    measured: Value,
    /// What else is written of it.
    about: Map<String, Value>,
}

impl Place {
    /// The folder that is said, or the first of that name in the run's that is free, or has the results of the same
    /// measurement.
    fn of(args: &Args, run: &OpenRun, options: &Options, data: &dyn Dataset) -> anyhow::Result<Self> {
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
        let place = |folder| Self { folder, measured: measured.clone().into(), about };
        if let Some(out) = &args.out {
            let place = place(out.clone());
            place.check(args.overwrite)?;
            return Ok(place);
        }
        let said = args.said(run, &summary.fingerprint);
        let name = name(&run.step, &said);
        let mut place = place(run.run.path().join("eval").join(&name));
        // Names do not tell everything: data changes in its folder, and a step is made again in another way.
        for n in 2.. {
            if place.differing().is_none_or(|differing| differing.is_empty()) {
                break;
            }
            place.folder.set_file_name(format!("{name}-{n}"));
        }
        place.check(args.overwrite)?;
        Ok(place)
    }

    /// In what the measurement whose results are in the folder differs; `None` where there are no results.
    fn differing(&self) -> Option<Vec<String>> {
        let there = FILES.iter().any(|(file, _)| self.folder.join(file).exists());
        let read = || output::json(&self.folder.join("nll.json")).unwrap_or_default();
        there.then(|| differing(&read()["measured"], &self.measured))
    }

    fn check(&self, overwrite: bool) -> anyhow::Result<()> {
        output::check_folder(&self.folder)?;
        for (file, kind) in FILES {
            output::check(&self.folder.join(file), kind, overwrite)?;
        }
        if let Some(first) = self.differing().filter(|_| !overwrite).and_then(|all| all.into_iter().next()) {
            bail!(
                "{} has the results of another measurement: {first}; give another --out, or --overwrite",
                ddpm::text::shown(&self.folder)
            );
        }
        Ok(())
    }

    fn write(&self, bound: &Bound, title: &str) -> anyhow::Result<[PathBuf; 3]> {
        make_folder(&self.folder)?;
        let files = FILES.map(|(file, _)| self.folder.join(file));
        let mut about = self.about.clone();
        about.insert(output::PROGRAM.0.to_owned(), output::PROGRAM.1.into());
        about.insert("measured".to_owned(), self.measured.clone());
        about.insert("bound".to_owned(), serde_json::to_value(bound)?);
        let doing = "write what was measured";
        write_file(&files[0], table(bound).as_bytes(), doing)?;
        write_file(&files[1], format!("{:#}\n", Value::from(about)).as_bytes(), doing)?;
        let parts: Vec<_> =
            bound.terms.iter().map(|t| (t.first as f64 + 1.0, t.last as f64 + 1.0, t.bits.mean)).collect();
        save_png(&ddpm::plot::bound(title, &parts)?, &files[2])?;
        Ok(files)
    }
}

impl Args {
    /// What was asked for besides the checkpoint, with other data by its name and a part of its fingerprint.
    fn said(&self, run: &OpenRun, fingerprint: &str) -> Vec<FlagValue> {
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

/// Every measured term: timesteps from 1 to T, as the paper counts; `L_T` stands behind them.
fn table(bound: &Bound) -> String {
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

/// The sums, in words.
fn summary(bound: &Bound) -> Vec<String> {
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
            "of {images}, by {} of {} steps' terms each{error}",
            thousands(bound.terms_measured as u64),
            thousands(bound.timesteps as u64 - 1)
        ),
    ]
}
