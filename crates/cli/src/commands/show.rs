//! `ddpm show`.

use super::pairs;
use anyhow::{Context, bail};
use clap::builder::{PossibleValuesParser, TypedValueParser};
use ddpm::data::{Dataset, Draw};
use ddpm::image::{Image, save_png};
use ddpm::output::{self, Kind};
use ddpm::plot::{Strip, strips};
use ddpm::process::q_sample;
use ddpm::schedule::Schedule;
use ddpm::train::config::{Config, ScheduleKind, Size};
use ddpm::train::open_data;
use ddpm_engine::rng::{Purpose, Stream};
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

/// Moments of a strip of the forward process, the image itself and pure noise among them.
const MOMENTS: usize = 10;
/// Longest side of an image in a strip, in pixels, unless a size is given.
const LONGEST: usize = 128;

/// Draw what is behind a training: noise schedules, and how an image is lost in noise
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  \
    ddpm show schedules                     compare the noise schedules: schedules.png\n  \
    ddpm show noising cat.jpg               how an image is lost in noise: noising.png\n  \
    ddpm show noising --data photos --size 64 --schedule linear --schedule cosine")]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(clap::Subcommand)]
enum What {
    Schedules(SchedulesArgs),
    Noising(NoisingArgs),
}

/// Plot the noise schedules side by side: what is left of the image, and the signal-to-noise ratio
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  \
    ddpm show schedules                                       all schedules, 1000 timesteps\n  \
    ddpm show schedules --schedule linear --schedule cosine   these two\n  \
    ddpm show schedules --timesteps 300 -o short.png          as the 300-step tutorials have it\n  \
    ddpm show schedules --set diffusion.zero_terminal_snr=true")]
struct SchedulesArgs {
    #[command(flatten)]
    schedules: Schedules,
    /// The PNG that is written
    #[arg(short, long, value_name = "FILE", default_value = "schedules.png")]
    out: PathBuf,
    /// Replace a file that this program did not make
    #[arg(long)]
    overwrite: bool,
}

/// Draw the forward process: an image at ten moments from itself to noise, a row for each schedule
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  \
    ddpm show noising cat.jpg                     with every schedule\n  \
    ddpm show noising cat.jpg --size 64 --schedule cosine -o cat-noise.png\n  \
    ddpm show noising --data mnist-folder --index 7\n  \
    ddpm show noising                             one of the built-in digits")]
struct NoisingArgs {
    /// An image file
    #[arg(value_name = "IMAGE", conflicts_with_all = ["data", "index"])]
    image: Option<PathBuf>,
    /// Take the image from a data set: all that `ddpm train --data` takes
    #[arg(long, value_name = "PATH", default_value = "digits")]
    data: String,
    /// Which image of the data set, from 0
    #[arg(long, value_name = "N", default_value_t = 0)]
    index: usize,
    /// Bring the image to this size: one side, or HEIGHTxWIDTH; at most 128 pixels a side if not given
    #[arg(long, value_name = "SIZE")]
    size: Option<String>,
    /// Seed of the noise, the same in all rows
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    #[command(flatten)]
    schedules: Schedules,
    /// The PNG that is written
    #[arg(short, long, value_name = "FILE", default_value = "noising.png")]
    out: PathBuf,
    /// Replace a file that this program did not make
    #[arg(long)]
    overwrite: bool,
}

#[derive(clap::Args)]
struct Schedules {
    /// A schedule; may be given more than once. All if not given
    #[arg(long = "schedule", value_name = "NAME", value_parser = schedule_parser())]
    schedules: Vec<ScheduleKind>,
    /// Number of diffusion steps T
    #[arg(long, value_name = "N")]
    timesteps: Option<usize>,
    /// Any setting, as diffusion.beta_end=0.012 (see `ddpm config`); may be given more than once
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
}

fn schedule_parser() -> impl TypedValueParser<Value = ScheduleKind> {
    PossibleValuesParser::new(ScheduleKind::ALL.map(ScheduleKind::name))
        .try_map(|name| name.parse::<ScheduleKind>())
}

impl Schedules {
    /// The settings, over a preset that leaves the images as they are; `more` goes over `--set`.
    fn config(&self, more: &[(String, String)]) -> anyhow::Result<Config> {
        let mut overrides = pairs(&self.set)?;
        overrides.extend(more.iter().cloned());
        overrides.extend(self.timesteps.map(|t| ("diffusion.timesteps".to_owned(), t.to_string())));
        Ok(Config::load(Some("images"), None, &overrides)?)
    }

    /// The chosen schedules by name; equal ones together.
    fn all(&self, config: &Config) -> anyhow::Result<Vec<(String, Schedule)>> {
        let chosen = if self.schedules.is_empty() { &ScheduleKind::ALL[..] } else { &self.schedules };
        let mut all: Vec<(String, Schedule)> = Vec::new();
        for &kind in chosen {
            let mut diffusion = config.diffusion.clone();
            diffusion.schedule = kind;
            let schedule = Schedule::from_config(&diffusion)?;
            match all.iter_mut().find(|(_, other)| *other == schedule) {
                Some((name, _)) if !name.split(", ").any(|n| n == kind.name()) => {
                    *name += &format!(", {kind}");
                }
                Some(_) => {}
                None => all.push((kind.to_string(), schedule)),
            }
        }
        Ok(all)
    }
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let (image, out) = match args.what {
        What::Schedules(args) => {
            output::check(&args.out, Kind::Png, args.overwrite)?;
            let all = args.schedules.all(&args.schedules.config(&[])?)?;
            (ddpm::plot::schedules(&all)?, args.out)
        }
        What::Noising(args) => {
            output::check(&args.out, Kind::Png, args.overwrite)?;
            (noising(&args)?, args.out)
        }
    };
    save_png(&image, &out)?;
    writeln!(std::io::stdout(), "{}", ddpm::text::shown(&out))?;
    Ok(ExitCode::SUCCESS)
}

fn noising(args: &NoisingArgs) -> anyhow::Result<Image> {
    let path = args.image.as_deref().map_or(args.data.clone(), |p| p.to_string_lossy().into_owned());
    let mut config = args.schedules.config(&[("data.path".to_owned(), path)])?;
    let schedules = args.schedules.all(&config)?;
    // No network sees the image: any size does.
    if let Some(text) = &args.size {
        config.data.size = Some(size(text)?);
    }
    let data = open(&mut config)?;
    if args.index >= data.len() {
        bail!("{} has {} images; give --index 0 to {}", data.summary().source, data.len(), data.len() - 1);
    }
    let shape = data.shape();
    let mut x_0 = vec![0.0; shape.values()];
    data.read(args.index, Draw::default(), &mut x_0)?;
    // A noise of its own for each image, which all rows share: they differ by the schedule alone.
    let mut eps = vec![0.0; x_0.len()];
    Stream::new(args.seed, Purpose::Noise, 0, args.index as u32).fill_normal(&mut eps);

    let moments = moments(config.diffusion.timesteps);
    let columns: Vec<String> = moments.iter().map(|t| format!("t = {t}")).collect();
    let mut x_t = vec![0.0; x_0.len()];
    let rows: Vec<Strip> = schedules
        .into_iter()
        .map(|(label, schedule)| {
            let image = |&steps: &usize| match steps {
                0 => Image::from_unit(&x_0, shape),
                t => {
                    q_sample(&schedule, t - 1, &x_0, &eps, &mut x_t);
                    Image::from_unit(&x_t, shape)
                }
            };
            Strip { label, images: moments.iter().map(image).collect() }
        })
        .collect();
    let title = format!("The image after t of T = {} steps of noise", config.diffusion.timesteps);
    Ok(strips(&title, &columns, &rows)?)
}

/// `28` or `28x32`.
fn size(text: &str) -> anyhow::Result<Size> {
    let (height, width) = text.split_once(['x', 'X']).unwrap_or((text, text));
    let side = |side: &str| side.trim().parse().ok();
    side(height)
        .zip(side(width))
        .map(|(height, width)| Size { height, width })
        .with_context(|| format!("--size {text}: give one side in pixels, or HEIGHTxWIDTH, as 28x32"))
}

/// Opens the data set, its images no larger than fits a strip unless they have a size already.
fn open(config: &mut Config) -> anyhow::Result<Box<dyn Dataset>> {
    let data = open_data(config)?;
    let shape = data.shape();
    let longest = shape.height.max(shape.width);
    if config.data.size.is_some() || longest <= LONGEST {
        return Ok(data);
    }
    let side = |side: usize| (side * LONGEST).div_ceil(longest);
    config.data.size = Some(Size { height: side(shape.height), width: side(shape.width) });
    Ok(open_data(config)?)
}

/// Numbers of steps from none to `timesteps`, evenly spaced.
fn moments(timesteps: usize) -> Vec<usize> {
    let last = MOMENTS - 1;
    let mut moments: Vec<usize> = (0..=last).map(|i| (2 * i * timesteps + last) / (2 * last)).collect();
    moments.dedup();
    moments
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_go_from_the_image_to_noise() {
        assert_eq!(moments(1000), [0, 111, 222, 333, 444, 556, 667, 778, 889, 1000]);
        assert_eq!(moments(9), [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
        assert_eq!(moments(2), [0, 1, 2]);
        assert_eq!(moments(1), [0, 1]);
    }
}
