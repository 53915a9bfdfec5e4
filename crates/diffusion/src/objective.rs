//! The training objective: the network's target and the weight of each timestep.
//!
//! The losses for noise, image and v differ only by a factor (Salimans, Ho 2022, section 4): with the
//! signal-to-noise ratio `snr = alpha^2 / sigma^2`,
//! ```text
//! || eps - eps' ||^2 = snr || x_0 - x_0' ||^2,    || v - v' ||^2 = (snr + 1) || x_0 - x_0' ||^2
//! ```
//! so each weighting is defined once, for `|| x_0 - x_0' ||^2`, and applies to all three.

use crate::process::Prediction;
use crate::schedule::{Level, Schedule};
use ddpm_kernels::loss::Loss;
use serde::{Deserialize, Serialize};

/// The loss function.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LossKind {
    /// Mean squared error, as in the paper.
    Mse,
    /// Mean absolute error.
    L1,
    /// Quadratic below `huber_delta`, linear above.
    Huber,
}

/// Weight of a timestep in the loss.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Weighting {
    /// Equal weights for any prediction type (Ho et al. 2020, eq. 14).
    Plain,
    /// `min(snr, gamma)` (Hang et al., "Efficient Diffusion Training via Min-SNR Weighting Strategy", 2023, section 3.4).
    MinSnr,
    /// `snr / (k + snr)^gamma` (Choi et al., "Perception Prioritized Training of Diffusion Models", 2022, eq. 8).
    P2,
    /// `max(snr, 1)` (Salimans, Ho, "Progressive Distillation", 2022, section 4).
    SnrTruncated,
}

/// The training objective.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Objective {
    /// What the network predicts.
    pub prediction: Prediction,
    /// Loss function.
    pub loss: Loss,
    /// Weight of each timestep.
    pub weighting: Weighting,
    /// The gamma of min-SNR.
    pub min_snr_gamma: f64,
    /// The gamma and the k of P2.
    pub p2: (f64, f64),
    /// Standard deviation of offset noise, which is constant over an image's pixels, one value per channel,
    /// and added to the noise (Guttenberg, "Diffusion with Offset Noise", 2023); 0: none.
    pub offset_noise: f64,
    /// Standard deviation of noise that is added to the noisy image but not to the target (Ning et al.,
    /// "Input Perturbation Reduces Exposure Bias in Diffusion Models", 2023, algorithm 1); 0: none.
    pub input_perturbation: f64,
    /// Weight of the variational bound for networks with learned variance: the hybrid loss `L_simple + weight
    /// L_vlb` (Nichol, Dhariwal 2021, eq. 16), both means over all elements, `L_vlb` in bits, as in their
    /// code.
    pub vlb_weight: f64,
}

impl Default for Objective {
    /// `L_simple` (Ho et al. 2020, eq. 14).
    fn default() -> Self {
        Self {
            prediction: Prediction::Eps,
            loss: Loss::Mse,
            weighting: Weighting::Plain,
            min_snr_gamma: 5.0,
            p2: (1.0, 1.0),
            offset_noise: 0.0,
            input_perturbation: 0.0,
            vlb_weight: 0.001,
        }
    }
}

impl Objective {
    /// The weight of a level in the loss of the prediction; infinite only for noise prediction without signal
    /// under [`Weighting::SnrTruncated`], which still weights the image.
    pub fn weight(&self, level: Level) -> f64 {
        let snr = (level.alpha / level.sigma).powi(2);
        // Without signal, snr / snr takes its limit, 1.
        let over_snr = |w: f64| if snr == 0.0 { 1.0 } else { w / snr };
        let (gamma, k) = self.p2;
        match (self.weighting, self.prediction) {
            (Weighting::Plain, _) => 1.0,
            (Weighting::MinSnr, Prediction::Eps) => over_snr(snr.min(self.min_snr_gamma)),
            (Weighting::P2, Prediction::Eps) => (k + snr).powf(-gamma),
            (Weighting::SnrTruncated, Prediction::Eps) => snr.max(1.0) / snr,
            (weighting, prediction) => {
                let of_x0 = match weighting {
                    Weighting::MinSnr => snr.min(self.min_snr_gamma),
                    Weighting::P2 => snr / (k + snr).powf(gamma),
                    Weighting::SnrTruncated | Weighting::Plain => snr.max(1.0),
                };
                if prediction == Prediction::V { of_x0 / (snr + 1.0) } else { of_x0 }
            }
        }
    }

    /// [`weight`](Self::weight) of every timestep; `None` if all are 1.
    pub fn weights(&self, schedule: &Schedule) -> Option<Vec<f32>> {
        if self.weighting == Weighting::Plain {
            return None;
        }
        let of = |t: usize| self.weight(schedule.level(t as f64)) as f32;
        Some((0..schedule.timesteps()).map(of).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn level(snr: f64) -> Level {
        let alpha = (snr / (1.0 + snr)).sqrt();
        Level { t: 0.0, alpha, sigma: (1.0 - alpha * alpha).sqrt() }
    }

    #[test]
    fn a_weighting_gives_the_same_loss_for_any_prediction_type() {
        // Powers and roots, a few rounding errors each.
        const TOLERANCE: f64 = 1e-12;
        for weighting in [Weighting::MinSnr, Weighting::P2, Weighting::SnrTruncated] {
            for snr in [1e-3, 0.5, 1.0, 4.0, 7.0, 1e3] {
                let level = level(snr);
                let (x_0, eps, other) = (0.3, -1.1, -0.2);
                let x_t = level.alpha * x_0 + level.sigma * eps;
                let mut losses = Prediction::ALL.map(|prediction| {
                    let objective = Objective { prediction, weighting, ..Objective::default() };
                    // The output of a network that predicts the image `other`.
                    let noise = (x_t - level.alpha * other) / level.sigma;
                    let (target, output) =
                        (prediction.target(level, x_0, eps), prediction.target(level, other, noise));
                    objective.weight(level) * (target - output).powi(2)
                });
                let first = losses[0];
                losses.iter_mut().for_each(|l| *l = (*l / first - 1.0).abs());
                assert!(losses.iter().all(|&l| l < TOLERANCE), "{weighting:?}, {snr}: {losses:?}");
            }
        }
    }

    #[test]
    fn the_weights_match_the_papers() {
        let with = |prediction, weighting, snr| {
            Objective { prediction, weighting, p2: (0.5, 2.0), ..Objective::default() }.weight(level(snr))
        };
        use Prediction::{Eps, V, X0};
        for (prediction, weighting, snr, want) in [
            (Eps, Weighting::Plain, 9.0, 1.0),
            (X0, Weighting::Plain, 9.0, 1.0),
            (V, Weighting::Plain, 9.0, 1.0),
            // Hang et al., section 3.4: min(snr, 5), over snr, over snr + 1.
            (X0, Weighting::MinSnr, 10.0, 5.0),
            (X0, Weighting::MinSnr, 2.0, 2.0),
            (Eps, Weighting::MinSnr, 10.0, 0.5),
            (Eps, Weighting::MinSnr, 2.0, 1.0),
            (V, Weighting::MinSnr, 9.0, 0.5),
            // Choi et al., eq. 8, is 1 / (k + snr)^gamma times the loss of the noise.
            (Eps, Weighting::P2, 7.0, 1.0 / 3.0),
            (X0, Weighting::P2, 7.0, 7.0 / 3.0),
            // Salimans and Ho, section 4.
            (X0, Weighting::SnrTruncated, 0.25, 1.0),
            (X0, Weighting::SnrTruncated, 4.0, 4.0),
            (Eps, Weighting::SnrTruncated, 0.25, 4.0),
            (V, Weighting::SnrTruncated, 3.0, 0.75),
            // No signal.
            (Eps, Weighting::MinSnr, 0.0, 1.0),
            (V, Weighting::MinSnr, 0.0, 0.0),
            (V, Weighting::SnrTruncated, 0.0, 1.0),
            (X0, Weighting::SnrTruncated, 0.0, 1.0),
        ] {
            let got = with(prediction, weighting, snr);
            assert!((got - want).abs() < 1e-12, "{prediction}, {weighting:?}, snr {snr}: {got}, not {want}");
        }
    }
}
