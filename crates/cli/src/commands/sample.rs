//! `ddpm sample`.

use super::classes::{ALL, tell_class};
use super::drawing::{Pass, grid, save_sheet};
use super::flags::{GuidanceFlags, OpenRun, RunFlags, SamplerFlags, given, sampling_record};
use super::folder::{Asked, ImageFolder, OutFlags};
use crate::signals::stop_flag;
use anyhow::bail;
use clap::ValueEnum;
use ddpm::generate::{BATCH, Classes, Generator, Request};
use ddpm::image::{self, Image, save_gif, save_png};
use ddpm::plot::{Sheet, sheet};
use ddpm::text::{shown, thousands};
use serde_json::{Map, Value};
use std::cell::RefCell;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// Images of each class unless another number is asked for.
const ROW: usize = 8;

/// Moments of a denoising strip, noise to image.
const MOMENTS: usize = 10;
/// Images unless another number is asked for.
const COUNT: usize = 64;
/// Most images whose denoising is shown.
const STRIPS: usize = 8;
/// Time of a frame of the GIF, and of its last, in milliseconds.
const FRAME_MS: (u16, u16) = (120, 1500);

/// Draw new images from a trained run
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  \
    ddpm sample runs/run-001 -n 64 --seed 7      a grid, and 64 PNGs in samples/seed-7/images\n  \
    ddpm sample runs/run-001 --steps 100         faster, a little worse\n  \
    ddpm sample runs/run-001 --sampler ddim      in 50 steps, the same image from the same noise\n  \
    ddpm sample runs/run-001 --class 3 --guidance 3   one class, of a run with classes\n  \
    ddpm sample runs/run-001 -n 8 --progress x0  how the images come out of the noise\n  \
    ddpm sample runs/run-001 -n 50000 --resume   go on where this was stopped")]
pub struct Args {
    /// How many images; 64 if not given, and 8 of each with --class all
    #[arg(short = 'n', long = "count", value_name = "N")]
    count: Option<usize>,
    /// Seed; image i depends on it and on i alone
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
    /// Most images at once
    #[arg(long, value_name = "N", default_value_t = BATCH)]
    batch_size: usize,
    /// Also write the denoising strip and a GIF: of the expected images (x0) or of the noisy ones (xt)
    #[arg(long, value_name = "WHAT")]
    progress: Option<Show>,
    /// How many images the grid shows: the first 100 if not given, or with --class all up to 10 of each of 40 classes; 0 for none
    #[arg(long, value_name = "N")]
    grid: Option<usize>,
    #[command(flatten)]
    out: OutFlags,
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

/// How many images of each class make `count`.
fn rows_of(count: usize, classes: usize) -> anyhow::Result<usize> {
    if count > 0 && count.is_multiple_of(classes) {
        return Ok(count / classes);
    }
    let (below, above) = (count / classes * classes, count.div_ceil(classes) * classes);
    let less = if below == 0 { String::new() } else { format!("-n {below} or ") };
    bail!(
        "--class {ALL} draws as many images of each of the {} classes, and {count} are no multiple of that: give {less}-n {above}",
        thousands(classes)
    )
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    Ok(draw(&args, |_| Ok(()))?.map_or(ExitCode::from(crate::INTERRUPTED), |_| ExitCode::SUCCESS))
}

/// What was drawn.
pub(super) struct Drawing {
    pub generator: Generator,
    pub folder: ImageFolder,
    /// Set by Ctrl-C.
    pub stop: Arc<AtomicBool>,
}

/// A moment of drawing: after so many steps, these images.
type Moment = (usize, Vec<Image>);

/// What the last digits of images depend on.
pub(super) fn computed(generator: &Generator) -> Map<String, Value> {
    let isa = ddpm_engine::Isa::from_env().map_or("none", |isa| isa.name());
    let precision = format!("{:?}", generator.config().train.precision).to_lowercase();
    let entries = [("instruction_set", isa.into()), ("precision", Value::from(precision))];
    entries.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()
}

impl Args {
    /// What is asked of the run.
    fn request(&self, generator: &Generator) -> anyhow::Result<Request> {
        let all = self.class.as_deref() == Some(ALL);
        let count = self.count.unwrap_or(if all { ROW * classes(generator) } else { COUNT });
        let class = match self.class.as_deref() {
            None => Classes::Cycle,
            Some(ALL) => Classes::Rows(rows_of(count, classes(generator))?),
            Some(name) => Classes::One(generator.class(name)?),
        };
        let (guidance, sampling) =
            (self.guidance.guidance(), self.sampler.options(&generator.config().sampling)?);
        let request = Request { count, seed: self.seed, batch: self.batch_size, class, guidance, sampling };
        generator.check(request)?;
        Ok(Request { sampling: generator.sampling(request), ..request })
    }

    /// The folder that the images go to.
    fn folder(&self, run: &OpenRun, request: &Request) -> anyhow::Result<ImageFolder> {
        let class = given([("class", self.class.clone())]);
        let said = [self.sampler.said(), class, self.guidance.said(), run.said()].concat();
        let mut record = run.record();
        record.extend(sampling_record(&request.sampling));
        let class = match request.class {
            Classes::Rows(row) => format!("{row} of each"),
            Classes::One(class) => run.generator.class_name(class),
            Classes::Cycle => "in turn".to_owned(),
            Classes::Unlabelled => "none".to_owned(),
        };
        let (low, high) = request.guidance.interval;
        record.insert("seed".to_owned(), request.seed.into());
        record.insert("class".to_owned(), class.into());
        record.insert("guidance".to_owned(), request.guidance.scale.into());
        // JSON has no infinity: a bound that is not given is null.
        record.insert("guidance_interval".to_owned(), vec![Value::from(low), Value::from(high)].into());
        let asked = Asked {
            run: &run.run,
            command: "sample",
            what: format!("seed-{}", self.seed),
            said,
            request: record,
            computed: computed(&run.generator),
            count: request.count,
        };
        ImageFolder::open(&self.out, asked)
    }
}

/// Draws the images and writes them; `None` where it was stopped. `before` is done before the first is drawn: what is needed
/// behind them should be there.
pub(super) fn draw<T>(
    args: &Args,
    before: impl FnOnce(&Generator) -> anyhow::Result<T>,
) -> anyhow::Result<Option<(Drawing, T)>> {
    if args.count == Some(0) || args.batch_size == 0 {
        bail!("-n and --batch-size must be at least 1");
    }
    let stop = stop_flag();
    let mut run = args.run.open()?;
    run.generator.set_stop(stop.clone());
    let request = args.request(&run.generator)?;
    tell_class(&run.generator, request.class);
    let made = before(&run.generator)?;
    let mut folder = args.folder(&run, &request)?;
    let (generator, out) = (run.generator, folder.path().to_owned());

    let sampler = generator.sampler(request)?;
    let shape = generator.shape();
    let moments: RefCell<Vec<Moment>> = RefCell::default();
    let mut written = Vec::new();
    let pass = Pass { generator: &generator, request, what: "drawing", stop: &stop };
    let whole = pass.run_into(
        &mut folder,
        &mut |denoiser, seeds, on_step| {
            sampler.sample(denoiser, seeds, &mut |step| {
                if let Some(show) = args.progress
                    && seeds.first == 0
                    && is_moment(step.done, step.steps)
                {
                    let values = if show == Show::X0 { &step.x_0 } else { &step.x };
                    let shown = values.chunks(shape.values()).take(request.count.min(STRIPS));
                    let images = shown.map(|p| Image::from_unit(p, shape)).collect();
                    moments.borrow_mut().push((step.done, images));
                }
                on_step(step)
            })
        },
        &mut |first, _| {
            if args.progress.is_some() && first == 0 {
                written.extend(write_progress(&moments.take(), &out)?);
            }
            Ok(())
        },
    )?;
    if !whole {
        return Ok(None);
    }
    if args.progress.is_some() && written.is_empty() {
        tell!("note: --progress shows how the first images are drawn, which were there already");
    }
    let (sheet, note) = grid(&generator, request.class, &folder, args.grid)?;
    if let Some(sheet) = sheet {
        save_sheet(&sheet, &folder.beside("grid.png"))?;
        written.insert(0, folder.beside("grid.png"));
    }
    if let Some(note) = note {
        tell!("note: {note}");
    }
    if written.is_empty() {
        written.push(folder.images());
    }
    for path in written {
        writeln!(std::io::stdout(), "{}", shown(path))?;
    }
    Ok(Some((Drawing { generator, folder, stop }, made)))
}

/// Whether step `done` of `steps` is one of the [`MOMENTS`] evenly spaced ones; the last step is.
fn is_moment(done: usize, steps: usize) -> bool {
    let moments = MOMENTS.min(steps);
    done * moments / steps != (done - 1) * moments / steps
}

/// The strip (a row for each image, noise to image) and the GIF (a grid at each moment).
fn write_progress(moments: &[Moment], out: &Path) -> ddpm::Result<[PathBuf; 2]> {
    let count = moments.first().map_or(0, |(_, images)| images.len());
    let images: Vec<Image> =
        (0..count).flat_map(|i| moments.iter().map(move |(_, images)| images[i].clone())).collect();
    let strip = out.join("progress.png");
    let sheet = Sheet {
        columns: moments.len(),
        column_labels: moments.iter().map(|(done, _)| format!("step {done}")).collect(),
        row_labels: (0..count).map(|i| i.to_string()).collect(),
        images,
        ..Sheet::default()
    };
    save_png(&sheet.draw()?, &strip)?;
    let gif = out.join("progress.gif");
    let frame = |(_, images): &Moment| {
        let shape = images[0].shape();
        image::grid(images, sheet::columns(images.len(), shape), 2).enlarge(sheet::factor(shape))
    };
    let frames: Vec<Image> = moments.iter().map(frame).collect();
    save_gif(&frames, FRAME_MS.0, FRAME_MS.1, &gif)?;
    Ok([strip, gif])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_strip_has_ten_moments_and_ends_with_the_image() {
        for steps in [1, 3, 10, 37, 1000] {
            let moments: Vec<usize> = (1..=steps).filter(|&d| is_moment(d, steps)).collect();
            assert_eq!(moments.len(), MOMENTS.min(steps));
            assert_eq!(moments.last(), Some(&steps));
        }
    }
}
