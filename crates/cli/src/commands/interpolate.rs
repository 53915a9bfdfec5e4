//! `ddpm interpolate`.

use super::edit::{EditFlags, Editor, Named, Shown};
use super::flags::{given, stem};
use anyhow::{Context, bail};
use ddpm::edit::{Inversion, slerp};
use ddpm::generate::Request;
use ddpm::image::Image;
use ddpm::process::Prediction;
use ddpm::sampler::{Ddim, Options, Sampler, Seeds, Threshold, find};
use ddpm_engine::rng::Purpose;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Go from one image to another, through the noise that they come from
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  \
    ddpm interpolate runs/run-001 a.png b.png            eight images, and a sheet of them\n  \
    ddpm interpolate runs/run-001 seed:3 seed:4 -n 16    between the images that two seeds draw\n  \
    ddpm interpolate runs/run-001 a.png seed:7           from an image to a drawn one")]
pub struct Args {
    /// The first image: a file, or seed:N for what the run draws from that seed
    #[arg(index = 2, value_name = "A")]
    from: PathBuf,
    /// The last image
    #[arg(index = 3, value_name = "B")]
    to: PathBuf,
    /// How many images, the two ends among them
    #[arg(short = 'n', long = "n", alias = "count", value_name = "N", default_value_t = 8)]
    count: usize,
    /// DDIM's steps from noise to image; 50 if not given
    #[arg(long, value_name = "N")]
    steps: Option<usize>,
    /// Most iterations with which a step back is solved; it ends before where the step forward undoes it
    #[arg(long, value_name = "N", default_value_t = ITERATIONS)]
    iterations: usize,
    #[command(flatten)]
    edit: EditFlags,
}

/// Iterations unless others are asked for.
const ITERATIONS: usize = 200;
/// The error of a number in [-1, 1] at which a step back is good enough: an eightieth of what one of 255 is.
const TOLERANCE: f32 = 1e-4;

/// Of 255: how far off an end may be before it is said what helps.
const FAR: f32 = 8.0;

/// An end of the way.
enum End {
    /// What the run draws from a seed.
    Seed(u64),
    /// An image, in the run's form.
    Image(Vec<f32>),
}

impl End {
    fn open(path: &Path, editor: &Editor<'_>) -> anyhow::Result<Self> {
        match path.to_str().and_then(|text| text.strip_prefix("seed:")) {
            Some(seed) => {
                let number = seed.parse().ok();
                Ok(Self::Seed(
                    number.with_context(|| format!("seed:{seed}: give a whole number, as seed:3"))?,
                ))
            }
            None => Ok(Self::Image(editor.image(path)?.numbers)),
        }
    }

    /// What it is, for a record; an image is known by its file.
    fn kind(&self) -> String {
        if let Self::Seed(seed) = self { format!("seed {seed}") } else { "an image".to_owned() }
    }

    fn image(&self) -> Option<&[f32]> {
        if let Self::Image(x_0) = self { Some(x_0) } else { None }
    }
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let threshold = Some(Threshold::None);
    let sampling = Options { sampler: find("ddim")?, steps: args.steps, threshold, ..Options::default() };
    let editor = args.edit.open(|_| Ok(Request { count: args.count, sampling, ..Request::default() }))?;
    if args.count < 2 {
        bail!("-n {}: the two ends are among the images; give at least 2", args.count);
    }
    let (generator, request, interrupted) = (editor.generator(), editor.request, crate::INTERRUPTED);
    let schedule = generator.schedule();
    let paths = [&args.from, &args.to];
    let ends = [End::open(paths[0], &editor)?, End::open(paths[1], &editor)?];
    // From where nothing is left of an image there is no way back to it: then as for a network that predicts noise.
    let prediction = match ends.iter().any(|end| end.image().is_some()) {
        true => Prediction::Eps,
        false => generator.config().diffusion.prediction,
    };
    let levels = sampling.levels(schedule, prediction)?;

    let steps = levels.steps();
    let files = ["first", "last"].into_iter().zip(paths).zip(&ends);
    let name = |path: &Path| stem(path).replace(':', "-");
    let mut folder = editor.folder(Named {
        command: "interpolate",
        what: format!("interpolate-{}-{}", name(paths[0]), name(paths[1])),
        said: given([
            ("steps", args.steps.map(|n| n.to_string())),
            ("iterations", (args.iterations != ITERATIONS).then(|| args.iterations.to_string())),
        ]),
        files: files
            .filter(|(_, end)| end.image().is_some())
            .map(|((key, path), _)| (key, path.clone()))
            .collect(),
        request: vec![
            ("ends", format!("{} to {}", ends[0].kind(), ends[1].kind()).into()),
            // How far along an image is depends on it.
            ("images", args.count.into()),
            ("steps", steps.into()),
            ("iterations", args.iterations.into()),
        ],
    })?;

    let values = generator.shape().values();
    let x_0: Vec<f32> = ends.iter().filter_map(End::image).flatten().copied().collect();
    let mut noises = Vec::new();
    if !x_0.is_empty() {
        let inversion =
            Inversion { levels: levels.clone(), iterations: args.iterations, tolerance: TOLERANCE };
        let request = Request { count: x_0.len() / values, ..request };
        let found = editor.values(request, "finding the noise", &mut |denoiser, _, on_step| {
            inversion.invert(denoiser, &x_0, on_step)
        })?;
        let Some(found) = found else { return Ok(ExitCode::from(interrupted)) };
        noises = found;
    }
    let mut found = noises.chunks(values);
    let mut noise = |end: &End| match end {
        End::Image(_) => found.next().unwrap_or_default().to_vec(),
        End::Seed(seed) => {
            let mut x = vec![0.0; values];
            Seeds { seed: *seed, first: 0 }.fill(Purpose::SampleStart, 0, values, &mut x);
            x
        }
    };
    let (a, b) = (noise(&ends[0]), noise(&ends[1]));

    let ddim = Ddim { levels, eta: 0.0, threshold: Threshold::None, use_clipped_model_output: false };
    let part = |i: usize| (i as f64 / (args.count - 1) as f64).min(1.0);
    let mut met: [Option<Vec<f32>>; 2] = [None, None];
    let whole = editor.draw(
        &mut folder,
        "drawing",
        &mut |denoiser, seeds, on_step| {
            // A last batch may have more places than there are images left.
            let x: Vec<f32> =
                (0..denoiser.batch()).flat_map(|i| slerp(&a, &b, part(seeds.first as usize + i))).collect();
            ddim.sample_from(Some(&x), denoiser, seeds, on_step)
        },
        &mut |first, x| {
            let count = x.len() / values;
            if first == 0 {
                met[0] = Some(x[..values].to_vec());
            }
            if first + count == args.count {
                met[1] = Some(x[x.len() - values..].to_vec());
            }
            Ok(())
        },
    )?;
    if !whole {
        return Ok(ExitCode::from(interrupted));
    }

    let own = |i: usize| {
        let x_0 = ends[i].image()?;
        if let Some(again) = &met[i] {
            let off = 127.5 * farthest(x_0, again);
            let more = if off <= FAR { "" } else { "; more --steps or less --guidance come nearer" };
            tell!("{} is met within {off:.2} of 255{more}", ddpm::text::shown(paths[i]));
        }
        Some((Image::from_unit(x_0, generator.shape()), "input".to_owned()))
    };
    let (before, after) = (own(0).into_iter().collect(), own(1).into_iter().collect());
    editor.finish(&folder, Shown { before, caption: &|i| format!("{:.0} %", 100.0 * part(i)), after })?;
    Ok(ExitCode::SUCCESS)
}

/// The greatest difference of two images' numbers, of what can be seen of them; NaN where a number is none.
fn farthest(a: &[f32], b: &[f32]) -> f32 {
    // A maximum would pass over a NaN.
    let off = a.iter().zip(b).map(|(a, b)| (a - b.clamp(-1.0, 1.0)).abs());
    off.fold(0.0, |most, off| if off > most || off.is_nan() { off } else { most })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_number_is_not_met() {
        assert_eq!(farthest(&[0.5, -1.0], &[0.25, -3.0]), 0.25);
        assert!(farthest(&[0.5, 0.0], &[f32::NAN, 0.0]).is_nan());
        assert!(farthest(&[0.0, 0.5], &[0.0, f32::NAN]).is_nan());
    }
}
