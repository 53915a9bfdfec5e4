//! `ddpm vary`.

use super::edit::{EditFlags, Named, Shown};
use super::flags::{BatchFlags, SamplerFlags, given, stem};
use ddpm::edit::Vary;
use ddpm::generate::Request;
use ddpm::image::Image;
use std::path::PathBuf;
use std::process::ExitCode;

/// Part of the timesteps unless another is asked for.
const STRENGTH: f64 = 0.5;

/// Vary an image: noise it, and draw on from there (SDEdit)
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  \
    ddpm vary runs/run-001 cat.png                   seven variations, and a sheet of them\n  \
    ddpm vary runs/run-001 cat.png --strength 0.3    nearer to the image\n  \
    ddpm vary runs/run-001 sketch.png --strength 0.7   what the run makes of a sketch")]
pub struct Args {
    /// The image
    #[arg(index = 2)]
    image: PathBuf,
    /// Part of the timesteps that the image is noised by: 0 gives it back, 1 is a drawing from noise
    #[arg(long, value_name = "PART", default_value_t = STRENGTH, allow_negative_numbers = true)]
    strength: f64,
    /// How many variations
    #[arg(short = 'n', long = "count", value_name = "N", default_value_t = 7)]
    count: usize,
    #[command(flatten)]
    sampler: SamplerFlags,
    #[command(flatten)]
    many: BatchFlags,
    #[command(flatten)]
    edit: EditFlags,
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let (count, seed, batch) = (args.count, args.many.seed, args.many.batch_size);
    let editor = args.edit.open(|run| {
        Ok(Request { count, seed, batch, sampling: args.sampler.options(run)?, ..Request::default() })
    })?;
    let generator = editor.generator();
    let prediction = generator.config().diffusion.prediction;
    let vary = Vary::new(editor.request.sampling, generator.schedule(), prediction, args.strength)?;
    let image = editor.image(&args.image)?;
    let strength = given([("strength", (args.strength != STRENGTH).then(|| args.strength.to_string()))]);
    let mut folder = editor.folder(Named {
        command: "vary",
        what: format!("vary-{}-seed-{seed}", stem(&args.image)),
        said: [strength, args.sampler.said()].concat(),
        files: vec![("image", args.image.clone())],
        request: vec![("strength", args.strength.into())],
    })?;
    let whole = editor.draw(
        &mut folder,
        "varying",
        &mut |denoiser, seeds, on_step| vary.draw(denoiser, seeds, &image.numbers, on_step),
        &mut |_, _| Ok(()),
    )?;
    if !whole {
        return Ok(ExitCode::from(crate::INTERRUPTED));
    }
    let before = vec![(Image::from_unit(&image.numbers, image.shape), "input".to_owned())];
    editor.finish(&folder, Shown { before, caption: &|i| format!("varied {i}"), after: Vec::new() })?;
    Ok(ExitCode::SUCCESS)
}
