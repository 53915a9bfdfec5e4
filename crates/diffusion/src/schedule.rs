//! Noise schedules: the variances `beta_t` and everything derived from them, in f64.
//!
//! Timesteps run from 0 to T - 1, as in every implementation; the paper counts from 1 to T, so its `beta_1`
//! is `beta(0)` here. `alpha_bar` before the first step is 1. Methods that take a timestep panic if it is not
//! below T.
//!
//! Some schedules define the variances ([`Schedule::linear`] and others), some the remaining signal
//! ([`Schedule::from_signal`]). All end with almost no signal; [`Schedule::zero_terminal_snr`] makes any
//! schedule end with none.

mod kind;

pub use kind::{ScheduleKind, ScheduleOptions};

use crate::error::{Error, Result};
use std::f64::consts::FRAC_PI_2;

/// Smallest variance of a step: below it, `1 - beta` rounds too coarsely for the posterior.
pub const MIN_BETA: f64 = 1e-12;

/// The `s` of the cosine schedule (Nichol and Dhariwal 2021, section 3.2).
const COSINE_OFFSET: f64 = 0.008;
/// Half-width of the sigmoid's argument range in [`Schedule::sigmoid_beta`].
const SIGMOID_BETA_REACH: f64 = 6.0;
/// Start and end of [`Schedule::sigmoid`] on the sigmoid (Jabri et al. 2022, appendix: start, end; tau = 1).
const SIGMOID_ENDS: (f64, f64) = (-3.0, 3.0);

/// A noise schedule: `q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I)` (Ho et al. 2020, eq. 2).
#[derive(Clone, Debug, PartialEq)]
pub struct Schedule {
    beta: Vec<f64>,
    alpha_bar: Vec<f64>,
}

/// Coefficients of the posterior `q(x_{t-1} | x_t, x_0)` (eq. 6 and 7), a normal distribution with the mean
/// `x0 * x_0 + xt * x_t` and the same variance for every element.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Posterior {
    /// `sqrt(alpha_bar_{t-1}) beta_t / (1 - alpha_bar_t)`.
    pub x0: f64,
    /// `sqrt(alpha_t) (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t)`.
    pub xt: f64,
    /// `beta_tilde_t = (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t) beta_t`; 0 at t = 0, where the mean is `x_0`.
    pub variance: f64,
}

/// A noise level: `x_t = alpha x_0 + sigma eps`, `alpha^2 + sigma^2 = 1`.
///
/// The papers parametrize it in three ways: `alpha_bar = alpha^2` (Ho et al. 2020), the noise relative to an
/// unscaled image, [`karras_sigma`](Self::karras_sigma) (Karras et al. 2022), and minus its logarithm,
/// [`lambda`](Self::lambda) (Lu et al. 2022).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Level {
    /// The timestep that the network is conditioned on; may be fractional.
    pub t: f64,
    /// Scale of the image, `sqrt(alpha_bar)`.
    pub alpha: f64,
    /// Scale of the noise, `sqrt(1 - alpha_bar)`.
    pub sigma: f64,
}

impl Level {
    /// No noise: where sampling ends. No timestep has this level, and the network is never evaluated here.
    pub const CLEAN: Self = Self { t: -1.0, alpha: 1.0, sigma: 0.0 };

    /// The noise of `x_t / alpha`, `sigma / alpha`: the sigma of Karras et al. 2022.
    pub fn karras_sigma(self) -> f64 {
        self.sigma / self.alpha
    }

    /// `ln(alpha / sigma)`, half the logarithm of the signal-to-noise ratio (Lu et al. 2022); infinite at the ends.
    pub fn lambda(self) -> f64 {
        (self.alpha / self.sigma).ln()
    }
}

impl Posterior {
    /// The posterior of a step from one level to a less noisy one.
    pub fn between(from: Level, to: Level) -> Self {
        let (before, now) = (to.alpha * to.alpha, from.alpha * from.alpha);
        Self::of(before, now, 1.0 - now / before)
    }

    /// From `alpha_bar_{t-1}`, `alpha_bar_t` and `beta_t`.
    fn of(before: f64, now: f64, beta: f64) -> Self {
        Self {
            x0: before.sqrt() * beta / (1.0 - now),
            xt: (1.0 - beta).sqrt() * (1.0 - before) / (1.0 - now),
            variance: (1.0 - before) / (1.0 - now) * beta,
        }
    }
}

impl Schedule {
    /// `beta_t` linear over `timesteps` steps, the first `beta_start` and the last `beta_end`; the paper's are 1e-4 and
    /// 0.02 over 1000 (Ho et al. 2020, section 4).
    ///
    /// # Errors
    /// Those of [`from_betas`](Self::from_betas).
    pub fn linear(timesteps: usize, beta_start: f64, beta_end: f64) -> Result<Self> {
        Self::from_betas(between(timesteps, beta_start, beta_end).collect())
    }

    /// `sqrt(beta_t)` linear, so `beta_t` is quadratic in t. Called `quad` by Ho et al.'s code, `linear` by
    /// latent diffusion, `scaled_linear` by diffusers.
    ///
    /// # Errors
    /// Those of [`from_betas`](Self::from_betas).
    pub fn scaled_linear(timesteps: usize, beta_start: f64, beta_end: f64) -> Result<Self> {
        let roots = between(timesteps, beta_start.sqrt(), beta_end.sqrt());
        Self::from_betas(roots.map(|root| root * root).collect())
    }

    /// `beta_t = beta_start + (beta_end - beta_start) sigmoid(u)`, u from -6 to 6: diffusers' `sigmoid` (from
    /// GeoDiff, Xu et al. 2022). Like there, it reaches its ends only to 0.25 %.
    ///
    /// # Errors
    /// Those of [`from_betas`](Self::from_betas).
    pub fn sigmoid_beta(timesteps: usize, beta_start: f64, beta_end: f64) -> Result<Self> {
        let u = between(timesteps, -SIGMOID_BETA_REACH, SIGMOID_BETA_REACH);
        Self::from_betas(u.map(|u| beta_start + (beta_end - beta_start) * sigmoid(u)).collect())
    }

    /// `alpha_bar = cos((t / T + s) / (1 + s) pi / 2)^2` over its value at 0, s = 0.008 (Nichol, Dhariwal, "Improved
    /// Denoising Diffusion Probabilistic Models", 2021, eq. 17).
    ///
    /// # Errors
    /// Those of [`from_signal`](Self::from_signal).
    pub fn cosine(timesteps: usize, max_beta: f64) -> Result<Self> {
        let cos = |u: f64| ((u + COSINE_OFFSET) / (1.0 + COSINE_OFFSET) * FRAC_PI_2).cos();
        Self::from_signal(timesteps, max_beta, |u| cos(u).powi(2))
    }

    /// `alpha_bar` falls along a sigmoid from 3 to -3 (Jabri, Fleet, Chen, "Scalable Adaptive Computation for
    /// Iterative Generation", 2022, with start = -3, end = 3, tau = 1).
    ///
    /// # Errors
    /// Those of [`from_signal`](Self::from_signal).
    pub fn sigmoid(timesteps: usize, max_beta: f64) -> Result<Self> {
        let (start, end) = SIGMOID_ENDS;
        Self::from_signal(timesteps, max_beta, |u| sigmoid(end) - sigmoid(start + (end - start) * u))
    }

    /// The schedule that leaves `signal(t / T) / signal(0)` of the image's variance after t of T steps;
    /// `signal` decreases on [0, 1] and may end at 0. Variances are capped at `max_beta`, so that some signal
    /// is left (0.999 in Nichol and Dhariwal 2021, section 3.2, and in diffusers; 0.9999 in tutorials).
    ///
    /// # Errors
    /// [`Error::Option`] for 0 timesteps, and for a signal that does not decrease.
    pub fn from_signal(timesteps: usize, max_beta: f64, signal: impl Fn(f64) -> f64) -> Result<Self> {
        let at = |t: usize| signal(t as f64 / timesteps as f64);
        Self::from_betas((0..timesteps).map(|t| (1.0 - at(t + 1) / at(t)).min(max_beta)).collect())
    }

    /// Arbitrary variances between 0 and 1, one per timestep. The last may be 1, which leaves no signal
    /// ("zero terminal SNR").
    ///
    /// # Errors
    /// [`Error::Option`] for an empty list, and for a variance out of range.
    pub fn from_betas(beta: Vec<f64>) -> Result<Self> {
        if beta.is_empty() {
            return Err(invalid("a schedule needs at least one timestep".to_owned()));
        }
        let last = beta.len() - 1;
        let valid = |t: usize, b: f64| b >= MIN_BETA && (b < 1.0 || (b == 1.0 && t == last));
        if let Some((t, b)) = beta.iter().enumerate().find(|&(t, &b)| !valid(t, b)) {
            return Err(invalid(format!("beta at t = {t} is {b}; it must lie between {MIN_BETA:e} and 1")));
        }
        let alpha_bar = beta
            .iter()
            .scan(1.0, |product, b| {
                *product *= 1.0 - b;
                // Subnormal products can round up and never reach 0.
                *product = if *product < f64::MIN_POSITIVE { 0.0 } else { *product };
                Some(*product)
            })
            .collect();
        Ok(Self { beta, alpha_bar })
    }

    /// This schedule with `sqrt(alpha_bar)` shifted and rescaled so that the last timestep has no signal
    /// while the first stays unchanged (Lin, Liu, Li, Yang, "Common Diffusion Noise Schedules and Sample
    /// Steps are Flawed", 2023, algorithm 1).
    ///
    /// At that timestep `x_t` is pure noise, so the noise does not determine the image: a noise prediction
    /// learns nothing from it, [`predict_x0`](crate::process::predict_x0) refuses it, and samplers start one
    /// timestep earlier, with a little signal left. (The posterior does not depend on `x_t` there, so the
    /// step would only sample new noise.) A network that predicts `x_0` or v
    /// ([`Prediction`](crate::process::Prediction)) can be trained and evaluated there.
    ///
    /// # Errors
    /// [`Error::Option`] for a single timestep, and for a schedule so long that the signal underflows before
    /// its end.
    pub fn zero_terminal_snr(&self) -> Result<Self> {
        let signal = self.timesteps_with_signal();
        if signal < self.timesteps() - 1 {
            let reason =
                format!("no signal is left from t = {signal} on; use at most {} timesteps", signal + 1);
            return Err(invalid(reason));
        }
        let (first, last) = (self.alpha_bar[0].sqrt(), self.alpha_bar[self.timesteps() - 1].sqrt());
        if first <= last {
            let reason = "diffusion.zero_terminal_snr needs at least 2 timesteps".to_owned();
            return Err(invalid(reason));
        }
        let root = |t: usize| (self.alpha_bar[t].sqrt() - last) * (first / (first - last));
        let mut before = 1.0;
        let beta = (0..self.timesteps()).map(|t| {
            let alpha_bar = if t == 0 { self.alpha_bar[0] } else { root(t).powi(2) };
            let beta = 1.0 - alpha_bar / before;
            before = alpha_bar;
            beta
        });
        Self::from_betas(beta.collect())
    }

    /// The schedule's first `n` timesteps, for sampling from partially noised images.
    ///
    /// # Panics
    /// If `n` is not 1 to T.
    #[must_use]
    pub fn truncated(&self, n: usize) -> Self {
        assert!(n > 0, "a schedule needs at least one timestep");
        Self { beta: self.beta[..n].to_vec(), alpha_bar: self.alpha_bar[..n].to_vec() }
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

    /// `alpha_bar_t`, the product of all `alpha` up to t: the remaining fraction of the image's variance.
    pub fn alpha_bar(&self, t: usize) -> f64 {
        self.alpha_bar[t]
    }

    /// The signal-to-noise ratio `alpha_bar_t / (1 - alpha_bar_t)` for images of variance 1.
    pub fn snr(&self, t: usize) -> f64 {
        self.alpha_bar[t] / (1.0 - self.alpha_bar[t])
    }

    /// Natural logarithm of [`snr`](Self::snr); minus infinity without signal.
    pub fn log_snr(&self, t: usize) -> f64 {
        self.snr(t).ln()
    }

    /// Number of timesteps with any signal left: all, or all but the last ones.
    pub fn timesteps_with_signal(&self) -> usize {
        self.alpha_bar.partition_point(|&a| a > 0.0)
    }

    /// `alpha_bar_{t-1}`; 1 before the first step.
    pub fn alpha_bar_prev(&self, t: usize) -> f64 {
        if t == 0 { 1.0 } else { self.alpha_bar[t - 1] }
    }

    /// The posterior `q(x_{t-1} | x_t, x_0)` (eq. 6 and 7).
    pub fn posterior(&self, t: usize) -> Posterior {
        Posterior::of(self.alpha_bar_prev(t), self.alpha_bar(t), self.beta(t))
    }

    /// The noise level of timestep t; at fractional t the logarithm of [`Level::karras_sigma`] is
    /// interpolated linearly, as in Karras et al.'s code. t is clamped to the schedule.
    pub fn level(&self, t: f64) -> Level {
        let t = t.clamp(0.0, (self.timesteps() - 1) as f64);
        let (below, part) = (t.floor() as usize, t.fract());
        if part == 0.0 {
            let a = self.alpha_bar(below);
            return Level { t, alpha: a.sqrt(), sigma: (1.0 - a).sqrt() };
        }
        let sigma = (log_sigma(self.alpha_bar(below)) * (1.0 - part)
            + log_sigma(self.alpha_bar(below + 1)) * part)
            .exp();
        Level { t, ..level_of_sigma(sigma) }
    }

    /// The noise level with this [`Level::karras_sigma`] and its timestep; a sigma outside the schedule gets
    /// the nearest timestep with signal.
    pub fn level_for_sigma(&self, sigma: f64) -> Level {
        let (wanted, end) = (sigma.ln(), self.timesteps_with_signal());
        let above = self.alpha_bar[..end].partition_point(|&a| log_sigma(a) < wanted);
        let t = match above {
            0 => 0.0,
            _ if above == end => (end - 1) as f64,
            _ => {
                let (low, high) = (log_sigma(self.alpha_bar[above - 1]), log_sigma(self.alpha_bar[above]));
                (above - 1) as f64 + (wanted - low) / (high - low)
            }
        };
        Level { t, ..level_of_sigma(sigma) }
    }
}

/// Logarithm of [`Level::karras_sigma`], from `alpha_bar`.
fn log_sigma(alpha_bar: f64) -> f64 {
    0.5 * ((1.0 - alpha_bar) / alpha_bar).ln()
}

/// The level of a sigma, without its timestep.
fn level_of_sigma(sigma: f64) -> Level {
    Level { t: 0.0, alpha: 1.0 / sigma.hypot(1.0), sigma: 1.0 / sigma.recip().hypot(1.0) }
}

/// `n` equally spaced values from `first` to `last`; just `first` if `n` is 1.
fn between(n: usize, first: f64, last: f64) -> impl Iterator<Item = f64> {
    let steps = n.saturating_sub(1).max(1) as f64;
    (0..n).map(move |i| first + (last - first) * i as f64 / steps)
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

fn invalid(reason: String) -> Error {
    Error::option("diffusion", reason)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(kind: ScheduleKind, timesteps: usize, zero_terminal_snr: bool) -> Result<Schedule> {
        ScheduleOptions { kind, timesteps, zero_terminal_snr, ..ScheduleOptions::default() }.build()
    }

    #[test]
    fn bad_variances_are_invalid() {
        assert!(Schedule::from_betas(vec![]).is_err());
        for bad in [0.0, 1.0 + f64::EPSILON, -0.1, f64::NAN] {
            assert!(Schedule::from_betas(vec![0.1, bad]).is_err(), "{bad}");
        }
        assert!(Schedule::from_betas(vec![1.0, 0.1]).is_err(), "no signal can follow");
        assert!(Schedule::from_betas(vec![0.1, 1.0]).is_ok());
        assert!(Schedule::linear(1, 1e-4, 0.02).is_ok());
    }

    #[test]
    fn every_schedule_decreases_the_signal_at_any_length() {
        for kind in ScheduleKind::ALL {
            for timesteps in [1, 2, 3, 300, 1000, 4000] {
                let s = of(kind, timesteps, false).unwrap();
                assert_eq!((s.timesteps(), s.timesteps_with_signal()), (timesteps, timesteps), "{kind}");
                for t in 0..timesteps {
                    assert!(s.beta(t) > 0.0 && s.beta(t) < 1.0 && s.alpha_bar(t) < s.alpha_bar_prev(t));
                    assert!(s.snr(t) > 0.0 && (s.log_snr(t) - s.snr(t).ln()).abs() == 0.0, "{kind}, {t}");
                }
            }
            assert!(of(kind, 0, false).is_err(), "{kind}");
        }
        let (a, b) = (of(ScheduleKind::ScaledLinear, 50, false), of(ScheduleKind::Quadratic, 50, false));
        assert_eq!(a.unwrap(), b.unwrap());
    }

    #[test]
    fn levels_at_fractional_timesteps_round_trip() {
        // Logarithms of sigmas up to 1e2, which differ by at least 1e-3 between timesteps.
        const TOLERANCE: f64 = 1e-9;
        for kind in ScheduleKind::ALL {
            for zero in [false, true] {
                let s = of(kind, 1000, zero).unwrap();
                let last = (s.timesteps_with_signal() - 1) as f64;
                let mut before = 0.0;
                for t in [0.0, 0.25, 1.0, 499.5, 700.0, 998.0 - 0.125, last] {
                    let level = s.level(t);
                    assert!((level.alpha.powi(2) + level.sigma.powi(2) - 1.0).abs() < TOLERANCE);
                    assert!(level.t == t && level.karras_sigma() > before, "{kind}: {t}");
                    before = level.karras_sigma();
                    let back = s.level_for_sigma(level.karras_sigma());
                    assert!((back.t - t).abs() < TOLERANCE * 1e3, "{kind}: {t} became {}", back.t);
                    assert!((back.lambda() - level.lambda()).abs() < TOLERANCE);
                }
                assert_eq!(s.level(7.0).alpha, s.alpha_bar(7).sqrt());
                assert_eq!((s.level(1e9).t, s.level(-1.0).t), (999.0, 0.0));
                assert_eq!((s.level_for_sigma(1e9).t, s.level_for_sigma(1e-9).t), (last, 0.0));
                // The posterior between adjacent levels is the timestep's; 1 - alpha_t cancels down to
                // beta_1, 1e-4 or less.
                let (a, b) = (s.posterior(500), Posterior::between(s.level(500.0), s.level(499.0)));
                assert!(
                    (a.variance / b.variance - 1.0).abs() < TOLERANCE
                        && (a.x0 / b.x0 - 1.0).abs() < TOLERANCE
                );
            }
        }
        assert_eq!((Level::CLEAN.karras_sigma(), Level::CLEAN.lambda()), (0.0, f64::INFINITY));
    }

    #[test]
    fn zero_terminal_snr_keeps_the_first_step_and_leaves_no_signal_at_the_last() {
        for kind in ScheduleKind::ALL {
            for timesteps in [2, 3, 300, 1000] {
                let (before, s) = (of(kind, timesteps, false).unwrap(), of(kind, timesteps, true).unwrap());
                let last = timesteps - 1;
                assert_eq!((s.alpha_bar(last), s.snr(last), s.beta(last)), (0.0, 0.0, 1.0), "{kind}");
                assert_eq!(s.log_snr(last), f64::NEG_INFINITY);
                assert_eq!(s.timesteps_with_signal(), last);
                // Only rounding of 1 - (1 - alpha_bar) can differ.
                assert!((s.alpha_bar(0) - before.alpha_bar(0)).abs() <= f64::EPSILON, "{kind}");
                // The posterior does not depend on x_t and is finite.
                let p = s.posterior(last);
                assert!(p.xt == 0.0 && p.x0.is_finite() && p.variance.is_finite() && p.variance > 0.0);
            }
            let s = of(kind, 10, true).unwrap();
            assert_eq!(s.zero_terminal_snr().unwrap().timesteps_with_signal(), 9, "{kind}, twice");
            let message = of(kind, 1, true).unwrap_err().to_string();
            assert!(message.contains("zero_terminal_snr needs at least 2"), "{kind}: {message}");
        }
        // e^-1000 underflows.
        let long = of(ScheduleKind::Linear, 100_000, false).unwrap();
        assert!(long.timesteps_with_signal() < 100_000);
        assert!(long.zero_terminal_snr().unwrap_err().to_string().contains("use at most"));
    }
}
