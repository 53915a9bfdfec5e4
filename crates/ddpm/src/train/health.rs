//! Detects divergence: compares the loss with that of predicting zero and with the run's own best.

use crate::checkpoint;
use crate::config::Config;
use crate::process::Prediction;
use crate::run_folder::RunFolder;
use ddpm_engine::ops::Loss;
use std::collections::VecDeque;

/// Number of recent losses whose median is the current loss, so that single bad batches do not matter.
const RECENT: usize = 10;
/// Minimum number of losses in a mean that counts as reached.
const MIN_FOR_MEAN: usize = 20;
/// Fraction of the loss of predicting zero above which the network predicts next to nothing.
const USELESS: f64 = 0.95;
/// Fraction of it below which the network has learnt something.
const LEARNT: f64 = 0.8;
/// Ratio of the loss to its lowest mean that noise alone does not explain.
const RISE: f64 = 2.0;
/// Highest learning rate to recommend; 1e-4 to 2e-4 is usual with Adam.
const MAX_RECOMMENDED_LR: f64 = 2e-4;

/// The losses of a run so far.
pub(super) struct Health {
    /// The loss of predicting zero, or an upper bound of it.
    zero: f64,
    /// The lowest mean loss reached; initially that of predicting zero.
    lowest: f64,
    /// The very first loss, that of the initial weights.
    first: Option<f64>,
    /// The mean loss of the last steps, if there are enough of them.
    mean: Option<f64>,
    /// Number of losses since training was started or resumed.
    since_start: usize,
    recent: VecDeque<f64>,
    reported: bool,
}

impl Health {
    pub fn new(config: &Config) -> Self {
        let zero = loss_of_zero(config);
        Self {
            zero,
            lowest: zero,
            first: None,
            mean: None,
            since_start: 0,
            recent: VecDeque::new(),
            reported: false,
        }
    }

    /// Records the loss of a step, and the mean of the last `steps` steps.
    pub fn record(&mut self, loss: f64, mean: f64, steps: usize) {
        if self.recent.len() == RECENT {
            self.recent.pop_front();
        }
        self.recent.push_back(loss);
        self.first.get_or_insert(loss);
        self.since_start += 1;
        self.mean = (steps >= MIN_FOR_MEAN).then_some(mean);
        if steps >= MIN_FOR_MEAN && mean < self.lowest {
            self.lowest = mean;
        }
    }

    /// The current loss.
    fn current(&self) -> Option<f64> {
        let mut sorted: Vec<f64> = self.recent.iter().copied().collect();
        sorted.sort_by(f64::total_cmp);
        sorted.get(sorted.len() / 2).copied()
    }

    /// Whether this loss indicates divergence: it is no better than predicting zero although it was better before, or it is
    /// far worse.
    pub fn is_bad(&self, loss: f64) -> bool {
        // NaN counts as bad.
        let base = if self.lowest < self.zero {
            self.lowest
        } else {
            self.first.map_or(self.zero, |first| first.max(self.zero))
        };
        !(loss <= USELESS * self.zero || loss <= RISE * base)
    }

    /// Whether this mean loss indicates divergence: as [`is_bad`](Self::is_bad), or the network now predicts nothing
    /// although the mean was clearly lower before. Single losses are too noisy for the latter.
    pub fn is_bad_mean(&self, mean: f64) -> bool {
        self.is_bad(mean) || (self.lowest < LEARNT * self.zero && mean > USELESS * self.zero)
    }

    /// Call on resume: the losses so far may be of another objective, so a few new ones are needed before the next check.
    pub fn restart(&mut self) {
        self.since_start = 0;
    }

    /// A message for the user if training has diverged.
    pub fn diverged(&self) -> Option<String> {
        let enough = self.since_start >= RECENT;
        let current = self.current().filter(|&loss| enough && self.is_bad(loss));
        let current = current.or(self.mean.filter(|&mean| enough && self.is_bad_mean(mean)))?;
        let lowest = if self.lowest < self.zero {
            format!(", and its lowest mean was {:.4}", self.lowest)
        } else {
            String::new()
        };
        Some(format!(
            "the loss is {current:.4}; predicting zero has a loss of about {:.4}{lowest}",
            self.zero
        ))
    }

    /// As [`diverged`](Self::diverged), but only once until the loss has recovered.
    pub fn newly_diverged(&mut self) -> Option<String> {
        let diverged = self.diverged();
        let new = !std::mem::replace(&mut self.reported, diverged.is_some());
        diverged.filter(|_| new)
    }
}

impl Health {
    /// How to recover after training diverged, or the step after `failed` could not be completed; `lr` is the learning rate,
    /// and `given` tells whether training started from given weights.
    pub fn recovery_advice(&self, run: &RunFolder, lr: f64, failed: Option<u64>, given: bool) -> String {
        const CHECK: &str = "the images (ddpm data check)";
        if failed == Some(0) {
            // The learning rate has not been used yet.
            let weights = if given { "the initial weights (--init) and " } else { "" };
            return format!("This was the first step; check {weights}{CHECK}");
        }
        let dir = run.checkpoints();
        let steps = checkpoint::list(&dir).unwrap_or_default();
        let good = |step: &&u64| {
            let loss = checkpoint::loss_of(&checkpoint::path_of(&dir, **step));
            // A checkpoint without a loss holds the given weights.
            failed != Some(**step) && loss.is_some_and(|loss| loss.is_none_or(|loss| !self.is_bad_mean(loss)))
        };
        let (flag, restart) = (format!("--lr {:e}", lower_rate(lr)), "restart training from the beginning");
        let advice = match steps.iter().rev().find(good) {
            Some(step) => format!(
                "Resume from step {step}, the newest checkpoint before the divergence, with a lower learning rate (it was {lr:e}): \
                 ddpm train --resume {} --checkpoint {step} {flag}",
                run.path().display()
            ),
            None if steps.is_empty() => {
                format!("There is no checkpoint yet; {restart} with a learning rate below {lr:e}: {flag}")
            }
            None => format!(
                "All checkpoints have diverged too; {restart} with a learning rate below {lr:e}: {flag}"
            ),
        };
        format!("{advice}; also check {CHECK}")
    }
}

/// A learning rate that is likely to work if `lr` is too high.
fn lower_rate(lr: f64) -> f64 {
    (lr / 10.0).min(MAX_RECOMMENDED_LR)
}

/// The mean loss of predicting zero: exact for noise, from the moments of the normal distribution; an upper bound for x_0
/// and v, whose mean square is at most 1.
fn loss_of_zero(config: &Config) -> f64 {
    let objective = config.objective();
    let square = match objective.prediction {
        Prediction::X0 => 1.0,
        Prediction::Eps | Prediction::V => 1.0 + objective.offset_noise.powi(2),
    };
    // E|z| of a standard normal z.
    let of_normal =
        if objective.prediction == Prediction::Eps { (2.0 / std::f64::consts::PI).sqrt() } else { 1.0 };
    let absolute = of_normal * square.sqrt();
    let zero = match objective.loss {
        Loss::Mse => square,
        Loss::L1 => absolute,
        Loss::Huber { delta } => (0.5 * square).min(f64::from(delta) * absolute),
    };
    let weights = config.schedule().ok().and_then(|s| objective.weights(&s));
    let mean = |w: Vec<f32>| w.iter().map(|w| f64::from(*w)).sum::<f64>() / w.len().max(1) as f64;
    zero * weights.map_or(1.0, mean)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn health(settings: &[(&str, &str)], losses: impl IntoIterator<Item = f64>) -> Health {
        let pairs: Vec<_> = settings.iter().map(|&(k, v)| (k.to_owned(), v.to_owned())).collect();
        let mut health = Health::new(&Config::load(Some("digits"), None, &pairs).unwrap());
        let mut all: Vec<f64> = Vec::new();
        for loss in losses {
            all.push(loss);
            let last = &all[all.len().saturating_sub(100)..];
            health.record(loss, last.iter().sum::<f64>() / last.len() as f64, last.len());
        }
        health
    }

    fn repeated(parts: &[(f64, usize)]) -> impl Iterator<Item = f64> {
        parts.iter().flat_map(|&(loss, n)| std::iter::repeat_n(loss, n))
    }

    #[test]
    fn a_loss_above_that_of_predicting_zero_after_a_lower_one_has_diverged() {
        let diverged = |parts: &[(f64, usize)]| health(&[], repeated(parts)).diverged();
        // Normal training, from the first step to the last; and a single bad batch at the end.
        for parts in [
            &[(1.1, 3)][..],
            &[(1.9, 1)],
            &[(1.05, 5), (0.3, 50), (0.04, 500)],
            &[(1.0, 5), (0.05, 200), (50.0, 1)],
            &[(1.0, 5), (0.05, 200), (0.3, 100)],
            // Losses of small batches fluctuate.
            &[(1.0, 20), (0.6, 300), (1.0, 60)],
            // Neither better nor worse than at the start.
            &[(1.02, 300)],
            // An untrained network may be far from zero, and a few steps are not conclusive.
            &[(2.04, 30)],
            &[(1.0, 1), (900.0, 8)],
            &[],
        ] {
            assert_eq!(diverged(parts), None, "{parts:?}");
        }
        // Too few steps since the resume.
        let mut resumed = health(&[], repeated(&[(1.0, 20), (0.05, 300)]));
        resumed.restart();
        for _ in 0..9 {
            resumed.record(3.0, 0.1, 100);
            assert_eq!(resumed.diverged(), None);
        }
        resumed.record(3.0, 0.1, 100);
        assert!(resumed.diverged().is_some());
        // At the start, in the middle, and towards a network that predicts nothing.
        for (parts, expected) in [
            (
                &[(1.1, 2), (2761.0, 98)][..],
                "the loss is 2761.0000; predicting zero has a loss of about 1.0000",
            ),
            (&[(1.0, 20), (0.05, 300), (40.0, 10)], "and its lowest mean was 0.05"),
            (&[(1.0, 20), (0.05, 300), (1.0, 50)], "the loss is 1.0000"),
            (&[(1.0, 1), (f64::INFINITY, 10)], "the loss is inf"),
            // Back to predicting nothing, from less than twice as good.
            (&[(1.0, 20), (0.6, 300), (1.0, 100)], "the loss is 1.0000"),
        ] {
            let text = diverged(parts).expect("it has diverged");
            assert!(text.contains(expected), "{text}");
        }
    }

    #[test]
    fn divergence_is_reported_once_until_the_loss_recovers() {
        let mut health = health(&[], repeated(&[(1.0, 20), (0.05, 100), (9.0, 10)]));
        assert!(health.newly_diverged().is_some() && health.newly_diverged().is_none());
        (0..10).for_each(|_| health.record(0.1, 0.1, 100));
        assert!(health.newly_diverged().is_none());
        (0..10).for_each(|_| health.record(9.0, 1.0, 100));
        assert!(health.newly_diverged().is_some());
    }

    #[test]
    fn the_loss_of_predicting_zero_follows_the_objective() {
        let zero = |settings: &[(&str, &str)]| health(settings, []).zero;
        assert_eq!(zero(&[]), 1.0);
        assert!((zero(&[("loss.name", "l1")]) - 0.7979).abs() < 1e-4);
        assert_eq!(zero(&[("loss.name", "huber")]), 0.5);
        assert!((zero(&[("loss.offset_noise", "0.1")]) - 1.01).abs() < 1e-12);
        // min(snr, 5) / snr is at most 1, and equal to 1 at most noise levels.
        let weighted = zero(&[("loss.weighting", "min-snr")]);
        assert!(weighted > 0.7 && weighted < 1.0, "{weighted}");
    }

    #[test]
    fn a_lower_learning_rate_is_recommended() {
        for (lr, expected) in [(10.0, 2e-4), (1e-3, 1e-4), (1e-4, 1e-5)] {
            assert!((lower_rate(lr) / expected - 1.0).abs() < 1e-9);
        }
    }
}
