//! What samplers draw: the data's distribution, whatever the schedule, the spacing and the prediction.

use crate::matrix::{quantiles, wasserstein};
use crate::mixture::{Mixture, Part};
use ddpm::Result;
use ddpm::denoiser::Denoiser;
use ddpm::process::Prediction;
use ddpm::sampler::{
    Levels, Listed, Options, SAMPLERS, SampleStep, Sampler, Seeds, Spacing, Threshold, find,
};
use ddpm::schedule::{Level, Schedule};
use ddpm::train::config::{DiffusionConfig, ScheduleKind};
use ddpm_engine::rng::{Purpose, Stream};

const MIXTURE: [Part; 2] =
    [Part { weight: 0.35, mean: -0.6, deviation: 0.2 }, Part { weight: 0.65, mean: 0.4, deviation: 0.1 }];

fn schedule() -> Schedule {
    Schedule::linear(1000, 1e-4, 0.02).expect("a schedule")
}

fn built(sampler: &'static Listed, steps: usize, schedule: &Schedule, p: Prediction) -> Box<dyn Sampler> {
    let options =
        Options { sampler, steps: Some(steps), threshold: Some(Threshold::None), ..Options::default() };
    options.build(schedule, p).expect("a sampler")
}

fn draw(sampler: &dyn Sampler, mixture: &mut Mixture, seed: u64, first: u32) -> Vec<f32> {
    sampler.sample(mixture, Seeds { seed, first }, &mut |_| Ok(())).expect("samples")
}

/// The greatest distance of the distribution function of the samples from the mixture's (Kolmogorov and Smirnov).
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
fn every_sampler_draws_from_the_datas_distribution() {
    // 1.95 / sqrt(n) is exceeded by true samples once in 1000; as much again for steps that are not infinitely small.
    const N: usize = 20_000;
    let most = 2.0 * 1.95 / (N as f64).sqrt();
    for sampler in SAMPLERS {
        let mut mixture = Mixture::new(&schedule(), &MIXTURE, N);
        let drawn = draw(&*built(sampler, 200, &schedule(), Prediction::Eps), &mut mixture, 4, 0);
        let far = distance(&mixture, drawn);
        println!("{:16} {far:.4} of {most:.4}", sampler.name);
        assert!(far < most, "{}: {far}", sampler.name);
    }
}

#[test]
fn a_single_image_is_found_by_every_sampler_schedule_and_prediction() {
    // The expected image is known to f32's rounding, divided by the signal that is left: 1e-3 at the worst, in the first
    // step, and made good by later ones. Steps that are so long that they multiply roundings are not asked for.
    const TOLERANCE: f32 = 1e-4;
    let point = [Part { weight: 1.0, mean: 0.37, deviation: 0.0 }];
    for sampler in SAMPLERS {
        for kind in ScheduleKind::ALL {
            for zero_terminal_snr in [false, true] {
                let config = DiffusionConfig { schedule: kind, zero_terminal_snr, ..Default::default() };
                let schedule = Schedule::from_config(&config).expect("a schedule");
                for prediction in Prediction::ALL {
                    for &spacing in sampler.spacings {
                        // Sigmas are too far apart in so few steps, and refused (spacing.rs).
                        for steps in if spacing == Spacing::Sigma { vec![] } else { vec![10, 37] } {
                            let options = Options {
                                sampler,
                                steps: Some(steps),
                                spacing: Some(spacing),
                                ..Options::default()
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
fn white_images_are_white_from_no_signal_in_any_number_of_steps() {
    // As above, of 1 instead of 0.37, and from the timestep at which nothing is left: an eighth of what one of 255 is.
    const TOLERANCE: f32 = 1e-3;
    let white = [Part { weight: 1.0, mean: 1.0, deviation: 0.0 }];
    for sampler in SAMPLERS {
        for schedule in ScheduleKind::ALL {
            let config = DiffusionConfig { schedule, zero_terminal_snr: true, ..Default::default() };
            let schedule = Schedule::from_config(&config).expect("a schedule");
            for prediction in [Prediction::X0, Prediction::V] {
                for &spacing in sampler.spacings {
                    for (steps, threshold) in
                        [1, 2, 3, 5, 10].map(|n| [(n, Threshold::None), (n, Threshold::Clip)]).concat()
                    {
                        let (steps, spacing, threshold) = (Some(steps), Some(spacing), Some(threshold));
                        let options = Options { sampler, steps, spacing, threshold, ..Options::default() };
                        // Refused where no sampler can (spacing.rs).
                        let Ok(built) = options.build(&schedule, prediction) else { continue };
                        let mut mixture = Mixture::new(&schedule, &white, 3);
                        mixture.prediction = prediction;
                        let x = draw(&*built, &mut mixture, 1, 0);
                        let off = x.iter().map(|v| (v - 1.0).abs()).fold(0.0, f32::max);
                        let case = format!("{} {} {prediction} {options:?}", sampler.name, config.schedule);
                        assert!(off < TOLERANCE, "{case}: {x:?}");
                    }
                }
            }
        }
    }
}

/// A network whose noise is off by a fiftieth of what it is, at random.
struct Imperfect(Mixture);

impl Denoiser for Imperfect {
    fn batch(&self) -> usize {
        self.0.batch()
    }

    fn image_len(&self) -> usize {
        self.0.image_len()
    }

    fn predict(&mut self, x_t: &[f32], t: f64, output: &mut [f32]) -> Result<()> {
        self.0.predict(x_t, t, output)?;
        let mut z = vec![0.0; output.len()];
        Stream::new(8, Purpose::Test, t as u32, 0).fill_normal(&mut z);
        output.iter_mut().zip(z).for_each(|(y, z)| *y += 0.02 * z);
        Ok(())
    }
}

#[test]
fn errors_that_clipping_cuts_off_do_not_pile_up_over_ddims_steps_with_the_clipped_output() {
    // The measurement behind the default.
    const N: usize = 5000;
    let quantiles = quantiles(&schedule(), N);
    let sampler = find("ddim").expect("there");
    let far = |used| {
        let options =
            Options { sampler, steps: Some(1000), use_clipped_model_output: used, ..Options::default() };
        let built = options.build(&schedule(), Prediction::Eps).expect("a sampler");
        let mut network = Imperfect(Mixture::new(&schedule(), &MIXTURE, N));
        let x = built.sample(&mut network, Seeds { seed: 4, first: 0 }, &mut |_| Ok(())).expect("samples");
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
fn all_steps_are_shown_and_an_error_stops_them() {
    for sampler in SAMPLERS {
        let mut mixture = Mixture::new(&schedule(), &MIXTURE, 2);
        let sampler = built(sampler, 12, &schedule(), Prediction::Eps);
        let mut seen = Vec::new();
        let mut last = Vec::new();
        let seeds = Seeds { seed: 1, first: 0 };
        let x = sampler.sample(&mut mixture, seeds, &mut |step| {
            seen.push((step.done, step.steps));
            last = step.x.to_vec();
            Ok(())
        });
        assert_eq!(seen, (1..=12).map(|i| (i, 12)).collect::<Vec<_>>());
        assert_eq!(x.expect("samples"), last);
        let asked = mixture.asked;
        let stopped = sampler.sample(&mut mixture, seeds, &mut |_| Err(ddpm::Error::Interrupted));
        assert!(stopped.is_err() && mixture.asked - asked <= asked / 2);
    }
}

/// The mean distance from where the probability flow ends, for each number of steps, at a level that all visit.
fn errors(sampler: &'static Listed, steps: &[usize]) -> Vec<f64> {
    const N: usize = 64;
    let timesteps = 1024;
    let schedule = Schedule::linear(timesteps, 1e-4, 0.02).expect("a schedule");
    // Even steps in t are whole where they divide T, and the level is T / 4.
    let even = sampler.spacings == [Spacing::Uniform];
    let spacing = if even { Spacing::Uniform } else { Spacing::Exponential };
    let of = |&steps: &usize| {
        let options = Options {
            sampler,
            steps: Some(steps),
            spacing: Some(spacing),
            threshold: Some(Threshold::None),
            ..Options::default()
        };
        let mut mixture = Mixture::new(&schedule, &MIXTURE, N);
        let exact = Mixture::new(&schedule, &MIXTURE, N);
        let levels = Levels::new(&schedule, Prediction::Eps, Some(steps), spacing).expect("levels");
        // Done steps: those to the last level before no noise, or to T / 4.
        let compared = if even { 3 * steps / 4 - 1 } else { steps - 1 };
        let (from, to) = (levels.at(0), levels.at(compared));
        let seeds = Seeds { seed: 3, first: 0 };
        let mut start = vec![0.0; N];
        seeds.fill(Purpose::SampleStart, 0, 1, &mut start);
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
            .sample(&mut mixture, seeds, &mut measure)
            .expect("samples");
        error
    };
    steps.iter().map(of).collect()
}

#[test]
fn the_measured_order_is_the_declared_one() {
    // What is left of higher orders at 64 steps and more.
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
