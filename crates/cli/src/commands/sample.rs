//! `ddpm sample`.

use super::classes::tell_class;
use super::flags::{GuidanceFlags, PADDING, ROW, RunFlags, SamplerFlags, given, tell_step};
use super::folder::PictureFolder;
use crate::progress::Progress;
use crate::signals::stop_flag;
use anyhow::bail;
use clap::ValueEnum;
use ddpm::generate::{BATCH, Classes, Generator, Request};
use ddpm::picture::{Picture, grid, save_gif, save_png};
use ddpm::text::shown;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Moments of a denoising strip, noise to picture.
const MOMENTS: usize = 10;
/// Pictures unless another number is asked for.
const COUNT: usize = 64;
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
    /// How many pictures; 64 if not given, and 8 of each with --class all
    #[arg(short = 'n', long = "count", value_name = "N")]
    count: Option<usize>,
    /// Seed; picture i depends on it and on i alone
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    #[command(flatten)]
    sampler: SamplerFlags,
    /// The class of all images, by name, or by index as #3, of a run that was trained with classes; all: a row of each; image i
    /// gets class i if not given
    #[arg(long, value_name = "CLASS")]
    class: Option<String>,
    #[command(flatten)]
    guidance: GuidanceFlags,
    /// Most pictures at once
    #[arg(long, value_name = "N", default_value_t = BATCH)]
    batch_size: usize,
    /// Also write the denoising strip and a GIF: of the expected pictures (x0) or of the noisy ones (xt)
    #[arg(long, value_name = "WHAT")]
    progress: Option<Show>,
    /// Where the pictures go; if not given, RUN/samples/seed-SEED, its name longer by all else that is said but -n
    #[arg(short, long, value_name = "FOLDER")]
    out: Option<PathBuf>,
    #[command(flatten)]
    run: RunFlags,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Show {
    X0,
    Xt,
}

/// Number of the run's classes; 1 without any.
fn classes(generator: &Generator) -> usize {
    generator.classes().map_or(1, |n| n as usize)
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
    let sampling = args.sampler.options()?;
    let (run, generator) = args.run.open()?;
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
    let guidance = args.guidance.guidance();
    let request = Request { count, seed: args.seed, batch: args.batch_size, class, guidance, sampling };
    generator.check(request)?;
    tell_class(&generator, class);
    let made = before(&generator)?;
    let class_said = given([("class", args.class.clone())]);
    let said = [args.sampler.said(), class_said, args.guidance.said(), args.run.said()].concat();
    let folder = PictureFolder::make(args.out.as_deref(), &run, &format!("seed-{}", args.seed), &said)?;

    let mut progress = Progress::new("drawing", 0);
    let shape = generator.shape();
    let mut moments: Vec<Vec<Picture>> = Vec::new(); // [moment][picture]
    let pictures = generator.draw(request, &mut |first, step| {
        tell_step(&mut progress, &request, first, &step);
        if let Some(show) = args.progress
            && first == 0
            && is_moment(step.done, step.steps)
        {
            let numbers = if show == Show::X0 { &step.x_0 } else { &step.x };
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

    folder.write(&pictures)?;
    let out = folder.path().to_owned();
    let sheet = out.join("grid.png");
    let columns = if let Classes::Rows(row) = class { row.max(1) } else { ROW };
    save_png(&grid(&pictures, columns, PADDING), &sheet)?;
    let mut written = vec![sheet];
    if args.progress.is_some() {
        written.extend(write_progress(&moments, &out)?);
    }
    for path in written {
        writeln!(std::io::stdout(), "{}", shown(path))?;
    }
    Ok(Some((Drawing { generator, pictures, out, stop }, made)))
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
