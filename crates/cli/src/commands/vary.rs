//! `ddpm vary`.

use super::edit::{EditFlags, EditRequest, SheetParts};
use super::flags::{BatchFlags, SamplerFlags, given, stem};
use ddpm::edit::Vary;
use ddpm::image::Image;
use ddpm::pipeline::SampleRequest;
use std::path::PathBuf;
use std::process::ExitCode;

/// Default strength.
const STRENGTH: f64 = 0.5;

/// Make variations of an image: add noise, then denoise (SDEdit)
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  \
    ddpm vary runs/run-001 cat.png                     seven variations and a sheet\n  \
    ddpm vary runs/run-001 cat.png --strength 0.3      closer to the image\n  \
    ddpm vary runs/run-001 sketch.png --strength 0.7   an image from a sketch")]
pub struct Args {
    /// Image to vary
    #[arg(index = 2)]
    image: PathBuf,
    /// Fraction of the timesteps to noise the image by: 0 returns it, 1 samples from pure noise
    #[arg(long, value_name = "FRACTION", default_value_t = STRENGTH, allow_negative_numbers = true)]
    strength: f64,
    /// Number of variations
    #[arg(short = 'n', long = "count", value_name = "N", default_value_t = 7)]
    count: usize,
    #[command(flatten)]
    sampler: SamplerFlags,
    #[command(flatten)]
    batch: BatchFlags,
    #[command(flatten)]
    edit: EditFlags,
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let (count, seed, batch) = (args.count, args.batch.seed, args.batch.batch_size);
    let editor = args.edit.open(|run| {
        Ok(SampleRequest {
            count,
            seed,
            batch,
            sampling: args.sampler.options(run)?,
            ..SampleRequest::default()
        })
    })?;
    let pipeline = editor.pipeline();
    let prediction = pipeline.config().diffusion.prediction;
    let vary = Vary::new(editor.request.sampling, pipeline.schedule(), prediction, args.strength)?;
    let image = editor.image(&args.image)?;
    let strength = given([("strength", (args.strength != STRENGTH).then(|| args.strength.to_string()))]);
    let mut folder = editor.folder(EditRequest {
        command: "vary",
        what: format!("vary-{}-seed-{seed}", stem(&args.image)),
        explicit: [strength, args.sampler.explicit_flags()].concat(),
        files: vec![("image", args.image.clone())],
        request: vec![("strength", args.strength.into())],
    })?;
    let finished = editor.sample(
        &mut folder,
        "varying",
        &mut |denoiser, seeds, on_step| vary.sample(denoiser, seeds, &image.values, on_step),
        &mut |_, _| Ok(()),
    )?;
    if !finished {
        return Ok(ExitCode::from(crate::INTERRUPTED));
    }
    let before = vec![(Image::from_unit(&image.values, image.shape), "input".to_owned())];
    editor.write_sheet(
        &folder,
        SheetParts { before, caption: &|i| format!("varied {i}"), after: Vec::new() },
    )?;
    Ok(ExitCode::SUCCESS)
}
