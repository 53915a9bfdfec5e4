//! How far samples are from the data's distribution, for every sampler, spacing, schedule and number of steps.

use crate::mixture::{Mixture, Part};
use ddpm::process::Prediction;
use ddpm::sampler::{Listed, Options, SAMPLERS, Seeds, Spacing, Threshold};
use ddpm::schedule::{Level, Schedule};
use ddpm::train::config::{DiffusionConfig, ScheduleKind};
use rayon::prelude::*;

/// Numbers of steps.
pub const STEPS: [usize; 5] = [5, 10, 20, 30, 50];
/// Samples of each case.
pub const SAMPLES: usize = 500;
/// Values of an image's range, of standard deviation 0.5.
pub const DATA: [Part; 2] =
    [Part { weight: 0.35, mean: -0.6, deviation: 0.2 }, Part { weight: 0.65, mean: 0.4, deviation: 0.1 }];

/// A sampler with a spacing that it can take.
#[derive(Clone, Copy, Debug)]
pub struct Way {
    pub sampler: &'static Listed,
    pub spacing: Spacing,
}

/// All of them.
pub fn ways() -> Vec<Way> {
    let of = |sampler: &'static Listed| sampler.spacings.iter().map(move |&spacing| Way { sampler, spacing });
    SAMPLERS.iter().flat_map(of).collect()
}

/// Every schedule of 1000 timesteps, without and with zero terminal SNR, by name.
pub fn schedules() -> Vec<(String, Schedule)> {
    // "quadratic" is the other name of "scaled-linear".
    let kinds = ScheduleKind::ALL.into_iter().filter(|&kind| kind != ScheduleKind::Quadratic);
    let each = [false, true].into_iter().flat_map(|zero| kinds.clone().map(move |kind| (kind, zero)));
    each.map(|(schedule, zero_terminal_snr)| {
        let config = DiffusionConfig { schedule, zero_terminal_snr, ..Default::default() };
        let name = format!("{schedule}{}", if zero_terminal_snr { ", zero SNR" } else { "" });
        (name, Schedule::from_config(&config).expect("a schedule"))
    })
    .collect()
}

/// The values that divide the data's distribution into `n` equal parts.
pub fn quantiles(schedule: &Schedule, n: usize) -> Vec<f64> {
    let mixture = Mixture::new(schedule, &DATA, 1);
    let quantile = |i: usize| {
        let (mut low, mut high) = (-4.0, 4.0);
        for _ in 0..60 {
            let middle = 0.5 * (low + high);
            let below = mixture.below(middle, Level::CLEAN) < (i as f64 + 0.5) / n as f64;
            (low, high) = if below { (middle, high) } else { (low, middle) };
        }
        0.5 * (low + high)
    };
    (0..n).map(quantile).collect()
}

/// The most that samples in so many steps may be off: an error that falls with the steps' length, and chance. Samples that are
/// all the data's mean, or black and white at random, are off by 0.9 and more.
pub fn limit(steps: usize) -> f64 {
    (5.0 / steps as f64 + 0.05).min(0.6)
}

/// Wasserstein's distance of the samples from the data, over the data's deviation; the reason where the way is refused. 1 is about
/// what black and white at random are off; 0.03 is chance.
pub fn distance(
    way: Way,
    schedule: &Schedule,
    steps: usize,
    (prediction, threshold): (Prediction, Threshold),
    quantiles: &[f64],
) -> Result<f64, String> {
    let Way { sampler, spacing } = way;
    let (steps, spacing, threshold) = (Some(steps), Some(spacing), Some(threshold));
    let options = Options { sampler, steps, spacing, threshold, ..Options::default() };
    let built = options.build(schedule, prediction).map_err(|error| error.to_string())?;
    let mut mixture = Mixture::new(schedule, &DATA, SAMPLES);
    mixture.prediction = prediction;
    let x = built.sample(&mut mixture, Seeds { seed: 4, first: 0 }, &mut |_| Ok(())).expect("samples");
    Ok(wasserstein(x, quantiles))
}

/// Wasserstein's distance of samples from the data, given by as many quantiles, over the data's deviation.
pub fn wasserstein(mut x: Vec<f32>, quantiles: &[f64]) -> f64 {
    const DEVIATION: f64 = 0.5;
    x.sort_unstable_by(f32::total_cmp);
    let far = x.iter().zip(quantiles).map(|(&x, q)| (f64::from(x) - q).abs()).sum::<f64>();
    far / x.len() as f64 / DEVIATION
}

/// What else of a sampling there is; what is expected is the same whatever it is.
pub const SETTINGS: [(Prediction, Threshold); 4] = [
    (Prediction::Eps, Threshold::Clip),
    (Prediction::Eps, Threshold::None),
    (Prediction::V, Threshold::Clip),
    (Prediction::X0, Threshold::None),
];

/// A row for each way, with the worst distance over the limit for each schedule and number of steps, or the reason of a refusal;
/// `settings` are those that cell i of a row is tried with.
pub fn matrix<'a>(
    schedules: &[(String, Schedule)],
    settings: impl Fn(usize) -> &'a [(Prediction, Threshold)] + Sync,
) -> Vec<(Way, Vec<Result<f64, String>>)> {
    let quantiles = quantiles(&schedules[0].1, SAMPLES);
    let cell = |way: Way, i: usize| {
        let (schedule, steps) = (&schedules[i / STEPS.len()].1, STEPS[i % STEPS.len()]);
        let each = settings(i).iter().map(|&setting| distance(way, schedule, steps, setting, &quantiles));
        // A NaN is worse than all.
        let worst = |a: f64, b: f64| if a.is_nan() || b.is_nan() { f64::NAN } else { a.max(b) };
        each.reduce(|a, b| Ok(worst(a?, b?))).expect("settings").map(|far| far / limit(steps))
    };
    let row = |way: Way| (way, (0..schedules.len() * STEPS.len()).map(|i| cell(way, i)).collect());
    ways().into_par_iter().map(row).collect()
}

#[test]
fn every_spacing_of_every_sampler_and_schedule_draws_the_data_or_is_refused_by_name() {
    let schedules = schedules();
    // Each setting in turn; the example `spacing_matrix` takes all of them for every cell.
    let settings = |i: usize| &SETTINGS[i % SETTINGS.len()..][..1];
    for (Way { sampler, spacing }, row) in matrix(&schedules, settings) {
        for (i, far) in row.into_iter().enumerate() {
            let (schedule, steps) = (&schedules[i / STEPS.len()].0, STEPS[i % STEPS.len()]);
            let case = format!("{} {spacing} {schedule} {steps}", sampler.name);
            match far {
                // As many sigmas as these leave gaps on every schedule.
                Err(error) => assert!(
                    spacing == Spacing::Sigma && error.contains("give karras or exponential"),
                    "{case}: {error}"
                ),
                Ok(far) => assert!(far <= 1.0 && spacing != Spacing::Sigma, "{case}: {far} of the limit"),
            }
        }
    }
}
