//! `ddpm sample`.

use super::classes::{ALL, print_class};
use super::flags::{GuidanceFlags, OpenRun, RunFlags, SamplerFlags, given, sampling_record};
use super::folder::{FolderRequest, ImageFolder, OutFlags};
use super::sampling::{SamplingJob, grid, save_sheet};
use crate::signals::stop_flag;
use anyhow::bail;
use clap::ValueEnum;
use ddpm::image::{self, Image, save_gif};
use ddpm::pipeline::{BATCH, Labels, Pipeline, SampleRequest};
use ddpm::plot::{Sheet, sheet};
use ddpm::text::{shown, thousands};
use serde_json::{Map, Value};
use std::cell::RefCell;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// Default images per class with `--class all`.
const ROW: usize = 8;

/// Columns of a denoising strip, from noise to image.
const MOMENTS: usize = 10;
/// Default number of images.
const COUNT: usize = 64;
/// Maximum images in the denoising strip.
const STRIPS: usize = 8;
/// Duration of the GIF's frames and of its last frame, in milliseconds.
const FRAME_MS: (u16, u16) = (120, 1500);

/// Sample new images from a trained run
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  \
    ddpm sample runs/run-001 -n 64 --seed 7           a grid, and 64 PNGs in samples/seed-7/images\n  \
    ddpm sample runs/run-001 --steps 100              faster, slightly worse\n  \
    ddpm sample runs/run-001 --sampler ddim           deterministic, 50 steps\n  \
    ddpm sample runs/run-001 --class 3 --guidance 3   one class, of a run with classes\n  \
    ddpm sample runs/run-001 -n 8 --progress x0       also show how images emerge from noise\n  \
    ddpm sample runs/run-001 -n 50000 --resume        resume an interrupted call")]
pub struct Args {
    /// Number of images [default: 64, or 8 per class with --class all]
    #[arg(short = 'n', long = "count", value_name = "N")]
    count: Option<usize>,
    /// Random seed; image i depends only on the seed and i
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    #[command(flatten)]
    sampler: SamplerFlags,
    /// Class of all images, by name or #INDEX, or `all` for a row of each; by default images cycle through the classes
    #[arg(long, value_name = "CLASS")]
    class: Option<String>,
    #[command(flatten)]
    guidance: GuidanceFlags,
    /// Maximum images per batch
    #[arg(long, value_name = "N", default_value_t = BATCH)]
    batch_size: usize,
    /// Also write a strip and a GIF of the denoising: predicted images (x0) or noisy ones (xt)
    #[arg(long, value_name = "KIND")]
    progress: Option<Show>,
    /// Images on the grid, 0 for none [default: the first 100, or 10 of each of 40 classes with --class all]
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

/// Number of the run's classes; 1 if it has none.
fn classes(pipeline: &Pipeline) -> usize {
    pipeline.classes().map_or(1, |n| n as usize)
}

/// Images per class if `count` is divided equally.
fn rows_of(count: usize, classes: usize) -> anyhow::Result<usize> {
    if count > 0 && count.is_multiple_of(classes) {
        return Ok(count / classes);
    }
    let (below, above) = (count / classes * classes, count.div_ceil(classes) * classes);
    let less = if below == 0 { String::new() } else { format!("-n {below} or ") };
    bail!(
        "--class {ALL} samples equally many images of each of the {} classes, and {count} is not a multiple: give {less}-n {above}",
        thousands(classes)
    )
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    Ok(sample_to_folder(&args, |_| Ok(()))?.map_or(ExitCode::from(crate::INTERRUPTED), |_| ExitCode::SUCCESS))
}

/// Finished samples.
pub(super) struct Samples {
    pub pipeline: Pipeline,
    pub folder: ImageFolder,
    /// Set by Ctrl-C.
    pub stop: Arc<AtomicBool>,
}

/// Images after a number of steps.
type Moment = (usize, Vec<Image>);

/// What affects only the rounding of images.
pub(super) fn computed(pipeline: &Pipeline) -> Map<String, Value> {
    let isa = ddpm_engine_cpu::Isa::from_env().map_or("none", |isa| isa.name());
    let precision = format!("{:?}", pipeline.config().compute.precision).to_lowercase();
    let entries = [("instruction_set", isa.into()), ("precision", Value::from(precision))];
    entries.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()
}

impl Args {
    /// The request that the flags make.
    fn request(&self, pipeline: &Pipeline) -> anyhow::Result<SampleRequest> {
        let all = self.class.as_deref() == Some(ALL);
        let count = self.count.unwrap_or(if all { ROW * classes(pipeline) } else { COUNT });
        let class = match self.class.as_deref() {
            None => Labels::Cycle,
            Some(ALL) => Labels::Grouped(rows_of(count, classes(pipeline))?),
            Some(name) => Labels::Fixed(pipeline.class(name)?),
        };
        let (guidance, sampling) =
            (self.guidance.guidance(), self.sampler.options(&pipeline.config().sampling)?);
        let request =
            SampleRequest { count, seed: self.seed, batch: self.batch_size, class, guidance, sampling };
        pipeline.check(request)?;
        Ok(SampleRequest { sampling: pipeline.sampling(request), ..request })
    }

    /// The output folder.
    fn folder(&self, run: &OpenRun, request: &SampleRequest) -> anyhow::Result<ImageFolder> {
        let class = given([("class", self.class.clone())]);
        let explicit =
            [self.sampler.explicit_flags(), class, self.guidance.explicit_flags(), run.explicit_flags()]
                .concat();
        let mut record = run.record();
        record.extend(sampling_record(&request.sampling));
        let class = match request.class {
            Labels::Grouped(row) => format!("{row} of each"),
            Labels::Fixed(class) => run.pipeline.class_name(class),
            Labels::Cycle => "in turn".to_owned(),
            Labels::Unlabelled => "none".to_owned(),
        };
        let (low, high) = request.guidance.interval;
        record.insert("seed".to_owned(), request.seed.into());
        record.insert("class".to_owned(), class.into());
        record.insert("guidance".to_owned(), request.guidance.scale.into());
        // JSON has no infinity; an open bound is null.
        record.insert("guidance_interval".to_owned(), vec![Value::from(low), Value::from(high)].into());
        let request = FolderRequest {
            run: &run.run,
            command: "sample",
            what: format!("seed-{}", self.seed),
            explicit,
            request: record,
            computed: computed(&run.pipeline),
            count: request.count,
        };
        ImageFolder::open(&self.out, request)
    }
}

/// Samples the images and writes them; `None` if interrupted. `before` runs first, to fail early if something needed afterwards
/// is missing.
pub(super) fn sample_to_folder<T>(
    args: &Args,
    before: impl FnOnce(&Pipeline) -> anyhow::Result<T>,
) -> anyhow::Result<Option<(Samples, T)>> {
    if args.count == Some(0) || args.batch_size == 0 {
        bail!("-n and --batch-size must be at least 1");
    }
    let stop = stop_flag();
    let mut run = args.run.open()?;
    run.pipeline.set_stop(stop.clone());
    let request = args.request(&run.pipeline)?;
    print_class(&run.pipeline, request.class);
    let made = before(&run.pipeline)?;
    let mut folder = args.folder(&run, &request)?;
    let (pipeline, out) = (run.pipeline, folder.path().to_owned());

    let sampler = pipeline.sampler(request)?;
    let shape = pipeline.shape();
    let moments: RefCell<Vec<Moment>> = RefCell::default();
    let mut written = Vec::new();
    let job = SamplingJob { pipeline: &pipeline, request, what: "sampling", stop: &stop };
    let finished = job.run_into(
        &mut folder,
        &mut |denoiser, seeds, on_step| {
            sampler.sample(denoiser, seeds, &mut |step| {
                if let Some(show) = args.progress
                    && seeds.first == 0
                    && is_moment(step.done, step.steps)
                {
                    let values = if show == Show::X0 { &step.x_0 } else { &step.x };
                    let shown = values.chunks(shape.num_elements()).take(request.count.min(STRIPS));
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
    if !finished {
        return Ok(None);
    }
    if args.progress.is_some() && written.is_empty() {
        status!("note: nothing to show for --progress: the first images already existed");
    }
    let (sheet, note) = grid(&pipeline, request.class, &folder, args.grid)?;
    if let Some(sheet) = sheet {
        save_sheet(&sheet, &folder.side_file("grid.png"))?;
        written.insert(0, folder.side_file("grid.png"));
    }
    if let Some(note) = note {
        status!("note: {note}");
    }
    if written.is_empty() {
        written.push(folder.images());
    }
    for path in written {
        writeln!(std::io::stdout(), "{}", shown(path))?;
    }
    Ok(Some((Samples { pipeline, folder, stop }, made)))
}

/// Whether step `done` of `steps` is one of the [`MOMENTS`] evenly spaced ones; the last step is.
fn is_moment(done: usize, steps: usize) -> bool {
    let moments = MOMENTS.min(steps);
    done * moments / steps != (done - 1) * moments / steps
}

/// Writes the strip (a row per image, noise to image) and the GIF (a grid per moment).
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
    sheet.draw()?.save(&strip)?;
    let gif = out.join("progress.gif");
    let frame = |(_, images): &Moment| {
        let shape = images[0].shape();
        image::grid(images, sheet::columns(images.len(), shape), 2).enlarge(sheet::scale_factor(shape))
    };
    let frames: Vec<Image> = moments.iter().map(frame).collect();
    save_gif(&frames, FRAME_MS.0, FRAME_MS.1, &gif)?;
    Ok([strip, gif])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_strip_has_ten_moments_and_ends_with_the_final_image() {
        for steps in [1, 3, 10, 37, 1000] {
            let moments: Vec<usize> = (1..=steps).filter(|&d| is_moment(d, steps)).collect();
            assert_eq!(moments.len(), MOMENTS.min(steps));
            assert_eq!(moments.last(), Some(&steps));
        }
    }
}
