//! The noise levels that a sampler visits.

use crate::error::{Error, Result};
use crate::process::Prediction;
use crate::schedule::{Level, Schedule};
use serde::{Deserialize, Serialize};

/// Largest number of sampling steps; far below the RNG's 32-bit step counter.
const MAX_STEPS: usize = 1_000_000;
/// Fraction of the timesteps that [`Spacing::Quadratic`] covers (as in the code of Song et al. 2021, appendix
/// D.2).
const QUADRATIC_REACH: f64 = 0.8;
/// Largest sigma of the spacings over sigmas, at which noise hides the image entirely. The last timestep of
/// cosine and sigmoid schedules, whose beta is [`Schedule::from_signal`]'s `max_beta`, has a sigma of 5e3 to
/// 6e4, and most levels would be wasted above this one.
const MAX_SIGMA: f64 = 200.0;
/// Largest gap between two sigmas allowed for [`Spacing::Sigma`]: images take shape below it, and no sampler
/// of any order can skip that range (docs/sampling.md).
const MAX_SIGMA_GAP: f64 = 0.1;
/// Largest fraction of the image's variance allowed at the first level, for a schedule that ends in noise.
const MAX_START_SIGNAL: f64 = 0.5;
/// A schedule whose last `alpha_bar` is below this ends in noise.
const MAX_END_SIGNAL: f64 = 0.1;
/// The `rho` of [`Spacing::Karras`] (Karras et al. 2022, table 1).
const RHO: f64 = 7.0;

/// How noise levels are spaced. The first four choose integer timesteps; the others choose sigmas, the
/// noise-to-signal ratio ([`Level::karras_sigma`]), between the schedule's first and last, capped at 200, at
/// fractional timesteps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Spacing {
    /// Even, including both ends.
    Linspace,
    /// Every `T / steps`-th timestep from the first, which leaves out the last, where images are pure noise:
    /// the linear subsequence of Song et al. 2021 (appendix D.2); diffusers' `leading`.
    #[serde(alias = "leading")]
    Uniform,
    /// Every `T / steps`-th timestep down from the last (Lin et al. 2023, section 3.3).
    Trailing,
    /// Quadratic, denser at low noise, up to 0.8 T (Song et al. 2021, appendix D.2).
    Quadratic,
    /// Even in `sigma^(1/7)` (Karras et al. 2022, eq. 5).
    Karras,
    /// Even in `ln sigma`, and so in the log signal-to-noise ratio (Lu et al. 2022).
    Exponential,
    /// Even in `sigma`; needs enough steps for gaps of at most 0.1.
    Sigma,
}

impl Spacing {
    /// All spacings.
    pub const ALL: [Self; 7] = [
        Self::Linspace,
        Self::Uniform,
        Self::Trailing,
        Self::Quadratic,
        Self::Karras,
        Self::Exponential,
        Self::Sigma,
    ];

    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Linspace => "linspace",
            Self::Uniform => "uniform",
            Self::Trailing => "trailing",
            Self::Quadratic => "quadratic",
            Self::Karras => "karras",
            Self::Exponential => "exponential",
            Self::Sigma => "sigma",
        }
    }

    /// Whether this spacing chooses integer timesteps, which limits steps to the schedule's.
    fn uses_timesteps(self) -> bool {
        matches!(self, Self::Linspace | Self::Uniform | Self::Trailing | Self::Quadratic)
    }

    /// `n` ascending timesteps below `all`; `n` is 1 to `all`. Evenly spaced ones match diffusers exactly:
    /// the same f64 operations, because rounding decides ties, which round to even.
    fn timesteps(self, all: usize, n: usize) -> Vec<usize> {
        match self {
            Self::Uniform => (0..n).map(|i| i * (all / n)).collect(),
            Self::Trailing => {
                // numpy's arange(all, 0, -all / n), whose step is the difference of its first two values;
                // where rounding makes it one longer than n, the last is dropped.
                let all = all as f64;
                let step = (all - all / n as f64) - all;
                let back = |i: usize| (all + i as f64 * step).round_ties_even();
                (0..n).rev().map(|i| back(i) as usize - 1).collect()
            }
            Self::Quadratic => {
                let end = (QUADRATIC_REACH * all as f64).sqrt();
                let square = |i: usize| (end * i as f64 / (n.max(2) - 1) as f64).powi(2) as usize;
                // The first squares coincide; visit each timestep once.
                let mut next = 0;
                let ascending = (0..n).map(|i| {
                    let t = square(i).clamp(next, all - n + i);
                    next = t + 1;
                    t
                });
                ascending.collect()
            }
            // numpy would give only timestep 0, from which nothing can be sampled.
            _ if n == 1 => vec![all - 1],
            _ => {
                // numpy's linspace(0, all - 1, n), whose last value is exact.
                let step = (all - 1) as f64 / (n - 1) as f64;
                let ascending = (0..n - 1).map(|i| (i as f64 * step).round_ties_even() as usize);
                ascending.chain([all - 1]).collect()
            }
        }
    }

    /// `n` sigmas from `high` down to `low`.
    fn sigmas(self, low: f64, high: f64, n: usize) -> Vec<f64> {
        let between = |f: fn(f64) -> f64, back: fn(f64) -> f64| {
            let (low, high) = (f(low), f(high));
            let last = n.max(2) - 1;
            (0..n).map(|i| back(high + (low - high) * i as f64 / last as f64)).collect()
        };
        match self {
            Self::Karras => between(|s| s.powf(1.0 / RHO), |s| s.powf(RHO)),
            Self::Exponential => between(f64::ln, f64::exp),
            _ => between(|s| s, |s| s),
        }
    }
}

impl std::fmt::Display for Spacing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}

impl std::str::FromStr for Spacing {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        // diffusers' name.
        let name = if name == "leading" { Self::Uniform.name() } else { name };
        Self::ALL.into_iter().find(|s| s.name() == name).ok_or_else(|| Error::Option {
            option: "spacing".to_owned(),
            reason: format!(
                "there is no spacing {name:?}; give one of {}",
                Self::ALL.map(Self::name).join(", ")
            ),
        })
    }
}

/// The noise levels that a sampler visits, at least one, in strictly decreasing noise. The last step ends at
/// [`Level::CLEAN`].
#[derive(Clone, Debug, PartialEq)]
pub struct Levels {
    levels: Vec<Level>,
    schedule: Schedule,
}

impl Levels {
    /// `steps` levels of a schedule (`None`: all), for a prediction type.
    ///
    /// A last timestep without signal ([`Schedule::zero_terminal_snr`]) is skipped for noise prediction,
    /// which does not determine the image there, and for spacings over sigmas, since its sigma is infinite.
    ///
    /// # Errors
    /// [`Error::Option`] for 0 or too many steps, and for levels that no sampler works with: a first level
    /// with the image still visible, and [`Spacing::Sigma`] with gaps above 0.1.
    pub fn new(
        schedule: &Schedule,
        prediction: Prediction,
        steps: Option<usize>,
        spacing: Spacing,
    ) -> Result<Self> {
        let with_signal = schedule.timesteps_with_signal();
        let all = match prediction {
            // At most one timestep without signal: there is no step between two of them.
            Prediction::X0 | Prediction::V if spacing.uses_timesteps() => {
                (with_signal + 1).min(schedule.timesteps())
            }
            _ => with_signal,
        };
        let steps = steps.unwrap_or(all);
        let max_steps = match all {
            // A single timestep has only one sigma.
            1 => 1,
            _ if spacing.uses_timesteps() => all,
            _ => MAX_STEPS,
        };
        if steps == 0 || steps > max_steps {
            let mut reason = format!("{steps} steps: the schedule allows 1 to {max_steps}");
            if all < schedule.timesteps() && spacing.uses_timesteps() {
                reason += "; later timesteps have no signal left to predict the image from";
            }
            return Err(Error::option("steps", reason));
        }
        let levels: Vec<Level> = if spacing.uses_timesteps() {
            let descending = spacing.timesteps(all, steps).into_iter().rev();
            descending.map(|t| schedule.level(t as f64)).collect()
        } else {
            let sigma = |t: usize| schedule.level(t as f64).karras_sigma();
            let low = sigma(0);
            let high = sigma(with_signal - 1).min(MAX_SIGMA.max(low));
            if spacing == Spacing::Sigma {
                check_gap(low, high, steps)?;
            }
            let sigmas = spacing.sigmas(low, high, steps);
            sigmas.into_iter().map(|sigma| schedule.level_for_sigma(sigma)).collect()
        };
        check_start(spacing, steps, levels[0], schedule)?;
        Ok(Self { levels, schedule: schedule.clone() })
    }

    /// All levels of a schedule, for noise prediction.
    ///
    /// # Errors
    /// Those of [`new`](Self::new).
    pub fn all(schedule: &Schedule) -> Result<Self> {
        Self::new(schedule, Prediction::Eps, None, Spacing::Linspace)
    }

    /// Number of steps.
    pub fn steps(&self) -> usize {
        self.levels.len()
    }

    /// The start and end of each step; the last ends at [`Level::CLEAN`].
    pub fn pairs(&self) -> impl Iterator<Item = (Level, Level)> {
        let ends = self.levels[1..].iter().chain([&Level::CLEAN]);
        self.levels.iter().zip(ends).map(|(&from, &to)| (from, to))
    }

    /// The level halfway between two, in t.
    pub fn midway(&self, from: Level, to: Level) -> Level {
        self.schedule.level(0.5 * (from.t + to.t))
    }

    /// Level `i`, counted from the noisiest; [`Level::CLEAN`] after the last.
    pub fn at(&self, i: usize) -> Level {
        self.levels.get(i).copied().unwrap_or(Level::CLEAN)
    }
}

/// Refuses gaps between sigmas that skip the range in which images take shape.
fn check_gap(low: f64, high: f64, steps: usize) -> Result<()> {
    let gap = if steps > 1 { (high - low) / (steps - 1) as f64 } else { 0.0 };
    if gap <= MAX_SIGMA_GAP {
        return Ok(());
    }
    let min_steps = ((high - low) / MAX_SIGMA_GAP).ceil() as usize + 1;
    let reason = format!(
        "sigma in {steps} steps leaves gaps of {gap:.2} between noise levels, but images take shape below a sigma of \
         {MAX_SIGMA_GAP}, so the samples would be grey or noise; give karras or exponential, or at least {min_steps} steps"
    );
    Err(Error::option("spacing", reason))
}

/// Refuses a first level at which the image would already be visible, for a schedule that ends in noise.
fn check_start(spacing: Spacing, steps: usize, first: Level, schedule: &Schedule) -> Result<()> {
    let (signal, end) = (first.alpha * first.alpha, schedule.alpha_bar(schedule.timesteps() - 1));
    if signal <= MAX_START_SIGNAL || end >= MAX_END_SIGNAL {
        return Ok(());
    }
    let reason = format!(
        "{spacing} in {steps} step{} starts at t = {}, where {:.0} % of the variance should be image, but sampling starts from \
         pure noise; give more steps, or trailing",
        if steps == 1 { "" } else { "s" },
        first.t,
        100.0 * signal
    );
    Err(Error::option("spacing", reason))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schedule::Posterior;

    fn schedule() -> Schedule {
        Schedule::linear(1000, 1e-4, 0.02).unwrap()
    }

    fn timesteps(spacing: Spacing, steps: usize) -> Vec<f64> {
        let levels = Levels::new(&schedule(), Prediction::Eps, Some(steps), spacing).unwrap();
        levels.pairs().map(|(from, _)| from.t).collect()
    }

    #[test]
    fn every_spacing_decreases_in_any_number_of_steps() {
        for spacing in Spacing::ALL {
            assert_eq!(spacing.name().parse::<Spacing>().unwrap(), spacing);
            for steps in [1, 2, 3, 7, 50, 333, 801, 999, 1000, 2000] {
                let image = matches!(spacing, Spacing::Uniform | Spacing::Quadratic) && steps == 1;
                let wide = spacing == Spacing::Sigma && (2..=1000).contains(&steps);
                if image || wide || (spacing.uses_timesteps() && steps > 1000) {
                    assert!(Levels::new(&schedule(), Prediction::Eps, Some(steps), spacing).is_err());
                    continue;
                }
                let levels = Levels::new(&schedule(), Prediction::Eps, Some(steps), spacing).unwrap();
                assert_eq!(levels.steps(), steps);
                for (from, to) in levels.pairs() {
                    assert!(
                        from.karras_sigma() > to.karras_sigma() && to.lambda() > from.lambda(),
                        "{spacing}, {steps}"
                    );
                    assert!((0.0..1000.0).contains(&from.t));
                }
                assert_eq!(levels.at(steps), Level::CLEAN);
            }
            for steps in [0, usize::MAX] {
                let error = Levels::new(&schedule(), Prediction::Eps, Some(steps), spacing).unwrap_err();
                assert!(error.to_string().contains("the schedule allows 1 to 1"), "{error}");
            }
        }
        assert_eq!("leading".parse::<Spacing>().unwrap(), Spacing::Uniform);
        let error = "evenly".parse::<Spacing>().unwrap_err().to_string();
        assert!(error.contains("\"evenly\"; give one of linspace, uniform, trailing, quadratic, karras"));
    }

    #[test]
    fn timesteps_match_the_papers() {
        assert_eq!(timesteps(Spacing::Linspace, 4), [999.0, 666.0, 333.0, 0.0]);
        assert_eq!(timesteps(Spacing::Uniform, 4), [750.0, 500.0, 250.0, 0.0]);
        assert_eq!(timesteps(Spacing::Trailing, 4), [999.0, 749.0, 499.0, 249.0]);
        // (28.28 i / 4)^2.
        assert_eq!(timesteps(Spacing::Quadratic, 5), [800.0, 450.0, 200.0, 50.0, 0.0]);
        assert_eq!(timesteps(Spacing::Quadratic, 50)[46..], [3.0, 2.0, 1.0, 0.0], "each once");
        let (low, high) = (schedule().level(0.0), schedule().level(999.0));
        for (spacing, middle) in [
            (
                Spacing::Karras,
                ((low.karras_sigma().powf(1.0 / 7.0) + high.karras_sigma().powf(1.0 / 7.0)) / 2.0).powi(7),
            ),
            (Spacing::Exponential, (low.karras_sigma() * high.karras_sigma()).sqrt()),
            (Spacing::Sigma, (low.karras_sigma() + high.karras_sigma()) / 2.0),
        ] {
            let steps = if spacing == Spacing::Sigma { 2001 } else { 3 };
            let levels = Levels::new(&schedule(), Prediction::Eps, Some(steps), spacing).unwrap();
            // Roots and logarithms: a few rounding errors at magnitudes up to 1e2.
            for (i, ratio) in [high.karras_sigma(), middle, low.karras_sigma()].into_iter().enumerate() {
                let level = levels.at(i * (steps - 1) / 2);
                assert!((level.karras_sigma() / ratio - 1.0).abs() < 1e-11, "{spacing}");
            }
        }
    }

    fn refused(schedule: &Schedule, spacing: Spacing, steps: usize) -> String {
        Levels::new(schedule, Prediction::V, Some(steps), spacing).unwrap_err().to_string()
    }

    #[test]
    fn wide_sigma_gaps_are_refused_with_the_steps_needed() {
        let error = refused(&schedule(), Spacing::Sigma, 20);
        assert!(
            error.contains("sigma in 20 steps leaves gaps of 8.28") && error.contains("karras"),
            "{error}"
        );
        let min_steps = error.split("at least ").nth(1).and_then(|rest| rest.split(' ').next()).unwrap();
        let min_steps: usize = min_steps.parse().unwrap();
        assert_eq!(min_steps, 1575);
        assert!(Levels::new(&schedule(), Prediction::V, Some(min_steps), Spacing::Sigma).is_ok());
        refused(&schedule(), Spacing::Sigma, min_steps - 1);
        // From less noise, as in image variation and denoising, fewer steps suffice.
        assert!(Levels::new(&schedule().truncated(300), Prediction::V, Some(20), Spacing::Sigma).is_ok());
    }

    #[test]
    fn starting_at_a_level_with_the_image_visible_is_refused() {
        for schedule in
            [schedule(), Schedule::cosine(1000, 0.9999).unwrap(), schedule().zero_terminal_snr().unwrap()]
        {
            for spacing in [Spacing::Uniform, Spacing::Quadratic] {
                let error = refused(&schedule, spacing, 1);
                assert!(error.contains("in 1 step starts at t = 0, where 100 %"), "{error}");
                assert!(error.contains("trailing"), "{error}");
                // The truncated schedule does not end in noise.
                assert!(Levels::new(&schedule.truncated(1), Prediction::V, Some(1), spacing).is_ok());
            }
        }
    }

    #[test]
    fn sigma_spacings_start_at_the_largest_useful_sigma() {
        for schedule in [Schedule::cosine(1000, 0.9999).unwrap(), Schedule::sigmoid(1000, 0.9999).unwrap()] {
            assert!(schedule.level(999.0).karras_sigma() > 5000.0);
            for spacing in [Spacing::Karras, Spacing::Exponential] {
                let levels = Levels::new(&schedule, Prediction::Eps, Some(20), spacing).unwrap();
                let (first, before) = (levels.at(0), levels.at(18));
                assert!(
                    (first.karras_sigma() / MAX_SIGMA - 1.0).abs() < 1e-12 && first.t < 999.0,
                    "{first:?}"
                );
                assert!(before.karras_sigma() < 0.05, "{before:?}");
            }
        }
        // A single timestep has only one sigma.
        let one = schedule().truncated(1);
        for spacing in Spacing::ALL {
            assert!(refused(&one, spacing, 2).contains("2 steps: the schedule allows 1 to 1"), "{spacing}");
        }
    }

    #[test]
    fn a_level_without_signal_is_visited_unless_noise_is_predicted() {
        let zero = schedule().zero_terminal_snr().unwrap();
        let first = |prediction, spacing| Levels::new(&zero, prediction, Some(10), spacing).unwrap().at(0).t;
        assert_eq!(first(Prediction::Eps, Spacing::Trailing), 998.0);
        assert_eq!(first(Prediction::V, Spacing::Trailing), 999.0);
        assert_eq!(first(Prediction::X0, Spacing::Linspace), 999.0);
        // A few rounding errors of t.
        let karras = first(Prediction::X0, Spacing::Karras);
        assert!((karras - zero.level_for_sigma(MAX_SIGMA).t).abs() < 1e-9 && karras < 998.0, "{karras}");
        // Of many levels without signal, only the first: each step halves the image's variance, which
        // underflows below 2^-1022.
        let long = Schedule::from_betas(vec![0.5; 2000]).unwrap();
        for spacing in [Spacing::Linspace, Spacing::Trailing] {
            let levels = Levels::new(&long, Prediction::V, None, spacing).unwrap();
            assert_eq!((levels.steps(), levels.at(0).t), (1023, 1022.0));
            for (from, to) in levels.pairs() {
                let p = Posterior::between(from, to);
                assert!(p.x0.is_finite() && p.xt.is_finite() && p.variance.is_finite(), "t = {}", from.t);
            }
        }
        let error = Levels::new(&zero, Prediction::Eps, Some(1000), Spacing::Linspace).unwrap_err();
        assert!(error.to_string().contains("no signal left"), "{error}");
    }
}
