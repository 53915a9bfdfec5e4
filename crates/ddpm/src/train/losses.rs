//! The losses of a training, as far as they compare with each other.

use super::config::{Config, Difference};
use super::health::Health;
use super::run::Metrics;
use std::collections::VecDeque;

/// Steps whose mean loss is reported and compared.
pub(super) const WINDOW: usize = 100;
/// Settings by which losses are of another size, besides all of the section `diffusion`.
const MEASURE: [&str; 7] =
    ["loss", "loss_weight", "min_snr_gamma", "p2_gamma", "p2_k", "huber_delta", "vlb_weight"];

/// Whether losses after such a change do not compare with those before; `now` are the settings with it.
pub(super) fn measured_otherwise(differences: &[Difference], now: &Config) -> bool {
    let other = |d: &Difference| match d.section {
        "diffusion" => true,
        // Only a learned variance has that loss.
        "train" if d.name == "vlb_weight" => now.diffusion.learned_variance,
        section => section == "train" && MEASURE.contains(&d.name),
    };
    differences.iter().any(other)
}

/// The losses of the steps behind `since`.
pub(super) struct Losses {
    /// Steps after which the losses were measured as they are now.
    pub since: u64,
    last: VecDeque<f64>,
    pub health: Health,
}

impl Losses {
    pub fn new(config: &Config, since: u64) -> Self {
        Self { since, last: VecDeque::new(), health: Health::new(config) }
    }

    /// Takes the loss of a step, unless it does not compare.
    pub fn note(&mut self, step: u64, loss: f64) {
        if step <= self.since {
            return;
        }
        if self.last.len() == WINDOW {
            self.last.pop_front();
        }
        self.last.push_back(loss);
        self.health.note(loss, self.mean().unwrap_or(loss), self.last.len());
    }

    /// Mean of the last ones, at most [`WINDOW`].
    pub fn mean(&self) -> Option<f64> {
        (!self.last.is_empty()).then(|| self.last.iter().sum::<f64>() / self.last.len() as f64)
    }
}

/// Mean of the losses that a checkpoint of `step` has noted, of steps behind `since`, as the metrics tell it; `None` where they do
/// not have the step, or lack one of those before it.
pub(super) fn mean_at(metrics: &[Metrics], step: u64, since: u64) -> Option<f64> {
    let mut until = metrics.iter().rev().skip_while(|m| m.step > step).take_while(|m| m.step > since);
    let losses: Vec<f64> = until.clone().take(WINDOW).map(|m| m.loss).collect();
    until.next().filter(|m| m.step == step)?;
    let expected = (step - since).min(WINDOW as u64) as usize;
    let complete =
        metrics.iter().filter(|m| m.step <= step && m.step + expected as u64 > step).count() == expected;
    if losses.len() != expected || !complete {
        return None;
    }
    Some(losses.iter().sum::<f64>() / losses.len() as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(pairs: &[(&str, &str)]) -> Config {
        let pairs: Vec<_> = pairs.iter().map(|&(k, v)| (k.to_owned(), v.to_owned())).collect();
        Config::load(Some("digits"), None, &pairs).unwrap()
    }

    fn metrics(step: u64, loss: f64) -> Metrics {
        Metrics { step, loss, images_per_second: 1.0, learning_rate: 1.0, grad_norm: 1.0, seconds: 1.0 }
    }

    #[test]
    fn losses_of_another_measure_are_neither_in_the_mean_nor_in_what_is_told_of_a_divergence() {
        let mut losses = Losses::new(&config(&[]), 3);
        (1..=3).for_each(|step| losses.note(step, 1000.0));
        assert_eq!(losses.mean(), None);
        (4..=30).for_each(|step| losses.note(step, 0.5));
        assert_eq!((losses.mean(), losses.health.diverged()), (Some(0.5), None));
        let all: Vec<Metrics> = (1..=30).map(|s| metrics(s, if s > 3 { 0.5 } else { 1000.0 })).collect();
        assert_eq!(mean_at(&all, 30, 3), Some(0.5));
        assert_eq!(mean_at(&all, 4, 0), Some((3000.0 + 0.5) / 4.0));
        assert_eq!(mean_at(&all[..20], 30, 0), None);
        assert_eq!(mean_at(&[], 1, 0), None);
        let gap: Vec<Metrics> = all.iter().filter(|m| m.step != 5).cloned().collect();
        assert_eq!((mean_at(&gap, 30, 0), mean_at(&gap, 4, 0)), (None, mean_at(&all, 4, 0)));
    }

    #[test]
    fn only_settings_of_the_measure_part_the_losses() {
        let plain = config(&[]);
        let parts = |key: &str, value: &str| {
            measured_otherwise(&plain.differences(&config(&[(key, value)])), &config(&[(key, value)]))
        };
        for (key, value) in
            [("train.loss", "l1"), ("train.loss_weight", "min-snr"), ("diffusion.prediction", "v")]
        {
            assert!(parts(key, value), "{key}");
        }
        for (key, value) in [("train.lr", "0.1"), ("train.optimizer", "adamw"), ("train.batch_size", "3")] {
            assert!(!parts(key, value), "{key}");
        }
    }
}
