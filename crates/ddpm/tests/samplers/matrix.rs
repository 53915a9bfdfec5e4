//! How far samples are from the data's distribution, for every sampler, spacing, schedule and number of steps.

use crate::mixture::{Mixture, Part};
use ddpm::process::Prediction;
use ddpm::sampler::{Listed, Options, SAMPLERS, Seeds, Spacing, Threshold};
use ddpm::schedule::{Level, Schedule};
use ddpm::train::config::{DiffusionConfig, ScheduleKind};

/// Numbers of steps.
pub const STEPS: [usize; 5] = [5, 10, 20, 30, 50];
/// Samples of each case.
pub const SAMPLES: usize = 1000;
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

/// The values that divide the data's distribution into equal parts.
pub fn quantiles(schedule: &Schedule) -> Vec<f64> {
    let mixture = Mixture::new(schedule, &DATA, 1);
    let quantile = |i: usize| {
        let (mut low, mut high) = (-4.0, 4.0);
        for _ in 0..60 {
            let middle = 0.5 * (low + high);
            let below = mixture.below(middle, Level::CLEAN) < (i as f64 + 0.5) / SAMPLES as f64;
            (low, high) = if below { (middle, high) } else { (low, middle) };
        }
        0.5 * (low + high)
    };
    (0..SAMPLES).map(quantile).collect()
}

/// Wasserstein's distance of the samples from the data, over the data's deviation; the reason where the way is refused. 1 is about
/// what black and white at random are off; 0.02 is chance.
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
    let mut x = built.sample(&mut mixture, Seeds { seed: 4, first: 0 }, &mut |_| Ok(())).expect("samples");
    x.sort_unstable_by(f32::total_cmp);
    let far = x.iter().zip(quantiles).map(|(&x, q)| (f64::from(x) - q).abs()).sum::<f64>();
    let deviation = 0.5;
    Ok(far / SAMPLES as f64 / deviation)
}
