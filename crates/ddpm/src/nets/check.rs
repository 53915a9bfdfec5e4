//! Checks shared by the networks' settings.

use crate::Result;
use crate::settings::check::{refuse, within};

/// Maximum channels of a network's block; keeps all products of sizes far from overflow.
pub const MAX_CHANNELS: usize = 1 << 14;
/// Maximum number of resolution levels; more would need images with sides of 2^15 pixels.
const MAX_LEVELS: usize = 16;

/// Checks the dimension of a time embedding: even and at least `min`.
pub fn embedding(key: &str, dim: usize, min: usize) -> Result<()> {
    within(key, dim, min, MAX_CHANNELS)?;
    if !dim.is_multiple_of(2) {
        let reason = format!("is odd, but half are sines and half cosines; use {} or {}", dim - 1, dim + 1);
        return refuse(key, reason);
    }
    Ok(())
}

/// Checks a number of classes, if there is one.
pub fn classes(key: &str, classes: Option<usize>) -> Result<()> {
    classes.map_or(Ok(()), |n| within(key, n, 1, 1 << 20))
}

/// Checks the length of a list with an entry per level.
pub fn num_entries(key: &str, len: usize, min: usize) -> Result<()> {
    if (min..=MAX_LEVELS).contains(&len) {
        return Ok(());
    }
    refuse(key, format!("has {len} entries; give {min} to {MAX_LEVELS}"))
}

/// Checks that `unit` divides the channels; `why` explains the unit.
pub fn divisible(key: &str, channels: usize, unit: usize, why: &str) -> Result<()> {
    within(key, channels, 1, MAX_CHANNELS)?;
    if channels.is_multiple_of(unit) {
        return Ok(());
    }
    let (below, above) = (channels / unit * unit, channels.next_multiple_of(unit));
    let near = if below == 0 { format!("{above}") } else { format!("{below} or {above}") };
    refuse(key, format!("{channels} is not divisible by {unit} ({why}); use {near}"))
}
