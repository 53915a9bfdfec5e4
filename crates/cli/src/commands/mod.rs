//! The commands, one file each.

use anyhow::Context;

pub mod bench;
pub mod completions;
pub mod config;
pub mod data;
pub mod doctor;
pub mod export;
pub mod import;
pub mod nearest;
pub mod sample;
pub mod show;
pub mod train;

/// The settings that `--set KEY=VALUE` gives.
fn pairs(set: &[String]) -> anyhow::Result<Vec<(String, String)>> {
    set.iter()
        .map(|text| {
            let (key, value) = text
                .split_once('=')
                .with_context(|| format!("--set {text}: write KEY=VALUE, as --set train.keep=3"))?;
            Ok((key.trim().to_owned(), value.trim().to_owned()))
        })
        .collect()
}
