//! Which noise levels a sampler visits.

use crate::error::{Error, Result};
use crate::process::Prediction;
use crate::schedule::{Level, Schedule};
use serde::{Deserialize, Serialize};

/// Most steps of a sampling: random numbers count them in 32 bits, and nobody waits for as many.
const MOST_STEPS: usize = 1_000_000;
/// Part of the timesteps that [`Spacing::Quadratic`] reaches (Song et al. 2021, appendix D.2: their program).
const QUADRATIC_REACH: f64 = 0.8;
/// The noisiest level of the spacings that choose sigmas. Noise of so many times the image hides all of it; the last timestep of
/// cosine and sigmoid schedules, whose beta is [`Schedule::from_signal`]'s most, has 5e3 to 6e4, and on the way from there
/// to here most of the levels would be spent on nothing.
const MOST_RATIO: f64 = 200.0;
/// The widest gap that [`Spacing::Sigma`] may leave between two sigmas: below it images take their shape, which no order of
/// sampler bridges (docs/sampling.md).
const MOST_SIGMA_GAP: f64 = 0.1;
/// The most of the image's variance that may be left at the first level of a schedule that ends in noise.
const MOST_SIGNAL: f64 = 0.5;
/// Less of it than this is noise.
const NOISE_SIGNAL: f64 = 0.1;
/// The `rho` of [`Spacing::Karras`] (Karras et al. 2022, table 1).
const RHO: f64 = 7.0;

/// How the noise levels of fewer steps are chosen. The first four choose timesteps; the others choose sigmas, the ratio
/// of noise to signal ([`Level::ratio`]) between the schedule's first and last, but at most 200, whose timesteps lie between two.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Spacing {
    /// Evenly, both ends among them.
    Linspace,
    /// Every `T / steps`-th from the first, so that the last, where images are all noise, is left out: the linear
    /// subsequence of Song et al. 2021 (appendix D.2); diffusers' `leading`.
    #[serde(alias = "leading")]
    Uniform,
    /// Every `T / steps`-th from the last one down (Lin et al. 2023, section 3.3).
    Trailing,
    /// As squares, close at low noise, up to 0.8 T (Song et al. 2021, appendix D.2).
    Quadratic,
    /// `sigma^(1/7)` evenly (Karras et al. 2022, eq. 5).
    Karras,
    /// `ln sigma` evenly, which is the logarithm of the signal-to-noise ratio evenly (Lu et al. 2022).
    Exponential,
    /// `sigma` evenly, in as many steps as leave at most 0.1 between two.
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

    /// Its name on the command line.
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

    /// Whether it chooses whole timesteps, of which there are no more than the schedule has.
    fn of_timesteps(self) -> bool {
        matches!(self, Self::Linspace | Self::Uniform | Self::Trailing | Self::Quadratic)
    }

    /// `n` timesteps below `all`, rising; `n` is 1 to `all`. Evenly spaced ones are diffusers' to the last: the same operations
    /// in f64, whose roundings decide ties, which are rounded to even.
    fn timesteps(self, all: usize, n: usize) -> Vec<usize> {
        match self {
            Self::Uniform => (0..n).map(|i| i * (all / n)).collect(),
            Self::Trailing => {
                // numpy's arange(all, 0, -all / n), whose step is the difference of its first two; where a rounding makes it one
                // longer than n, its last is left out.
                let all = all as f64;
                let step = (all - all / n as f64) - all;
                let back = |i: usize| (all + i as f64 * step).round_ties_even();
                (0..n).rev().map(|i| back(i) as usize - 1).collect()
            }
            Self::Quadratic => {
                let end = (QUADRATIC_REACH * all as f64).sqrt();
                let square = |i: usize| (end * i as f64 / (n.max(2) - 1) as f64).powi(2) as usize;
                // The first squares fall together; each timestep is visited once.
                let mut next = 0;
                let rising = (0..n).map(|i| {
                    let t = square(i).clamp(next, all - n + i);
                    next = t + 1;
                    t
                });
                rising.collect()
            }
            // numpy has the first one alone, 0, from which no image comes.
            _ if n == 1 => vec![all - 1],
            _ => {
                // numpy's linspace(0, all - 1, n), which ends where it should.
                let step = (all - 1) as f64 / (n - 1) as f64;
                let rising = (0..n - 1).map(|i| (i as f64 * step).round_ties_even() as usize);
                rising.chain([all - 1]).collect()
            }
        }
    }

    /// `n` ratios from `high` down to `low`.
    fn ratios(self, low: f64, high: f64, n: usize) -> Vec<f64> {
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
        // diffusers' name for it, too.
        let name = if name == "leading" { Self::Uniform.name() } else { name };
        Self::ALL.into_iter().find(|s| s.name() == name).ok_or_else(|| Error::Config {
            key: "spacing".to_owned(),
            reason: format!(
                "there is no spacing {name:?}; give one of {}",
                Self::ALL.map(Self::name).join(", ")
            ),
        })
    }
}

/// The noise levels that a sampler visits, the noisiest first, each less noisy than the one before; at least one. From the
/// last one it steps to [`Level::CLEAN`].
#[derive(Clone, Debug, PartialEq)]
pub struct Levels {
    levels: Vec<Level>,
    schedule: Schedule,
}

impl Levels {
    /// `steps` levels of a schedule (`None`: all), for a network that predicts that.
    ///
    /// A last timestep that leaves nothing of the image ([`Schedule::zero_terminal_snr`]) is not visited where the
    /// network predicts noise, which says nothing about the image there, nor where sigmas are spaced, for it has none.
    ///
    /// # Errors
    /// [`Error::Config`] for no steps, or more than there are; for a list of levels from which no sampler draws images: one that
    /// begins with the image instead of noise, and [`Spacing::Sigma`] with gaps above 0.1.
    pub fn new(
        schedule: &Schedule,
        prediction: Prediction,
        steps: Option<usize>,
        spacing: Spacing,
    ) -> Result<Self> {
        let with_signal = schedule.timesteps_with_signal();
        let all = match prediction {
            // One timestep without signal; from a second one there is no way to the first.
            Prediction::X0 | Prediction::V if spacing.of_timesteps() => {
                (with_signal + 1).min(schedule.timesteps())
            }
            _ => with_signal,
        };
        let steps = steps.unwrap_or(all);
        let most = match all {
            // Nothing lies between one sigma.
            1 => 1,
            _ if spacing.of_timesteps() => all,
            _ => MOST_STEPS,
        };
        if steps == 0 || steps > most {
            let mut reason = format!("{steps} steps: the schedule allows 1 to {most}");
            if all < schedule.timesteps() && spacing.of_timesteps() {
                reason +=
                    ", for nothing is left of the image at later timesteps, where none can be found again";
            }
            return Err(Error::Config { key: "steps".to_owned(), reason });
        }
        let levels: Vec<Level> = if spacing.of_timesteps() {
            let falling = spacing.timesteps(all, steps).into_iter().rev();
            falling.map(|t| schedule.level(t as f64)).collect()
        } else {
            let end = |t: usize| schedule.level(t as f64).ratio();
            let low = end(0);
            let high = end(with_signal - 1).min(MOST_RATIO.max(low));
            if spacing == Spacing::Sigma {
                check_gap(low, high, steps)?;
            }
            let ratios = spacing.ratios(low, high, steps);
            ratios.into_iter().map(|ratio| schedule.level_for_sigma(ratio)).collect()
        };
        check_start(spacing, steps, levels[0], schedule)?;
        Ok(Self { levels, schedule: schedule.clone() })
    }

    /// All of a schedule's, for a network that predicts noise.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn all(schedule: &Schedule) -> Result<Self> {
        Self::new(schedule, Prediction::Eps, None, Spacing::Linspace)
    }

    /// Number of steps.
    pub fn steps(&self) -> usize {
        self.levels.len()
    }

    /// Each step: where it begins and where it ends; the last ends at [`Level::CLEAN`].
    pub fn pairs(&self) -> impl Iterator<Item = (Level, Level)> {
        let ends = self.levels[1..].iter().chain([&Level::CLEAN]);
        self.levels.iter().zip(ends).map(|(&from, &to)| (from, to))
    }

    /// The level half-way between two in t.
    pub fn midway(&self, from: Level, to: Level) -> Level {
        self.schedule.level(0.5 * (from.t + to.t))
    }

    /// Level `i` from the noisiest; [`Level::CLEAN`] behind the last.
    pub fn at(&self, i: usize) -> Level {
        self.levels.get(i).copied().unwrap_or(Level::CLEAN)
    }
}

/// Refuses gaps between sigmas in which images would take their shape.
fn check_gap(low: f64, high: f64, steps: usize) -> Result<()> {
    let gap = if steps > 1 { (high - low) / (steps - 1) as f64 } else { 0.0 };
    if gap <= MOST_SIGMA_GAP {
        return Ok(());
    }
    let least = ((high - low) / MOST_SIGMA_GAP).ceil() as usize + 1;
    let reason = format!(
        "sigma in {steps} steps leaves gaps of {gap:.2} between two noise levels, and images take their shape within a sigma of \
         {MOST_SIGMA_GAP}, so that grey or noise would be drawn; give karras or exponential, or at least {least} steps"
    );
    Err(Error::Config { key: "spacing".to_owned(), reason })
}

/// Refuses a first level at which the image should be there already, of a schedule that ends in noise.
fn check_start(spacing: Spacing, steps: usize, first: Level, schedule: &Schedule) -> Result<()> {
    let (left, end) = (first.alpha * first.alpha, schedule.alpha_bar(schedule.timesteps() - 1));
    if left <= MOST_SIGNAL || end >= NOISE_SIGNAL {
        return Ok(());
    }
    let reason = format!(
        "{spacing} in {steps} step{} begins at t = {}, with {:.0} % of an image's variance, where there is none yet, so that noise \
         would be drawn; give more steps, or trailing",
        if steps == 1 { "" } else { "s" },
        first.t,
        100.0 * left
    );
    Err(Error::Config { key: "spacing".to_owned(), reason })
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
    fn every_spacing_falls_in_any_number_of_steps() {
        for spacing in Spacing::ALL {
            assert_eq!(spacing.name().parse::<Spacing>().unwrap(), spacing);
            for steps in [1, 2, 3, 7, 50, 333, 801, 999, 1000, 2000] {
                let image = matches!(spacing, Spacing::Uniform | Spacing::Quadratic) && steps == 1;
                let wide = spacing == Spacing::Sigma && (2..=1000).contains(&steps);
                if image || wide || (spacing.of_timesteps() && steps > 1000) {
                    assert!(Levels::new(&schedule(), Prediction::Eps, Some(steps), spacing).is_err());
                    continue;
                }
                let levels = Levels::new(&schedule(), Prediction::Eps, Some(steps), spacing).unwrap();
                assert_eq!(levels.steps(), steps);
                for (from, to) in levels.pairs() {
                    assert!(from.ratio() > to.ratio() && to.lambda() > from.lambda(), "{spacing}, {steps}");
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
    fn timesteps_are_those_of_the_papers() {
        assert_eq!(timesteps(Spacing::Linspace, 4), [999.0, 666.0, 333.0, 0.0]);
        assert_eq!(timesteps(Spacing::Uniform, 4), [750.0, 500.0, 250.0, 0.0]);
        assert_eq!(timesteps(Spacing::Trailing, 4), [999.0, 749.0, 499.0, 249.0]);
        // (28.28 i / 4)^2.
        assert_eq!(timesteps(Spacing::Quadratic, 5), [800.0, 450.0, 200.0, 50.0, 0.0]);
        assert_eq!(timesteps(Spacing::Quadratic, 50)[46..], [3.0, 2.0, 1.0, 0.0], "each once");
        let (low, high) = (schedule().level(0.0), schedule().level(999.0));
        for (spacing, middle) in [
            (Spacing::Karras, ((low.ratio().powf(1.0 / 7.0) + high.ratio().powf(1.0 / 7.0)) / 2.0).powi(7)),
            (Spacing::Exponential, (low.ratio() * high.ratio()).sqrt()),
            (Spacing::Sigma, (low.ratio() + high.ratio()) / 2.0),
        ] {
            let steps = if spacing == Spacing::Sigma { 2001 } else { 3 };
            let levels = Levels::new(&schedule(), Prediction::Eps, Some(steps), spacing).unwrap();
            // Roots and logarithms, a few roundings of numbers up to 1e2.
            for (i, ratio) in [high.ratio(), middle, low.ratio()].into_iter().enumerate() {
                let level = levels.at(i * (steps - 1) / 2);
                assert!((level.ratio() / ratio - 1.0).abs() < 1e-11, "{spacing}");
            }
        }
    }

    fn refused(schedule: &Schedule, spacing: Spacing, steps: usize) -> String {
        Levels::new(schedule, Prediction::V, Some(steps), spacing).unwrap_err().to_string()
    }

    #[test]
    fn sigmas_too_far_apart_are_refused_with_the_steps_that_they_need() {
        let error = refused(&schedule(), Spacing::Sigma, 20);
        assert!(
            error.contains("sigma in 20 steps leaves gaps of 8.28") && error.contains("karras"),
            "{error}"
        );
        let least = error.split("at least ").nth(1).and_then(|rest| rest.split(' ').next()).unwrap();
        let least: usize = least.parse().unwrap();
        assert_eq!(least, 1575);
        assert!(Levels::new(&schedule(), Prediction::V, Some(least), Spacing::Sigma).is_ok());
        refused(&schedule(), Spacing::Sigma, least - 1);
        // With less noise, as images are varied and denoised, they need fewer.
        assert!(Levels::new(&schedule().first(300), Prediction::V, Some(20), Spacing::Sigma).is_ok());
    }

    #[test]
    fn a_list_that_begins_with_the_image_is_refused() {
        for schedule in
            [schedule(), Schedule::cosine(1000, 0.9999).unwrap(), schedule().zero_terminal_snr().unwrap()]
        {
            for spacing in [Spacing::Uniform, Spacing::Quadratic] {
                let error = refused(&schedule, spacing, 1);
                assert!(error.contains("in 1 step begins at t = 0, with 100 %"), "{error}");
                assert!(error.contains("trailing"), "{error}");
                // There is something of the image in the first thousandth.
                assert!(Levels::new(&schedule.first(1), Prediction::V, Some(1), spacing).is_ok());
            }
        }
    }

    #[test]
    fn levels_of_sigmas_begin_where_there_is_something_to_be_seen() {
        for schedule in [Schedule::cosine(1000, 0.9999).unwrap(), Schedule::sigmoid(1000, 0.9999).unwrap()] {
            assert!(schedule.level(999.0).ratio() > 5000.0);
            for spacing in [Spacing::Karras, Spacing::Exponential] {
                let levels = Levels::new(&schedule, Prediction::Eps, Some(20), spacing).unwrap();
                let (first, before) = (levels.at(0), levels.at(18));
                assert!((first.ratio() / MOST_RATIO - 1.0).abs() < 1e-12 && first.t < 999.0, "{first:?}");
                assert!(before.ratio() < 0.05, "{before:?}");
            }
        }
        // A single timestep has one sigma and no more.
        let one = schedule().first(1);
        for spacing in Spacing::ALL {
            assert!(refused(&one, spacing, 2).contains("2 steps: the schedule allows 1 to 1"), "{spacing}");
        }
    }

    #[test]
    fn a_level_without_signal_is_visited_where_the_image_is_predicted() {
        let zero = schedule().zero_terminal_snr().unwrap();
        let first = |prediction, spacing| Levels::new(&zero, prediction, Some(10), spacing).unwrap().at(0).t;
        assert_eq!(first(Prediction::Eps, Spacing::Trailing), 998.0);
        assert_eq!(first(Prediction::V, Spacing::Trailing), 999.0);
        assert_eq!(first(Prediction::X0, Spacing::Linspace), 999.0);
        // A few roundings of t.
        let karras = first(Prediction::X0, Spacing::Karras);
        assert!((karras - zero.level_for_sigma(MOST_RATIO).t).abs() < 1e-9 && karras < 998.0, "{karras}");
        // Of many without signal, the first alone: half of the image's variance is lost at each, and all of it at 2^-1022.
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
        assert!(error.to_string().contains("nothing is left"), "{error}");
    }
}
