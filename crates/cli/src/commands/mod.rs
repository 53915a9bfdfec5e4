//! The commands, one file each, and what they share.

use anyhow::Context;
use ddpm::config::Size;

pub mod average;
pub mod bench;
mod classes;
pub mod completions;
pub mod config;
pub mod data;
pub mod denoise;
pub mod doctor;
mod edit;
pub mod eval;
pub mod export;
mod flags;
mod folder;
pub mod import;
pub mod inpaint;
pub mod interpolate;
pub mod nearest;
pub mod runs;
pub mod sample;
mod sampling;
pub mod show;
pub mod train;
pub mod vary;

/// Parses `--size`: `28` or `28x32`.
fn size(text: &str) -> anyhow::Result<Size> {
    text.parse().map_err(|reason| anyhow::anyhow!("--size {text}: {reason}"))
}

/// Parses the `KEY=VALUE` pairs of `--set`.
fn pairs(set: &[String]) -> anyhow::Result<Vec<(String, String)>> {
    set.iter()
        .map(|text| {
            let (key, value) = text.split_once('=').with_context(|| {
                format!("--set {text}: write KEY=VALUE, e.g. --set output.keep_checkpoints=3")
            })?;
            Ok((key.trim().to_owned(), value.trim().to_owned()))
        })
        .collect()
}
