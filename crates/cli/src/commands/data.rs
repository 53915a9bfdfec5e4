//! `ddpm data`.

use crate::commands::pairs;
use crate::progress::human_bytes;
use ddpm::config::{Config, OnBadFile};
use ddpm::config::{check_data, open_data};
use ddpm::data::{Check, FormatCount, ImageShape, ShuffledSampler};
use ddpm::image::Image;
use ddpm::output::{self, FileKind};
use ddpm::plot::{Sheet, sheet};
use ddpm::text::{escaped, escaped_lines, shown, thousands};
use ddpm::train::memory;
use std::io::{Write, stdout};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Maximum lines of each list without `--all`.
const LISTED: usize = 20;

/// Inspect images before training on them
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    Check(CheckArgs),
    Show(ShowArgs),
}

/// Read every image and report formats, classes, unreadable files, duplicates, memory
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  \
    ddpm data check photos                       a folder of images, or one subfolder per class\n  \
    ddpm data check photos.zip --size 64         a zip, read in place, for training at 64x64\n  \
    ddpm data check hands --set data.csv=hands.csv --set data.csv_label_column=male\n  \
    ddpm data check --config mine.toml           the data of a settings file\n\n\
    Exits with status 1 if training would refuse the images.")]
struct CheckArgs {
    #[command(flatten)]
    data: DataArgs,
    /// List all sizes, classes, unreadable files and duplicates
    #[arg(long)]
    all: bool,
}

/// Write a grid of the images as the network will see them, after all transforms
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  \
    ddpm data show photos --size 64              the first 64 images of training, in data.png\n  \
    ddpm data show photos --size 64 -n 16 -o look.png --seed 7\n  \
    ddpm data show photos --size 64 --set data.horizontal_flip=true --set data.random_crop_scale=0.8,1")]
struct ShowArgs {
    #[command(flatten)]
    data: DataArgs,
    /// Number of images
    #[arg(short = 'n', long = "count", value_name = "N", default_value_t = 64)]
    count: usize,
    /// Seed of order and random transforms; training with this seed begins with these images
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Output PNG
    #[arg(short, long, value_name = "FILE", default_value = "data.png")]
    out: PathBuf,
    /// Overwrite an existing file not written by ddpm
    #[arg(long)]
    overwrite: bool,
}

/// The images and the settings they are read with, as for `ddpm train`.
#[derive(clap::Args)]
struct DataArgs {
    /// Image folder or zip, folder of IDX files or CIFAR batches, or one such file; data.path by default
    path: Option<String>,
    /// Preset (`ddpm config --list`)
    #[arg(long, value_name = "NAME")]
    preset: Option<String>,
    /// Settings file: TOML, or the YAML of the DDPM-Pytorch tutorial
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Resize images to this size: one side, or HEIGHTxWIDTH
    #[arg(long, value_name = "SIZE")]
    size: Option<String>,
    /// Convert images to this many channels: 1 grey, 3 RGB, 2 or 4 with alpha
    #[arg(long, value_name = "N")]
    channels: Option<usize>,
    /// What to do with unreadable files: fail or skip
    #[arg(long, value_name = "ACTION")]
    on_bad_file: Option<String>,
    /// Any other setting (`ddpm config`), e.g. data.csv=a.csv; repeatable
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
}

impl DataArgs {
    /// The settings that training would have with these flags.
    fn config(&self, more: &[(String, String)]) -> anyhow::Result<Config> {
        let mut all = pairs(&self.set)?;
        let mut flag = |key: &str, value: Option<String>| all.extend(value.map(|v| (key.to_owned(), v)));
        flag("data.path", self.path.clone());
        flag("data.size", self.size.clone());
        flag("data.channels", self.channels.map(|v| v.to_string()));
        flag("data.on_bad_file", self.on_bad_file.clone());
        all.extend(more.iter().cloned());
        let custom_data = self.path.as_deref().is_some_and(|d| d != "digits") && self.config.is_none();
        let preset = self.preset.as_deref().or(custom_data.then_some("images"));
        let loaded = Config::load_with_notes(preset, self.config.as_deref(), &all)?;
        for note in &loaded.notes {
            status!("note: {note}");
        }
        Ok(loaded.config)
    }
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    match args.command {
        Command::Check(args) => check(&args),
        Command::Show(args) => show(&args),
    }
}

fn check(args: &CheckArgs) -> anyhow::Result<ExitCode> {
    let config = args.data.config(&[])?;
    let Check { source, images, found, classes, unreadable, duplicates, notes, decoded_bytes, set } =
        check_data(&config)?;
    let out = &mut stdout().lock();
    let most = if args.all { usize::MAX } else { LISTED };
    let more = |n: usize| (n > most).then(|| format!("and {} more (--all lists them)", thousands(n - most)));

    line(out, "data", &escaped(&source))?;
    line(out, "images", &thousands(images))?;
    block(out, "formats", formats(&found, most).into_iter())?;
    let listed = classes.iter().map(|(name, n)| format!("{:>8}  {}", thousands(*n), escaped(name)));
    line(out, "classes", &if classes.is_empty() { "none".into() } else { thousands(classes.len()) })?;
    block(out, "", listed.take(most).chain(more(classes.len())))?;
    line(out, "unreadable", &none_or(unreadable.len(), "file", "files"))?;
    let reasons = unreadable.iter().map(|(path, reason)| format!("{}: {}", shown(path), escaped(reason)));
    block(out, "", reasons.take(most).chain(more(unreadable.len())))?;
    let spare = duplicates.iter().map(|group| group.len() - 1).sum();
    line(out, "duplicates", &none_or(spare, "image", "images"))?;
    let groups = duplicates.iter().map(|group| duplicate_line(group, args.all));
    block(out, "", groups.take(most).chain(more(duplicates.len())))?;

    let usable = set.is_ok();
    let refused = match set.map_err(ddpm::Error::from).and_then(|set| {
        let summary = set.summary().into_owned();
        line(out, "trained as", &format!("{}, {} bits per sample", summary.shape, summary.bit_depth))
            .and_then(|()| block(out, "", summary.notes.iter().map(|note| escaped(note).into_owned())))
            .map_err(ddpm::Error::io(Path::new("stdout"), "write the report"))?;
        memory(&config, set)
    }) {
        Ok((network, data)) => {
            let text = format!(
                "{} to train in batches of {}: data {} ({} decoded), network {}",
                human_bytes(data + network),
                config.train.batch_size,
                human_bytes(data),
                human_bytes(decoded_bytes),
                human_bytes(network),
            );
            line(out, "memory", &text)?;
            None
        }
        Err(error) => Some(error.to_string()),
    };
    if !usable {
        block(out, "notes", notes.iter().map(|note| escaped(note).into_owned()))?;
    }
    let bad = (config.data.on_bad_file == OnBadFile::Fail && !unreadable.is_empty()).then(|| {
        format!(
            "{} cannot be read: repair or remove them, or skip them with --on-bad-file skip",
            none_or(unreadable.len(), "file", "files")
        )
    });
    let reasons: Vec<String> = bad.into_iter().chain(refused).collect();
    for reason in &reasons {
        line(out, "refused", &escaped_lines(reason))?;
    }
    Ok(if reasons.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Lists the image formats, or if there are more than `most`, the range of sizes per pixel format.
fn formats(found: &[FormatCount], most: usize) -> Vec<String> {
    let shape = |f: &FormatCount| ImageShape { height: f.height, width: f.width, channels: f.channels };
    if found.len() <= most {
        let form =
            |f: &FormatCount| format!("{:>8}  {}, {} bits per sample", thousands(f.images), shape(f), f.bits);
        return found.iter().map(form).collect();
    }
    // The first of each kind is its most frequent.
    let mut kinds: Vec<(&FormatCount, Vec<&FormatCount>)> = Vec::new();
    for form in found {
        match kinds.iter_mut().find(|(first, _)| (first.channels, first.bits) == (form.channels, form.bits)) {
            Some((_, all)) => all.push(form),
            None => kinds.push((form, vec![form])),
        }
    }
    let range = |all: &[&FormatCount], side: fn(&FormatCount) -> usize| {
        let (least, greatest) =
            all.iter().fold((usize::MAX, 0), |(a, b), f| (a.min(side(f)), b.max(side(f))));
        if least == greatest { least.to_string() } else { format!("{least} to {greatest}") }
    };
    let total = |all: &[&FormatCount]| all.iter().map(|f| f.images as u64).sum::<u64>();
    kinds.sort_by_key(|(_, all)| std::cmp::Reverse(total(all)));
    let line = |(first, all): &(&FormatCount, Vec<&FormatCount>)| {
        let shown = shape(first).to_string();
        let (size, channels) = shown.split_once(' ').unwrap_or((&shown, ""));
        let (n, bits) = (thousands(total(all)), first.bits);
        if all.len() == 1 {
            return format!("{n:>8}  {shown}, {bits} bits per sample");
        }
        let (height, width) = (range(all, |f| f.height), range(all, |f| f.width));
        let (sizes, often) = (thousands(all.len()), thousands(first.images));
        format!(
            "{n:>8}  {height} x {width} {channels}, {bits} bits per sample: {sizes} sizes, most often {size} ({often})"
        )
    };
    let all = "(--all lists every size)".to_owned();
    kinds.iter().map(line).chain([all]).collect()
}

/// One line for a group of duplicates.
fn duplicate_line(group: &[PathBuf], all: bool) -> String {
    const LISTED_NAMES: usize = 5;
    let most = if all { group.len() } else { LISTED_NAMES };
    let names: Vec<_> = group.iter().take(most).map(shown).collect();
    let more = group.len() - names.len();
    let more = if more > 0 { format!(" and {} more", thousands(more)) } else { String::new() };
    names.join(" = ") + &more
}

fn none_or(n: usize, one: &str, many: &str) -> String {
    match n {
        0 => "none".to_owned(),
        1 => format!("1 {one}"),
        n => format!("{} {many}", thousands(n)),
    }
}

/// One line of the report; names are padded to 11 columns.
fn line(out: &mut impl Write, name: &str, text: &str) -> std::io::Result<()> {
    writeln!(out, "{name:11} {text}")
}

/// Lines under one name.
fn block(out: &mut impl Write, name: &str, lines: impl Iterator<Item = String>) -> std::io::Result<()> {
    for (i, text) in lines.enumerate() {
        line(out, if i == 0 { name } else { "" }, &text)?;
    }
    Ok(())
}

fn show(args: &ShowArgs) -> anyhow::Result<ExitCode> {
    anyhow::ensure!(args.count > 0, "-n must be at least 1");
    output::check(&args.out, FileKind::Png, args.overwrite)?;
    let seed: Vec<_> = args.seed.iter().map(|seed| ("train.seed".to_owned(), seed.to_string())).collect();
    let config = args.data.config(&seed)?;
    let data = open_data(&config)?;
    for note in &data.summary().notes {
        status!("note: {}", escaped(note));
    }
    let (seed, count) = (config.train.seed, args.count.min(data.len()));
    let most = sheet::max_images(data.shape());
    anyhow::ensure!(count <= most, "-n {count}: a sheet holds at most {most} images of {}", data.shape());
    let mut values = vec![0.0; data.shape().num_elements()];
    let mut sheet = Sheet { columns: sheet::columns(count, data.shape()), ..Sheet::default() };
    for sample in ShuffledSampler::new(seed, data.len()).batch(0, count) {
        data.read(sample.index, sample.augment_key(seed), &mut values)?;
        sheet.images.push(Image::from_unit(&values, data.shape()));
        let class = data.label(sample.index).and_then(|label| data.classes().get(label as usize));
        sheet.captions.extend(class.cloned());
    }
    sheet.draw()?.save(&args.out)?;
    status!("{}: {count} of {} images, {}", shown(&args.out), thousands(data.len()), data.shape());
    Ok(ExitCode::SUCCESS)
}
