//! Learning-rate schedules.

use crate::config::{Config, LrScheduleConfig, LrScheduleKind};
use serde::{Deserialize, Serialize};
use std::f64::consts::PI;

/// Smaller changes of the learning rate than this are not applied (`eps` of PyTorch's `ReduceLROnPlateau`).
const MIN_CHANGE: f64 = 1e-8;

/// The state of "plateau", saved in checkpoints.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Plateau {
    /// The `optimizer.lr` it started from.
    pub started_from: f64,
    /// The current learning rate.
    pub lr: f64,
    /// Lowest mean loss of an epoch so far; `None` before the end of the first.
    pub best: Option<f64>,
    /// Epochs without improvement since then, or since the learning rate was lowered.
    pub bad_epochs: u64,
    /// Sum of the losses of the current epoch's steps.
    pub loss_sum: f64,
    /// Number of those steps.
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
    /// The base learning rate.
    lr: f64,
    /// The run's steps; 0 if unknown.
    steps: u64,
    settings: LrScheduleConfig,
    plateau: Plateau,
}

impl LearningRate {
    /// The schedule from the start of training. "cosine" ends at `steps`, which must be set.
    pub fn new(config: &Config) -> Self {
        let (lr, steps) = (config.optimizer.lr, config.train.steps.unwrap_or(0));
        Self { lr, steps, settings: config.lr_schedule.clone(), plateau: Plateau::new(lr) }
    }

    /// The learning rate of step `step`, counted from 0.
    ///
    /// ```text
    /// warm-up   lr (step + 1) / warmup_steps                                        before step warmup_steps
    /// constant  lr
    /// cosine    min_lr + (lr - min_lr) (1 + cos(pi k / K)) / 2, k = step - warmup_steps, K = steps - warmup_steps
    /// plateau   lr, reduced depending on the losses so far
    /// ```
    /// The cosine is that of Loshchilov and Hutter 2017, eq. 5, without restarts.
    pub fn at(&self, step: u64) -> f64 {
        let t = &self.settings;
        let full = if t.name == LrScheduleKind::Plateau { self.plateau.lr } else { self.lr };
        if step < t.warmup_steps {
            return full * (step + 1) as f64 / t.warmup_steps as f64;
        }
        match t.name {
            LrScheduleKind::Constant | LrScheduleKind::Plateau => full,
            LrScheduleKind::Cosine => {
                let all = self.steps.saturating_sub(t.warmup_steps).max(1);
                let progress = ((step - t.warmup_steps) as f64 / all as f64).min(1.0);
                t.min_lr + (full - t.min_lr) * (1.0 + (PI * progress).cos()) / 2.0
            }
        }
    }

    /// Records a step's loss. At the end of an epoch, "plateau" compares its mean loss with the best: if it has not been
    /// lower by the fraction `plateau_threshold` for more than `plateau_patience` epochs, the learning rate is multiplied
    /// by `plateau_factor` (PyTorch's `ReduceLROnPlateau` with `mode="min"`, `threshold_mode="rel"`).
    pub fn observe(&mut self, loss: f64, epoch_is_over: bool) {
        if self.settings.name != LrScheduleKind::Plateau {
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
            let lower = (p.lr * t.plateau_factor).max(t.min_lr);
            if p.lr - lower > MIN_CHANGE {
                p.lr = lower;
            }
            p.bad_epochs = 0;
        }
    }

    /// The state to save in a checkpoint.
    pub fn plateau(&self) -> Option<Plateau> {
        (self.settings.name == LrScheduleKind::Plateau).then_some(self.plateau)
    }

    /// Continues from a saved state, if there is one. If `optimizer.lr` was changed since, it replaces the learning rate
    /// that was reached. The error is only the reason.
    pub fn restore(&mut self, saved: Option<Plateau>) -> Result<(), String> {
        let Some(mut plateau) = saved else {
            self.plateau = Plateau::new(self.lr);
            return Ok(());
        };
        if plateau.started_from != self.lr {
            (plateau.started_from, plateau.lr) = (self.lr, self.lr);
        }
        let Plateau { lr, loss_sum, best, .. } = plateau;
        let valid = lr > 0.0 && lr <= self.lr && loss_sum.is_finite() && best.is_none_or(f64::is_finite);
        if !valid {
            return Err(format!("the state of the learning rate is invalid: {plateau:?}"));
        }
        self.plateau = plateau;
        Ok(())
    }
}
