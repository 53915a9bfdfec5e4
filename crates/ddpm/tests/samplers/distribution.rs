//! Samplers reproduce the data distribution with every schedule, spacing and prediction type.

use crate::matrix::{quantiles, wasserstein};
use crate::mixture::{Mixture, Part};
use ddpm::denoiser::Denoiser;
use ddpm::process::Prediction;
use ddpm::sampler::{
    Levels, NoiseKey, SAMPLERS, SampleStep, Sampler, SamplerInfo, SamplerOptions, Spacing, Threshold, find,
};
use ddpm::schedule::{Level, Schedule, ScheduleKind, ScheduleOptions};
use ddpm_rng::{Purpose, Stream};

const MIXTURE: [Part; 2] =
    [Part { weight: 0.35, mean: -0.6, deviation: 0.2 }, Part { weight: 0.65, mean: 0.4, deviation: 0.1 }];

fn schedule() -> Schedule {
    Schedule::linear(1000, 1e-4, 0.02).expect("a schedule")
}

fn built(
    sampler: &'static SamplerInfo,
    steps: usize,
    schedule: &Schedule,
    p: Prediction,
) -> Box<dyn Sampler> {
    let options = SamplerOptions {
        sampler,
        steps: Some(steps),
        threshold: Some(Threshold::None),
        ..SamplerOptions::default()
    };
    options.build(schedule, p).expect("a sampler")
}

fn draw(sampler: &dyn Sampler, mixture: &mut Mixture, seed: u64, first: u32) -> Vec<f32> {
    sampler.sample(mixture, NoiseKey { seed, first }, &mut |_| Ok(())).expect("samples")
}

/// Kolmogorov-Smirnov distance of the samples from the mixture.
fn distance(mixture: &Mixture, mut x: Vec<f32>) -> f64 {
    x.sort_unstable_by(f32::total_cmp);
    let n = x.len() as f64;
    let far = |(i, &x): (usize, &f32)| {
        let f = mixture.below(f64::from(x), Level::CLEAN);
        (f - i as f64 / n).abs().max((f - (i + 1) as f64 / n).abs())
    };
    x.iter().enumerate().map(far).fold(0.0, f64::max)
}

#[test]
fn every_sampler_samples_the_data_distribution() {
    // Exact samples exceed 1.95 / sqrt(n) once in 1000; twice that allows for discretization error.
    const N: usize = 20_000;
    let limit = 2.0 * 1.95 / (N as f64).sqrt();
    for sampler in SAMPLERS {
        let mut mixture = Mixture::new(&schedule(), &MIXTURE, N);
        let samples = draw(&*built(sampler, 200, &schedule(), Prediction::Eps), &mut mixture, 4, 0);
        let far = distance(&mixture, samples);
        println!("{:16} {far:.4} of {limit:.4}", sampler.name);
        assert!(far < limit, "{}: {far}", sampler.name);
    }
}

#[test]
fn every_sampler_schedule_and_prediction_finds_a_single_image() {
    // The predicted image is exact up to f32 rounding divided by the remaining signal: 1e-3 at worst, in the
    // first step, which later steps correct. Steps so long that they amplify rounding errors are not tested.
    const TOLERANCE: f32 = 1e-4;
    let point = [Part { weight: 1.0, mean: 0.37, deviation: 0.0 }];
    for sampler in SAMPLERS {
        for kind in ScheduleKind::ALL {
            for zero_terminal_snr in [false, true] {
                let options = ScheduleOptions { kind, zero_terminal_snr, ..Default::default() };
                let schedule = options.build().expect("a schedule");
                for prediction in Prediction::ALL {
                    for &spacing in sampler.spacings {
                        // Sigma spacing is refused for so few steps (spacing.rs).
                        for steps in if spacing == Spacing::Sigma { vec![] } else { vec![10, 37] } {
                            let options = SamplerOptions {
                                sampler,
                                steps: Some(steps),
                                spacing: Some(spacing),
                                ..SamplerOptions::default()
                            };
                            let mut mixture = Mixture::new(&schedule, &point, 3);
                            mixture.prediction = prediction;
                            let built = options.build(&schedule, prediction).expect("a sampler");
                            let x = draw(&*built, &mut mixture, 1, 0);
                            let case = format!(
                                "{} {kind} {zero_terminal_snr} {prediction} {spacing} {steps}",
                                sampler.name
                            );
                            assert!(x.iter().all(|v| (v - 0.37).abs() < TOLERANCE), "{case}: {x:?}");
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn white_images_stay_white_from_zero_signal_in_any_number_of_steps() {
    // As above, for 1 instead of 0.37 and from a timestep without signal: an eighth of 1/255 of the range.
    const TOLERANCE: f32 = 1e-3;
    let white = [Part { weight: 1.0, mean: 1.0, deviation: 0.0 }];
    for sampler in SAMPLERS {
        for kind in ScheduleKind::ALL {
            let options = ScheduleOptions { kind, zero_terminal_snr: true, ..Default::default() };
            let schedule = options.build().expect("a schedule");
            for prediction in [Prediction::X0, Prediction::V] {
                for &spacing in sampler.spacings {
                    for (steps, threshold) in
                        [1, 2, 3, 5, 10].map(|n| [(n, Threshold::None), (n, Threshold::Clip)]).concat()
                    {
                        let (steps, spacing, threshold) = (Some(steps), Some(spacing), Some(threshold));
                        let options = SamplerOptions {
                            sampler,
                            steps,
                            spacing,
                            threshold,
                            ..SamplerOptions::default()
                        };
                        // Refused where no sampler works (spacing.rs).
                        let Ok(built) = options.build(&schedule, prediction) else { continue };
                        let mut mixture = Mixture::new(&schedule, &white, 3);
                        mixture.prediction = prediction;
                        let x = draw(&*built, &mut mixture, 1, 0);
                        let off = x.iter().map(|v| (v - 1.0).abs()).fold(0.0, f32::max);
                        let case = format!("{} {} {prediction} {options:?}", sampler.name, kind);
                        assert!(off < TOLERANCE, "{case}: {x:?}");
                    }
                }
            }
        }
    }
}

/// A network whose predicted noise has a random error of 2 %.
struct Imperfect(Mixture);

impl Denoiser for Imperfect {
    fn batch(&self) -> usize {
        self.0.batch()
    }

    fn image_len(&self) -> usize {
        self.0.image_len()
    }

    fn predict(&mut self, x_t: &[f32], t: f64, output: &mut [f32]) -> ddpm::diffusion::Result<()> {
        self.0.predict(x_t, t, output)?;
        let mut z = vec![0.0; output.len()];
        Stream::new(8, Purpose::Test, t as u32, 0).fill_normal(&mut z);
        output.iter_mut().zip(z).for_each(|(y, z)| *y += 0.02 * z);
        Ok(())
    }
}

#[test]
fn clipped_model_output_keeps_errors_from_accumulating_over_ddim_steps() {
    // The measurement that justifies the default.
    const N: usize = 5000;
    let quantiles = quantiles(&schedule(), N);
    let sampler = find("ddim").expect("there");
    let far = |used| {
        let options = SamplerOptions {
            sampler,
            steps: Some(1000),
            use_clipped_model_output: used,
            ..SamplerOptions::default()
        };
        let built = options.build(&schedule(), Prediction::Eps).expect("a sampler");
        let mut network = Imperfect(Mixture::new(&schedule(), &MIXTURE, N));
        let x = built.sample(&mut network, NoiseKey { seed: 4, first: 0 }, &mut |_| Ok(())).expect("samples");
        wasserstein(x, &quantiles)
    };
    let (clipped, predicted) = (far(Some(true)), far(Some(false)));
    println!("clipped {clipped:.4}, as predicted {predicted:.4}");
    assert!(predicted > 2.0 * clipped, "{clipped} and {predicted}");
    assert_eq!(far(None), clipped, "the default");
}

#[test]
fn an_image_does_not_depend_on_its_batch() {
    for sampler in SAMPLERS {
        let all = |batch, first| {
            let mut mixture = Mixture::new(&schedule(), &MIXTURE, batch);
            draw(&*built(sampler, 20, &schedule(), Prediction::Eps), &mut mixture, 9, first)
        };
        let six = all(6, 0);
        assert_eq!(six[2..5], all(3, 2)[..], "{}", sampler.name);
        assert_eq!(six[5..], all(1, 5)[..], "{}", sampler.name);
        assert!(six[0] != six[1]);
    }
}

#[test]
fn all_steps_are_reported_and_an_error_stops_sampling() {
    for sampler in SAMPLERS {
        let mut mixture = Mixture::new(&schedule(), &MIXTURE, 2);
        let sampler = built(sampler, 12, &schedule(), Prediction::Eps);
        let mut seen = Vec::new();
        let mut last = Vec::new();
        let key = NoiseKey { seed: 1, first: 0 };
        let x = sampler.sample(&mut mixture, key, &mut |step| {
            seen.push((step.done, step.steps));
            last = step.x.to_vec();
            Ok(())
        });
        assert_eq!(seen, (1..=12).map(|i| (i, 12)).collect::<Vec<_>>());
        assert_eq!(x.expect("samples"), last);
        let evals = mixture.evals;
        let stopped = sampler.sample(&mut mixture, key, &mut |_| Err(ddpm::diffusion::Error::Interrupted));
        assert!(stopped.is_err() && mixture.evals - evals <= evals / 2);
    }
}

/// Mean error against the exact probability flow ODE for each number of steps, at a level that all of them
/// visit.
fn errors(sampler: &'static SamplerInfo, steps: &[usize]) -> Vec<f64> {
    const N: usize = 64;
    let timesteps = 1024;
    let schedule = Schedule::linear(timesteps, 1e-4, 0.02).expect("a schedule");
    // Steps even in t are integers if their number divides T; the level is T / 4.
    let even = sampler.spacings == [Spacing::Uniform];
    let spacing = if even { Spacing::Uniform } else { Spacing::Exponential };
    let of = |&steps: &usize| {
        let options = SamplerOptions {
            sampler,
            steps: Some(steps),
            spacing: Some(spacing),
            threshold: Some(Threshold::None),
            ..SamplerOptions::default()
        };
        let mut mixture = Mixture::new(&schedule, &MIXTURE, N);
        let exact = Mixture::new(&schedule, &MIXTURE, N);
        let levels = Levels::new(&schedule, Prediction::Eps, Some(steps), spacing).expect("levels");
        // Steps done: up to the last noisy level, or to T / 4.
        let compared = if even { 3 * steps / 4 - 1 } else { steps - 1 };
        let (from, to) = (levels.at(0), levels.at(compared));
        let key = NoiseKey { seed: 3, first: 0 };
        let mut start = vec![0.0; N];
        key.fill(Purpose::SampleStart, 0, 1, &mut start);
        let mut error = f64::NAN;
        let mut measure = |step: SampleStep<'_>| {
            if step.done == compared {
                let far = |(x, start): (&f32, &f32)| {
                    (f64::from(*x) - exact.flow(f64::from(*start), from, to)).abs()
                };
                error = step.x.iter().zip(&start).map(far).sum::<f64>() / N as f64;
            }
            Ok(())
        };
        options
            .build(&schedule, Prediction::Eps)
            .expect("a sampler")
            .sample(&mut mixture, key, &mut measure)
            .expect("samples");
        error
    };
    steps.iter().map(of).collect()
}

#[test]
fn the_measured_order_matches_the_declared_one() {
    // Contribution of higher orders at 64 or more steps.
    const ORDER_TOLERANCE: f64 = 0.25;
    for sampler in SAMPLERS {
        let Some(order) = sampler.order else { continue };
        let steps = [16, 32, 64, 128, 256];
        let e = errors(sampler, &steps);
        let slopes: Vec<f64> = e.windows(2).map(|w| (w[0] / w[1]).log2()).collect();
        let shown: Vec<String> = e.iter().map(|e| format!("{e:.1e}")).collect();
        println!("{:10} order {order}: errors {}, slopes {slopes:.2?}", sampler.name, shown.join(" "));
        for slope in &slopes[2..] {
            assert!((slope - f64::from(order)).abs() < ORDER_TOLERANCE, "{}: {slopes:?}", sampler.name);
        }
    }
}
