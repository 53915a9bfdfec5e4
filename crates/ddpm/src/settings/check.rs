//! Checks of ranges, shared by all sections. `key` is the full key of the setting, for the message.

use crate::{Error, Result};
use std::fmt::Display;

/// An error about a setting: the reason, and a remedy.
pub fn refuse<T>(key: &str, reason: impl Into<String>) -> Result<T> {
    Err(Error::Config { key: key.into(), reason: reason.into() })
}

/// Checks that `value` is in [`low`, `high`].
pub fn within<T: PartialOrd + Display>(key: &str, value: T, low: T, high: T) -> Result<()> {
    if value >= low && value <= high {
        Ok(())
    } else {
        refuse(key, format!("{value} is out of range; give {low} to {high}"))
    }
}

/// Whether `value` is above 0, even as the f32 that is computed with, and at most `max`.
pub fn positive(value: f64, max: f64) -> bool {
    value >= f64::from(f32::MIN_POSITIVE) && value <= max
}

/// Checks that `value` is [`positive`].
pub fn above_zero(key: &str, value: f64, max: f64, usual: impl Display) -> Result<()> {
    if positive(value, max) {
        Ok(())
    } else {
        refuse(
            key,
            format!("{value} is out of range; give a number above 0 and at most {max}; {usual} is usual"),
        )
    }
}

/// Checks that `value` is in [0, 1).
pub fn below_one(key: &str, value: f64) -> Result<()> {
    if (0.0..1.0).contains(&value) {
        Ok(())
    } else {
        refuse(key, format!("{value} is out of range; give a number of at least 0 and less than 1"))
    }
}
