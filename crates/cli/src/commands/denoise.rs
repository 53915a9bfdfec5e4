//! `ddpm denoise`.

use super::edit::{EditFlags, Named, Shown};
use super::flags::{SamplerFlags, given, stem};
use anyhow::bail;
use ddpm::data::Single;
use ddpm::edit::{Denoise, Estimate, estimate, most_noise};
use ddpm::generate::Request;
use ddpm::picture::Picture;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Take the noise from a picture: the expected clean one, or with a sampler or steps one that it may have been
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  \
    ddpm denoise runs/run-001 noisy.png                    the expected clean picture\n  \
    ddpm denoise runs/run-001 noisy.png --sigma 25/255     whose noise is known\n  \
    ddpm denoise runs/run-001 noisy.png --sampler dpm++2m   one that it may have been: sharper")]
pub struct Args {
    /// The noisy picture
    #[arg(index = 2)]
    picture: PathBuf,
    /// Standard deviation of the noise, as a part of the range from black to white (0.1 or 25/255); auto estimates it
    #[arg(long, value_name = "SIGMA", default_value = "auto", value_parser = sigma, allow_hyphen_values = true)]
    sigma: Sigma,
    /// Seed of what a sampler draws
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
    sigma.map(Sigma::Of).ok_or_else(|| "give a number, as 0.1, a fraction, as 25/255, or auto".to_owned())
}

/// What is estimated of the noise in the image from the file `path`, where that can be taken: at most `most`.
fn estimated(path: &Path, image: &Single, most: f64) -> anyhow::Result<Estimate> {
    let found = estimate(&image.numbers, image.shape);
    let range = format!("--sigma gives it, as 0.1 or 25/255, up to {most:.3} for this run");
    let name = ddpm::text::shown(path);
    if found.pattern {
        bail!(
            "{name}: its finest details are a pattern or texture, and no noise that could be estimated; {range}"
        );
    }
    if found.sigma > most {
        bail!(
            "{name}: its finest details look like noise of sigma {:.2}, more than there can be; {range}",
            found.sigma
        );
    }
    if found.sigma == 0.0 {
        tell!("{name}: no noise was found (estimated sigma 0), and the image is returned as it is; {range}");
    }
    if found.impulses > 0 {
        tell!(
            "{name}: {} pixels stand out from all around them, as impulse noise (salt and pepper) does; the estimate does not \
             see it, and a network that knows normal noise hardly takes it away: a median filter does",
            found.impulses
        );
    }
    Ok(found)
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let editor = args.edit.open(|run| {
        Ok(Request { seed: args.seed, sampling: args.sampler.options(run)?, ..Request::default() })
    })?;
    let generator = editor.generator();
    let (schedule, prediction) = (generator.schedule(), generator.config().diffusion.prediction);
    let picture = editor.picture(&args.picture)?;
    let found = match args.sigma {
        Sigma::Of(sigma) => Estimate { sigma, error: 0.0, pattern: false, impulses: 0 },
        Sigma::Auto => estimated(&args.picture, &picture, most_noise(schedule))?,
    };
    let sigma = found.sigma;
    let sampling = editor.request.sampling;
    let denoise = match args.sampler.any() {
        false => Denoise::expected(schedule, sigma, sampling.threshold.unwrap_or_default())?,
        true => Denoise::sampled(sampling, schedule, prediction, sigma)?,
    };
    if args.sigma != Sigma::Auto || sigma > 0.0 {
        let (sure, whence) = match args.sigma {
            Sigma::Of(_) => (String::new(), ""),
            Sigma::Auto => (
                format!(" +- {:.4}", found.error),
                ", estimated from the image, in which fine texture counts as noise",
            ),
        };
        tell!(
            "noise of sigma {sigma:.4}{sure} ({:.1} of 255){whence}: t = {:.1} of {}",
            255.0 * sigma,
            denoise.level().t,
            schedule.timesteps()
        );
    }
    let own = given([
        ("sigma", (args.sigma != Sigma::Auto).then(|| sigma.to_string())),
        ("seed", args.sampler.any().then(|| args.seed.to_string())),
    ]);
    let mut folder = editor.folder(Named {
        command: "denoise",
        what: format!("denoise-{}", stem(&args.picture)),
        said: [own, args.sampler.said()].concat(),
        files: vec![("image", args.picture.clone())],
        request: vec![("sigma", sigma.into()), ("sampled", args.sampler.any().into())],
    })?;
    let whole = editor.draw(
        &mut folder,
        "denoising",
        &mut |denoiser, seeds, on_step| denoise.apply(denoiser, seeds, &picture.numbers, on_step),
        &mut |_, _| Ok(()),
    )?;
    if !whole {
        return Ok(ExitCode::from(crate::INTERRUPTED));
    }
    let before = vec![(Picture::from_unit(&picture.numbers, picture.shape), "input".to_owned())];
    editor.finish(&folder, Shown { before, caption: &|_| "denoised".to_owned(), after: Vec::new() })?;
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
