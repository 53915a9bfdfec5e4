//! `ddpm nearest`.

use super::flags::DataFlags;
use super::sample::{self, Drawing};
use crate::progress::Progress;
use anyhow::bail;
use ddpm::data::{Dataset, Draw};
use ddpm::generate::Generator;
use ddpm::nearest::{Nearest, among, nearest, quantile};
use ddpm::picture::{Picture, grid, save_png};
use ddpm::train::write_file;
use std::io::Write;
use std::process::ExitCode;
use std::sync::atomic::Ordering;

/// Pictures of the data whose nearest others are looked for.
const AMONG: usize = 1000;
/// Part of these that is nearer than the rest; samples nearer than they are suspicious.
const NEAR: f64 = 0.01;
/// Most pairs that are shown, the nearest first, and in a row.
const SHOWN: usize = 64;
const ROW: usize = 4;

/// Find out whether a run copies: draw pictures, and set the nearest training picture beside each
#[derive(clap::Args)]
#[group(skip)]
#[command(after_help = "Examples:\n  \
    ddpm nearest runs/run-001                              64 samples, in runs/run-001/samples/seed-0\n  \
    ddpm nearest runs/run-001 -n 500 --sampler dpm++2m     more, faster\n  \
    ddpm nearest runs/imported --data photos               of an imported run, whose pictures are not known")]
pub struct Args {
    #[command(flatten)]
    sample: sample::Args,
    #[command(flatten)]
    data: DataFlags,
}

/// The pictures that samples are compared with.
fn open(generator: &Generator, flags: &DataFlags) -> anyhow::Result<Box<dyn Dataset>> {
    let data = flags.open(generator)?;
    let shape = generator.shape();
    if data.shape() != shape {
        bail!("the data has pictures of {} now, and the run's are of {shape}", data.shape());
    }
    Ok(data)
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let drawn = sample::draw(&args.sample, |generator| open(generator, &args.data))?;
    let Some((Drawing { generator, pictures, out, stop }, data)) = drawn else {
        return Ok(ExitCode::from(crate::INTERRUPTED));
    };
    let config = generator.config();
    let unit = |p: &Picture| p.data.iter().map(|v| f32::from(*v) / 127.5 - 1.0).collect();
    let samples: Vec<Vec<f32>> = pictures.iter().map(unit).collect();
    let mut progress = Progress::new("comparing", 0);
    let mut on_block = |done: usize, all: usize| {
        progress.set(done as u64, all as u64, String::new);
        if stop.load(Ordering::Relaxed) { Err(ddpm::Error::Interrupted) } else { Ok(()) }
    };
    let mirror = config.data.horizontal_flip;
    let found = nearest(&*data, &samples, mirror, &mut on_block);
    let found = found.and_then(|found| Ok((found, among(&*data, AMONG, mirror, &mut on_block)?)));
    progress.finish();
    let (found, own) = match found {
        Err(ddpm::Error::Interrupted) => {
            tell!("stopped; the samples are in {}", ddpm::text::shown(&out));
            return Ok(ExitCode::from(crate::INTERRUPTED));
        }
        other => other?,
    };

    let mut order: Vec<usize> = (0..found.len()).collect();
    order.sort_by(|&a, &b| found[a].distance.total_cmp(&found[b].distance));
    let table = out.join("nearest.csv");
    let mut text = "sample,training picture,mirrored,distance\n".to_owned();
    for &i in &order {
        let Nearest { index, mirrored, distance } = found[i];
        text += &format!("{i},{index},{mirrored},{distance:.6}\n");
    }
    write_file(&table, text.as_bytes(), "write the distances")?;
    let mut pairs = Vec::new();
    for &i in order.iter().take(SHOWN) {
        pairs.extend([pictures[i].clone(), training_picture(&*data, found[i].index)?]);
    }
    let sheet = out.join("nearest.png");
    save_png(&grid(&pairs, 2 * ROW, 2), &sheet)?;

    let mut stdout = std::io::stdout();
    for line in summary(&found, &own) {
        writeln!(stdout, "{line}")?;
    }
    writeln!(stdout, "{}\n{}", ddpm::text::shown(&sheet), ddpm::text::shown(&table))?;
    Ok(ExitCode::SUCCESS)
}

fn training_picture(data: &dyn Dataset, index: usize) -> anyhow::Result<Picture> {
    let mut numbers = vec![0.0; data.shape().values()];
    data.read(index, Draw::default(), &mut numbers)?;
    Ok(Picture::from_unit(&numbers, data.shape()))
}

/// What the distances say, in sentences.
fn summary(found: &[Nearest], own: &[Nearest]) -> Vec<String> {
    let range = |all: &[Nearest]| {
        let [least, middle, most] = [0.0, 0.5, 1.0].map(|part| quantile(all, part));
        format!("{least:.4} to {most:.4}, half below {middle:.4}")
    };
    let mut lines = vec![format!("samples to their nearest training picture:          {}", range(found))];
    if own.is_empty() {
        return lines;
    }
    lines.push(format!("training pictures to their nearest other (of {:5}):  {}", own.len(), range(own)));
    // Pictures that are in the data twice are not near by chance, and nothing is nearer than they are.
    let apart: Vec<Nearest> = own.iter().copied().filter(|n| n.distance > 0.0).collect();
    let twice = own.len() - apart.len();
    if twice > 0 {
        lines.push(format!(
            "{twice} of these {} training pictures have an exact duplicate, which networks learn by heart first; they are left \
             out of what follows",
            own.len()
        ));
    }
    if apart.is_empty() {
        return lines;
    }
    let limit = quantile(&apart, NEAR);
    let near = found.iter().filter(|n| n.distance < limit).count();
    let verdict = match near as f64 > (3.0 * NEAR * found.len() as f64).max(1.0) {
        true => "more than chance: the run copies; more pictures, flips and crops, or fewer steps help",
        false => "no more than chance",
    };
    lines.push(format!(
        "{near} of {} samples are nearer than 99 of 100 training pictures are to one another: {verdict}",
        found.len()
    ));
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
        assert!(summary(&fresh, &own)[2].contains("1 of 64 samples are nearer"));
        assert!(summary(&fresh, &own)[2].ends_with("no more than chance"));
        let copies: Vec<_> = (0..64).map(|i| at(f64::from(i) * 1e-3)).collect();
        assert!(summary(&copies, &own)[2].contains("the run copies"));
        assert_eq!(summary(&copies, &[]).len(), 1);
        // Duplicates in the data, more than are near by chance, do not hide copies, and are said.
        let twice: Vec<_> = (0..1000).map(|i| at(if i < 40 { 0.0 } else { own[i].distance })).collect();
        let lines = summary(&copies, &twice);
        assert!(
            lines[2].starts_with("40 of these 1000 training pictures have an exact duplicate"),
            "{lines:?}"
        );
        assert!(lines[3].contains("the run copies"), "{lines:?}");
        assert_eq!(summary(&copies, &twice[..40]).len(), 3, "nothing to measure by");
    }
}
