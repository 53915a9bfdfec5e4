//! `ddpm inpaint`.

use super::edit::{EditFlags, Named, Shown};
use super::flags::{BatchFlags, LevelFlags, given, stem};
use ddpm::edit::{RePaint, gap};
use ddpm::generate::Request;
use ddpm::image::Image;
use ddpm::sampler::Options;
use std::path::PathBuf;
use std::process::ExitCode;

/// Steps, the length of a jump, and resamplings unless others are asked for; fewer where the schedule or the steps allow fewer.
const STEPS: usize = 100;
const JUMP: usize = 5;
const RESAMPLINGS: usize = 5;
/// What is to be filled, as the sheet shows it.
const GAP: u8 = 128;

/// Fill a part of an image with what a run expects beside the rest (RePaint)
#[derive(clap::Args)]
#[command(
    after_help = "White in the mask is what is filled; black is kept as it is. Of two values, as 0 and 1, the brighter is filled;\n\
    where the colours are all one, what is opaque. What was taken is said.\n\nExamples:\n  \
    ddpm inpaint runs/run-001 cat.png --mask mask.png                four fillings, and a sheet of them\n  \
    ddpm inpaint runs/run-001 cat.png --mask mask.png -n 16 --seed 7 others\n  \
    ddpm inpaint runs/run-001 cat.png --mask mask.png --resamplings 10   fits better, takes longer"
)]
pub struct Args {
    /// The image
    #[arg(index = 2)]
    image: PathBuf,
    /// An image of the same size: white is filled, black is kept
    #[arg(long, value_name = "FILE")]
    mask: PathBuf,
    /// Fill what the mask does not mark: black is filled, white is kept
    #[arg(long)]
    invert_mask: bool,
    /// How many fillings
    #[arg(short = 'n', long = "count", value_name = "N", default_value_t = 4)]
    count: usize,
    /// Denoising steps from noise to image; 100 if not given
    #[arg(long, value_name = "N")]
    steps: Option<usize>,
    /// So many steps are taken back at once; 5 if not given
    #[arg(long, value_name = "N")]
    jump: Option<usize>,
    /// How often each stretch of so many steps is walked: more fits the filling better to the rest, and takes as many times
    /// longer; 1 takes nothing back, the paper has 10
    #[arg(long, value_name = "N", default_value_t = RESAMPLINGS)]
    resamplings: usize,
    #[command(flatten)]
    levels: LevelFlags,
    #[command(flatten)]
    many: BatchFlags,
    #[command(flatten)]
    edit: EditFlags,
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let (spacing, threshold) = (args.levels.spacing, args.levels.threshold());
    let sampling = Options { steps: args.steps, spacing, threshold, ..Options::default() };
    let (count, seed, batch) = (args.count, args.many.seed, args.many.batch_size);
    let editor = args.edit.open(|_| Ok(Request { count, seed, batch, sampling, ..Request::default() }))?;
    let generator = editor.generator();
    let schedule = generator.schedule();
    let sampling = editor.request.sampling;
    let steps = sampling.steps.unwrap_or(STEPS.min(schedule.timesteps_with_signal()));
    let sampling = Options { steps: Some(steps), ..sampling };
    let levels = sampling.levels(schedule, generator.config().diffusion.prediction)?;
    let jump = args.jump.unwrap_or(JUMP.min(steps / 2).max(1));
    // A single step has nothing to go back to.
    let resamplings = if args.jump.is_none() && steps == 1 { 1 } else { args.resamplings };
    let threshold = sampling.threshold.unwrap_or_default();
    let repaint = RePaint { levels, jump, resamplings, variance: sampling.variance, threshold };
    repaint.check()?;
    let image = editor.image(&args.image)?;
    let gap = gap(&args.mask, &image, &generator.config().data_options(), args.invert_mask)?;
    tell!("{}: {}", ddpm::text::shown(&args.mask), gap.taken);

    let own = given([
        ("invert-mask", args.invert_mask.then(|| "yes".to_owned())),
        ("steps", args.steps.map(|n| n.to_string())),
        ("jump", args.jump.map(|n| n.to_string())),
        ("resamplings", (args.resamplings != RESAMPLINGS).then(|| args.resamplings.to_string())),
    ]);
    let mut folder = editor.folder(Named {
        command: "inpaint",
        what: format!("inpaint-{}-{}-seed-{seed}", stem(&args.image), stem(&args.mask)),
        said: [own, args.levels.said()].concat(),
        files: vec![("image", args.image.clone()), ("mask", args.mask.clone())],
        request: vec![
            ("invert_mask", args.invert_mask.into()),
            ("steps", steps.into()),
            ("jump", jump.into()),
            ("resamplings", resamplings.into()),
        ],
    })?;
    let whole = editor.draw(
        &mut folder,
        "filling",
        &mut |denoiser, seeds, on_step| repaint.fill(denoiser, seeds, &image.numbers, &gap.unknown, on_step),
        &mut |_, _| Ok(()),
    )?;
    if !whole {
        return Ok(ExitCode::from(crate::INTERRUPTED));
    }
    let input = Image::from_unit(&image.numbers, image.shape);
    let mut masked = input.clone();
    masked.data.iter_mut().zip(&gap.unknown).filter(|(_, unknown)| **unknown).for_each(|(v, _)| *v = GAP);
    let before = vec![(input, "input".to_owned()), (masked, "mask".to_owned())];
    editor.finish(&folder, Shown { before, caption: &|i| format!("filled {i}"), after: Vec::new() })?;
    Ok(ExitCode::SUCCESS)
}
