//! Schedules by name.

use super::Schedule;
use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};

/// A schedule's name in the settings.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ScheduleKind {
    /// [`Schedule::linear`] from `beta_start` to `beta_end`.
    Linear,
    /// [`Schedule::scaled_linear`] from `beta_start` to `beta_end`.
    ScaledLinear,
    /// Scaled-linear, under the name used by Ho et al.'s code and many tutorials.
    Quadratic,
    /// [`Schedule::cosine`].
    Cosine,
    /// [`Schedule::sigmoid`].
    Sigmoid,
    /// [`Schedule::sigmoid_beta`] from `beta_start` to `beta_end`.
    SigmoidBeta,
}

impl ScheduleKind {
    /// Every schedule.
    pub const ALL: [Self; 6] =
        [Self::Linear, Self::ScaledLinear, Self::Quadratic, Self::Cosine, Self::Sigmoid, Self::SigmoidBeta];

    /// Whether it is defined by `beta_start` and `beta_end`.
    pub fn has_ends(self) -> bool {
        !matches!(self, Self::Cosine | Self::Sigmoid)
    }

    /// Its name in the settings.
    pub fn name(self) -> &'static str {
        match self {
            Self::Linear => "linear",
            Self::ScaledLinear => "scaled-linear",
            Self::Quadratic => "quadratic",
            Self::Cosine => "cosine",
            Self::Sigmoid => "sigmoid",
            Self::SigmoidBeta => "sigmoid-beta",
        }
    }
}

impl std::fmt::Display for ScheduleKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}

impl std::str::FromStr for ScheduleKind {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name).ok_or_else(|| Error::Option {
            option: "diffusion.schedule".to_owned(),
            reason: format!(
                "unknown schedule {name:?}; give one of {}",
                Self::ALL.map(Self::name).join(", ")
            ),
        })
    }
}

/// A schedule by name, with the parameters of every kind.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ScheduleOptions {
    /// Which schedule.
    pub kind: ScheduleKind,
    /// T, the number of timesteps.
    pub timesteps: usize,
    /// The first variance, where the kind [has ends](ScheduleKind::has_ends).
    pub beta_start: f64,
    /// The last variance, where the kind has ends.
    pub beta_end: f64,
    /// Upper bound of the variances of the others.
    pub max_beta: f64,
    /// Whether to [rescale](Schedule::zero_terminal_snr) to no signal at the last timestep.
    pub zero_terminal_snr: bool,
}

impl Default for ScheduleOptions {
    /// The paper's schedule (Ho et al. 2020, section 4).
    fn default() -> Self {
        let (beta_start, beta_end, max_beta) = (1e-4, 0.02, 0.9999);
        let (kind, timesteps) = (ScheduleKind::Linear, 1000);
        Self { kind, timesteps, beta_start, beta_end, max_beta, zero_terminal_snr: false }
    }
}

impl ScheduleOptions {
    /// Computes the schedule. Add new schedules here.
    ///
    /// # Errors
    /// Those of [`Schedule::from_betas`] and [`Schedule::zero_terminal_snr`].
    pub fn build(&self) -> Result<Schedule> {
        let (timesteps, start, end) = (self.timesteps, self.beta_start, self.beta_end);
        let schedule = match self.kind {
            ScheduleKind::Linear => Schedule::linear(timesteps, start, end),
            ScheduleKind::ScaledLinear | ScheduleKind::Quadratic => {
                Schedule::scaled_linear(timesteps, start, end)
            }
            ScheduleKind::Cosine => Schedule::cosine(timesteps, self.max_beta),
            ScheduleKind::Sigmoid => Schedule::sigmoid(timesteps, self.max_beta),
            ScheduleKind::SigmoidBeta => Schedule::sigmoid_beta(timesteps, start, end),
        }?;
        if self.zero_terminal_snr { schedule.zero_terminal_snr() } else { Ok(schedule) }
    }
}
