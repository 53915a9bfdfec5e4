//! Trajectories against diffusers' (`tools/golden/samplers.py`).

use crate::mixture::{Mixture, Part};
use ddpm::process::Prediction;
use ddpm::sampler::{Options, SAMPLERS, Seeds, Threshold, Variance, find};
use ddpm::schedule::Schedule;
use serde_json::Value;

/// Absolute error of a number of a state, of numbers up to about 4: states are f32 here, and some schedulers' too.
const TOLERANCE: f64 = 1e-5;

fn numbers(v: &Value) -> Vec<f64> {
    v.as_array().expect("a list").iter().map(|x| x.as_f64().expect("a number")).collect()
}

fn count(v: &Value) -> usize {
    v.as_u64().expect("a whole number") as usize
}

fn options(case: &Value) -> Options {
    Options {
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
    }
}

#[test]
fn every_trajectory_is_diffusers() {
    let golden: Value = serde_json::from_str(include_str!("golden.json")).expect("JSON");
    let schedule = Schedule::linear(1000, 1e-4, 0.02).expect("a schedule");
    let mut seen = Vec::new();
    for case in golden["cases"].as_array().expect("a list") {
        let options = options(case);
        let scale = case["scale"].as_f64().expect("a number");
        let parts = golden["mixture"].as_array().expect("a list").iter().map(|part| {
            let part = numbers(part);
            Part { weight: part[0], mean: part[1] * scale, deviation: part[2] * scale }
        });
        let parts: Vec<Part> = parts.collect();
        let states = case["states"].as_object().expect("states");
        let mut worst = 0f64;
        for prediction in Prediction::ALL {
            let sampler = options.build(&schedule, prediction).expect("a sampler");
            let mut mixture = Mixture::new(&schedule, &parts, count(&golden["pictures"]));
            (mixture.prediction, mixture.numbers) = (prediction, count(&golden["numbers"]));
            mixture.tells_variance = options.variance == Some(Variance::Learned);
            let mut met = 0;
            let seeds = Seeds { seed: golden["seed"].as_u64().expect("a seed"), first: 0 };
            let last = sampler.sample(&mut mixture, seeds, &mut |step| {
                if let Some(state) = states.get(&step.done.to_string()) {
                    met += 1;
                    for (ours, theirs) in step.x.iter().zip(numbers(state)) {
                        worst = worst.max((f64::from(*ours) - theirs).abs());
                    }
                }
                Ok(())
            });
            assert_eq!((met, last.expect("samples").len()), (states.len(), numbers(&states["1"]).len()));
        }
        let mut case = case.clone();
        case.as_object_mut().expect("an object").remove("states");
        println!("{case}: within {worst:.1e}");
        assert!(worst < TOLERANCE, "{case}: {worst:e}");
        seen.push(options.sampler.name);
    }
    for sampler in SAMPLERS {
        assert!(seen.contains(&sampler.name), "{} has no golden trajectory", sampler.name);
    }
}
