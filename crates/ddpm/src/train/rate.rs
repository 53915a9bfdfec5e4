//! The learning rate of each step.

use super::config::{LrScheduleKind, TrainConfig};
use serde::{Deserialize, Serialize};
use std::f64::consts::PI;

/// A smaller change of the learning rate than this is not made (as PyTorch's `ReduceLROnPlateau`).
const LEAST_CHANGE: f64 = 1e-8;

/// What "plateau" remembers: a checkpoint holds it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Plateau {
    /// The `train.lr` that it started from.
    pub started_from: f64,
    /// The learning rate now.
    pub lr: f64,
    /// Lowest mean loss of an epoch so far; none before the first.
    pub best: Option<f64>,
    /// Epochs since then, or since the learning rate was lowered.
    pub bad_epochs: u64,
    /// Sum of the losses of this epoch's steps so far.
    pub loss_sum: f64,
    /// Number of these steps.
    pub steps: u64,
}

impl Plateau {
    fn new(lr: f64) -> Self {
        Self { started_from: lr, lr, best: None, bad_epochs: 0, loss_sum: 0.0, steps: 0 }
    }
}

/// The learning rate of a run.
#[derive(Clone, Debug)]
pub struct LearningRate {
    settings: TrainConfig,
    plateau: Plateau,
}

impl LearningRate {
    /// As the settings say, from the start. "cosine" ends at `steps`, which must be known then.
    pub fn new(settings: &TrainConfig) -> Self {
        Self { settings: settings.clone(), plateau: Plateau::new(settings.lr) }
    }

    /// The learning rate of step `step`, counted from 0.
    ///
    /// ```text
    /// warm-up   lr (step + 1) / warmup_steps                                        before step warmup_steps
    /// constant  lr
    /// cosine    lr_min + (lr - lr_min) (1 + cos(pi k / K)) / 2, k = step - warmup_steps, K = steps - warmup_steps
    /// plateau   what the losses before have left of lr
    /// ```
    /// The cosine is that of Loshchilov and Hutter 2017, eq. 5, without restarts.
    pub fn at(&self, step: u64) -> f64 {
        let t = &self.settings;
        let full = if t.lr_schedule == LrScheduleKind::Plateau { self.plateau.lr } else { t.lr };
        if step < t.warmup_steps {
            return full * (step + 1) as f64 / t.warmup_steps as f64;
        }
        match t.lr_schedule {
            LrScheduleKind::Constant | LrScheduleKind::Plateau => full,
            LrScheduleKind::Cosine => {
                let all = t.steps.unwrap_or(0).saturating_sub(t.warmup_steps).max(1);
                let share = ((step - t.warmup_steps) as f64 / all as f64).min(1.0);
                t.lr_min + (full - t.lr_min) * (1.0 + (PI * share).cos()) / 2.0
            }
        }
    }

    /// Takes note of a step's loss. "plateau" looks at the mean over an epoch when it is over: where it is not lower
    /// than the lowest by the share `plateau_threshold` for more than `plateau_patience` epochs, the learning rate is
    /// multiplied by `plateau_factor` (PyTorch's `ReduceLROnPlateau` with `mode="min"`, `threshold_mode="rel"`).
    pub fn observe(&mut self, loss: f64, epoch_is_over: bool) {
        if self.settings.lr_schedule != LrScheduleKind::Plateau {
            return;
        }
        let (t, p) = (&self.settings, &mut self.plateau);
        p.loss_sum += loss;
        p.steps = p.steps.saturating_add(1);
        if !epoch_is_over {
            return;
        }
        let mean = p.loss_sum / p.steps as f64;
        (p.loss_sum, p.steps) = (0.0, 0);
        if p.best.is_none_or(|best| mean < best * (1.0 - t.plateau_threshold)) {
            (p.best, p.bad_epochs) = (Some(mean), 0);
        } else {
            p.bad_epochs = p.bad_epochs.saturating_add(1);
        }
        if p.bad_epochs > t.plateau_patience {
            let lower = (p.lr * t.plateau_factor).max(t.lr_min);
            if p.lr - lower > LEAST_CHANGE {
                p.lr = lower;
            }
            p.bad_epochs = 0;
        }
    }

    /// What must be saved to go on.
    pub fn plateau(&self) -> Option<Plateau> {
        (self.settings.lr_schedule == LrScheduleKind::Plateau).then_some(self.plateau)
    }

    /// Goes on from what was saved, if anything was. A `train.lr` that has been changed since takes the place of the
    /// learning rate that was reached. The error is the reason alone.
    pub fn restore(&mut self, saved: Option<Plateau>) -> Result<(), String> {
        let Some(mut plateau) = saved else {
            *self = Self::new(&self.settings);
            return Ok(());
        };
        if plateau.started_from != self.settings.lr {
            (plateau.started_from, plateau.lr) = (self.settings.lr, self.settings.lr);
        }
        let Plateau { lr, loss_sum, best, .. } = plateau;
        let sound =
            lr > 0.0 && lr <= self.settings.lr && loss_sum.is_finite() && best.is_none_or(f64::is_finite);
        if !sound {
            return Err(format!("the state of the learning rate cannot be: {plateau:?}"));
        }
        self.plateau = plateau;
        Ok(())
    }
}
