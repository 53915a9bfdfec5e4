//! `ddpm config`.

use ddpm::config::{Config, PRESETS};
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

/// Print all settings with comments, as a file for --config
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  ddpm config > mine.toml            then: ddpm train --config mine.toml\n  \
                        ddpm config --preset mnist\n  ddpm config --config default.yaml  convert the tutorial's file to TOML"
)]
pub struct Args {
    /// Start from a preset
    #[arg(long, value_name = "NAME")]
    preset: Option<String>,
    /// Start from a file: TOML, or the YAML of the DDPM-Pytorch tutorial
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// List the presets
    #[arg(long)]
    list: bool,
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let mut out = std::io::stdout().lock();
    if args.list {
        for preset in PRESETS {
            writeln!(out, "{:10} {}", preset.name, preset.about)?;
        }
        return Ok(ExitCode::SUCCESS);
    }
    let loaded = Config::load_with_notes(args.preset.as_deref(), args.config.as_deref(), &[])?;
    for note in &loaded.notes {
        crate::status!("note: {note}");
    }
    out.write_all(loaded.config.to_toml_commented().as_bytes())?;
    Ok(ExitCode::SUCCESS)
}
