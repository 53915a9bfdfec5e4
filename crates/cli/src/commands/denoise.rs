//! `ddpm denoise`.

use super::edit::{EditFlags, EditRequest, SheetParts};
use super::flags::{SamplerFlags, given, stem};
use anyhow::bail;
use ddpm::data::LoadedImage;
use ddpm::edit::{Denoise, Estimate, estimate, max_noise};
use ddpm::image::Image;
use ddpm::pipeline::SampleRequest;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Denoise an image: its expected clean version, or a sample of it with --sampler or --steps
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  \
    ddpm denoise runs/run-001 noisy.png                    the expected clean image\n  \
    ddpm denoise runs/run-001 noisy.png --sigma 25/255     noise of known sigma\n  \
    ddpm denoise runs/run-001 noisy.png --sampler dpm++2m  a possible clean image: sharper")]
pub struct Args {
    /// Noisy image
    #[arg(index = 2)]
    image: PathBuf,
    /// Standard deviation of the noise relative to the range from black to white, e.g. 25/255; auto estimates it
    #[arg(long, value_name = "SIGMA", default_value = "auto", value_parser = sigma, allow_hyphen_values = true)]
    sigma: Sigma,
    /// Random seed of the sampler
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    #[command(flatten)]
    sampler: SamplerFlags,
    #[command(flatten)]
    edit: EditFlags,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Sigma {
    Auto,
    Of(f64),
}

/// `auto`, a number, or a fraction.
fn sigma(text: &str) -> Result<Sigma, String> {
    if text == "auto" {
        return Ok(Sigma::Auto);
    }
    let number = |text: &str| text.trim().parse::<f64>().ok();
    let sigma = match text.split_once('/') {
        Some((a, b)) => number(a).zip(number(b)).map(|(a, b)| a / b),
        None => number(text),
    };
    sigma
        .map(Sigma::Of)
        .ok_or_else(|| "give a number such as 0.1, a fraction such as 25/255, or auto".to_owned())
}

/// Estimates the noise in the image read from `path`; an error if it exceeds `most`, the maximum that the run can remove.
fn estimated(path: &Path, image: &LoadedImage, most: f64) -> anyhow::Result<Estimate> {
    let found = estimate(&image.values, [image.shape.height, image.shape.width, image.shape.channels]);
    let range = format!("set it with --sigma, e.g. 0.1 or 25/255, up to {most:.3} for this run");
    let name = ddpm::text::shown(path);
    if found.pattern {
        bail!("{name}: its finest details are a pattern or texture, so noise cannot be estimated; {range}");
    }
    if found.sigma > most {
        bail!(
            "{name}: its finest details look like noise of sigma {:.2}, more than this run can remove; {range}",
            found.sigma
        );
    }
    if found.sigma == 0.0 {
        status!(
            "{name}: no noise was found (estimated sigma 0), so the image is returned unchanged; {range}"
        );
    }
    if found.impulses > 0 {
        status!(
            "{name}: {} pixels differ from all their neighbours, as in impulse noise (salt and pepper). The estimate ignores it, and a \
             network trained on Gaussian noise hardly removes it; use a median filter",
            found.impulses
        );
    }
    Ok(found)
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let editor = args.edit.open(|run| {
        Ok(SampleRequest {
            seed: args.seed,
            sampling: args.sampler.options(run)?,
            ..SampleRequest::default()
        })
    })?;
    let pipeline = editor.pipeline();
    let (schedule, prediction) = (pipeline.schedule(), pipeline.config().diffusion.prediction);
    let image = editor.image(&args.image)?;
    let found = match args.sigma {
        Sigma::Of(sigma) => Estimate { sigma, error: 0.0, pattern: false, impulses: 0 },
        Sigma::Auto => estimated(&args.image, &image, max_noise(schedule))?,
    };
    let sigma = found.sigma;
    let sampling = editor.request.sampling;
    let denoise = if args.sampler.any() {
        Denoise::sampled(sampling, schedule, prediction, sigma)?
    } else {
        Denoise::expected(schedule, sigma, sampling.threshold.unwrap_or_default())?
    };
    if args.sigma != Sigma::Auto || sigma > 0.0 {
        let (error, source) = match args.sigma {
            Sigma::Of(_) => (String::new(), ""),
            Sigma::Auto => (
                format!(" +- {:.4}", found.error),
                ", estimated from the image, with fine texture counted as noise",
            ),
        };
        status!(
            "noise of sigma {sigma:.4}{error} ({:.1} of 255){source}: t = {:.1} of {}",
            255.0 * sigma,
            denoise.level().t,
            schedule.timesteps()
        );
    }
    let flags = given([
        ("sigma", (args.sigma != Sigma::Auto).then(|| sigma.to_string())),
        ("seed", args.sampler.any().then(|| args.seed.to_string())),
    ]);
    let mut folder = editor.folder(EditRequest {
        command: "denoise",
        what: format!("denoise-{}", stem(&args.image)),
        explicit: [flags, args.sampler.explicit_flags()].concat(),
        files: vec![("image", args.image.clone())],
        request: vec![("sigma", sigma.into()), ("sampled", args.sampler.any().into())],
    })?;
    let finished = editor.sample(
        &mut folder,
        "denoising",
        &mut |denoiser, seeds, on_step| denoise.apply(denoiser, seeds, &image.values, on_step),
        &mut |_, _| Ok(()),
    )?;
    if !finished {
        return Ok(ExitCode::from(crate::INTERRUPTED));
    }
    let before = vec![(Image::from_unit(&image.values, image.shape), "input".to_owned())];
    editor.write_sheet(
        &folder,
        SheetParts { before, caption: &|_| "denoised".to_owned(), after: Vec::new() },
    )?;
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sigmas_are_numbers_fractions_or_auto() {
        assert_eq!(sigma("auto"), Ok(Sigma::Auto));
        assert_eq!(sigma("0.1"), Ok(Sigma::Of(0.1)));
        assert_eq!(sigma("51/255"), Ok(Sigma::Of(0.2)));
        for bad in ["", "much", "1/2/3", "1/"] {
            assert!(sigma(bad).is_err(), "{bad}");
        }
    }
}
