//! Noise schedules: the variances `beta_t` and everything that follows from them, in f64.
//!
//! Timesteps count from 0 to T - 1, as in every implementation; the paper counts from 1 to T, so that its `beta_1` is
//! `beta(0)` here. `alpha_bar` before the first step is 1. Methods that take a timestep panic where it is not below T.

use crate::error::{Error, Result};
use crate::train::config::{DiffusionConfig, ScheduleKind};

/// A noise schedule: `q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I)` (Ho et al. 2020, eq. 2).
#[derive(Clone, Debug, PartialEq)]
pub struct Schedule {
    beta: Vec<f64>,
    alpha_bar: Vec<f64>,
}

/// Coefficients of the posterior `q(x_{t-1} | x_t, x_0)` (eq. 6 and 7), a normal distribution with the mean
/// `x0 * x_0 + xt * x_t` and the same variance for every number.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Posterior {
    /// `sqrt(alpha_bar_{t-1}) beta_t / (1 - alpha_bar_t)`.
    pub x0: f64,
    /// `sqrt(alpha_t) (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t)`.
    pub xt: f64,
    /// `beta_tilde_t = (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t) beta_t`; 0 at t = 0, where the mean is `x_0`.
    pub variance: f64,
}

impl Schedule {
    /// `beta_t` linear over `timesteps` steps, the first `beta_start` and the last `beta_end`; the paper's are 1e-4 and
    /// 0.02 over 1000 (Ho et al. 2020, section 4).
    ///
    /// # Errors
    /// As [`from_betas`](Self::from_betas).
    pub fn linear(timesteps: usize, beta_start: f64, beta_end: f64) -> Result<Self> {
        let last = timesteps.saturating_sub(1).max(1) as f64;
        Self::from_betas(
            (0..timesteps).map(|t| beta_start + (beta_end - beta_start) * t as f64 / last).collect(),
        )
    }

    /// The schedule that the settings describe; a new schedule is one more line.
    pub fn from_config(config: &DiffusionConfig) -> Result<Self> {
        match config.schedule {
            ScheduleKind::Linear => Self::linear(config.timesteps, config.beta_start, config.beta_end),
        }
    }

    /// Any variances between 0 and 1, one a timestep.
    ///
    /// # Errors
    /// [`Error::Config`] for none at all, and for one that is not between 0 and 1.
    pub fn from_betas(beta: Vec<f64>) -> Result<Self> {
        let error = |reason: String| Error::Config { key: "diffusion".to_owned(), reason };
        if beta.is_empty() {
            return Err(error("a schedule needs at least one timestep".to_owned()));
        }
        if let Some((t, b)) = beta.iter().enumerate().find(|(_, b)| !(**b > 0.0 && **b < 1.0)) {
            return Err(error(format!("beta at t = {t} is {b}; it must lie between 0 and 1")));
        }
        let alpha_bar = beta
            .iter()
            .scan(1.0, |product, b| {
                *product *= 1.0 - b;
                Some(*product)
            })
            .collect();
        Ok(Self { beta, alpha_bar })
    }

    /// T, the number of timesteps.
    pub fn timesteps(&self) -> usize {
        self.beta.len()
    }

    /// `beta_t`, the variance of the noise that step t adds.
    pub fn beta(&self, t: usize) -> f64 {
        self.beta[t]
    }

    /// `alpha_t = 1 - beta_t`.
    pub fn alpha(&self, t: usize) -> f64 {
        1.0 - self.beta[t]
    }

    /// `alpha_bar_t`, the product of all `alpha` up to t: the share of the picture's variance that is left.
    pub fn alpha_bar(&self, t: usize) -> f64 {
        self.alpha_bar[t]
    }

    /// `alpha_bar_{t-1}`; 1 before the first step.
    pub fn alpha_bar_before(&self, t: usize) -> f64 {
        if t == 0 { 1.0 } else { self.alpha_bar[t - 1] }
    }

    /// The posterior `q(x_{t-1} | x_t, x_0)` (eq. 6 and 7).
    pub fn posterior(&self, t: usize) -> Posterior {
        let (before, now) = (self.alpha_bar_before(t), self.alpha_bar(t));
        Posterior {
            x0: before.sqrt() * self.beta(t) / (1.0 - now),
            xt: self.alpha(t).sqrt() * (1.0 - before) / (1.0 - now),
            variance: (1.0 - before) / (1.0 - now) * self.beta(t),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bad_variances_are_refused() {
        assert!(Schedule::from_betas(vec![]).is_err());
        for bad in [0.0, 1.0, -0.1, f64::NAN] {
            assert!(Schedule::from_betas(vec![0.1, bad]).is_err(), "{bad}");
        }
        assert!(Schedule::linear(1, 1e-4, 0.02).is_ok());
    }
}
