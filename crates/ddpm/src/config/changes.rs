//! Differences between two sets of settings, and their effect on a run that was trained with one and continues with the other.

use super::{Change, Config, SECTIONS};
use crate::{Error, Result};
use serde::Deserialize;
use std::fmt;
use toml::Value;

/// A setting whose value changed.
#[derive(Clone, Debug, PartialEq)]
pub struct Difference {
    /// Its section.
    pub section: &'static str,
    /// Its name in the section.
    pub name: &'static str,
    /// The effect of the change.
    pub change: Change,
    /// The old value; `None` if it was unset.
    pub before: Option<Value>,
    /// The new value; `None` if it is unset.
    pub now: Option<Value>,
}

/// A value as written in a settings file.
fn shown(value: Option<&Value>) -> String {
    value.map_or_else(|| "unset".to_owned(), Value::to_string)
}

impl Difference {
    /// The setting's full key.
    pub fn key(&self) -> String {
        format!("{}.{}", self.section, self.name)
    }

    /// The old value, as text.
    pub fn before(&self) -> String {
        shown(self.before.as_ref())
    }

    /// The new value, as text.
    pub fn now(&self) -> String {
        shown(self.now.as_ref())
    }
}

/// `optimizer.lr = 0.001 (was 0.01)`.
impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} = {} (was {})", self.key(), self.now(), self.before())
    }
}

/// The settings that define the noise schedule.
const SCHEDULE_KEYS: [&str; 6] =
    ["timesteps", "schedule", "beta_start", "beta_end", "max_beta", "zero_terminal_snr"];

impl Config {
    /// The settings that differ in `now`, in the order of [`SECTIONS`]. Ignores the sections of networks that are not
    /// selected, and differences of the schedule settings that give the same noise levels.
    pub fn differences(&self, now: &Self) -> Vec<Difference> {
        let schedules = (self.schedule(), now.schedule());
        let same_schedule = matches!(schedules, (Ok(before), Ok(now)) if before == now);
        let mut all = Vec::new();
        let values = self.values().into_iter().zip(now.values());
        for (section, (before, after)) in SECTIONS.iter().zip(values) {
            // Another architecture is a single difference, not one for each of its settings.
            if !now.uses(section.name) || !self.uses(section.name) {
                continue;
            }
            for (setting, (before, now)) in section.settings.iter().zip(before.into_iter().zip(after)) {
                let of_schedule = section.name == "diffusion" && SCHEDULE_KEYS.contains(&setting.name);
                if before != now && !(of_schedule && same_schedule) {
                    let (name, change) = (setting.name, setting.change);
                    all.push(Difference { section: section.name, name, change, before, now });
                }
            }
        }
        all
    }

    /// These settings with the new values of `differences` applied.
    ///
    /// # Errors
    /// [`Error::Config`] if the result cannot be parsed as settings.
    pub fn with_differences(&self, differences: &[Difference]) -> Result<Self> {
        let wrong = |reason: String| Error::Config { key: "settings".to_owned(), reason };
        let mut table = toml::Table::try_from(self).map_err(|e| wrong(e.to_string()))?;
        for difference in differences {
            if let Some(Value::Table(section)) = table.get_mut(difference.section) {
                section.remove(difference.name);
                if let Some(value) = &difference.now {
                    section.insert(difference.name.to_owned(), value.clone());
                }
            }
        }
        Self::deserialize(table).map_err(|e| wrong(e.message().to_owned()))
    }

    /// These settings, with image size and channels taken from `known` where they are unset.
    pub(crate) fn filled_from(&self, known: &Self) -> Self {
        let mut config = self.clone();
        config.data.size = config.data.size.or(known.data.size);
        config.data.channels = config.data.channels.or(known.data.channels);
        config.network.im_size = config.network.im_size.or(known.network.im_size);
        config.network.im_channels = config.network.im_channels.or(known.network.im_channels);
        config
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(pairs: &[(&str, &str)]) -> Config {
        let pairs: Vec<_> = pairs.iter().map(|&(k, v)| (k.to_owned(), v.to_owned())).collect();
        Config::load(Some("digits"), None, &pairs).unwrap()
    }

    fn change_of(key: &str) -> Change {
        let (section, name) = key.split_once('.').unwrap();
        let section = SECTIONS.iter().find(|s| s.name == section).unwrap();
        section.settings.iter().find(|s| s.name == name).unwrap().change
    }

    #[test]
    fn changes_are_classified_by_their_effect_on_a_run() {
        use Change::{Breaking, Free, Noted};
        for (change, keys) in [
            (
                Free,
                &[
                    "compute.threads",
                    "output.keep_checkpoints",
                    "output.checkpoint_every",
                    "data.path",
                    "compute.device",
                ][..],
            ),
            (
                Noted,
                &[
                    "train.steps",
                    "optimizer.lr",
                    "train.seed",
                    "train.batch_size",
                    "loss.name",
                    "loss.weighting",
                    "optimizer.name",
                    "unet2d.dropout",
                    "ema.decay",
                ],
            ),
            (
                Breaking,
                &[
                    "diffusion.prediction",
                    "diffusion.schedule",
                    "diffusion.timesteps",
                    "diffusion.zero_terminal_snr",
                    "diffusion.learned_variance",
                    "attention.num_heads",
                    "network.name",
                    "data.size",
                ],
            ),
        ] {
            keys.iter().for_each(|key| assert_eq!(change_of(key), change, "{key}"));
        }
        // The forward process and the network are always part of what was trained.
        for section in SECTIONS.iter().filter(|s| s.name == "diffusion" || s.name == "network") {
            assert!(section.settings.iter().all(|s| s.change == Breaking), "{}", section.name);
        }
    }

    #[test]
    fn differences_have_both_values_and_can_be_applied() {
        let a = config(&[("optimizer.lr", "1e-3"), ("optimizer.clip_norm", "1")]);
        let b = config(&[("optimizer.lr", "2e-3"), ("data.size", "20"), ("diffusion.prediction", "v")]);
        let found = a.differences(&b);
        let keys: Vec<String> = found.iter().map(Difference::key).collect();
        assert_eq!(keys, ["data.size", "diffusion.prediction", "optimizer.lr", "optimizer.clip_norm"]);
        assert_eq!(found[2].to_string(), "optimizer.lr = 0.002 (was 0.001)");
        assert_eq!(found[1].to_string(), "diffusion.prediction = \"v\" (was \"eps\")");
        assert_eq!(a.with_differences(&found).unwrap(), b);
        assert!(a.differences(&a).is_empty());
        let unset = b.with_differences(&b.differences(&a)).unwrap();
        assert_eq!(unset, a);
    }

    #[test]
    fn settings_without_effect_are_not_differences() {
        let a = config(&[("diffusion.schedule", "cosine")]);
        let b = config(&[("diffusion.schedule", "cosine"), ("diffusion.beta_end", "0.03")]);
        assert!(a.differences(&b).is_empty(), "cosine has no ends");
        let a = config(&[("diffusion.schedule", "quadratic")]);
        let b = config(&[("diffusion.schedule", "scaled-linear")]);
        assert!(a.differences(&b).is_empty(), "two names of one schedule");
        // Settings of networks that are not selected.
        let a = config(&[("simple.time_emb_dim", "16")]);
        assert!(a.differences(&config(&[])).is_empty());
        let other = config(&[("network.name", "simple")]);
        let keys: Vec<String> = a.differences(&other).iter().map(Difference::key).collect();
        assert_eq!(keys, ["network.name"]);
    }
}
