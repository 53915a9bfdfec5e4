//! Trajectories compared with diffusers (`tools/golden/samplers.py`).

use crate::mixture::{Mixture, Part};
use ddpm::process::Prediction;
use ddpm::sampler::{Levels, NoiseKey, SAMPLERS, SamplerOptions, Spacing, Threshold, Variance, find};
use ddpm::schedule::{Level, Schedule};
use serde_json::Value;

/// Absolute error of a state's elements, with magnitudes up to about 4: states are f32 here and in some
/// schedulers.
const TOLERANCE: f64 = 1e-5;

fn values(v: &Value) -> Vec<f64> {
    v.as_array().expect("a list").iter().map(|x| x.as_f64().expect("a number")).collect()
}

fn count(v: &Value) -> usize {
    v.as_u64().expect("an integer") as usize
}

fn options(case: &Value) -> SamplerOptions {
    SamplerOptions {
        sampler: find(case["sampler"].as_str().expect("a name")).expect("a sampler"),
        steps: Some(count(&case["steps"])),
        spacing: Some(case["spacing"].as_str().expect("a name").parse().expect("a spacing")),
        eta: case["eta"].as_f64(),
        variance: match case["variance"].as_str() {
            Some("large") => Some(Variance::Large),
            Some("learned") => Some(Variance::Learned),
            _ => None,
        },
        threshold: match case["threshold"].as_str().expect("a name") {
            "none" => Some(Threshold::None),
            "clip" => Some(Threshold::Clip),
            _ => Some(Threshold::Dynamic),
        },
        use_clipped_model_output: case["use_clipped_model_output"].as_bool(),
    }
}

#[test]
fn every_trajectory_matches_diffusers() {
    let golden: Value = serde_json::from_str(include_str!("golden.json")).expect("JSON");
    let plain = Schedule::linear(1000, 1e-4, 0.02).expect("a schedule");
    let stretched = plain.zero_terminal_snr().expect("a schedule");
    let mut seen = Vec::new();
    let mut clipped = Vec::new();
    for case in golden["cases"].as_array().expect("a list") {
        let options = options(case);
        let stretch = case["zero_terminal_snr"].as_bool() == Some(true);
        let schedule = if stretch { &stretched } else { &plain };
        let scale = case["scale"].as_f64().expect("a number");
        let parts = golden["mixture"].as_array().expect("a list").iter().map(|part| {
            let part = values(part);
            Part { weight: part[0], mean: part[1] * scale, deviation: part[2] * scale }
        });
        let parts: Vec<Part> = parts.collect();
        let states = case["states"].as_object().expect("states");
        let mut worst = 0f64;
        // Without signal the noise does not determine x_0.
        for prediction in Prediction::ALL.into_iter().filter(|&p| !stretch || p != Prediction::Eps) {
            let sampler = options.build(schedule, prediction).expect("a sampler");
            let mut mixture = Mixture::new(schedule, &parts, count(&golden["images"]));
            (mixture.prediction, mixture.len) = (prediction, count(&golden["numbers"]));
            mixture.has_variance = options.variance == Some(Variance::Learned);
            let mut compared = 0;
            let key = NoiseKey { seed: golden["seed"].as_u64().expect("a seed"), first: 0 };
            let last = sampler.sample(&mut mixture, key, &mut |step| {
                if let Some(state) = states.get(&step.done.to_string()) {
                    compared += 1;
                    for (ours, theirs) in step.x.iter().zip(values(state)) {
                        worst = worst.max((f64::from(*ours) - theirs).abs());
                    }
                }
                Ok(())
            });
            assert_eq!((compared, last.expect("samples").len()), (states.len(), values(&states["1"]).len()));
        }
        let mut case = case.clone();
        case.as_object_mut().expect("an object").remove("states");
        println!("{case}: within {worst:.1e}");
        assert!(worst < TOLERANCE, "{case}: {worst:e}");
        seen.push(options.sampler.name);
        if options.threshold == Some(Threshold::Clip) {
            clipped.push((options.sampler.name, options.use_clipped_model_output));
        }
    }
    for sampler in SAMPLERS {
        assert!(seen.contains(&sampler.name), "{} has no golden trajectory", sampler.name);
        let settings = if sampler.clipped_output { vec![Some(true), Some(false)] } else { vec![None] };
        for setting in settings {
            assert!(
                clipped.contains(&(sampler.name, setting)),
                "{} {setting:?}: none with clipping",
                sampler.name
            );
        }
    }
}

#[test]
fn timesteps_match_diffusers_for_every_number_of_steps() {
    let golden: Value = serde_json::from_str(include_str!("timesteps.json")).expect("JSON");
    for (all, of) in golden.as_object().expect("an object") {
        let all: usize = all.parse().expect("a number");
        let schedule = Schedule::linear(all, 1e-4, 0.02).expect("a schedule");
        for (spacing, sums) in of.as_object().expect("an object") {
            let spacing = spacing.parse().expect("a spacing");
            assert_eq!(values(sums).len(), all);
            for (n, sum) in (1..).zip(values(sums)) {
                // For one step theirs is timestep 0, from which nothing can be sampled; ours is the last, or
                // refused (spacing.rs).
                if n == 1 && spacing != Spacing::Trailing {
                    continue;
                }
                let levels = Levels::new(&schedule, Prediction::Eps, Some(n), spacing).expect("levels");
                let add = |h: u32, (from, _): (Level, Level)| {
                    h.wrapping_mul(1_000_003).wrapping_add(from.t as u32 + 1)
                };
                assert_eq!(f64::from(levels.pairs().fold(0, add)), sum, "{spacing}, {n} of {all}");
            }
        }
    }
}
