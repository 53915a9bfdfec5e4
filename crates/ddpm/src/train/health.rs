//! Whether a training diverges: its loss against that of a network that says nothing, and against its own best.

use super::checkpoint;
use super::config::Config;
use super::run::RunFolder;
use crate::objective::Objective;
use crate::process::Prediction;
use crate::schedule::Schedule;
use ddpm_engine::ops::Loss;
use std::collections::VecDeque;

/// Losses whose median is what the loss is now: single steps say little, and one bad batch nothing.
const RECENT: usize = 10;
/// Losses that a mean needs to count as one that was reached.
const ENOUGH: usize = 20;
/// Share of the loss of a prediction of zero from which on hardly anything is predicted.
const NOTHING: f64 = 0.95;
/// Share of it below which something was learnt.
const LEARNT: f64 = 0.8;
/// How many times its lowest mean the loss must be: noise alone does not make that.
const RISE: f64 = 2.0;
/// Largest learning rate that is advised; 1e-4 to 2e-4 are usual with Adam.
const USUAL_LR: f64 = 2e-4;

/// The losses of a training so far.
pub(super) struct Health {
    /// The loss of a prediction of zero, or a little more.
    zero: f64,
    /// The lowest mean loss that was reached; that of a prediction of zero at first.
    lowest: f64,
    /// The first loss of all, that of drawn or given weights.
    first: Option<f64>,
    /// The mean loss of the last steps, where they are enough to count.
    mean: Option<f64>,
    /// Losses since the training was begun or taken up.
    here: usize,
    recent: VecDeque<f64>,
    told: bool,
}

impl Health {
    pub fn new(config: &Config) -> Self {
        let zero = loss_of_zero(config);
        Self { zero, lowest: zero, first: None, mean: None, here: 0, recent: VecDeque::new(), told: false }
    }

    /// Takes the loss of a step, and the mean of the last `steps` steps.
    pub fn note(&mut self, loss: f64, mean: f64, steps: usize) {
        if self.recent.len() == RECENT {
            self.recent.pop_front();
        }
        self.recent.push_back(loss);
        self.first.get_or_insert(loss);
        self.here += 1;
        self.mean = (steps >= ENOUGH).then_some(mean);
        if steps >= ENOUGH && mean < self.lowest {
            self.lowest = mean;
        }
    }

    /// The loss now.
    fn now(&self) -> Option<f64> {
        let mut sorted: Vec<f64> = self.recent.iter().copied().collect();
        sorted.sort_by(f64::total_cmp);
        sorted.get(sorted.len() / 2).copied()
    }

    /// Whether such a loss is one of a training that has diverged: it is no better than predicting nothing, and was better before;
    /// or it is far worse.
    pub fn is_bad(&self, loss: f64) -> bool {
        // A value that is none is bad.
        let base = match self.lowest < self.zero {
            true => self.lowest,
            false => self.first.map_or(self.zero, |first| first.max(self.zero)),
        };
        !(loss <= NOTHING * self.zero || loss <= RISE * base)
    }

    /// Whether such a mean loss is one of a training that has diverged: as [`is_bad`](Self::is_bad), or that of a network that has
    /// come to predict nothing, which a lower mean, but not single losses, tells from one that never learnt much.
    pub fn is_bad_mean(&self, mean: f64) -> bool {
        self.is_bad(mean) || (self.lowest < LEARNT * self.zero && mean > NOTHING * self.zero)
    }

    /// The losses so far are those of an earlier part of the training, perhaps of another objective: a few more say what is now.
    pub fn take_up(&mut self) {
        self.here = 0;
    }

    /// What a person is told of a training that has diverged; `None` if it has not.
    pub fn diverged(&self) -> Option<String> {
        let enough = self.here >= RECENT;
        let now = self.now().filter(|&loss| enough && self.is_bad(loss));
        let now = now.or(self.mean.filter(|&mean| enough && self.is_bad_mean(mean)))?;
        let lowest = match self.lowest < self.zero {
            true => format!(", and was down to {:.4}", self.lowest),
            false => String::new(),
        };
        Some(format!("the loss is {now:.4}: predicting nothing has about {:.4}{lowest}", self.zero))
    }

    /// As [`diverged`](Self::diverged), once until the loss is good again.
    pub fn newly_diverged(&mut self) -> Option<String> {
        let diverged = self.diverged();
        let new = !std::mem::replace(&mut self.told, diverged.is_some());
        diverged.filter(|_| new)
    }
}

impl Health {
    /// From where, and how, to go on after the training left what is good, or could not make the step behind `failed`; `lr` is its
    /// learning rate, and `given` whether it began with given weights.
    pub fn way_back(&self, run: &RunFolder, lr: f64, failed: Option<u64>, given: bool) -> String {
        const LOOK: &str = "the images (ddpm data check)";
        if failed == Some(0) {
            // No learning rate was used yet.
            let weights = if given { "the weights that it starts from (--init), and at " } else { "" };
            return format!("It is the first step: look at {weights}{LOOK}");
        }
        let dir = run.checkpoints();
        let steps = checkpoint::list(&dir).unwrap_or_default();
        let good = |step: &&u64| {
            let loss = checkpoint::loss_of(&checkpoint::path_of(&dir, **step));
            // One without a loss is that of given weights.
            failed != Some(**step) && loss.is_some_and(|loss| loss.is_none_or(|loss| !self.is_bad_mean(loss)))
        };
        let (advised, again) = (format!("--lr {:e}", lower_rate(lr)), "train again from the start");
        let way = match steps.iter().rev().find(good) {
            Some(step) => format!(
                "Go on from step {step}, the newest checkpoint that has not diverged, with a lower learning rate (it was {lr:e}): \
                 ddpm train --resume {} --checkpoint {step} {advised}",
                run.path().display()
            ),
            None if steps.is_empty() => {
                format!(
                    "There is no checkpoint yet: {again}, with a lower learning rate than {lr:e}: {advised}"
                )
            }
            None => format!(
                "The checkpoints that there are have diverged as well: {again}, with a lower learning rate than {lr:e}: \
                 {advised}"
            ),
        };
        format!("{way}; and look at {LOOK}")
    }
}

/// A learning rate that is likely to do where `lr` is too high.
fn lower_rate(lr: f64) -> f64 {
    (lr / 10.0).min(USUAL_LR)
}

/// The mean loss of a prediction of zero: of noise, the moments of normal values; of x_0 and v, whose values are at most as large on
/// average, a bound.
fn loss_of_zero(config: &Config) -> f64 {
    let objective = Objective::from_config(config);
    let square = match objective.prediction {
        Prediction::X0 => 1.0,
        Prediction::Eps | Prediction::V => 1.0 + objective.offset_noise.powi(2),
    };
    // E|z| of a normal value.
    let of_normal =
        if objective.prediction == Prediction::Eps { (2.0 / std::f64::consts::PI).sqrt() } else { 1.0 };
    let absolute = of_normal * square.sqrt();
    let zero = match objective.loss {
        Loss::Mse => square,
        Loss::L1 => absolute,
        Loss::Huber { delta } => (0.5 * square).min(f64::from(delta) * absolute),
    };
    let weights = Schedule::from_config(&config.diffusion).ok().and_then(|s| objective.weights(&s));
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
            health.note(loss, last.iter().sum::<f64>() / last.len() as f64, last.len());
        }
        health
    }

    fn repeated(parts: &[(f64, usize)]) -> impl Iterator<Item = f64> {
        parts.iter().flat_map(|&(loss, n)| std::iter::repeat_n(loss, n))
    }

    #[test]
    fn a_loss_above_that_of_predicting_nothing_that_was_lower_before_has_diverged() {
        let diverged = |parts: &[(f64, usize)]| health(&[], repeated(parts)).diverged();
        // As training goes, from the first step to the last; and a single bad batch at the end.
        for parts in [
            &[(1.1, 3)][..],
            &[(1.9, 1)],
            &[(1.05, 5), (0.3, 50), (0.04, 500)],
            &[(1.0, 5), (0.05, 200), (50.0, 1)],
            &[(1.0, 5), (0.05, 200), (0.3, 100)],
            // Losses of small batches go up and down.
            &[(1.0, 20), (0.6, 300), (1.0, 60)],
            // No better than at the start, and no worse.
            &[(1.02, 300)],
            // An untrained network may be far from zero, and a few steps say nothing.
            &[(2.04, 30)],
            &[(1.0, 1), (900.0, 8)],
            &[],
        ] {
            assert_eq!(diverged(parts), None, "{parts:?}");
        }
        // Few steps of another objective, or few at all.
        let mut taken_up = health(&[], repeated(&[(1.0, 20), (0.05, 300)]));
        taken_up.take_up();
        for _ in 0..9 {
            taken_up.note(3.0, 0.1, 100);
            assert_eq!(taken_up.diverged(), None);
        }
        taken_up.note(3.0, 0.1, 100);
        assert!(taken_up.diverged().is_some());
        // From the start, in the middle, and to a network that says nothing any more.
        for (parts, said) in [
            (&[(1.1, 2), (2761.0, 98)][..], "the loss is 2761.0000: predicting nothing has about 1.0000"),
            (&[(1.0, 20), (0.05, 300), (40.0, 10)], "and was down to 0.05"),
            (&[(1.0, 20), (0.05, 300), (1.0, 50)], "the loss is 1.0000"),
            (&[(1.0, 1), (f64::INFINITY, 10)], "the loss is inf"),
            // To nothing from what was not twice as good.
            (&[(1.0, 20), (0.6, 300), (1.0, 100)], "the loss is 1.0000"),
        ] {
            let text = diverged(parts).expect("it has diverged");
            assert!(text.contains(said), "{text}");
        }
    }

    #[test]
    fn it_is_told_once_until_the_loss_is_good_again() {
        let mut health = health(&[], repeated(&[(1.0, 20), (0.05, 100), (9.0, 10)]));
        assert!(health.newly_diverged().is_some() && health.newly_diverged().is_none());
        (0..10).for_each(|_| health.note(0.1, 0.1, 100));
        assert!(health.newly_diverged().is_none());
        (0..10).for_each(|_| health.note(9.0, 1.0, 100));
        assert!(health.newly_diverged().is_some());
    }

    #[test]
    fn the_loss_of_zero_is_that_of_the_objective() {
        let zero = |settings: &[(&str, &str)]| health(settings, []).zero;
        assert_eq!(zero(&[]), 1.0);
        assert!((zero(&[("train.loss", "l1")]) - 0.7979).abs() < 1e-4);
        assert_eq!(zero(&[("train.loss", "huber")]), 0.5);
        assert!((zero(&[("train.offset_noise", "0.1")]) - 1.01).abs() < 1e-12);
        // min(snr, 5) / snr is at most 1, and 1 at most levels of noise.
        let weighted = zero(&[("train.loss_weight", "min-snr")]);
        assert!(weighted > 0.7 && weighted < 1.0, "{weighted}");
    }

    #[test]
    fn a_lower_learning_rate_is_advised() {
        for (lr, advised) in [(10.0, 2e-4), (1e-3, 1e-4), (1e-4, 1e-5)] {
            assert!((lower_rate(lr) / advised - 1.0).abs() < 1e-9);
        }
    }
}
