//! `ddpm nearest`.

use super::flags::DataFlags;
use super::folder::ImageFolder;
use super::sample::{self, Samples};
use super::sampling::save_sheet;
use crate::progress::Progress;
use anyhow::bail;
use ddpm::data::{AugmentKey, Dataset};
use ddpm::image::{Image, read_png};
use ddpm::nearest::{Assessment, MIN_SAMPLES, Nearest, Verdict, assess, nearest, quantile, within_dataset};
use ddpm::output::DISTANCES;
use ddpm::pipeline::Pipeline;
use ddpm::plot::Sheet;
use ddpm::storage::write_file;
use std::io::Write;
use std::process::ExitCode;
use std::sync::atomic::Ordering;

/// Training images whose nearest neighbours serve as reference.
const REFERENCE_IMAGES: usize = 1000;
/// Samples searched for per pass over the data.
const SAMPLES_PER_PASS: usize = 4096;
/// Maximum pairs on the sheet, the nearest first; and pairs in a row.
const MAX_PAIRS: usize = 64;
const PAIRS_PER_ROW: usize = 4;

/// Test a run for memorization: sample, and find the nearest training image of each
#[derive(clap::Args)]
#[group(skip)]
#[command(after_help = "Examples:\n  \
    ddpm nearest runs/run-001                              64 samples, in runs/run-001/samples/seed-0\n  \
    ddpm nearest runs/run-001 -n 500 --sampler dpm++2m     more samples, faster\n  \
    ddpm nearest runs/imported --data photos               an imported run, whose images are unknown")]
pub struct Args {
    #[command(flatten)]
    sample: sample::Args,
    #[command(flatten)]
    data: DataFlags,
}

/// The images that samples are compared with.
fn open(pipeline: &Pipeline, flags: &DataFlags) -> anyhow::Result<Box<dyn Dataset>> {
    let data = flags.open(pipeline)?;
    let shape = pipeline.shape();
    if data.shape() != shape {
        bail!("the images are now {}, but the run was trained on {shape}", data.shape());
    }
    Ok(data)
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let samples = sample::sample_to_folder(&args.sample, |pipeline| open(pipeline, &args.data))?;
    let Some((Samples { pipeline, folder, stop }, data)) = samples else {
        return Ok(ExitCode::from(crate::INTERRUPTED));
    };
    let mut progress = Progress::new("comparing", 0);
    let mut on_block = |done: usize, all: usize| {
        progress.set(done as u64, all as u64, String::new);
        if stop.load(Ordering::Relaxed) { Err(ddpm::Error::Interrupted) } else { Ok(()) }
    };
    let mirror = pipeline.config().data.horizontal_flip;
    let found = search(&folder, &*data, mirror, &mut on_block);
    let found =
        found.and_then(|found| Ok((found, within_dataset(&*data, REFERENCE_IMAGES, mirror, &mut on_block)?)));
    progress.finish();
    let (found, reference) = match found {
        Err(ddpm::Error::Interrupted) => {
            status!("stopped; the samples are in {}", ddpm::text::shown(folder.images()));
            return Ok(ExitCode::from(crate::INTERRUPTED));
        }
        other => other?,
    };

    let mut order: Vec<usize> = (0..found.len()).collect();
    order.sort_by(|&a, &b| found[a].distance.total_cmp(&found[b].distance));
    let table = folder.side_file("nearest.csv");
    let mut text = format!("{DISTANCES}\n");
    for &i in &order {
        let Nearest { index, mirrored, distance } = found[i];
        text += &format!("{i},{index},{mirrored},{distance:.6}\n");
    }
    write_file(&table, text.as_bytes(), "write the distances")?;
    let path = folder.side_file("nearest.png");
    save_sheet(&pairs(&folder, &*data, &found, &order)?, &path)?;

    let mut stdout = std::io::stdout();
    for line in summary(&found, &reference) {
        writeln!(stdout, "{line}")?;
    }
    writeln!(stdout, "{}\n{}", ddpm::text::shown(&path), ddpm::text::shown(&table))?;
    Ok(ExitCode::SUCCESS)
}

/// The nearest training image of each image in the folder.
fn search(
    folder: &ImageFolder,
    data: &dyn Dataset,
    mirror: bool,
    on_block: &mut dyn FnMut(usize, usize) -> ddpm::Result<()>,
) -> ddpm::Result<Vec<Nearest>> {
    let (count, mut found) = (folder.count(), Vec::new());
    let rounds = count.div_ceil(SAMPLES_PER_PASS);
    for first in (0..count).step_by(SAMPLES_PER_PASS) {
        let read = |i: usize| {
            let image = read_png(&folder.image(i))?;
            Ok(image.data.iter().map(|v| f32::from(*v) / 127.5 - 1.0).collect())
        };
        let samples: Vec<Vec<f32>> =
            (first..count.min(first + SAMPLES_PER_PASS)).map(read).collect::<ddpm::Result<_>>()?;
        let round = first / SAMPLES_PER_PASS;
        found.extend(nearest(data, &samples, mirror, &mut |done, all| {
            on_block(round * all + done, rounds * all)
        })?);
    }
    Ok(found)
}

/// The samples with the smallest distance, each beside its nearest training image.
fn pairs(
    folder: &ImageFolder,
    data: &dyn Dataset,
    found: &[Nearest],
    order: &[usize],
) -> anyhow::Result<Sheet> {
    let mut sheet = Sheet { columns: 2 * PAIRS_PER_ROW.min(order.len()), ..Sheet::default() };
    let labels = ["sample", "nearest, distance"].map(str::to_owned);
    sheet.column_labels = labels.iter().cycle().take(sheet.columns).cloned().collect();
    for &i in order.iter().take(MAX_PAIRS) {
        let Nearest { index, mirrored, distance } = found[i];
        let mirror_note = if mirrored { ", mirrored" } else { "" };
        sheet.images.extend([read_png(&folder.image(i))?, training_image(data, index)?]);
        sheet.captions.extend([i.to_string(), format!("{index}: {distance:.3}{mirror_note}")]);
    }
    Ok(sheet)
}

fn training_image(data: &dyn Dataset, index: usize) -> anyhow::Result<Image> {
    let mut values = vec![0.0; data.shape().num_elements()];
    data.read(index, AugmentKey::default(), &mut values)?;
    Ok(Image::from_unit(&values, data.shape()))
}

/// The distances and the verdict in words.
fn summary(found: &[Nearest], reference: &[Nearest]) -> Vec<String> {
    let range = |all: &[Nearest]| {
        let [least, middle, most] = [0.0, 0.5, 1.0].map(|part| quantile(all, part));
        format!("{least:.4} to {most:.4}, half below {middle:.4}")
    };
    let mut lines = vec![format!("samples to their nearest training image:          {}", range(found))];
    if reference.is_empty() {
        lines
            .push("no verdict: with a single training image there is no distance to compare with".to_owned());
        return lines;
    }
    lines.push(format!(
        "training images to their nearest other (of {:5}):  {}",
        reference.len(),
        range(reference)
    ));
    // Duplicates are not near by chance, and their distance of zero would hide every copy.
    let duplicates = reference.iter().filter(|n| n.distance <= 0.0).count();
    if duplicates > 0 {
        lines.push(format!(
            "{duplicates} of these {} training images have an exact duplicate, which networks memorize first; they are \
             excluded below",
            reference.len()
        ));
    }
    let assessment = assess(found, reference);
    let Assessment { near, samples, reference: num_reference, verdict } = assessment;
    let than = match num_reference {
        0 => return lines,
        n if n < 100 => format!("any of {n} training images is to another"),
        _ => "99 of 100 training images are to one another".to_owned(),
    };
    let percent = |part: f64| format!("{:.1} %", 100.0 * part);
    let verdict = match verdict {
        Verdict::TooFew => format!(
            "too few to tell whether the run memorizes ({samples} samples and {num_reference} training images; {MIN_SAMPLES} of each are needed)"
        ),
        Verdict::Memorized => {
            "more than chance: the run memorizes; more images, flips and crops, or fewer steps help"
                .to_owned()
        }
        Verdict::NoEvidence(most) => {
            format!("no more than chance (at most {} of all samples are, at 95 % confidence)", percent(most))
        }
        Verdict::Inconclusive(low, high) => format!(
            "no verdict ({} to {} of all samples are, at 95 % confidence); sample more with -n",
            percent(low),
            percent(high)
        ),
    };
    lines.push(format!("{near} of {samples} samples are nearer than {than}: {verdict}"));
    if assessment.verdict != Verdict::Memorized && quantile(found, 0.5) > 1.5 * quantile(reference, 0.99) {
        lines.push(
            "the samples are farther from the training images than nearly all of these are from each other: they do not \
             resemble the data yet, so this says nothing about memorization"
                .to_owned(),
        );
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memorization_is_distinguished_from_chance() {
        let at = |distance| Nearest { index: 0, mirrored: false, distance };
        let reference: Vec<_> = (0..1000).map(|i| at(0.1 + f64::from(i) * 1e-4)).collect();
        let fresh: Vec<_> = (0..64).map(|i| at(0.1005 + f64::from(i) * 1e-3)).collect();
        let text = |found: &[Nearest], reference: &[Nearest]| summary(found, reference).join("\n");
        assert!(
            text(&fresh, &reference).contains("1 of 64 samples are nearer than 99 of 100 training images")
        );
        assert!(text(&fresh, &reference).contains("no more than chance (at most 8.4 % of all samples"));
        let copies: Vec<_> = (0..64).map(|i| at(f64::from(i) * 1e-3)).collect();
        assert!(text(&copies, &reference).contains("the run memorizes"));
        assert!(text(&copies, &[]).contains("no verdict"));
        assert!(text(&copies, &reference[..50]).contains("nearer than any of 50 training images is"));
        // Three samples, one of them noise.
        let few = [at(0.01), at(0.02), at(0.7)];
        assert!(
            text(&few, &reference).contains("2 of 3 samples")
                && text(&few, &reference).contains("too few to tell")
        );
        assert!(text(&copies, &few).contains("too few to tell"));
        // Samples of pure noise.
        let noise: Vec<_> = (0..64).map(|_| at(0.9)).collect();
        assert!(text(&noise, &reference).contains("do not resemble the data yet"));
        // Many duplicates in the data do not hide memorization, and are reported.
        let duplicates: Vec<_> =
            (0..1000).map(|i| at(if i < 40 { 0.0 } else { reference[i].distance })).collect();
        let lines = summary(&copies, &duplicates);
        assert!(
            lines[2].starts_with("40 of these 1000 training images have an exact duplicate"),
            "{lines:?}"
        );
        assert!(lines[3].contains("the run memorizes"), "{lines:?}");
        assert_eq!(summary(&copies, &duplicates[..40]).len(), 3, "no reference");
    }
}
