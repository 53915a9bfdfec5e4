//! Distance of samples from the data distribution, for every sampler, spacing, schedule and number of steps.

use crate::mixture::{Mixture, Part};
use ddpm::process::Prediction;
use ddpm::sampler::{NoiseKey, SAMPLERS, SamplerInfo, SamplerOptions, Spacing, Threshold};
use ddpm::schedule::{Level, Schedule, ScheduleKind, ScheduleOptions};
use rayon::prelude::*;

/// Numbers of steps.
pub const STEPS: [usize; 5] = [5, 10, 20, 30, 50];
/// Samples of each case.
pub const SAMPLES: usize = 500;
/// Data in the range of images, with standard deviation 0.5.
pub const DATA: [Part; 2] =
    [Part { weight: 0.35, mean: -0.6, deviation: 0.2 }, Part { weight: 0.65, mean: 0.4, deviation: 0.1 }];

/// A sampler with a spacing that it supports.
#[derive(Clone, Copy, Debug)]
pub struct Combination {
    pub sampler: &'static SamplerInfo,
    pub spacing: Spacing,
}

/// All combinations.
pub fn combinations() -> Vec<Combination> {
    let of = |sampler: &'static SamplerInfo| {
        sampler.spacings.iter().map(move |&spacing| Combination { sampler, spacing })
    };
    SAMPLERS.iter().flat_map(of).collect()
}

/// Every schedule of 1000 timesteps, without and with zero terminal SNR, by name.
pub fn schedules() -> Vec<(String, Schedule)> {
    // "quadratic" is an alias of "scaled-linear".
    let kinds = ScheduleKind::ALL.into_iter().filter(|&kind| kind != ScheduleKind::Quadratic);
    let each = [false, true].into_iter().flat_map(|zero| kinds.clone().map(move |kind| (kind, zero)));
    each.map(|(kind, zero_terminal_snr)| {
        let options = ScheduleOptions { kind, zero_terminal_snr, ..Default::default() };
        let name = format!("{kind}{}", if zero_terminal_snr { ", zero SNR" } else { "" });
        (name, options.build().expect("a schedule"))
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

/// Largest allowed distance for a number of steps: discretization error plus sampling error. Samples that are
/// all the data's mean, or random black and white, have a distance of 0.9 or more.
pub fn limit(steps: usize) -> f64 {
    (5.0 / steps as f64 + 0.05).min(0.6)
}

/// Wasserstein distance of the samples from the data, divided by the data's standard deviation; the error if
/// the combination is refused. Random black and white has about 1; 0.03 is sampling error.
pub fn distance(
    combination: Combination,
    schedule: &Schedule,
    steps: usize,
    (prediction, threshold): (Prediction, Threshold),
    quantiles: &[f64],
) -> Result<f64, String> {
    let Combination { sampler, spacing } = combination;
    let (steps, spacing, threshold) = (Some(steps), Some(spacing), Some(threshold));
    let options = SamplerOptions { sampler, steps, spacing, threshold, ..SamplerOptions::default() };
    let built = options.build(schedule, prediction).map_err(|error| error.to_string())?;
    let mut mixture = Mixture::new(schedule, &DATA, SAMPLES);
    mixture.prediction = prediction;
    let x = built.sample(&mut mixture, NoiseKey { seed: 4, first: 0 }, &mut |_| Ok(())).expect("samples");
    Ok(wasserstein(x, quantiles))
}

/// Wasserstein distance of samples from the data, given by as many quantiles, divided by the data's standard
/// deviation.
pub fn wasserstein(mut x: Vec<f32>, quantiles: &[f64]) -> f64 {
    const DEVIATION: f64 = 0.5;
    x.sort_unstable_by(f32::total_cmp);
    let far = x.iter().zip(quantiles).map(|(&x, q)| (f64::from(x) - q).abs()).sum::<f64>();
    far / x.len() as f64 / DEVIATION
}

/// Prediction types and thresholds; the expected result does not depend on them.
pub const SETTINGS: [(Prediction, Threshold); 4] = [
    (Prediction::Eps, Threshold::Clip),
    (Prediction::Eps, Threshold::None),
    (Prediction::V, Threshold::Clip),
    (Prediction::X0, Threshold::None),
];

/// A row for each combination, with the worst distance divided by the limit for each schedule and number of
/// steps, or the error if refused; `settings(i)` are the settings to try for cell i of a row.
pub fn matrix<'a>(
    schedules: &[(String, Schedule)],
    settings: impl Fn(usize) -> &'a [(Prediction, Threshold)] + Sync,
) -> Vec<(Combination, Vec<Result<f64, String>>)> {
    let quantiles = quantiles(&schedules[0].1, SAMPLES);
    let cell = |combination: Combination, i: usize| {
        let (schedule, steps) = (&schedules[i / STEPS.len()].1, STEPS[i % STEPS.len()]);
        let each =
            settings(i).iter().map(|&setting| distance(combination, schedule, steps, setting, &quantiles));
        // NaN is the worst of all.
        let worst = |a: f64, b: f64| if a.is_nan() || b.is_nan() { f64::NAN } else { a.max(b) };
        each.reduce(|a, b| Ok(worst(a?, b?))).expect("settings").map(|far| far / limit(steps))
    };
    let row = |combination: Combination| {
        (combination, (0..schedules.len() * STEPS.len()).map(|i| cell(combination, i)).collect())
    };
    combinations().into_par_iter().map(row).collect()
}

#[test]
fn every_spacing_sampler_and_schedule_samples_the_data_or_is_refused() {
    let schedules = schedules();
    // Cycle through the settings; the example `spacing_matrix` tries all of them for every cell.
    let settings = |i: usize| &SETTINGS[i % SETTINGS.len()..][..1];
    for (Combination { sampler, spacing }, row) in matrix(&schedules, settings) {
        for (i, far) in row.into_iter().enumerate() {
            let (schedule, steps) = (&schedules[i / STEPS.len()].0, STEPS[i % STEPS.len()]);
            let case = format!("{} {spacing} {schedule} {steps}", sampler.name);
            match far {
                // This many sigmas leave gaps on every schedule.
                Err(error) => assert!(
                    spacing == Spacing::Sigma && error.contains("give karras or exponential"),
                    "{case}: {error}"
                ),
                Ok(far) => assert!(far <= 1.0 && spacing != Spacing::Sigma, "{case}: {far} of the limit"),
            }
        }
    }
}
