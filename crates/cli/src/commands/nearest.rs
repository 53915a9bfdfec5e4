//! `ddpm nearest`.

use super::drawing::save_sheet;
use super::flags::DataFlags;
use super::folder::ImageFolder;
use super::sample::{self, Drawing};
use crate::progress::Progress;
use anyhow::bail;
use ddpm::data::{Dataset, Draw};
use ddpm::generate::Generator;
use ddpm::image::{Image, read_png};
use ddpm::nearest::{Judged, LEAST, Nearest, Verdict, among, judge, nearest, quantile};
use ddpm::output::DISTANCES;
use ddpm::plot::Sheet;
use ddpm::train::write_file;
use std::io::Write;
use std::process::ExitCode;
use std::sync::atomic::Ordering;

/// Images of the data whose nearest others are looked for.
const AMONG: usize = 1000;
/// Samples that are looked for at once.
const AT_ONCE: usize = 4096;
/// Most pairs that are shown, the nearest first, and in a row.
const SHOWN: usize = 64;
const ROW: usize = 4;

/// Find out whether a run copies: draw images, and set the nearest training image beside each
#[derive(clap::Args)]
#[group(skip)]
#[command(after_help = "Examples:\n  \
    ddpm nearest runs/run-001                              64 samples, in runs/run-001/samples/seed-0\n  \
    ddpm nearest runs/run-001 -n 500 --sampler dpm++2m     more, faster\n  \
    ddpm nearest runs/imported --data photos               of an imported run, whose images are not known")]
pub struct Args {
    #[command(flatten)]
    sample: sample::Args,
    #[command(flatten)]
    data: DataFlags,
}

/// The images that samples are compared with.
fn open(generator: &Generator, flags: &DataFlags) -> anyhow::Result<Box<dyn Dataset>> {
    let data = flags.open(generator)?;
    let shape = generator.shape();
    if data.shape() != shape {
        bail!("the data has images of {} now, and the run's are of {shape}", data.shape());
    }
    Ok(data)
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let drawn = sample::draw(&args.sample, |generator| open(generator, &args.data))?;
    let Some((Drawing { generator, folder, stop }, data)) = drawn else {
        return Ok(ExitCode::from(crate::INTERRUPTED));
    };
    let mut progress = Progress::new("comparing", 0);
    let mut on_block = |done: usize, all: usize| {
        progress.set(done as u64, all as u64, String::new);
        if stop.load(Ordering::Relaxed) { Err(ddpm::Error::Interrupted) } else { Ok(()) }
    };
    let mirror = generator.config().data.horizontal_flip;
    let found = search(&folder, &*data, mirror, &mut on_block);
    let found = found.and_then(|found| Ok((found, among(&*data, AMONG, mirror, &mut on_block)?)));
    progress.finish();
    let (found, own) = match found {
        Err(ddpm::Error::Interrupted) => {
            tell!("stopped; the samples are in {}", ddpm::text::shown(folder.images()));
            return Ok(ExitCode::from(crate::INTERRUPTED));
        }
        other => other?,
    };

    let mut order: Vec<usize> = (0..found.len()).collect();
    order.sort_by(|&a, &b| found[a].distance.total_cmp(&found[b].distance));
    let table = folder.beside("nearest.csv");
    let mut text = format!("{DISTANCES}\n");
    for &i in &order {
        let Nearest { index, mirrored, distance } = found[i];
        text += &format!("{i},{index},{mirrored},{distance:.6}\n");
    }
    write_file(&table, text.as_bytes(), "write the distances")?;
    let path = folder.beside("nearest.png");
    save_sheet(&pairs(&folder, &*data, &found, &order)?, &path)?;

    let mut stdout = std::io::stdout();
    for line in summary(&found, &own) {
        writeln!(stdout, "{line}")?;
    }
    writeln!(stdout, "{}\n{}", ddpm::text::shown(&path), ddpm::text::shown(&table))?;
    Ok(ExitCode::SUCCESS)
}

/// The nearest of the data's images for each of a folder's images, so many of these at a time.
fn search(
    folder: &ImageFolder,
    data: &dyn Dataset,
    mirror: bool,
    on_block: &mut dyn FnMut(usize, usize) -> ddpm::Result<()>,
) -> ddpm::Result<Vec<Nearest>> {
    let (count, mut found) = (folder.count(), Vec::new());
    let rounds = count.div_ceil(AT_ONCE);
    for first in (0..count).step_by(AT_ONCE) {
        let read = |i: usize| {
            let image = read_png(&folder.image(i))?;
            Ok(image.data.iter().map(|v| f32::from(*v) / 127.5 - 1.0).collect())
        };
        let samples: Vec<Vec<f32>> =
            (first..count.min(first + AT_ONCE)).map(read).collect::<ddpm::Result<_>>()?;
        let round = first / AT_ONCE;
        found.extend(nearest(data, &samples, mirror, &mut |done, all| {
            on_block(round * all + done, rounds * all)
        })?);
    }
    Ok(found)
}

/// The nearest samples, each beside its training image.
fn pairs(
    folder: &ImageFolder,
    data: &dyn Dataset,
    found: &[Nearest],
    order: &[usize],
) -> anyhow::Result<Sheet> {
    let mut sheet = Sheet { columns: 2 * ROW.min(order.len()), ..Sheet::default() };
    let labels = ["sample", "nearest, distance"].map(str::to_owned);
    sheet.column_labels = labels.iter().cycle().take(sheet.columns).cloned().collect();
    for &i in order.iter().take(SHOWN) {
        let Nearest { index, mirrored, distance } = found[i];
        let turned = if mirrored { ", mirrored" } else { "" };
        sheet.images.extend([read_png(&folder.image(i))?, training_image(data, index)?]);
        sheet.captions.extend([i.to_string(), format!("{index}: {distance:.3}{turned}")]);
    }
    Ok(sheet)
}

fn training_image(data: &dyn Dataset, index: usize) -> anyhow::Result<Image> {
    let mut numbers = vec![0.0; data.shape().values()];
    data.read(index, Draw::default(), &mut numbers)?;
    Ok(Image::from_unit(&numbers, data.shape()))
}

/// What the distances say, in sentences.
fn summary(found: &[Nearest], own: &[Nearest]) -> Vec<String> {
    let range = |all: &[Nearest]| {
        let [least, middle, most] = [0.0, 0.5, 1.0].map(|part| quantile(all, part));
        format!("{least:.4} to {most:.4}, half below {middle:.4}")
    };
    let mut lines = vec![format!("samples to their nearest training image:          {}", range(found))];
    if own.is_empty() {
        lines.push("no verdict: a single training image has no other to measure by".to_owned());
        return lines;
    }
    lines.push(format!("training images to their nearest other (of {:5}):  {}", own.len(), range(own)));
    // Images that are in the data twice are not near by chance, and nothing is nearer than they are.
    let twice = own.iter().filter(|n| n.distance <= 0.0).count();
    if twice > 0 {
        lines.push(format!(
            "{twice} of these {} training images have an exact duplicate, which networks learn by heart first; they are left \
             out of what follows",
            own.len()
        ));
    }
    let judged = judge(found, own);
    let Judged { near, samples, own: apart, verdict } = judged;
    let than = match apart {
        0 => return lines,
        n if n < 100 => format!("any of {n} training images is to another"),
        _ => "99 of 100 training images are to one another".to_owned(),
    };
    let percent = |part: f64| format!("{:.1} %", 100.0 * part);
    let verdict = match verdict {
        Verdict::TooFew => format!(
            "too few to say whether the run copies ({samples} samples and {apart} training images; {LEAST} of both are needed)"
        ),
        Verdict::Copies => {
            "more than chance: the run copies; more images, flips and crops, or fewer steps help".to_owned()
        }
        Verdict::Chance(most) => {
            format!("no more than chance (at most {} of all samples are, at 95 % confidence)", percent(most))
        }
        Verdict::Open(low, high) => format!(
            "no verdict ({} to {} of all samples are, at 95 % confidence); draw more with -n",
            percent(low),
            percent(high)
        ),
    };
    lines.push(format!("{near} of {samples} samples are nearer than {than}: {verdict}"));
    if judged.verdict != Verdict::Copies && quantile(found, 0.5) > 1.5 * quantile(own, 0.99) {
        lines.push(
            "the samples are farther from the data than nearly all of it is from itself: they are not like it yet, and say \
             nothing of copying"
                .to_owned(),
        );
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_are_told_from_chance() {
        let at = |distance| Nearest { index: 0, mirrored: false, distance };
        let own: Vec<_> = (0..1000).map(|i| at(0.1 + f64::from(i) * 1e-4)).collect();
        let fresh: Vec<_> = (0..64).map(|i| at(0.1005 + f64::from(i) * 1e-3)).collect();
        let said = |found: &[Nearest], own: &[Nearest]| summary(found, own).join("\n");
        assert!(said(&fresh, &own).contains("1 of 64 samples are nearer than 99 of 100 training images"));
        assert!(said(&fresh, &own).contains("no more than chance (at most 8.4 % of all samples"));
        let copies: Vec<_> = (0..64).map(|i| at(f64::from(i) * 1e-3)).collect();
        assert!(said(&copies, &own).contains("the run copies"));
        assert!(said(&copies, &[]).contains("no verdict"));
        assert!(said(&copies, &own[..50]).contains("nearer than any of 50 training images is"));
        // Three images, of which one is noise.
        let few = [at(0.01), at(0.02), at(0.7)];
        assert!(said(&few, &own).contains("2 of 3 samples") && said(&few, &own).contains("too few to say"));
        assert!(said(&copies, &few).contains("too few to say"));
        // Samples that are noise.
        let noise: Vec<_> = (0..64).map(|_| at(0.9)).collect();
        assert!(said(&noise, &own).contains("not like it yet"));
        // Duplicates in the data, more than are near by chance, do not hide copies, and are said.
        let twice: Vec<_> = (0..1000).map(|i| at(if i < 40 { 0.0 } else { own[i].distance })).collect();
        let lines = summary(&copies, &twice);
        assert!(
            lines[2].starts_with("40 of these 1000 training images have an exact duplicate"),
            "{lines:?}"
        );
        assert!(lines[3].contains("the run copies"), "{lines:?}");
        assert_eq!(summary(&copies, &twice[..40]).len(), 3, "nothing to measure by");
    }
}
