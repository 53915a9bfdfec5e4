//! The losses of a run that are comparable with each other.

use super::health::Health;
use crate::config::{Config, Difference};
use crate::run_folder::Metrics;
use std::collections::VecDeque;

/// Number of recent steps whose mean loss is reported and compared.
pub(super) const WINDOW: usize = 100;
/// Settings of the section `loss` that change the scale of the loss; all of the section `diffusion` do.
const LOSS_SCALE_KEYS: [&str; 7] =
    ["name", "weighting", "min_snr_gamma", "p2_gamma", "p2_k", "huber_delta", "vlb_weight"];

/// Whether losses after these changes are not comparable with those before; `now` are the new settings.
pub(super) fn changes_loss_scale(differences: &[Difference], now: &Config) -> bool {
    let changes = |d: &Difference| match d.section {
        "diffusion" => true,
        // That loss term exists only with a learned variance.
        "loss" if d.name == "vlb_weight" => now.diffusion.learned_variance,
        section => section == "loss" && LOSS_SCALE_KEYS.contains(&d.name),
    };
    differences.iter().any(changes)
}

/// The losses of the steps after `since`.
pub(super) struct Losses {
    /// Number of the last step whose loss was computed with other settings.
    pub since: u64,
    last: VecDeque<f64>,
    pub health: Health,
}

impl Losses {
    pub fn new(config: &Config, since: u64) -> Self {
        Self { since, last: VecDeque::new(), health: Health::new(config) }
    }

    /// Records the loss of a step, if it is comparable.
    pub fn record(&mut self, step: u64, loss: f64) {
        if step <= self.since {
            return;
        }
        if self.last.len() == WINDOW {
            self.last.pop_front();
        }
        self.last.push_back(loss);
        self.health.record(loss, self.mean().unwrap_or(loss), self.last.len());
    }

    /// Mean of the last losses, at most [`WINDOW`].
    pub fn mean(&self) -> Option<f64> {
        (!self.last.is_empty()).then(|| self.last.iter().sum::<f64>() / self.last.len() as f64)
    }
}

/// Mean loss that a checkpoint of `step` would have recorded, over steps after `since`, computed from the metrics; `None`
/// if they lack the step or one of those it averages over.
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
    fn losses_on_another_scale_affect_neither_the_mean_nor_the_divergence_check() {
        let mut losses = Losses::new(&config(&[]), 3);
        (1..=3).for_each(|step| losses.record(step, 1000.0));
        assert_eq!(losses.mean(), None);
        (4..=30).for_each(|step| losses.record(step, 0.5));
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
    fn only_settings_of_the_loss_make_losses_incomparable() {
        let plain = config(&[]);
        let parts = |key: &str, value: &str| {
            changes_loss_scale(&plain.differences(&config(&[(key, value)])), &config(&[(key, value)]))
        };
        for (key, value) in
            [("loss.name", "l1"), ("loss.weighting", "min-snr"), ("diffusion.prediction", "v")]
        {
            assert!(parts(key, value), "{key}");
        }
        for (key, value) in [("optimizer.lr", "0.1"), ("optimizer.name", "adamw"), ("train.batch_size", "3")]
        {
            assert!(!parts(key, value), "{key}");
        }
    }
}
