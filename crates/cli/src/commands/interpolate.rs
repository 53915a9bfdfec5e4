//! `ddpm interpolate`.

use super::edit::{EditFlags, EditRequest, Editor, SheetParts};
use super::flags::{given, stem};
use super::folder::ImageFolder;
use anyhow::{Context, bail};
use ddpm::edit::{Inversion, slerp};
use ddpm::image::Image;
use ddpm::pipeline::SampleRequest;
use ddpm::process::Prediction;
use ddpm::sampler::{Ddim, Levels, NoiseKey, Sampler, SamplerOptions, Threshold, find};
use ddpm_rng::Purpose;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Interpolate between two images in noise space (DDIM inversion)
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  \
    ddpm interpolate runs/run-001 a.png b.png            eight images and a sheet\n  \
    ddpm interpolate runs/run-001 seed:3 seed:4 -n 16    between the samples of two seeds\n  \
    ddpm interpolate runs/run-001 a.png seed:7           from an image to a sample")]
pub struct Args {
    /// First image: a file, or seed:N for the run's sample with that seed
    #[arg(index = 2, value_name = "A")]
    from: PathBuf,
    /// Last image, likewise
    #[arg(index = 3, value_name = "B")]
    to: PathBuf,
    /// Number of images, including both ends
    #[arg(short = 'n', long = "n", alias = "count", value_name = "N", default_value_t = 8)]
    count: usize,
    /// DDIM steps [default: 50]
    #[arg(long, value_name = "N")]
    steps: Option<usize>,
    /// Maximum iterations per inverted step; stops once the forward step undoes it
    #[arg(long, value_name = "N", default_value_t = ITERATIONS)]
    iterations: usize,
    #[command(flatten)]
    edit: EditFlags,
}

/// Default maximum iterations per inverted step.
const ITERATIONS: usize = 200;
/// Maximum error of an inverted step, of values in [-1, 1]: an eightieth of one grey level of 255.
const TOLERANCE: f32 = 1e-4;

/// Error of a reproduced end, in grey levels of 255, above which the message says what helps.
const FAR: f32 = 8.0;

/// An end of the interpolation.
enum End {
    /// The run's sample with a seed.
    Seed(u64),
    /// An image, in the format of the run's images.
    Image(Vec<f32>),
}

impl End {
    fn open(path: &Path, editor: &Editor<'_>) -> anyhow::Result<Self> {
        match path.to_str().and_then(|text| text.strip_prefix("seed:")) {
            Some(seed) => {
                let number = seed.parse().ok();
                Ok(Self::Seed(number.with_context(|| format!("seed:{seed}: give an integer, e.g. seed:3"))?))
            }
            None => Ok(Self::Image(editor.image(path)?.values)),
        }
    }

    /// The end in `request.json`, which identifies an image by its file.
    fn kind(&self) -> String {
        if let Self::Seed(seed) = self { format!("seed {seed}") } else { "an image".to_owned() }
    }

    fn image(&self) -> Option<&[f32]> {
        if let Self::Image(x_0) = self { Some(x_0) } else { None }
    }
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let threshold = Some(Threshold::None);
    let sampling =
        SamplerOptions { sampler: find("ddim")?, steps: args.steps, threshold, ..SamplerOptions::default() };
    let editor =
        args.edit.open(|_| Ok(SampleRequest { count: args.count, sampling, ..SampleRequest::default() }))?;
    if args.count < 2 {
        bail!("-n {}: the images include both ends; give at least 2", args.count);
    }
    let (pipeline, interrupted) = (editor.pipeline(), crate::INTERRUPTED);
    let schedule = pipeline.schedule();
    let paths = [&args.from, &args.to];
    let ends = [End::open(paths[0], &editor)?, End::open(paths[1], &editor)?];
    // Inversion cannot reach a level without signal, so use the levels of a network that predicts noise.
    let inverts = ends.iter().any(|end| end.image().is_some());
    let prediction = if inverts { Prediction::Eps } else { pipeline.config().diffusion.prediction };
    let levels = sampling.levels(schedule, prediction)?;
    let mut folder = open_folder(&args, &editor, &ends, levels.steps())?;

    let values = pipeline.shape().num_elements();
    let Some([a, b]) = noises(&args, &editor, &ends, &levels)? else {
        return Ok(ExitCode::from(interrupted));
    };
    let ddim = Ddim { levels, eta: 0.0, threshold: Threshold::None, use_clipped_model_output: false };
    let part = |i: usize| (i as f64 / (args.count - 1) as f64).min(1.0);
    let mut reproduced: [Option<Vec<f32>>; 2] = [None, None];
    let finished = editor.sample(
        &mut folder,
        "sampling",
        &mut |denoiser, seeds, on_step| {
            // The last batch may be larger than the number of images left.
            let x: Vec<f32> =
                (0..denoiser.batch()).flat_map(|i| slerp(&a, &b, part(seeds.first as usize + i))).collect();
            ddim.sample_from(Some(&x), denoiser, seeds, on_step)
        },
        &mut |first, x| {
            let count = x.len() / values;
            if first == 0 {
                reproduced[0] = Some(x[..values].to_vec());
            }
            if first + count == args.count {
                reproduced[1] = Some(x[x.len() - values..].to_vec());
            }
            Ok(())
        },
    )?;
    if !finished {
        return Ok(ExitCode::from(interrupted));
    }

    let input = |i: usize| {
        let x_0 = ends[i].image()?;
        if let Some(again) = &reproduced[i] {
            let off = 127.5 * farthest(x_0, again);
            let more = if off <= FAR { "" } else { "; more --steps or a lower --guidance bring it closer" };
            status!("{} is reproduced within {off:.2} of 255{more}", ddpm::text::shown(paths[i]));
        }
        Some((Image::from_unit(x_0, pipeline.shape()), "input".to_owned()))
    };
    let (before, after) = (input(0).into_iter().collect(), input(1).into_iter().collect());
    editor.write_sheet(
        &folder,
        SheetParts { before, caption: &|i| format!("{:.0} %", 100.0 * part(i)), after },
    )?;
    Ok(ExitCode::SUCCESS)
}

/// Opens the output folder.
fn open_folder(args: &Args, editor: &Editor, ends: &[End; 2], steps: usize) -> anyhow::Result<ImageFolder> {
    let paths = [&args.from, &args.to];
    let files = ["first", "last"].into_iter().zip(paths).zip(ends);
    let name = |path: &Path| stem(path).replace(':', "-");
    editor.folder(EditRequest {
        command: "interpolate",
        what: format!("interpolate-{}-{}", name(paths[0]), name(paths[1])),
        explicit: given([
            ("steps", args.steps.map(|n| n.to_string())),
            ("iterations", (args.iterations != ITERATIONS).then(|| args.iterations.to_string())),
        ]),
        files: files
            .filter(|(_, end)| end.image().is_some())
            .map(|((key, path), _)| (key, path.clone()))
            .collect(),
        request: vec![
            ("ends", format!("{} to {}", ends[0].kind(), ends[1].kind()).into()),
            // The position of image i depends on it.
            ("images", args.count.into()),
            ("steps", steps.into()),
            ("iterations", args.iterations.into()),
        ],
    })
}

/// The noise that DDIM turns into each end; `None` if interrupted.
fn noises(
    args: &Args,
    editor: &Editor,
    ends: &[End; 2],
    levels: &Levels,
) -> anyhow::Result<Option<[Vec<f32>; 2]>> {
    let values = editor.pipeline().shape().num_elements();
    let x_0: Vec<f32> = ends.iter().filter_map(End::image).flatten().copied().collect();
    let mut noises = Vec::new();
    if !x_0.is_empty() {
        let inversion =
            Inversion { levels: levels.clone(), iterations: args.iterations, tolerance: TOLERANCE };
        let request = SampleRequest { count: x_0.len() / values, ..editor.request };
        let found = editor.values(request, "finding the noise", &mut |denoiser, _, on_step| {
            inversion.invert(denoiser, &x_0, on_step)
        })?;
        let Some(found) = found else { return Ok(None) };
        noises = found;
    }
    let mut found = noises.chunks(values);
    let mut noise = |end: &End| match end {
        End::Image(_) => found.next().unwrap_or_default().to_vec(),
        End::Seed(seed) => {
            let mut x = vec![0.0; values];
            NoiseKey { seed: *seed, first: 0 }.fill(Purpose::SampleStart, 0, values, &mut x);
            x
        }
    };
    Ok(Some([noise(&ends[0]), noise(&ends[1])]))
}

/// Maximum absolute difference of two images, the second clamped to [-1, 1]; NaN if any value is NaN.
fn farthest(a: &[f32], b: &[f32]) -> f32 {
    // `f32::max` would ignore a NaN.
    let off = a.iter().zip(b).map(|(a, b)| (a - b.clamp(-1.0, 1.0)).abs());
    off.fold(0.0, |most, off| if off > most || off.is_nan() { off } else { most })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nan_is_never_reproduced() {
        assert_eq!(farthest(&[0.5, -1.0], &[0.25, -3.0]), 0.25);
        assert!(farthest(&[0.5, 0.0], &[f32::NAN, 0.0]).is_nan());
        assert!(farthest(&[0.0, 0.5], &[0.0, f32::NAN]).is_nan());
    }
}
