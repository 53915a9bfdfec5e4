//! `ddpm interpolate`.

use super::flags::{EditFlags, stem};
use ddpm::edit::{Inversion, slerp};
use ddpm::generate::Request;
use ddpm::picture::Picture;
use ddpm::process::Prediction;
use ddpm::sampler::{Ddim, Options, Sampler, Seeds, Threshold, find};
use ddpm_engine::rng::Purpose;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Go from one picture to another, through the noise that they come from
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  \
    ddpm interpolate runs/run-001 a.png b.png            eight pictures, in runs/run-001/samples/interpolate-a-b\n  \
    ddpm interpolate runs/run-001 seed:3 seed:4 -n 16    between the pictures that two seeds draw\n  \
    ddpm interpolate runs/run-001 a.png seed:7           from a picture to a drawn one")]
pub struct Args {
    /// The first picture: a file, or seed:N for what the run draws from that seed
    #[arg(index = 2, value_name = "A")]
    from: PathBuf,
    /// The last picture
    #[arg(index = 3, value_name = "B")]
    to: PathBuf,
    /// How many pictures, the two ends among them
    #[arg(short = 'n', long = "n", alias = "count", value_name = "N", default_value_t = 8)]
    count: usize,
    /// DDIM's steps from noise to picture; 50 if not given
    #[arg(long, value_name = "N")]
    steps: Option<usize>,
    /// Most iterations with which a step back is solved; it ends before where the step forward undoes it
    #[arg(long, value_name = "N", default_value_t = 30)]
    iterations: usize,
    #[command(flatten)]
    edit: EditFlags,
}

/// Steps unless others are asked for.
const STEPS: usize = 50;
/// The error of a number in [-1, 1] at which a step back is good enough: a hundredth of what one of 255 is.
const TOLERANCE: f32 = 1e-4;

/// An end of the way.
enum End {
    Seed(u64),
    File(Vec<f32>),
}

/// The name of an end in the folder's.
fn name(end: &Path) -> String {
    stem(Path::new(&end.to_string_lossy().replace(':', "-")))
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let sampler = find("ddim")?;
    let threshold = Some(Threshold::None);
    let sampling = Options { sampler, steps: args.steps, threshold, ..Options::default() };
    let editor = args.edit.open(Request { count: args.count, sampling, ..Request::default() })?;
    let (generator, request) = (&editor.generator, editor.request);
    let schedule = generator.schedule();
    let steps = args.steps.unwrap_or(STEPS.min(schedule.timesteps_with_signal()));
    // As for a network that predicts noise: where nothing is left of a picture it cannot be found again.
    let levels = Options { steps: Some(steps), ..sampling }.levels(schedule, Prediction::Eps)?;
    let ends = [&args.from, &args.to].map(|path| match path.to_str().and_then(|p| p.strip_prefix("seed:")) {
        Some(seed) => seed.parse().map(End::Seed).map_err(|_| anyhow::anyhow!("seed:{seed}: give a whole number, as seed:3")),
        None => editor.picture(path).map(|picture| End::File(picture.numbers)),
    });
    let [from, to] = ends;
    let ends = [from?, to?];

    let inversion = Inversion { levels: levels.clone(), iterations: args.iterations, tolerance: TOLERANCE };
    let files: Vec<f32> = ends.iter().flat_map(|end| if let End::File(x_0) = end { &x_0[..] } else { &[] }).copied().collect();
    let values = generator.shape().values();
    let mut noises = Vec::new();
    if !files.is_empty() {
        let request = Request { count: files.len() / values, ..request };
        let found = editor.draw(request, "finding the noise", &mut |denoiser, _, on_step| {
            inversion.invert(denoiser, &files, on_step)
        })?;
        let Some(found) = found else { return Ok(ExitCode::from(crate::INTERRUPTED)) };
        noises = found;
    }
    let mut found = noises.chunks(values);
    let [a, b] = [0, 1].map(|i| match &ends[i] {
        End::File(_) => found.next().unwrap_or_default().to_vec(),
        End::Seed(seed) => {
            let mut x = vec![0.0; values];
            Seeds { seed: *seed, first: 0 }.fill(Purpose::SampleStart, 0, values, &mut x);
            x
        }
    });

    let ddim = Ddim { levels, eta: 0.0, threshold: Threshold::None };
    let made = editor.draw(request, "drawing", &mut |denoiser, seeds, on_step| {
        let last = (args.count.max(2) - 1) as f64;
        let part = |i: usize| ((seeds.first as usize + i) as f64 / last).min(1.0);
        let x: Vec<f32> = (0..denoiser.batch()).flat_map(|i| slerp(&a, &b, part(i))).collect();
        ddim.sample_from(Some(&x), denoiser, seeds, on_step)
    })?;
    let Some(made) = made else { return Ok(ExitCode::from(crate::INTERRUPTED)) };
    let pictures = generator.pictures(&made);
    let mut sheet = pictures.clone();
    for (i, end) in ends.iter().enumerate() {
        if let End::File(x_0) = end {
            let again = &made[if i == 0 { 0 } else { made.len() - values }..][..values];
            let off = x_0.iter().zip(again).map(|(a, b)| (a - b.clamp(-1.0, 1.0)).abs()).fold(0.0, f32::max);
            let rms = (x_0.iter().zip(again).map(|(a, b)| f64::from(a - b.clamp(-1.0, 1.0)).powi(2)).sum::<f64>() / values as f64).sqrt();
            tell!("end {i}: max off {:.2} of 255, rms {:.3} of 255; noise max {:.2}", off * 127.5, rms * 127.5, if i == 0 {&a} else {&b}.iter().fold(0f32, |m, x| m.max(x.abs())));
            let own = Picture::from_unit(x_0, generator.shape());
            if i == 0 { sheet.insert(0, own) } else { sheet.push(own) }
        }
    }
    let row = sheet.len();
    editor.write(&format!("interpolate-{}-{}", name(&args.from), name(&args.to)), &pictures, &sheet, row)?;
    Ok(ExitCode::SUCCESS)
}
