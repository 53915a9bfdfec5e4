//! `ddpm inpaint`.

use super::edit::{EditFlags, EditRequest, SheetParts};
use super::flags::{BatchFlags, LevelFlags, given, stem};
use ddpm::edit::{RePaint, gap};
use ddpm::image::Image;
use ddpm::pipeline::SampleRequest;
use ddpm::sampler::SamplerOptions;
use std::path::PathBuf;
use std::process::ExitCode;

/// Default steps, jump length and resamplings; fewer if the schedule or the steps allow fewer.
const STEPS: usize = 100;
const JUMP: usize = 5;
const RESAMPLINGS: usize = 5;
/// Grey value of the masked part on the sheet.
const GAP: u8 = 128;

/// Inpaint: fill the masked part of an image to fit the rest (RePaint)
#[derive(clap::Args)]
#[command(
    after_help = "White in the mask is filled, black is kept. In a mask of two values, such as 0 and 1, the brighter\n\
    is filled; in one of a single colour, what is opaque. The program prints how it read the mask.\n\nExamples:\n  \
    ddpm inpaint runs/run-001 cat.png --mask mask.png                  four results and a sheet\n  \
    ddpm inpaint runs/run-001 cat.png --mask mask.png -n 16 --seed 7   sixteen others\n  \
    ddpm inpaint runs/run-001 cat.png --mask mask.png --resamplings 10 fits better, takes longer"
)]
pub struct Args {
    /// Image to inpaint
    #[arg(index = 2)]
    image: PathBuf,
    /// Mask of the same size: white is filled, black is kept
    #[arg(long, value_name = "FILE")]
    mask: PathBuf,
    /// Invert the mask: black is filled, white is kept
    #[arg(long)]
    invert_mask: bool,
    /// Number of results
    #[arg(short = 'n', long = "count", value_name = "N", default_value_t = 4)]
    count: usize,
    /// Denoising steps [default: 100]
    #[arg(long, value_name = "N")]
    steps: Option<usize>,
    /// Steps that a jump goes back [default: 5]
    #[arg(long, value_name = "N")]
    jump: Option<usize>,
    /// Times each jump's steps are run: more fit the result better to the rest but take proportionally longer; 1 disables
    /// jumps, the paper uses 10
    #[arg(long, value_name = "N", default_value_t = RESAMPLINGS)]
    resamplings: usize,
    #[command(flatten)]
    levels: LevelFlags,
    #[command(flatten)]
    batch: BatchFlags,
    #[command(flatten)]
    edit: EditFlags,
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let (spacing, threshold) = (args.levels.spacing, args.levels.threshold());
    let sampling = SamplerOptions { steps: args.steps, spacing, threshold, ..SamplerOptions::default() };
    let (count, seed, batch) = (args.count, args.batch.seed, args.batch.batch_size);
    let editor =
        args.edit.open(|_| Ok(SampleRequest { count, seed, batch, sampling, ..SampleRequest::default() }))?;
    let pipeline = editor.pipeline();
    let schedule = pipeline.schedule();
    let sampling = editor.request.sampling;
    let steps = sampling.steps.unwrap_or(STEPS.min(schedule.timesteps_with_signal()));
    let sampling = SamplerOptions { steps: Some(steps), ..sampling };
    let levels = sampling.levels(schedule, pipeline.config().diffusion.prediction)?;
    let jump = args.jump.unwrap_or(JUMP.min(steps / 2).max(1));
    // A single step leaves nothing to jump back to.
    let resamplings = if args.jump.is_none() && steps == 1 { 1 } else { args.resamplings };
    let threshold = sampling.threshold.unwrap_or_default();
    let repaint = RePaint { levels, jump, resamplings, variance: sampling.variance, threshold };
    repaint.check()?;
    let image = editor.image(&args.image)?;
    let gap = gap(&args.mask, &image, &pipeline.config().data_options(), args.invert_mask)?;
    status!("{}: {}", ddpm::text::shown(&args.mask), gap.taken);

    let flags = given([
        ("invert-mask", args.invert_mask.then(|| "yes".to_owned())),
        ("steps", args.steps.map(|n| n.to_string())),
        ("jump", args.jump.map(|n| n.to_string())),
        ("resamplings", (args.resamplings != RESAMPLINGS).then(|| args.resamplings.to_string())),
    ]);
    let mut folder = editor.folder(EditRequest {
        command: "inpaint",
        what: format!("inpaint-{}-{}-seed-{seed}", stem(&args.image), stem(&args.mask)),
        explicit: [flags, args.levels.explicit_flags()].concat(),
        files: vec![("image", args.image.clone()), ("mask", args.mask.clone())],
        request: vec![
            ("invert_mask", args.invert_mask.into()),
            ("steps", steps.into()),
            ("jump", jump.into()),
            ("resamplings", resamplings.into()),
        ],
    })?;
    let finished = editor.sample(
        &mut folder,
        "filling",
        &mut |denoiser, seeds, on_step| repaint.fill(denoiser, seeds, &image.values, &gap.unknown, on_step),
        &mut |_, _| Ok(()),
    )?;
    if !finished {
        return Ok(ExitCode::from(crate::INTERRUPTED));
    }
    let input = Image::from_unit(&image.values, image.shape);
    let mut masked = input.clone();
    masked.data.iter_mut().zip(&gap.unknown).filter(|(_, unknown)| **unknown).for_each(|(v, _)| *v = GAP);
    let before = vec![(input, "input".to_owned()), (masked, "mask".to_owned())];
    editor.write_sheet(
        &folder,
        SheetParts { before, caption: &|i| format!("filled {i}"), after: Vec::new() },
    )?;
    Ok(ExitCode::SUCCESS)
}
