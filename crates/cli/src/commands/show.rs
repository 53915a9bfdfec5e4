//! `ddpm show`.

use super::{pairs, size};
use anyhow::bail;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use ddpm::config::open_data;
use ddpm::config::{Config, Size};
use ddpm::data::{AugmentKey, Dataset};
use ddpm::image::Image;
use ddpm::output::{self, FileKind};
use ddpm::plot::{Strip, strips};
use ddpm::process::q_sample;
use ddpm::schedule::{Schedule, ScheduleKind, ScheduleOptions};
use ddpm_rng::{Purpose, Stream};
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

/// Columns of a strip of the forward process, including the image and pure noise.
const MOMENTS: usize = 10;
/// Maximum side of an image in a strip without `--size`, in pixels.
const LONGEST: usize = 128;

/// Plot noise schedules, or the noising of an image
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  \
    ddpm show schedules                     compare the noise schedules: schedules.png\n  \
    ddpm show noising cat.jpg               the forward process on an image: noising.png\n  \
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

/// Plot noise schedules: remaining signal, and signal-to-noise ratio
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  \
    ddpm show schedules                                       all schedules, 1000 timesteps\n  \
    ddpm show schedules --schedule linear --schedule cosine   these two\n  \
    ddpm show schedules --timesteps 300 -o short.png          as in 300-step tutorials\n  \
    ddpm show schedules --set diffusion.zero_terminal_snr=true")]
struct SchedulesArgs {
    #[command(flatten)]
    schedules: Schedules,
    /// Output PNG
    #[arg(short, long, value_name = "FILE", default_value = "schedules.png")]
    out: PathBuf,
    /// Overwrite an existing file not written by ddpm
    #[arg(long)]
    overwrite: bool,
}

/// Show the forward process: an image at ten noise levels, one row per schedule
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  \
    ddpm show noising cat.jpg                     with every schedule\n  \
    ddpm show noising cat.jpg --size 64 --schedule cosine -o cat-noise.png\n  \
    ddpm show noising --data mnist-folder --index 7\n  \
    ddpm show noising                             one of the built-in digits")]
struct NoisingArgs {
    /// Image file
    #[arg(value_name = "IMAGE", conflicts_with_all = ["data", "index"])]
    image: Option<PathBuf>,
    /// Take the image from a data set, as for `ddpm train --data`
    #[arg(long, value_name = "PATH", default_value = "digits")]
    data: String,
    /// Index of the image in the data set
    #[arg(long, value_name = "N", default_value_t = 0)]
    index: usize,
    /// Resize the image: one side, or HEIGHTxWIDTH; at most 128 pixels per side by default
    #[arg(long, value_name = "SIZE")]
    size: Option<String>,
    /// Random seed of the noise, the same in all rows
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    #[command(flatten)]
    schedules: Schedules,
    /// Output PNG
    #[arg(short, long, value_name = "FILE", default_value = "noising.png")]
    out: PathBuf,
    /// Overwrite an existing file not written by ddpm
    #[arg(long)]
    overwrite: bool,
}

#[derive(clap::Args)]
struct Schedules {
    /// Schedule; repeatable; all by default
    #[arg(long = "schedule", value_name = "NAME", value_parser = schedule_parser())]
    schedules: Vec<ScheduleKind>,
    /// Number of diffusion steps T
    #[arg(long, value_name = "N")]
    timesteps: Option<usize>,
    /// Any setting (`ddpm config`), e.g. diffusion.beta_end=0.012; repeatable
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
}

fn schedule_parser() -> impl TypedValueParser<Value = ScheduleKind> {
    PossibleValuesParser::new(ScheduleKind::ALL.map(ScheduleKind::name))
        .try_map(|name| name.parse::<ScheduleKind>())
}

impl Schedules {
    /// Settings based on a preset that does not transform images; `more` overrides `--set`.
    fn config(&self, more: &[(String, String)]) -> anyhow::Result<Config> {
        let mut overrides = pairs(&self.set)?;
        overrides.extend(more.iter().cloned());
        overrides.extend(self.timesteps.map(|t| ("diffusion.timesteps".to_owned(), t.to_string())));
        Ok(Config::load(Some("images"), None, &overrides)?)
    }

    /// The chosen schedules with their names; identical schedules share an entry.
    fn all(&self, config: &Config) -> anyhow::Result<Vec<(String, Schedule)>> {
        let chosen = if self.schedules.is_empty() { &ScheduleKind::ALL[..] } else { &self.schedules };
        let mut all: Vec<(String, Schedule)> = Vec::new();
        for &kind in chosen {
            let schedule = ScheduleOptions { kind, ..config.diffusion.schedule_options() }.build()?;
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
            output::check(&args.out, FileKind::Png, args.overwrite)?;
            let all = args.schedules.all(&args.schedules.config(&[])?)?;
            (ddpm::plot::schedules(&all)?, args.out)
        }
        What::Noising(args) => {
            output::check(&args.out, FileKind::Png, args.overwrite)?;
            (noising(&args)?, args.out)
        }
    };
    image.save(&out)?;
    writeln!(std::io::stdout(), "{}", ddpm::text::shown(&out))?;
    Ok(ExitCode::SUCCESS)
}

fn noising(args: &NoisingArgs) -> anyhow::Result<Image> {
    let path = args.image.as_deref().map_or(args.data.clone(), |p| p.to_string_lossy().into_owned());
    let mut config = args.schedules.config(&[("data.path".to_owned(), path)])?;
    let schedules = args.schedules.all(&config)?;
    // No network constrains the size.
    if let Some(text) = &args.size {
        config.data.size = Some(size(text)?);
    }
    let data = open(&mut config)?;
    if args.index >= data.len() {
        bail!("{} has {} images; give --index 0 to {}", data.summary().source, data.len(), data.len() - 1);
    }
    let shape = data.shape();
    let mut x_0 = vec![0.0; shape.num_elements()];
    data.read(args.index, AugmentKey::default(), &mut x_0)?;
    // All rows share the noise of the image, so that they differ only by schedule.
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

/// Opens the data set, scaled down to fit a strip unless a size is set.
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

/// Evenly spaced step counts from 0 to `timesteps`.
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
