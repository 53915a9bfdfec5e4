//! Noise schedules: the variances `beta_t` and everything that follows from them, in f64.
//!
//! Timesteps count from 0 to T - 1, as in every implementation; the paper counts from 1 to T, so that its `beta_1` is
//! `beta(0)` here. `alpha_bar` before the first step is 1. Methods that take a timestep panic where it is not below T.
//!
//! Some schedules choose the variances ([`Schedule::linear`] and others), some what is left of the image
//! ([`Schedule::from_signal`]). Those end with hardly any signal; [`Schedule::zero_terminal_snr`] makes any schedule
//! end with none at all.

use crate::error::{Error, Result};
use crate::train::config::{DiffusionConfig, ScheduleKind};
use std::f64::consts::FRAC_PI_2;

/// Smallest variance of a step: below it `1 - beta` is rounded too coarsely for the posterior.
pub(crate) const MIN_BETA: f64 = 1e-12;

/// The `s` of the cosine schedule (Nichol and Dhariwal 2021, section 3.2).
const COSINE_OFFSET: f64 = 0.008;
/// How far the sigmoid of [`Schedule::sigmoid_beta`] is followed to both sides.
const SIGMOID_BETA_REACH: f64 = 6.0;
/// Where [`Schedule::sigmoid`] begins and ends on the sigmoid (Jabri et al. 2022, appendix: start, end; tau = 1).
const SIGMOID_ENDS: (f64, f64) = (-3.0, 3.0);

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

/// How noisy images are: `x_t = alpha x_0 + sigma eps`, `alpha^2 + sigma^2 = 1`; what samplers walk along.
///
/// The same level has three measures in the papers: `alpha_bar = alpha^2` (Ho et al. 2020), the noise of an image that
/// keeps its size, [`ratio`](Self::ratio) (Karras et al. 2022), and its logarithm, [`lambda`](Self::lambda) (Lu et al. 2022).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Level {
    /// The timestep, which the network is told; it may lie between two.
    pub t: f64,
    /// What images are multiplied by, `sqrt(alpha_bar)`.
    pub alpha: f64,
    /// What noise is multiplied by, `sqrt(1 - alpha_bar)`.
    pub sigma: f64,
}

impl Level {
    /// No noise: where sampling ends. No timestep has it, and the network is never asked there.
    pub const CLEAN: Self = Self { t: -1.0, alpha: 1.0, sigma: 0.0 };

    /// The noise of `x_t / alpha`, `sigma / alpha`: the sigma of Karras et al. 2022.
    pub fn ratio(self) -> f64 {
        self.sigma / self.alpha
    }

    /// `ln(alpha / sigma)`, half the logarithm of the signal-to-noise ratio (Lu et al. 2022); infinite at the ends.
    pub fn lambda(self) -> f64 {
        (self.alpha / self.sigma).ln()
    }
}

impl Posterior {
    /// That of a step from one level to a less noisy one.
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
    /// As [`from_betas`](Self::from_betas).
    pub fn linear(timesteps: usize, beta_start: f64, beta_end: f64) -> Result<Self> {
        Self::from_betas(between(timesteps, beta_start, beta_end).collect())
    }

    /// The square of `sqrt(beta_t)` linear: quadratic in t. Ho et al.'s program calls it `quad`, latent diffusion's
    /// `linear`, diffusers `scaled_linear`.
    ///
    /// # Errors
    /// As [`from_betas`](Self::from_betas).
    pub fn scaled_linear(timesteps: usize, beta_start: f64, beta_end: f64) -> Result<Self> {
        let roots = between(timesteps, beta_start.sqrt(), beta_end.sqrt());
        Self::from_betas(roots.map(|root| root * root).collect())
    }

    /// `beta_t = beta_start + (beta_end - beta_start) sigmoid(u)`, u from -6 to 6: diffusers' `sigmoid` (from GeoDiff,
    /// Xu et al. 2022). It meets its ends within 0.25 %, as there.
    ///
    /// # Errors
    /// As [`from_betas`](Self::from_betas).
    pub fn sigmoid_beta(timesteps: usize, beta_start: f64, beta_end: f64) -> Result<Self> {
        let u = between(timesteps, -SIGMOID_BETA_REACH, SIGMOID_BETA_REACH);
        Self::from_betas(u.map(|u| beta_start + (beta_end - beta_start) * sigmoid(u)).collect())
    }

    /// `alpha_bar = cos((t / T + s) / (1 + s) pi / 2)^2` over its value at 0, s = 0.008 (Nichol, Dhariwal, "Improved
    /// Denoising Diffusion Probabilistic Models", 2021, eq. 17).
    ///
    /// # Errors
    /// As [`from_signal`](Self::from_signal).
    pub fn cosine(timesteps: usize, max_beta: f64) -> Result<Self> {
        let cos = |u: f64| ((u + COSINE_OFFSET) / (1.0 + COSINE_OFFSET) * FRAC_PI_2).cos();
        Self::from_signal(timesteps, max_beta, |u| cos(u).powi(2))
    }

    /// `alpha_bar` falls along a sigmoid from 3 to -3 (Jabri, Fleet, Chen, "Scalable Adaptive Computation for
    /// Iterative Generation", 2022, with start = -3, end = 3, tau = 1).
    ///
    /// # Errors
    /// As [`from_signal`](Self::from_signal).
    pub fn sigmoid(timesteps: usize, max_beta: f64) -> Result<Self> {
        let (start, end) = SIGMOID_ENDS;
        Self::from_signal(timesteps, max_beta, |u| sigmoid(end) - sigmoid(start + (end - start) * u))
    }

    /// The schedule that the settings describe; a new schedule is one more line.
    ///
    /// # Errors
    /// As [`from_betas`](Self::from_betas) and [`zero_terminal_snr`](Self::zero_terminal_snr).
    pub fn from_config(config: &DiffusionConfig) -> Result<Self> {
        let (timesteps, start, end) = (config.timesteps, config.beta_start, config.beta_end);
        let schedule = match config.schedule {
            ScheduleKind::Linear => Self::linear(timesteps, start, end),
            ScheduleKind::ScaledLinear | ScheduleKind::Quadratic => {
                Self::scaled_linear(timesteps, start, end)
            }
            ScheduleKind::Cosine => Self::cosine(timesteps, config.max_beta),
            ScheduleKind::Sigmoid => Self::sigmoid(timesteps, config.max_beta),
            ScheduleKind::SigmoidBeta => Self::sigmoid_beta(timesteps, start, end),
        }?;
        if config.zero_terminal_snr { schedule.zero_terminal_snr() } else { Ok(schedule) }
    }

    /// The schedule that leaves `signal(t / T) / signal(0)` of the image's variance after t of T steps; `signal`
    /// falls on [0, 1] and may end at 0. No step adds more than a variance of `max_beta`, so that something is left (Nichol
    /// and Dhariwal 2021, section 3.2, and diffusers take 0.999; tutorials take 0.9999).
    ///
    /// # Errors
    /// [`Error::Config`] for no timesteps, and for a signal that does not fall.
    pub fn from_signal(timesteps: usize, max_beta: f64, signal: impl Fn(f64) -> f64) -> Result<Self> {
        let at = |t: usize| signal(t as f64 / timesteps as f64);
        Self::from_betas((0..timesteps).map(|t| (1.0 - at(t + 1) / at(t)).min(max_beta)).collect())
    }

    /// Any variances between 0 and 1, one a timestep. The last may be 1: then nothing is left of the image
    /// ("zero terminal SNR").
    ///
    /// # Errors
    /// [`Error::Config`] for none at all, and for one that is not between 0 and 1.
    pub fn from_betas(beta: Vec<f64>) -> Result<Self> {
        if beta.is_empty() {
            return Err(refused("a schedule needs at least one timestep".to_owned()));
        }
        let last = beta.len() - 1;
        let fits = |t: usize, b: f64| b >= MIN_BETA && (b < 1.0 || (b == 1.0 && t == last));
        if let Some((t, b)) = beta.iter().enumerate().find(|&(t, &b)| !fits(t, b)) {
            return Err(refused(format!("beta at t = {t} is {b}; it must lie between {MIN_BETA:e} and 1")));
        }
        let alpha_bar = beta
            .iter()
            .scan(1.0, |product, b| {
                *product *= 1.0 - b;
                // Below it a product is rounded up again and never reaches 0.
                *product = if *product < f64::MIN_POSITIVE { 0.0 } else { *product };
                Some(*product)
            })
            .collect();
        Ok(Self { beta, alpha_bar })
    }

    /// This schedule with `sqrt(alpha_bar)` shifted and stretched so that nothing is left of the image at the last
    /// timestep while the first stays as it is (Lin, Liu, Li, Yang, "Common Diffusion Noise Schedules and Sample Steps
    /// are Flawed", 2023, algorithm 1).
    ///
    /// At that timestep `x_t` is all noise, so that the noise says nothing about the image: training learns nothing
    /// from it, [`predict_x0`](crate::process::predict_x0) refuses it, and samplers start one timestep earlier, where
    /// little is left but not nothing. (The posterior forgets `x_t` there, so that this step would draw new noise and no
    /// more.) A network that predicts `x_0` or v learns there what images look like, and can be asked
    /// ([`Prediction`](crate::process::Prediction)).
    ///
    /// # Errors
    /// [`Error::Config`] for a single timestep, whose signal cannot both stay and go, and for a schedule of so many
    /// steps that nothing is left long before the end.
    pub fn zero_terminal_snr(&self) -> Result<Self> {
        let signal = self.timesteps_with_signal();
        if signal < self.timesteps() - 1 {
            let reason = format!(
                "nothing is left of the image from t = {signal} on; take at most {} timesteps",
                signal + 1
            );
            return Err(refused(reason));
        }
        let (first, last) = (self.alpha_bar[0].sqrt(), self.alpha_bar[self.timesteps() - 1].sqrt());
        if first <= last {
            let reason = "diffusion.zero_terminal_snr needs at least 2 timesteps".to_owned();
            return Err(refused(reason));
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

    /// Its first `n` timesteps alone: what is left to do from images with less noise than all.
    ///
    /// # Panics
    /// If `n` is not 1 to T.
    #[must_use]
    pub fn first(&self, n: usize) -> Self {
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

    /// `alpha_bar_t`, the product of all `alpha` up to t: the share of the image's variance that is left.
    pub fn alpha_bar(&self, t: usize) -> f64 {
        self.alpha_bar[t]
    }

    /// The signal-to-noise ratio `alpha_bar_t / (1 - alpha_bar_t)`, of images of variance 1.
    pub fn snr(&self, t: usize) -> f64 {
        self.alpha_bar[t] / (1.0 - self.alpha_bar[t])
    }

    /// Natural logarithm of [`snr`](Self::snr); minus infinity where nothing is left of the image.
    pub fn log_snr(&self, t: usize) -> f64 {
        self.snr(t).ln()
    }

    /// The timesteps at which something is left of the image: all, or all but the last ones.
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

    /// The noise level of timestep t, which may lie between two: there the logarithm of [`Level::ratio`] is taken to be
    /// linear, as Karras et al.'s program does. Timesteps beyond the ends are taken for the ends.
    pub fn level(&self, t: f64) -> Level {
        let t = t.clamp(0.0, (self.timesteps() - 1) as f64);
        let (below, part) = (t.floor() as usize, t.fract());
        if part == 0.0 {
            let a = self.alpha_bar(below);
            return Level { t, alpha: a.sqrt(), sigma: (1.0 - a).sqrt() };
        }
        let ratio = (log_ratio(self.alpha_bar(below)) * (1.0 - part)
            + log_ratio(self.alpha_bar(below + 1)) * part)
            .exp();
        Level { t, ..of_ratio(ratio) }
    }

    /// The noise level of that [`Level::ratio`], with the timestep that belongs to it; a ratio outside the schedule's
    /// takes the nearest timestep at which something is left of the image.
    pub fn level_for_sigma(&self, ratio: f64) -> Level {
        let (wanted, end) = (ratio.ln(), self.timesteps_with_signal());
        let above = self.alpha_bar[..end].partition_point(|&a| log_ratio(a) < wanted);
        let t = match above {
            0 => 0.0,
            _ if above == end => (end - 1) as f64,
            _ => {
                let (low, high) = (log_ratio(self.alpha_bar[above - 1]), log_ratio(self.alpha_bar[above]));
                (above - 1) as f64 + (wanted - low) / (high - low)
            }
        };
        Level { t, ..of_ratio(ratio) }
    }
}

/// Logarithm of [`Level::ratio`], from `alpha_bar`.
fn log_ratio(alpha_bar: f64) -> f64 {
    0.5 * ((1.0 - alpha_bar) / alpha_bar).ln()
}

/// The level of a ratio, without its timestep.
fn of_ratio(ratio: f64) -> Level {
    Level { t: 0.0, alpha: 1.0 / ratio.hypot(1.0), sigma: 1.0 / ratio.recip().hypot(1.0) }
}

/// `n` numbers from `first` to `last`, equally spaced; `first` alone where `n` is 1.
fn between(n: usize, first: f64, last: f64) -> impl Iterator<Item = f64> {
    let steps = n.saturating_sub(1).max(1) as f64;
    (0..n).map(move |i| first + (last - first) * i as f64 / steps)
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

fn refused(reason: String) -> Error {
    Error::Config { key: "diffusion".to_owned(), reason }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(kind: ScheduleKind, timesteps: usize, zero_terminal_snr: bool) -> Result<Schedule> {
        let config = DiffusionConfig { schedule: kind, timesteps, zero_terminal_snr, ..Default::default() };
        Schedule::from_config(&config)
    }

    #[test]
    fn bad_variances_are_refused() {
        assert!(Schedule::from_betas(vec![]).is_err());
        for bad in [0.0, 1.0 + f64::EPSILON, -0.1, f64::NAN] {
            assert!(Schedule::from_betas(vec![0.1, bad]).is_err(), "{bad}");
        }
        assert!(Schedule::from_betas(vec![1.0, 0.1]).is_err(), "no signal comes back");
        assert!(Schedule::from_betas(vec![0.1, 1.0]).is_ok());
        assert!(Schedule::linear(1, 1e-4, 0.02).is_ok());
    }

    #[test]
    fn every_schedule_loses_the_image_bit_by_bit_at_any_length() {
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
    fn levels_between_timesteps_go_there_and_back() {
        // Logarithms of ratios up to 1e2 and their differences between two timesteps, 1e-3 at least.
        const TOLERANCE: f64 = 1e-9;
        for kind in ScheduleKind::ALL {
            for zero in [false, true] {
                let s = of(kind, 1000, zero).unwrap();
                let last = (s.timesteps_with_signal() - 1) as f64;
                let mut before = 0.0;
                for t in [0.0, 0.25, 1.0, 499.5, 700.0, 998.0 - 0.125, last] {
                    let level = s.level(t);
                    assert!((level.alpha.powi(2) + level.sigma.powi(2) - 1.0).abs() < TOLERANCE);
                    assert!(level.t == t && level.ratio() > before, "{kind}: {t}");
                    before = level.ratio();
                    let back = s.level_for_sigma(level.ratio());
                    assert!((back.t - t).abs() < TOLERANCE * 1e3, "{kind}: {t} came back as {}", back.t);
                    assert!((back.lambda() - level.lambda()).abs() < TOLERANCE);
                }
                assert_eq!(s.level(7.0).alpha, s.alpha_bar(7).sqrt());
                assert_eq!((s.level(1e9).t, s.level(-1.0).t), (999.0, 0.0));
                assert_eq!((s.level_for_sigma(1e9).t, s.level_for_sigma(1e-9).t), (last, 0.0));
                // A posterior between neighbours is the timestep's; 1 - alpha_t cancels down to beta_1, 1e-4 or less.
                let (a, b) = (s.posterior(500), Posterior::between(s.level(500.0), s.level(499.0)));
                assert!(
                    (a.variance / b.variance - 1.0).abs() < TOLERANCE
                        && (a.x0 / b.x0 - 1.0).abs() < TOLERANCE
                );
            }
        }
        assert_eq!((Level::CLEAN.ratio(), Level::CLEAN.lambda()), (0.0, f64::INFINITY));
    }

    #[test]
    fn with_zero_terminal_snr_the_first_step_stays_and_the_last_leaves_nothing() {
        for kind in ScheduleKind::ALL {
            for timesteps in [2, 3, 300, 1000] {
                let (before, s) = (of(kind, timesteps, false).unwrap(), of(kind, timesteps, true).unwrap());
                let last = timesteps - 1;
                assert_eq!((s.alpha_bar(last), s.snr(last), s.beta(last)), (0.0, 0.0, 1.0), "{kind}");
                assert_eq!(s.log_snr(last), f64::NEG_INFINITY);
                assert_eq!(s.timesteps_with_signal(), last);
                // 1 - (1 - alpha_bar) is all that can differ.
                assert!((s.alpha_bar(0) - before.alpha_bar(0)).abs() <= f64::EPSILON, "{kind}");
                // The posterior forgets x_t and is finite.
                let p = s.posterior(last);
                assert!(p.xt == 0.0 && p.x0.is_finite() && p.variance.is_finite() && p.variance > 0.0);
            }
            let s = of(kind, 10, true).unwrap();
            assert_eq!(s.zero_terminal_snr().unwrap().timesteps_with_signal(), 9, "{kind}, twice");
            let message = of(kind, 1, true).unwrap_err().to_string();
            assert!(message.contains("zero_terminal_snr needs at least 2"), "{kind}: {message}");
        }
        // e^-1000 is no f64.
        let long = of(ScheduleKind::Linear, 100_000, false).unwrap();
        assert!(long.timesteps_with_signal() < 100_000);
        assert!(long.zero_terminal_snr().unwrap_err().to_string().contains("take at most"));
    }
}
