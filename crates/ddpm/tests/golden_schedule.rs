//! The schedules and the reverse step against values from NumPy and diffusers (`tools/golden/schedule.py`).

use ddpm::process::{posterior_mean, predict_x0};
use ddpm::schedule::{Schedule, ScheduleKind, ScheduleOptions};
use serde_json::Value;

/// Relative error of a schedule value; both sides are f64.
const TOLERANCE: f64 = 1e-12;
/// As [`TOLERANCE`], for values computed as differences of values near 1: an absolute error of a few f64::EPSILON in
/// the smallest beta, 4e-5, and in the product of all alphas.
const TOLERANCE_OF_DIFFERENCES: f64 = 1e-10;
/// Relative error of diffusers' betas, which are computed in f32: a few roundings.
const DIFFUSERS: f64 = 5e-7;
/// Absolute error of diffusers' betas of rescaled schedules, which are differences of f32 values near 1: the product
/// of all alphas contributes a few f32::EPSILON to their quotient.
const DIFFUSERS_RESCALED: f64 = 5e-6;

fn golden() -> Value {
    serde_json::from_str(include_str!("golden/schedule.json")).expect("JSON")
}

fn list<'a>(v: &'a Value, key: &str) -> &'a [Value] {
    v[key].as_array().unwrap_or_else(|| panic!("no list {key}"))
}

fn f64_values(v: &Value, key: &str) -> Vec<f64> {
    list(v, key).iter().map(|x| x.as_f64().expect("a number")).collect()
}

fn f32_values(v: &Value, key: &str) -> Vec<f32> {
    f64_values(v, key).into_iter().map(|x| x as f32).collect()
}

fn count(v: &Value, key: &str) -> usize {
    v[key].as_u64().unwrap_or_else(|| panic!("no number {key}")) as usize
}

#[test]
fn schedule_values_match_numpy() {
    let golden = golden();
    let schedules = list(&golden, "schedules");
    assert_eq!(schedules.len(), 2);
    for entry in schedules {
        let number = |key: &str| entry[key].as_f64().expect("a number");
        let timesteps = count(entry, "timesteps");
        let s = Schedule::linear(timesteps, number("beta_start"), number("beta_end")).expect("a schedule");
        assert_eq!(s.timesteps(), timesteps);
        let quantities: [(&str, &dyn Fn(usize) -> f64); 10] = [
            ("beta", &|t| s.beta(t)),
            ("alpha_bar", &|t| s.alpha_bar(t)),
            ("sqrt_alpha_bar", &|t| s.alpha_bar(t).sqrt()),
            ("sqrt_one_minus_alpha_bar", &|t| (1.0 - s.alpha_bar(t)).sqrt()),
            ("recip_sqrt_alpha", &|t| 1.0 / s.alpha(t).sqrt()),
            ("recip_sqrt_alpha_bar", &|t| 1.0 / s.alpha_bar(t).sqrt()),
            ("recip_sqrt_alpha_bar_minus_one", &|t| (1.0 / s.alpha_bar(t) - 1.0).sqrt()),
            ("beta_tilde", &|t| s.posterior(t).variance),
            ("mean_x0", &|t| s.posterior(t).x0),
            ("mean_xt", &|t| s.posterior(t).xt),
        ];
        for (key, ours) in quantities {
            let expected = f64_values(entry, key);
            assert_eq!(expected.len(), list(entry, "t").len());
            for (t, expected) in f64_values(entry, "t").into_iter().zip(expected) {
                let ours = ours(t as usize);
                let error = (ours - expected).abs();
                assert!(error <= TOLERANCE * expected.abs(), "{key}, t = {t}: {ours} for {expected}");
            }
        }
    }
}

#[test]
fn all_schedules_match_other_programs() {
    let golden = golden();
    let mut seen = Vec::new();
    for entry in list(&golden, "kinds") {
        let kind: ScheduleKind = entry["kind"].as_str().expect("a name").parse().expect("a schedule");
        let zero = entry["zero_terminal_snr"].as_bool().expect("a bool");
        let timesteps = count(entry, "timesteps");
        let options = ScheduleOptions { kind, timesteps, zero_terminal_snr: zero, ..Default::default() };
        let s = options.build().expect("a schedule");
        let case = format!("{kind}, T = {timesteps}, zero terminal SNR: {zero}");
        let tolerance = match kind {
            ScheduleKind::Linear | ScheduleKind::ScaledLinear | ScheduleKind::Quadratic if !zero => TOLERANCE,
            _ => TOLERANCE_OF_DIFFERENCES,
        };
        let mut worst = [0f64; 2];
        for (i, t) in f64_values(entry, "t").into_iter().map(|t| t as usize).enumerate() {
            let number = |key: &str| list(entry, key)[i].as_f64();
            for (key, ours) in [("beta", s.beta(t)), ("alpha_bar", s.alpha_bar(t))] {
                let want = number(key).expect("a number");
                let error = (ours - want).abs();
                assert!(error <= tolerance * want, "{case}: {key} at {t} is {ours}, NumPy's {want}");
                worst[0] = worst[0].max(if want > 0.0 { error / want } else { 0.0 });
            }
            // A relative error of alpha_bar is an absolute error of its logarithm.
            let want = number("log_snr").unwrap_or(f64::NEG_INFINITY);
            let same = s.log_snr(t) == want || (s.log_snr(t) - want).abs() <= tolerance * (1.0 + want.abs());
            assert!(same, "{case}: log SNR at {t} is {}, NumPy's {want}", s.log_snr(t));
            if entry.get("diffusers_beta").is_some()
                && let Some(want) = number("diffusers_beta")
            {
                let error = (s.beta(t) - want).abs() / if zero { 1.0 } else { want };
                let most = if zero { DIFFUSERS_RESCALED } else { DIFFUSERS };
                assert!(error <= most, "{case}: beta at {t} is {}, diffusers' {want}", s.beta(t));
                worst[1] = worst[1].max(error);
            }
        }
        println!("{case}: within {:.1e} of NumPy, {:.1e} of diffusers", worst[0], worst[1]);
        seen.push(kind);
    }
    assert!(ScheduleKind::ALL.iter().all(|kind| seen.iter().filter(|k| *k == kind).count() == 4), "{seen:?}");
}

#[test]
fn reverse_steps_match_numpy_with_and_without_clipping() {
    let golden = golden();
    let schedule = Schedule::linear(1000, 1e-4, 0.02).expect("a schedule");
    let mut clipped_elements = 0;
    for case in list(&golden, "reverse_steps") {
        assert_eq!(count(case, "timesteps"), schedule.timesteps());
        let t = count(case, "t");
        let (x_t, eps, z) = (f32_values(case, "x_t"), f32_values(case, "eps_pred"), f64_values(case, "z"));
        let (mut x_0, mut mean) = (vec![0.0; x_t.len()], vec![0.0; x_t.len()]);
        let posterior = schedule.posterior(t);
        let sigma = if t == 0 { 0.0 } else { posterior.variance.sqrt() };
        for (clip, key) in [(false, "x_prev_unclipped"), (true, "x_prev_clipped")] {
            predict_x0(&schedule, t, &x_t, &eps, clip, &mut x_0).expect("signal");
            posterior_mean(&schedule, t, &x_0, &x_t, &mut mean);
            let (expected_x0, expected) = (f64_values(case, "x0"), f64_values(case, key));
            let eq11 = f64_values(case, "x_prev_eps");
            for i in 0..x_t.len() {
                let x0 = if clip { expected_x0[i].clamp(-1.0, 1.0) } else { expected_x0[i] };
                let unit = f64::from(f32::EPSILON);
                let error = (f64::from(x_0[i]) - x0).abs();
                assert!(error <= unit * x0.abs(), "x0, t = {t}: {} for {x0}", x_0[i]);
                let ours = f64::from(mean[i]) + sigma * z[i];
                // Two roundings to f32: x0 and the mean.
                let scale = (posterior.x0 * x0).abs() + (posterior.xt * f64::from(x_t[i])).abs();
                let error = (ours - expected[i]).abs();
                assert!(error <= unit * scale, "{key}, t = {t}: {ours} for {}", expected[i]);
                if !clip {
                    let error = (ours - eq11[i]).abs();
                    assert!(error <= unit * scale, "eq. 11, t = {t}: {ours} for {}", eq11[i]);
                } else if expected_x0[i].abs() > 1.0 {
                    clipped_elements += 1;
                }
            }
        }
    }
    let expected: usize = list(&golden, "reverse_steps").iter().map(|c| count(c, "clipped_elements")).sum();
    assert_eq!(clipped_elements, expected);
}
