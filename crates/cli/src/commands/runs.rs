//! `ddpm runs`.

use crate::progress::{human_bytes, human_time};
use ddpm::run_folder::{RUNS, RunEntry, RunInfo, list_runs};
use ddpm::text::thousands;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, SystemTime};

/// List runs with their state, progress, loss and data
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  \
    ddpm runs                    runs in runs/, the latest first\n  \
    ddpm runs --runs elsewhere   runs in another folder\n  \
    ddpm runs --json             an array of objects, for scripts\n\n\
    States: running, finished, diverged, stopped (by Ctrl-C, or for an unknown reason), failed (with an error), killed (ended \
    without a record), imported. LOSS is the mean over the last 100 steps, SIZE the total size of the run's files, AGE the time \
    since it last recorded progress.")]
pub struct Args {
    /// Folder that holds the runs
    #[arg(long, value_name = "FOLDER", default_value = RUNS)]
    runs: PathBuf,
    /// Print an array of JSON objects instead of a table
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let all = list_runs(&args.runs)?;
    let mut out = std::io::stdout().lock();
    if args.json {
        let objects: Vec<serde_json::Value> = all.iter().map(json).collect::<Result<_, _>>()?;
        writeln!(out, "{}", serde_json::to_string_pretty(&objects)?)?;
        return Ok(ExitCode::SUCCESS);
    }
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let good: Vec<&RunInfo> = all.iter().filter_map(|listed| listed.run.as_ref().ok()).collect();
    for line in table(&good, now) {
        writeln!(out, "{line}")?;
    }
    for info in &good {
        if let Some(error) = &info.error {
            writeln!(out, "{} failed: {}", plain(&info.name), first_line(error))?;
        }
    }
    for listed in &all {
        if let Err(reason) = &listed.run {
            status!("{}: {}", plain(&args.runs.join(&listed.name).to_string_lossy()), plain(reason));
        }
    }
    if all.is_empty() {
        status!("no runs in {}; start one with: ddpm train", ddpm::text::shown(&args.runs));
    }
    Ok(ExitCode::SUCCESS)
}

fn json(listed: &RunEntry) -> serde_json::Result<serde_json::Value> {
    match &listed.run {
        Ok(info) => serde_json::to_value(info),
        Err(reason) => Ok(serde_json::json!({ "name": listed.name, "state": "broken", "error": reason })),
    }
}

/// Text with control characters escaped.
fn plain(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { c.escape_default().to_string() } else { c.to_string() })
        .collect()
}

fn first_line(text: &str) -> String {
    plain(text.lines().next().unwrap_or_default())
}

/// The last component of the data's path, and the image shape.
fn data(info: &RunInfo) -> String {
    let name = Path::new(&info.data)
        .file_name()
        .map_or_else(|| info.data.clone(), |n| n.to_string_lossy().into_owned());
    let name = plain(&name);
    match &info.image {
        Some(image) => format!("{name} {image}"),
        None => name,
    }
}

/// A header and one aligned row per run.
fn table(runs: &[&RunInfo], now: u64) -> Vec<String> {
    if runs.is_empty() {
        return Vec::new();
    }
    let heads = ["NAME", "STATE", "STEP", "LOSS", "NETWORK", "DATA", "SIZE", "AGE"].map(str::to_owned);
    let row = |info: &&RunInfo| {
        let of = info.steps.map_or(String::new(), |steps| format!(" of {}", thousands(steps)));
        [
            plain(&info.name),
            info.state.name().to_owned(),
            format!("{}{of}", thousands(info.step)),
            info.loss.map_or_else(|| "-".to_owned(), |loss| format!("{loss:.4}")),
            info.network.clone(),
            data(info),
            human_bytes(info.bytes),
            human_time(Duration::from_secs(now.saturating_sub(info.changed))),
        ]
    };
    let rows: Vec<[String; 8]> = std::iter::once(heads).chain(runs.iter().map(row)).collect();
    let widths: Vec<usize> =
        (0..8).map(|i| rows.iter().map(|row| row[i].chars().count()).max().unwrap_or(0)).collect();
    let line = |row: &[String; 8]| {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}"));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    rows.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use ddpm::run_folder::State;

    #[test]
    fn columns_are_aligned_and_names_are_escaped() {
        let info = RunInfo {
            name: "a\u{1b}[31m".into(),
            path: "runs/a".into(),
            state: State::Stopped,
            error: None,
            step: 1200,
            checkpoint: Some(1000),
            steps: Some(20_000),
            loss: Some(0.031_25),
            data: "/data/photos".into(),
            image: Some("32x32x3".into()),
            network: "attention".into(),
            bytes: 3 << 20,
            changed: 1000,
        };
        let long = RunInfo { name: "a-longer-name".into(), loss: None, steps: None, ..info.clone() };
        let lines = table(&[&info, &long], 1090);
        let at = lines[0].find("STATE").unwrap();
        assert!(lines[1..].iter().all(|line| line[at..].starts_with("stopped")), "{lines:#?}");
        assert!(lines[1].starts_with("a\\u{1b}[31m  "), "{}", lines[1]);
        for part in ["1,200 of 20,000", "0.0312", "photos 32x32x3", "3.0 MiB", "1 min 30 s"] {
            assert!(lines[1].contains(part), "{part}: {}", lines[1]);
        }
        assert!(lines[2].contains("1,200  ") && lines[2].contains("  -  "), "{}", lines[2]);
        assert!(table(&[], 0).is_empty());
    }
}
