//! The forward process and its posterior, on slices (Ho, Jain, Abbeel 2020).
//!
//! Data is f32, coefficients are f64. All slices of a call have the same length; `t` is below T.
//!
//! [`Prediction`] defines what a network's output means; all conversions between noise, image and v are here.

use crate::error::{Error, Result};
use crate::schedule::{Level, Schedule};
use serde::{Deserialize, Serialize};

/// What a network predicts from a noisy image `x_t = alpha x_0 + sigma eps` ([`Level`]); each determines the
/// others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Prediction {
    /// The noise `eps` (Ho et al. 2020).
    #[default]
    Eps,
    /// The image `x_0`.
    X0,
    /// `v = alpha eps - sigma x_0` (Salimans, Ho, "Progressive Distillation for Fast Sampling of Diffusion Models", 2022,
    /// section 4).
    V,
}

impl Prediction {
    /// All prediction types.
    pub const ALL: [Self; 3] = [Self::Eps, Self::X0, Self::V];

    /// The name in the settings.
    pub fn name(self) -> &'static str {
        match self {
            Self::Eps => "eps",
            Self::X0 => "x0",
            Self::V => "v",
        }
    }

    /// The training target for an image and its noise.
    pub fn target(self, level: Level, x_0: f64, eps: f64) -> f64 {
        match self {
            Self::Eps => eps,
            Self::X0 => x_0,
            Self::V => level.alpha * eps - level.sigma * x_0,
        }
    }

    /// The coefficients of `x_t` and the output in [`x_0`](Self::x_0).
    pub fn to_x_0(self, level: Level) -> (f64, f64) {
        match self {
            Self::Eps => (1.0 / level.alpha, -level.sigma / level.alpha),
            Self::X0 => (0.0, 1.0),
            Self::V => (level.alpha, -level.sigma),
        }
    }

    /// The image implied by an output; not finite for [`Eps`](Self::Eps) without signal.
    pub fn x_0(self, level: Level, x_t: f64, output: f64) -> f64 {
        match self {
            Self::Eps => (x_t - level.sigma * output) / level.alpha,
            Self::X0 => output,
            Self::V => level.alpha * x_t - level.sigma * output,
        }
    }

    /// The noise implied by an output; not finite for [`X0`](Self::X0) without noise.
    pub fn eps(self, level: Level, x_t: f64, output: f64) -> f64 {
        match self {
            Self::Eps => output,
            Self::X0 => (x_t - level.alpha * output) / level.sigma,
            Self::V => level.sigma * x_t + level.alpha * output,
        }
    }
}

impl std::fmt::Display for Prediction {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}

/// The forward process in one step: `x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps` (Ho et al. 2020, eq. 4).
///
/// `eps` is standard normal noise.
pub fn q_sample(schedule: &Schedule, t: usize, x_0: &[f32], eps: &[f32], x_t: &mut [f32]) {
    let (signal, noise) = (schedule.alpha_bar(t).sqrt(), (1.0 - schedule.alpha_bar(t)).sqrt());
    for ((x_t, &x_0), &eps) in x_t.iter_mut().zip(x_0).zip(eps) {
        *x_t = (signal * f64::from(x_0) + noise * f64::from(eps)) as f32;
    }
}

/// The image implied by a noise prediction: `x_0 = (x_t - sqrt(1 - alpha_bar_t) eps) / sqrt(alpha_bar_t)`
/// (eq. 15).
///
/// With `clip`, values are clipped to [-1, 1], the range of images. At large t the division amplifies small
/// errors of `eps`, which clipping limits.
///
/// # Errors
/// [`Error::Option`] at a timestep without signal (`alpha_bar_t` = 0), where the noise does not determine the
/// image.
pub fn predict_x0(
    schedule: &Schedule,
    t: usize,
    x_t: &[f32],
    eps: &[f32],
    clip: bool,
    x_0: &mut [f32],
) -> Result<()> {
    let level = schedule.level(t as f64);
    if level.alpha == 0.0 {
        return Err(no_signal(t as f64));
    }
    for ((x_0, &x_t), &eps) in x_0.iter_mut().zip(x_t).zip(eps) {
        let x = Prediction::Eps.x_0(level, f64::from(x_t), f64::from(eps));
        *x_0 = if clip { x.clamp(-1.0, 1.0) } else { x } as f32;
    }
    Ok(())
}

/// The error for predicting an image from noise at a level without signal.
pub(crate) fn no_signal(t: f64) -> Error {
    let reason = format!(
        "no signal is left at t = {t}, where the predicted noise does not determine the image; start at an earlier timestep, or \
         train with diffusion.prediction = v"
    );
    Error::option("diffusion.zero_terminal_snr", reason)
}

/// The posterior's mean, `mu_tilde_t(x_t, x_0)` (eq. 7). With [`predict_x0`] unclipped it is eq. 11.
pub fn posterior_mean(schedule: &Schedule, t: usize, x_0: &[f32], x_t: &[f32], mean: &mut [f32]) {
    let p = schedule.posterior(t);
    for ((mean, &x_0), &x_t) in mean.iter_mut().zip(x_0).zip(x_t) {
        *mean = (p.x0 * f64::from(x_0) + p.xt * f64::from(x_t)) as f32;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_prediction_implies_the_same_image_and_noise() {
        // A few rounding errors of values up to 2 divided by alpha or sigma, which are at least 0.1 here.
        const TOLERANCE: f64 = 100.0 * f64::EPSILON;
        for alpha in [0.1f64, 0.5, 0.9, 0.99] {
            let level = Level { t: 0.0, alpha, sigma: (1.0 - alpha * alpha).sqrt() };
            for (x_0, eps) in [(0.3, -1.2), (-1.0, 0.0), (0.7, 2.0)] {
                let x_t = level.alpha * x_0 + level.sigma * eps;
                for prediction in Prediction::ALL {
                    let output = prediction.target(level, x_0, eps);
                    assert!((prediction.x_0(level, x_t, output) - x_0).abs() < TOLERANCE, "{prediction}");
                    let (of_x_t, of_output) = prediction.to_x_0(level);
                    assert!((of_x_t * x_t + of_output * output - x_0).abs() < TOLERANCE, "{prediction}");
                    assert!((prediction.eps(level, x_t, output) - eps).abs() < TOLERANCE, "{prediction}");
                }
            }
        }
        // At the ends, v is the noise of a clean image and minus the image of pure noise.
        let (clean, noise) = (Level::CLEAN, Level { t: 9.0, alpha: 0.0, sigma: 1.0 });
        assert_eq!(
            (Prediction::V.target(clean, 0.3, 2.0), Prediction::V.target(noise, 0.3, 2.0)),
            (2.0, -0.3)
        );
        assert_eq!((Prediction::V.x_0(noise, 2.0, -0.3), Prediction::V.eps(noise, 2.0, -0.3)), (0.3, 2.0));
    }

    #[test]
    fn predicting_the_image_without_signal_is_refused() {
        let schedule = Schedule::linear(10, 1e-4, 0.02).unwrap().zero_terminal_snr().unwrap();
        let (x_t, mut x_0) = ([0.3, -2.0], [f32::NAN; 2]);
        let error = predict_x0(&schedule, 9, &x_t, &x_t, true, &mut x_0).unwrap_err().to_string();
        assert!(error.contains("zero_terminal_snr") && error.contains("t = 9"), "{error}");
        predict_x0(&schedule, 8, &x_t, &[0.1, 0.2], true, &mut x_0).unwrap();
        assert!(x_0.iter().all(|x| x.abs() <= 1.0));
        // The forward process gives pure noise.
        let mut noisy = [0.0; 2];
        q_sample(&schedule, 9, &[1.0, 1.0], &x_t, &mut noisy);
        assert_eq!(noisy, x_t);
    }
}
